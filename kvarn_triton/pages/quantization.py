"""Round tiles to codes and back, as functions of their own. One program handles one tile. Grid: (tile,)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, check_choice, check_tensor, check_tiles
from ..encoder import DEFAULT, Encoder
from ..launch import aligned, on
from ..layout import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES
from ..reference.codec import Per
from ..tile.blocks import TILE_TOKENS, block_channels, channel_of, load_blocks, store_blocks, token_of
from ..tile.fit import quantize_blocks


@triton.jit
def _kvarn_quantize_kernel(
    codes_ptr,  # uint8 [tiles, page_size, head_dim]
    scale_ptr,  # float32 [tiles, head_dim] or [tiles, page_size]
    zero_ptr,  # like scale
    tiles_ptr,  # [tiles, page_size, head_dim]
    G: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ENCODER: tl.constexpr,
):
    P: tl.constexpr = G // TILE_TOKENS
    BLOCK_C: tl.constexpr = block_channels(D)
    index = tl.program_id(0).to(tl.int64)
    blocks = load_blocks(tiles_ptr + index * G * D, D, G, D)
    codes, scale, zero, _ = quantize_blocks(blocks, P, D // BLOCK_C, BITS, PER_CHANNEL, ENCODER)
    store_blocks(codes_ptr + index * G * D, codes, G, D)
    if PER_CHANNEL:
        channel = channel_of(scale, BLOCK_C)
        tl.store(scale_ptr + index * D + channel, scale, channel < D)
        tl.store(zero_ptr + index * D + channel, zero, channel < D)
    else:
        token = token_of(scale, P)
        tl.store(scale_ptr + index * G + token, scale)
        tl.store(zero_ptr + index * G + token, zero)


@triton.jit
def _kvarn_dequantize_kernel(
    out_ptr,  # float32 [tiles, page_size, head_dim]
    codes_ptr,  # uint8 [tiles, page_size, head_dim]
    scale_ptr,  # [tiles, head_dim] or [tiles, page_size]
    zero_ptr,  # like scale
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    offs_t = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_d < HEAD_DIM) & (offs_t >= 0)
    place = index * G * HEAD_DIM + offs_t * HEAD_DIM + offs_d
    row = index * HEAD_DIM + offs_d if PER_CHANNEL else index * G + offs_t
    mask_row = offs_d < HEAD_DIM if PER_CHANNEL else offs_t >= 0
    scale = tl.load(scale_ptr + row, mask_row, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + row, mask_row, other=0.0).to(tl.float32)
    codes = tl.load(codes_ptr + place, mask, other=0).to(tl.float32)
    tl.store(out_ptr + place, codes * scale + zero, mask)


def quantize(
    tiles: torch.Tensor, bits: int, *, per: Per, encoder: Encoder = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round tiles to `2**bits` evenly spaced values per channel or token.

    They start as those between the least and the largest number of the row (paper, section 3), or in the middle of that range
    if `encoder.clip`. Rows of the bits that `Encoder` names become, `encoder.fits` times, those of least squared error for the
    codes of the ones before; with `encoder.norm` "projection" their scale is stretched once more in the end.

    Args:
        tiles: float16, bfloat16 or float32 [..., page_size, head_dim], contiguous, of sizes that `PageLayout` supports.
        bits: 2, 3, 4, 5, 6 or 8.
        per: the axis with one scale and zero each: "channel" (keys) or "token" (values).
        encoder: its `clip`, `fits` and whether its `norm` is "projection".

    Returns:
        `codes` uint8 like `tiles`, `scale` and `zero` float32 [..., head_dim] or [..., page_size]. Ties round to even; a
        constant row has code 0 and its value as zero.

    Raises:
        ValueError: for a wrong shape, dtype, stride or option.
    """
    check_tiles("tiles", tiles, SUPPORTED_PAGE_SIZES, SUPPORTED_HEAD_DIMS, FLOATS)
    check_choice("bits", bits, SUPPORTED_BITS)
    check_choice("per", per, ("channel", "token"))
    if not gpu.on_device(tiles):
        return reference.quantize(tiles, bits, per=per, encoder=encoder, arithmetic=reference.ANY_ORDER)
    *lead, page_size, head_dim = tiles.shape
    codes = torch.empty(tiles.shape, dtype=torch.uint8, device=tiles.device)
    scale = torch.empty(*lead, head_dim if per == "channel" else page_size, dtype=torch.float32, device=tiles.device)
    zero = torch.empty_like(scale)
    tiles = aligned(tiles)
    num_tiles = tiles.numel() // (page_size * head_dim)
    if num_tiles:
        on(codes, _kvarn_quantize_kernel)[(num_tiles,)](
            codes,
            scale,
            zero,
            tiles,
            G=page_size,
            D=head_dim,
            BITS=bits,
            PER_CHANNEL=per == "channel",
            ENCODER=encoder,
            num_warps=configs.block_warps(head_dim, tiles.device),
            enable_fp_fusion=False,
        )
    return codes, scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, per: Per) -> torch.Tensor:
    """Return `codes * scale + zero`, the inverse of `quantize` up to rounding.

    Args:
        codes: uint8 [..., page_size, head_dim], contiguous.
        scale: float16 or float32 [..., head_dim] (per "channel") or [..., page_size] (per "token"), contiguous.
        zero: like `scale`.
        per: as given to `quantize`.

    Returns:
        float32 like `codes`.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option.
    """
    check_tiles("codes", codes, SUPPORTED_PAGE_SIZES, SUPPORTED_HEAD_DIMS, torch.uint8)
    check_choice("per", per, ("channel", "token"))
    *lead, page_size, head_dim = codes.shape
    shape = [*lead, head_dim if per == "channel" else page_size]
    half_or_float = (torch.float16, torch.float32)
    check_tensor("scale", scale, shape, half_or_float, device=codes.device, contiguous_dims=len(shape))
    check_tensor("zero", zero, shape, scale.dtype, device=codes.device, contiguous_dims=len(shape))
    if not gpu.on_device(codes):
        return reference.dequantize(codes, scale, zero, per=per)
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    codes, scale, zero = aligned(codes), aligned(scale), aligned(zero)
    num_tiles = codes.numel() // (page_size * head_dim)
    block_d = triton.next_power_of_2(head_dim)
    block_r = min(configs.row_block(block_d), page_size)
    if num_tiles:
        on(out, _kvarn_dequantize_kernel)[(num_tiles, page_size // block_r)](
            out,
            codes,
            scale,
            zero,
            G=page_size,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            PER_CHANNEL=per == "channel",
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
