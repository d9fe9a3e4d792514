"""The first kernel of a decode call: attend to pieces of the work (`schedule`), one partial result for each part of a piece.

A program attends with a tile of up to 8 query heads to a run of consecutive units of one sequence, or to the end of one run and
the start of the next. Grid: (program,), as many as the GPU holds. Bytes moved: every record byte once for each tile, plus
4 * (v_head_dim + 1) bytes per query head and partial result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import configs, gpu
from ..launch import as_rows, on
from ..layout import PageLayout, fields_per_byte
from ..masking import Mask, first_of_sink
from ..paging import prefetch, sink_of
from ..tile.arithmetic import log2, scaled
from .columns import COLUMN_HEADS, attend_raw_columns, butterfly_of_rows, new_columns, one_of_pairs, scaled_columns, turned
from .merge import MERGE_CHANNELS
from .pages import attend_pages_once, records_of
from .parts import first_part, load_part, next_part
from .query import butterfly, load_query, rotate_query, rotation_matrix
from .schedule import Units, Work
from .softmax import log_sum_exp, new_state
from .tokens import Runs, attend_raw_once, of_head


@dataclass(frozen=True)
class DecodePlan:
    """What the kernel is compiled for."""

    group: int  # query heads of a kv head
    tile: int  # query heads of a tile
    block_n: int  # rows of planes: the same, padded
    columns: bool  # whether heads are columns of products (`columns`)
    copies: int  # of a head in planes
    block_k: int  # bytes of a key, padded to a power of two of at least 32
    channels: int  # of a value, padded to a power of two
    block_t: int  # quantized tokens of one product
    block_d: int  # channels of one product with values
    units: Units
    k_fields: int
    v_fields: int
    operand: tl.dtype
    query_operand: tl.dtype
    raw_operand: tl.dtype
    ptx: bool
    num_stages: int
    early_merge: bool


@triton.jit
def _store_partial(partial_ptr, partial_lse_ptr, number, state, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Store a partial result, rotated back but for blocks of MERGE_CHANNELS channels, and its log-sum-exp."""
    LEVELS: tl.constexpr = log2(max(LAYOUT.v_block_size // MERGE_CHANNELS, 1))
    offs_n = tl.arange(0, state.m.shape[0])
    offs_d = tl.arange(0, PLAN.channels)
    mask_n, mask_d = offs_n < PLAN.tile, offs_d < LAYOUT.v_head_dim
    place = number.to(tl.int64) * PLAN.tile + offs_n
    tl.store(partial_lse_ptr + place, log_sum_exp(state), mask_n)
    factor = 2.0 ** (-0.5 * LEVELS) / state.l
    place = place * LAYOUT.v_head_dim
    if PLAN.columns:
        out = scaled_columns(state.acc, factor)
        for i in tl.static_range(LEVELS):
            out = butterfly_of_rows(out, MERGE_CHANNELS << i)
        tl.store(partial_ptr + place[None, :] + offs_d[:, None], out, mask_n[None, :] & mask_d[:, None])
    else:
        out = scaled(state.acc, factor)
        for i in tl.static_range(LEVELS):
            out = butterfly(out, MERGE_CHANNELS << i)
        tl.store(partial_ptr + place[:, None] + offs_d[None, :], out, mask_n[:, None] & mask_d[None, :])


_NOT_SPECIALIZED = [
    "batch", "num_tiles", "sink_len", "num_tail_slots", "split_size", "few_programs", "stride_table",
    "stride_raw_table",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
_ANY_ADDRESS = ["table_ptr", "indptr_ptr", "seq_lens_ptr", "raw_table_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_decode_attention_kernel(
    partial_ptr,  # float32 [num_partials, tile, v_head_dim], rotated in blocks of MERGE_CHANNELS
    partial_lse_ptr,  # float32 [num_partials, tile], base 2
    record_ptr,  # int32 [programs, RECORD], the first parts, or None
    q,  # Rows [batch, num_q_heads, head_dim]
    pages,  # Pages
    raw,  # Tokens, or None
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots], None without raw pages
    num_quantized_ptr,  # int32 [batch], None without raw pages
    masking,  # Masking
    batch,
    num_tiles,  # of query heads: num_kv_heads * ceil(group / tile)
    sink_len,
    num_tail_slots,
    split_size,
    few_programs,
    stride_table,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    if PLAN.early_merge:
        gdc_launch_dependents()
    rows = (seq_lens_ptr, num_quantized_ptr, sink_len, masking.windows)
    tables = (table_ptr, indptr_ptr, stride_table)
    sizes = (batch, num_tiles, tl.num_programs(0), few_programs, split_size)
    if record_ptr is None:
        cut, part, some = first_part(rows, tables, sizes, PLAN)
    else:
        cut, part, some = load_part(record_ptr)
    while some:
        records = records_of(pages, part.head, table_ptr, indptr_ptr, part.row, stride_table)
        q_row_ptr = q.ptr + part.row.to(tl.int64) * q.stride_token
        q_row_ptr += (part.head * PLAN.group + part.first_head).to(tl.int64) * q.stride_head
        num_heads = tl.minimum(PLAN.group - part.first_head, PLAN.tile)
        loaded = load_query(q_row_ptr, q.stride_head, num_heads, LAYOUT, PLAN)
        matrix = rotation_matrix(part.row, LAYOUT, PLAN)
        if part.first_page < part.last_page:
            prefetch(records.ptr + part.page.to(tl.int64) * pages.stride_page, LAYOUT.page_bytes, "L2", PLAN.ptx)
        planes, q_factor = rotate_query(loaded, matrix, LAYOUT, PLAN)
        q_factor = q_factor * masking.scores.scale
        sink = sink_of(sink_len, part.row, part.row >= 0)
        seen = (part.start - sink, part.seq_len - sink)
        if PLAN.columns:
            planes, q_factor = turned(planes), one_of_pairs(q_factor)
            state = new_columns(PLAN.channels)
        else:
            state = new_state(PLAN.block_n, PLAN.channels)
        span = (part.first_page, part.last_page)
        state = attend_pages_once(state, planes, q_factor, masking, records, part.page, span, seen, LAYOUT, PLAN)
        if raw is not None:
            num_runs = part.runs[1] + part.runs[3]
            if num_runs > 0:
                tokens = of_head(raw, part.head)
                ids_ptr = raw_table_ptr + part.row.to(tl.int64) * stride_raw_table
                runs = Runs(
                    part.runs[0], part.runs[1], part.runs[2], part.runs[3], part.runs[4],
                    tl.cdiv(sink, LAYOUT.page_size), num_tail_slots,
                )  # fmt: skip
                sink_seen = (first_of_sink(part.start, masking.windows), tl.minimum(part.seq_len, sink))
                if PLAN.columns:
                    state = attend_raw_columns(
                        state, planes, q_factor, masking, tokens, ids_ptr, runs, sink_seen, seen, LAYOUT, PLAN
                    )
                else:
                    state = attend_raw_once(
                        state, planes, q_factor, masking, tokens, ids_ptr, runs, sink_seen, seen, LAYOUT, PLAN
                    )
        _store_partial(partial_ptr, partial_lse_ptr, part.number, state, LAYOUT, PLAN)
        part, some = next_part(part, cut, rows, tables, sizes, PLAN)


@functools.lru_cache
def _plan(
    layout: PageLayout,
    dtypes: tuple[torch.dtype, torch.dtype],
    group: int,
    units: Units,
    ptx: bool,
    config: configs.DecodeConfig,
) -> DecodePlan:
    """Return what the kernel is compiled for; `dtypes` are those of queries and of raw pages."""
    k_fields, channels = fields_per_byte(layout.k_bits), triton.next_power_of_2(layout.v_head_dim)
    tile = configs.head_tiles(group, 1)[0]
    columns = configs.has_columns(tile, dtypes[0], config)
    return DecodePlan(
        group=group,
        tile=tile,
        block_n=configs.HEAD_TILE,
        columns=columns,
        copies=configs.HEAD_TILE // COLUMN_HEADS.value if columns else 1,
        block_k=max(triton.next_power_of_2(layout.head_dim) // k_fields, 32),
        channels=channels,
        block_t=config.block_t,
        block_d=min(config.block_d, channels),
        units=units,
        k_fields=k_fields,
        v_fields=fields_per_byte(layout.v_bits),
        operand=tl.float32 if dtypes[0] == torch.float32 else tl.int8,
        query_operand=configs.operand(dtypes[0], dtypes[0]),
        raw_operand=configs.operand(*dtypes),
        ptx=ptx,
        num_stages=config.num_stages,
        early_merge=config.early_merge,
    )


def launch_decode_pieces(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    mask: Mask,
    work: Work,
    records: torch.Tensor | None,
    config: configs.DecodeConfig,
) -> None:
    """Attend to the pieces of a decode call, with `records` of the first parts or without; nothing is checked."""
    cache, num_q_heads = work.cache, q.shape[1]
    layout, raw_dtype = cache.layout, q.dtype if cache.raw_pages is None else cache.raw_pages.dtype
    on(q, _kvarn_decode_attention_kernel)[(work.num_programs,)](
        partial,
        partial_lse,
        records,
        as_rows(q),
        cache.quantized,
        **cache.tables(),
        **cache.raw_tables(),
        masking=mask.masking(layout.head_dim),
        batch=cache.batch,
        num_tiles=configs.head_tiles(num_q_heads, cache.num_kv_heads)[1],
        split_size=work.split_size,
        few_programs=work.few_programs,
        LAYOUT=layout,
        PLAN=_plan(layout, (q.dtype, raw_dtype), num_q_heads // cache.num_kv_heads, work.units, gpu.uses_ptx(), config),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
    )
