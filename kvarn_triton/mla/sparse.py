"""Latent attention to a list of tokens for each query token, instead of all: who is on it, and the kernel that attends.

`_kvarn_mla_find_tokens_kernel`: one program looks up where the tokens of one list are: those in quantized pages come to the
front of the list, raw ones to its end, and what is no token is dropped. Grid: (query token,). `_kvarn_mla_sparse_kernel`: one
program has a tile of the query heads of one query token, and one split of its list, whose tokens it gathers a block at a time.
Grid: (program,), tiles of a split next to each other. Bytes moved: codes and rotary channels of each token, and the scales and
zeros of its page, which is more; of neighbours from one page the L1 cache has them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import gpu
from ..launch import on
from ..paging import prefetch
from .cache import LatentCache
from .config import MLAConfig, mla_plan
from .latents import load_latents
from .rows import LATENTS, ROPE, advance, load_planes, load_queries, new_rows, scores_of, store_rows

_AT_ONCE = tl.constexpr(2048)
"""Entries of a list that are looked up together: lists of most models."""


@triton.jit(
    do_not_specialize=[
        "num_queries", "topk", "num_sink_pages", "num_tail_slots", "stride_list", "stride_table", "stride_raw_table",
    ],
    do_not_specialize_on_alignment=[
        "counts_ptr", "indices_ptr", "table_ptr", "raw_table_ptr", "seq_lens_ptr", "num_quantized_ptr",
    ],
)  # fmt: skip
def _kvarn_mla_find_tokens_kernel(
    slots_ptr,  # int32 [query tokens, topk], page * page_size + token: quantized ones from the front, raw ones from the end
    counts_ptr,  # int32 [query tokens, 2], of either
    indices_ptr,  # int32 [query tokens, topk], positions
    table_ptr,  # int32 [batch, max_pages]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots], or None
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch], or None
    num_queries,  # query tokens of a sequence
    topk,
    num_sink_pages,
    num_tail_slots,
    stride_list,
    stride_table,
    stride_raw_table,
    G: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    query = tl.program_id(0)
    sequence = query // num_queries
    last_seen = tl.load(seq_lens_ptr + sequence) - num_queries + query % num_queries
    ids_ptr = table_ptr + sequence.to(tl.int64) * stride_table
    list_ptr = indices_ptr + query.to(tl.int64) * stride_list
    slots_row_ptr = slots_ptr + query.to(tl.int64) * topk
    quantized, raw = topk * 0, topk * 0
    for first in range(0, topk, _AT_ONCE):
        place = first + tl.arange(0, _AT_ONCE)
        position = tl.load(list_ptr + place, place < topk, other=-1)
        listed = (position >= 0) & (position <= last_seen)
        index = position // G
        body = index - num_sink_pages
        if raw_table_ptr is None:
            in_page, is_raw = listed, listed & (position < 0)
        else:
            count = tl.load(num_quantized_ptr + sequence)
            in_page = listed & (body >= 0) & (body < count)
            is_raw = listed & ((body < 0) | (body >= count))
        # Both kinds are counted at once, in the halves of a word.
        each = in_page.to(tl.int32) + (is_raw.to(tl.int32) << 16)
        before = tl.cumsum(each, axis=0) - each
        offset = position % G
        page = tl.maximum(tl.load(ids_ptr + body, in_page, other=0), 0)
        if EARLY:
            gdc_wait()  # whoever waits for this kernel waits for the one before it, too
        tl.store(slots_row_ptr + quantized + (before & 0xFFFF), page * G + offset, in_page)
        if raw_table_ptr is not None:
            column = tl.where(body < 0, index, num_sink_pages + body % num_tail_slots)
            raw_ids_ptr = raw_table_ptr + sequence.to(tl.int64) * stride_raw_table
            raw_page = tl.maximum(tl.load(raw_ids_ptr + column, is_raw, other=0), 0)
            tl.store(slots_row_ptr + topk - 1 - raw - (before >> 16), raw_page * G + offset, is_raw)
        total = tl.sum(each, axis=0)
        quantized += total & 0xFFFF
        raw += total >> 16
    if EARLY:
        gdc_wait()
    tl.store(counts_ptr + query * 2, quantized)
    tl.store(counts_ptr + query * 2 + 1, raw)


@triton.jit
def _records(pages, slots_ptr, entry, G: tl.constexpr):
    """Return the records of entries of a list, and which token of a record each is."""
    slot = tl.load(slots_ptr + entry).to(tl.uint32)
    return pages[0] + (slot // G).to(tl.int64) * pages[1], (slot % G).to(tl.int32)


@triton.jit
def _prefetch_listed(pages, slots_ptr, entry, LAYOUT: tl.constexpr, PTX: tl.constexpr):
    """Start bringing the tokens of entries of a list into the L2 cache, and the scales of their pages."""
    record_ptr, token = _records(pages, slots_ptr, entry, LAYOUT.page_size)
    record_ptr, token = record_ptr[:, None], token[:, None]
    CODES: tl.constexpr = LAYOUT.k_codes_bytes // LAYOUT.page_size
    prefetch(record_ptr + LAYOUT.k_codes_offset + token * CODES, CODES, "L2", PTX)
    prefetch(record_ptr + LAYOUT.rope_offset + token * (2 * ROPE), 2 * ROPE, "L2", PTX)
    prefetch(record_ptr + LAYOUT.k_params_offset, LAYOUT.k_norm_offset - LAYOUT.k_params_offset, "L2", PTX)
    prefetch(record_ptr + LAYOUT.k_norm_offset, LAYOUT.page_bytes - LAYOUT.k_norm_offset, "L2", PTX)


@triton.jit
def _attend_listed(state, queries, records, listed, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the state of rows after tokens in quantized pages; those that are not listed have no weight."""
    record_ptr, token = records
    rope_ptr = (record_ptr + LAYOUT.rope_offset).to(tl.pointer_type(tl.float16))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    norm = tl.load((record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16)) + token).to(tl.float32)
    planes = load_latents(record_ptr[:, None], token, LAYOUT, PLAN)
    rope = tl.load(rope_ptr[:, None] + token[:, None] * ROPE + tl.arange(0, ROPE)[None, :])
    scores = scores_of(queries, planes, rope, norm * gain)
    return advance(state, tl.where(listed[None, :], scores, float("-inf")), norm, gain, planes)


@triton.jit
def _attend_listed_raw(state, queries, raw, slot, listed, G: tl.constexpr, PLAN: tl.constexpr):
    """Return the state of rows after raw tokens."""
    place = ((slot // G).to(tl.int64) * raw[1] + (slot % G).to(tl.int64) * raw[2])[:, None]
    planes = load_planes(raw[0], place, listed[:, None], PLAN.planes)
    rope = tl.load(raw[0] + LATENTS + place + tl.arange(0, ROPE)[None, :], listed[:, None], other=0.0)
    scores = scores_of(queries, planes, rope, tl.full((PLAN.block_t,), 1.0, tl.float32))
    return advance(state, tl.where(listed[None, :], scores, float("-inf")), None, None, planes)


@triton.jit(
    do_not_specialize=["topk", "num_heads", "num_splits"],
    do_not_specialize_on_alignment=["lse_ptr", "factor_ptr", "slots_ptr", "counts_ptr"],
)
def _kvarn_mla_sparse_kernel(
    out_ptr,  # float32 [num_splits, rows, 512], rotated; rows are (query token, head)
    lse_ptr,  # float32 [num_splits, rows], base 2
    q_ptr,  # float16 [rows, 576], rotated
    factor_ptr,  # float32 [rows]
    pages,  # uint8 [num_pages, page_bytes] and its stride
    raw,  # float16 [num_raw_pages, page_size, 576] and its strides, or None
    slots_ptr,  # int32 [query tokens, topk]
    counts_ptr,  # int32 [query tokens, 2]
    topk,
    num_heads,
    num_splits,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    BLOCK_T: tl.constexpr = PLAN.block_t
    STAGES: tl.constexpr = PLAN.num_stages
    tiles = tl.cdiv(num_heads, PLAN.block_m)
    split = tl.program_id(0) // tiles % num_splits
    query = (tl.program_id(0) // tiles // num_splits).to(tl.int64)
    queries_in_all = tl.num_programs(0) // tiles // num_splits
    head = tl.program_id(0) % tiles * PLAN.block_m + tl.arange(0, PLAN.block_m)
    mask = head < num_heads
    place = query * num_heads + head
    result = split.to(tl.int64) * queries_in_all * num_heads + place
    if PLAN.early:
        gdc_launch_dependents()
        gdc_wait()
    count, raw_count = tl.load(counts_ptr + query * 2), tl.load(counts_ptr + query * 2 + 1)
    quantized_blocks = tl.cdiv(count, BLOCK_T)
    num_blocks = quantized_blocks + tl.cdiv(raw_count, BLOCK_T)
    share, rest = num_blocks // num_splits, num_blocks % num_splits
    first = split * share + tl.minimum(split, rest)
    last = first + share + (split < rest).to(tl.int32)
    if first >= last:
        tl.store(lse_ptr + result, tl.full((PLAN.block_m,), float("-inf"), tl.float32), mask)
        return
    queries = load_queries(q_ptr, factor_ptr, place, head, mask, num_heads, PLAN.planes)
    state = new_rows(PLAN.block_m, PLAN.planes)
    list_ptr = slots_ptr + query * topk
    for block in tl.range(first, tl.minimum(last, quantized_blocks), num_stages=STAGES):
        entry = block * BLOCK_T + tl.arange(0, BLOCK_T)
        records = _records(pages, list_ptr, tl.minimum(entry, count - 1), LAYOUT.page_size)
        state = _attend_listed(state, queries, records, entry < count, LAYOUT, PLAN)
        if PLAN.ptx:
            _prefetch_listed(pages, list_ptr, tl.minimum(entry + BLOCK_T, count - 1), LAYOUT, PLAN.ptx)
    if raw is not None:
        for block in tl.range(tl.maximum(first, quantized_blocks), last, num_stages=1):
            entry = (block - quantized_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
            slot = tl.load(list_ptr + topk - 1 - tl.minimum(entry, raw_count - 1)).to(tl.uint32)
            state = _attend_listed_raw(state, queries, raw, slot, entry < raw_count, LAYOUT.page_size, PLAN)
    store_rows(out_ptr, lse_ptr, result, mask, state, PLAN.planes)


def launch_mla_sparse(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    queries: tuple[torch.Tensor, torch.Tensor],
    cache: LatentCache,
    indices: torch.Tensor,
    shape: tuple[int, int],
    config: MLAConfig,
) -> None:
    """Attend with rotated queries of `shape` (query tokens of a sequence, heads) to splits of lists; nothing is checked.

    `indices` is int32 [query tokens, topk]; the rest is as in `launch_mla_splits`.
    """
    layout, (num_queries, num_heads) = cache.layout, shape
    early = gpu.launches_early(partial.device)
    late = {"launch_pdl": True} if early else {}
    num_lists, topk = indices.shape
    slots, counts = (torch.empty(num_lists, n, dtype=torch.int32, device=partial.device) for n in (topk, 2))
    raw, raw_table = cache.raw_pages, cache.raw_table
    on(partial, _kvarn_mla_find_tokens_kernel)[(num_lists,)](
        slots,
        counts,
        indices,
        cache.block_table,
        raw_table,
        cache.seq_lens,
        cache.num_quantized,
        num_queries,
        topk,
        cache.num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - cache.num_sink_pages,
        indices.stride(0),
        cache.block_table.stride(0),
        0 if raw_table is None else raw_table.stride(0),
        G=layout.page_size,
        EARLY=early,
        num_warps=8,
        enable_fp_fusion=False,
        **late,
    )
    on(partial, _kvarn_mla_sparse_kernel)[(-(-num_heads // config.block_m) * partial.shape[0] * num_lists,)](
        partial,
        partial_lse,
        *queries,
        (cache.pages, cache.pages.stride(0)),
        None if raw is None else (raw, *raw.stride()[:2]),
        slots,
        counts,
        topk,
        num_heads,
        partial.shape[0],
        LAYOUT=layout,
        PLAN=mla_plan(layout, config, gpu.uses_ptx(), early),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
        **late,
    )
