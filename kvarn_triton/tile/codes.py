"""From the bytes of a page to codes: how every reader loads them and takes them apart, at every bit width.

A byte has several fields, each a code of `bits` bits. Codes of 3, 5 and 6 bits are kept as two or four bits in fields of so
many, and high bits behind all of those (`high_bits`; `docs/page_format.md`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .high_bits import field_width, load_high, num_high_bits, num_sharers, place_of_high


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

    `high` are high bits as `load_packed` returns them. t and u are 32-bit registers.
    """
    width, more = field_width(bits), num_high_bits(bits)
    up = 2 if factor == 4 else 0
    down = field * width - up
    shift = f"shr.b32 t, {packed}, {down}; " if down else f"mov.b32 t, {packed}; "
    low = "" if bits == 8 else f"and.b32 t, t, {((2**width - 1) << up) * 0x01010101}; "
    if not more:
        return shift + low
    move = width + up - field * more
    place = f"shl.b32 u, {high}, {move}; " if move >= 0 else f"shr.b32 u, {high}, {-move}; "
    return f"{shift}{low}{place}and.b32 u, u, {((2**more - 1) << (width + up)) * 0x01010101}; or.b32 t, t, u; "


@triton.jit
def unsigned_codes(packed, high, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Return the codes int32 of one field of packed bytes: what `unsigned_codes_ptx` is without PTX."""
    WIDTH: tl.constexpr = field_width(BITS)
    MORE: tl.constexpr = num_high_bits(BITS)
    codes = (packed.to(tl.int32) >> (FIELD * WIDTH)) & (2**WIDTH - 1)
    if MORE:
        codes = codes | (((high.to(tl.int32) >> (FIELD * MORE)) & (2**MORE - 1)) << WIDTH)
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

    One or two instructions of 32 bits extract four codes. `high` are their high bits as `load_packed` returns them.
    """
    MORE: tl.constexpr = num_high_bits(BITS)
    if PTX:
        ASM: tl.constexpr = _field_ptx(FIELD, BITS, FACTOR)
        if MORE:
            codes = tl.inline_asm_elementwise(ASM, "=r,r,r", [packed, high], tl.int8, is_pure=True, pack=4)
        else:
            codes = tl.inline_asm_elementwise(ASM, "=r,r", [packed], tl.int8, is_pure=True, pack=4)
    elif BITS == 8:
        codes = packed ^ -128
    else:
        WIDTH: tl.constexpr = field_width(BITS)
        codes = (packed >> (FIELD * WIDTH)) & (2**WIDTH - 1)
        if MORE:
            codes = codes | (((high >> (FIELD * MORE)) & (2**MORE - 1)) << WIDTH)
        codes = codes * FACTOR
    return codes.to(tl.int8).to(OPERAND)


@triton.jit
def load_packed(
    rows_ptr, row, FIRST: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, BYTES: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Load the codes of rows of BYTES bytes (words: `load_words`), padded to BLOCK, as [BLOCK, rows], and their high bits.

    Rows are those from FIRST on, in an order of which ORDER says to which bit of its row each bit of the number of a column
    belongs. There are ROWS rows, others are zero; ALL: none is. High bits are in bytes of the same places, those of field 0 in
    the lowest bits, and any others above those of this byte. Where codes have none the bytes stand for them.
    """
    byte = tl.arange(0, BLOCK)[:, None]
    place = row[None, :] * BYTES + byte
    if BYTES == BLOCK and ALL:
        packed = tl.load(rows_ptr + place)
    else:
        packed = tl.load(rows_ptr + place, (byte < BYTES) & (row < ROWS)[None, :], other=0)
    high = packed
    if num_high_bits(BITS):
        high = load_high(rows_ptr + ROWS * BYTES, row, byte, FIRST, ORDER, ROWS, ALL, BYTES, BITS, PTX)
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
    WIDTH: tl.constexpr = field_width(BITS)
    MORE: tl.constexpr = num_high_bits(BITS)
    field = field_of_item(item, BLOCK, FIELDS)
    byte = byte_of_item(item, BLOCK, FIELDS)
    packed = tl.load(packed_ptr + row * BYTES + byte, mask, other=0).to(tl.int32)
    codes = (packed >> (field * WIDTH)) & (2**WIDTH - 1)
    if MORE:
        start, byte_of_row, sharer = place_of_high(row, byte, ROWS, BYTES, BITS)
        high = tl.load(packed_ptr + ROWS * BYTES + start + byte_of_row, mask, other=0).to(tl.int32)
        codes = codes | (((high >> (field * MORE + sharer * (FIELDS * MORE))) & (2**MORE - 1)) << WIDTH)
    return codes


@triton.constexpr_function
def place_in_word(field, bits):
    """Return the lowest bit of the codes of a field where they are multiplied: those with high bits are put together first."""
    return 0 if num_high_bits(bits) else field * bits


@triton.constexpr_function
def codes_of_words_ptx(field, upper, bits):
    """PTX that leaves the codes of one field of the lower or upper bytes of two words $1, at `place_in_word`, in $0.

    $2 are high bits as `load_words` returns them. u is a 32-bit register.
    """
    width, more = field_width(bits), num_high_bits(bits)
    down = 8 * upper + (width * field if more else 0)
    codes = f"shr.b32 $0, $1, {down}; " if down else "mov.b32 $0, $1; "
    codes += f"and.b32 $0, $0, {((2**width - 1) << place_in_word(field, bits)) * 0x00010001}; "
    if more:
        move = 8 * upper + field * more - width
        place = f"shr.b32 u, $2, {move}; " if move >= 0 else f"shl.b32 u, $2, {-move}; "
        codes += place + f"and.b32 u, u, {((2**more - 1) << width) * 0x00010001}; or.b32 $0, $0, u; "
    return codes


@triton.jit
def load_words(
    codes_ptr, row, FIRST: tl.constexpr, ORDER: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Load rows of WORDS words, padded to BLOCK, as int16 [BLOCK, rows], and their high bits, as `load_packed` does.

    There are ROWS rows; others are zero.
    """
    rows_ptr = codes_ptr.to(tl.pointer_type(tl.int16))
    return load_packed(rows_ptr, row, FIRST, ORDER, ROWS, triton.next_power_of_2(ROWS) == ROWS, WORDS, BLOCK, BITS, PTX)


@triton.jit
def code_in_byte(packed, high, field, BITS: tl.constexpr):
    """Return the codes int32 of a field of bytes int32, where they lie in their byte; `high` as `load_sums` returns them."""
    WIDTH: tl.constexpr = field_width(BITS)
    MORE: tl.constexpr = num_high_bits(BITS)
    code = packed & ((2**WIDTH - 1) << (WIDTH * field))
    if MORE:
        code = code | ((high << ((WIDTH - MORE) * field)) & (((2**MORE - 1) << WIDTH) << (WIDTH * field)))
    return code


@triton.jit
def load_sums(codes_ptr, first, own, place, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Return bytes of rows of codes, int32, and their high bits, if they have such: those of field 0 above the bits of a field.

    Their rows and bytes are sums of three: `first`, scalars; `own`, different in each thread; and `place`, different for each
    number of a thread and known to the compiler, so that a load needs no addition of its own.
    """
    first_ptr = codes_ptr + (first[0] * BYTES + first[1])
    packed = tl.load(first_ptr + (own[0] * BYTES + own[1]) + (place[0] * BYTES + place[1])).to(tl.int32)
    high = packed
    if num_high_bits(BITS):
        COUNT: tl.constexpr = num_sharers(BITS)
        row = first[0] + own[0] + place[0]
        start, byte_of_row, sharer = place_of_high(row, first[1] + own[1] + place[1], ROWS, BYTES, BITS)
        bits = tl.load(codes_ptr + ROWS * BYTES + start + byte_of_row).to(tl.int32)
        high = (bits >> (sharer * (8 // COUNT))) << field_width(BITS)
    return packed, high
