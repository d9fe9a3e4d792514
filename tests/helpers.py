"""What several test files share: covering sets of layouts, drawn tensors, comparison of bits."""

from __future__ import annotations

import itertools

import torch

from kvarn_triton.layout import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES, PageLayout

ON_GPU = torch.cuda.is_available()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def covering_layouts(turn: int = 0) -> list[PageLayout]:
    """Return 16 layouts in which every pair of bits occurs, and every head_dim with every page_size.

    `turn` pairs the bits with other shapes.
    """
    bits = list(itertools.product(SUPPORTED_BITS, SUPPORTED_BITS))
    shapes = list(itertools.product(SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES))
    return [PageLayout(*shape, *bits[(i + 5 * turn) % len(bits)]) for i, shape in enumerate(shapes)]


LAYOUTS = covering_layouts() + (covering_layouts(1) if ON_GPU else [])


def layout_id(value: object) -> str | None:
    """Return the test id of a layout."""
    return f"{value.name}-d{value.head_dim}" if isinstance(value, PageLayout) else None


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return normal random numbers that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def uneven(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normal tiles [..., tokens, channels] whose tokens and channels differ in magnitude, as those of a model do."""
    tokens = torch.exp(0.8 * draw(*shape[:-1], 1, seed=seed + 1000))
    channels = torch.exp(0.8 * draw(*shape[:-2], 1, shape[-1], seed=seed + 2000))
    return draw(*shape, seed=seed) * tokens * channels


def hard_sums() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float32 x, y and z for x * y + z: sums of all magnitudes, sums that cancel, and sums next to ties."""
    x, y, z = (draw(3000, seed=seed) for seed in range(3))
    z *= 2.0 ** torch.arange(-20, 20).repeat(75)
    z[:1000] = -(x * y)[:1000]
    # Half of the last place of z, less than float64 can tell from it: rounding to float64 first gives a tie.
    small = 2.0 ** -torch.arange(15, 23).repeat(125)
    x[1000:2000], y[1000:2000], z[1000:2000] = 1 + small, (1 - small) * 2.0**-24, 1 + 2.0**-23
    return x, y, z


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as integers, so that NaN equals the same NaN."""
    return x.contiguous().view(INT_OF_SIZE[x.element_size()])


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equal shape, dtype and bits."""
    assert result.dtype == expected.dtype and result.shape == expected.shape
    different = bits_of(result) != bits_of(expected)
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} differ, first at {different.nonzero()[0].tolist()}"
    )


def assert_rounded_alike(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equal bits; in the interpreter, whose casts to bfloat16 truncate, at most one bfloat16 step apart."""
    if ON_GPU or result.dtype != torch.bfloat16:
        assert_same_bits(result, expected)
        return
    assert expected.dtype == torch.bfloat16 and result.shape == expected.shape
    steps = (bits_of(result).int() - bits_of(expected).int()).abs()
    assert steps.max() <= 1, f"{int(steps.max())} steps apart"


def strided(x: torch.Tensor) -> torch.Tensor:
    """Return a view with the values of `x` [a, b, c] in memory where NaN lies between its rows; the last stride is 1."""
    a, b, c = x.shape
    memory = torch.full((a + 1, b + 2, c + 16), float("nan"), dtype=x.dtype, device=x.device)
    view = memory[1:, 1:-1, 8 : 8 + c]
    view.copy_(x)
    return view
