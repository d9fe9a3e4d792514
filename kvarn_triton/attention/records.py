"""Which plain tokens each program of prefill attention attends to (`plain`): one launch lists them.

A record of a program is its tile of query rows, and its segments: tokens that lie one after the other, some of which are looked
at in one step. Steps that all rows of the tile see whole are in the middle of a segment. Those before, the lead, and those
behind need a mask: a row sees the tokens of a segment before `reach + shift`, where `reach` is the number of the new token
before which all are that it sees, and from `query + 1 - window + shift` on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Rows, on
from ..masking import Masking, Windows, clamped, first_seen, reach_of, size_of
from ..paging import ALL_PAGES, first_page_of, first_slot, seen_by, sink_of
from .prefill_plan import PrefillPlan
from .schedule import Tiles, find_tile
from .tiles import shares, store_free_rows, tile_of

HEADER = tl.constexpr(8)
"""Room for the numbers of a tile: the first token of its sequence, its first row, its rows, the new tokens of the sequence, the
steps with a mask, and all steps."""
SEGMENTS = tl.constexpr(5)
"""New tokens; quantized pages; the sink; the tail; and of new tokens those of the sink, where a window is beside them."""
ROOM = tl.constexpr(8)
"""Room for a number of each segment."""
START, LEAD, WHOLE, MASKED, COUNT, SHIFT, WINDOW = (tl.constexpr(field) for field in range(7))
"""Numbers of segments: the slot, or new token, at which they start; steps of the lead, whole, and with a mask; tokens, shift
and window."""
RECORD = tl.constexpr(HEADER.value + ROOM.value * 7)
NO_WINDOW = tl.constexpr(2**29)


@triton.jit
def _each(new, pages, sink, tail, new_sink):
    """Return a number of each segment [ROOM]."""
    segment = tl.arange(0, ROOM)
    some = tl.where(segment == 0, new, tl.where(segment == 1, pages, tl.where(segment == 2, sink, tail)))
    return tl.where(segment == SEGMENTS - 1, new_sink, tl.where(segment < SEGMENTS, some, 0))


@triton.jit
def _segments(
    tile, sink, shift, slots, splits, rounds, seen, windows, NEW: tl.constexpr, RAW: tl.constexpr, LAYOUT: tl.constexpr
):
    """Return START, COUNT, SHIFT and WINDOW of a program's share of what its tile sees in a round of pages.

    `shift` is the position of the first query within the body. `slots` are those of the first page of the round and of the
    first raw page. All segments but those of new tokens start with a page.
    """
    G: tl.constexpr = LAYOUT.page_size
    first_page, ring, last_round = rounds
    split, num_splits, split_size = splits
    spans, _, span = shares(split, num_splits, split_size, seen, sink, windows, False, LAYOUT)
    here = (split == 0) & (last_round != 0)
    num_sinks = 0
    window, sink_window = NO_WINDOW, NO_WINDOW
    if windows.body is not None:
        window = size_of(windows.body)
        if windows.sink is None:
            num_sinks = tl.minimum(tl.maximum(-shift, 0), tile.num_tokens)
        else:
            sink_window = window
    first_new = tl.maximum(tl.maximum(tile.first_query + 1 - window, num_sinks), 0)
    first = tl.maximum(span[0], first_page)
    last = span[1]
    if ring != ALL_PAGES:
        last = tl.minimum(last, first_page + ring)
    first_sink = spans[0][0] // G
    first_tail = tl.maximum(spans[1][0], 0) // G
    tail_slot = slots[1] + tl.cdiv(sink, G) + first_tail - seen.quantized
    raw = here & RAW
    count = _each(
        tl.where(here & NEW, tile.num_tokens - first_new, 0),
        tl.minimum(last * G, seen.num_valid) - first * G,
        tl.where(raw & (spans[0][0] < spans[0][1]), spans[0][1] - first_sink * G, 0),
        tl.where(raw & (spans[1][0] < spans[1][1]), spans[1][1] - first_tail * G, 0),
        tl.where(here & NEW, num_sinks, 0),
    )
    start = _each(tile.row_start + first_new, slots[0] + first - first_page, slots[1] + first_sink, tail_slot, tile.row_start)
    shifts = _each(-first_new, shift - first * G, shift + sink - first_sink * G, shift - first_tail * G, 0)
    return start, tl.maximum(count, 0), shifts, _each(window, window, sink_window, window, NO_WINDOW)


@triton.jit
def _store_record(record_ptr, tile, first_row, reach, segments, T: tl.constexpr):
    """Store a record; `reach` is that of the rows that see least and most."""
    start, count, shift, window = segments
    least, most = reach
    end = tl.cdiv(tl.maximum(tl.minimum(count, most + shift), 0), T)
    lead = tl.cdiv(tl.maximum(tile.last_query + 1 - window + shift, 0), T)
    lead = tl.minimum(lead, end)
    whole = tl.maximum(tl.maximum(tl.minimum(count, least + shift), 0) // T - lead, 0)
    segment = tl.arange(0, ROOM)
    # A program that sees nothing has a result nevertheless: it takes a step of pages, all of it behind a mask.
    masked = tl.where((segment == 1) & (tl.sum(end, axis=0) == 0), 1, end - whole)
    numbers_ptr = record_ptr + HEADER + segment
    tl.store(numbers_ptr + START * ROOM, start)
    tl.store(numbers_ptr + LEAD * ROOM, lead)
    tl.store(numbers_ptr + WHOLE * ROOM, whole)
    tl.store(numbers_ptr + MASKED * ROOM, masked)
    tl.store(numbers_ptr + COUNT * ROOM, count)
    tl.store(numbers_ptr + SHIFT * ROOM, shift)
    tl.store(numbers_ptr + WINDOW * ROOM, window)
    num_masked = tl.sum(masked, axis=0)
    tl.store(record_ptr, tile.row_start)
    tl.store(record_ptr + 1, first_row)
    tl.store(record_ptr + 2, tl.sum(tile.mask.to(tl.int32), axis=0))
    tl.store(record_ptr + 3, tile.num_tokens)
    tl.store(record_ptr + 4, num_masked)
    tl.store(record_ptr + 5, num_masked + tl.sum(whole, axis=0))


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
    first_page,  # of this round; below 0: the first one that is seen, of each sequence
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
    record_ptr = records_ptr + program * RECORD
    if row < batch:
        tile = tile_of(cu_seqlens_ptr, row, number, head, masking, PLAN)
        seq_len = tl.load(seq_lens_ptr + row)
        sink = sink_of(sink_len, row, row < batch)
        windows = masking.windows
        if masking.windows.body is not None:  # made here, because no function returns a tuple with None in it
            window = clamped(masking.windows.body, seq_len)
            windows = Windows(None if masking.windows.sink is None else window, window)
        seen = seen_by(
            (tile.first_query, tile.last_query, tile.num_tokens), row, seq_len, num_quantized_ptr, sink, windows.body,
            LAYOUT.page_size, PLAN.apart,
        )  # fmt: skip
        seen_first = 0  # page of the sequence that one of its queries sees
        if windows.body is not None:
            seen_first = tl.maximum(first_seen(seq_len - tile.num_tokens + 1, windows.body) - sink, 0) // LAYOUT.page_size
        most = tile.last_query + 1
        if masking.among.span_ends is not None:
            most = tl.max(reach_of(masking.among, tile.query, tile.token, tile.mask, tile.num_tokens)[1], axis=0)
        slots = first_slot(indptr_ptr, row, max_pages, ring).to(tl.int32), row * num_columns
        segments = _segments(
            tile, sink, seq_len - tile.num_tokens - sink, slots, (split, num_splits, split_size),
            (first_page_of(first_page, seen_first), ring, last_round), seen, windows,
            NEW, num_quantized_ptr is not None, LAYOUT,
        )  # fmt: skip
        _store_record(record_ptr, tile, number * PLAN.block_m, (tile.first_query + 1, most), segments, T)
    else:
        tl.store(record_ptr + tl.arange(0, HEADER), tl.zeros((HEADER,), tl.int32))
        if PLAN.single:
            store_free_rows(
                out, lse_ptr, cu_seqlens_ptr, batch, -1 - number, head, tokens, num_kv_heads * PLAN.group, fill, PLAN
            )  # fmt: skip


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
