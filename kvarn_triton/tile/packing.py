"""From the codes of a tile in registers to the bytes of a page (`docs/page_format.md`)."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import TILE_TOKENS, join_last, lanes_of, rows_of
from .codes import item_of_field


@triton.constexpr_function
def item_of_bit(byte, field, items, block, fields, plane):
    """Return the item whose code a field of a byte holds: of a row of codes, or of one of high bits (plane 1)."""
    if plane:
        byte, field = byte + field // fields * (items // fields // 2), field % fields
    width = block // fields
    return byte // width * block + field * width + byte % width


@triton.constexpr_function
def _lanes_match(part, first, num_bytes, count, field, items, block, fields, plane):
    """Say how a part of `count` items feeds a field of up to `count` bytes from byte `first` on.

    Returns "none", "same" if each byte takes the item of its own place, or "some".
    """
    last = max(min(count, num_bytes - first), 0)
    wanted = [item_of_bit(first + i, field, items, block, fields, plane) for i in range(last)]
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

    `parts` are int32 blocks that lie next to each other along AXIS, the axis of the items that share bytes. PLANE 1 packs the
    high bits of 3-bit codes.
    """
    COUNT: tl.constexpr = parts[0].shape[AXIS]
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    place = lanes_of(parts[0]) if AXIS == 1 else rows_of(parts[0])
    packed = tl.zeros_like(parts[0])
    for field in tl.static_range(2 * FIELDS if PLANE else FIELDS):
        for k in tl.static_range(len(parts)):
            if _lanes_match(k, FIRST, NUM_BYTES, COUNT, field, ITEMS, BLOCK, FIELDS, PLANE) != "none":
                codes = parts[k]
                if _lanes_match(k, FIRST, NUM_BYTES, COUNT, field, ITEMS, BLOCK, FIELDS, PLANE) == "some":
                    byte = FIRST + place
                    if PLANE:
                        byte += field // FIELDS * (ITEMS // FIELDS // 2)
                    item = item_of_field(byte, field % FIELDS, BLOCK, FIELDS)
                    codes = tl.where(item // COUNT == k, tl.gather(codes, item % COUNT, axis=AXIS), 0)
                if PLANE:
                    packed = packed | ((codes >> 2) << field)
                else:
                    packed = packed | ((codes & (2**WIDTH - 1)) << (field * WIDTH))
    return packed


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
    """Pack and store codes, or the high bits of 3-bit ones (PLANE 1), whose bytes run along AXIS of the blocks."""
    P: tl.constexpr = G // TILE_TOKENS
    Q: tl.constexpr = D // codes[0].shape[1]
    ROWS: tl.constexpr = P if AXIS == 1 else Q
    COLUMNS: tl.constexpr = Q if AXIS == 1 else P
    ITEMS: tl.constexpr = D if AXIS == 1 else G
    COUNT: tl.constexpr = codes[0].shape[AXIS]
    NUM_BYTES: tl.constexpr = ITEMS // FIELDS // (PLANE + 1)
    PER_ROW: tl.constexpr = triton.next_power_of_2(triton.cdiv(NUM_BYTES, COUNT))
    packed = ()
    for row in tl.static_range(ROWS):
        parts = ()
        for column in tl.static_range(COLUMNS):
            parts = parts + (codes[row * Q + column if AXIS == 1 else column * Q + row],)
        for i in tl.static_range(PER_ROW):
            packed = packed + (_pack_bytes(parts, i * COUNT, NUM_BYTES, ITEMS, BLOCK, BITS, FIELDS, PLANE, AXIS).to(tl.uint8),)
    joined = join_last(packed)
    block = tl.arange(0, joined.shape[2])[None, None, :]
    i = tl.arange(0, joined.shape[0])[:, None, None]
    j = tl.arange(0, joined.shape[1])[None, :, None]
    byte = block % PER_ROW * COUNT + (j if AXIS == 1 else i)
    row = block // PER_ROW * joined.shape[1 - AXIS] + (i if AXIS == 1 else j)
    tl.store(plane_ptr + row * NUM_BYTES + byte, joined, (byte < NUM_BYTES) & (row < ROWS * joined.shape[1 - AXIS]))


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
    if BITS == 3:
        _store_plane(packed_ptr + G * D // FIELDS, codes, G, D, BLOCK, BITS, FIELDS, 1, AXIS)
