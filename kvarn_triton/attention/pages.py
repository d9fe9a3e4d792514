"""Attention of a tile of query rows to quantized pages: the loop over pages of prefill attention.

With many rows it pays to dequantize each page once and to multiply plain 16-bit numbers: `code * scale + zero` of keys and
values, rounded once, times the norm of a channel for values. The norm of a key token multiplies its scores. Query rows are
rows of the products; tokens are columns of the product with keys, channels of the product with values. With few rows, or little
shared memory, pages are dequantized in registers (`attend_registers`) or stay as they are (`attend_few`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..paging import load_page_id
from ..tile.arithmetic import log2, split_halves
from .folded import advance_softmax, capped, load_bytes, load_high
from .halves import add_folded_values, folded_scores
from .operands import join_planes, split_planes, unsigned_codes, unsigned_codes_ptx
from .query import plane_channels
from .registers import add_register_values, register_scores, token_in_order

LEAST_UNIT = tl.constexpr(2.0**-120)
"""Least unit of a sum of values: above zero, so that one can divide by it."""


@triton.constexpr_function
def _expand_ptx(field, bits):
    """PTX of `expand_field` for four bytes: `$4, $5` scales, `$6, $7` zeros.

    A code in the low byte of 0x6400 is the float16 number 1024 + code.
    """
    codes = unsigned_codes_ptx(field, bits, 1, "$2", "$3")
    return (
        "{ .reg .b32 t, u, magic; mov.b32 magic, 0x64006400; " + codes + "prmt.b32 $0, t, magic, 0x5150; "
        "prmt.b32 $1, t, magic, 0x5352; sub.rn.f16x2 $0, $0, magic; sub.rn.f16x2 $1, $1, magic; "
        "fma.rn.f16x2 $0, $0, $4, $6; fma.rn.f16x2 $1, $1, $5, $7; }"
    )


@triton.jit
def expand_field(packed, high, scale, zero, FIELD: tl.constexpr, BITS: tl.constexpr, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Return `code * scale + zero` of one field of packed bytes, in OPERAND. `high` as in `operands.field_codes`."""
    scale = tl.broadcast_to(scale, packed.shape)
    zero = tl.broadcast_to(zero, packed.shape)
    if PTX and tl.float16 == OPERAND:
        numbers = tl.inline_asm_elementwise(
            _expand_ptx(FIELD, BITS), "=&r,=&r,r,r,r,r,r,r", [packed, high, scale, zero], tl.float16, is_pure=True, pack=4
        )  # fmt: skip
    else:
        numbers = unsigned_codes(packed, high, FIELD, BITS).to(OPERAND) * scale + zero
    return numbers


@triton.jit
def _join_fields(planes):
    """Put a tuple of 2**n tiles [rows, columns] below each other."""
    for _ in tl.static_range(log2(len(planes))):
        joined = ()
        for j in tl.static_range(len(planes) // 2):
            a = planes[2 * j]
            pair = tl.permute(tl.join(a, planes[2 * j + 1]), (2, 0, 1))
            joined = joined + (tl.reshape(pair, (2 * a.shape[0], a.shape[1])),)
        planes = joined
    return planes[0]


@triton.jit
def channel_in_order(index, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr, FIELDS: tl.constexpr):
    """Return the channels in the order of query and key operands, field by field, and which are not padding.

    They are those of `item_of_field`, written so that the compiler sees neighbours that lie side by side.
    """
    RUN: tl.constexpr = LAYOUT.block_size // FIELDS
    channel = index // RUN % (BLOCK_K // RUN) * LAYOUT.block_size + index // BLOCK_K * RUN + index % RUN
    return channel, index % BLOCK_K < LAYOUT.head_dim // FIELDS


@triton.jit
def _page_scores(
    record_ptr,
    q,
    q_factor,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the scores [rows, page_size] of the tokens of a record, BLOCK_T of them to a product."""
    BITS: tl.constexpr = LAYOUT.k_bits
    G: tl.constexpr = LAYOUT.page_size
    BYTES: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_K: tl.constexpr = q.shape[1] // FIELDS
    codes_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    byte = tl.arange(0, BLOCK_K)
    products = ()
    for part in tl.static_range(G // BLOCK_T):
        row = part * BLOCK_T + tl.arange(0, BLOCK_T)
        packed = load_bytes(codes_ptr, row, BYTES, BLOCK_K, G, True)
        high = packed
        if BITS == 3:
            high = load_high(codes_ptr + G * BYTES, row, BYTES, BLOCK_K, G, PTX)
        planes = ()
        for f in tl.static_range(FIELDS):
            channel, mask = plane_channels(f, LAYOUT, FIELDS, byte)
            scale, zero = split_halves(tl.load(params_ptr + channel, mask, other=0))
            scale = scale.to(OPERAND)[:, None]
            planes = planes + (expand_field(packed, high, scale, zero.to(OPERAND)[:, None], f, BITS, OPERAND, PTX),)
        products = products + (tl.dot(q, _join_fields(planes), input_precision="ieee"),)
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    norm = tl.load((record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16)) + tl.arange(0, G)).to(tl.float32)
    return join_planes(products) * (norm * (gain * q_factor))[None, :]


@triton.jit
def _page_values(
    record_ptr,
    value_factor,
    CHANNELS: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the values [page_size, CHANNELS] of a record, whose norms are multiplied by value_factor."""
    BITS: tl.constexpr = LAYOUT.v_bits
    D: tl.constexpr = LAYOUT.v_head_dim
    BYTES: tl.constexpr = LAYOUT.page_size // FIELDS
    codes_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    channel = tl.arange(0, CHANNELS)
    norm = tl.load((record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16)) + channel, channel < D, other=0.0)
    norm = (norm.to(tl.float32) * value_factor).to(OPERAND)[None, :]
    packed = load_bytes(codes_ptr, channel, BYTES, BYTES, D, CHANNELS == D)
    high = packed
    if BITS == 3:
        high = load_high(codes_ptr + D * BYTES, channel, BYTES, BYTES, D, PTX)
    planes = ()
    for f in tl.static_range(FIELDS):
        scale, zero = split_halves(tl.load(params_ptr + f * BYTES + tl.arange(0, BYTES)))
        scale = scale.to(OPERAND)[:, None]
        values = expand_field(packed, high, scale, zero.to(OPERAND)[:, None], f, BITS, OPERAND, PTX)
        planes = planes + (values * norm,)
    return _join_fields(planes)


@triton.jit
def visible(position, key, window, HAS_WINDOW: tl.constexpr):
    """Return which keys [tokens] the queries at `position` [rows] see: those up to its own and within the window."""
    seen = key[None, :] <= position[:, None]
    if HAS_WINDOW:
        seen = seen & (key[None, :] > position[:, None] - window)
    return seen


@triton.jit
def attend_pages(
    acc,
    m_i,
    l_i,
    q,
    q_factor,
    soft_cap,
    pages_ptr,
    table_ptr,
    stride_page,
    first_page,
    last_page,
    num_valid,
    position,
    first_position,
    last_position,
    window,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    FORM: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by body pages first_page to last_page of one kv head, of which num_valid tokens count.

    `position` [rows] are those of the queries within the body, from first_position to last_position. Sums are kept in units
    of the largest gain of values so far, so that 16-bit values neither overflow nor vanish. BLOCK_D channels of values are
    multiplied at once, unless they are dequantized. `q` are planes (`query.rotate_planes`) if the FORM is "registers".
    """
    G: tl.constexpr = LAYOUT.page_size
    unit = tl.full((), LEAST_UNIT, tl.float32)
    planes = q
    column = tl.arange(0, G)
    if FORM == "registers":
        column = token_in_order(column, LAYOUT, V_FIELDS)
    elif FORM == "folded":
        planes = split_planes(q, K_FIELDS)
    page = tl.zeros((), tl.int32)
    if first_page < last_page:
        page = load_page_id(table_ptr, first_page, last_page, PTX)
    for i in tl.range(first_page, last_page, num_stages=NUM_STAGES):
        record_ptr = pages_ptr + page.to(tl.int64) * stride_page
        page = load_page_id(table_ptr, i + 1, last_page, PTX)
        if FORM == "registers":
            scores = register_scores(record_ptr, planes, q_factor, LAYOUT, BLOCK_T, K_FIELDS, V_FIELDS, PTX)
        elif FORM == "folded":
            factor = tl.full((acc.shape[0],), 1.0, tl.float32) * q_factor
            scores = folded_scores(record_ptr, planes, factor, LAYOUT, BLOCK_T, K_FIELDS, OPERAND, PTX)
        else:
            scores = _page_scores(record_ptr, q, q_factor, LAYOUT, BLOCK_T, K_FIELDS, OPERAND, PTX)
        if HAS_CAP:
            scores = capped(scores, soft_cap)
        hidden = (i + 1) * G > tl.minimum(num_valid, first_position + 1)
        if HAS_WINDOW:
            hidden = hidden | (i * G <= last_position - window)
        if hidden:
            key = i * G + column
            seen = visible(position, key, window, HAS_WINDOW) & (key < num_valid)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        if FORM == "registers":
            acc, m_i, l_i = add_register_values(acc, m_i, l_i, scores, record_ptr, LAYOUT, BLOCK_D, V_FIELDS, PTX)
        elif FORM == "folded":
            acc, m_i, l_i = add_folded_values(acc, m_i, l_i, scores, record_ptr, LAYOUT, BLOCK_D, V_FIELDS, OPERAND, PTX)
        else:
            weights, alpha, m_i, l_i = advance_softmax(scores, m_i, l_i)
            gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1)
            new_unit = tl.maximum(unit, gain)
            acc = acc * (alpha * (unit / new_unit))[:, None]
            values = _page_values(record_ptr, gain / new_unit, acc.shape[1], LAYOUT, V_FIELDS, OPERAND, PTX)
            acc = tl.dot(weights.to(OPERAND), values, acc, input_precision="ieee")
            unit = new_unit
    if FORM == "dequantized":
        acc = acc * unit
    return acc, m_i, l_i
