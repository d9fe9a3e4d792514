"""What decode attention computes before it reads a page, computed once a step for all of its layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import gpu
from ..cache import Cache, Results, check_split_size, checked_for_attention
from ..checks import FLOATS, check_choice, check_count, require
from ..configs import DecodeTable
from ..layout import PageLayout
from ..masking import Mask, check_mask
from ..step import Step
from .decode import plan_decode
from .parts import RECORD, DecodeSchedule, launch_schedule_decode


def schedule_decode(
    layout: PageLayout,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    num_q_heads: int,
    num_kv_heads: int,
    *,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    window: int | None = None,
    keep_sink: bool = False,
    split_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    table: DecodeTable | None = None,
    out: DecodeSchedule | None = None,
) -> DecodeSchedule:
    """Find out on the device, in one launch, what each program of `decode_attention` begins with.

    Calls that get the result as `schedule` need not look at lengths and tables before they read: a chain of two loads less,
    which takes a tenth of a short call. All layers of a step can share it that have the same heads and options. It is of the
    lengths and ids that the tensors have when it is made: make it in each step, after those are written. With that of another
    step results are wrong, and no call says so.

    Args:
        layout: the page format.
        seq_lens: int32 [batch], as `decode_attention` gets it, like all arguments of the same names.
        block_table: int32 [batch, max_pages], or None with `kv_indptr` and `kv_indices`.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots], if calls get raw pages.
        num_quantized: int32 [batch], likewise.
        sink_len: tokens at the start of every sequence that stay raw.
        kv_indptr: int32 [batch + 1].
        kv_indices: int32 [n].
        window: of the calls; layers with another one need a schedule of their own.
        keep_sink: of the calls.
        split_size: of the calls.
        dtype: of the queries.
        table: of the calls.
        out: the result of another call with the same sizes and options, to be written to: for captured graphs that don't
            capture this call.

    Returns:
        `DecodeSchedule`. Without a GPU nothing is in it, and nothing is read from it.

    Raises:
        ValueError: for a wrong shape, dtype, device or option.
    """
    require(isinstance(seq_lens, torch.Tensor), "seq_lens", "a tensor", type(seq_lens).__name__)
    check_count("num_kv_heads", num_kv_heads)
    raw = raw_table is not None or num_quantized is not None
    cache = _cache(
        layout, seq_lens, num_kv_heads, dtype, raw, block_table=block_table, kv_indptr=kv_indptr, kv_indices=kv_indices,
        raw_table=raw_table, num_quantized=num_quantized, sink_len=sink_len,
    )  # fmt: skip
    return _schedule(cache, num_q_heads, dtype, Mask(None, window, None, None, keep_sink), split_size, table, out)


def schedule_step(
    step: Step,
    num_q_heads: int,
    num_kv_heads: int,
    *,
    window: int | None = None,
    keep_sink: bool = False,
    split_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    table: DecodeTable | None = None,
    out: DecodeSchedule | None = None,
) -> DecodeSchedule:
    """Find out what `schedule_decode` does, for calls of `attend` with a plan of one token for each sequence.

    Args:
        step: `plan_step`, without `cu_seqlens_q`.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        window: as in `schedule_decode`, like all that follow.
        keep_sink: of the calls.
        split_size: of the calls.
        dtype: of the queries.
        table: of the calls.
        out: memory, the result of another call.

    Raises:
        ValueError: for a step of several tokens, and a wrong option.
    """
    require(isinstance(step, Step), "step", "a Step", type(step).__name__)
    require(step.cu_seqlens_q is None, "step", "one planned without cu_seqlens_q", "one with it")
    check_count("num_kv_heads", num_kv_heads)
    names = ("block_table", "kv_indptr", "kv_indices", "raw_table", "num_quantized", "sink_len", "sink_lens")
    tables = {name: getattr(step, name) for name in names}
    cache = _cache(step.layout, step.seq_lens, num_kv_heads, dtype, True, **tables)
    return _schedule(cache, num_q_heads, dtype, Mask(None, window, None, None, keep_sink), split_size, table, out)


def _cache(
    layout: PageLayout, seq_lens: torch.Tensor, num_kv_heads: int, dtype: torch.dtype, raw: bool, **tables: Any
) -> Cache:
    """Return a cache of these tables without any page."""
    require(isinstance(layout, PageLayout), "layout", "a PageLayout", type(layout).__name__)
    check_choice("dtype", dtype, FLOATS)
    pages = torch.empty(layout.pages_shape(0, num_kv_heads), dtype=torch.uint8, device=seq_lens.device)
    shape = 0, 2, num_kv_heads, layout.page_size, layout.raw_head_dim
    raw_pages = torch.empty(shape, dtype=dtype, device=seq_lens.device) if raw else None
    return Cache(layout, pages, seq_lens, raw_pages=raw_pages, **tables)


def _schedule(
    cache: Cache,
    num_q_heads: int,
    dtype: torch.dtype,
    mask: Mask,
    split_size: int | None,
    table: DecodeTable | None,
    out: DecodeSchedule | None,
) -> DecodeSchedule:
    """Return the schedule of calls over a cache."""
    num_kv_heads, device = cache.num_kv_heads, cache.seq_lens.device
    fits = isinstance(num_q_heads, int) and (num_q_heads % num_kv_heads == 0 if num_kv_heads else num_q_heads == 0)
    require(fits, "num_q_heads", f"a multiple of num_kv_heads ({num_kv_heads})", num_q_heads)
    cache = checked_for_attention(cache, cache.seq_lens.shape[0])
    check_mask(mask, num_q_heads, device)
    check_split_size(split_size)
    q = torch.empty(1, dtype=dtype, device=device).expand(cache.batch, num_q_heads, cache.layout.head_dim)
    plan = plan_decode(q, cache, mask, Results(None, False, None), split_size, table)
    work, made_for, rounds = plan.work, plan.made_for(num_q_heads, mask), -(-cache.batch // max(plan.round_rows, 1))
    shape = rounds, work.num_programs, RECORD.value
    if out is None:
        out = DecodeSchedule(torch.empty(shape, dtype=torch.int32, device=device), made_for)
    require(isinstance(out, DecodeSchedule), "out", "a DecodeSchedule", type(out).__name__)
    require(out.made_for == made_for, "out", f"one made for {made_for}", f"one for {out.made_for}")
    if gpu.on_device(cache.seq_lens) and num_q_heads:
        for i in range(rounds):
            rows = slice(i * plan.round_rows, min((i + 1) * plan.round_rows, cache.batch))
            part = dataclasses.replace(work, cache=cache.rows(rows.start, rows.stop)) if rounds > 1 else work
            launch_schedule_decode(out.records[i], num_q_heads, part)
    return out
