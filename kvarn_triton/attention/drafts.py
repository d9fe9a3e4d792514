"""Attention of up to 32 query rows of each sequence and kv head, on GPUs with products of warp groups.

They are a few query tokens, as of drafts that are verified, or more than 8 query heads of one token.

A kernel for one architecture attends to all that a tile sees, and leaves partial results (`hopper_drafts`), which a merge
joins. In Triton's interpreter the kernel of other calls stands for it.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import configs, gpu
from ..launch import Rows, as_rows
from ..masking import Mask
from .merge import launch_merge_queries
from .prefill_kernel import launch_prefill_tiles
from .prefill_plan import plan_of
from .schedule import Tiles


def attend_drafts(
    results: tuple[torch.Tensor, torch.Tensor | None],
    q: torch.Tensor,
    new: tuple[Rows, Rows] | None,
    mask: Mask,
    tiles: Tiles,
    partials: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Attend with all tiles, and merge their partial results [num_splits, tokens, num_q_heads, ...]; nothing is checked."""
    (out, lse), (partial, partial_lse), config, layout = results, partials, tiles.config, tiles.cache.layout
    rotation = layout.v_block_size
    if gpu.INTERPRETED:
        own = configs.config_of_form("registers", layout, q.dtype, q.device, config.block_m)
        ends = tiles.cu_seqlens_q
        if ends is None:
            ends = torch.arange(tiles.cache.batch + 1, dtype=torch.int32, device=q.device)
        part = dataclasses.replace(tiles, config=own, cu_seqlens_q=ends)
        launch_prefill_tiles(as_rows(partial[0]), partial_lse, q, new, None, mask, part, partial=True)
        rotation = 1 if new is not None else rotation
    else:
        from .hopper_drafts import launch_hopper_drafts

        flags = new is not None or mask.past_only, False, True
        group = q.shape[1] // tiles.cache.num_kv_heads
        plan = plan_of(layout, (q.dtype, q.dtype, None), group, flags, gpu.uses_ptx(), config)
        launch_hopper_drafts(as_rows(partial[0]), partial_lse, q, new, mask, tiles, plan)
    launch_merge_queries(out, lse, partial, partial_lse, mask.sinks, tiles, rotation)
