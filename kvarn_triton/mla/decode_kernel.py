"""The kernel of latent attention: all query heads of a tile attend to a part of a sequence, some tokens at a time.

One program has a tile of query rows, (query token, head), of one sequence, and one split of its tokens. A block of tokens is
dequantized once, to float16, in rotated coordinates and without its norms; `rows` says what is done with it. Grid: (program,),
tiles of a split next to each other. Bytes moved: each record once per tile, of which the second comes from the L2 cache;
partial results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import gpu
from ..launch import on
from ..paging import load_page_id
from .cache import LatentCache
from .config import MLAConfig, mla_plan
from .latents import load_latents
from .rows import LATENTS, ROPE, advance, load_planes, load_queries, masked, new_rows, scores_of, store_rows


@triton.jit
def _attend_page(state, queries, record_ptr, token, first_seen, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the state of rows after some tokens of a record; `first_seen` is the last one that the first query token sees."""
    offs_r = tl.arange(0, ROPE)
    rope_ptr = (record_ptr + LAYOUT.rope_offset).to(tl.pointer_type(tl.float16))
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    planes = load_latents(record_ptr, token, LAYOUT, PLAN)
    rope = tl.load(rope_ptr + token[:, None] * ROPE + offs_r[None, :])
    norm = tl.load(norm_ptr + token).to(tl.float32)
    scores = masked(scores_of(queries, planes, rope, norm * gain), queries, token, first_seen)
    return advance(state, scores, norm, gain, planes)


@triton.jit
def _attend_raw(state, queries, token_ptr, stride_token, token, first_seen, num_valid, PLAN: tl.constexpr):
    """Return the state of rows after some tokens of a raw page, of which the first `num_valid` may be read."""
    place = (token * stride_token)[:, None]
    mask = (token < num_valid)[:, None]
    planes = load_planes(token_ptr, place, mask, PLAN.planes)
    rope = tl.load(token_ptr + LATENTS + place + tl.arange(0, ROPE)[None, :], mask, other=0.0)
    scores = scores_of(queries, planes, rope, tl.full((PLAN.block_t,), 1.0, tl.float32))
    return advance(state, masked(scores, queries, token, first_seen), None, None, planes)


NOT_SPECIALIZED = [
    "num_queries", "num_heads", "num_splits", "num_sink_pages", "num_tail_slots", "stride_table", "stride_raw_table",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
ANY_ADDRESS = ["lse_ptr", "factor_ptr", "table_ptr", "raw_table_ptr", "seq_lens_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED, do_not_specialize_on_alignment=ANY_ADDRESS)
def _kvarn_mla_decode_kernel(
    out_ptr,  # float32 [num_splits, rows, 512], rotated; rows are (sequence, query token, head)
    lse_ptr,  # float32 [num_splits, rows], base 2
    q_ptr,  # float16 [rows, 576], rotated
    factor_ptr,  # float32 [rows]
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
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    BLOCK_T: tl.constexpr = PLAN.block_t
    BLOCKS: tl.constexpr = LAYOUT.page_size // BLOCK_T
    G: tl.constexpr = LAYOUT.page_size
    STAGES: tl.constexpr = PLAN.num_stages
    rows = num_queries * num_heads
    tiles = tl.cdiv(rows, PLAN.block_m)
    split = tl.program_id(0) // tiles % num_splits
    sequence = tl.program_id(0) // tiles // num_splits
    row = tl.program_id(0) % tiles * PLAN.block_m + tl.arange(0, PLAN.block_m)
    mask = row < rows
    place = sequence.to(tl.int64) * rows + row
    batch = tl.num_programs(0) // tiles // num_splits
    result = split.to(tl.int64) * batch * rows + place
    seq_len = tl.load(seq_lens_ptr + sequence)
    num_blocks = tl.cdiv(tl.maximum(seq_len, 0), BLOCK_T)
    share, rest = num_blocks // num_splits, num_blocks % num_splits
    first = split * share + tl.minimum(split, rest)
    last = first + share + (split < rest).to(tl.int32)
    if PLAN.early:
        gdc_launch_dependents()
        gdc_wait()
    if first >= last:
        tl.store(lse_ptr + result, tl.full((PLAN.block_m,), float("-inf"), tl.float32), mask)
        return
    queries = load_queries(q_ptr, factor_ptr, place, row, mask, num_heads, PLAN.planes)
    first_seen = seq_len - num_queries
    first_body = num_sink_pages * BLOCKS
    end = last  # of blocks in quantized pages
    if num_quantized_ptr is not None:
        count = tl.maximum(tl.load(num_quantized_ptr + sequence), 0)
        end = tl.minimum(first_body + tl.minimum(count, num_blocks) * BLOCKS, last)
    state = new_rows(PLAN.block_m, PLAN.planes)
    ids_ptr = table_ptr + sequence.to(tl.int64) * stride_table
    num_ids = tl.cdiv(end, BLOCKS) - num_sink_pages
    for block in tl.range(tl.maximum(first, first_body), end, num_stages=STAGES):
        index = block // BLOCKS
        page = load_page_id(ids_ptr, index - num_sink_pages, num_ids, PLAN.ptx)
        record_ptr = pages[0] + page.to(tl.int64) * pages[1]
        token = block % BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
        state = _attend_page(state, queries, record_ptr, token, first_seen - index * G, LAYOUT, PLAN)
    if raw is not None:
        raw_ids_ptr = raw_table_ptr + sequence.to(tl.int64) * stride_raw_table
        in_sink = tl.maximum(tl.minimum(last, first_body) - first, 0)
        first_tail = tl.maximum(tl.maximum(first, first_body), end)
        for i in tl.range(0, in_sink + tl.maximum(last - first_tail, 0), num_stages=1):
            block = tl.where(i < in_sink, first + i, first_tail + i - in_sink)
            index = block // BLOCKS
            column = tl.where(i < in_sink, index, num_sink_pages + (index - num_sink_pages) % num_tail_slots)
            page = tl.maximum(tl.load(raw_ids_ptr + column), 0)
            token = block % BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
            token_ptr = raw[0] + page.to(tl.int64) * raw[1]
            start = index * G
            state = _attend_raw(state, queries, token_ptr, raw[2], token, first_seen - start, seq_len - start, PLAN)
    store_rows(out_ptr, lse_ptr, result, mask, state, PLAN.planes)


def launch_mla_splits(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    queries: tuple[torch.Tensor, torch.Tensor],
    cache: LatentCache,
    shape: tuple[int, int],
    config: MLAConfig,
) -> None:
    """Attend with rotated queries of `shape` (query tokens of a sequence, heads) to splits; nothing is checked.

    `partial` is float32 [num_splits, rows, 512], `partial_lse` [num_splits, rows]; without any token it is -inf, and nothing is
    written to `partial`.
    """
    layout, (num_queries, num_heads) = cache.layout, shape
    early = gpu.launches_early(partial.device)
    tiles = -(-num_queries * num_heads // config.block_m)
    raw, raw_table = cache.raw_pages, cache.raw_table
    on(partial, _kvarn_mla_decode_kernel)[(tiles * partial.shape[0] * cache.batch,)](
        partial,
        partial_lse,
        *queries,
        (cache.pages, cache.pages.stride(0)),
        None if raw is None else (raw, *raw.stride()[:2]),
        cache.block_table,
        raw_table,
        cache.seq_lens,
        cache.num_quantized,
        num_queries,
        num_heads,
        partial.shape[0],
        cache.num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - cache.num_sink_pages,
        cache.block_table.stride(0),
        0 if raw_table is None else raw_table.stride(0),
        LAYOUT=layout,
        PLAN=mla_plan(layout, config, gpu.uses_ptx(), early),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
        **({"launch_pdl": True} if early else {}),
    )
