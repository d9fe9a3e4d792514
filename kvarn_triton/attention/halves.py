"""Attention of up to 16 query rows to a quantized page as it is, in numbers of 16 bits, or 32: between the other forms.

As in `digits` nothing is dequantized: scales are folded into queries and weights, zeros are one number per row. As in
`dequantized` numbers are rounded to 16 bits once, so that the rows of a product are 16 queries, not 8 in two terms. Codes are
multiplied as float16 numbers below the normal range: the bits of a code are the number code * 2**-24, exactly.

Codes are above 0, so rounding a folded number by r would move a score by r times a mean code of half the largest one. That
mean is taken out: what was rounded off, times the mean code, goes into the number per row. Operands of float32 are codes less
the mean code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile.arithmetic import split_halves
from ..tile.codes import load_packed, unsigned_codes, unsigned_codes_ptx
from ..tile.high_bits import order_of
from .operands import join_planes, split_planes
from .query import plane_channels
from .softmax import State, factors_of_part

CODE_SCALE = tl.constexpr(2.0**24)
LARGEST = tl.constexpr(16384.0)
"""Largest folded weight: within float16, far above its smallest normal number."""
LEAST_SCORE = tl.constexpr(-1e30)
"""Stands for the largest score of a row that sees no token of a page."""


@triton.constexpr_function
def _mean_code(bits):
    """Return the mean of the smallest and the largest code."""
    return (2**bits - 1) / 2


@triton.constexpr_function
def _center(bits, operand):
    """Return what codes in an operand are less than in a page: float16 holds codes below its normal range only as they are."""
    return _mean_code(bits) if operand == tl.float32 else 0.0


@triton.constexpr_function
def _half_ptx(field, bits):
    """PTX of `_half_codes` for four bytes."""
    codes = unsigned_codes_ptx(field, bits, 1, "$2", "$3")
    return "{ .reg .b32 t, u; " + codes + "prmt.b32 $0, t, 0, 0x4140; prmt.b32 $1, t, 0, 0x4342; }"


@triton.jit
def _half_codes(packed, high, FIELD: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Return the codes of one field of packed bytes, less `_center`, over CODE_SCALE, in OPERAND.

    `high` as in `codes.field_codes`.
    """
    if PTX and tl.float16 == OPERAND:
        codes = tl.inline_asm_elementwise(
            _half_ptx(FIELD, BITS), "=&r,=&r,r,r", [packed, high], tl.float16, is_pure=True, pack=4
        )  # fmt: skip
    else:
        codes = unsigned_codes(packed, high, FIELD, BITS).to(tl.float32) - _center(BITS, OPERAND)
        codes = (codes * (1.0 / CODE_SCALE)).to(OPERAND)
    return codes


@triton.jit
def half_scores(record_ptr, planes, q_factor, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the scores [rows, page_size] of the tokens of a record, PLAN.block_t of them to a product."""
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
        channel, mask = plane_channels(f, LAYOUT, FIELDS, byte)
        scale, zero = split_halves(tl.load(params_ptr + channel, mask, other=0))
        scale = scale.to(tl.float32)
        zero = zero.to(tl.float32) + _mean_code(BITS) * scale
        plane = planes[f].to(tl.float32)
        folded = (plane * scale[None, :]).to(OPERAND)
        offsets += plane * zero[None, :] - (_mean_code(BITS) - _center(BITS, OPERAND)) * folded.to(tl.float32)
        operands = operands + (folded,)
    q_factor = q_factor * gain
    offset = tl.sum(offsets, axis=1) * q_factor
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    scores = ()
    for part in tl.static_range(G // BLOCK_T):
        row = part * BLOCK_T + tl.arange(0, BLOCK_T)
        packed, high = load_packed(codes_ptr, row, part * BLOCK_T, order_of(BLOCK_T), G, True, BYTES, BLOCK_K, BITS, PTX)
        product = tl.zeros((planes[0].shape[0], BLOCK_T), tl.float32)
        for f in tl.static_range(FIELDS):
            codes = _half_codes(packed, high, f, BITS, OPERAND, PTX)
            product = tl.dot(operands[f], codes, product, input_precision="ieee")
        norm = tl.load(norm_ptr + row).to(tl.float32)
        scores = scores + ((product * (q_factor * CODE_SCALE)[:, None] + offset[:, None]) * norm[None, :],)
    return join_planes(scores)


@triton.jit
def add_half_values(state, scores, record_ptr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the state advanced by the values of a record with these scores.

    Weights are relative to the largest of the page and row, so that folded ones use the range of 16 bits whatever came before.
    """
    BITS: tl.constexpr = LAYOUT.v_bits
    FIELDS: tl.constexpr = PLAN.v_fields
    OPERAND: tl.constexpr = PLAN.operand
    PTX: tl.constexpr = PLAN.ptx
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.v_head_dim
    BYTES: tl.constexpr = G // FIELDS
    BLOCK_D: tl.constexpr = PLAN.block_d
    CHANNELS: tl.constexpr = state.acc.shape[1]
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1 + tl.arange(0, 1))
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    scale, zero = split_halves(tl.load(params_ptr + tl.arange(0, G)))
    scale = scale.to(tl.float32)
    zero = zero.to(tl.float32) + _mean_code(BITS) * scale

    m_page = tl.maximum(tl.max(scores, axis=1), LEAST_SCORE)
    weights = tl.exp2(scores - m_page[:, None])
    folded = (weights * (scale * LARGEST)[None, :]).to(OPERAND)
    total = tl.sum(weights, axis=1)
    rounded = (_mean_code(BITS) - _center(BITS, OPERAND)) * folded.to(tl.float32)
    offset = tl.sum(weights * (zero * LARGEST)[None, :] - rounded, axis=1)
    operands = split_planes(folded, FIELDS)

    codes_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.int8))
    products = ()
    for part in tl.static_range(CHANNELS // BLOCK_D):
        row = part * BLOCK_D + tl.arange(0, BLOCK_D)
        packed, high = load_packed(codes_ptr, row, part * BLOCK_D, order_of(BLOCK_D), D, CHANNELS == D, BYTES, BYTES, BITS, PTX)
        product = tl.zeros((state.acc.shape[0], BLOCK_D), tl.float32)
        for f in tl.static_range(FIELDS):
            codes = _half_codes(packed, high, f, BITS, OPERAND, PTX)
            product = tl.dot(operands[f], codes, product, input_precision="ieee")
        products = products + (product,)

    channel = tl.arange(0, CHANNELS)
    norm = tl.load((record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16)) + channel, channel < D, other=0.0)
    alpha, beta, m = factors_of_part(state, m_page)
    page_factor = beta * gain * (1.0 / LARGEST)
    update = join_planes(products) * (page_factor * CODE_SCALE)[:, None] + (offset * page_factor)[:, None]
    acc = state.acc * alpha[:, None] + update * norm.to(tl.float32)[None, :]
    return State(acc, m, state.l * alpha + total * beta)
