"""Pack codes into the bytes of a page and unpack them again: the device twin of `reference.pack`.

One program handles one tile [page_size, head_dim]. Grid: (tile,).
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
from ..tile.blocks import load_blocks
from ..tile.codes import load_codes
from ..tile.packing import store_codes


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
        bits: 2, 3, 4, 5, 6 or 8.
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
        bits: 2, 3, 4, 5, 6 or 8.
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
