"""What several test files share: covering sets of layouts, drawn tensors, comparison of bits and of attention."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvarn_triton import DEFAULT, Encoder, decode_attention, prefill_attention, reference
from kvarn_triton.layout import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES, PageLayout
from kvarn_triton.testing import CacheCase, attention_in, cache_case, relative_error

ON_GPU = torch.cuda.is_available()
SLOW = pytest.mark.slow("the interpreter")
"""Of cases whose branches others run too; see `conftest.py`."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOAT32_ERROR = 2e-6
"""Sums of a thousand float32 products, in another order than the yardstick's."""
LSE_ERROR = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}
"""Rounding of a query to 11, 8 or 24 bits times scores of up to 5, and the sum."""


def covering_layouts(turn: int = 0) -> list[PageLayout]:
    """Return 16 layouts in which every pair of 2, 3, 4 and 8 bits occurs, and every head_dim with every page_size.

    `turn` pairs the bits with other shapes.
    """
    bits = list(itertools.product((2, 3, 4, 8), repeat=2))
    shapes = list(itertools.product(SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES))
    return [PageLayout(*shape, *bits[(i + 5 * turn) % len(bits)]) for i, shape in enumerate(shapes)]


LAYOUTS = covering_layouts() + (covering_layouts(1) if ON_GPU else [])
UNEQUAL_LAYOUTS = [
    PageLayout(192, 128, 4, 2, v_head_dim=128),
    PageLayout(80, 64, 3, 8, v_head_dim=128),
    PageLayout(64, 64, 2, 3, v_head_dim=256),
    PageLayout(128, 64, 8, 4, v_head_dim=64),
    PageLayout(112, 128, 2, 3, v_head_dim=96),
    PageLayout(512, 64, 3, 2, v_head_dim=80),
]
"""Keys and values of different head_dim, the one or the other larger, powers of two or not, on both sides of the sizes at which
kernels change."""
SHARING_LAYOUTS = [
    PageLayout(64, 64, 5, 6),
    PageLayout(96, 128, 6, 5),
    PageLayout(112, 64, 5, 5, v_head_dim=80),
    PageLayout(128, 128, 6, 6),
    PageLayout(80, 64, 2, 6, v_head_dim=192),
]
"""Codes of 5 and 6 bits, whose high bits distant rows share: tokens of keys; channels of values, in blocks of 16 to 128."""
ALL_LAYOUTS = LAYOUTS + UNEQUAL_LAYOUTS + SHARING_LAYOUTS


def layout_id(value: object) -> str | None:
    """Return the test id of a layout."""
    if not isinstance(value, PageLayout):
        return None
    v_head_dim = f"-{value.v_head_dim}" if value.v_head_dim != value.head_dim else ""
    return f"{value.name}-d{value.head_dim}{v_head_dim}"


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model with random matrices, so that its logits are far from flat; biases keep what they begin with."""
    for name, weight in model.eval().requires_grad_(False).named_parameters():
        if weight.dim() == 2 and not name.endswith("bias"):
            weight.normal_(std=weight.shape[1] ** -0.5)
    return model


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


def check(
    given: CacheCase | dict,
    seen: dict | None = None,
    *,
    working: torch.dtype | None = None,
    sm_scale: float | None = None,
    **options,
) -> torch.Tensor:
    """Compare a call of attention with float64, the log-sum-exp included; return the result.

    The call is one of decode_attention, or of prefill_attention where `given` has query tokens of sequences (`cu_seqlens_q`).
    The error may be twice that of plain attention whose operands are rounded to the working dtype (`testing.attention_in`).
    `seen` is window, soft_cap and sinks, which change what is computed; `options` only change how.
    """
    arguments = given if isinstance(given, dict) else {"q": given.q, **given.kwargs}
    q, seen = arguments["q"], (seen or {}) | {"sm_scale": sm_scale}
    several = "cu_seqlens_q" in arguments
    attention = prefill_attention if several else decode_attention
    specified = reference.prefill_attention if several else reference.decode_attention
    out, lse = attention(**arguments, return_lse=True, **seen, **options)
    exact, exact_lse = specified(**arguments | {"q": q.double()}, return_lse=True, **seen)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:2], arguments["layout"].v_head_dim) and not out.isnan().any()
    empty = (exact == 0).all(dim=-1)
    assert (out[empty] == 0).all()
    working = working or q.dtype
    if not empty.all():
        allowed = 2 * relative_error(attention_in(working, arguments, **seen), exact)
        assert relative_error(out, exact) <= max(allowed, FLOAT32_ERROR)
    attended = exact_lse > -torch.inf
    assert torch.equal(attended, lse > -torch.inf)
    if not several and "sinks" not in seen:
        assert torch.equal(attended.all(dim=1), arguments["seq_lens"] > 0)
    assert ((lse - exact_lse).abs()[attended] <= LSE_ERROR[working]).all()
    return out


def quantized_case(device: torch.device, **options) -> dict:
    """Return the arguments of a call of decode_attention over quantized pages only."""
    case = cache_case(PageLayout(64, 64, 4, 4), [256, 192], num_tail_slots=1, group=2, device=device, **options)
    return {"q": case.q, "pages": case.pages, "block_table": case.block_table, "seq_lens": case.seq_lens, "layout": case.layout}


def encoder_id(encoder: Encoder) -> str:
    """Return a short name of an encoder for test ids."""
    words = [f"i{encoder.iterations}", f"f{encoder.fits}", encoder.norm]
    return "-".join(words + [name for name in ("equivariant", "clip") if getattr(encoder, name)])


def dequantized(tile: torch.Tensor, bits: int, per: str, encoder: Encoder = DEFAULT) -> torch.Tensor:
    """Encode a tile, round the fields to float16 as a record does, and decode it in float64."""
    codes, scale, zero, norm, gain = reference.encode(tile, bits, per=per, encoder=encoder)
    scale, zero, norm = (field.half().double() for field in (scale, zero, norm))
    norm = norm * gain
    return reference.dequantize(codes, scale, zero, per=per) * norm.unsqueeze(-1 if per == "channel" else -2)


def tile_error(tile: torch.Tensor, bits: int, per: str, encoder: Encoder = DEFAULT) -> float:
    """Return the relative error of quantizing a tile."""
    return relative_error(dequantized(tile, bits, per, encoder), tile)
