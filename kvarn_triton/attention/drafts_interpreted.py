"""The kernel of `hopper_drafts` in plain Triton, for Triton's interpreter: tests run what is around it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs
from ..launch import Rows, as_rows, on
from ..masking import Mask
from ..paging import sink_of, whole_pages
from .pages import attend_pages, records_of
from .prefill_plan import PrefillPlan, plan_of
from .query import rotate_planes
from .schedule import Tiles, find_tile
from .softmax import new_state
from .tiles import store_results, tile_of


@triton.jit
def _attend_interpreted_drafts(
    results, q, pages, masking, cu_seqlens_ptr, tables, lengths, sizes, LAYOUT: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    G: tl.constexpr = LAYOUT.page_size
    out, lse_ptr = results
    table_ptr, indptr_ptr, stride_table = tables
    seq_lens_ptr, num_quantized_ptr, sink_len = lengths
    batch, num_kv_heads, num_splits, num_tokens = sizes
    split, head = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits % num_kv_heads
    index, tokens = tl.program_id(0) // num_splits // num_kv_heads, (0, num_tokens)
    row, number = find_tile(cu_seqlens_ptr, index, batch, tokens, PLAN.group, PLAN.block_m)
    if row < batch:
        tile = tile_of(cu_seqlens_ptr, row, number, head, masking, PLAN)
        seq_len, sink = tl.load(seq_lens_ptr + row), sink_of(sink_len, row, row < batch)
        count = tl.maximum(seq_len, 0) // G + 1
        if num_quantized_ptr is not None:
            count = tl.maximum(tl.load(num_quantized_ptr + row), 0)
        count = whole_pages(count, seq_len, tile.num_tokens, sink, G, PLAN.apart)
        size = tl.cdiv(count, num_splits)
        first = tl.minimum(split * size, count)
        span = (first, tl.minimum(first + size, count))
        place = tile.token * q.stride_token + tile.q_head.to(tl.int64) * q.stride_head
        planes, factor = rotate_planes(q.ptr, place, tile.mask, LAYOUT, PLAN.k_fields, PLAN.query_operand, PLAN.operand)
        records = records_of(pages, head, table_ptr, indptr_ptr, row, stride_table)
        state = new_state(PLAN.block_m, PLAN.v_channels)
        shift = count * G  # all is seen
        queries = shift + tile.query, shift + tile.first_query, shift + tile.last_query
        factor = factor * masking.scores.scale
        state = attend_pages(state, planes, factor, masking, records, span, shift, queries, LAYOUT, PLAN)
        store_results(out, lse_ptr, None, state, tile, tokens, split, num_kv_heads * PLAN.group, 1, PLAN)


def launch_interpreted_drafts(
    out: Rows, lse: torch.Tensor, q: torch.Tensor, mask: Mask, tiles: Tiles, plan: PrefillPlan, count: int
) -> None:
    """Do what `hopper_drafts.launch_hopper_drafts` does."""
    cache = tiles.cache
    config = configs.config_of_form("registers", cache.layout, q.dtype, q.device, plan.block_m)
    flags = plan.apart, False, False
    registers = plan_of(cache.layout, (q.dtype, q.dtype, None), plan.group, flags, plan.ptx, config)
    on(q, _attend_interpreted_drafts)[(count * cache.num_kv_heads * tiles.num_splits,)](
        (out, lse),
        as_rows(q),
        cache.quantized,
        mask.masking(cache.layout.head_dim),
        tiles.cu_seqlens_q,
        (cache.ids, cache.kv_indptr, cache.tables()["stride_table"]),
        (cache.seq_lens, cache.num_quantized, cache.sinks),
        (cache.batch, cache.num_kv_heads, tiles.num_splits, len(tiles.tokens)),
        LAYOUT=cache.layout,
        PLAN=registers,
        enable_fp_fusion=True,
    )
