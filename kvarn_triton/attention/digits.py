"""Attention of up to 8 query rows to a quantized page as it is, in integers of 8 bits: what decode does.

Nothing is dequantized. The scale of a key channel is folded into the query, its zero is one number per head, the norm of a
token multiplies a score; the scale of a value token is folded into its weight, its zero is one number per head, the norm of
a channel multiplies the sum of a page. The tensor cores multiply integer codes with integers of 16 bits in two terms
(`operands`). Query heads are rows; tokens are columns of the product with keys, channels of the product with values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile.arithmetic import split_halves
from ..tile.codes import code_offset, field_codes, field_factor, load_packed
from .operands import (
    DIGITS_MAX,
    in_order,
    join_planes,
    split_planes,
    spread_columns,
    spread_order,
    sum_dtype,
    sum_of_terms,
    two_terms,
)
from .query import plane_channels
from .softmax import State, factors_of_part

LEAST_PRODUCT = tl.constexpr(2.0**-100)
"""Stands for the largest product of a weight and a scale where it is smaller, or zero: one divides by it."""


@triton.jit
def scale_and_zero(params, BITS: tl.constexpr):
    """Return scales and zeros, float32, of their words; the zeros are of codes less `code_offset`."""
    scale, zero = split_halves(params)
    scale = scale.to(tl.float32)
    zero = zero.to(tl.float32)
    if code_offset(BITS):
        zero += code_offset(BITS) * scale
    return scale, zero


@triton.jit
def key_params(params_ptr, FIELD: tl.constexpr, byte, LAYOUT: tl.constexpr, FIELDS: tl.constexpr):
    """Load the scales of the channels of a field of key bytes, and their zeros times `field_factor`."""
    channel, mask = plane_channels(FIELD, LAYOUT, FIELDS, byte)
    if LAYOUT.head_dim // FIELDS == byte.shape[0]:
        params = tl.load(params_ptr + channel)
    else:
        params = tl.load(params_ptr + channel, mask, other=0)
    scale, zero = scale_and_zero(params, LAYOUT.k_bits)
    return scale, zero * field_factor(FIELD, LAYOUT.k_bits)


@triton.jit
def value_norms(record_ptr, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Load the norms of the channels of values, float32, padded to CHANNELS."""
    D: tl.constexpr = LAYOUT.v_head_dim
    norm_ptr = (record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16))
    channel = tl.arange(0, CHANNELS)
    if CHANNELS == D:
        norm = tl.load(norm_ptr + channel)
    else:
        norm = tl.load(norm_ptr + channel, channel < D, other=0.0)
    return norm.to(tl.float32)


@triton.jit
def digit_scores(record_ptr, planes, q_factor, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the scores [heads, page_size] of the tokens of a record, PLAN.block_t of them to a product."""
    BITS: tl.constexpr = LAYOUT.k_bits
    FIELDS: tl.constexpr = PLAN.k_fields
    OPERAND: tl.constexpr = PLAN.operand
    PTX: tl.constexpr = PLAN.ptx
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_T: tl.constexpr = PLAN.block_t
    BYTES: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_K: tl.constexpr = planes[0].shape[1]
    codes_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + tl.arange(0, 1))
    byte = tl.arange(0, BLOCK_K)
    operands = ()
    offsets = tl.zeros((planes[0].shape[0], BLOCK_K), tl.float32)
    for f in tl.static_range(FIELDS):
        scale, zero = key_params(params_ptr, f, byte, LAYOUT, FIELDS)
        offsets += planes[f] * zero[None, :]
        operands = operands + (two_terms(planes[f] * scale[None, :], OPERAND, PTX),)
    q_factor = q_factor * gain
    offset = tl.sum(offsets, axis=1) * q_factor
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    scores = ()
    for part in tl.static_range(G // BLOCK_T):
        token = part * BLOCK_T + tl.arange(0, BLOCK_T)
        row = part * BLOCK_T + spread_columns(tl.arange(0, BLOCK_T))
        packed, high = load_packed(codes_ptr, row, part * BLOCK_T, spread_order(BLOCK_T), G, True, BYTES, BLOCK_K, BITS, PTX)
        product = tl.zeros((2 * planes[0].shape[0], BLOCK_T), sum_dtype(OPERAND))
        for f in tl.static_range(FIELDS):
            codes = field_codes(packed, high, f, BITS, field_factor(f, BITS), OPERAND, PTX)
            product = tl.dot(operands[f], codes, product, input_precision="ieee", out_dtype=sum_dtype(OPERAND))
        norm = tl.load(norm_ptr + token).to(tl.float32)
        score = (sum_of_terms(in_order(product)) * q_factor[:, None] + offset[:, None]) * norm[None, :]
        scores = scores + (score,)
    return join_planes(scores)


@triton.jit
def _pad_plane(terms, BLOCK: tl.constexpr):
    """Pad operands of 16 columns with zeros to BLOCK, the least that a product of bytes takes."""
    if terms.shape[1] < BLOCK:
        terms = join_planes((terms, tl.zeros_like(terms)))
    return terms


@triton.jit
def add_digit_values(state, scores, params, record_ptr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the state advanced by the values of a record with these scores and `params`, PLAN.block_d channels to a product.

    At least one score of each head is finite. With integers, what is rounded is the product of a weight and its token's scale,
    relative to the largest of the page: all bits are used whatever came before, and a token of large magnitude and little
    weight takes none from the others.
    """
    BITS: tl.constexpr = LAYOUT.v_bits
    FIELDS: tl.constexpr = PLAN.v_fields
    OPERAND: tl.constexpr = PLAN.operand
    PTX: tl.constexpr = PLAN.ptx
    D: tl.constexpr = LAYOUT.v_head_dim
    BYTES: tl.constexpr = LAYOUT.page_size // FIELDS
    BLOCK_D: tl.constexpr = PLAN.block_d
    PADDED_BYTES: tl.constexpr = max(BYTES, 32)
    CHANNELS: tl.constexpr = state.acc.shape[1]
    PARTS: tl.constexpr = CHANNELS // BLOCK_D
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1 + tl.arange(0, 1))
    scale, zero = scale_and_zero(params, BITS)

    m_page = tl.max(scores, axis=1)
    weights = tl.exp2(scores - m_page[:, None])
    products = weights * scale[None, :]
    unit = tl.full(m_page.shape, 1.0, tl.float32)
    if sum_dtype(OPERAND) == tl.int32:
        unit = tl.maximum(tl.max(products, axis=1), LEAST_PRODUCT) * (1.0 / DIGITS_MAX)
        products = products * (1.0 / unit)[:, None]
    operands = split_planes(two_terms(products, OPERAND, PTX), FIELDS)
    total = tl.sum(weights, axis=1)
    offset = tl.sum(weights * zero[None, :], axis=1)

    codes_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.int8))
    sums = ()
    for part in tl.static_range(PARTS):
        row = part * BLOCK_D + spread_columns(tl.arange(0, BLOCK_D))
        packed, high = load_packed(
            codes_ptr, row, part * BLOCK_D, spread_order(BLOCK_D), D, CHANNELS == D, BYTES, PADDED_BYTES, BITS, PTX
        )
        product = tl.zeros((operands[0].shape[0], BLOCK_D), sum_dtype(OPERAND))
        for f in tl.static_range(FIELDS):
            codes = field_codes(packed, high, f, BITS, 1, OPERAND, PTX)
            terms = _pad_plane(operands[f], PADDED_BYTES)
            product = tl.dot(terms, codes, product, input_precision="ieee", out_dtype=sum_dtype(OPERAND))
        sums = sums + (sum_of_terms(in_order(product)),)

    norm = value_norms(record_ptr, LAYOUT, CHANNELS)
    alpha, beta, m = factors_of_part(state, m_page)
    page_factor = beta * gain
    update = join_planes(sums) * (page_factor * unit)[:, None] + (offset * page_factor)[:, None]
    acc = state.acc * alpha[:, None] + update * norm[None, :]
    return State(acc, m, state.l * alpha + total * beta)
