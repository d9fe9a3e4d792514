"""From a balanced tile to codes: ranges, least squares, unbiased rows or tokens, lengths (`reference.codec.quantize`).

Rows are channels if PER_CHANNEL (keys), else tokens; scale and zero are vectors of rows (`blocks`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import codec
from .arithmetic import RANGE_EPS, ROUND_MAGIC, SCALE_MAX, fma
from .blocks import add, channel_vector, least, most, spread_channels, spread_tokens, token_vector


@triton.constexpr_function
def _cut(bits, encoder):
    """Return what is cut off either end of a range at so many bits."""
    return (1 - codec.COVERAGE[bits]) / 2 if encoder.clip else 0.0


@triton.constexpr_function
def num_fits(bits, per_channel, encoder):
    """Return how often rows of so many bits are fitted (`reference.codec.num_fits`)."""
    return encoder.fits if bits in codec.FITTED_BITS["channel" if per_channel else "token"] else 0


@triton.jit
def _range_per_channel(blocks, OP: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Return the largest or least number of each channel: a channel vector."""
    partials = ()
    for q in tl.static_range(Q):
        extreme = blocks[q]
        for p in tl.static_range(1, P):
            extreme = OP(extreme, blocks[p * Q + q])
        partials = partials + (extreme,)
    return channel_vector(partials, OP)


@triton.jit
def _range_per_token(blocks, OP: tl.constexpr, P: tl.constexpr, Q: tl.constexpr):
    """Return the largest or least number of each token: a token vector."""
    partials = ()
    for p in tl.static_range(P):
        extreme = blocks[p * Q]
        for q in tl.static_range(1, Q):
            extreme = OP(extreme, blocks[p * Q + q])
        partials = partials + (extreme,)
    return token_vector(partials, OP)


@triton.jit
def _spread_rows(vector, P: tl.constexpr, Q: tl.constexpr, BLOCK_C: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Return a vector of rows as blocks: one per block of channels, or of tokens."""
    if PER_CHANNEL:
        blocks = spread_channels(vector, Q, BLOCK_C)
    else:
        blocks = spread_tokens(vector, P)
    return blocks


@triton.jit
def _row_vector(partials, PER_CHANNEL: tl.constexpr):
    """Add partial sums of rows up."""
    if PER_CHANNEL:
        vector = channel_vector(partials, add)
    else:
        vector = token_vector(partials, add)
    return vector


@triton.jit
def _fit(
    blocks,
    scale,
    zero,
    P: tl.constexpr,
    Q: tl.constexpr,
    LEVELS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PROJECTION: tl.constexpr,
):
    """Return the scale and zero of least squared error, or those that keep projections, for the codes that the given ones make.

    `reference.codec._fitted` says what they are.
    """
    BLOCK_C: tl.constexpr = blocks[0].shape[1]
    INNER: tl.constexpr = P if PER_CHANNEL else Q
    COUNT: tl.constexpr = INNER * (blocks[0].shape[0] if PER_CHANNEL else BLOCK_C)
    zeros = _spread_rows(zero, P, Q, BLOCK_C, PER_CHANNEL)
    inverses = _spread_rows(tl.div_rn(1.0, scale), P, Q, BLOCK_C, PER_CHANNEL)
    code_sums = ()
    above_sums = ()
    squares = ()
    products = ()
    for line in tl.static_range(Q if PER_CHANNEL else P):
        code_sum = tl.zeros_like(blocks[0])
        above_sum = code_sum
        square = code_sum
        product = code_sum
        for k in tl.static_range(INNER):
            above = blocks[k * Q + line if PER_CHANNEL else line * Q + k] - zeros[line]
            code = tl.clamp(above * inverses[line], 0.0, LEVELS)
            code = (code + ROUND_MAGIC) - ROUND_MAGIC
            code_sum += code
            above_sum += above
            square = fma(above, above, square) if PROJECTION else fma(code, code, square)
            product = fma(above, code, product)
        code_sums = code_sums + (code_sum,)
        above_sums = above_sums + (above_sum,)
        squares = squares + (square,)
        products = products + (product,)
    code_sum = _row_vector(code_sums, PER_CHANNEL)
    above_sum = _row_vector(above_sums, PER_CHANNEL)
    code_mean = code_sum * (1.0 / COUNT)
    above_mean = above_sum * (1.0 / COUNT)
    square = _row_vector(squares, PER_CHANNEL)
    covariance = _row_vector(products, PER_CHANNEL) - above_sum * code_mean
    if PROJECTION:
        several = covariance > 0
        fitted = tl.div_rn(square - above_sum * above_mean, tl.where(several, covariance, 1.0))
        scale = tl.where(several, tl.maximum(fitted, RANGE_EPS), scale)
    else:
        spread = square - code_sum * code_mean
        several = spread > 0
        scale = tl.maximum(tl.div_rn(covariance, tl.where(several, spread, 1.0)), RANGE_EPS)
    return scale, tl.where(several, zero + (above_mean - scale * code_mean), zero)


@triton.jit
def quantize_blocks(
    blocks, P: tl.constexpr, Q: tl.constexpr, BITS: tl.constexpr, PER_CHANNEL: tl.constexpr, ENCODER: tl.constexpr
):
    """Round a tile (`reference.quantize`); returns codes, scale and zero, these two as vectors of rows, and a stretch.

    Codes are the low 8 bits of int32 blocks. Where nothing is clipped or fitted nothing is clamped: no number is less than
    `zero`, and none so much larger than the largest that it would round to more levels than there are. The stretch is that of
    tokens (`reference.codec._stretch`), a token vector, where keys are not fitted and keep their projections; else 1.
    """
    LEVELS: tl.constexpr = 2**BITS - 1
    CUT: tl.constexpr = _cut(BITS, ENCODER)
    FITS: tl.constexpr = num_fits(BITS, PER_CHANNEL, ENCODER)
    STRETCH: tl.constexpr = PER_CHANNEL and FITS == 0 and ENCODER.norm == "projection"
    BLOCK_C: tl.constexpr = blocks[0].shape[1]
    if PER_CHANNEL:
        zero = _range_per_channel(blocks, least, P, Q)
        top = _range_per_channel(blocks, most, P, Q)
    else:
        zero = _range_per_token(blocks, least, P, Q)
        top = _range_per_token(blocks, most, P, Q)
    if CUT > 0:
        cut = (top - zero) * CUT
        zero = zero + cut
        top = top - cut
    scale = tl.maximum((top - zero) * (1.0 / LEVELS), RANGE_EPS)
    for _ in range(FITS):
        scale, zero = _fit(blocks, scale, zero, P, Q, LEVELS, PER_CHANNEL, False)
    zeros = _spread_rows(zero, P, Q, BLOCK_C, PER_CHANNEL)
    inverses = _spread_rows(tl.div_rn(1.0, scale), P, Q, BLOCK_C, PER_CHANNEL)
    if FITS > 0 and ENCODER.norm == "projection":
        scale, zero = _fit(blocks, scale, zero, P, Q, LEVELS, PER_CHANNEL, True)
    if STRETCH:
        scales = _spread_rows(scale, P, Q, BLOCK_C, PER_CHANNEL)
    codes = ()
    squares = ()
    products = ()
    for p in tl.static_range(P):
        square = tl.zeros_like(blocks[0])
        product = square
        for q in tl.static_range(Q):
            x = blocks[p * Q + q]
            steps = (x - zeros[q if PER_CHANNEL else p]) * inverses[q if PER_CHANNEL else p]
            if CUT > 0 or FITS > 0:
                steps = tl.clamp(steps, 0.0, LEVELS)
            rounded = steps + ROUND_MAGIC
            codes = codes + (rounded.to(tl.int32, bitcast=True),)
            if STRETCH:
                square = fma(x, x, square)
                product = fma(x, fma(rounded - ROUND_MAGIC, scales[q], zeros[q]), product)
        squares = squares + (square,)
        products = products + (product,)
    if STRETCH:
        square = token_vector(squares, add)
        product = token_vector(products, add)
        some = product > square * 0.5
        stretch = tl.where(some, tl.div_rn(square, tl.where(some, product, 1.0)), 1.0)
    else:
        stretch = 1.0
    return codes, scale, zero, stretch


@triton.jit
def squares_across(blocks, P: tl.constexpr, Q: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Return the sums of squares across the rows of a tile: of each token if rows are channels, else of each channel."""
    sums = ()
    for line in tl.static_range(P if PER_CHANNEL else Q):
        total = tl.zeros_like(blocks[0])
        for k in tl.static_range(Q if PER_CHANNEL else P):
            x = blocks[line * Q + k if PER_CHANNEL else k * Q + line]
            total = fma(x, x, total)
        sums = sums + (total,)
    return _row_vector(sums, not PER_CHANNEL)


@triton.jit
def length_norm(codes, scale, zero, squares, norm, P: tl.constexpr, Q: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Return the norms with which what is read back has the given sums of squares; `norm` where it is zero."""
    BLOCK_C: tl.constexpr = codes[0].shape[1]
    scales = _spread_rows(scale, P, Q, BLOCK_C, PER_CHANNEL)
    zeros = _spread_rows(zero, P, Q, BLOCK_C, PER_CHANNEL)
    read = ()
    for p in tl.static_range(P):
        for q in tl.static_range(Q):
            code = codes[p * Q + q].to(tl.float32, bitcast=True) - ROUND_MAGIC
            read = read + (fma(code, scales[q if PER_CHANNEL else p], zeros[q if PER_CHANNEL else p]),)
    read_squares = squares_across(read, P, Q, PER_CHANNEL)
    some = read_squares > 0
    fitted = tl.minimum(tl.sqrt_rn(tl.div_rn(squares, tl.where(some, read_squares, 1.0))), SCALE_MAX)
    return tl.where(some, fitted, norm)
