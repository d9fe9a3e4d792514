"""Paged split-K decode attention over sink, quantized and tail pages in one call.

The first kernel attends to pieces of the work (`decode_kernel`), the second merges the partial results and undoes the rotation
(`merge`). Both follow one plan (`schedule`). More than 8 query heads of a kv head are, on some GPUs, rows of tiles (`drafts`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch

from .. import configs, gpu, reference
from ..cache import Cache, Results, check_queries, check_split_size, check_workspace, checked_for_attention
from ..checks import check_tensor, require
from ..launch import aligned, copy_back
from ..layout import PageLayout
from ..masking import Mask
from ..paging import ALL_PAGES
from .decode_kernel import launch_decode_pieces
from .drafts import attend_drafts
from .merge import launch_merge_splits
from .parts import RECORD, DecodeSchedule
from .prefill_plan import config_of_heads
from .schedule import Tiles, Units, Work
from .workspace import MostWork, most_units, num_partials, partials_of, rows_per_round


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    table: configs.DecodeTable | None = None,
    keep_sink: bool = False,
    schedule: DecodeSchedule | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with one query token per sequence to its sink, quantized and tail pages.

    Args:
        q: float16, bfloat16 or float32 [batch, num_q_heads, head_dim], after the position encoding, not rotated. Query head i
            reads kv head i // group; group = num_q_heads / num_kv_heads may be any integer. Pages are read once for 8 of them;
            for 16 or 32 where `attention.drafts` attends to them.
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        block_table: int32 [batch, max_pages]; column j is the page id of body page j. None with `kv_indptr` and `kv_indices`.
        seq_lens: int32 [batch], tokens to attend to. 0 is legal.
        layout: the page format.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim], rotated keys
            and values of sinks and tails (`append_tokens`). None if everything is quantized.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]; the sink pages, then the ring in which body page j has
            slot j % num_tail_slots. Needed with `raw_pages`.
        num_quantized: int32 [batch], how many body pages are read from `pages`. Needed with `raw_pages`.
        sink_len: tokens at the start of every sequence that stay raw.
        kv_indptr: int32 [batch + 1], rising; where the page ids of each sequence begin in `kv_indices`, and the last one's end.
        kv_indices: int32 [n]; `kv_indices[kv_indptr[b] + j]` is the page id of body page j of sequence b.
        sm_scale: factor of the scores, a number and no tensor; by default head_dim ** -0.5.
        window: see only the last `window` tokens, the query's own among them: those at positions >= seq_len - window, of the
            raw ones at the start too. Pages without such a token are not read, nor are their ids. Any number from call to call.
        soft_cap: above 0; a score becomes soft_cap * tanh(score / soft_cap), after `sm_scale` and before the softmax.
        sinks: float32 [num_q_heads], attention sinks: the logit of one more token of each query head, which has a weight but no
            value. Not capped. -inf is none.
        out: where to write: [batch, num_q_heads, v_head_dim], of the dtype of `q`, any strides whose innermost is 1.
        return_lse: whether to return the log-sum-exp too.
        split_size: batch-invariant mode: pages of one run into which each sequence is cut (16 raw tokens count as a page), so
            that the bits of a row depend on the row alone, whatever else is in the batch. By default the runs are as long
            as it takes to give every multiprocessor the same work.
        workspace: uint8 [at least decode_workspace_size(...)], contiguous; allocated if not given.
        table: launch parameters by layout (`load_table`); by default the package's own for the device.
        keep_sink: with a window, whether the first `sink_len` tokens stay visible beside it (StreamingLLM, arXiv 2309.17453).
        schedule: what `schedule_decode` made of the same tables, lengths and options; the result is the same, and comes sooner,
            but where `attention.drafts` attends, which needs none.

    Returns:
        `out` [batch, num_q_heads, v_head_dim], or `out` and `lse` float32 [batch, num_q_heads] (natural logarithm, of capped
        scores times `sm_scale`, the logit of `sinks` included). A sequence of length 0 gives zeros, and lse = -inf or the logit
        of `sinks`. Calls over parts of a sequence, to be merged (`merge_states`), get `sinks` in one of them only.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option, and for two forms of page ids, or none; nothing is
            written. Ids and lengths are not read to be checked.
    """
    cache = Cache(
        layout, pages, seq_lens, block_table, kv_indptr, kv_indices, raw_pages, raw_table, num_quantized, sink_len
    )  # fmt: skip
    cache = checked_for_attention(cache, q.shape[0] if isinstance(q, torch.Tensor) and q.dim() else None)
    mask = Mask(sm_scale, window, soft_cap, sinks, keep_sink)
    check_queries(q, cache, mask, out)
    check_split_size(split_size)
    results = Results(out, return_lse, workspace)
    plan = plan_decode(q, cache, mask, results, split_size, table, schedule)
    if not gpu.on_device(q):
        return reference.decode_attention(
            q, pages, block_table, seq_lens, layout, raw_pages=cache.raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices,
            sm_scale=mask.sm_scale, window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
            keep_sink=keep_sink,
        )  # fmt: skip
    return launch_decode(q, mask, results, plan)


class DecodePlanned(NamedTuple):
    """How a call is computed."""

    work: Work
    round_rows: int  # sequences of a round
    num_bytes: int  # of its partial results
    config: configs.DecodeConfig
    schedule: DecodeSchedule | None
    tiles: Tiles | None  # of query heads, where `drafts` attends to them

    def records_of(self, first: int) -> torch.Tensor | None:
        """Return the records of the round that begins with sequence `first`, if there is a schedule."""
        return None if self.schedule is None else self.schedule.records[first // max(self.round_rows, 1)]

    def made_for(self, num_q_heads: int, mask: Mask) -> str:
        """Return what a schedule of this call depends on, but for what is in tensors."""
        work, cache = self.work, self.work.cache
        return _made_for(
            cache.batch, self.round_rows, num_q_heads, cache.num_kv_heads, work.units, cache.sink_len, cache.sink_lens is None,
            mask.window, mask.keep_sink, work.split_size, work.num_programs, work.few_programs,
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _made_for(
    batch: int, round_rows: int, num_q_heads: int, num_kv_heads: int, units: Units, sink_len: int, *others: Any
) -> str:
    """Return a text that tells calls apart whose programs begin differently; a schedule keeps it."""
    same_sinks, window, keep_sink, split_size, programs, few_programs = others
    return (
        f"{batch} sequences, {round_rows} at once, {num_q_heads} query heads, {num_kv_heads} kv heads, page_size "
        f"{units.page_size}, raw pages: {units.has_raw}, sink_len {sink_len}{'' if same_sinks else ' or 0'}, window {window}, "
        f"keep_sink {keep_sink}, split_size {split_size or None}, {programs} and {few_programs} programs"
    )


def launch_decode(
    q: torch.Tensor, mask: Mask, results: Results, plan: DecodePlanned
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend as planned, in rounds; nothing is checked."""
    work, round_rows, num_bytes, config, _, tiles = plan
    layout, (batch, num_q_heads) = work.cache.layout, q.shape[:2]
    out, workspace = results.out, results.workspace
    if out is None:
        out = torch.empty(batch, num_q_heads, layout.v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device) if results.return_lse else None
    if workspace is None:
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    if batch == 0 or num_q_heads == 0:
        return out if lse is None else (out, lse)
    q, memory = aligned(q), aligned(out)
    if tiles is not None:
        attend_drafts((memory, lse), q, None, mask, tiles, partials_of(memory, tiles, workspace[:num_bytes]))
        copy_back(memory, out)
        return out if lse is None else (out, lse)
    tile = configs.head_tiles(num_q_heads, work.cache.num_kv_heads)[0]
    partials = num_bytes // (4 * tile * (layout.v_head_dim + 1))
    sums, ends = workspace[:num_bytes].view(torch.float32).split([partials * tile * layout.v_head_dim, partials * tile])
    partial, partial_lse = sums.view(partials, tile, layout.v_head_dim), ends.view(partials, tile)
    for first in range(0, batch, round_rows):
        part, part_q, part_out, part_lse = work, q, memory, lse
        if round_rows < batch:
            rows = slice(first, min(first + round_rows, batch))
            part = dataclasses.replace(work, cache=work.cache.rows(rows.start, rows.stop))
            part_q, part_out, part_lse = q[rows], memory[rows], None if lse is None else lse[rows]
        launch_decode_pieces(partial, partial_lse, part_q, mask, part, plan.records_of(first), config)
        launch_merge_splits(part_out, part_lse, partial, partial_lse, mask.sinks, part, config.early_merge)
    copy_back(memory, out)
    return out if lse is None else (out, lse)


def plan_decode(
    q: torch.Tensor,
    cache: Cache,
    mask: Mask,
    results: Results,
    split_size: int | None,
    table: configs.DecodeTable | None,
    schedule: DecodeSchedule | None = None,
) -> DecodePlanned:
    """Return how a call is computed, and check the memory that it got for partial results, and its schedule."""
    tile = configs.head_tiles(q.shape[1], cache.num_kv_heads)[0]
    config = configs.decode_config(cache.layout, q.dtype, q.device, table, tile)
    work, round_rows, num_bytes = _plan_work(q, cache, mask, split_size or 0, config)
    tiles = _plan_tiles(q, cache, mask) if split_size is None and table is None else None
    if tiles is not None:
        num_bytes = 4 * cache.batch * tiles.num_splits * q.shape[1] * (cache.layout.v_head_dim + 1)
    if results.workspace is not None:
        check_workspace(results.workspace, num_bytes, q.device)
    planned = DecodePlanned(work, round_rows, num_bytes, config, schedule, tiles)
    if schedule is not None:
        require(isinstance(schedule, DecodeSchedule), "schedule", "a DecodeSchedule", type(schedule).__name__)
        want = planned.made_for(q.shape[1], mask)
        require(schedule.made_for == want, "schedule", f"one made for {want}", f"one for {schedule.made_for}")
        rounds = -(-cache.batch // max(round_rows, 1))
        check_tensor(
            "schedule.records", schedule.records, [rounds, work.num_programs, RECORD.value], torch.int32, device=q.device
        )
    return planned


def _plan_tiles(q: torch.Tensor, cache: Cache, mask: Mask) -> Tiles | None:
    """Return tiles of query heads, with programs that share the pages of each, where `drafts` attends to them."""
    taken = config_of_heads(q, cache, mask)
    return taken and Tiles(cache, None, range(cache.batch), taken[1], 0, False, taken[0], ALL_PAGES.value)


def _plan_work(
    q: torch.Tensor, cache: Cache, mask: Mask, split_size: int, config: configs.DecodeConfig
) -> tuple[Work, int, int]:
    """Return how the work of a call is cut, how many sequences a round has, and how many bytes its partial results take."""
    layout, num_q_heads = cache.layout, q.shape[1]
    tile, num_tiles = configs.head_tiles(num_q_heads, cache.num_kv_heads)
    most = MostWork(layout, cache.max_pages, cache.max_raw_pages, cache.csr, split_size)
    programs = gpu.num_programs(q.device, config.programs_per_sm)
    partial_bytes = 4 * tile * (layout.v_head_dim + 1)
    round_rows = rows_per_round(cache.batch, num_tiles, most, partial_bytes) if split_size else cache.batch
    num_bytes = num_partials(round_rows, num_tiles, most, programs) * partial_bytes
    programs = min(programs, max(num_tiles * most_units(round_rows, most), 1))
    few_programs = min(programs, gpu.num_programs(q.device, config.few_programs_per_sm))
    has_raw = cache.raw_pages is not None
    units = Units(layout.page_size, configs.RAW_BLOCK, has_raw)
    return Work(cache, mask.windows, split_size, programs, few_programs, units), round_rows, num_bytes
