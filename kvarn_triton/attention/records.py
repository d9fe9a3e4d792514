"""Which plain tokens each program of prefill attention attends to (`plain`): one launch lists them.

A record of a program is its tile of query rows, and four segments: new tokens, quantized pages, the sink, the tail. A segment
is tokens that lie one after the other, some of which are looked at in one step. Steps that all rows of the tile see whole are
its first ones, those that need a mask the last: a row sees the first `reach + shift` tokens of a segment, where `reach` is the
number of the new token before which all are that it sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Rows, on
from ..masking import Masking, reach_of
from ..paging import ALL_PAGES, first_slot, seen_by, sink_of
from .prefill_plan import PrefillPlan
from .schedule import Tiles, find_tile
from .tiles import shares, store_free_rows, tile_of

HEADER = tl.constexpr(4)
"""Numbers of a tile: the first token of its sequence, its first row, its rows, and the new tokens of the sequence."""
FIELDS = tl.constexpr(5)
"""Numbers of a segment: the slot, or the new token, at which it starts, whole steps, steps with a mask, tokens, shift."""
SEGMENTS = tl.constexpr(4)
RECORD = tl.constexpr(HEADER.value + FIELDS.value * SEGMENTS.value)
_LANES = tl.constexpr(32)


@triton.jit
def _with(numbers, place, value):
    """Return the numbers of a record with one of them set."""
    return tl.where(tl.arange(0, _LANES) == place, value, numbers)


@triton.jit
def _with_segment(numbers, steps, segment, start, count, shift, reach, T: tl.constexpr):
    """Return a record with a segment of `count` tokens, and the steps so far; `reach`: of the rows that see least and most."""
    least, most = reach
    whole = tl.maximum(tl.minimum(count, least + shift), 0) // T
    end = tl.cdiv(tl.maximum(tl.minimum(count, most + shift), 0), T)
    first = HEADER + segment * FIELDS
    numbers = _with(_with(numbers, first, start), first + 1, whole)
    numbers = _with(_with(numbers, first + 2, end - whole), first + 3, count)
    return _with(numbers, first + 4, shift), steps + end


@triton.jit
def _with_segments(
    numbers, tile, reach, shift, sink, slots, splits, rounds, seen, windows,
    NEW: tl.constexpr, RAW: tl.constexpr, LAYOUT: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return a record with a program's share of what its tile sees in a round of pages.

    `shift` is the position of the first query within the body. `slots` are those of page 0 and of the first raw page.
    """
    G: tl.constexpr = LAYOUT.page_size
    first_page, ring, last_round = rounds
    split, num_splits, split_size = splits
    spans, _, span = shares(split, num_splits, split_size, seen, sink, windows, False, LAYOUT)
    here = (split == 0) & (last_round != 0)
    steps = split * 0
    if NEW:
        count = tl.where(here, tile.num_tokens, 0)
        numbers, steps = _with_segment(numbers, steps, 0, tile.row_start, count, split * 0, reach, T)
    first = tl.maximum(span[0], first_page)
    last = span[1]
    if ring != ALL_PAGES:
        last = tl.minimum(last, first_page + ring)
    count = tl.maximum(tl.minimum(last * G, seen.num_valid) - first * G, 0)
    numbers, steps = _with_segment(numbers, steps, 1, slots[0] + first % ring, count, shift - first * G, reach, T)
    if RAW:
        count = tl.where(here, tl.maximum(spans[0][1] - spans[0][0], 0), 0)
        numbers, steps = _with_segment(numbers, steps, 2, slots[1], count, shift + sink, reach, T)
        count = tl.where(here, tl.maximum(spans[1][1] - spans[1][0], 0), 0)
        start = slots[1] + tl.cdiv(sink, G)
        numbers, steps = _with_segment(numbers, steps, 3, start, count, shift - spans[1][0], reach, T)
    # A program that sees nothing has a result nevertheless: it takes a step of pages, all of it behind a mask.
    return _with(numbers, HEADER + FIELDS + 2, tl.where(steps == 0, 1, _at(numbers, HEADER + FIELDS + 2)))


@triton.jit
def _at(numbers, place):
    return tl.sum(tl.where(tl.arange(0, _LANES) == place, numbers, 0), axis=0)


@triton.jit(
    do_not_specialize=[
        "batch", "num_kv_heads", "num_splits", "sink_len", "num_columns", "split_size", "first_token", "total_tokens", "fill",
        "first_page", "ring", "last_round", "max_pages", "stride_table",
    ],
    do_not_specialize_on_alignment=[
        "records_ptr", "lse_ptr", "cu_seqlens_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "num_quantized_ptr",
    ],
)  # fmt: skip
def _kvarn_list_tiles_kernel(
    records_ptr,  # int32 [programs, RECORD]
    out,  # Rows, of which those of no sequence are written
    lse_ptr,  # likewise, or None
    cu_seqlens_ptr,  # int32 [batch + 1]
    table_ptr,  # not read
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch], None without raw pages
    masking,  # Masking
    batch,
    num_kv_heads,
    num_splits,
    first_token,  # of this launch
    total_tokens,  # of this launch
    fill,
    sink_len,
    num_columns,  # of a raw table
    split_size,
    first_page,  # of this round
    ring,  # pages of a sequence that scratch memory holds at once
    last_round,
    max_pages,  # columns of a block table
    stride_table,
    NEW: tl.constexpr,  # whether there are new tokens
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
    T: tl.constexpr,  # tokens of a step
):
    program = tl.program_id(0)
    head = program % num_kv_heads
    split = program // num_kv_heads % num_splits
    tokens = (first_token, first_token + total_tokens)
    row, number = find_tile(cu_seqlens_ptr, program // num_kv_heads // num_splits, batch, tokens, PLAN.group, PLAN.block_m)
    numbers = tl.zeros((_LANES,), tl.int32)
    if row < batch:
        tile = tile_of(cu_seqlens_ptr, row, number, head, masking, PLAN)
        seq_len = tl.load(seq_lens_ptr + row)
        sink = sink_of(sink_len, row, row < batch)
        seen = seen_by(
            (tile.first_query, tile.last_query, tile.num_tokens), row, seq_len, num_quantized_ptr, sink, None, LAYOUT.page_size,
            PLAN.apart,
        )  # fmt: skip
        most = tile.last_query + 1
        if masking.among.span_ends is not None:
            most = tl.max(reach_of(masking.among, tile.query, tile.token, tile.mask, tile.num_tokens)[1], axis=0)
        numbers = _with(_with(numbers, 0, tile.row_start), 1, number * PLAN.block_m)
        numbers = _with(_with(numbers, 2, tl.sum(tile.mask.to(tl.int32), axis=0)), 3, tile.num_tokens)
        slots = first_slot(indptr_ptr, row, max_pages, ring).to(tl.int32), row * num_columns
        numbers = _with_segments(
            numbers, tile, (tile.first_query + 1, most), seq_len - tile.num_tokens - sink, sink, slots,
            (split, num_splits, split_size), (first_page, ring, last_round), seen, masking.windows, NEW,
            num_quantized_ptr is not None, LAYOUT, T,
        )  # fmt: skip
    elif PLAN.single:
        store_free_rows(
            out, lse_ptr, cu_seqlens_ptr, batch, -1 - number, head, tokens, num_kv_heads * PLAN.group, fill, PLAN
        )  # fmt: skip
    lane = tl.arange(0, _LANES)
    tl.store(records_ptr + program * RECORD + lane, numbers, lane < RECORD)


def launch_records(
    records: torch.Tensor,
    results: tuple[Rows, torch.Tensor | None],
    masking: Masking,
    tiles: Tiles,
    plan: PrefillPlan,
    new: bool,
    pages: tuple[int, bool],
    step_tokens: int,
) -> None:
    """List what each program attends to in a round of pages: `pages` are its first one, and whether it is the last round.

    `new`: whether there are new tokens. Results of rows of no sequence are stored. Nothing is checked.
    """
    cache, tokens = tiles.cache, tiles.tokens
    on(records, _kvarn_list_tiles_kernel)[(len(records),)](
        records,
        *results,
        cu_seqlens_ptr=tiles.cu_seqlens_q,
        **cache.tables(),
        masking=masking,
        batch=cache.batch,
        num_kv_heads=cache.num_kv_heads,
        num_splits=tiles.num_splits,
        first_token=tokens.start,
        total_tokens=len(tokens),
        fill=int(tiles.fill),
        num_columns=cache.max_raw_pages,
        split_size=tiles.split_size,
        first_page=pages[0],
        ring=tiles.ring,
        last_round=int(pages[1]),
        max_pages=cache.max_pages,
        NEW=new,
        LAYOUT=cache.layout,
        PLAN=plan,
        T=step_tokens,
        num_warps=4,
        enable_fp_fusion=True,
    )
