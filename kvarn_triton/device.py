"""Pure device helpers: register tiles in, register tiles out. No pointers, no launchers.

A tile is [tokens, channels] in float32. Its channels are padded to a power of two; padding is zero and `mask_d` marks what
is real. Operations and their order are those of `reference.codec`, which makes the results equal bit for bit when the kernel
is compiled with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import codec

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton runs kernels in its interpreter; fixed when the kernels are decorated, that is, on import."""

STD_MIN = tl.constexpr(codec.STD_MIN)
STD_MAX = tl.constexpr(codec.STD_MAX)
SCALE_MIN = tl.constexpr(codec.SCALE_MIN)
SCALE_MAX = tl.constexpr(codec.SCALE_MAX)
IMBALANCE_EPS = tl.constexpr(codec.IMBALANCE_EPS)
RANGE_EPS = tl.constexpr(codec.RANGE_EPS)
TILE_SCALE_MAX = tl.constexpr(codec.TILE_SCALE_MAX)
EXPONENT_MAX = tl.constexpr(codec.EXPONENT_MAX)
HALF_MAX = tl.constexpr(codec.HALF_MAX)
ROUND_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even."""


@triton.constexpr_function
def log2(n):
    """Return the exponent of a power of two."""
    return n.bit_length() - 1


@triton.jit
def hadamard(x, BLOCK: tl.constexpr):
    """Rotate [rows, channels] by the orthonormal Hadamard matrix in blocks of BLOCK channels.

    Each step adds and subtracts the halves of a block and interleaves the results, so that all steps have one shape.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    y = tl.reshape(x, (ROWS * COLS // BLOCK, BLOCK))
    for _ in tl.static_range(log2(BLOCK)):
        halves = tl.permute(tl.reshape(y, (ROWS * COLS // BLOCK, 2, BLOCK // 2)), (0, 2, 1))
        a, b = tl.split(halves)
        y = tl.reshape(tl.join(a + b, a - b), (ROWS * COLS // BLOCK, BLOCK))
    return tl.reshape(y * (BLOCK**-0.5), (ROWS, COLS))


@triton.jit
def sum_tokens(x):
    """Sum [tokens, channels] over tokens as a tree, second half onto first: [channels]."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    for i in tl.static_range(log2(ROWS)):
        x = tl.sum(tl.reshape(x, (2, ROWS >> (i + 1), COLS)), axis=0)
    return tl.reshape(x, (COLS,))


@triton.jit
def sum_channels(x):
    """Sum [tokens, channels] over channels as a tree of neighbours: [tokens]."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    for i in tl.static_range(log2(COLS)):
        x = tl.sum(tl.reshape(x, (ROWS, COLS >> (i + 1), 2)), axis=2)
    return tl.reshape(x, (ROWS,))


@triton.jit
def std_per_channel(x):
    """Standard deviation (ddof 1, two passes) of each channel of [tokens, channels]: [channels]."""
    N: tl.constexpr = x.shape[0]
    deviation = x - (sum_tokens(x) * (1.0 / N))[None, :]
    return tl.sqrt_rn(sum_tokens(deviation * deviation) * (1.0 / (N - 1)))


@triton.jit
def std_per_token(x, mask_d, N: tl.constexpr):
    """Standard deviation (ddof 1, two passes) of each token over its N real channels: [tokens]."""
    deviation = tl.where(mask_d[None, :], x - (sum_channels(x) * (1.0 / N))[:, None], 0.0)
    return tl.sqrt_rn(sum_channels(deviation * deviation) * (1.0 / (N - 1)))


@triton.jit
def _next_scale(std, scale):
    bounded = tl.minimum(tl.maximum(std, scale * STD_MIN), scale * STD_MAX)
    return tl.minimum(tl.maximum(bounded, SCALE_MIN), SCALE_MAX)


@triton.jit
def _spread(std, inverse_scale, mask):
    std = std * inverse_scale
    least = tl.maximum(tl.min(tl.where(mask, std, float("inf")), axis=0), IMBALANCE_EPS)
    return tl.div_rn(tl.max(tl.where(mask, std, 0.0), axis=0), least)


@triton.jit
def tile_rms(tile, COUNT: tl.constexpr):
    """Root mean square of a tile of COUNT real elements as [1, 1]; 1 if it is zero."""
    COLS: tl.constexpr = tile.shape[1]
    sums = tl.reshape(sum_tokens(tile * tile), (1, COLS))
    mean = sum_channels(sums) * (1.0 / COUNT)
    rms = tl.minimum(tl.sqrt_rn(mean), TILE_SCALE_MAX)
    return tl.where(rms > 0, rms, 1.0)[:, None]


@triton.jit
def balance(tile, mask_d, HEAD_DIM: tl.constexpr, PER_CHANNEL: tl.constexpr, ITERATIONS: tl.constexpr):
    """Balance a tile (`reference.variance_normalize`); returns token_scale and channel_scale."""
    token_scale = tl.full((tile.shape[0],), 1.0, tl.float32)
    channel_scale = tl.full((tile.shape[1],), 1.0, tl.float32)
    mask_t = token_scale > 0
    token_std = std_per_token(tile, mask_d, HEAD_DIM)
    channel_std = std_per_channel(tile)
    best = _spread(token_std, token_scale, mask_t) + _spread(channel_std, channel_scale, mask_d)
    best_token_scale = token_scale
    best_channel_scale = channel_scale
    for _ in range(ITERATIONS):
        if PER_CHANNEL:
            token_scale = _next_scale(token_std, token_scale)
            inverse_token = tl.div_rn(1.0, token_scale)
            channel_std = std_per_channel(tile * inverse_token[:, None])
            channel_scale = _next_scale(channel_std, channel_scale)
            inverse_channel = tl.div_rn(1.0, channel_scale)
            token_std = std_per_token(tile * inverse_channel[None, :], mask_d, HEAD_DIM)
        else:
            channel_scale = _next_scale(channel_std, channel_scale)
            inverse_channel = tl.div_rn(1.0, channel_scale)
            token_std = std_per_token(tile * inverse_channel[None, :], mask_d, HEAD_DIM)
            token_scale = _next_scale(token_std, token_scale)
            inverse_token = tl.div_rn(1.0, token_scale)
            channel_std = std_per_channel(tile * inverse_token[:, None])
        imbalance = _spread(token_std, inverse_token, mask_t) + _spread(channel_std, inverse_channel, mask_d)
        better = imbalance <= best
        best = tl.where(better, imbalance, best)
        best_token_scale = tl.where(better, token_scale, best_token_scale)
        best_channel_scale = tl.where(better, channel_scale, best_channel_scale)
    return best_token_scale, best_channel_scale


@triton.jit
def apply_balance(tile, token_scale, channel_scale):
    """Divide a tile by both of its scales."""
    inverse_token = tl.div_rn(1.0, token_scale)
    inverse_channel = tl.div_rn(1.0, channel_scale)
    return tile * inverse_token[:, None] * inverse_channel[None, :]


@triton.jit
def quantize_tile(tile, mask_d, BITS: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Round a tile (`reference.quantize`); returns codes int32 [tokens, channels], scale and zero of the axis named."""
    LEVELS: tl.constexpr = 2**BITS - 1
    if PER_CHANNEL:
        zero = tl.min(tile, axis=0)
        top = tl.max(tile, axis=0)
    else:
        zero = tl.min(tl.where(mask_d[None, :], tile, float("inf")), axis=1)
        top = tl.max(tl.where(mask_d[None, :], tile, float("-inf")), axis=1)
    scale = tl.maximum((top - zero) * (1.0 / LEVELS), RANGE_EPS)
    inverse = tl.div_rn(1.0, scale)
    if PER_CHANNEL:
        steps = (tile - zero[None, :]) * inverse[None, :]
    else:
        steps = (tile - zero[:, None]) * inverse[:, None]
    steps = tl.minimum(tl.maximum(steps, 0.0), LEVELS * 1.0)
    return ((steps + ROUND_MAGIC) - ROUND_MAGIC).to(tl.int32), scale, zero


@triton.jit
def power_of_two(exponent):
    """Return 2**exponent as float32 for an int32 exponent of a normal number."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """Return e with x = m * 2**e and m in [0.5, 1), for x a normal float32 >= 0; less than -100 for 0 and subnormal x."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 126


@triton.jit
def _bounded_exponent(x):
    return tl.minimum(tl.maximum(exponent_of(x), -EXPONENT_MAX), EXPONENT_MAX)


@triton.jit
def to_half(x):
    """Round to float16; saturate at its largest number instead of overflowing."""
    return tl.minimum(tl.maximum(x, -HALF_MAX), HALF_MAX).to(tl.float16)


@triton.jit
def encode_tile(
    tile,
    mask_d,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EQUIVARIANT: tl.constexpr,
):
    """Balance, round and absorb (`reference.encode`); returns codes int32, and scale, zero, norm and gain in float32."""
    LEVELS: tl.constexpr = 2**BITS - 1
    if EQUIVARIANT:
        tile_scale = tile_rms(tile, tile.shape[0] * HEAD_DIM)
    else:
        tile_scale = tl.full((1, 1), 1.0, tl.float32)
    tile = tile * tl.div_rn(1.0, tile_scale)
    token_scale, channel_scale = balance(tile, mask_d, HEAD_DIM, PER_CHANNEL, ITERATIONS)
    codes, scale, zero = quantize_tile(apply_balance(tile, token_scale, channel_scale), mask_d, BITS, PER_CHANNEL)
    tile_scale = tl.reshape(tile_scale, (1,))
    if PER_CHANNEL:
        scale = scale * channel_scale * tile_scale
        zero = zero * channel_scale * tile_scale
        norm = token_scale
    else:
        scale = scale * token_scale * tile_scale
        zero = zero * token_scale * tile_scale
        norm = channel_scale
    reach = tl.maximum(tl.abs(zero), tl.abs(scale * LEVELS + zero))
    if PER_CHANNEL:
        reach = tl.where(mask_d, reach, 0.0)
        largest_norm = tl.max(norm, axis=0)
    else:
        largest_norm = tl.max(tl.where(mask_d, norm, 0.0), axis=0)
    value_exponent = _bounded_exponent(tl.max(reach, axis=0))
    norm_exponent = _bounded_exponent(largest_norm)
    gauge = power_of_two(-value_exponent)
    gain = power_of_two(value_exponent + norm_exponent)
    return codes, scale * gauge, zero * gauge, norm * power_of_two(-norm_exponent), gain


@triton.jit
def join_halves(low, high):
    """Put two float16 numbers into one 32-bit word."""
    return low.to(tl.uint16, bitcast=True).to(tl.uint32) | (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def split_halves(words):
    """Return the two float16 numbers of 32-bit words, low half first."""
    low = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def byte_of_item(item, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Return which byte of a row holds an item: a channel of a token (keys) or a token of a channel (values)."""
    return item // BLOCK * (BLOCK // FIELDS) + item % (BLOCK // FIELDS)


@triton.jit
def field_of_item(item, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Return which field of its byte holds an item."""
    return item % BLOCK // (BLOCK // FIELDS)


@triton.jit
def item_of_field(byte, field, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Return the item that a field of a byte holds; the inverse of the two functions above."""
    return byte // (BLOCK // FIELDS) * BLOCK + field * (BLOCK // FIELDS) + byte % (BLOCK // FIELDS)
