"""From the codes of a tile in registers to the bytes of a page (`docs/page_format.md`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import TILE_TOKENS, join_last, lanes_of, rows_of
from .codes import item_of_field
from .high_bits import field_width, num_high_bits, num_sharers, row_distance


@triton.constexpr_function
def item_of_bit(byte, field, items, block, fields, halves):
    """Return the item whose code a field of a byte holds: of a row of codes, or of one of which the halves share bytes."""
    if halves:
        byte, field = byte + field // fields * (items // fields // 2), field % fields
    width = block // fields
    return byte // width * block + field * width + byte % width


@triton.constexpr_function
def _lanes_match(part, first, num_bytes, count, field, items, block, fields, halves):
    """Say how a part of `count` items feeds a field of up to `count` bytes from byte `first` on.

    Returns "none", "same" if each byte takes the item of its own place, or "some".
    """
    last = max(min(count, num_bytes - first), 0)
    wanted = [item_of_bit(first + i, field, items, block, fields, halves) for i in range(last)]
    pairs = [(i, item % count) for i, item in enumerate(wanted) if item // count == part]
    if not pairs:
        return "none"
    return "same" if pairs == [(i, i) for i in range(last)] else "some"


@triton.jit
def _pack_bytes(
    parts,
    FIRST: tl.constexpr,
    NUM_BYTES: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PLANE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Return bytes FIRST and following of rows of codes, as many as a part has items; rows have NUM_BYTES of them.

    `parts` are int32 blocks that lie next to each other along AXIS, the axis of the items that share bytes. PLANE 1 packs high
    bits.
    """
    COUNT: tl.constexpr = parts[0].shape[AXIS]
    WIDTH: tl.constexpr = field_width(BITS)
    MORE: tl.constexpr = num_high_bits(BITS)
    HALVES: tl.constexpr = PLANE if BITS == 3 else 0
    place = lanes_of(parts[0]) if AXIS == 1 else rows_of(parts[0])
    packed = tl.zeros_like(parts[0])
    for field in tl.static_range(2 * FIELDS if HALVES else FIELDS):
        for k in tl.static_range(len(parts)):
            if _lanes_match(k, FIRST, NUM_BYTES, COUNT, field, ITEMS, BLOCK, FIELDS, HALVES) != "none":
                codes = parts[k]
                if _lanes_match(k, FIRST, NUM_BYTES, COUNT, field, ITEMS, BLOCK, FIELDS, HALVES) == "some":
                    byte = FIRST + place
                    if HALVES:
                        byte += field // FIELDS * (ITEMS // FIELDS // 2)
                    item = item_of_field(byte, field % FIELDS, BLOCK, FIELDS)
                    codes = tl.where(item // COUNT == k, tl.gather(codes, item % COUNT, axis=AXIS), 0)
                if PLANE:
                    packed = packed | ((codes >> WIDTH) << (field * MORE))
                else:
                    packed = packed | ((codes & (2**WIDTH - 1)) << (field * WIDTH))
    return packed


@triton.jit
def _row_of_shared(row, SHARER: tl.constexpr, DISTANCE: tl.constexpr, SHARERS: tl.constexpr):
    """Return the rows of codes whose high bits are in rows of shared bytes."""
    return row // DISTANCE * (DISTANCE * SHARERS) + SHARER * DISTANCE + row % DISTANCE


@triton.constexpr_function
def _rows_match(part, first, num_rows, count, sharer, distance, sharers):
    """Say how a part of `count` rows feeds a sharer of up to `count` rows of shared bytes, as `_lanes_match` does."""
    last = max(min(count, num_rows - first), 0)
    rows = range(first, first + last)
    wanted = [row // distance * (distance * sharers) + sharer * distance + row % distance for row in rows]
    pairs = [(i, row % count) for i, row in enumerate(wanted) if row // count == part]
    if not pairs:
        return "none"
    return "same" if pairs == [(i, i) for i in range(last)] else "some"


@triton.jit
def _share_bytes(packed, ROWS: tl.constexpr, PER_ROW: tl.constexpr, BITS: tl.constexpr, AXIS: tl.constexpr):
    """Put high bits of distant rows together in bytes.

    `packed` are blocks of bytes, PER_ROW of them for each block of rows, and those lie next to each other along AXIS. There are
    ROWS rows, of which every sharer has a part.
    """
    COUNT: tl.constexpr = packed[0].shape[AXIS]
    DISTANCE: tl.constexpr = row_distance(ROWS, BITS)
    SHARERS: tl.constexpr = num_sharers(BITS)
    place = lanes_of(packed[0]) if AXIS == 1 else rows_of(packed[0])
    shared = ()
    for first in tl.static_range(0, ROWS // SHARERS, COUNT):
        for i in tl.static_range(PER_ROW):
            joined = tl.zeros_like(packed[0])
            for sharer in tl.static_range(SHARERS):
                for k in tl.static_range(len(packed) // PER_ROW):
                    if _rows_match(k, first, ROWS // SHARERS, COUNT, sharer, DISTANCE, SHARERS) != "none":
                        part = packed[k * PER_ROW + i]
                        if _rows_match(k, first, ROWS // SHARERS, COUNT, sharer, DISTANCE, SHARERS) == "some":
                            row = _row_of_shared(first + place, sharer, DISTANCE, SHARERS)
                            part = tl.where(row // COUNT == k, tl.gather(part, row % COUNT, AXIS), 0)
                        joined |= part << (sharer * (8 // SHARERS))
            shared = shared + (joined,)
    return shared


@triton.jit
def _store_plane(
    plane_ptr,
    codes,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PLANE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Pack and store codes, or their high bits (PLANE 1), whose bytes run along AXIS of the blocks."""
    P: tl.constexpr = G // TILE_TOKENS
    Q: tl.constexpr = D // codes[0].shape[1]
    ROWS: tl.constexpr = P if AXIS == 1 else Q
    COLUMNS: tl.constexpr = Q if AXIS == 1 else P
    ITEMS: tl.constexpr = D if AXIS == 1 else G
    COUNT: tl.constexpr = codes[0].shape[AXIS]
    HALVES: tl.constexpr = PLANE if BITS == 3 else 0
    NUM_BYTES: tl.constexpr = ITEMS // FIELDS // (HALVES + 1)
    PER_ROW: tl.constexpr = triton.next_power_of_2(triton.cdiv(NUM_BYTES, COUNT))
    packed = ()
    for row in tl.static_range(ROWS):
        parts = ()
        for column in tl.static_range(COLUMNS):
            parts = parts + (codes[row * Q + column if AXIS == 1 else column * Q + row],)
        for i in tl.static_range(PER_ROW):
            packed = packed + (_pack_bytes(parts, i * COUNT, NUM_BYTES, ITEMS, BLOCK, BITS, FIELDS, PLANE, AXIS).to(tl.uint8),)
    NUM_ROWS: tl.constexpr = (G if AXIS == 1 else D) // (num_sharers(BITS) if PLANE > HALVES else 1)
    if PLANE > HALVES:
        packed = _share_bytes(packed, G if AXIS == 1 else D, PER_ROW, BITS, 1 - AXIS)
    joined = join_last(packed)
    block = tl.arange(0, joined.shape[2])[None, None, :]
    i = tl.arange(0, joined.shape[0])[:, None, None]
    j = tl.arange(0, joined.shape[1])[None, :, None]
    byte = block % PER_ROW * COUNT + (j if AXIS == 1 else i)
    row = block // PER_ROW * joined.shape[1 - AXIS] + (i if AXIS == 1 else j)
    tl.store(plane_ptr + row * NUM_BYTES + byte, joined, (byte < NUM_BYTES) & (row < NUM_ROWS))


@triton.jit
def store_codes(
    packed_ptr,
    codes,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """Pack the codes of a tile, int32 blocks, into the bytes of a page.

    Rows are the tokens of keys and the channels of values; the items of a row, BLOCK of which are interleaved, share bytes.
    """
    AXIS: tl.constexpr = 1 if PER_CHANNEL else 0
    _store_plane(packed_ptr, codes, G, D, BLOCK, BITS, FIELDS, 0, AXIS)
    if num_high_bits(BITS):
        _store_plane(packed_ptr + G * D // FIELDS, codes, G, D, BLOCK, BITS, FIELDS, 1, AXIS)
