"""Attention of a few query rows of each sequence, as of drafts that are verified, on GPUs with products of warp groups.

A kernel for one architecture attends to the quantized pages that all query tokens of a sequence see, which are most of what
there is (`hopper_drafts`). The kernel of all other calls attends to the rest: raw and new tokens, and a page that not all of
them see. It starts when the programs of the first are running, in what room these leave. Each leaves partial results, rotated
as the cache is, and a merge joins them.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import configs, gpu
from ..launch import Rows, as_rows
from ..masking import Mask
from .drafts_interpreted import launch_interpreted_drafts
from .prefill_kernel import launch_prefill_tiles
from .prefill_plan import plan_of
from .schedule import Tiles


def launch_draft_tiles(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    new: tuple[Rows, Rows] | None,
    mask: Mask,
    tiles: Tiles,
) -> None:
    """Attend with all tiles; nothing is checked.

    Partial results [num_splits, tokens, num_q_heads, v_head_dim] are first those of the rest, then those of whole pages.
    """
    cache, config, rest = tiles.cache, tiles.config, tiles.rest_splits
    layout, num_kv_heads = cache.layout, cache.num_kv_heads
    group = q.shape[1] // num_kv_heads
    pages = dataclasses.replace(tiles, num_splits=tiles.num_splits - rest)
    flags = new is not None or mask.past_only, False, True
    plan = plan_of(layout, (q.dtype, q.dtype, None), group, flags, gpu.uses_ptx(), config)
    scale = mask.masking(layout.head_dim).scores.scale
    count = -(-len(tiles.tokens) * group // config.block_m) + min(cache.batch, len(tiles.tokens))
    if gpu.INTERPRETED:
        launch_interpreted_drafts(as_rows(partial[rest]), partial_lse[rest], q, mask, pages, plan, count)
    else:
        from .hopper_drafts import launch_hopper_drafts

        launch_hopper_drafts(as_rows(partial[rest]), partial_lse[rest], q, scale, pages, plan, count)
    own = configs.config_of_form("registers", layout, q.dtype, q.device, config.block_m)
    part = dataclasses.replace(tiles, num_splits=rest, config=own)
    launch_prefill_tiles(as_rows(partial[0]), partial_lse[0], q, new, None, mask, part, rest=True)
