"""The first kernel of prefill attention: it attends with tiles of query rows to pages, raw tokens and new tokens.

A row is a query head of a token; a tile is block_m consecutive rows of one sequence and kv head, those of one token after those
of the one before. One program attends with a tile to a share of the raw tokens and pages that its last row sees, and, with
the first share, to new tokens. Grid: (program,), those of a tile next to each other, from the last tile to the first; those for
which there is no tile come last, because multiprocessors that get them first get less of the rest. Bytes moved: each record
byte once for each tile; 4 * (v_head_dim + 1) bytes per row and share, twice, where there are several shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import gpu
from ..launch import Rows, as_rows, as_tokens, on
from ..masking import MOST_DRAFTS, Mask, Masking, Windows, clamped, first_of_new, reach_of
from ..paging import ALL_PAGES, first_slot, seen_by, sink_of
from ..tile.arithmetic import hadamard, load_rows
from .pages import attend_pages, records_of
from .prefill_plan import plan_of
from .query import rotate_planes, rotate_rows, rows_of_planes
from .schedule import Tiles, find_tile
from .softmax import State, new_state
from .tiles import shares, store_free_rows, store_results, tile_of
from .tokens import attend_new, attend_raw_units, attend_scratch, of_head


@triton.jit
def _of_sequence(rows, row_start, head):
    """Return the rows of one sequence and kv head."""
    ptr = rows.ptr + row_start.to(tl.int64) * rows.stride_token + head.to(tl.int64) * rows.stride_head
    return Rows(ptr, rows.stride_token, rows.stride_head)


@triton.jit
def _rotate(q_ptr, place, mask, some, SCRATCH: tl.constexpr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Load queries, and rotate them as keys of the cache are, if `some` key is in it.

    Returns them as they are loaded, which is nothing in the form "registers"; rotated; and a factor of their scores.
    """
    FIELDS: tl.constexpr = PLAN.k_fields
    BLOCK_M: tl.constexpr = PLAN.block_m
    K_CHANNELS: tl.constexpr = PLAN.k_channels
    OPERAND: tl.constexpr = PLAN.operand
    QUERY_OPERAND: tl.constexpr = PLAN.query_operand
    if PLAN.form == "registers":
        q = 0
        rotated, factor = rotate_planes(q_ptr, place, mask, LAYOUT, FIELDS, QUERY_OPERAND, OPERAND)
    else:
        q = load_rows(q_ptr, place, mask, LAYOUT.head_dim, K_CHANNELS)
        if SCRATCH:
            rotated, factor = rotate_rows(q.to(QUERY_OPERAND), LAYOUT, FIELDS, OPERAND, K_CHANNELS <= 128)
        else:
            rotated = tl.zeros((BLOCK_M, K_CHANNELS), OPERAND)
            factor = 1.0
            if some:
                rotated, factor = rotate_rows(q, LAYOUT, FIELDS, OPERAND, False)
    return q, rotated, factor


@triton.jit
def _attend_cached(
    q, q_factor, masking, records, expanded, raw_tokens, raw_share, span, seen, tile, shifts,
    LAYOUT: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Return the state of rotated queries after a share of the cache: pages, from `expanded` memory or not, and raw tokens.

    `expanded` memory comes with its first slot (`tokens.attend_scratch`).
    """
    shift, sink_len = shifts
    position = shift + tile.query
    queries = position, shift + tile.first_query, shift + tile.last_query
    state = new_state(PLAN.block_m, PLAN.v_channels)
    if expanded is not None:
        tokens = span[0] * LAYOUT.page_size, span[1] * LAYOUT.page_size
        state = attend_scratch(state, q, q_factor, masking, expanded, tokens, seen.num_valid, queries, LAYOUT, PLAN)
    elif PLAN.form != "registers":
        state = attend_pages(state, q, q_factor, masking, records, span, seen.num_valid, queries, LAYOUT, PLAN)
    if raw_tokens is not None and raw_share[0] < raw_share[1]:
        raw, table_ptr, columns, spans = raw_tokens
        state = attend_raw_units(
            state, rows_of_planes(q) if PLAN.form == "registers" else q, q_factor, masking, raw, table_ptr, columns, raw_share,
            spans, (position + sink_len, position), LAYOUT, PLAN,
        )  # fmt: skip
    if PLAN.form == "registers":
        # Rows, joined of planes, are not needed beside pages.
        state = attend_pages(state, q, q_factor, masking, records, span, seen.num_valid, queries, LAYOUT, PLAN)
    return state


@triton.jit
def _attend_new(
    state, q, new, tile, head, masking, num_sinks, LAYOUT: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Advance the state of queries, not rotated, by the new tokens of their sequence, the first num_sinks of them sinks."""
    first_query, reach = tile.first_query, None
    if masking.among.tree_mask is not None or masking.among.span_ends is not None:
        reach = reach_of(masking.among, tile.query, tile.token, tile.mask, tile.num_tokens)
    if masking.among.tree_mask is not None:  # a word shows any new token, and hides any
        first_query = tl.where(tile.num_tokens <= MOST_DRAFTS, -1, first_query)
    first = first_of_new(first_query, num_sinks, masking.windows)
    queries = tile.query, first_query, tile.last_query
    k, v = _of_sequence(new[0], tile.row_start, head), _of_sequence(new[1], tile.row_start, head)
    last = tile.last_query + 1
    if reach is not None:
        last = tl.max(reach[1], axis=0)
    return attend_new(state, q, masking, k, v, (first, last), queries, num_sinks, reach, LAYOUT, PLAN)


_NOT_SPECIALIZED = [
    "batch", "num_kv_heads", "num_splits", "sink_len", "num_tail_slots", "split_size", "stride_table",
    "stride_raw_table", "first_token", "total_tokens", "fill", "max_pages",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
_ANY_ADDRESS = [
    "lse_ptr", "cu_seqlens_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "raw_table_ptr", "num_quantized_ptr", "sinks_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_prefill_attention_kernel(
    out,  # Rows [total_tokens, num_q_heads, v_head_dim]; partial results [num_splits * total_tokens, ...] float32
    lse_ptr,  # float32 [total_tokens, num_q_heads], natural logarithm, or None; of partial results base 2
    q,  # Rows [total_tokens, num_q_heads, head_dim]
    new,  # Rows of the new keys and values [total_tokens, num_kv_heads, head_dim] and v_head_dim, or None
    pages,  # Pages
    raw,  # Tokens, or None
    scratch,  # Tokens, the dequantized pages, or None
    cu_seqlens_ptr,  # int32 [batch + 1]
    table_ptr,  # int32 [batch, max_pages], or with CSR [ids]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots], None without raw pages
    num_quantized_ptr,  # int32 [batch], None without raw pages
    sinks_ptr,  # float32 [num_q_heads], or None
    masking,  # Masking
    batch,
    num_kv_heads,
    num_splits,
    first_token,  # of this launch
    total_tokens,  # of this launch
    fill,
    sink_len,
    num_tail_slots,
    split_size,
    max_pages,  # columns of a block table
    stride_table,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    if PLAN.early_merge:
        gdc_launch_dependents()
    head, split = tl.program_id(0) % num_kv_heads, tl.program_id(0) // num_kv_heads % num_splits
    num_q_heads, tokens = num_kv_heads * PLAN.group, (first_token, first_token + total_tokens)
    index = tl.program_id(0) // num_kv_heads // num_splits
    row, number = find_tile(cu_seqlens_ptr, index, batch, tokens, PLAN.group, PLAN.block_m)
    if row < batch:
        tile = tile_of(cu_seqlens_ptr, row, number, head, masking, PLAN)
        seq_len = tl.load(seq_lens_ptr + row)
        sink = sink_of(sink_len, row, row < batch)
        if masking.windows.body is not None:  # made here, because no function returns a tuple with None in it
            window = clamped(masking.windows.body, seq_len)
            masking = Masking(masking.scores, Windows(None if masking.windows.sink is None else window, window), masking.among)
        seen = seen_by(
            (tile.first_query, tile.last_query, tile.num_tokens), row, seq_len, num_quantized_ptr, sink, masking.windows.body,
            LAYOUT.page_size, PLAN.apart,
        )  # fmt: skip
        spans, raw_share, span = shares(split, num_splits, split_size, seen, sink, masking.windows, raw is not None, LAYOUT)
        q_place = tile.token * q.stride_token + tile.q_head.to(tl.int64) * q.stride_head
        some = seen.num_valid > -sink  # otherwise nothing is cached
        rows, rotated, q_factor = _rotate(q.ptr, q_place, tile.mask, some, scratch is not None, LAYOUT, PLAN)
        shift = seq_len - tile.num_tokens - sink  # the position of the first query within the body
        records = records_of(pages, head, table_ptr, indptr_ptr, row, stride_table)
        expanded = None
        if scratch is not None:
            expanded = of_head(scratch, head), first_slot(indptr_ptr, row, max_pages, ALL_PAGES)
        raw_tokens = None
        if raw is not None:
            table_row_ptr = raw_table_ptr + row.to(tl.int64) * stride_raw_table
            raw_tokens = of_head(raw, head), table_row_ptr, (tl.cdiv(sink, LAYOUT.page_size), num_tail_slots), spans
        state = _attend_cached(
            rotated, q_factor * masking.scores.scale, masking, records, expanded, raw_tokens, raw_share, span, seen,
            tile, (shift, sink), LAYOUT, PLAN,
        )  # fmt: skip
        if new is not None and (scratch is None or some):
            state = State(hadamard(state.acc, LAYOUT.v_block_size), state.m, state.l)
        if new is not None and split == 0:
            if scratch is not None or PLAN.form == "registers":
                # Kept for now, they would take registers or shared memory from the loop over pages.
                plain = load_rows(q.ptr, q_place, tile.mask, LAYOUT.head_dim, PLAN.k_channels)
            else:
                plain = rows
            state = _attend_new(state, plain.to(PLAN.query_operand), new, tile, head, masking, -shift, LAYOUT, PLAN)
        ROTATION: tl.constexpr = LAYOUT.v_block_size if new is None else 1
        store_results(out, lse_ptr, sinks_ptr, state, tile, tokens, split, num_q_heads, ROTATION, PLAN)
    elif PLAN.single:
        store_free_rows(out, lse_ptr, cu_seqlens_ptr, batch, -1 - number, head, tokens, num_q_heads, fill, PLAN)


def launch_prefill_tiles(
    out: Rows,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    new: tuple[Rows, Rows] | None,
    scratch: torch.Tensor | None,
    mask: Mask,
    tiles: Tiles,
    partial: bool = False,
) -> None:
    """Attend with all tiles that have one of some tokens; nothing is checked.

    Where several programs share a tile, or if that is said, `out` and `lse` are partial results.
    """
    cache, config, tokens = tiles.cache, tiles.config, tiles.tokens
    layout, num_kv_heads = cache.layout, cache.num_kv_heads
    group, single = q.shape[1] // num_kv_heads, tiles.num_splits == 1 and not partial
    apart = new is not None or mask.past_only
    raw_dtype = q.dtype if cache.raw_pages is None else cache.raw_pages.dtype
    early = not single and gpu.launches_early(q.device)
    dtypes = q.dtype, raw_dtype, None if scratch is None else scratch.dtype
    # Each sequence with a token of the launch may have a tile that is not full, and one may begin before them.
    count = -(-len(tokens) * group // config.block_m) + min(cache.batch, len(tokens)) + (tokens.start > 0)
    plan = plan_of(layout, dtypes, group, (apart, single, early), gpu.uses_ptx(), config)
    programs = count * num_kv_heads * tiles.num_splits
    on(q, _kvarn_prefill_attention_kernel)[(programs,)](
        out,
        lse,
        as_rows(q),
        new,
        cache.quantized,
        scratch=as_tokens(scratch),
        cu_seqlens_ptr=tiles.cu_seqlens_q,
        **cache.tables(),
        **cache.raw_tables(),
        sinks_ptr=mask.sinks,
        masking=mask.masking(layout.head_dim),
        batch=cache.batch,
        num_kv_heads=num_kv_heads,
        num_splits=tiles.num_splits,
        first_token=tokens.start,
        total_tokens=len(tokens),
        fill=int(tiles.fill),
        split_size=tiles.split_size,
        max_pages=cache.max_pages,
        LAYOUT=layout,
        PLAN=plan,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
    )
