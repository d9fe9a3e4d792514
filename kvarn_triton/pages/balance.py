"""Dual scaling of tiles, as a function of its own. One program balances one tile. Grid: (tile,)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, check_choice, check_tiles
from ..encoder import DEFAULT, Encoder
from ..launch import aligned, on
from ..layout import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES
from ..reference.codec import Per
from ..tile.blocks import TILE_TOKENS, block_channels, channel_of, load_blocks, store_blocks, token_of
from ..tile.encode import apply_balance, balance, scale_blocks, tile_size


@triton.jit
def _kvarn_variance_normalize_kernel(
    balanced_ptr,  # float32 [tiles, page_size, head_dim]
    token_scale_ptr,  # float32 [tiles, page_size]
    channel_scale_ptr,  # float32 [tiles, head_dim]
    tiles_ptr,  # [tiles, page_size, head_dim]
    G: tl.constexpr,
    D: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EQUIVARIANT: tl.constexpr,
):
    P: tl.constexpr = G // TILE_TOKENS
    BLOCK_C: tl.constexpr = block_channels(D)
    Q: tl.constexpr = D // BLOCK_C
    index = tl.program_id(0).to(tl.int64)
    blocks = load_blocks(tiles_ptr + index * G * D, D, G, D)
    if EQUIVARIANT:
        tile_scale = tile_size(blocks, P, Q, G, D)
        blocks = scale_blocks(blocks, tl.div_rn(1.0, tile_scale))
    token_scale, channel_scale = balance(blocks, G, D, PER_CHANNEL or EQUIVARIANT, ITERATIONS)
    store_blocks(balanced_ptr + index * G * D, apply_balance(blocks, token_scale, channel_scale, P, Q), G, D)
    if EQUIVARIANT:
        if PER_CHANNEL:
            channel_scale = channel_scale * tile_scale
        else:
            token_scale = token_scale * tile_scale
    tl.store(token_scale_ptr + index * G + token_of(token_scale, P), token_scale)
    channel = channel_of(channel_scale, BLOCK_C)
    tl.store(channel_scale_ptr + index * D + channel, channel_scale, channel < D)


def variance_normalize(
    tiles: torch.Tensor, *, per: Per, encoder: Encoder = DEFAULT
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balance tiles so that all tokens and all channels have about the same standard deviation.

    Args:
        tiles: float16, bfloat16 or float32 [..., page_size, head_dim], contiguous, of sizes that `PageLayout` supports.
        per: "channel" (keys) or "token" (values): the axis with one quantization scale and zero each. Tokens are normalized
            first, but for values without `encoder.equivariant`, whose channels are.
        encoder: its `iterations` and `equivariant`.

    Returns:
        float32 `balanced` like `tiles`, `token_scale` [..., page_size] and `channel_scale` [..., head_dim], with tiles =
        balanced * token_scale * channel_scale: the best state seen, which starts from scales of one.

    Raises:
        ValueError: for a wrong shape, dtype, stride or option.
    """
    check_tiles("tiles", tiles, SUPPORTED_PAGE_SIZES, SUPPORTED_HEAD_DIMS, FLOATS)
    check_choice("per", per, ("channel", "token"))
    if not gpu.on_device(tiles):
        return reference.variance_normalize(tiles, per=per, encoder=encoder, arithmetic=reference.ANY_ORDER)
    *lead, page_size, head_dim = tiles.shape
    balanced = torch.empty(tiles.shape, dtype=torch.float32, device=tiles.device)
    token_scale = balanced.new_empty(*lead, page_size)
    channel_scale = balanced.new_empty(*lead, head_dim)
    tiles = aligned(tiles)
    num_tiles = tiles.numel() // (page_size * head_dim)
    if num_tiles:
        on(balanced, _kvarn_variance_normalize_kernel)[(num_tiles,)](
            balanced,
            token_scale,
            channel_scale,
            tiles,
            G=page_size,
            D=head_dim,
            PER_CHANNEL=per == "channel",
            ITERATIONS=encoder.iterations,
            EQUIVARIANT=encoder.equivariant,
            num_warps=configs.block_warps(head_dim, tiles.device),
            enable_fp_fusion=False,
        )
    return balanced, token_scale, channel_scale
