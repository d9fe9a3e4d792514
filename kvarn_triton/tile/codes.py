"""From the bytes of a page to codes: how every reader loads them and takes them apart, at every bit width.

A byte has several fields, each a code of `bits` bits. Codes of 3, 5 and 6 bits are kept as two or four bits in fields of so
many, and high bits behind all of those (`docs/page_format.md`). Bytes of codes share bytes of them: with 3 bits those of the
halves of a row, with 5 and 6 bits those of distant rows, so that a row of them is as long as one of codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import layout

num_high_bits = triton.constexpr_function(layout.num_high_bits)


@triton.constexpr_function
def field_width(bits):
    """Return how many bits of a code are in its field."""
    return bits - num_high_bits(bits)


@triton.constexpr_function
def num_sharers(bits):
    """Return how many bytes of codes have their high bits in one byte."""
    return field_width(bits) // num_high_bits(bits)


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


@triton.constexpr_function
def row_distance(rows, bits):
    """Return how many rows apart those are whose codes of 5 or 6 bits share bytes of high bits: within blocks of 2**n rows."""
    return (rows & -rows) // num_sharers(bits)


@triton.jit
def place_of_high(row, byte, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Return the first byte of a row of high bits, which byte of it has those of a byte of codes, and which sharer that is."""
    if BITS == 3:
        HALF: tl.constexpr = BYTES // 2
        start = row * HALF
        byte_of_row = byte % HALF
        sharer = byte // HALF
    else:
        DISTANCE: tl.constexpr = row_distance(ROWS, BITS)
        COUNT: tl.constexpr = num_sharers(BITS)
        start = (row // (COUNT * DISTANCE) * DISTANCE + row % DISTANCE) * BYTES
        byte_of_row = byte
        sharer = row // DISTANCE % COUNT
    return start, byte_of_row, sharer


@triton.constexpr_function
def order_of(columns):
    """Return for each bit of the number of a column the bit of its row, if rows are in order."""
    return tuple(range(columns.bit_length() - 1))


@triton.constexpr_function
def _is_shared(bit, distance, bits):
    return distance <= 1 << bit < distance * num_sharers(bits)


@triton.constexpr_function
def _own_bits(order, distance, bits):
    """Return the bits of rows that columns differ in, less those by which sharers of high bits differ."""
    return tuple(bit for bit in order if not _is_shared(bit, distance, bits))


@triton.constexpr_function
def _joined_bits(order, distance, bits):
    """Return at which bits of their number columns differ that share high bits, and how far apart as sharers."""
    return tuple((i, (1 << bit) // distance) for i, bit in enumerate(order) if _is_shared(bit, distance, bits))


@triton.constexpr_function
def _sharer(first, tile, joined, distance, bits):
    """Return which sharers a tile has; bit i of its number belongs to joined[i]."""
    return first // distance % num_sharers(bits) + sum(apart for i, (_, apart) in enumerate(joined) if tile >> i & 1)


@triton.constexpr_function
def _shift_ptx(count):
    return f"shr.b32 $0, $1, {count};"


@triton.jit
def _shifted(x, COUNT: tl.constexpr, PTX: tl.constexpr):
    """Return int8 or int16 numbers shifted down; what comes in above is any."""
    if COUNT == 0:
        y = x
    elif PTX:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        y = tl.inline_asm_elementwise(_shift_ptx(COUNT), "=r,r", [x], x.dtype, is_pure=True, pack=PACK)
    else:
        y = (x >> COUNT).to(x.dtype)
    return y


@triton.jit
def _join_columns(a, b, BIT: tl.constexpr):
    """Return columns of which those of `a` have a zero at a bit of their number, and those of `b` a one."""
    ROWS: tl.constexpr = a.shape[0]
    COLS: tl.constexpr = a.shape[1]
    a = tl.reshape(a, (ROWS, COLS >> BIT, 1 << BIT))
    b = tl.reshape(b, (ROWS, COLS >> BIT, 1 << BIT))
    return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (ROWS, 2 * COLS))


@triton.jit
def _load_distant(
    rows_ptr, byte, FIRST: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, BYTES: tl.constexpr,
    BITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Load the high bits of rows of BYTES bytes, or words, where distant rows share bytes: each of those once.

    Shifted copies are joined. A compiler that moves the layout of an operand of a product up to its loads does so through joins,
    which then are but names of registers; through the number of a column it does not (Triton 3.6).
    """
    DISTANCE: tl.constexpr = row_distance(ROWS, BITS)
    COUNT: tl.constexpr = num_sharers(BITS)
    OWN: tl.constexpr = _own_bits(ORDER, DISTANCE, BITS)
    JOINED: tl.constexpr = _joined_bits(ORDER, DISTANCE, BITS)
    column = tl.arange(0, 2 ** len(OWN))
    row = tl.zeros_like(column) + FIRST
    for i in tl.static_range(len(OWN)):
        row += ((column >> i) & 1) << OWN[i]
    start, byte_of_row, _ = place_of_high(row[None, :], byte, ROWS, BYTES, BITS)
    place = start + byte_of_row
    if BYTES == byte.shape[0] and ALL:
        shared = tl.load(rows_ptr + place)
    else:
        shared = tl.load(rows_ptr + place, (byte < BYTES) & (row < ROWS)[None, :], other=0)
    tiles = ()
    for tile in tl.static_range(2 ** len(JOINED)):
        tiles = tiles + (_shifted(shared, _sharer(FIRST, tile, JOINED, DISTANCE, BITS) * (8 // COUNT), PTX),)
    for i in tl.static_range(len(JOINED)):
        joined = ()
        for j in tl.static_range(len(tiles) // 2):
            joined = joined + (_join_columns(tiles[2 * j], tiles[2 * j + 1], JOINED[i][0]),)
        tiles = joined
    return tiles[0]


@triton.jit
def _load_halves(rows_ptr, row, byte, ROWS: tl.constexpr, BYTES: tl.constexpr, PTX: tl.constexpr):
    """Load the high bits of rows of BYTES bytes, or words, whose halves share bytes."""
    place = row[None, :] * (BYTES // 2) + byte
    mask = (row < ROWS)[None, :]
    lower = tl.load(rows_ptr + place, (byte < BYTES // 2) & mask, other=0)
    upper = tl.load(rows_ptr + place - BYTES // 2, (byte >= BYTES // 2) & (byte < BYTES) & mask, other=0)
    return high_bits(lower, upper, PTX)


@triton.jit
def _load_rows(
    rows_ptr, row, FIRST: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, BYTES: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Load rows of BYTES bytes, or words, padded to BLOCK, as [BLOCK, rows], and the high bits of their codes."""
    byte = tl.arange(0, BLOCK)[:, None]
    place = row[None, :] * BYTES + byte
    if BYTES == BLOCK and ALL:
        packed = tl.load(rows_ptr + place)
    else:
        packed = tl.load(rows_ptr + place, (byte < BYTES) & (row < ROWS)[None, :], other=0)
    high = packed
    if BITS == 3:
        high = _load_halves(rows_ptr + ROWS * BYTES, row, byte, ROWS, BYTES, PTX)
    elif num_high_bits(BITS):
        high = _load_distant(rows_ptr + ROWS * BYTES, byte, FIRST, ORDER, ROWS, ALL, BYTES, BITS, PTX)
    return packed, high


@triton.jit
def load_packed(
    codes_ptr, row, FIRST: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, BYTES: tl.constexpr,
    BLOCK: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Load the codes of rows of BYTES bytes, padded to BLOCK, as int8 [BLOCK, rows], and their high bits, if they have such.

    Rows are those from FIRST on, in an order of which ORDER says to which bit of its row each bit of the number of a column
    belongs. There are ROWS rows, others are zero; ALL: none is. High bits are in bytes of the same places, those of field 0 in the lowest
    bits, and those of other codes above them. Without high bits the bytes of codes stand for them.
    """
    return _load_rows(codes_ptr, row, FIRST, ORDER, ROWS, ALL, BYTES, BLOCK, BITS, PTX)


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
    return _load_rows(rows_ptr, row, FIRST, ORDER, ROWS, triton.next_power_of_2(ROWS) == ROWS, WORDS, BLOCK, BITS, PTX)


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
