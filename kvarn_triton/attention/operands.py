"""What the tensor cores multiply: codes as 8-bit integers, numbers in two terms, and orders that keep numbers in their threads.

A product has query heads as rows and tokens or channels as columns. Each head takes two rows: a number x of a query or of a
softmax weight is split in two terms, high and low, and the two results of a head meet in one thread. With 8-bit integers
(`OPERAND` int8) x is rounded to an integer of 16 bits and the terms are its bytes; codes are such integers as they are. With
other operands, raw pages or queries of float32, the low term is what rounding to the operand left over.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile.arithmetic import log2

DIGITS_MAX = tl.constexpr(32000.0)
"""Largest magnitude of a number that is split in two bytes; the bytes hold -32640 to 32639."""
RUN = tl.constexpr(8 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 4)
"""Consecutive numbers of the summed axis that a thread holds of an 8-bit operand of stacked terms. Triton 3.6 takes twice as
many as the tensor cores do, whenever an operand was joined of parts. Only speed depends on it."""
LEAST_PLANE = tl.constexpr(16)
"""Least length of the axis that a product of 16-bit numbers sums over."""
_MAGIC = tl.constexpr(12582912.0 + 128.0)
"""1.5 * 2**23 puts an integer into the low bits of a float32; 128 rounds when the low byte is cut off."""


@triton.jit
def spread_columns(column):
    """Return which item to compute in a column of a product, so that `in_order` leaves each number in its thread.

    A thread of a product holds pairs of neighbouring columns, 8 apart; a thread of an operand holds RUN neighbours.
    """
    return column // (4 * RUN) * (4 * RUN) + column % 8 // 2 * RUN + column // 8 % (RUN // 2) * 2 + column % 2


@triton.jit
def in_order(product):
    """Reorder columns that were computed in the order of `spread_columns`."""
    ROWS: tl.constexpr = product.shape[0]
    COLS: tl.constexpr = product.shape[1]
    runs = tl.reshape(product, (ROWS, COLS // (4 * RUN), RUN // 2, 4, 2))
    return tl.reshape(tl.permute(runs, (0, 1, 3, 2, 4)), (ROWS, COLS))


@triton.jit
def join_planes(planes):
    """Put a tuple of 2**n tiles [rows, columns] next to each other."""
    for _ in tl.static_range(log2(len(planes))):
        joined = ()
        for j in tl.static_range(len(planes) // 2):
            a = planes[2 * j]
            pair = tl.permute(tl.join(a, planes[2 * j + 1]), (0, 2, 1))
            joined = joined + (tl.reshape(pair, (a.shape[0], 2 * a.shape[1])),)
        planes = joined
    return planes[0]


@triton.jit
def split_planes(tile, COUNT: tl.constexpr):
    """Cut a tile [rows, columns] into a tuple of COUNT tiles, a power of two."""
    planes = (tile,)
    for _ in tl.static_range(log2(COUNT)):
        halves = ()
        for j in tl.static_range(len(planes)):
            pair = tl.reshape(planes[j], (planes[j].shape[0], 2, planes[j].shape[1] // 2))
            a, b = tl.split(tl.permute(pair, (0, 2, 1)))
            halves = halves + (a, b)
        planes = halves
    return planes


@triton.constexpr_function
def sum_dtype(operand):
    """Return the dtype in which products of an operand are summed."""
    return tl.int32 if operand == tl.int8 else tl.float32


@triton.jit
def two_terms(x, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Split float32 numbers [rows, columns] in two terms: [2 * rows, columns], the high terms first."""
    if sum_dtype(OPERAND) == tl.int32:
        bits = (x + _MAGIC).to(tl.int32, bitcast=True)
        if PTX:
            high, low = tl.inline_asm_elementwise(
                "{ .reg .b32 t, u; prmt.b32 t, $2, $3, 0x5140; prmt.b32 u, $4, $5, 0x5140; "
                "prmt.b32 $0, t, u, 0x7632; prmt.b32 t, t, u, 0x5410; xor.b32 $1, t, 0x80808080; }",
                "=r,=r,r,r,r,r", [bits], (tl.int8, tl.int8), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            high = (bits >> 8).to(tl.int8)
            low = (bits ^ 128).to(tl.int8)
    else:
        high = x.to(OPERAND)
        low = (x - high.to(tl.float32)).to(OPERAND)
    return tl.reshape(tl.permute(tl.join(high, low), (2, 0, 1)), (2 * x.shape[0], x.shape[1]))


@triton.jit
def sum_of_terms(product):
    """Return the float32 results [rows, columns] of a product whose left operand was split in two terms."""
    ROWS: tl.constexpr = product.shape[0] // 2
    high, low = tl.split(tl.permute(tl.reshape(product, (2, ROWS, product.shape[1])), (1, 2, 0)))
    if product.dtype == tl.int32:
        total = (high * 256 + low).to(tl.float32)
    else:
        total = high + low
    return total


@triton.constexpr_function
def field_factor(field, bits):
    """Return what the codes of a field of keys are multiplied by: those in the middle of four bits may stay there.

    It costs two of the 16 bits of a query. Softmax weights have none to spare: values are shifted down.
    """
    return 4 if bits in (2, 3) and field % 2 else 1


@triton.constexpr_function
def code_offset(bits):
    """Return what is subtracted from codes in `field_codes`, so that they are signed bytes."""
    return 128 if bits == 8 else 0


@triton.constexpr_function
def unsigned_codes_ptx(field, bits, factor, packed, high):
    """PTX that leaves the codes of one field of four bytes `packed`, times `factor`, in t, unsigned.

    `high` are the high bits of 3-bit codes (`high_bits`). t and u are 32-bit registers.
    """
    width = 2 if bits == 3 else bits
    up = 2 if factor == 4 else 0
    down = field * width - up
    shift = f"shr.b32 t, {packed}, {down}; " if down else f"mov.b32 t, {packed}; "
    low = "" if bits == 8 else f"and.b32 t, t, {((2**width - 1) << up) * 0x01010101}; "
    if bits != 3:
        return shift + low
    move = 2 + up - field
    place = f"shl.b32 u, {high}, {move}; " if move >= 0 else f"shr.b32 u, {high}, {-move}; "
    return f"{shift}{low}{place}and.b32 u, u, {(4 << up) * 0x01010101}; or.b32 t, t, u; "


@triton.jit
def unsigned_codes(packed, high, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Return the codes int32 of one field of packed bytes: what `unsigned_codes_ptx` is without PTX."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    codes = (packed.to(tl.int32) >> (FIELD * WIDTH)) & (2**WIDTH - 1)
    if BITS == 3:
        codes = codes | (((high.to(tl.int32) >> FIELD) & 1) << 2)
    return codes


@triton.constexpr_function
def _field_ptx(field, bits, factor):
    """PTX of `field_codes` for four bytes at once."""
    if bits == 8:
        return "xor.b32 $0, $1, 0x80808080;"
    return "{ .reg .b32 t, u; " + unsigned_codes_ptx(field, bits, factor, "$1", "$2") + "mov.b32 $0, t; }"


@triton.jit
def field_codes(
    packed, high, FIELD: tl.constexpr, BITS: tl.constexpr, FACTOR: tl.constexpr, OPERAND: tl.constexpr, PTX: tl.constexpr
):
    """Return the codes of one field of packed bytes, less `code_offset`, times FACTOR (`field_factor`).

    One or two instructions of 32 bits extract four codes. `high` are the high bits of 3-bit codes (`high_bits`), of which
    bit FIELD belongs to this field; anything else otherwise.
    """
    if PTX:
        ASM: tl.constexpr = _field_ptx(FIELD, BITS, FACTOR)
        if BITS == 3:
            codes = tl.inline_asm_elementwise(ASM, "=r,r,r", [packed, high], tl.int8, is_pure=True, pack=4)
        else:
            codes = tl.inline_asm_elementwise(ASM, "=r,r", [packed], tl.int8, is_pure=True, pack=4)
    elif BITS == 8:
        codes = packed ^ -128
    else:
        WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
        codes = (packed >> (FIELD * WIDTH)) & (2**WIDTH - 1)
        if BITS == 3:
            codes = codes | (((high >> FIELD) & 1) << 2)
        codes = codes * FACTOR
    return codes.to(tl.int8).to(OPERAND)


@triton.jit
def high_bits(lower, upper, PTX: tl.constexpr):
    """Return the low four bits of all bytes of `lower`, or the upper four of `upper`, int8 or int16; one of them is zero."""
    WIDTH: tl.constexpr = lower.dtype.primitive_bitwidth
    MASK: tl.constexpr = 0x0F0F & (2**WIDTH - 1)
    if PTX:
        bits = tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; and.b32 t, $1, 0x0f0f0f0f; shr.b32 u, $2, 4; and.b32 u, u, 0x0f0f0f0f; or.b32 $0, t, u; }",
            "=r,r,r", [lower, upper], lower.dtype, is_pure=True, pack=32 // WIDTH,
        )  # fmt: skip
    else:
        bits = ((lower & MASK) | ((upper >> 4) & MASK)).to(lower.dtype)
    return bits


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
