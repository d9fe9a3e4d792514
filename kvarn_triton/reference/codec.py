"""From activations to packed codes and back: rotation, balancing, rounding and packing of tiles.

Every function works on any device and in any floating dtype up to float64; half precision is computed in float32. The
kernels compute the same operations in the same order, so codes, packed bytes and stored scales are equal bit for bit in
float32 (`docs/numerics.md`). Three choices make that possible, and none of them changes the method of arXiv 2606.03458:
sums have a fixed order (`arithmetic`), scales are kept as factors instead of logarithms, and tiles are multiplied by
reciprocals instead of divided.

A tile is [..., page_size, head_dim]: tokens by channels. `per` says which axis has one quantization scale and zero each:
"channel" for keys, "token" for values.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ..encoder import DEFAULT, Encoder
from ..layout import largest_power_of_two_divisor
from .arithmetic import KERNEL_ORDER, Arithmetic

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
COVERAGE = {2: 0.8, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0, 8: 1.0}
"""Part of a row's range that codes of so many bits start from if they may clip."""
FITTED_BITS = {"channel": (2,), "token": (2, 3, 4, 5)}
"""Bits of the rows that are fitted at all."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the reference computes for an input of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hadamard(
    x: torch.Tensor,
    *,
    block_size: int | None = None,
    out: torch.Tensor | None = None,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> torch.Tensor:
    """Return `x` with its last dimension multiplied by an orthonormal, block-diagonal Hadamard matrix (paper, section 3).

    Args:
        x: [..., head_dim], any floating dtype.
        block_size: channels of one block, a power of two that divides head_dim; by default the largest.
        out: where to write; may be `x`.
        arithmetic: the order of sums.

    Returns:
        A tensor like `x`. The matrix is symmetric, so a second call undoes the first up to rounding.
    """
    size = block_size or largest_power_of_two_divisor(x.shape[-1])
    y = (arithmetic.butterflies(x.to(working_dtype(x.dtype)), size) * size**-0.5).to(x.dtype)
    return y if out is None else out.copy_(y)


def std(tile: torch.Tensor, inverse: torch.Tensor, dim: int, arithmetic: Arithmetic = KERNEL_ORDER) -> torch.Tensor:
    """Return the standard deviation (ddof 1, mean subtracted first) of `tile * inverse` over a dimension of tiles."""
    n = tile.shape[dim]
    mean = arithmetic.dot(tile, inverse, dim) * (1.0 / n)
    deviation = arithmetic.fma(tile, inverse, -mean)
    return arithmetic.sqrt(arithmetic.dot(deviation, deviation, dim) * (1.0 / (n - 1)))


def _next_scale(std: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply `scale` by the clamped std of `tile / scale`, given `std` of the tile that is not divided by `scale`."""
    return torch.clamp(torch.clamp(std, scale * STD_MIN, scale * STD_MAX), SCALE_MIN, SCALE_MAX)


def _spread(std: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return largest over least of `std / scale` of each tile: [..., 1, 1]."""
    std = std * (1.0 / scale)
    return std.amax((-2, -1), keepdim=True) / std.amin((-2, -1), keepdim=True).clamp_min(IMBALANCE_EPS)


def variance_normalize(
    tiles: torch.Tensor, *, per: Per, encoder: Encoder = DEFAULT, arithmetic: Arithmetic = KERNEL_ORDER
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance tiles so that all tokens and all channels have about the same standard deviation.

    The steps are those of the published code; the paper's algorithm 1 has variances in its measure of imbalance.

    Args:
        tiles: [..., page_size, head_dim].
        per: "channel" (keys) or "token" (values): the axis with one quantization scale and zero each. Tokens are normalized
            first, but for values without `encoder.equivariant`, whose channels are.
        encoder: its `iterations` and `equivariant`.
        arithmetic: the order of sums.

    Returns:
        `balanced` like `tiles`, `token_scale` [..., page_size] and `channel_scale` [..., head_dim], all in the working dtype,
        with tiles = balanced * token_scale * channel_scale. Of all states seen, the one of least imbalance (sum of the two
        ratios of largest to least standard deviation); of equal ones, the latest. With `encoder.equivariant` the scale of the
        axis named by `per` includes the size of the tile.
    """
    tiles = tiles.to(working_dtype(tiles.dtype))
    tile_scale = _tile_scale(tiles, encoder, arithmetic)
    balanced, token_scale, channel_scale = _balance(tiles * (1.0 / tile_scale), per, encoder, arithmetic)
    if per == "channel":
        channel_scale = channel_scale * tile_scale
    else:
        token_scale = token_scale * tile_scale
    return balanced, token_scale.squeeze(-1), channel_scale.squeeze(-2)


def _tile_scale(tiles: torch.Tensor, encoder: Encoder, arithmetic: Arithmetic) -> torch.Tensor:
    """Return what a tile is divided by before it is balanced: the size of its tokens, or 1 as published.

    The size is the square of the mean of the roots of the tokens' root mean squares. It is near that of most tokens: one that
    is 1,000 times as large as the other 127 makes it 1.5 times as large, where a root mean square grows by a factor of 88.
    """
    if not encoder.equivariant:
        return torch.ones_like(tiles[..., :1, :1])
    squares = arithmetic.dot(tiles, tiles, -1) * (1.0 / tiles.shape[-1])
    mean = arithmetic.sum_tokens(arithmetic.sqrt(arithmetic.sqrt(squares))) * (1.0 / tiles.shape[-2])
    size = (mean * mean).clamp_max(TILE_SCALE_MAX)
    return torch.where(size > 0, size, 1.0)


def _balance(
    tile: torch.Tensor, per: Per, encoder: Encoder, arithmetic: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    token_scale = torch.ones_like(tile[..., :, :1])
    channel_scale = torch.ones_like(tile[..., :1, :])
    token_std, channel_std = std(tile, channel_scale, -1, arithmetic), std(tile, token_scale, -2, arithmetic)
    best = _spread(token_std, token_scale) + _spread(channel_std, channel_scale)
    best_token_scale, best_channel_scale = token_scale, channel_scale
    for _ in range(encoder.iterations):
        if per == "channel" or encoder.equivariant:
            token_scale = _next_scale(token_std, token_scale)
            channel_std = std(tile, 1.0 / token_scale, -2, arithmetic)
            channel_scale = _next_scale(channel_std, channel_scale)
            token_std = std(tile, 1.0 / channel_scale, -1, arithmetic)
        else:
            channel_scale = _next_scale(channel_std, channel_scale)
            token_std = std(tile, 1.0 / channel_scale, -1, arithmetic)
            token_scale = _next_scale(token_std, token_scale)
            channel_std = std(tile, 1.0 / token_scale, -2, arithmetic)
        imbalance = _spread(token_std, token_scale) + _spread(channel_std, channel_scale)
        better = imbalance <= best
        best = torch.where(better, imbalance, best)
        best_token_scale = torch.where(better, token_scale, best_token_scale)
        best_channel_scale = torch.where(better, channel_scale, best_channel_scale)
    balanced = tile * (1.0 / best_token_scale) * (1.0 / best_channel_scale)
    return balanced, best_token_scale, best_channel_scale


def num_fits(bits: int, per: Per, encoder: Encoder) -> int:
    """Return how often rows of `bits` bits per "channel" or "token" are fitted."""
    return encoder.fits if bits in FITTED_BITS[per] else 0


def quantize(
    tiles: torch.Tensor, bits: int, *, per: Per, encoder: Encoder = DEFAULT, arithmetic: Arithmetic = KERNEL_ORDER
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round tiles to `2**bits` evenly spaced values per channel or token.

    They start as those between the least and the largest number of the row (paper, section 3), or in the middle of that range
    if `encoder.clip`. Then, `num_fits` times, they become those of least squared error for the codes of the ones before.

    Args:
        tiles: [..., page_size, head_dim].
        bits: 2, 3, 4, 5, 6 or 8.
        per: the axis with one scale and zero each.
        encoder: its `clip`, `fits` and whether its `norm` is "projection".
        arithmetic: the order of sums.

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
    fits = num_fits(bits, per, encoder)
    for _ in range(fits):
        scale, zero = _fitted(tiles, _codes(tiles, scale, zero, levels), scale, zero, dim, arithmetic)
    codes = _codes(tiles, scale, zero, levels)
    if fits and encoder.norm == "projection":
        scale, zero = _fitted(tiles, codes, scale, zero, dim, arithmetic, projection=True)
    return codes.to(torch.uint8), scale.squeeze(dim), zero.squeeze(dim)


def _codes(tiles: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int) -> torch.Tensor:
    return torch.round((tiles - zero) * (1.0 / scale)).clamp(0, levels)


def _fitted(
    tiles: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    dim: int,
    arithmetic: Arithmetic,
    *,
    projection: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero of given codes: those of least squared error, or those that keep the covariance.

    With x a row, c its codes and y = scale * c + zero, both have the mean of y equal that of x. The least error is that of
    scale = cov(x, c) / var(c); it makes y too short, cov(x, y) < var(x). scale = var(x) / cov(x, c) makes them equal.

    A row whose codes are all the same is one of less range than the least scale. It keeps its zero; least squares give it the
    least scale. Sums are of what the numbers of a row exceed its zero by, so that a large mean does not cancel.
    """
    dot, count, one = arithmetic.dot, tiles.shape[dim], torch.ones_like(zero)
    above = tiles - zero
    code_sum, above_sum = dot(codes, one, dim), dot(above, one, dim)
    code_mean, above_mean = code_sum * (1.0 / count), above_sum * (1.0 / count)
    covariance = dot(above, codes, dim) - above_sum * code_mean
    if projection:
        several = covariance > 0
        spread = dot(above, above, dim) - above_sum * above_mean
        scale = torch.where(several, (spread / torch.where(several, covariance, 1.0)).clamp_min(RANGE_EPS), scale)
    else:
        spread = dot(codes, codes, dim) - code_sum * code_mean
        several = spread > 0
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
    tiles: torch.Tensor, bits: int, *, per: Per, encoder: Encoder = DEFAULT, arithmetic: Arithmetic = KERNEL_ORDER
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance and quantize rotated tiles and absorb the balancing scales (paper, section 3).

    Args:
        tiles: [..., page_size, head_dim], rotated.
        bits: 2, 3, 4, 5, 6 or 8.
        per: "channel" for keys, "token" for values.
        encoder: options of the encoder.
        arithmetic: the order of sums.

    Returns:
        `codes` uint8 like `tiles`; `scale` and `zero` of the axis named by `per`, `norm` of the other one and `gain` [..., 1],
        in the working dtype, so that tiles are about (codes * scale + zero) * norm * gain. The gain is a power of two that
        brings the largest magnitude of codes * scale + zero and the largest norm into [0.5, 1): exact, and it keeps all
        three inside float16 whatever the magnitude of the tile. The gain of a tile with a NaN or an infinity is NaN, so that
        nothing of it is read back as a number; the rest of what it returns is then without meaning.
    """
    tiles = tiles.to(working_dtype(tiles.dtype))
    tile_scale = _tile_scale(tiles, encoder, arithmetic)
    balanced, token_scale, channel_scale = _balance(tiles * (1.0 / tile_scale), per, encoder, arithmetic)
    codes, scale, zero = quantize(balanced, bits, per=per, encoder=encoder, arithmetic=arithmetic)
    token_scale, channel_scale, tile_scale = token_scale.squeeze(-1), channel_scale.squeeze(-2), tile_scale.squeeze(-1)
    own, norm = (channel_scale, token_scale) if per == "channel" else (token_scale, channel_scale)
    if encoder.norm == "projection" and per == "channel" and not num_fits(bits, per, encoder):
        norm = norm * _stretch(balanced, codes, scale, zero, arithmetic)
    scale, zero = scale * own, zero * own
    if encoder.norm == "length":
        norm = _length_norm(tiles * (1.0 / tile_scale.unsqueeze(-1)), codes, scale, zero, norm, per, arithmetic)
    scale, zero = scale * tile_scale, zero * tile_scale
    value_exponent = _exponent(torch.maximum(zero.abs(), (scale * (2**bits - 1) + zero).abs()))
    norm_exponent = _exponent(norm)
    one = torch.ones_like(tile_scale)
    gauge = torch.ldexp(one, -value_exponent)
    gain = torch.ldexp(one, value_exponent + norm_exponent) + (tiles * 0.0).sum((-2, -1)).unsqueeze(-1)
    return codes, scale * gauge, zero * gauge, torch.ldexp(norm, -norm_exponent), gain


def _stretch(
    balanced: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, arithmetic: Arithmetic
) -> torch.Tensor:
    """Return what the tokens of keys are stretched by so that they keep their projections: [..., page_size].

    With x a balanced token and y what its codes say, <x, y> times the stretch is <x, x>. Balanced tokens are about equally
    long, so one large token counts as much as any other. A token of which half is lost or more stays as it is.
    """
    read = arithmetic.fma(codes.to(balanced.dtype), scale.unsqueeze(-2), zero.unsqueeze(-2))
    square, product = arithmetic.dot(balanced, balanced, -1).squeeze(-1), arithmetic.dot(balanced, read, -1).squeeze(-1)
    some = product > square * 0.5
    return torch.where(some, square / torch.where(some, product, 1.0), 1.0)


def _length_norm(
    tile: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    norm: torch.Tensor,
    per: Per,
    arithmetic: Arithmetic,
) -> torch.Tensor:
    """Return the norms with which tokens (keys) or channels (values) read back have the length of those of the tile."""
    dim, row_dim = (-1, -2) if per == "channel" else (-2, -1)
    read = arithmetic.fma(codes.to(tile.dtype), scale.unsqueeze(row_dim), zero.unsqueeze(row_dim))
    squares, read_squares = arithmetic.dot(tile, tile, dim).squeeze(dim), arithmetic.dot(read, read, dim).squeeze(dim)
    fitted = arithmetic.sqrt(squares / read_squares).clamp_max(SCALE_MAX)
    return torch.where(read_squares > 0, fitted, norm)
