"""Attention of many query rows to a quantized page that is dequantized through shared memory.

With many rows it pays to dequantize each page once and to multiply plain 16-bit numbers: `code * scale + zero` of keys and
values, rounded once, times the norm of a channel for values. The norm of a key token multiplies its scores. Query rows are
rows of the products; tokens are columns of the product with keys, channels of the product with values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile.arithmetic import split_halves
from ..tile.codes import load_packed, unsigned_codes, unsigned_codes_ptx
from ..tile.high_bits import order_of
from .operands import join_planes, join_rows
from .query import plane_channels
from .softmax import State, advance

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
    """Return `code * scale + zero` of one field of packed bytes, in OPERAND. `high` as in `codes.field_codes`."""
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
def dequantized_scores(record_ptr, q, q_factor, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the scores [rows, page_size] of the tokens of a record, PLAN.block_t of them to a product."""
    BITS: tl.constexpr = LAYOUT.k_bits
    FIELDS: tl.constexpr = PLAN.k_fields
    OPERAND: tl.constexpr = PLAN.operand
    PTX: tl.constexpr = PLAN.ptx
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_T: tl.constexpr = PLAN.block_t
    BYTES: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_K: tl.constexpr = q.shape[1] // FIELDS
    codes_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    byte = tl.arange(0, BLOCK_K)
    products = ()
    for part in tl.static_range(G // BLOCK_T):
        row = part * BLOCK_T + tl.arange(0, BLOCK_T)
        packed, high = load_packed(codes_ptr, row, part * BLOCK_T, order_of(BLOCK_T), G, True, BYTES, BLOCK_K, BITS, PTX)
        planes = ()
        for f in tl.static_range(FIELDS):
            channel, mask = plane_channels(f, LAYOUT, FIELDS, byte)
            scale, zero = split_halves(tl.load(params_ptr + channel, mask, other=0))
            scale = scale.to(OPERAND)[:, None]
            planes = planes + (expand_field(packed, high, scale, zero.to(OPERAND)[:, None], f, BITS, OPERAND, PTX),)
        products = products + (tl.dot(q, join_rows(planes), input_precision="ieee"),)
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    norm = tl.load((record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16)) + tl.arange(0, G)).to(tl.float32)
    return join_planes(products) * (norm * (gain * q_factor))[None, :]


@triton.jit
def _page_values(record_ptr, value_factor, CHANNELS: tl.constexpr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the values [page_size, CHANNELS] of a record, whose norms are multiplied by value_factor."""
    BITS: tl.constexpr = LAYOUT.v_bits
    FIELDS: tl.constexpr = PLAN.v_fields
    OPERAND: tl.constexpr = PLAN.operand
    PTX: tl.constexpr = PLAN.ptx
    D: tl.constexpr = LAYOUT.v_head_dim
    BYTES: tl.constexpr = LAYOUT.page_size // FIELDS
    codes_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    channel = tl.arange(0, CHANNELS)
    norm = tl.load((record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16)) + channel, channel < D, other=0.0)
    norm = (norm.to(tl.float32) * value_factor).to(OPERAND)[None, :]
    packed, high = load_packed(codes_ptr, channel, 0, order_of(CHANNELS), D, CHANNELS == D, BYTES, BYTES, BITS, PTX)
    planes = ()
    for f in tl.static_range(FIELDS):
        scale, zero = split_halves(tl.load(params_ptr + f * BYTES + tl.arange(0, BYTES)))
        scale = scale.to(OPERAND)[:, None]
        values = expand_field(packed, high, scale, zero.to(OPERAND)[:, None], f, BITS, OPERAND, PTX)
        planes = planes + (values * norm,)
    return join_rows(planes)


@triton.jit
def add_dequantized_values(state, unit, scores, record_ptr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the state advanced by the values of a record with these scores, and the new unit of its sums.

    Sums are kept in units of the largest gain of values so far, so that 16-bit values neither overflow nor vanish.
    """
    weights, alpha, m, l_sum = advance(state, scores, False)
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1)
    new_unit = tl.maximum(unit, gain)
    acc = state.acc * (alpha * (unit / new_unit))[:, None]
    values = _page_values(record_ptr, gain / new_unit, acc.shape[1], LAYOUT, PLAN)
    acc = tl.dot(weights.to(PLAN.operand), values, acc, input_precision="ieee")
    return State(acc, m, l_sum), new_unit
