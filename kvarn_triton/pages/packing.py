"""Pack codes into the bytes of a page and unpack them again: the device twin of `reference.pack`.

`store_codes` and `load_codes` are what the other kernels use; `pack` and `unpack` are the same as functions of their own. One
program handles one tile [page_size, head_dim]. Grid: (tile,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import check_choice, check_tensor, check_tiles
from ..launch import aligned, on
from ..layout import (
    SUPPORTED_BITS,
    SUPPORTED_HEAD_DIMS,
    SUPPORTED_PAGE_SIZES,
    fields_per_byte,
    largest_power_of_two_divisor,
)
from ..reference.codec import Per
from ..tile.arithmetic import byte_of_item, field_of_item, item_of_field
from ..tile.blocks import BLOCK_T, join_last, lanes_of, load_blocks, rows_of


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
    P: tl.constexpr = G // BLOCK_T
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


@triton.jit
def _kvarn_pack_kernel(
    packed_ptr,  # uint8 [tiles, page_size * head_dim * bits / 8]
    codes_ptr,  # uint8 [tiles, page_size, head_dim]
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    codes = load_blocks(codes_ptr + tile * G * D, D, G, D, tl.int32)
    store_codes(packed_ptr + tile * (G * D * BITS // 8), codes, G, D, BLOCK, BITS, FIELDS, PER_CHANNEL)


@triton.jit
def _kvarn_unpack_kernel(
    codes_ptr,  # uint8 [tiles, page_size, head_dim]
    packed_ptr,  # uint8 [tiles, page_size * head_dim * bits / 8]
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    STRIDE_ROW: tl.constexpr,
    STRIDE_ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    packed_ptr += tile * (ROWS * ITEMS * BITS // 8)
    codes_ptr += tile * ROWS * ITEMS
    item = tl.arange(0, BLOCK_I)[None, :]
    for first in range(0, ROWS, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)[:, None]
        mask = (item < ITEMS) & (row < ROWS)
        codes = load_codes(packed_ptr, row, item, mask, ROWS, ITEMS, BLOCK, BITS, FIELDS)
        tl.store(codes_ptr + row * STRIDE_ROW + item * STRIDE_ITEM, codes.to(tl.uint8), mask)


def pack(codes: torch.Tensor, bits: int, *, per: Per) -> torch.Tensor:
    """Pack codes into the bytes of a page (`docs/page_format.md`).

    Args:
        codes: uint8 [..., page_size, head_dim], contiguous, each below 2**bits; higher bits are cut off.
        bits: 2, 3, 4 or 8.
        per: "channel" packs channels of one token into bytes (keys), "token" tokens of one channel (values).

    Returns:
        uint8 [..., page_size * head_dim * bits / 8].

    Raises:
        ValueError: for a wrong shape, dtype, stride or option.
    """
    check_tiles("codes", codes, SUPPORTED_PAGE_SIZES, SUPPORTED_HEAD_DIMS, torch.uint8)
    check_choice("bits", bits, SUPPORTED_BITS)
    check_choice("per", per, ("channel", "token"))
    if not gpu.on_device(codes):
        return reference.pack(codes, bits, per=per)
    *lead, page_size, head_dim = codes.shape
    codes = aligned(codes)
    packed = torch.empty(*lead, page_size * head_dim * bits // 8, dtype=torch.uint8, device=codes.device)
    tiles = codes.numel() // (page_size * head_dim)
    if tiles:
        on(packed, _kvarn_pack_kernel)[(tiles,)](
            packed,
            codes,
            G=page_size,
            D=head_dim,
            BLOCK=largest_power_of_two_divisor(head_dim) if per == "channel" else page_size,
            BITS=bits,
            FIELDS=fields_per_byte(bits),
            PER_CHANNEL=per == "channel",
            num_warps=configs.block_warps(head_dim, codes.device),
            enable_fp_fusion=False,
        )
    return packed


def unpack(packed: torch.Tensor, bits: int, page_size: int, head_dim: int, *, per: Per) -> torch.Tensor:
    """Return the codes that `pack` packed.

    Args:
        packed: uint8 [..., page_size * head_dim * bits / 8], contiguous.
        bits: 2, 3, 4 or 8.
        page_size: 64 or 128.
        head_dim: channels; see `PageLayout`.
        per: as given to `pack`.

    Returns:
        uint8 [..., page_size, head_dim].

    Raises:
        ValueError: for a wrong shape, dtype, stride or option.
    """
    check_choice("bits", bits, SUPPORTED_BITS)
    check_choice("page_size", page_size, SUPPORTED_PAGE_SIZES)
    check_choice("head_dim", head_dim, SUPPORTED_HEAD_DIMS)
    check_choice("per", per, ("channel", "token"))
    dims = packed.dim() if isinstance(packed, torch.Tensor) else 1
    shape = [None] * (dims - 1) + [page_size * head_dim * bits // 8]
    check_tensor("packed", packed, shape, torch.uint8, contiguous_dims=dims)
    if not gpu.on_device(packed):
        return reference.unpack(packed, bits, page_size, head_dim, per=per)
    packed = aligned(packed)
    codes = torch.empty(*packed.shape[:-1], page_size, head_dim, dtype=torch.uint8, device=packed.device)
    tiles = codes.numel() // (page_size * head_dim)
    keys = per == "channel"
    rows, items = (page_size, head_dim) if keys else (head_dim, page_size)
    block_i = triton.next_power_of_2(items)
    if tiles:
        on(codes, _kvarn_unpack_kernel)[(tiles,)](
            codes,
            packed,
            ROWS=rows,
            ITEMS=items,
            STRIDE_ROW=head_dim if keys else 1,
            STRIDE_ITEM=1 if keys else head_dim,
            BLOCK=largest_power_of_two_divisor(head_dim) if keys else page_size,
            BITS=bits,
            FIELDS=fields_per_byte(bits),
            BLOCK_I=block_i,
            BLOCK_R=configs.row_block(block_i),
            enable_fp_fusion=False,
        )
    return codes
