"""Pack codes into the words of a page and unpack them again: the device twin of `reference.pack`.

`pack_codes` and `load_codes` are what the other kernels use; `pack` and `unpack` are the same as functions of their own. One
program handles one tile [page_size, head_dim]. Grid: (tile,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, reference
from .checks import check_choice, check_tensor, check_tiles
from .device import channel_of_field, field_of_channel, word_of_channel
from .layout import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES, fields_per_word, largest_power_of_two_divisor
from .reference.codec import Per


@triton.jit
def pack_codes(
    codes_ptr,
    packed_ptr,
    stride_codes,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Pack codes [G, HEAD_DIM] of any integer dtype in memory into the bytes of a page, BLOCK_R tokens at a time."""
    WORDS: tl.constexpr = HEAD_DIM // FIELDS
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    for first in range(0, G, BLOCK_R):
        offs_t = first + tl.arange(0, BLOCK_R)[:, None]
        mask = (offs_w < WORDS) & (offs_t >= 0)
        words = tl.zeros((BLOCK_R, BLOCK_W), tl.int32)
        top = tl.zeros((BLOCK_R, BLOCK_W), tl.int32)
        for f in tl.static_range(FIELDS):
            channel = channel_of_field(offs_w, f, BLOCK, FIELDS)
            codes = tl.load(codes_ptr + offs_t * stride_codes + channel, mask, other=0).to(tl.int32)
            words = words | ((codes & (2**WIDTH - 1)) << (f * WIDTH))
            if BITS == 3:
                top = top | ((codes >> 2) << f)
        place = offs_t * WORDS + offs_w if PER_CHANNEL else offs_w * G + offs_t
        tl.store(packed_ptr.to(tl.pointer_type(tl.uint16)) + place, words.to(tl.uint16), mask)
        if BITS == 3:
            tl.store(packed_ptr + 2 * G * WORDS + place, top.to(tl.uint8), mask)


@triton.jit
def load_codes(
    packed_ptr,
    offs_t,
    channel,
    mask,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    """Return the codes int32 of tokens `offs_t` and channels `channel` (broadcast against each other) from packed bytes."""
    WORDS: tl.constexpr = HEAD_DIM // FIELDS
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    word = word_of_channel(channel, BLOCK, FIELDS)
    field = field_of_channel(channel, BLOCK, FIELDS)
    place = offs_t * WORDS + word if PER_CHANNEL else word * G + offs_t
    words = tl.load(packed_ptr.to(tl.pointer_type(tl.uint16)) + place, mask, other=0).to(tl.int32)
    codes = (words >> (field * WIDTH)) & (2**WIDTH - 1)
    if BITS == 3:
        top = tl.load(packed_ptr + 2 * G * WORDS + place, mask, other=0).to(tl.int32)
        codes = codes | (((top >> field) & 1) << 2)
    return codes


@triton.jit
def _kvarn_pack_kernel(
    packed_ptr,  # uint8 [tiles, page_size * head_dim * bits / 8]
    codes_ptr,  # uint8 [tiles, page_size, head_dim]
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    packed_ptr += tile * (G * HEAD_DIM * BITS // 8)
    codes_ptr += tile * G * HEAD_DIM
    pack_codes(codes_ptr, packed_ptr, HEAD_DIM, G, HEAD_DIM, BLOCK, BITS, FIELDS, PER_CHANNEL, BLOCK_W, BLOCK_R)


@triton.jit
def _kvarn_unpack_kernel(
    codes_ptr,  # uint8 [tiles, page_size, head_dim]
    packed_ptr,  # uint8 [tiles, page_size * head_dim * bits / 8]
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    packed_ptr += tile * (G * HEAD_DIM * BITS // 8)
    codes_ptr += tile * G * HEAD_DIM
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for first in range(0, G, BLOCK_R):
        offs_t = first + tl.arange(0, BLOCK_R)[:, None]
        mask = (offs_d < HEAD_DIM) & (offs_t >= 0)
        codes = load_codes(packed_ptr, offs_t, offs_d, mask, G, HEAD_DIM, BLOCK, BITS, FIELDS, PER_CHANNEL)
        tl.store(codes_ptr + offs_t * HEAD_DIM + offs_d, codes.to(tl.uint8), mask)


def pack(codes: torch.Tensor, bits: int, *, per: Per) -> torch.Tensor:
    """Pack codes into the bytes of a page (`docs/page_format.md`).

    Args:
        codes: uint8 [..., page_size, head_dim], contiguous, each below 2**bits; higher bits are cut off.
        bits: 2, 3, 4 or 8.
        per: "channel" stores the words of one token together (keys), "token" the words of one channel group (values).

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
    fields = fields_per_word(bits)
    block_d = triton.next_power_of_2(head_dim)
    if tiles:
        _kvarn_pack_kernel[(tiles,)](
            packed,
            codes,
            G=page_size,
            HEAD_DIM=head_dim,
            BLOCK=largest_power_of_two_divisor(head_dim),
            BITS=bits,
            FIELDS=fields,
            PER_CHANNEL=per == "channel",
            BLOCK_W=block_d // fields,
            BLOCK_R=configs.row_block(block_d),
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
    if not configs.on_device(packed):
        return reference.unpack(packed, bits, page_size, head_dim, per=per)
    codes = torch.empty(*packed.shape[:-1], page_size, head_dim, dtype=torch.uint8, device=packed.device)
    tiles = codes.numel() // (page_size * head_dim)
    block_d = triton.next_power_of_2(head_dim)
    if tiles:
        _kvarn_unpack_kernel[(tiles,)](
            codes,
            packed,
            G=page_size,
            HEAD_DIM=head_dim,
            BLOCK=largest_power_of_two_divisor(head_dim),
            BITS=bits,
            FIELDS=fields_per_word(bits),
            PER_CHANNEL=per == "channel",
            BLOCK_D=block_d,
            BLOCK_R=configs.row_block(block_d),
            enable_fp_fusion=False,
        )
    return codes
