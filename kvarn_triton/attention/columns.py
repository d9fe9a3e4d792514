"""Attention of up to 4 query heads to a quantized page as it is, in integers of 8 bits: `digits`, turned over.

Tokens and channels are rows of products, heads are columns: each head takes two neighbours, one for each term of its numbers
(`operands`), whose results meet in one thread. 4 heads fill the 8 columns of the tensor cores' instruction, where their rows
would be half padding: products, scores and sums are half as many. A thread has the scores of one head for every 8th token; the
weights of tokens that are neighbours come together if rows are computed in the order of `spread_rows`, and then cross lanes
once, four in a register.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..masking import weighed
from ..paging import load_page_id
from ..tile.arithmetic import fma, log2
from ..tile.codes import field_codes, field_factor, load_packed
from .digits import LEAST_PRODUCT, key_params, scale_and_zero, value_norms
from .operands import DIGITS_MAX, ROUNDING, high_and_low, join_rows, sum_dtype, sum_of_both
from .query import plane_channels, raw_unit
from .softmax import State, factors_of_part
from .tokens import run_of, seen_of_run

COLUMN_HEADS = tl.constexpr(4)
"""Query heads of a product, padding included: in two terms each, the columns of the tensor cores' instruction."""


@triton.jit
def spread_rows(row):
    """Return which item to compute in a row of a product, so that `rows_in_order` leaves each number in its thread.

    A thread of a product holds rows 8 apart; a register of an operand holds 4 neighbours.
    """
    return row // 32 * 32 + row % 8 * 4 + row // 8 % 4


@triton.constexpr_function
def _order_of_rows(rows):
    """Return for each bit of the number of a row the bit of the item that `spread_rows` computes there."""
    return (2, 3, 4, 0, 1, *range(5, rows.bit_length() - 1))


@triton.constexpr_function
def _plain_order(rows):
    """Return the same of rows that are items."""
    return tuple(range(rows.bit_length() - 1))


@triton.jit
def rows_in_order(x):
    """Reorder rows that were computed in the order of `spread_rows`."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    return tl.reshape(tl.permute(tl.reshape(x, (ROWS // 32, 4, 8, COLS)), (0, 2, 1, 3)), (ROWS, COLS))


@triton.jit
def _spread(x):
    """Reorder [rows] as `spread_rows` does: what is loaded in the order of memory can be copied ahead."""
    return tl.reshape(tl.permute(tl.reshape(x, (x.shape[0] // 32, 8, 4)), (0, 2, 1)), (x.shape[0],))


@triton.jit
def _split_rows(tile, COUNT: tl.constexpr):
    """Cut a tile [rows, columns] into a tuple of COUNT tiles, a power of two."""
    tiles = (tile,)
    for _ in tl.static_range(log2(COUNT)):
        halves = ()
        for j in tl.static_range(len(tiles)):
            pair = tl.reshape(tiles[j], (2, tiles[j].shape[0] // 2, tiles[j].shape[1]))
            a, b = tl.split(tl.permute(pair, (1, 2, 0)))
            halves = halves + (a, b)
        tiles = halves
    return tiles


@triton.jit
def turned(planes):
    """Return planes of queries [rows, bytes] as [bytes, columns]."""
    columns = ()
    for f in tl.static_range(len(planes)):
        columns = columns + (tl.trans(planes[f]),)
    return columns


@triton.jit
def _term_of_pairs(x, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Return one term of float32 numbers [rows, columns], two columns of which are equal: of the first of both the high one."""
    parity = (tl.arange(0, x.shape[1]) % 2)[None, :]
    if sum_dtype(OPERAND) == tl.int32:
        bits = (x + ROUNDING).to(tl.int32, bitcast=True)
        if PTX:
            choice = tl.where(parity == 0, 0x5151, 0x4040) + tl.zeros_like(bits)
            flip = tl.where(parity == 0, 0, 0x80808080).to(tl.uint32) + tl.zeros_like(bits).to(tl.uint32)
            term = tl.inline_asm_elementwise(
                "{ .reg .b32 t, u; prmt.b32 t, $1, $2, $5; prmt.b32 u, $3, $4, $5; prmt.b32 t, t, u, 0x5410; "
                "xor.b32 $0, t, $9; }",
                "=r,r,r,r,r,r,r,r,r,r,r,r,r", [bits, choice, flip], tl.int8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            term = tl.where(parity == 0, bits >> 8, bits ^ 128).to(tl.int8)
    else:
        high = x.to(OPERAND)
        term = tl.where(parity == 0, high, (x - high.to(tl.float32)).to(OPERAND))
    return term


@triton.jit
def _terms_of_columns(x, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Split float32 numbers [rows, columns] in two terms: [rows, 2 * columns], those of a number next to each other."""
    high, low = high_and_low(x, OPERAND, PTX)
    return tl.reshape(tl.join(high, low), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def _sum_of_columns(product):
    """Return the float32 results [rows, columns] of a product whose right operand was split in two terms."""
    high, low = tl.split(tl.reshape(product, (product.shape[0], product.shape[1] // 2, 2)))
    return sum_of_both(high, low)


@triton.jit
def new_columns(CHANNELS: tl.constexpr):
    """Return the state of heads that have attended to nothing, `acc` as [channels, heads]."""
    m = tl.full((COLUMN_HEADS,), float("-inf"), tl.float32)
    return State(tl.zeros((CHANNELS, COLUMN_HEADS), tl.float32), m, tl.zeros((COLUMN_HEADS,), tl.float32))


@triton.jit
def scaled_columns(x, factor):
    """Return float32 x [rows, columns] times factor [columns], as `tile.arithmetic.scaled` does it."""
    return fma(x, tl.broadcast_to(factor[None, :], x.shape), tl.zeros_like(x))


@triton.jit
def butterfly_of_rows(x, WIDTH: tl.constexpr):
    """Replace runs a, b of WIDTH rows below each other by a + b, a - b."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS // (2 * WIDTH), 2, WIDTH, COLS)), (0, 2, 3, 1)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 3, 1, 2)), (ROWS, COLS))


@triton.jit
def one_of_pairs(x):
    """Return [n / 2] of [n] numbers, two of which are equal."""
    first, _ = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    return first


@triton.jit
def column_scores(record_ptr, planes, q_factor, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the scores [page_size, heads] of the tokens of a record, in the order of `spread_rows`.

    PLAN.block_t of them are rows of one product. Columns of `planes` are heads, each of them twice.
    """
    BITS: tl.constexpr = LAYOUT.k_bits
    FIELDS: tl.constexpr = PLAN.k_fields
    PTX: tl.constexpr = PLAN.ptx
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_T: tl.constexpr = PLAN.block_t
    BYTES: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_K: tl.constexpr = planes[0].shape[0]
    COLUMNS: tl.constexpr = planes[0].shape[1]
    codes_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + tl.arange(0, 1))
    byte = tl.arange(0, BLOCK_K)
    operands = ()
    offsets = tl.zeros((BLOCK_K, COLUMNS), tl.float32)
    for f in tl.static_range(FIELDS):
        scale, zero = key_params(params_ptr, f, byte, LAYOUT, FIELDS)
        offsets += planes[f] * zero[:, None]
        operands = operands + (_term_of_pairs(planes[f] * scale[:, None], tl.int8, PTX),)
    q_factor = q_factor * gain
    offset = one_of_pairs(tl.sum(offsets, axis=0)) * q_factor
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    scores = ()
    for part in tl.static_range(G // BLOCK_T):
        row = part * BLOCK_T + spread_rows(tl.arange(0, BLOCK_T))
        packed, high = load_packed(codes_ptr, row, part * BLOCK_T, _order_of_rows(BLOCK_T), G, True, BYTES, BLOCK_K, BITS, PTX)
        product = tl.zeros((BLOCK_T, COLUMNS), tl.int32)
        for f in tl.static_range(FIELDS):
            codes = tl.trans(field_codes(packed, high, f, BITS, field_factor(f, BITS), tl.int8, PTX))
            product = tl.dot(codes, operands[f], product, out_dtype=tl.int32)
        norm = _spread(tl.load(norm_ptr + part * BLOCK_T + tl.arange(0, BLOCK_T))).to(tl.float32)
        score = (_sum_of_columns(product) * q_factor[None, :] + offset[None, :]) * norm[:, None]
        scores = scores + (score,)
    return join_rows(scores)


@triton.jit
def _pad_rows(terms, BLOCK: tl.constexpr):
    """Pad operands of 16 rows with zeros to BLOCK, the least that a product of bytes takes."""
    if terms.shape[0] < BLOCK:
        terms = join_rows((terms, tl.zeros_like(terms)))
    return terms


@triton.jit
def add_column_values(state, scores, params, record_ptr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the state advanced by the values of a record, as `digits.add_digit_values` does it.

    `scores` and `params` are in the order of `spread_rows`; `state.acc` is [channels, heads].
    """
    BITS: tl.constexpr = LAYOUT.v_bits
    FIELDS: tl.constexpr = PLAN.v_fields
    PTX: tl.constexpr = PLAN.ptx
    D: tl.constexpr = LAYOUT.v_head_dim
    BYTES: tl.constexpr = LAYOUT.page_size // FIELDS
    BLOCK_D: tl.constexpr = PLAN.block_d
    PADDED_BYTES: tl.constexpr = max(BYTES, 32)
    CHANNELS: tl.constexpr = state.acc.shape[0]
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1 + tl.arange(0, 1))
    scale, zero = scale_and_zero(params, BITS)

    m_page = tl.max(scores, axis=0)
    weights = tl.exp2(scores - m_page[None, :])
    products = weights * scale[:, None]
    unit = tl.maximum(tl.max(products, axis=0), LEAST_PRODUCT) * (1.0 / DIGITS_MAX)
    products = rows_in_order(products * (1.0 / unit)[None, :])
    operands = _split_rows(_terms_of_columns(products, tl.int8, PTX), FIELDS)
    total = tl.sum(weights, axis=0)
    offset = tl.sum(weights * zero[:, None], axis=0)

    codes_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.int8))
    sums = ()
    for part in tl.static_range(CHANNELS // BLOCK_D):
        row = part * BLOCK_D + tl.arange(0, BLOCK_D)
        packed, high = load_packed(
            codes_ptr, row, part * BLOCK_D, _plain_order(BLOCK_D), D, CHANNELS == D, BYTES, PADDED_BYTES, BITS, PTX
        )
        product = tl.zeros((BLOCK_D, operands[0].shape[1]), tl.int32)
        for f in tl.static_range(FIELDS):
            codes = tl.trans(field_codes(packed, high, f, BITS, 1, tl.int8, PTX))
            product = tl.dot(codes, _pad_rows(operands[f], PADDED_BYTES), product, out_dtype=tl.int32)
        sums = sums + (_sum_of_columns(product),)

    norm = value_norms(record_ptr, LAYOUT, CHANNELS)
    alpha, beta, m = factors_of_part(state, m_page)
    page_factor = beta * gain
    update = join_rows(sums) * (page_factor * unit)[None, :] + (offset * page_factor)[None, :]
    acc = state.acc * alpha[None, :] + update * norm[:, None]
    return State(acc, m, state.l * alpha + total * beta)


@triton.jit
def attend_raw_columns(
    state,
    planes,
    q_factor,
    masking,
    raw,
    table_ptr,
    runs,
    sink_seen,
    body_seen,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state of one query token by runs of raw tokens of one kv head, as `tokens.attend_raw_once` does it."""
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_R: tl.constexpr = PLAN.units.raw_block
    FIELDS: tl.constexpr = PLAN.k_fields
    OPERAND: tl.constexpr = PLAN.raw_operand
    UNIT: tl.constexpr = raw_unit(LAYOUT.k_bits)
    COLUMNS: tl.constexpr = planes[0].shape[1]
    terms = ()
    for f in tl.static_range(FIELDS):
        terms = terms + (_term_of_pairs(planes[f] * (field_factor(f, LAYOUT.k_bits) / UNIT), OPERAND, False),)
    q_factor = q_factor * UNIT
    byte = tl.arange(0, planes[0].shape[0])
    offs_d = tl.arange(0, state.acc.shape[0])
    count = runs.num_sinks + runs.num_tails
    num_columns = runs.num_sink_pages + runs.num_tail_slots
    start, column = run_of(0, runs, G, BLOCK_R)
    page = load_page_id(table_ptr, column, num_columns, PLAN.ptx)
    for i in tl.range(0, count, num_stages=PLAN.num_stages):
        page_ptr = raw.ptr + page.to(tl.int64) * raw.stride_page
        next_start, column = run_of(i + 1, runs, G, BLOCK_R)
        page = load_page_id(table_ptr, column, num_columns, PLAN.ptx)
        offs_t = tl.arange(0, BLOCK_R)
        valid = seen_of_run(i, start + offs_t, runs, masking, sink_seen, body_seen)
        place = (start % G + offs_t) * raw.stride_token
        product = tl.zeros((BLOCK_R, COLUMNS), tl.float32)
        for f in tl.static_range(FIELDS):
            channel, mask = plane_channels(f, LAYOUT, FIELDS, byte)
            keys = tl.load(page_ptr + place[:, None] + channel[None, :], valid[:, None] & mask[None, :], other=0.0)
            product = tl.dot(keys.to(OPERAND), terms[f], product, input_precision="ieee")
        scores = weighed(_sum_of_columns(product) * q_factor[None, :], masking)
        scores = tl.where(valid[:, None], scores, float("-inf"))
        m = tl.maximum(state.m, tl.max(scores, axis=0))
        alpha = tl.exp2(state.m - m)
        weights = tl.exp2(scores - m[None, :])
        mask = valid[None, :] & (offs_d < LAYOUT.v_head_dim)[:, None]
        values = tl.load(page_ptr + raw.stride_half + place[None, :] + offs_d[:, None], mask, other=0.0)
        product = tl.dot(values.to(OPERAND), _terms_of_columns(weights, OPERAND, False), input_precision="ieee")
        state = State(state.acc * alpha[None, :] + _sum_of_columns(product), m, state.l * alpha + tl.sum(weights, axis=0))
        start = next_start
    return state
