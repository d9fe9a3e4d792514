"""The first kernel of a decode call: attend to pieces of the work (`schedule`), one partial result for each part of a piece.

A program attends with a tile of up to 8 query heads to a run of consecutive units of one sequence, or to the end of one run and
the start of the next. Grid: (program,), as many as the GPU holds. Bytes moved: every record byte once for each tile, plus
4 * (v_head_dim + 1) bytes per query head and partial result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import configs, gpu
from ..launch import as_rows, on
from ..layout import PageLayout, fields_per_byte
from ..masking import Mask, first_of_sink
from ..paging import load_page_id, prefetch, sink_of
from .pages import attend_pages_once, records_of
from .query import load_query, rotate_query, rotation_matrix
from .schedule import Units, Work, find_row, plan, quotient, rounded_up, row_units, start_of_piece
from .softmax import log_sum_exp, new_state
from .tokens import Runs, attend_raw_once, of_head


@dataclass(frozen=True)
class DecodePlan:
    """What the kernel is compiled for."""

    group: int  # query heads of a kv head
    tile: int  # query heads of a tile
    block_n: int  # the same, padded
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


class Part(NamedTuple):
    """The part of a piece that belongs to one sequence and tile of query heads."""

    number: tl.tensor  # of its partial result
    next_unit: tl.tensor  # after it
    row: tl.tensor
    head: tl.tensor  # kv head
    first_head: tl.tensor  # query head of that kv head
    seq_len: tl.tensor
    start: tl.tensor  # first position that is seen
    span: tl.tensor  # (first, last) page of the body
    runs: tl.tensor  # of raw tokens: as `tokens.Runs` has them


@triton.jit
def _find_part(
    rows, unit, end, piece, batch, num_tiles, split, LAYOUT: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Return the part of a piece that begins with a unit, of the piece that ends at `end`."""
    UNITS: tl.constexpr = PLAN.units
    TILES: tl.constexpr = triton.cdiv(PLAN.group, PLAN.tile)
    row, row_start = find_row(rows, unit, batch, num_tiles, split, UNITS)
    seq_len, start, begins, counts = row_units(rows, row, row < batch, UNITS)
    num_sinks, num_paged, num_tails = counts
    units_of_row = num_sinks + num_paged + num_tails
    aligned_units = rounded_up(units_of_row, split)
    tile = quotient(unit - row_start, aligned_units)
    first = unit - row_start - tile * aligned_units
    last = tl.minimum(first + end - unit, units_of_row)
    first_page = begins[1] + tl.maximum(first - num_sinks, 0)
    last_page = begins[1] + tl.minimum(last - num_sinks, num_paged)
    if rows[3].body is not None:
        last_page = tl.where(first_page < last_page, last_page, 0)  # no id is read where there is no page
    first_tail = tl.maximum(first - num_sinks - num_paged, 0)
    num_runs = tl.maximum(tl.minimum(last, num_sinks) - first, 0), tl.maximum(last - num_sinks - num_paged - first_tail, 0)
    tail_token = (begins[1] + num_paged) * LAYOUT.page_size
    return Part(
        row * num_tiles + tile + piece, row_start + (tile + 1) * aligned_units, row, tile // TILES, tile % TILES * PLAN.tile,
        seq_len, start, (first_page, last_page),
        (begins[0] + first, num_runs[0], begins[2] + first_tail, num_runs[1], tail_token),
    )  # fmt: skip


@triton.jit
def _store_partial(partial_ptr, partial_lse_ptr, number, state, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Store a partial result and its log-sum-exp."""
    offs_n = tl.arange(0, PLAN.block_n)
    offs_d = tl.arange(0, PLAN.channels)
    mask_n = offs_n < PLAN.tile
    place = number.to(tl.int64) * PLAN.tile + offs_n
    tl.store(partial_lse_ptr + place, log_sum_exp(state), mask_n)
    mask = mask_n[:, None] & (offs_d < LAYOUT.v_head_dim)[None, :]
    out = state.acc * (1.0 / state.l)[:, None]
    tl.store(partial_ptr + place[:, None] * LAYOUT.v_head_dim + offs_d[None, :], out, mask)


_NOT_SPECIALIZED = [
    "batch", "num_tiles", "sink_len", "num_tail_slots", "split_size", "few_programs", "stride_table",
    "stride_raw_table",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
_ANY_ADDRESS = ["table_ptr", "indptr_ptr", "seq_lens_ptr", "raw_table_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_decode_attention_kernel(
    partial_ptr,  # float32 [num_partials, tile, v_head_dim], rotated
    partial_lse_ptr,  # float32 [num_partials, tile], base 2
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
    num_programs = tl.num_programs(0)
    if PLAN.early_merge:
        gdc_launch_dependents()
    UNITS: tl.constexpr = PLAN.units
    rows = (seq_lens_ptr, num_quantized_ptr, sink_len, masking.windows)
    pieces, size, longer, split = plan(rows, batch, num_tiles, num_programs, few_programs, split_size, UNITS)
    for piece in range(tl.program_id(0), pieces, num_programs):
        unit = start_of_piece(piece, size, longer)
        end = start_of_piece(piece + 1, size, longer)
        while unit < end:
            part = _find_part(rows, unit, end, piece, batch, num_tiles, split, LAYOUT, PLAN)
            records = records_of(pages, part.head, table_ptr, indptr_ptr, part.row, stride_table)
            # Not in a branch, at whose end the compiler would wait for it.
            last_page = tl.where(part.span[0] < part.span[1], part.span[1], 0)
            page = load_page_id(records.ids_ptr, part.span[0], last_page, PLAN.ptx)
            q_row_ptr = q.ptr + part.row.to(tl.int64) * q.stride_token
            q_row_ptr += (part.head * PLAN.group + part.first_head).to(tl.int64) * q.stride_head
            num_heads = tl.minimum(PLAN.group - part.first_head, PLAN.tile)
            loaded = load_query(q_row_ptr, q.stride_head, num_heads, LAYOUT, PLAN)
            matrix = rotation_matrix(part.row, LAYOUT, PLAN)
            if part.span[0] < part.span[1]:
                prefetch(records.ptr + page.to(tl.int64) * pages.stride_page, LAYOUT.page_bytes, "L2", PLAN.ptx)
            planes, q_factor = rotate_query(loaded, matrix, LAYOUT, PLAN)
            q_factor = q_factor * masking.scores.scale
            sink = sink_of(sink_len, part.row, part.row >= 0)
            seen = (part.start - sink, part.seq_len - sink)
            state = new_state(PLAN.block_n, PLAN.channels)
            state = attend_pages_once(state, planes, q_factor, masking, records, page, part.span, seen, LAYOUT, PLAN)
            if raw is not None:
                num_runs = part.runs[1] + part.runs[3]
                if num_runs > 0:
                    state = attend_raw_once(
                        state, planes, q_factor, masking, of_head(raw, part.head),
                        raw_table_ptr + part.row.to(tl.int64) * stride_raw_table,
                        Runs(
                            part.runs[0], part.runs[1], part.runs[2], part.runs[3], part.runs[4],
                            tl.cdiv(sink, LAYOUT.page_size), num_tail_slots,
                        ),
                        (first_of_sink(part.start, masking.windows), tl.minimum(part.seq_len, sink)), seen, LAYOUT, PLAN,
                    )  # fmt: skip
            _store_partial(partial_ptr, partial_lse_ptr, part.number, state, LAYOUT, PLAN)
            unit = part.next_unit


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
    return DecodePlan(
        group=group,
        tile=configs.head_tiles(group, 1)[0],
        block_n=configs.HEAD_TILE,
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
    partial: torch.Tensor, partial_lse: torch.Tensor, q: torch.Tensor, mask: Mask, work: Work, config: configs.DecodeConfig
) -> None:
    """Attend to the pieces of a decode call; nothing is checked."""
    cache, num_q_heads = work.cache, q.shape[1]
    layout, raw_dtype = cache.layout, q.dtype if cache.raw_pages is None else cache.raw_pages.dtype
    on(q, _kvarn_decode_attention_kernel)[(work.num_programs,)](
        partial,
        partial_lse,
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
