"""Ways to quantize a key/value cache, written plainly: the published baselines, and KVarN through this package.

A `Codec` takes pages of keys and values as the model computes them, after the position encoding, and returns what a cache of
its kind would read back. Scales, zeros and norms are rounded to float16 and counted: `k_bits` and `v_bits` are all the bits
that a number costs. `kvarn` quantizes with the package's own kernels (the reference on CPU tensors); everything else is a
few lines of PyTorch, made to be read and compared, not to be fast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

import kvarn_triton
from kvarn_triton import Encoder, PageLayout, reference


@dataclass(frozen=True)
class Codec:
    """One way to quantize a page.

    Args:
        name: for tables.
        k_bits, v_bits: bits of one number of the keys and of the values, scales included.
        read_back: takes k and v, float32 [pages, page_size, head_dim], and returns both as the cache would give them back.
    """

    name: str
    k_bits: float
    v_bits: float
    read_back: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @property
    def bits(self) -> float:
        """Mean bits of a cached number, scales included."""
        return (self.k_bits + self.v_bits) / 2


def half(x: torch.Tensor) -> torch.Tensor:
    """Round to float16, as every scale is stored."""
    return x.half().float()


def rounded_to_range(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Round x to 2**bits evenly spaced values between its least and its largest number along `dim`."""
    zero, top = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = half((top - zero) / (2**bits - 1)).clamp_min(1e-7)
    zero = half(zero)
    return ((x - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero


def per_token(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round x [..., tokens, channels] with one scale and zero for `group` channels of a token."""
    return rounded_to_range(x.unflatten(-1, (-1, group)), bits, -1).flatten(-2)


def per_channel(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round x [..., tokens, channels] with one scale and zero for `group` tokens of a channel."""
    return rounded_to_range(x.unflatten(-2, (-1, group)), bits, -2).flatten(-3, -2)


def round_to_nearest(k_bits: int, v_bits: int, head_dim: int, group: int) -> Codec:
    """Round keys and values per token."""
    group, scale_bits = min(group, head_dim), 32 / min(group, head_dim)
    return Codec(
        f"RTN g{group}",
        k_bits + scale_bits,
        v_bits + scale_bits,
        lambda k, v: (per_token(k, k_bits, group), per_token(v, v_bits, group)),
    )


def kivi(k_bits: int, v_bits: int, head_dim: int, group: int) -> Codec:
    """Round keys per channel and values per token (KIVI, arXiv 2402.02750)."""
    v_group = min(group, head_dim)
    return Codec(
        f"KIVI g{group}",
        k_bits + 32 / group,
        v_bits + 32 / v_group,
        lambda k, v: (per_channel(k, k_bits, group), per_token(v, v_bits, v_group)),
    )


def quarot(k_bits: int, v_bits: int, head_dim: int, group: int) -> Codec:
    """Rotate by a Hadamard matrix, then round per token (as QuaRot does with its cache, arXiv 2404.00456)."""
    group, scale_bits = min(group, head_dim), 32 / min(group, head_dim)

    def read_back(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = per_token(reference.hadamard(k), k_bits, group), per_token(reference.hadamard(v), v_bits, group)
        return reference.hadamard(k), reference.hadamard(v)

    return Codec(f"Hadamard + RTN g{group}", k_bits + scale_bits, v_bits + scale_bits, read_back)


@functools.cache
def lloyd_max_levels(bits: int) -> torch.Tensor:
    """Return the 2**bits values of least squared error for a standard normal number."""
    probabilities = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    numbers = torch.special.ndtri(probabilities)
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(1000):
        nearest = torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2)
        levels = torch.zeros_like(levels).index_add_(0, nearest, numbers) / torch.bincount(nearest, minlength=2**bits)
    return levels.float()


def turboquant(k_bits: int, v_bits: int, head_dim: int) -> Codec:
    """Rotate, divide each token by its norm, round to the best levels for normal numbers, correct the norm.

    As TurboQuant (arXiv 2504.19874) in vLLM: the stored norm is such that the token read back has the token's norm.
    """

    def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
        x = reference.hadamard(x)
        norm = x.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        levels = lloyd_max_levels(bits).to(x.device)
        y = levels[torch.bucketize(x / norm * math.sqrt(head_dim), (levels[1:] + levels[:-1]) / 2)]
        return reference.hadamard(y * half(norm / y.norm(dim=-1, keepdim=True)))

    return Codec(
        "Hadamard + Lloyd-Max",
        k_bits + 16 / head_dim,
        v_bits + 16 / head_dim,
        lambda k, v: (rounded(k, k_bits), rounded(v, v_bits)),
    )


def fp8() -> Codec:
    """Round to fp8 (e4m3), with a scale of 1: what engines do unless a checkpoint has scales."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()

    return Codec("fp8", 8.0, 8.0, lambda k, v: (rounded(k), rounded(v)))


def layout_bits(layout: PageLayout) -> tuple[float, float]:
    """Return the bits of a number of the keys and of the values in a page, scales included and padding split evenly."""
    rest = (layout.page_bytes - layout.gains_offset) / 2
    k_bytes = layout.k_codes_bytes + 4 * layout.head_dim + 2 * layout.page_size + rest
    v_bytes = layout.v_codes_bytes + 4 * layout.page_size + 2 * layout.head_dim + rest
    count = layout.page_size * layout.head_dim
    return 8 * k_bytes / count, 8 * v_bytes / count


def kvarn(layout: PageLayout, encoder: Encoder, name: str) -> Codec:
    """Return this package as a codec: `store_pages`, then `dequantize_pages`."""

    def read_back(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(k)
        pages = torch.empty(layout.pages_shape(count, 1), dtype=torch.uint8, device=k.device)
        ids = torch.arange(count, dtype=torch.int32, device=k.device)
        tokens = (x.reshape(-1, 1, layout.head_dim).contiguous() for x in (k, v))
        kvarn_triton.store_pages(*tokens, pages, ids, layout, encoder=encoder)
        read = kvarn_triton.dequantize_pages(pages, ids, layout, dtype=torch.float32)
        return read[0].reshape(k.shape), read[1].reshape(v.shape)

    return Codec(name, *layout_bits(layout), read_back)


def unrotated(layout: PageLayout, encoder: Encoder, name: str) -> Codec:
    """Return balancing and rounding of tiles that were not rotated."""

    def read(tiles: torch.Tensor, bits: int, per: reference.codec.Per) -> torch.Tensor:
        codes, scale, zero, norm, gain = reference.encode(tiles, bits, per=per, encoder=encoder)
        other = -1 if per == "channel" else -2
        return reference.dequantize(codes, half(scale), half(zero), per=per) * half(norm).unsqueeze(other) * gain.unsqueeze(-1)

    return Codec(name, *layout_bits(layout), lambda k, v: (read(k, layout.k_bits, "channel"), read(v, layout.v_bits, "token")))
