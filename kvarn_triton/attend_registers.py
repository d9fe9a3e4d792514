"""Attention of 16 or 32 query rows to a quantized page that is dequantized in registers: what few rows of prefill attention do.

Query rows are rows of the products, as in `attend_many`. Their right operands, keys and values, never leave the threads that
hold their bytes: a product of so few rows takes its operands from registers, loaded in the order that it wants. Nothing is
stored to shared memory, and nothing waits at a barrier where a program is one warp.

A code stays where it lies in its byte: the bits of `code << place` are the float16 number code * 2**(place - 24), below the
normal range, which one multiply-add turns into `(code * scale + zero) * unit`, rounded once. The unit keeps the multiplied
scales within float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import load_bytes, load_high
from .device import split_halves
from .operands import join_planes, split_planes, unsigned_codes, unsigned_codes_ptx
from .query import plane_channels

RUN = tl.constexpr(4)
"""Consecutive numbers of the summed axis that a thread holds of an operand that was made of bytes."""
LEAST_SCORE = tl.constexpr(-1e30)
"""Stands for the largest score of a row that has seen no token."""


@triton.constexpr_function
def _place(field, bits):
    """Return the lowest bit of the codes of a field where they are multiplied: 3-bit codes are put together first."""
    return 0 if bits == 3 else field * bits


@triton.constexpr_function
def _unit(bits):
    """Return what dequantized numbers are multiplied by: `scale * (2**bits - 1)` is at most 2, and 2**16 too large."""
    return 2.0 ** (bits - 10)


@triton.constexpr_function
def _params_ptx(field, bits):
    """PTX of `_field_params` for two channels or tokens. The factor is too large for float16, hence two of them."""
    exponent = 24 - _place(field, bits) + bits - 10
    first, second, unit = (((15 + e) << 10) * 0x00010001 for e in (exponent // 2, exponent - exponent // 2, bits - 10))
    return (
        "{ .reg .b32 m; prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632; "
        f"mov.b32 m, {first}; mul.rn.f16x2 $0, $0, m; mov.b32 m, {second}; mul.rn.f16x2 $0, $0, m; "
        f"mov.b32 m, {unit}; mul.rn.f16x2 $1, $1, m; }}"
    )


@triton.jit
def _field_params(words, FIELD: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Return float16 factors and offsets of the codes of a field, of words of a scale and a zero."""
    if PTX:
        scale, zero = tl.inline_asm_elementwise(
            _params_ptx(FIELD, BITS), "=&r,=&r,r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        scale, zero = split_halves(words)
        scale = (scale.to(tl.float32) * (_unit(BITS) * 2.0 ** (24 - _place(FIELD, BITS)))).to(tl.float16)
        zero = (zero.to(tl.float32) * _unit(BITS)).to(tl.float16)
    return scale, zero


@triton.constexpr_function
def _numbers_ptx(field, bits):
    """PTX of `_numbers` for four bytes: `$4, $5` scales, `$6, $7` zeros."""
    if bits == 3:
        codes = unsigned_codes_ptx(field, bits, 1, "$2", "$3") + "prmt.b32 $0, t, 0, 0x4140; prmt.b32 $1, t, 0, 0x4342; "
    else:
        mask = ((2**bits - 1) << _place(field, bits)) * 0x00010001
        codes = "prmt.b32 t, $2, 0, 0x4140; prmt.b32 u, $2, 0, 0x4342; "
        codes += f"and.b32 $0, t, {mask}; and.b32 $1, u, {mask}; "
    return "{ .reg .b32 t, u; " + codes + "fma.rn.f16x2 $0, $0, $4, $6; fma.rn.f16x2 $1, $1, $5, $7; }"


@triton.jit
def _numbers(packed, high, scale, zero, FIELD: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Return the float16 numbers [bytes, columns] of one field of packed bytes. `high` as in `operands.field_codes`."""
    scale = tl.broadcast_to(scale[:, None], packed.shape)
    zero = tl.broadcast_to(zero[:, None], packed.shape)
    if PTX:
        numbers = tl.inline_asm_elementwise(
            _numbers_ptx(FIELD, BITS), "=&r,=&r,r,r,r,r,r,r", [packed, high, scale, zero], tl.float16, is_pure=True, pack=4
        )  # fmt: skip
    else:
        codes = unsigned_codes(packed, high, FIELD, BITS).to(tl.float32) * 2.0 ** (_place(FIELD, BITS) - 24)
        numbers = (codes * scale.to(tl.float32) + zero.to(tl.float32)).to(tl.float16)
    return numbers


@triton.jit
def _spread(column):
    """Return which token to compute in a column of a product, so that `_in_order` leaves each number in its thread."""
    return column // 16 * 16 + column % 8 // 2 * RUN + column // 8 % 2 * 2 + column % 2


@triton.jit
def _in_order(product):
    """Reorder columns that were computed in the order of `_spread`."""
    ROWS: tl.constexpr = product.shape[0]
    COLS: tl.constexpr = product.shape[1]
    runs = tl.reshape(product, (ROWS, COLS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(runs, (0, 1, 3, 2, 4)), (ROWS, COLS))


@triton.jit
def register_scores(
    record_ptr,
    planes,
    q_factor,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FIELDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the scores [rows, page_size] of the tokens of a record, BLOCK_T of them to a product."""
    BITS: tl.constexpr = LAYOUT.k_bits
    G: tl.constexpr = LAYOUT.page_size
    BYTES: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_K: tl.constexpr = planes[0].shape[1]
    codes_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    factor = q_factor * gain * (1.0 / _unit(BITS))
    byte = tl.arange(0, BLOCK_K)
    scales = ()
    zeros = ()
    for f in tl.static_range(FIELDS):
        channel, mask = plane_channels(f, LAYOUT, FIELDS, byte)
        if BYTES == BLOCK_K:
            words = tl.load(params_ptr + channel)
        else:
            words = tl.load(params_ptr + channel, mask, other=0)
        scale, zero = _field_params(words, f, BITS, PTX)
        scales = scales + (scale,)
        zeros = zeros + (zero,)
    scores = ()
    for part in tl.static_range(G // BLOCK_T):
        token = part * BLOCK_T + tl.arange(0, BLOCK_T)
        row = part * BLOCK_T + _spread(tl.arange(0, BLOCK_T))
        packed = load_bytes(codes_ptr, row, BYTES, BLOCK_K, G, True)
        high = packed
        if BITS == 3:
            high = load_high(codes_ptr + G * BYTES, row, BYTES, BLOCK_K, G, PTX)
        product = tl.zeros((planes[0].shape[0], BLOCK_T), tl.float32)
        for f in tl.static_range(FIELDS):
            numbers = _numbers(packed, high, scales[f], zeros[f], f, BITS, PTX)
            product = tl.dot(planes[f], numbers, product, input_precision="ieee")
        norm = tl.load(norm_ptr + token).to(tl.float32) * factor
        scores = scores + (_in_order(product) * norm[None, :],)
    return join_planes(scores)


@triton.jit
def add_register_values(
    acc,
    m_i,
    l_i,
    scores,
    record_ptr,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FIELDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return (acc, m_i, l_i) advanced by the values of a record with these scores, BLOCK_D channels to a product."""
    BITS: tl.constexpr = LAYOUT.v_bits
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.v_head_dim
    BYTES: tl.constexpr = G // FIELDS
    CHANNELS: tl.constexpr = acc.shape[1]
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1)
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    origin = tl.maximum(m_new, LEAST_SCORE)
    alpha = tl.exp2(m_i - origin)
    weights = tl.exp2(scores - origin[:, None])
    l_i = l_i * alpha + tl.sum(weights, axis=1)
    operands = split_planes(weights.to(tl.float16), FIELDS)
    acc = acc * alpha[:, None]

    codes_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.int8))
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    scales = ()
    zeros = ()
    for f in tl.static_range(FIELDS):
        scale, zero = _field_params(tl.load(params_ptr + f * BYTES + tl.arange(0, BYTES)), f, BITS, PTX)
        scales = scales + (scale,)
        zeros = zeros + (zero,)
    products = ()
    for part in tl.static_range(CHANNELS // BLOCK_D):
        row = part * BLOCK_D + tl.arange(0, BLOCK_D)
        packed = load_bytes(codes_ptr, row, BYTES, BYTES, D, CHANNELS == D)
        high = packed
        if BITS == 3:
            high = load_high(codes_ptr + D * BYTES, row, BYTES, BYTES, D, PTX)
        product = tl.zeros((acc.shape[0], BLOCK_D), tl.float32)
        for f in tl.static_range(FIELDS):
            numbers = _numbers(packed, high, scales[f], zeros[f], f, BITS, PTX)
            product = tl.dot(operands[f], numbers, product, input_precision="ieee")
        products = products + (product,)
    channel = tl.arange(0, CHANNELS)
    norm = tl.load((record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16)) + channel, channel < D, other=0.0)
    norm = norm.to(tl.float32) * (gain * (1.0 / _unit(BITS)))
    return acc + join_planes(products) * norm[None, :], m_new, l_i
