"""Prefill attention over plain tokens: all that a tile of query rows sees, in 16 bits, neither quantized nor rotated.

Launches before it dequantize each page once, into scratch memory (`pages.expand`), and undo the rotation of raw tokens, in
memory of the call (`pages.plain_raw`). New tokens are plain as they come. Then a launch lists what each program attends to
(`records`), and a kernel for one architecture, which knows nothing of sequences, attends (`hopper`).

Scratch memory may hold a part of the pages only: then there are rounds, each of which goes on from the states of the one
before. New and raw tokens are in the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import configs, gpu
from ..launch import Rows, as_rows
from ..masking import Mask, Masking
from ..pages.expand import launch_expand_pages
from . import workspace
from .plain_interpreted import launch_interpreted
from .prefill_plan import plan_of
from .records import RECORD, launch_records
from .schedule import Tiles


class PlainWork(NamedTuple):
    """What a launch attends to, and where its results go: arguments of its kernel."""

    out: Rows
    lse: torch.Tensor | None
    q: Rows
    new: tuple[Rows, Rows] | None
    scratch: torch.Tensor  # [slots, 2, num_kv_heads, page_size, channels]
    raw: torch.Tensor | None  # likewise
    records: torch.Tensor  # int32 [programs, RECORD]
    states: torch.Tensor  # float32: acc [programs * block_m, v_head_dim], m and l [programs * block_m]
    sinks: torch.Tensor | None
    masking: Masking


def rounds_of_pages(tiles: Tiles, mask: Mask) -> Sequence[int]:
    """Return the first page of each round; -1: what a window shows is in memory at once, from the first page of it on."""
    if mask.window is not None and tiles.ring < tiles.cache.max_pages:
        return [-1]
    return range(0, max(tiles.cache.max_pages, 1), tiles.ring)


def tokens_of_round(tiles: Tiles, mask: Mask, num_q_heads: int) -> range:
    """Return the query tokens of the first launch: all, or as many as have states that are not too large."""
    cache, block_m = tiles.cache, tiles.config.block_m
    if len(rounds_of_pages(tiles, mask)) == 1:
        return tiles.tokens
    tile_bytes = tiles.num_splits * cache.num_kv_heads * 4 * (cache.layout.v_head_dim + 2) * block_m
    most_tiles, group = workspace.ROUND_BYTES // tile_bytes, num_q_heads // cache.num_kv_heads
    # Each sequence has a tile that is not full, but no more than it has tokens.
    whole = (most_tiles - cache.batch - 2) * block_m // group // block_m * block_m
    alone = (most_tiles - 2) * block_m // (block_m + group)
    return range(min(max(whole, alone, 1), len(tiles.tokens)))


def launch_plain_tiles(
    out: Rows,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    new: tuple[Rows, Rows] | None,
    memory: tuple[torch.Tensor, torch.Tensor | None],
    mask: Mask,
    tiles: Tiles,
) -> None:
    """Attend with all tiles that have one of some tokens; nothing is checked. `memory`: scratch memory, and plain raw tokens.

    Where several programs share a tile, `out` and `lse` are partial results, of values that are not rotated. Scratch memory
    that holds a part of the pages is filled here, round by round.
    """
    cache, block_m, tokens, (scratch, raw) = tiles.cache, tiles.config.block_m, tiles.tokens, memory
    layout, num_kv_heads, single = cache.layout, cache.num_kv_heads, tiles.num_splits == 1
    flags = new is not None or mask.past_only, single, False
    plan = plan_of(layout, (q.dtype,) * 3, q.shape[1] // num_kv_heads, flags, gpu.uses_ptx(), tiles.config)
    # Each sequence with a token of the launch may have a tile that is not full, and one may begin before them.
    count = -(-len(tokens) * plan.group // block_m) + min(cache.batch, len(tokens)) + (tokens.start > 0)
    programs = count * num_kv_heads * tiles.num_splits
    rounds = rounds_of_pages(tiles, mask)
    states = programs * block_m * (layout.v_head_dim + 2) if len(rounds) > 1 else 0
    work = PlainWork(
        out,
        lse,
        as_rows(q),
        new,
        scratch,
        raw,
        torch.empty(programs, RECORD.value, dtype=torch.int32, device=q.device),
        torch.empty(states, dtype=torch.float32, device=q.device),
        mask.sinks,
        mask.masking(layout.head_dim),
    )
    step_tokens, ends = configs.plain_steps(layout)[0], tiles.cu_seqlens_q
    assert ends is not None
    for first_page in rounds:
        first, last = first_page == rounds[0], first_page == rounds[-1]
        if tiles.ring < cache.max_pages:
            launch_expand_pages(scratch, ends, cache, mask.windows, plan.apart, False, first_page, tiles.ring)
        launch_records(
            work.records, (out, lse), work.masking, tiles, plan, new is not None, (first_page, last), step_tokens
        )  # fmt: skip
        if gpu.INTERPRETED:
            launch_interpreted(work, tiles, plan, (first, last))
        else:
            from .hopper import launch_hopper

            launch_hopper(work, tiles, plan, (first, last))
