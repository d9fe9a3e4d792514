"""The plan of a step, in one launch: where each token goes, which pages complete, and the tables as attention takes them.

A program has one sequence, or 128 of the new tokens. Grid: (sequences, then blocks of tokens). What is moved is small: the
tables once, 8 bytes a token, 20 a page that completes. `reference.step` is the definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import on
from ..step import Step, StepInputs

BLOCK = tl.constexpr(128)
"""Tokens of a program, sequences or columns that are looked at together."""
COLUMNS = tl.constexpr(1024)
"""Columns of a table that are copied together: one wait for the tables of most servers."""


class Sequences(NamedTuple):
    """What is known of sequences: pointers, None where there are none, and numbers."""

    seq_lens_ptr: tl.tensor
    cu_seqlens_ptr: tl.tensor
    rows_ptr: tl.tensor
    prefix_lens_ptr: tl.tensor
    indptr_ptr: tl.tensor
    raw_table_ptr: tl.tensor
    stride_raw_table: tl.tensor
    max_pages: tl.tensor
    sink_len: tl.tensor
    max_drafts: tl.tensor


class Lengths(NamedTuple):
    """Of one sequence or several: lengths, and the pages that follow from them."""

    request: tl.tensor  # row of the tables
    start: tl.tensor  # first new token
    computed: tl.tensor  # tokens before the new ones
    length: tl.tensor
    sink: tl.tensor  # raw tokens at the start
    skipped: tl.tensor  # columns of the table for them
    begin: tl.tensor  # columns of the pages that complete: from here
    end: tl.tensor  # to here
    quantized: tl.tensor  # body pages in quantized form after the step
    rounded: tl.tensor  # column of the first page whose tokens the ring has


@triton.jit
def _pages_to(length, origin, G: tl.constexpr):
    return tl.maximum(length - origin, 0) // G


@triton.jit
def _lengths_of(seqs, row, mask, G: tl.constexpr, SINK_COLUMNS: tl.constexpr, EARLY: tl.constexpr):
    """Return the lengths of a row, or of several; those that are masked have no tokens."""
    length = tl.maximum(tl.load(seqs.seq_lens_ptr + row, mask, other=0), 0)
    if seqs.cu_seqlens_ptr is None:
        start = row
        count = (length > 0).to(tl.int32)
    else:
        start = tl.load(seqs.cu_seqlens_ptr + row, mask, other=0)
        count = tl.maximum(tl.load(seqs.cu_seqlens_ptr + row + 1, mask, other=0) - start, 0)
    request = row
    if seqs.rows_ptr is not None:
        request = tl.maximum(tl.load(seqs.rows_ptr + row, mask, other=0), 0)
    sink = seqs.sink_len + tl.zeros_like(length)
    skipped = tl.zeros_like(length)
    origin = seqs.sink_len
    if SINK_COLUMNS:
        origin = 0
        first_id = tl.load(seqs.raw_table_ptr + request.to(tl.int64) * seqs.stride_raw_table, mask, other=0)
        sink = tl.where(first_id >= 0, sink, 0)
        skipped = tl.where(first_id >= 0, tl.cdiv(seqs.sink_len, G), 0)
    columns = seqs.max_pages
    if seqs.indptr_ptr is not None:
        columns = tl.load(seqs.indptr_ptr + row + 1, mask, other=0) - tl.load(seqs.indptr_ptr + row, mask, other=0)
    floor = tl.zeros_like(length)
    if seqs.prefix_lens_ptr is not None:
        floor = tl.minimum(_pages_to(tl.load(seqs.prefix_lens_ptr + request, mask, other=0), origin, G), columns)
    computed = length - count
    if EARLY:
        end = tl.minimum(_pages_to(length, origin, G), columns)
        begin = tl.maximum(_pages_to(computed, origin, G), floor)
        rounded = _pages_to(length - seqs.max_drafts, origin, G)
        certain = tl.minimum(tl.maximum(rounded, _pages_to(computed, origin, G)), columns)
        quantized = tl.maximum(tl.maximum(certain, floor) - skipped, 0)
    else:
        end = tl.minimum(_pages_to(length - seqs.max_drafts, origin, G), columns)
        begin = tl.maximum(_pages_to(computed - seqs.max_drafts, origin, G), floor)
        quantized = tl.maximum(tl.maximum(end, floor) - skipped, 0)
        rounded = _pages_to(length - 2 * seqs.max_drafts, origin, G)
    return Lengths(request, start, computed, length, sink, skipped, begin, tl.maximum(end, begin), quantized, rounded)


@triton.jit
def _raw_column(position, sink, sink_len, num_tail_slots, G: tl.constexpr):
    """Return the column of the raw table, and the place in its page, of the token at a position."""
    body = position - sink
    tail = tl.cdiv(sink_len, G) + tl.maximum(body, 0) // G % num_tail_slots
    return tl.where(body < 0, position // G, tail), tl.where(body < 0, position, body) % G


@triton.jit
def _plan_tokens(
    slots_ptr, seqs, block, batch, num_tokens, num_tail_slots,
    G: tl.constexpr, SINK_COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Find the sequence of each token of a block, and where it goes in the raw pool."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    if seqs.cu_seqlens_ptr is None:
        row = token
    else:
        row = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, batch, BLOCK):
            other = first + tl.arange(0, BLOCK)
            ends = tl.load(seqs.cu_seqlens_ptr + other + 1, other < batch, other=2**31 - 1)
            row += tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)
        mask = mask & (token >= tl.load(seqs.cu_seqlens_ptr))
    mask = mask & (row < batch)
    lengths = _lengths_of(seqs, row, mask, G, SINK_COLUMNS, EARLY)
    position = lengths.computed + token - lengths.start
    column, place = _raw_column(position, lengths.sink, seqs.sink_len, num_tail_slots, G)
    origin = 0 if SINK_COLUMNS else seqs.sink_len
    kept = (position < lengths.sink) | ((position >= origin) & ((position - origin) // G >= lengths.rounded))
    kept = kept & mask & (position >= 0) & (position < lengths.length)
    page = tl.load(seqs.raw_table_ptr + lengths.request.to(tl.int64) * seqs.stride_raw_table + column, kept, other=-1)
    tl.store(slots_ptr + token, tl.where(page >= 0, page.to(tl.int64) * G + place, -1), token < num_tokens)


@triton.jit
def _plan_pages(
    tasks_ptr, seqs, table_ptr, lengths, row, batch, num_tasks, num_tail_slots, pages_per_block,
    G: tl.constexpr, SINK_COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """List the pages that a sequence completes behind those of the sequences before it, and mark what is left as none."""
    before = 0
    for first in range(0, row, BLOCK):
        other = first + tl.arange(0, BLOCK)
        each = _lengths_of(seqs, other, other < row, G, SINK_COLUMNS, EARLY)
        before += tl.sum(each.end - each.begin, axis=0)
    origin = 0 if SINK_COLUMNS else seqs.sink_len
    count = lengths.end - lengths.begin
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = (index < count) & (before + index < num_tasks)
        column = lengths.begin + index
        block = tl.load(table_ptr + column // pages_per_block, mask, other=-1)
        start = origin + column * G
        raw_column, _ = _raw_column(start, lengths.sink, seqs.sink_len, num_tail_slots, G)
        raw_row_ptr = seqs.raw_table_ptr + lengths.request.to(tl.int64) * seqs.stride_raw_table
        older = tl.minimum(tl.maximum(lengths.computed - start, 0), G)
        place = tasks_ptr + before + index
        tl.store(place, tl.where(block >= 0, block * pages_per_block + column % pages_per_block, -1), mask)
        tl.store(place + num_tasks, tl.load(raw_row_ptr + raw_column, mask, other=-1), mask)
        tl.store(place + 2 * num_tasks, older, mask)
        tl.store(place + 3 * num_tasks, lengths.start + start - lengths.computed, mask)
        tl.store(place + 4 * num_tasks, ((older > 0) | (column >= lengths.rounded)).to(tl.int32), mask)
    if row == batch - 1:
        for first in range(before + count, num_tasks, BLOCK):
            index = first + tl.arange(0, BLOCK)
            tl.store(tasks_ptr + index, -1, index < num_tasks)


class Tables(NamedTuple):
    """Tables of a plan, None where those of the caller are taken: pointers, and how wide they are."""

    block_table_ptr: tl.tensor
    indptr_ptr: tl.tensor
    raw_table_ptr: tl.tensor
    sink_lens_ptr: tl.tensor
    block_columns: tl.tensor
    raw_columns: tl.tensor


@triton.jit
def _copy_tables(tables, seqs, table_ptr, lengths, row, batch, pages_per_block, G: tl.constexpr):
    """Write the tables of a sequence as attention takes them: in pages, from the body on, in the order of the step."""
    if tables.sink_lens_ptr is not None:
        tl.store(tables.sink_lens_ptr + row, lengths.sink)
    if tables.indptr_ptr is not None:
        end = tl.load(seqs.indptr_ptr + row + 1)
        tl.store(tables.indptr_ptr + row, tl.minimum(tl.load(seqs.indptr_ptr + row) + lengths.skipped, end))
        tl.store(tables.indptr_ptr + batch, end, row == batch - 1)
    if tables.raw_table_ptr is not None:
        columns = tables.raw_columns
        raw_row_ptr = seqs.raw_table_ptr + lengths.request.to(tl.int64) * seqs.stride_raw_table
        shift = tl.where(lengths.sink < seqs.sink_len, tl.cdiv(seqs.sink_len, G), 0)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            page = tl.load(raw_row_ptr + column + shift, column + shift < columns, other=-1)
            tl.store(tables.raw_table_ptr + row.to(tl.int64) * columns + column, page, column < columns)
    if tables.block_table_ptr is not None:
        columns = tables.block_columns
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            source = column + lengths.skipped
            block = tl.load(table_ptr + source // pages_per_block, source < seqs.max_pages, other=-1)
            page = tl.where(block >= 0, block * pages_per_block + source % pages_per_block, -1)
            tl.store(tables.block_table_ptr + row.to(tl.int64) * columns + column, page, column < columns)


@triton.jit(
    do_not_specialize=[
        "batch", "num_tokens", "num_tasks", "sink_len", "max_drafts", "max_pages", "num_tail_slots", "pages_per_block",
        "stride_table", "stride_raw_table", "block_columns", "raw_columns",
    ],
    do_not_specialize_on_alignment=[
        "seq_lens_ptr", "cu_seqlens_ptr", "rows_ptr", "prefix_lens_ptr", "table_ptr", "indptr_ptr", "raw_table_ptr",
        "out_block_table_ptr", "out_indptr_ptr", "out_raw_table_ptr", "out_sink_lens_ptr", "num_quantized_ptr", "slots_ptr",
        "tasks_ptr",
    ],
)  # fmt: skip
def _kvarn_plan_step_kernel(
    slots_ptr,  # int64 [num_tokens]
    tasks_ptr,  # int32 [5, num_tasks]
    num_quantized_ptr,  # int32 [batch]
    out_block_table_ptr,  # int32 [batch, block_columns], or None
    out_indptr_ptr,  # int32 [batch + 1], or None
    out_raw_table_ptr,  # int32 [batch, raw_columns], or None
    out_sink_lens_ptr,  # int32 [batch], or None
    seq_lens_ptr,  # int32 [batch]
    cu_seqlens_ptr,  # int32 [batch + 1], or None
    rows_ptr,  # int32 [batch], or None
    prefix_lens_ptr,  # int32 [requests], or None
    table_ptr,  # int32 [requests, blocks], or with CSR [n]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    raw_table_ptr,  # int32 [requests, raw_columns]
    batch,
    num_tokens,
    num_tasks,
    sink_len,
    max_drafts,
    max_pages,
    num_tail_slots,
    pages_per_block,
    block_columns,
    raw_columns,
    stride_table,
    stride_raw_table,
    G: tl.constexpr,
    SINK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    seqs = Sequences(
        seq_lens_ptr, cu_seqlens_ptr, rows_ptr, prefix_lens_ptr, indptr_ptr, raw_table_ptr, stride_raw_table, max_pages,
        sink_len, max_drafts,
    )  # fmt: skip
    row = tl.program_id(0)
    if row < batch:
        lengths = _lengths_of(seqs, row, row >= 0, G, SINK_COLUMNS, EARLY)
        if indptr_ptr is None:
            row_table_ptr = table_ptr + lengths.request.to(tl.int64) * stride_table
        else:
            row_table_ptr = table_ptr + tl.load(indptr_ptr + row)
        tl.store(num_quantized_ptr + row, lengths.quantized)
        _plan_pages(
            tasks_ptr, seqs, row_table_ptr, lengths, row, batch, num_tasks, num_tail_slots, pages_per_block,
            G, SINK_COLUMNS, EARLY,
        )  # fmt: skip
        tables = Tables(
            out_block_table_ptr, out_indptr_ptr, out_raw_table_ptr, out_sink_lens_ptr, block_columns, raw_columns
        )  # fmt: skip
        _copy_tables(tables, seqs, row_table_ptr, lengths, row, batch, pages_per_block, G)
    else:
        _plan_tokens(slots_ptr, seqs, row - batch, batch, num_tokens, num_tail_slots, G, SINK_COLUMNS, EARLY)


def launch_plan_step(inputs: StepInputs, step: Step) -> None:
    """Write the plan of a step to its memory; nothing is checked."""
    batch, ids, raw_table = step.batch, inputs.ids, inputs.raw_table
    if batch == 0:
        step.slots.fill_(-1)
        step.tasks.fill_(-1)
        if step.kv_indptr is not None and inputs.kv_indptr is not None:
            step.kv_indptr.copy_(inputs.kv_indptr)
        return
    on(ids, _kvarn_plan_step_kernel)[(batch + -(-step.num_tokens // BLOCK.value),)](
        step.slots,
        step.tasks,
        step.num_quantized,
        _unless(step.block_table, inputs.block_table),
        _unless(step.kv_indptr, inputs.kv_indptr),
        _unless(step.raw_table, raw_table),
        step.sink_lens,
        inputs.seq_lens,
        inputs.cu_seqlens_q,
        inputs.rows,
        inputs.prefix_lens,
        ids,
        inputs.kv_indptr,
        raw_table,
        batch=batch,
        num_tokens=step.num_tokens,
        num_tasks=step.tasks.shape[1],
        sink_len=inputs.sink_len,
        max_drafts=inputs.max_drafts,
        max_pages=ids.shape[-1] * inputs.pages_per_block,
        num_tail_slots=inputs.num_tail_slots,
        pages_per_block=inputs.pages_per_block,
        block_columns=0 if step.block_table is None else step.block_table.shape[1],
        raw_columns=raw_table.shape[1],
        stride_table=0 if inputs.block_table is None else inputs.block_table.stride(0),
        stride_raw_table=raw_table.stride(0),
        G=inputs.layout.page_size,
        SINK_COLUMNS=inputs.sink_columns,
        EARLY=inputs.early_pages and inputs.max_drafts > 0,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _unless(memory: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor | None:
    """Return memory for a table of the plan; None for one that the caller has."""
    return None if memory is given else memory
