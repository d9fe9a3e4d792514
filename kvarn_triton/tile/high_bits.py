"""The bits of 3-, 5- and 6-bit codes that are not in their fields: where they are, and how they come to be beside those.

Bytes of codes share bytes of them: with 3 bits those of the halves of a row, with 5 and 6 bits those of distant rows, so that a
row of them is as long as one of codes (`docs/page_format.md`).
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
def _join_halves(lower, upper, PTX: tl.constexpr):
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
    """Say whether rows that differ in a bit of their number share high bits."""
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
    """PTX of `_shifted` for 32 bits."""
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
def _join_tiles(tiles, JOINED: tl.constexpr):
    """Return the columns of 2**n tiles, whose numbers differ in n bits: those of `_joined_bits`."""
    for i in tl.static_range(len(JOINED)):
        joined = ()
        for j in tl.static_range(len(tiles) // 2):
            joined = joined + (_join_columns(tiles[2 * j], tiles[2 * j + 1], JOINED[i][0]),)
        tiles = joined
    return tiles[0]


@triton.jit
def _load_distant(
    rows_ptr, byte, FIRST: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, BYTES: tl.constexpr,
    BITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Load the high bits of rows of BYTES bytes, or words, where distant rows share bytes: each of those once.

    Shifted copies are joined. The compiler moves the layout of a product's operand up to its loads, and does so through joins,
    which then only name registers. Through what is computed from the number of a column it does not (Triton 3.6).
    """
    DISTANCE: tl.constexpr = row_distance(ROWS, BITS)
    COUNT: tl.constexpr = num_sharers(BITS)
    BLOCK: tl.constexpr = byte.shape[0]
    OWN: tl.constexpr = _own_bits(ORDER, DISTANCE, BITS)
    JOINED: tl.constexpr = _joined_bits(ORDER, DISTANCE, BITS)
    column = tl.arange(0, 2 ** len(OWN))
    row = tl.zeros_like(column) + FIRST
    for i in tl.static_range(len(OWN)):
        row += ((column >> i) & 1) << OWN[i]
    start, byte_of_row, _ = place_of_high(row[None, :], byte, ROWS, BYTES, BITS)
    place = start + byte_of_row
    if BYTES == BLOCK and ALL:
        shared = tl.load(rows_ptr + place)
    else:
        shared = tl.load(rows_ptr + place, (byte < BYTES) & (row < ROWS)[None, :], other=0)
    tiles = ()
    for tile in tl.static_range(2 ** len(JOINED)):
        tiles = tiles + (_shifted(shared, _sharer(FIRST, tile, JOINED, DISTANCE, BITS) * (8 // COUNT), PTX),)
    return _join_tiles(tiles, JOINED)


@triton.jit
def _load_halves(rows_ptr, row, byte, ROWS: tl.constexpr, BYTES: tl.constexpr, PTX: tl.constexpr):
    """Load the high bits of rows of BYTES bytes, or words, whose halves share bytes."""
    place = row[None, :] * (BYTES // 2) + byte
    mask = (row < ROWS)[None, :]
    lower = tl.load(rows_ptr + place, (byte < BYTES // 2) & mask, other=0)
    upper = tl.load(rows_ptr + place - BYTES // 2, (byte >= BYTES // 2) & (byte < BYTES) & mask, other=0)
    return _join_halves(lower, upper, PTX)


@triton.jit
def load_high(
    rows_ptr, row, byte, FIRST: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, ALL: tl.constexpr, BYTES: tl.constexpr,
    BITS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Load the high bits of bytes of codes, or words of two, as `codes.load_packed` says; rows_ptr is where they begin."""
    if BITS == 3:
        high = _load_halves(rows_ptr, row, byte, ROWS, BYTES, PTX)
    else:
        high = _load_distant(rows_ptr, byte, FIRST, ORDER, ROWS, ALL, BYTES, BITS, PTX)
    return high
