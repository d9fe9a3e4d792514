"""The kernel of latent attention for compute capability 9.0: products by warp groups, latents dequantized by other warps.

A program has a tile of query rows, (query token, head), of one sequence, and one split of its tokens, 64 at a time. Two warps
copy what belongs to a block of tokens into shared memory, eight dequantize its latents, to float16 (`hopper_latents`), four
compute the weights of its tokens, and four sum its latents by these (`hopper_rows`), each the block that the ones before have
left. Tokens are the rows of the product with queries, and channels those of the product with weights: 16 query rows are 16
columns, and none is padding. The arithmetic is that of `decode_kernel` (`rows`). The kernel is written in Gluon, because Triton
gives no warps work of their own.

Grid: (program,), tiles of a split next to each other. Bytes moved: each record once per tile, of which others come from the L2
cache; partial results.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..launch import on
from .cache import LatentCache
from .config import HopperPlan
from .hopper_latents import STEP, copy_blocks, copy_sizes, describe, produce
from .hopper_rows import LATENTS, ROPE, barrier, load_queries, scores, sums


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    """Return barriers that one arrival completes."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def _blocks(codes_desc, params_desc, rope_desc, PLAN: gl.constexpr):
    """Return memory for blocks: latents as operands, rotary channels, codes, parameters; sizes, norms, exponents of tokens."""
    OPERANDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    VECTORS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    latents = gl.allocate_shared_memory(gl.float16, [PLAN.stages, STEP, LATENTS], OPERANDS)
    ropes = gl.allocate_shared_memory(gl.float16, [PLAN.ropes] + rope_desc.block_type.shape, rope_desc.layout)
    codes = gl.allocate_shared_memory(gl.int32, [PLAN.ring] + codes_desc.block_type.shape, codes_desc.layout)
    params = gl.allocate_shared_memory(gl.int32, [PLAN.ring] + params_desc.block_type.shape, params_desc.layout)
    sizes = gl.allocate_shared_memory(gl.float32, [PLAN.ropes, STEP], VECTORS)
    norms = gl.allocate_shared_memory(gl.float32, [PLAN.ropes, STEP], VECTORS)
    exponents = gl.allocate_shared_memory(gl.float32, [PLAN.ropes, STEP], VECTORS)
    return (latents, ropes, codes, params), (sizes, norms, exponents)


@gluon.jit
def _tile(PLAN: gl.constexpr):
    """Return memory for a tile: queries, their rotary channels, the largest scores of warps; weights, factors of two blocks."""
    OPERANDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=PLAN.rows * 2, element_bitwidth=16, rank=2)
    queries = gl.allocate_shared_memory(gl.float16, [1, PLAN.rows, LATENTS], OPERANDS)
    rope_queries = gl.allocate_shared_memory(gl.float16, [1, PLAN.rows, ROPE], OPERANDS)
    largest = gl.allocate_shared_memory(gl.float32, [4, PLAN.rows], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    weights = gl.allocate_shared_memory(gl.float16, [2, STEP, PLAN.rows], WEIGHTS)
    factors = gl.allocate_shared_memory(gl.float32, [2, PLAN.rows], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return (queries, rope_queries, largest), (weights, factors)


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


_NOT_SPECIALIZED = [
    "num_queries", "num_heads", "num_splits", "num_sink_pages", "num_tail_slots", "stride_table", "stride_raw_table",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
_ANY_ADDRESS = ["lse_ptr", "factor_ptr", "table_ptr", "raw_table_ptr", "seq_lens_ptr", "num_quantized_ptr"]


@gluon.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_mla_hopper_kernel(
    out_ptr,  # float32 [num_splits, rows, 512], rotated; rows are (sequence, query token, head)
    lse_ptr,  # float32 [num_splits, rows], base 2
    q_ptr,  # float16 [rows, 576], rotated
    factor_ptr,  # float32 [rows]
    codes_desc,  # of pages, as `describe` returns them
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
        memory, vectors = _blocks(codes_desc, params_desc, rope_desc, PLAN)
        own, weights = _tile(PLAN)
        load_queries(q_ptr, place, num_rows, own[0].index(0), own[1].index(0), PLAN.rows)
        full, free = _barriers(PLAN.stages), _barriers(PLAN.stages)
        rope_full, rope_free, sizes_full = _barriers(PLAN.ropes), _barriers(PLAN.ropes), _barriers(PLAN.ropes)
        codes_full, codes_free = _barriers(PLAN.ring), _barriers(PLAN.ring)
        handed = (weights[0], weights[1], _barriers(2), _barriers(2))
        fence_async_shared()
        barrier()
        first_body = num_sink_pages * (LAYOUT.page_size // STEP)
        num_ids = gl.cdiv(share[0] + share[1], LAYOUT.page_size // STEP) - num_sink_pages
        paged = (table_ptr + sequence * stride_table, share[0], share[1], first_body, num_ids)
        source = ()
        if raw is not None:
            ids_ptr = raw_table_ptr + sequence * stride_raw_table
            source = (raw[0], raw[1], raw[2], ids_ptr, num_sink_pages, num_tail_slots, seq_len)
        work = (share[0], share[1], share[2], share[3], share[4], count)
        bars = (full, free, rope_full, rope_free, sizes_full)
        copied = (codes_full, codes_free, rope_full, rope_free)
        operands = (own[0], own[1], own[2], factor_ptr, lse_ptr + result)
        tile = (place, num_rows, first_row, num_heads, seq_len - num_queries)
        gl.warp_specialize(
            [
                (sums, (out_ptr + result * LATENTS, num_rows, memory[0], bars, handed, count, PLAN)),
                (scores, (operands, (memory[0], memory[1], vectors), bars, handed, tile, work, PLAN)),
                (produce, (memory, vectors, bars, (codes_full, codes_free), source, work, LAYOUT, PLAN)),
                (copy_blocks, ((codes_desc, params_desc, rope_desc), memory, copied, paged, LAYOUT)),
                (copy_sizes, (vectors, sizes_full, rope_free, pages, paged, LAYOUT)),
            ],
            [4, PLAN.producers, 1, 1],
            [PLAN.registers, PLAN.producer_registers, 24, 24],
        )
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
    on(partial, _kvarn_mla_hopper_kernel)[(tiles * num_splits * cache.batch,)](
        partial,
        partial_lse,
        *queries,
        *describe(cache.pages, cache.layout),
        (cache.pages, cache.pages.stride(0)),
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
