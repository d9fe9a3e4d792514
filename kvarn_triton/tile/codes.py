"""From the bytes of a page to codes: how every reader loads them and takes them apart, at every bit width.

A byte has several fields, each a code of `bits` bits. 3-bit codes are kept as two bits in fields of two, and a plane of high
bits behind all of them (`docs/page_format.md`).
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _load_bytes(rows_ptr, row, BYTES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ALL_ROWS: tl.constexpr):
    """Load BYTES bytes of each row, padded to BLOCK, as int8 [BLOCK, rows]; rows from ROWS on are zero."""
    byte = tl.arange(0, BLOCK)[:, None]
    place = row[None, :] * BYTES + byte
    if BYTES == BLOCK and ALL_ROWS:
        packed = tl.load(rows_ptr + place)
    else:
        packed = tl.load(rows_ptr + place, (byte < BYTES) & (row < ROWS)[None, :], other=0)
    return packed


@triton.jit
def _load_high(rows_ptr, row, BYTES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PTX: tl.constexpr):
    """Load the high bits of 3-bit codes for rows of BYTES bytes as int8 [BLOCK, rows]: bit f belongs to field f."""
    byte = tl.arange(0, BLOCK)[:, None]
    place = row[None, :] * (BYTES // 2) + byte
    mask = (row < ROWS)[None, :]
    lower = tl.load(rows_ptr + place, (byte < BYTES // 2) & mask, other=0)
    upper = tl.load(rows_ptr + place - BYTES // 2, (byte >= BYTES // 2) & (byte < BYTES) & mask, other=0)
    return high_bits(lower, upper, PTX)


@triton.jit
def load_packed(
    codes_ptr, row, ROWS: tl.constexpr, ALL: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Load the codes of rows of BYTES bytes, padded to BLOCK, as int8 [BLOCK, rows], and the high bits of 3-bit codes.

    There are ROWS rows, others are zero; ALL: none is. Without high bits the bytes stand for them.
    """
    packed = _load_bytes(codes_ptr, row, BYTES, BLOCK, ROWS, ALL)
    high = packed
    if BITS == 3:
        high = _load_high(codes_ptr + ROWS * BYTES, row, BYTES, BLOCK, ROWS, PTX)
    return packed, high


@triton.jit
def load_codes(
    packed_ptr,
    row,
    item,
    mask,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Return the codes int32 of rows and items (broadcast against each other) from packed bytes."""
    BYTES: tl.constexpr = ITEMS // FIELDS
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    field = field_of_item(item, BLOCK, FIELDS)
    byte = byte_of_item(item, BLOCK, FIELDS)
    packed = tl.load(packed_ptr + row * BYTES + byte, mask, other=0).to(tl.int32)
    codes = (packed >> (field * WIDTH)) & (2**WIDTH - 1)
    if BITS == 3:
        HALF: tl.constexpr = BYTES // 2
        high = tl.load(packed_ptr + ROWS * BYTES + row * HALF + byte % HALF, mask, other=0).to(tl.int32)
        codes = codes | (((high >> (field + byte // HALF * FIELDS)) & 1) << 2)
    return codes


@triton.constexpr_function
def place_in_word(field, bits):
    """Return the lowest bit of the codes of a field where they are multiplied: 3-bit codes are put together first."""
    return 0 if bits == 3 else field * bits


@triton.constexpr_function
def codes_of_words_ptx(field, upper, bits):
    """PTX that leaves the codes of one field of the lower or upper bytes of two words $1, at `place_in_word`, in $0.

    $2 are the high bits of 3-bit codes (`high_bits`). u is a 32-bit register.
    """
    down = 8 * upper + (2 * field if bits == 3 else 0)
    width = 2 if bits == 3 else bits
    codes = f"shr.b32 $0, $1, {down}; " if down else "mov.b32 $0, $1; "
    codes += f"and.b32 $0, $0, {((2**width - 1) << place_in_word(field, bits)) * 0x00010001}; "
    if bits == 3:
        move = 8 * upper + field - 2
        place = f"shr.b32 u, $2, {move}; " if move >= 0 else f"shl.b32 u, $2, {-move}; "
        codes += place + f"and.b32 u, u, {0x00040004}; or.b32 $0, $0, u; "
    return codes


@triton.jit
def load_words(
    codes_ptr, row, WORDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Load rows of WORDS words, padded to BLOCK, as int16 [BLOCK, rows], and the high bits of 3-bit codes.

    There are ROWS rows; others are zero.
    """
    rows_ptr = codes_ptr.to(tl.pointer_type(tl.int16))
    word = tl.arange(0, BLOCK)[:, None]
    place = row[None, :] * WORDS + word
    mask = (row < ROWS)[None, :]
    if WORDS == BLOCK and triton.next_power_of_2(ROWS) == ROWS:
        words = tl.load(rows_ptr + place)
    else:
        words = tl.load(rows_ptr + place, (word < WORDS) & mask, other=0)
    high = words
    if BITS == 3:
        place = row[None, :] * (WORDS // 2) + word
        high_ptr = rows_ptr + ROWS * WORDS
        lower = tl.load(high_ptr + place, (word < WORDS // 2) & mask, other=0)
        upper = tl.load(high_ptr + place - WORDS // 2, (word >= WORDS // 2) & (word < WORDS) & mask, other=0)
        high = high_bits(lower, upper, PTX)
    return words, high


@triton.jit
def code_in_byte(packed, high, field, BITS: tl.constexpr):
    """Return the codes int32 of a field of bytes int32, where they lie in their byte; `high` as `load_sums` returns them."""
    if BITS == 3:
        code = (packed & (3 << (2 * field))) | ((high << field) & (4 << (2 * field)))
    else:
        code = packed & ((2**BITS - 1) << (BITS * field))
    return code


@triton.jit
def load_sums(codes_ptr, first, own, place, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Return bytes of rows of codes, int32, and the high bits of their 3-bit codes, that of field f at bit f + 2.

    Their rows and bytes are sums of three: `first`, scalars; `own`, different in each thread; and `place`, different for each
    number of a thread and known to the compiler, so that a load needs no addition of its own.
    """
    first_ptr = codes_ptr + (first[0] * BYTES + first[1])
    packed = tl.load(first_ptr + (own[0] * BYTES + own[1]) + (place[0] * BYTES + place[1])).to(tl.int32)
    high = packed
    if BITS == 3:
        HALF: tl.constexpr = BYTES // 2
        row = first[0] + own[0] + place[0]
        byte = first[1] + own[1] + place[1]
        bits = tl.load(codes_ptr + ROWS * BYTES + row * HALF + byte % HALF).to(tl.int32)
        high = (bits >> (byte // HALF * 4)) << 2
    return packed, high
