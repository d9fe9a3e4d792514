"""The first kernel of a decode call: attend to pieces of the work (`schedule`), one partial result for each part of a piece.

A program attends with a tile of up to 8 query heads to a run of consecutive units of one sequence, or to the end of one run and
the start of the next. Grid: (program,), as many as the GPU holds. Bytes moved: every record byte once for each tile, plus
4 * (v_head_dim + 1) bytes per query head and partial result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import configs, gpu
from ..launch import on
from ..layout import PageLayout, fields_per_byte
from ..paging import ids_of_row, load_page_id, prefetch
from ..tile.arithmetic import LOG2E
from .folded import attend_quantized
from .query import load_query, rotate_query
from .raw import attend_raw
from .schedule import Work, find_row, plan, row_units, start_of_piece

_NOT_SPECIALIZED = [
    "batch", "num_tiles", "sink_len", "num_sink_pages", "num_tail_slots", "window", "split_size", "few_programs",
    "stride_table", "stride_raw_table",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
_ANY_ADDRESS = ["table_ptr", "kv_indptr_ptr", "seq_lens_ptr", "raw_table_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_decode_attention_kernel(
    partial_ptr,  # float32 [num_partials, TILE, v_head_dim], rotated
    partial_lse_ptr,  # float32 [num_partials, TILE], base 2
    q_ptr,  # [batch, num_q_heads, head_dim]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    kv_indptr_ptr,  # int32 [batch + 1]; unused if not CSR
    seq_lens_ptr,  # int32 [batch]
    raw_pages_ptr,  # [num_raw_pages, 2, num_kv_heads, page_size, raw_head_dim]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    num_quantized_ptr,  # int32 [batch]
    qk_scale,  # sm_scale * log2(e)
    cap,  # soft cap of the scores, times log2(e); unused if not HAS_CAP
    batch,
    num_tiles,  # of query heads: num_kv_heads * ceil(GROUP / TILE)
    sink_len,
    num_sink_pages,
    num_tail_slots,
    window,
    split_size,
    few_programs,
    stride_q_batch,
    stride_q_head,
    stride_pages_page,
    stride_pages_head,
    stride_table,
    stride_raw_page,
    stride_raw_half,
    stride_raw_head,
    stride_raw_token,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    TILE: tl.constexpr,  # query heads of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # bytes of a key, padded to a power of two of at least 32
    CHANNELS: tl.constexpr,  # channels of a value, padded to a power of two
    BLOCK_T: tl.constexpr,  # quantized tokens of one product
    BLOCK_D: tl.constexpr,  # channels of one product with values
    UNITS: tl.constexpr,
    CSR: tl.constexpr,
    HAS_CAP: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    QUERY_OPERAND: tl.constexpr,
    RAW_OPERAND: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
):
    num_programs = tl.num_programs(0)
    if EARLY_MERGE:
        gdc_launch_dependents()
    rows = (seq_lens_ptr, num_quantized_ptr, sink_len, window)
    pieces, size, longer, split = plan(rows, batch, num_tiles, num_programs, few_programs, split_size, UNITS)
    align = tl.maximum(split, 1)
    TILES: tl.constexpr = triton.cdiv(GROUP, TILE)
    for piece in range(tl.program_id(0), pieces, num_programs):
        unit = start_of_piece(piece, size, longer)
        end = start_of_piece(piece + 1, size, longer)
        while unit < end:
            row, row_start = find_row(rows, unit, batch, num_tiles, split, UNITS)
            seq_len, start, begins, counts = row_units(rows, row, row < batch, UNITS)
            num_sinks, num_paged, num_tails = counts
            units_of_row = num_sinks + num_paged + num_tails
            aligned_units = tl.cdiv(units_of_row, align) * align
            tile = (unit - row_start) // aligned_units
            head = tile // TILES
            first_head = tile % TILES * TILE
            first = (unit - row_start) % aligned_units
            last = tl.minimum(first + end - unit, units_of_row)

            # Both here, so that what they are made of needs no registers in the loops below.
            part = row * num_tiles + tile + piece
            next_unit = row_start + (tile + 1) * aligned_units

            pages_row_ptr = pages_ptr + head.to(tl.int64) * stride_pages_head
            table_row_ptr = ids_of_row(table_ptr, kv_indptr_ptr, row, stride_table, CSR)
            first_page = begins[1] + tl.maximum(first - num_sinks, 0)
            last_page = begins[1] + tl.minimum(last - num_sinks, num_paged)
            if UNITS.has_window:
                last_page = tl.where(first_page < last_page, last_page, 0)  # no id is read where there is no page
            q_row_ptr = q_ptr + row.to(tl.int64) * stride_q_batch + (head * GROUP + first_head).to(tl.int64) * stride_q_head
            loaded = load_query(
                q_row_ptr, stride_q_head, tl.minimum(GROUP - first_head, TILE), BLOCK_N, BLOCK_K, LAYOUT, K_FIELDS
            )
            page = tl.zeros((), tl.int32)
            if first_page < last_page:
                page = load_page_id(table_row_ptr, first_page, last_page, PTX)
                prefetch(pages_row_ptr + page.to(tl.int64) * stride_pages_page, LAYOUT.page_bytes, "L2", PTX)
            planes, q_factor = rotate_query(loaded, BLOCK_N, BLOCK_K, LAYOUT, K_FIELDS, QUERY_OPERAND)
            q_factor = q_factor * qk_scale
            m_i = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            l_i = tl.zeros((BLOCK_N,), tl.float32)
            acc = tl.zeros((BLOCK_N, CHANNELS), tl.float32)
            body_visible = (start - sink_len, seq_len - sink_len)
            acc, m_i, l_i = attend_quantized(
                acc, m_i, l_i, planes, q_factor,
                pages_row_ptr, table_row_ptr, stride_pages_page, page, first_page, last_page, body_visible, cap,
                LAYOUT, BLOCK_T, BLOCK_D, K_FIELDS, V_FIELDS, OPERAND, PTX, NUM_STAGES, UNITS.has_window, HAS_CAP,
            )  # fmt: skip
            if UNITS.has_raw:
                first_tail = tl.maximum(first - num_sinks - num_paged, 0)
                acc, m_i, l_i = attend_raw(
                    acc, m_i, l_i, planes, q_factor,
                    raw_pages_ptr + head.to(tl.int64) * stride_raw_head, raw_table_ptr + row.to(tl.int64) * stride_raw_table,
                    stride_raw_page, stride_raw_half, stride_raw_token,
                    begins[0] + first, tl.maximum(tl.minimum(last, num_sinks) - first, 0),
                    begins[2] + first_tail, tl.maximum(last - num_sinks - num_paged - first_tail, 0),
                    (begins[1] + num_paged) * LAYOUT.page_size, num_sink_pages, num_tail_slots,
                    (start, tl.minimum(seq_len, sink_len)), body_visible, cap,
                    LAYOUT, UNITS.raw_block, K_FIELDS, RAW_OPERAND, PTX, NUM_STAGES, UNITS.has_window, HAS_CAP,
                )  # fmt: skip

            offs_n = tl.arange(0, BLOCK_N)
            offs_d = tl.arange(0, CHANNELS)
            mask_n = offs_n < TILE
            place = part.to(tl.int64) * TILE + offs_n
            tl.store(partial_lse_ptr + place, m_i + tl.log2(l_i), mask_n)
            mask = mask_n[:, None] & (offs_d < LAYOUT.v_head_dim)[None, :]
            tl.store(partial_ptr + place[:, None] * LAYOUT.v_head_dim + offs_d[None, :], acc * (1.0 / l_i)[:, None], mask)
            unit = next_unit


def launch_decode_pieces(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    layout: PageLayout,
    raw_pages: torch.Tensor | None,
    raw_table: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    sm_scale: float | None,
    soft_cap: float | None,
    work: Work,
    config: configs.DecodeConfig,
) -> None:
    """Attend to the pieces of a decode call; nothing is checked."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = pages.shape[1]
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    k_fields, v_fields = fields_per_byte(layout.k_bits), fields_per_byte(layout.v_bits)
    channels = triton.next_power_of_2(layout.v_head_dim)
    table = kv_indices if block_table is None else block_table
    assert table is not None
    has_raw = raw_pages is not None
    raw = raw_pages if raw_pages is not None else q
    num_sink_pages = -(-work.sink_len // layout.page_size)
    on(q, _kvarn_decode_attention_kernel)[(work.num_programs,)](
        partial,
        partial_lse,
        q,
        pages,
        table,
        work.seq_lens if kv_indptr is None else kv_indptr,
        work.seq_lens,
        raw,
        table if raw_table is None else raw_table,
        work.seq_lens if work.num_quantized is None else work.num_quantized,
        (head_dim**-0.5 if sm_scale is None else sm_scale) * LOG2E.value,
        (soft_cap or 0.0) * LOG2E.value,
        batch,
        num_tiles,
        work.sink_len,
        num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - num_sink_pages,
        work.window or 0,
        work.split_size,
        work.few_programs,
        q.stride(0),
        q.stride(1),
        pages.stride(0),
        pages.stride(1),
        0 if block_table is None else block_table.stride(0),
        raw.stride(0) if has_raw else 0,
        raw.stride(1) if has_raw else 0,
        raw.stride(2) if has_raw else 0,
        raw.stride(3) if has_raw else 0,
        0 if raw_table is None else raw_table.stride(0),
        LAYOUT=layout,
        GROUP=num_q_heads // num_kv_heads,
        TILE=tile,
        BLOCK_N=configs.HEAD_TILE,
        BLOCK_K=max(triton.next_power_of_2(head_dim) // k_fields, 32),
        CHANNELS=channels,
        BLOCK_T=config.block_t,
        BLOCK_D=min(config.block_d, channels),
        UNITS=work.units,
        CSR=block_table is None,
        HAS_CAP=soft_cap is not None,
        K_FIELDS=k_fields,
        V_FIELDS=v_fields,
        OPERAND=tl.float32 if q.dtype == torch.float32 else tl.int8,
        QUERY_OPERAND=configs.operand(q.dtype, q.dtype),
        RAW_OPERAND=configs.operand(q.dtype, raw.dtype),
        PTX=gpu.uses_ptx(),
        NUM_STAGES=config.num_stages,
        EARLY_MERGE=config.early_merge,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
    )
