"""Attention over quantized pages: what one program does with one page of tokens. Shared by the attention kernels.

Nothing is dequantized. The scale of a key channel is folded into the query, its zero is one number per head, the norm of a
token multiplies a score; the scale of a value token is folded into its weight, its zero is one number per head, the norm of
a channel multiplies the sum of a page. The tensor cores multiply integer codes with integers of 16 bits in two terms
(`operands`). Query heads are rows; tokens are columns of the product with keys, channels of the product with values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..paging import load_page_id
from ..tile.arithmetic import LOG2E, split_halves
from .operands import (
    DIGITS_MAX,
    code_offset,
    field_codes,
    field_factor,
    high_bits,
    in_order,
    join_planes,
    split_planes,
    spread_columns,
    sum_dtype,
    sum_of_terms,
    two_terms,
)
from .query import plane_channels

LEAST_PRODUCT = tl.constexpr(2.0**-100)
"""Stands for the largest product of a weight and a scale where it is smaller, or zero: one divides by it."""


@triton.jit
def load_bytes(rows_ptr, row, BYTES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr):
    """Load BYTES bytes of each row, padded to BLOCK, as int8 [BLOCK, rows]; rows from ROWS on are zero."""
    byte = tl.arange(0, BLOCK)[:, None]
    place = row[None, :] * BYTES + byte
    if BYTES == BLOCK and ALL_ROWS:
        packed = tl.load(rows_ptr + place)
    else:
        packed = tl.load(rows_ptr + place, (byte < BYTES) & (row < ROWS)[None, :], other=0)
    return packed


@triton.jit
def load_high(rows_ptr, row, BYTES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr):
    """Load the high bits of 3-bit codes for rows of BYTES bytes as int8 [BLOCK, rows]: bit f belongs to field f."""
    byte = tl.arange(0, BLOCK)[:, None]
    place = row[None, :] * (BYTES // 2) + byte
    mask = (row < ROWS)[None, :]
    lower = tl.load(rows_ptr + place, (byte < BYTES // 2) & mask, other=0)
    upper = tl.load(rows_ptr + place - BYTES // 2, (byte >= BYTES // 2) & (byte < BYTES) & mask, other=0)
    return high_bits(lower, upper, PTX)


@triton.jit
def _shifted_zero(zero, scale, BITS: tl.constexpr):
    """Return the zero of codes less `code_offset`."""
    zero = zero.to(tl.float32)
    if code_offset(BITS):
        zero += code_offset(BITS) * scale
    return zero


@triton.jit
def quantized_scores(
    record_ptr,
    planes,
    q_factor,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the scores [heads, page_size] of the tokens of a record, BLOCK_T of them to a product."""
    BITS: tl.constexpr = LAYOUT.k_bits
    G: tl.constexpr = LAYOUT.page_size
    BYTES: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_K: tl.constexpr = planes[0].shape[1]
    codes_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + tl.arange(0, 1))
    byte = tl.arange(0, BLOCK_K)
    operands = ()
    offsets = tl.zeros((planes[0].shape[0], BLOCK_K), tl.float32)
    for f in tl.static_range(FIELDS):
        channel, mask = plane_channels(f, LAYOUT, FIELDS, byte)
        if BYTES == BLOCK_K:
            params = tl.load(params_ptr + channel)
        else:
            params = tl.load(params_ptr + channel, mask, other=0)
        scale, zero = split_halves(params)
        scale = scale.to(tl.float32)
        zero = _shifted_zero(zero, scale, BITS) * field_factor(f, BITS)
        offsets += planes[f] * zero[None, :]
        operands = operands + (two_terms(planes[f] * scale[None, :], OPERAND, PTX),)
    q_factor = q_factor * gain
    offset = tl.sum(offsets, axis=1) * q_factor
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    scores = ()
    for part in tl.static_range(G // BLOCK_T):
        token = part * BLOCK_T + tl.arange(0, BLOCK_T)
        row = part * BLOCK_T + spread_columns(tl.arange(0, BLOCK_T))
        packed = load_bytes(codes_ptr, row, BYTES, BLOCK_K, G, True)
        high = packed
        if BITS == 3:
            high = load_high(codes_ptr + G * BYTES, row, BYTES, BLOCK_K, G, PTX)
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
def add_quantized_values(
    acc,
    m_i,
    l_i,
    scores,
    params,
    record_ptr,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return (acc, m_i, l_i) advanced by the values of a record with these scores and `params`, BLOCK_D channels to a product.

    At least one score of each head is finite. With integers, what is rounded is the product of a weight and its token's scale,
    relative to the largest of the page: all bits are used whatever came before, and a token of large magnitude and little
    weight takes none from the others.
    """
    BITS: tl.constexpr = LAYOUT.v_bits
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.v_head_dim
    BYTES: tl.constexpr = G // FIELDS
    BLOCK_B: tl.constexpr = max(BYTES, 32)
    CHANNELS: tl.constexpr = acc.shape[1]
    PARTS: tl.constexpr = CHANNELS // BLOCK_D
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1 + tl.arange(0, 1))
    scale, zero = split_halves(params)
    scale = scale.to(tl.float32)
    zero = _shifted_zero(zero, scale, BITS)

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
        packed = load_bytes(codes_ptr, row, BYTES, BLOCK_B, D, CHANNELS == D)
        high = packed
        if BITS == 3:
            high = load_high(codes_ptr + D * BYTES, row, BYTES, BLOCK_B, D, PTX)
        product = tl.zeros((operands[0].shape[0], BLOCK_D), sum_dtype(OPERAND))
        for f in tl.static_range(FIELDS):
            codes = field_codes(packed, high, f, BITS, 1, OPERAND, PTX)
            terms = _pad_plane(operands[f], BLOCK_B)
            product = tl.dot(terms, codes, product, input_precision="ieee", out_dtype=sum_dtype(OPERAND))
        sums = sums + (sum_of_terms(in_order(product)),)

    norm_ptr = (record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16))
    channel = tl.arange(0, CHANNELS)
    if CHANNELS == D:
        norm = tl.load(norm_ptr + channel)
    else:
        norm = tl.load(norm_ptr + channel, channel < D, other=0.0)
    m_new = tl.maximum(m_i, m_page)
    alpha = tl.exp2(m_i - m_new)
    beta = tl.exp2(m_page - m_new)
    page_factor = beta * gain
    update = join_planes(sums) * (page_factor * unit)[:, None] + (offset * page_factor)[:, None]
    acc = acc * alpha[:, None] + update * norm.to(tl.float32)[None, :]
    return acc, m_new, l_i * alpha + total * beta


@triton.jit
def advance_softmax(scores, m_i, l_i):
    """Return weights [rows, tokens] of scores (base 2), the factor of what was summed before, and the new (m_i, l_i).

    A row may have no finite score yet: its weights are 0.
    """
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    origin = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m_i - origin)
    weights = tl.exp2(scores - origin[:, None])
    return weights, alpha, m_new, l_i * alpha + tl.sum(weights, axis=1)


@triton.jit
def capped(scores, cap):
    """Return cap * tanh(scores / cap), to the last places of float32 for small and large scores alike.

    Scores and cap may be in any unit, but in the same one: natural ones, or times log2(e).
    """
    x = scores * (1.0 / cap)
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    square = x * x
    odd = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    odd = ((odd + 1.33314422036e-1) * square - 3.33332819422e-1) * square
    return cap * tl.where(size < 0.625, x + x * odd, tl.where(x < 0, -far, far))


@triton.jit
def attend_quantized(
    acc,
    m_i,
    l_i,
    planes,
    q_factor,
    pages_ptr,
    table_ptr,
    stride_page,
    page,
    first_page,
    last_page,
    visible,
    cap,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by body pages first_page to last_page of one kv head.

    `page` is the id of the first of them. Of the tokens of the body those from visible[0] to visible[1] are seen, at least one
    in every page; without HAS_WINDOW from the first token on.
    """
    G: tl.constexpr = LAYOUT.page_size
    first_visible, num_valid = visible
    for i in tl.range(first_page, tl.minimum(last_page, tl.cdiv(num_valid, G)), num_stages=NUM_STAGES):
        record_ptr = pages_ptr + page.to(tl.int64) * stride_page
        page = load_page_id(table_ptr, i + 1, last_page, PTX)
        scores = quantized_scores(record_ptr, planes, q_factor, LAYOUT, BLOCK_T, K_FIELDS, OPERAND, PTX)
        if HAS_CAP:
            scores = capped(scores, cap)
        params = tl.load((record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32)) + tl.arange(0, G))
        at_edge = (i + 1) * G > num_valid
        if HAS_WINDOW:
            at_edge |= i * G < first_visible
        if at_edge:
            valid = i * G + tl.arange(0, G) < num_valid
            if HAS_WINDOW:
                valid &= i * G + tl.arange(0, G) >= first_visible
            scores = tl.where(valid[None, :], scores, float("-inf"))
            params = tl.where(valid, params, 0)  # a token that isn't seen may be of any magnitude, or not a number
        acc, m_i, l_i = add_quantized_values(
            acc, m_i, l_i, scores, params, record_ptr, LAYOUT, BLOCK_D, V_FIELDS, OPERAND, PTX
        )  # fmt: skip
    return acc, m_i, l_i
