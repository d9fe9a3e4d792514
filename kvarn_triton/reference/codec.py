"""From activations to packed codes and back: rotation, balancing, rounding and packing of tiles.

Every function works on any device and in any floating dtype up to float64; half precision is computed in float32. The
kernels compute the same operations in the same order, so codes, packed bytes and stored scales are equal bit for bit in
float32 (`docs/numerics.md`). Three choices make that possible, and none of them changes the method of arXiv 2606.03458:
sums have a fixed order (`dot`), scales are kept as factors instead of logarithms, and tiles are multiplied by reciprocals
instead of divided.

A tile is [..., page_size, head_dim]: tokens by channels. `per` says which axis has one quantization scale and zero each:
"channel" for keys, "token" for values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ..encoder import DEFAULT, Encoder
from ..layout import largest_power_of_two_divisor

Per = Literal["channel", "token"]

STD_MIN, STD_MAX = 1e-3, 1e3
"""Bounds of the factor by which one step changes a scale."""
SCALE_MIN, SCALE_MAX = math.exp(-0.3), math.exp(10.0)
"""Bounds of a balancing scale; the paper's code keeps its logarithm between -0.3 and 10."""
IMBALANCE_EPS = 1e-8
RANGE_EPS = 1e-10
"""Least scale of a quantized row, so that a constant row has code 0 instead of 0 / 0."""
TILE_SCALE_MAX = 1e19
"""The square of anything larger overflows float32."""
EXPONENT_MAX = 100
"""Largest magnitude of an exponent that moves into a gain, so that gains are normal float32 numbers."""
HALF_MAX = 65504.0
COVERAGE = {2: 0.7, 3: 0.9, 4: 1.0, 8: 1.0}
"""Part of a row's range that codes of so many bits start from if they may clip."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the reference computes for an input of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hadamard(x: torch.Tensor, *, block_size: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x` with its last dimension multiplied by an orthonormal, block-diagonal Hadamard matrix (paper, section 3).

    Args:
        x: [..., head_dim], any floating dtype.
        block_size: channels of one block, a power of two that divides head_dim; by default the largest.
        out: where to write; may be `x`.

    Returns:
        A tensor like `x`. The matrix is symmetric, so a second call undoes the first up to rounding.
    """
    size = block_size or largest_power_of_two_divisor(x.shape[-1])
    y = (butterflies(x.to(working_dtype(x.dtype)), size) * size**-0.5).to(x.dtype)
    return y if out is None else out.copy_(y)


def butterflies(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return `hadamard` of [..., head_dim] times the root of `block_size`: sums and differences only, each step of halves."""
    y = x.reshape(-1, block_size)
    half = block_size // 2
    while half:
        pairs = y.reshape(-1, block_size // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2).reshape(-1, block_size)
        half //= 2
    return y.reshape(x.shape)


BLOCK_TOKENS = 16
"""Distance of the tokens that a sum over tokens adds one after the other (`dot`)."""


def block_channels(head_dim: int) -> int:
    """Return the distance of the channels that a sum over channels adds one after the other (`dot`)."""
    return 32 if head_dim >= 256 else 16


def fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return `x * y + z` of float32 tensors, rounded once as GPUs do it; of float64 tensors plainly."""
    if x.dtype == torch.float64:
        return x * y + z
    product, z = x.double() * y.double(), z.double()
    total = product + z
    rest = total - product
    error = (product - (total - rest)) + (z - rest)
    # Rounding twice is rounding once if the first result, where inexact, is the neighbour with an odd last bit.
    move = (error.abs() > 0) & (total.view(torch.int64) % 2 == 0)
    return torch.where(move, torch.nextafter(total, torch.copysign(torch.full_like(error, math.inf), error)), total).float()


def sum_halves(x: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 0, whose size is a power of two, always adding the second half to the first."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x


def dot(x: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum `x * y` of tiles [..., tokens, channels] over tokens (dim -2) or channels (dim -1), which stay with size 1.

    A thread of the kernels holds every 16th token (`BLOCK_TOKENS`) and every `block_channels`-th channel: those are added
    first, one after the other and without rounding the products; the sums of threads then in halves.
    """
    stride = BLOCK_TOKENS if dim == -2 else block_channels(x.shape[-1])
    x, y = (tile.movedim(dim, 0).unflatten(0, (-1, stride)) for tile in torch.broadcast_tensors(x, y))
    total = torch.zeros_like(x[0])
    for each_x, each_y in zip(x, y, strict=True):
        total = fma(each_x, each_y, total)
    return sum_halves(total).movedim(0, dim)


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded square root; `torch.sqrt` of float32 on a CPU can be one unit off in the last place."""
    return torch.sqrt(x.double()).to(x.dtype)


def std(tile: torch.Tensor, inverse: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the standard deviation (ddof 1, mean subtracted first) of `tile * inverse` over a dimension of tiles."""
    n = tile.shape[dim]
    mean = dot(tile, inverse, dim) * (1.0 / n)
    deviation = fma(tile, inverse, -mean)
    return sqrt(dot(deviation, deviation, dim) * (1.0 / (n - 1)))


def _next_scale(std: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply `scale` by the clamped std of `tile / scale`, given `std` of the tile that is not divided by `scale`."""
    return torch.clamp(torch.clamp(std, scale * STD_MIN, scale * STD_MAX), SCALE_MIN, SCALE_MAX)


def _spread(std: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return largest over least of `std / scale` of each tile: [..., 1, 1]."""
    std = std * (1.0 / scale)
    return std.amax((-2, -1), keepdim=True) / std.amin((-2, -1), keepdim=True).clamp_min(IMBALANCE_EPS)


def variance_normalize(
    tiles: torch.Tensor, *, per: Per, encoder: Encoder = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance tiles so that all tokens and all channels have about the same standard deviation (paper, algorithm 1).

    Args:
        tiles: [..., page_size, head_dim].
        per: "channel" normalizes tokens first (keys), "token" normalizes channels first (values).
        encoder: number of iterations, and whether tiles are divided by their root mean square first.

    Returns:
        `balanced` like `tiles`, `token_scale` [..., page_size] and `channel_scale` [..., head_dim], all in the working dtype,
        with tiles = balanced * token_scale * channel_scale. Of all states seen, the one of least imbalance (sum of the two
        ratios of largest to least standard deviation); of equal ones, the latest. With `encoder.equivariant` the scale of the
        axis named by `per` includes the root mean square.
    """
    tiles = tiles.to(working_dtype(tiles.dtype))
    tile_scale = _tile_scale(tiles, encoder)
    balanced, token_scale, channel_scale = _balance(tiles * (1.0 / tile_scale), per, encoder.iterations)
    if per == "channel":
        channel_scale = channel_scale * tile_scale
    else:
        token_scale = token_scale * tile_scale
    return balanced, token_scale.squeeze(-1), channel_scale.squeeze(-2)


def _tile_scale(tiles: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """Return what a tile is divided by before it is balanced: its root mean square, or 1 as published."""
    if not encoder.equivariant:
        return torch.ones_like(tiles[..., :1, :1])
    count = tiles.shape[-1] * tiles.shape[-2]
    squares = sum_halves(dot(tiles, tiles, -1).movedim(-2, 0)).movedim(0, -2)
    rms = sqrt(squares * (1.0 / count)).clamp_max(TILE_SCALE_MAX)
    return torch.where(rms > 0, rms, 1.0)


def _balance(tile: torch.Tensor, per: Per, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token_scale = torch.ones_like(tile[..., :, :1])
    channel_scale = torch.ones_like(tile[..., :1, :])
    token_std, channel_std = std(tile, channel_scale, -1), std(tile, token_scale, -2)
    best = _spread(token_std, token_scale) + _spread(channel_std, channel_scale)
    best_token_scale, best_channel_scale = token_scale, channel_scale
    for _ in range(iterations):
        if per == "channel":
            token_scale = _next_scale(token_std, token_scale)
            channel_std = std(tile, 1.0 / token_scale, -2)
            channel_scale = _next_scale(channel_std, channel_scale)
            token_std = std(tile, 1.0 / channel_scale, -1)
        else:
            channel_scale = _next_scale(channel_std, channel_scale)
            token_std = std(tile, 1.0 / channel_scale, -1)
            token_scale = _next_scale(token_std, token_scale)
            channel_std = std(tile, 1.0 / token_scale, -2)
        imbalance = _spread(token_std, token_scale) + _spread(channel_std, channel_scale)
        better = imbalance <= best
        best = torch.where(better, imbalance, best)
        best_token_scale = torch.where(better, token_scale, best_token_scale)
        best_channel_scale = torch.where(better, channel_scale, best_channel_scale)
    balanced = tile * (1.0 / best_token_scale) * (1.0 / best_channel_scale)
    return balanced, best_token_scale, best_channel_scale


def quantize(
    tiles: torch.Tensor, bits: int, *, per: Per, encoder: Encoder = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round tiles to `2**bits` evenly spaced values per channel or token.

    They start as those between the least and the largest number of the row (paper, section 3), or in the middle of that range
    if `encoder.clip`. Then, `encoder.fits` times, they become those of least squared error for the codes of the ones before.

    Args:
        tiles: [..., page_size, head_dim].
        bits: 2, 3, 4 or 8.
        per: the axis with one scale and zero each.
        encoder: its `clip` and `fits`.

    Returns:
        `codes` uint8 like `tiles`; `scale` and `zero` [..., head_dim] or [..., page_size] in the working dtype. Ties round to
        even; a constant row has code 0 and its value as zero.
    """
    tiles = tiles.to(working_dtype(tiles.dtype))
    levels, dim = 2**bits - 1, -2 if per == "channel" else -1
    zero, top = tiles.amin(dim, keepdim=True), tiles.amax(dim, keepdim=True)
    if encoder.clip:
        cut = (top - zero) * ((1 - COVERAGE[bits]) / 2)
        zero, top = zero + cut, top - cut
    scale = ((top - zero) * (1.0 / levels)).clamp_min(RANGE_EPS)
    for _ in range(encoder.fits):
        scale, zero = _fitted(tiles, _codes(tiles, scale, zero, levels), zero, dim)
    codes = _codes(tiles, scale, zero, levels).to(torch.uint8)
    return codes, scale.squeeze(dim), zero.squeeze(dim)


def _codes(tiles: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    return torch.round((tiles - zero) * (1.0 / scale)).clamp(0, levels)


def _fitted(tiles: torch.Tensor, codes: torch.Tensor, zero: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero of least squared error for given codes.

    A row whose codes are all the same is one of less range than the least scale: it has that scale, and keeps its zero. Sums
    are of what the numbers of a row exceed its zero by, so that a large mean does not cancel.
    """
    count, one = tiles.shape[dim], torch.ones_like(zero)
    above = tiles - zero
    code_sum, above_sum = dot(codes, one, dim), dot(above, one, dim)
    code_mean, above_mean = code_sum * (1.0 / count), above_sum * (1.0 / count)
    spread = dot(codes, codes, dim) - code_sum * code_mean
    several = spread > 0
    covariance = dot(above, codes, dim) - above_sum * code_mean
    scale = (covariance / torch.where(several, spread, 1.0)).clamp_min(RANGE_EPS)
    return scale, torch.where(several, zero + (above_mean - scale * code_mean), zero)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, per: Per) -> torch.Tensor:
    """Return `codes * scale + zero` in the working dtype of `scale`; the inverse of `quantize` up to rounding."""
    dim = -2 if per == "channel" else -1
    dtype = working_dtype(scale.dtype)
    return codes.to(dtype) * scale.to(dtype).unsqueeze(dim) + zero.to(dtype).unsqueeze(dim)


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """Return e with largest number = m * 2**e and 0.5 <= m < 1, of each row [..., 1], within +-EXPONENT_MAX."""
    largest = x.amax(-1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(-EXPONENT_MAX, EXPONENT_MAX)
    return torch.where(largest > 0, exponent, -EXPONENT_MAX)


def encode(
    tiles: torch.Tensor, bits: int, *, per: Per, encoder: Encoder = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance and quantize rotated tiles and absorb the balancing scales (paper, section 3).

    Args:
        tiles: [..., page_size, head_dim], rotated.
        bits: 2, 3, 4 or 8.
        per: "channel" for keys, "token" for values.
        encoder: options of the encoder.

    Returns:
        `codes` uint8 like `tiles`; `scale` and `zero` of the axis named by `per`, `norm` of the other one and `gain` [..., 1],
        in the working dtype, so that tiles are about (codes * scale + zero) * norm * gain. The gain is a power of two that
        brings the largest magnitude of codes * scale + zero and the largest norm into [0.5, 1): exact, and it keeps all
        three inside float16 whatever the magnitude of the tile.
    """
    tiles = tiles.to(working_dtype(tiles.dtype))
    tile_scale = _tile_scale(tiles, encoder)
    balanced, token_scale, channel_scale = _balance(tiles * (1.0 / tile_scale), per, encoder.iterations)
    codes, scale, zero = quantize(balanced, bits, per=per, encoder=encoder)
    token_scale, channel_scale, tile_scale = token_scale.squeeze(-1), channel_scale.squeeze(-2), tile_scale.squeeze(-1)
    own, norm = (channel_scale, token_scale) if per == "channel" else (token_scale, channel_scale)
    scale, zero = scale * own, zero * own
    if encoder.norm == "length":
        norm = _length_norm(tiles * (1.0 / tile_scale.unsqueeze(-1)), codes, scale, zero, norm, per)
    scale, zero = scale * tile_scale, zero * tile_scale
    value_exponent = _exponent(torch.maximum(zero.abs(), (scale * (2**bits - 1) + zero).abs()))
    norm_exponent = _exponent(norm)
    one = torch.ones_like(tile_scale)
    gauge = torch.ldexp(one, -value_exponent)
    gain = torch.ldexp(one, value_exponent + norm_exponent)
    return codes, scale * gauge, zero * gauge, torch.ldexp(norm, -norm_exponent), gain


def _length_norm(
    tile: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, norm: torch.Tensor, per: Per
) -> torch.Tensor:
    """Return the norms with which tokens (keys) or channels (values) read back have the length of those of the tile."""
    dim, row_dim = (-1, -2) if per == "channel" else (-2, -1)
    read = fma(codes.to(tile.dtype), scale.unsqueeze(row_dim), zero.unsqueeze(row_dim))
    squares, read_squares = dot(tile, tile, dim).squeeze(dim), dot(read, read, dim).squeeze(dim)
    fitted = sqrt(squares / read_squares).clamp_max(SCALE_MAX)
    return torch.where(read_squares > 0, fitted, norm)
