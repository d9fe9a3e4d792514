"""The byte format of a quantized page: `PageLayout` and the presets by name.

A record holds the keys and the values of one kv head for `page_size` tokens. `docs/page_format.md` describes it byte by
byte; the reference packs and unpacks it in PyTorch, the kernels in Triton, and both read their offsets from here.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

from .checks import require

FORMAT_VERSION = 3
"""Version of the byte format. It changes whenever a stored page would be read differently."""

SUPPORTED_BITS = (2, 3, 4, 5, 6, 8)
SUPPORTED_HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
SUPPORTED_PAGE_SIZES = (64, 128)

_ALIGNMENT = 16
_LINE = 128
_PRESET = re.compile(r"k([234568])v([234568])_g(64|128)")


def _align(num_bytes: int, alignment: int = _ALIGNMENT) -> int:
    return -(-num_bytes // alignment) * alignment


def largest_power_of_two_divisor(n: int) -> int:
    """Return the largest power of two that divides `n`: the block size of the Hadamard rotation."""
    return n & -n


def num_high_bits(bits: int) -> int:
    """Return how many bits of a code are in bytes elsewhere: 3 = 2 + 1, 5 = 4 + 1 and 6 = 4 + 2 do not divide a byte."""
    return 1 if bits in (3, 5) else 2 if bits == 6 else 0


def fields_per_byte(bits: int) -> int:
    """Return how many codes share one byte, less their high bits."""
    return 8 // (bits - num_high_bits(bits))


def split_bits(layout: PageLayout) -> int:
    """Return the larger width of codes whose high bits are elsewhere, 0 if neither keys nor values have such."""
    return max([bits for bits in (layout.k_bits, layout.v_bits) if num_high_bits(bits)] or [0])


@dataclass(frozen=True)
class PageLayout:
    """Sizes and byte offsets of one quantized page of one kv head.

    Args:
        head_dim: channels of one head of keys and queries; 64, 80, 96, 112, 128, 192, 256 or 512.
        page_size: tokens of one page; 64 or 128.
        k_bits: bits of a key code; 2, 3, 4, 5, 6 or 8.
        v_bits: bits of a value code; 2, 3, 4, 5, 6 or 8.
        v_head_dim: channels of one head of values and outputs, any of the sizes of `head_dim`. None, the default, is
            `head_dim` itself: the attribute is that number, and the layout equals one that was given it.

    Raises:
        ValueError: for any other value; the message names what is supported.

    The object is hashable and holds nothing but the format, so that kernels take it as one compile-time constant.
    `dataclasses.replace` keeps the number that `v_head_dim` is: give it both where both change.
    """

    head_dim: int = 128
    page_size: int = 128
    k_bits: int = 4
    v_bits: int = 2
    v_head_dim: int = None  # type: ignore[assignment]  # None may be given, but is never what the attribute is

    def __post_init__(self) -> None:
        if self.v_head_dim is None:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        for name, supported in (
            ("head_dim", SUPPORTED_HEAD_DIMS),
            ("page_size", SUPPORTED_PAGE_SIZES),
            ("k_bits", SUPPORTED_BITS),
            ("v_bits", SUPPORTED_BITS),
            ("v_head_dim", SUPPORTED_HEAD_DIMS),
        ):
            value = getattr(self, name)
            require(isinstance(value, int) and value in supported, name, f"one of {', '.join(map(str, supported))}", value)

    @classmethod
    def from_name(cls, name: str, head_dim: int = 128, v_head_dim: int | None = None) -> PageLayout:
        """Return the layout of a preset such as `k4v2_g128` (4-bit keys, 2-bit values, 128 tokens a page).

        The sizes of heads are no part of the name: `head_dim` and `v_head_dim` are those of `PageLayout`.
        """
        match = _PRESET.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            sizes = f"bits {', '.join(map(str, SUPPORTED_BITS))}, page_size {', '.join(map(str, SUPPORTED_PAGE_SIZES))}"
            raise ValueError(f"name: expected k<bits>v<bits>_g<page_size>, such as k4v2_g128, got {name!r} ({sizes})")
        k_bits, v_bits, page_size = map(int, match.groups())
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        return cls(head_dim=head_dim, page_size=page_size, k_bits=k_bits, v_bits=v_bits, v_head_dim=v_head_dim)

    @property
    def cache_key(self) -> str:
        """What Triton's cache on disk knows a kernel's layout by: offsets and sizes too, which `repr` leaves out."""
        derived = sorted(name for name, value in vars(type(self)).items() if isinstance(value, functools.cached_property))
        return f"{self!r} {FORMAT_VERSION} {[getattr(self, name) for name in derived]}"

    @property
    def name(self) -> str:
        """The preset name, such as `k4v2_g128`."""
        return f"k{self.k_bits}v{self.v_bits}_g{self.page_size}"

    @functools.cached_property
    def block_size(self) -> int:
        """Channels of one block of the Hadamard rotation of keys; their codes are interleaved inside these blocks only."""
        return largest_power_of_two_divisor(self.head_dim)

    @functools.cached_property
    def v_block_size(self) -> int:
        """Channels of one block of the Hadamard rotation of values."""
        return largest_power_of_two_divisor(self.v_head_dim)

    @functools.cached_property
    def raw_head_dim(self) -> int:
        """Last dimension of raw pages: the larger of both sizes of a head. Launch parameters follow it too, because registers
        and shared memory that suffice for it suffice for both.

        A token has its keys in the first `head_dim` channels and its values in the first `v_head_dim`; channels after those
        are neither read nor written.
        """
        return max(self.head_dim, self.v_head_dim)

    @functools.cached_property
    def k_codes_bytes(self) -> int:
        """Bytes of the key codes."""
        return self.page_size * self.head_dim * self.k_bits // 8

    @functools.cached_property
    def v_codes_bytes(self) -> int:
        """Bytes of the value codes."""
        return self.page_size * self.v_head_dim * self.v_bits // 8

    @functools.cached_property
    def k_codes_offset(self) -> int:
        """First byte of the key codes."""
        return 0

    @functools.cached_property
    def v_codes_offset(self) -> int:
        """First byte of the value codes."""
        return _align(self.k_codes_bytes)

    @functools.cached_property
    def k_params_offset(self) -> int:
        """First byte of the key parameters: per channel one 32-bit word, float16 scale low and float16 zero high."""
        return self.v_codes_offset + _align(self.v_codes_bytes)

    @functools.cached_property
    def v_params_offset(self) -> int:
        """First byte of the value parameters: per token one 32-bit word, float16 scale low and float16 zero high."""
        return self.k_params_offset + _align(4 * self.head_dim)

    @functools.cached_property
    def k_norm_offset(self) -> int:
        """First byte of the key norms: float16, one per token, the largest of them in [0.5, 1)."""
        return self.v_params_offset + _align(4 * self.page_size)

    @functools.cached_property
    def v_norm_offset(self) -> int:
        """First byte of the value norms: float16, one per channel, the largest of them in [0.5, 1)."""
        return self.k_norm_offset + _align(2 * self.page_size)

    @functools.cached_property
    def gains_offset(self) -> int:
        """First byte of the gains: float32, a power of two for the keys and one for the values; zeros follow."""
        return self.v_norm_offset + _align(2 * self.v_head_dim)

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of one record: keys and values of one kv head for `page_size` tokens, in whole cache lines of 128 bytes."""
        return _align(self.gains_offset + 8, _LINE)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of keys and values per token and kv head, scales included."""
        return self.page_bytes / self.page_size

    @property
    def bits_per_element(self) -> float:
        """Effective bits of one cached number, scales included."""
        return 8 * self.page_bytes / (self.page_size * (self.head_dim + self.v_head_dim))

    def pages_shape(self, num_pages: int, num_kv_heads: int) -> tuple[int, int, int]:
        """Return the shape of the uint8 tensor that holds `num_pages` pages."""
        return (num_pages, num_kv_heads, self.page_bytes)

    def empty_pages(self, num_pages: int, num_kv_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Return memory for pages, uint8 [num_pages, num_kv_heads, page_bytes], not initialized, that is tied to this layout.

        Functions of the package refuse the tensor with any other layout: records of two layouts can have the same size, and one
        read as the other gives finite numbers that mean nothing. Views and copies of it, and tensors that were made in other
        ways, are tied to none.
        """
        pages = torch.empty(self.pages_shape(num_pages, num_kv_heads), dtype=torch.uint8, device=device)
        pages.kvarn_layout = self  # type: ignore[attr-defined]
        return pages

    def fields(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of every field of `pages`.

        Args:
            pages: uint8 [..., page_bytes]; the last dimension contiguous, 4-byte aligned.

        Returns:
            `k_codes` and `v_codes` as uint8 [..., bytes]; `k_scale` and `k_zero` as float16 [..., head_dim]; `v_norm` as
            float16 [..., v_head_dim]; `v_scale`, `v_zero` and `k_norm` as float16 [..., page_size]; `k_gain` and `v_gain` as
            float32 [..., 1]. Writing to a view writes to the page.
        """

        def numbers(offset: int, count: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return pages[..., offset : offset + dtype.itemsize * count].view(dtype)

        k_params = numbers(self.k_params_offset, 2 * self.head_dim).unflatten(-1, (self.head_dim, 2))
        v_params = numbers(self.v_params_offset, 2 * self.page_size).unflatten(-1, (self.page_size, 2))
        return {
            "k_codes": pages[..., self.k_codes_offset : self.k_codes_offset + self.k_codes_bytes],
            "v_codes": pages[..., self.v_codes_offset : self.v_codes_offset + self.v_codes_bytes],
            "k_scale": k_params[..., 0],
            "k_zero": k_params[..., 1],
            "k_norm": numbers(self.k_norm_offset, self.page_size),
            "k_gain": numbers(self.gains_offset, 1, torch.float32),
            "v_scale": v_params[..., 0],
            "v_zero": v_params[..., 1],
            "v_norm": numbers(self.v_norm_offset, self.v_head_dim),
            "v_gain": numbers(self.gains_offset + 4, 1, torch.float32),
        }


PRESETS = tuple(
    f"k{k_bits}v{v_bits}_g{page_size}"
    for page_size in (128, 64)
    for k_bits, v_bits in ((8, 8), (4, 4), (4, 3), (4, 2), (3, 3), (3, 2), (2, 2))
)
"""Names of the layouts that the sweep measures. `PageLayout.from_name` takes every other combination too."""
