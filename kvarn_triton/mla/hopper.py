"""The kernel of latent attention for compute capability 9.0: warps with work of their own, products of warp groups.

A program has a tile of query rows, (query token, head), of one sequence, and one split of its tokens, 64 at a time. Tiles of 16
rows are computed by columns (`hopper_columns`), those of 64 by rows (`hopper_tile`). What comes out is that of `decode_kernel`,
but for rounding. The kernel is written in Gluon, because Triton gives no warps work of their own.

Grid: (program,), tiles of a split next to each other. Bytes moved: each record once per tile, of which others come from the L2
cache; partial results.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import on
from .cache import LatentCache
from .config import HopperPlan
from .decode_kernel import ANY_ADDRESS, NOT_SPECIALIZED
from .hopper_blocks import LATENTS, STEP, describe
from .hopper_columns import attend_columns
from .hopper_tile import attend_tile


@gluon.jit
def _share(seq_len, num_quantized, num_sink_pages, split, num_splits, LAYOUT: gl.constexpr):
    """Return the blocks of a split: (first, how many) of quantized pages, then (first, how many) of the sink and of the tail.

    `num_quantized` is that of the body's pages, and more than there are without raw ones.
    """
    BLOCKS: gl.constexpr = LAYOUT.page_size // STEP
    num_blocks = gl.cdiv(gl.maximum(seq_len, 0), STEP)
    share = num_blocks // num_splits
    rest = num_blocks % num_splits
    first = split * share + gl.minimum(split, rest)
    last = first + share + (split < rest).to(gl.int32)
    first_body = num_sink_pages * BLOCKS
    end = gl.minimum(first_body + gl.minimum(gl.maximum(num_quantized, 0), num_blocks) * BLOCKS, last)
    first_page = gl.maximum(first, first_body)
    first_tail = gl.maximum(first_page, end)
    in_sink = gl.maximum(gl.minimum(last, first_body) - first, 0)
    return first_page, gl.maximum(end - first_page, 0), first, in_sink, first_tail, gl.maximum(last - first_tail, 0)


@gluon.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=ANY_ADDRESS)
def _kvarn_mla_hopper_kernel(
    out_ptr,  # float32 [num_splits, rows, 512], rotated; rows are (sequence, query token, head)
    lse_ptr,  # float32 [num_splits, rows], base 2
    q_ptr,  # float16 [rows, 576], rotated
    factor_ptr,  # float32 [rows]
    codes_desc,  # of pages, as `describe` returns them: None for tiles of 64 rows
    params_desc,
    rope_desc,
    pages,  # uint8 [num_pages, page_bytes] and its stride
    raw,  # float16 [num_raw_pages, page_size, 576] and its strides, or None
    table_ptr,  # int32 [batch, max_pages]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots], or None
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch], or None
    num_queries,  # query tokens of a sequence
    num_heads,
    num_splits,
    num_sink_pages,
    num_tail_slots,
    stride_table,
    stride_raw_table,
    LAYOUT: gl.constexpr,
    PLAN: gl.constexpr,
):
    rows = num_queries * num_heads
    tiles = gl.cdiv(rows, PLAN.rows)
    split = gl.program_id(0) // tiles % num_splits
    sequence = (gl.program_id(0) // tiles // num_splits).to(gl.int64)
    first_row = gl.program_id(0) % tiles * PLAN.rows
    place = sequence * rows + first_row
    result = split.to(gl.int64) * (gl.num_programs(0) // tiles // num_splits) * rows + place
    num_rows = gl.minimum(rows - first_row, PLAN.rows)
    seq_len = gl.load(seq_lens_ptr + sequence)
    num_quantized = gl.maximum(seq_len, 0)
    if num_quantized_ptr is not None:
        num_quantized = gl.load(num_quantized_ptr + sequence)
    share = _share(seq_len, num_quantized, num_sink_pages, split, num_splits, LAYOUT)
    count = share[1] + share[3] + share[5]
    if raw is None:
        count = share[1]
    gdc_launch_dependents()
    gdc_wait()
    if count > 0:
        first_body = num_sink_pages * (LAYOUT.page_size // STEP)
        num_ids = gl.cdiv(share[0] + share[1], LAYOUT.page_size // STEP) - num_sink_pages
        paged = (table_ptr + sequence * stride_table, share[0], share[1], first_body, num_ids)
        source = ()
        if raw is not None:
            ids_ptr = raw_table_ptr + sequence * stride_raw_table
            source = (raw[0], raw[1], raw[2], ids_ptr, num_sink_pages, num_tail_slots, seq_len)
        work = (share[0], share[1], share[2], share[3], share[4], count)
        tile = (place, num_rows, first_row, num_heads, seq_len - num_queries)
        pointers = (q_ptr, factor_ptr, out_ptr + result * LATENTS, lse_ptr + result)
        if PLAN.rows == 16:
            attend_columns(pointers, tile, (codes_desc, params_desc, rope_desc, pages), source, paged, work, LAYOUT, PLAN)
        else:
            attend_tile(pointers, tile, (params_desc, rope_desc, pages), source, paged, work, LAYOUT, PLAN)
    else:
        NOTHING: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        row = gl.arange(0, PLAN.rows, NOTHING)
        gl.store(lse_ptr + result + row, gl.full((PLAN.rows,), float("-inf"), gl.float32, NOTHING), row < num_rows)


def launch_mla_hopper(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    queries: tuple[torch.Tensor, torch.Tensor],
    cache: LatentCache,
    shape: tuple[int, int],
    plan: HopperPlan,
) -> None:
    """Do what `launch_mla_splits` does; nothing is checked."""
    num_queries, num_heads = shape
    num_splits = partial.shape[0]
    tiles = -(-num_queries * num_heads // plan.rows)
    raw, raw_table = cache.raw_pages, cache.raw_table
    # No memory has no descriptor; nothing is read of a pool of no pages.
    pages = cache.pages if len(cache.pages) else cache.pages.new_empty(1, cache.layout.page_bytes)
    on(partial, _kvarn_mla_hopper_kernel)[(tiles * num_splits * cache.batch,)](
        partial,
        partial_lse,
        *queries,
        *describe(pages, cache.layout, plan.rows == 16),
        (pages, pages.stride(0)),
        None if raw is None else (raw, *raw.stride()[:2]),
        cache.block_table,
        raw_table,
        cache.seq_lens,
        cache.num_quantized,
        num_queries,
        num_heads,
        num_splits,
        cache.num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - cache.num_sink_pages,
        cache.block_table.stride(0),
        0 if raw_table is None else raw_table.stride(0),
        LAYOUT=cache.layout,
        PLAN=plan,
        num_warps=4,
        enable_fp_fusion=True,
        launch_pdl=True,
    )
