"""Pack codes into the bytes of a page and unpack them again: the device twin of `reference.pack`.

`pack_codes` and `load_codes` are what the other kernels use; `pack` and `unpack` are the same as functions of their own. One
program handles one tile [page_size, head_dim]. Grid: (tile,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, reference
from .checks import check_choice, check_tensor, check_tiles
from .device import byte_of_item, field_of_item, item_of_field
from .layout import (
    SUPPORTED_BITS,
    SUPPORTED_HEAD_DIMS,
    SUPPORTED_PAGE_SIZES,
    fields_per_byte,
    largest_power_of_two_divisor,
)
from .reference.codec import Per


@triton.jit
def pack_codes(
    codes_ptr,
    packed_ptr,
    stride_row,
    stride_item,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Pack codes [ROWS, ITEMS] of any integer dtype in memory into the bytes of a page, BLOCK_R rows at a time.

    Rows are the tokens of keys and the channels of values; the items of a row share bytes.
    """
    BYTES: tl.constexpr = ITEMS // FIELDS
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    byte = tl.arange(0, BLOCK_W)[None, :]
    for first in range(0, ROWS, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)[:, None]
        mask = (byte < BYTES) & (row < ROWS)
        packed = tl.zeros((BLOCK_R, BLOCK_W), tl.int32)
        for f in tl.static_range(FIELDS):
            item = item_of_field(byte, f, BLOCK, FIELDS)
            codes = tl.load(codes_ptr + row * stride_row + item * stride_item, mask, other=0).to(tl.int32)
            packed = packed | ((codes & (2**WIDTH - 1)) << (f * WIDTH))
        tl.store(packed_ptr + row * BYTES + byte, packed.to(tl.uint8), mask)
        if BITS == 3:
            HALF: tl.constexpr = BYTES // 2
            mask = (byte < HALF) & (row < ROWS)
            packed = tl.zeros((BLOCK_R, BLOCK_W), tl.int32)
            for f in tl.static_range(2 * FIELDS):
                item = item_of_field(f // FIELDS * HALF + byte, f % FIELDS, BLOCK, FIELDS)
                codes = tl.load(codes_ptr + row * stride_row + item * stride_item, mask, other=0).to(tl.int32)
                packed = packed | ((codes >> 2) << f)
            tl.store(packed_ptr + ROWS * BYTES + row * HALF + byte, packed.to(tl.uint8), mask)


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
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    STRIDE_ROW: tl.constexpr,
    STRIDE_ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    packed_ptr += tile * (ROWS * ITEMS * BITS // 8)
    codes_ptr += tile * ROWS * ITEMS
    pack_codes(codes_ptr, packed_ptr, STRIDE_ROW, STRIDE_ITEM, ROWS, ITEMS, BLOCK, BITS, FIELDS, BLOCK_W, BLOCK_R)


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


def _tile_arguments(page_size: int, head_dim: int, bits: int, per: Per) -> dict[str, int]:
    """Return the constants of both kernels."""
    keys = per == "channel"
    rows, items = (page_size, head_dim) if keys else (head_dim, page_size)
    return {
        "ROWS": rows,
        "ITEMS": items,
        "STRIDE_ROW": head_dim if keys else 1,
        "STRIDE_ITEM": 1 if keys else head_dim,
        "BLOCK": largest_power_of_two_divisor(head_dim) if keys else page_size,
        "BITS": bits,
        "FIELDS": fields_per_byte(bits),
        "BLOCK_R": configs.row_block(triton.next_power_of_2(items)),
    }


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
    if not configs.on_device(codes):
        return reference.pack(codes, bits, per=per)
    *lead, page_size, head_dim = codes.shape
    packed = torch.empty(*lead, page_size * head_dim * bits // 8, dtype=torch.uint8, device=codes.device)
    tiles = codes.numel() // (page_size * head_dim)
    constants = _tile_arguments(page_size, head_dim, bits, per)
    if tiles:
        _kvarn_pack_kernel[(tiles,)](
            packed,
            codes,
            BLOCK_W=triton.next_power_of_2(constants["ITEMS"]) // constants["FIELDS"],
            enable_fp_fusion=False,
            **constants,
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
    if not configs.on_device(packed):
        return reference.unpack(packed, bits, page_size, head_dim, per=per)
    codes = torch.empty(*packed.shape[:-1], page_size, head_dim, dtype=torch.uint8, device=packed.device)
    tiles = codes.numel() // (page_size * head_dim)
    constants = _tile_arguments(page_size, head_dim, bits, per)
    if tiles:
        _kvarn_unpack_kernel[(tiles,)](
            codes, packed, BLOCK_I=triton.next_power_of_2(constants["ITEMS"]), enable_fp_fusion=False, **constants
        )
    return codes
