"""Dual scaling of tiles, as a function of its own. One program balances one tile. Grid: (tile,)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, reference
from .checks import FLOATS, check_choice, check_tiles
from .device import apply_balance, balance, tile_rms
from .encoder import DEFAULT, Encoder
from .layout import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES
from .reference.codec import Per


@triton.jit
def _kvarn_variance_normalize_kernel(
    balanced_ptr,  # float32 [tiles, page_size, head_dim]
    token_scale_ptr,  # float32 [tiles, page_size]
    channel_scale_ptr,  # float32 [tiles, head_dim]
    tiles_ptr,  # [tiles, page_size, head_dim]
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EQUIVARIANT: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, G)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    place = index * G * HEAD_DIM + offs_t[:, None] * HEAD_DIM + offs_d[None, :]
    mask = mask_d[None, :] & (offs_t >= 0)[:, None]
    tile = tl.load(tiles_ptr + place, mask, other=0.0).to(tl.float32)
    tile_scale = tl.full((1, 1), 1.0, tl.float32)
    if EQUIVARIANT:
        tile_scale = tile_rms(tile, G * HEAD_DIM)
    tile = tile * tl.div_rn(1.0, tile_scale)
    token_scale, channel_scale = balance(tile, mask_d, HEAD_DIM, PER_CHANNEL, ITERATIONS)
    tl.store(balanced_ptr + place, apply_balance(tile, token_scale, channel_scale), mask)
    if PER_CHANNEL:
        channel_scale = channel_scale * tl.reshape(tile_scale, (1,))
    else:
        token_scale = token_scale * tl.reshape(tile_scale, (1,))
    tl.store(token_scale_ptr + index * G + offs_t, token_scale)
    tl.store(channel_scale_ptr + index * HEAD_DIM + offs_d, channel_scale, mask_d)


def variance_normalize(
    tiles: torch.Tensor, *, per: Per, encoder: Encoder = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance tiles so that all tokens and all channels have about the same standard deviation (paper, algorithm 1).

    Args:
        tiles: float16, bfloat16 or float32 [..., page_size, head_dim], contiguous, of sizes that `PageLayout` supports.
        per: "channel" normalizes tokens first (keys), "token" normalizes channels first (values).
        encoder: number of iterations, and whether tiles are divided by their root mean square first.

    Returns:
        float32 `balanced` like `tiles`, `token_scale` [..., page_size] and `channel_scale` [..., head_dim], with tiles =
        balanced * token_scale * channel_scale: the best state seen, which starts from scales of one.

    Raises:
        ValueError: for a wrong shape, dtype, stride or option.
    """
    check_tiles("tiles", tiles, SUPPORTED_PAGE_SIZES, SUPPORTED_HEAD_DIMS, FLOATS)
    check_choice("per", per, ("channel", "token"))
    if not configs.on_device(tiles):
        return reference.variance_normalize(tiles, per=per, encoder=encoder)
    *lead, page_size, head_dim = tiles.shape
    balanced = torch.empty(tiles.shape, dtype=torch.float32, device=tiles.device)
    token_scale = balanced.new_empty(*lead, page_size)
    channel_scale = balanced.new_empty(*lead, head_dim)
    num_tiles = tiles.numel() // (page_size * head_dim)
    if num_tiles:
        _kvarn_variance_normalize_kernel[(num_tiles,)](
            balanced,
            token_scale,
            channel_scale,
            tiles,
            G=page_size,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            PER_CHANNEL=per == "channel",
            ITERATIONS=encoder.iterations,
            EQUIVARIANT=encoder.equivariant,
            num_warps=configs.tile_warps(page_size, head_dim),
            enable_fp_fusion=False,
        )
    return balanced, token_scale, channel_scale
