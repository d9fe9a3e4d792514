"""From a rotated tile to codes and their scales: what one program does with the blocks of a tile (`blocks`).

Operations and their order are those of `reference.codec`, which makes the results equal bit for bit in kernels compiled with
`enable_fp_fusion=False`. Two flavours: PER_CHANNEL for keys, per token for values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    IMBALANCE_EPS,
    SCALE_MAX,
    SCALE_MIN,
    STD_MAX,
    STD_MIN,
    TILE_SCALE_MAX,
    bounded_exponent,
    fma,
    power_of_two,
)
from .blocks import (
    TILE_TOKENS,
    add,
    block_channels,
    channel_vector,
    spread_channels,
    spread_tokens,
    sum_of_tokens,
    token_vector,
)
from .fit import length_norm, quantize_blocks, squares_across


@triton.jit
def _sums(blocks, factors, LINES: tl.constexpr, Q: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Return the sums of blocks * factors over the blocks of each line, a row of Q blocks or else a column."""
    sums = ()
    for line in tl.static_range(LINES):
        total = tl.zeros_like(blocks[0])
        for k in tl.static_range(len(factors)):
            total = fma(blocks[line * Q + k if PER_TOKEN else k * Q + line], factors[k], total)
        sums = sums + (total,)
    return sums


@triton.jit
def _squares(blocks, factors, means, LINES: tl.constexpr, Q: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Return the sums of the squares of what blocks * factors differ from the mean of their line."""
    sums = ()
    for line in tl.static_range(LINES):
        total = tl.zeros_like(blocks[0])
        for k in tl.static_range(len(factors)):
            deviation = fma(blocks[line * Q + k if PER_TOKEN else k * Q + line], factors[k], -means[line])
            total = fma(deviation, deviation, total)
        sums = sums + (total,)
    return sums


@triton.jit
def _std_per_token(blocks, inverse, P: tl.constexpr, Q: tl.constexpr, D: tl.constexpr):
    """Standard deviation of the tokens of blocks * inverse, a tuple of Q blocks: a token vector (`reference.codec.std`)."""
    means = spread_tokens(token_vector(_sums(blocks, inverse, P, Q, True), add) * (1.0 / D), P)
    return tl.sqrt_rn(token_vector(_squares(blocks, inverse, means, P, Q, True), add) * (1.0 / (D - 1)))


@triton.jit
def _std_per_channel(blocks, inverse, Q: tl.constexpr, G: tl.constexpr):
    """Standard deviation of the channels of blocks * inverse, a tuple of P blocks: a channel vector."""
    means = channel_vector(_sums(blocks, inverse, Q, Q, False), add) * (1.0 / G)
    means = spread_channels(means, Q, blocks[0].shape[1])
    return tl.sqrt_rn(channel_vector(_squares(blocks, inverse, means, Q, Q, False), add) * (1.0 / (G - 1)))


@triton.jit
def _next_scale(std, scale):
    bounded = tl.minimum(tl.maximum(std, scale * STD_MIN), scale * STD_MAX)
    return tl.minimum(tl.maximum(bounded, SCALE_MIN), SCALE_MAX)


@triton.jit
def _ratio(std):
    """Return largest over least of a vector.

    Both come from one maximum, because every reduction over threads costs barriers, and of integers, because GPUs have an
    instruction for those: numbers of one sign are ordered as their bits are.
    """
    bits = tl.ravel(std).to(tl.int32, bitcast=True)
    most_bits, least_bits = tl.split(tl.max(tl.join(bits, -bits), axis=0))
    least_number = tl.maximum((-least_bits).to(tl.float32, bitcast=True), IMBALANCE_EPS)
    return tl.div_rn(most_bits.to(tl.float32, bitcast=True), least_number)


@triton.jit
def tile_size(blocks, P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Size of the tokens of a tile [G, D] (`reference.codec._tile_scale`); 1 if it is zero."""
    squares = squares_across(blocks, P, Q, True) * (1.0 / D)
    mean = sum_of_tokens(tl.sqrt_rn(tl.sqrt_rn(squares)), P) * (1.0 / G)
    size = tl.minimum(mean * mean, TILE_SCALE_MAX)
    return tl.where(size > 0, size, 1.0)


@triton.jit
def nan_unless_finite(blocks, P: tl.constexpr, Q: tl.constexpr):
    """Return 0, or NaN if a number of a tile is infinite or NaN."""
    nothing = tl.zeros_like(blocks[0])
    sums = ()
    for p in tl.static_range(P):
        total = nothing
        for q in tl.static_range(Q):
            total = fma(blocks[p * Q + q], nothing, total)
        sums = sums + (total,)
    return tl.sum(tl.ravel(token_vector(sums, add)), axis=0)


@triton.jit
def scale_blocks(blocks, factor):
    """Return blocks times a scalar."""
    scaled = ()
    for k in tl.static_range(len(blocks)):
        scaled = scaled + (blocks[k] * factor,)
    return scaled


@triton.jit
def balance(blocks, G: tl.constexpr, D: tl.constexpr, TOKENS_FIRST: tl.constexpr, ITERATIONS: tl.constexpr):
    """Balance a tile (`reference.variance_normalize`); returns a token vector and a channel vector of scales."""
    P: tl.constexpr = G // TILE_TOKENS
    BLOCK_C: tl.constexpr = block_channels(D)
    Q: tl.constexpr = D // BLOCK_C
    token_scale = tl.zeros_like(blocks[0]) + 1.0
    channel_scale = tl.full((BLOCK_C * triton.next_power_of_2(Q),), 1.0, tl.float32)
    token_std = token_scale
    channel_std = channel_scale
    best = float("inf")
    best_token_scale = token_scale
    best_channel_scale = channel_scale
    # The first step is the state of no iteration: scales of one.
    for step in range(ITERATIONS + 1):
        if TOKENS_FIRST:
            token_scale = tl.where(step == 0, 1.0, _next_scale(token_std, token_scale))
            inverse_token = tl.div_rn(1.0, token_scale)
            channel_std = _std_per_channel(blocks, spread_tokens(inverse_token, P), Q, G)
            channel_scale = tl.where(step == 0, 1.0, _next_scale(channel_std, channel_scale))
            inverse_channel = tl.div_rn(1.0, channel_scale)
            token_std = _std_per_token(blocks, spread_channels(inverse_channel, Q, BLOCK_C), P, Q, D)
        else:
            channel_scale = tl.where(step == 0, 1.0, _next_scale(channel_std, channel_scale))
            inverse_channel = tl.div_rn(1.0, channel_scale)
            token_std = _std_per_token(blocks, spread_channels(inverse_channel, Q, BLOCK_C), P, Q, D)
            token_scale = tl.where(step == 0, 1.0, _next_scale(token_std, token_scale))
            inverse_token = tl.div_rn(1.0, token_scale)
            channel_std = _std_per_channel(blocks, spread_tokens(inverse_token, P), Q, G)
        imbalance = _ratio(token_std * inverse_token) + _ratio(channel_std * inverse_channel)
        better = imbalance <= best
        best = tl.where(better, imbalance, best)
        best_token_scale = tl.where(better, token_scale, best_token_scale)
        best_channel_scale = tl.where(better, channel_scale, best_channel_scale)
    return best_token_scale, best_channel_scale


@triton.jit
def apply_balance(blocks, token_scale, channel_scale, P: tl.constexpr, Q: tl.constexpr):
    """Divide a tile by both of its scales."""
    inverse_token = spread_tokens(tl.div_rn(1.0, token_scale), P)
    inverse_channel = spread_channels(tl.div_rn(1.0, channel_scale), Q, blocks[0].shape[1])
    balanced = ()
    for p in tl.static_range(P):
        for q in tl.static_range(Q):
            balanced = balanced + (blocks[p * Q + q] * inverse_token[p] * inverse_channel[q],)
    return balanced


@triton.jit
def encode_blocks(
    blocks,
    G: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ENCODER: tl.constexpr,
):
    """Balance, round and absorb (`reference.encode`).

    Returns codes as int32 blocks; scale and zero as vectors of one axis and norm of the other; the gain, a scalar.
    """
    LEVELS: tl.constexpr = 2**BITS - 1
    P: tl.constexpr = G // TILE_TOKENS
    Q: tl.constexpr = D // block_channels(D)
    poison = nan_unless_finite(blocks, P, Q)
    if ENCODER.equivariant:
        tile_scale = tile_size(blocks, P, Q, G, D)
        blocks = scale_blocks(blocks, tl.div_rn(1.0, tile_scale))
    token_scale, channel_scale = balance(blocks, G, D, PER_CHANNEL or ENCODER.equivariant, ENCODER.iterations)
    if ENCODER.norm == "length":
        # After the loop, which has no register to spare, and before the tile makes room for the balanced one.
        squares = squares_across(blocks, P, Q, PER_CHANNEL)
    balanced = apply_balance(blocks, token_scale, channel_scale, P, Q)
    codes, scale, zero, stretch = quantize_blocks(balanced, P, Q, BITS, PER_CHANNEL, ENCODER)
    own = channel_scale if PER_CHANNEL else token_scale
    norm = (token_scale if PER_CHANNEL else channel_scale) * stretch
    scale = scale * own
    zero = zero * own
    if ENCODER.norm == "length":
        norm = length_norm(codes, scale, zero, squares, norm, P, Q, PER_CHANNEL)
    if ENCODER.equivariant:
        scale = scale * tile_scale
        zero = zero * tile_scale
    reach = tl.maximum(tl.abs(zero), tl.abs(scale * LEVELS + zero))
    value_exponent = bounded_exponent(tl.max(tl.ravel(reach), axis=0))
    norm_exponent = bounded_exponent(tl.max(tl.ravel(norm), axis=0))
    gauge = power_of_two(-value_exponent)
    gain = power_of_two(value_exponent + norm_exponent) + poison
    return codes, scale * gauge, zero * gauge, norm * power_of_two(-norm_exponent), gain
