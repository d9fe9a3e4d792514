"""The byte format of a page of latents: `MLALayout`.

A record is the key half of a record of `PageLayout` with 512 channels, and the rotary channels of its tokens in 16 bits.
Attributes that begin with `k_`, `head_dim`, `block_size` and `gains_offset` are named as those of `PageLayout`, so that the
functions which encode, pack and decode keys take either.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .checks import check_aligned, check_tensor, require
from .layout import SUPPORTED_PAGE_SIZES, PageLayout

LATENT_DIM = 512
"""Channels of a latent, which is a key and a value."""
ROPE_DIM = 64
"""Channels of the rotary part of a key, which is no value."""
TOKEN_DIM = LATENT_DIM + ROPE_DIM
MLA_BITS = (4, 8)


@dataclass(frozen=True)
class MLALayout:
    """Sizes and byte offsets of one quantized page of latents.

    Args:
        bits: bits of a code; 4 or 8.
        page_size: tokens of one page; 64 or 128.

    Raises:
        ValueError: for any other value.

    The object is hashable and holds nothing but the format, so that kernels take it as one compile-time constant.
    """

    bits: int = 4
    page_size: int = 64

    def __post_init__(self) -> None:
        for name, supported in (("bits", MLA_BITS), ("page_size", SUPPORTED_PAGE_SIZES)):
            value = getattr(self, name)
            require(isinstance(value, int) and value in supported, name, f"one of {', '.join(map(str, supported))}", value)

    @functools.cached_property
    def keys(self) -> PageLayout:
        """The layout of keys whose codes, parameters and norms a record has."""
        return PageLayout(LATENT_DIM, self.page_size, self.bits, self.bits)

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows a kernel's layout by: offsets and sizes too, which `repr` leaves out."""
        derived = sorted(name for name, value in vars(type(self)).items() if isinstance(value, functools.cached_property))
        return f"{self!r} {self.keys.cache_key} {[getattr(self, name) for name in derived]}"

    @functools.cached_property
    def head_dim(self) -> int:
        """Channels of a latent: 512."""
        return LATENT_DIM

    @functools.cached_property
    def block_size(self) -> int:
        """Channels of one block of the Hadamard rotation, and of the order of codes: 512."""
        return self.keys.block_size

    @functools.cached_property
    def k_bits(self) -> int:
        """Bits of a code."""
        return self.bits

    @functools.cached_property
    def k_codes_bytes(self) -> int:
        """Bytes of the codes."""
        return self.keys.k_codes_bytes

    @functools.cached_property
    def k_codes_offset(self) -> int:
        """First byte of the codes, token by token."""
        return 0

    @functools.cached_property
    def rope_offset(self) -> int:
        """First byte of the rotary channels: float16, token by token."""
        return self.k_codes_bytes

    @functools.cached_property
    def k_params_offset(self) -> int:
        """First byte of the parameters: per channel one 32-bit word, float16 scale low and float16 zero high."""
        return self.rope_offset + 2 * ROPE_DIM * self.page_size

    @functools.cached_property
    def k_norm_offset(self) -> int:
        """First byte of the norms: float16, one per token, the largest of them in [0.5, 1)."""
        return self.k_params_offset + 4 * LATENT_DIM

    @functools.cached_property
    def gains_offset(self) -> int:
        """First byte of the gain: float32, a power of two; zeros follow."""
        return self.k_norm_offset + 2 * self.page_size

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of one record, in whole cache lines of 128 bytes."""
        return -(-(self.gains_offset + 4) // 128) * 128

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token, scales included."""
        return self.page_bytes / self.page_size

    def empty_pages(self, num_pages: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Return memory for pages, uint8 [num_pages, page_bytes], not initialized, that is tied to this layout."""
        pages = torch.empty(num_pages, self.page_bytes, dtype=torch.uint8, device=device)
        pages.kvarn_layout = self  # type: ignore[attr-defined]
        return pages

    def fields(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of every field of `pages` uint8 [..., page_bytes]; writing to a view writes to the page.

        `codes` as uint8 [..., bytes]; `scale` and `zero` as float16 [..., 512]; `norm` as float16 [..., page_size]; `gain` as
        float32 [..., 1]; `rope` as float16 [..., page_size, 64].
        """

        def numbers(offset: int, count: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return pages[..., offset : offset + dtype.itemsize * count].view(dtype)

        params = numbers(self.k_params_offset, 2 * LATENT_DIM).unflatten(-1, (LATENT_DIM, 2))
        return {
            "codes": pages[..., : self.k_codes_bytes],
            "scale": params[..., 0],
            "zero": params[..., 1],
            "norm": numbers(self.k_norm_offset, self.page_size),
            "gain": numbers(self.gains_offset, 1, torch.float32),
            "rope": numbers(self.rope_offset, self.page_size * ROPE_DIM).unflatten(-1, (self.page_size, ROPE_DIM)),
        }


def check_mla_pages(pages: object, layout: MLALayout) -> None:
    """Check a tensor of pages against the layout of a call."""
    require(isinstance(layout, MLALayout), "layout", "an MLALayout", type(layout).__name__)
    check_tensor("pages", pages, [None, layout.page_bytes], torch.uint8)
    assert isinstance(pages, torch.Tensor)
    made_for = getattr(pages, "kvarn_layout", layout)
    require(made_for == layout, "layout", f"{made_for}, for which pages was made", layout)
    check_aligned("pages", pages, 16)
