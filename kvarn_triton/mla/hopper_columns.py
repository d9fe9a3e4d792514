"""The form of `hopper` for tiles of 16 query rows: operands of products from codes, in registers of warp groups.

Two warps copy what belongs to a block of tokens into shared memory (`hopper_copy`), four multiply the queries by the scales of
its page, and four compute weights from scores (`hopper_queries`), eight compute scores, and four sum latents (`hopper_rows`);
each does so for the block that the ones before have left. Tokens are the rows of the product with queries, and channels those
of the product with weights: 16 query rows are 16 columns, and none is padding.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..attention.hopper import barriers
from ..tile.gluon import barrier
from .hopper_blocks import ROPE, STEP
from .hopper_copy import copy_blocks, copy_sizes
from .hopper_queries import TILES, prepare, weigh
from .hopper_rows import score, sums


@gluon.jit
def _ring(codes_desc, params_desc, rope_desc, PLAN: gl.constexpr):
    """Return memory for blocks: slabs of codes, parameters, rotary channels; sizes, norms and exponents of tokens."""
    RING: gl.constexpr = PLAN.ring
    VECTORS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    codes = gl.allocate_shared_memory(gl.int16, [RING * PLAN.bits // 2] + codes_desc.block_type.shape, codes_desc.layout)
    params = gl.allocate_shared_memory(gl.int32, [RING] + params_desc.block_type.shape, params_desc.layout)
    ropes = gl.allocate_shared_memory(gl.float16, [RING] + rope_desc.block_type.shape, rope_desc.layout)
    sizes = gl.allocate_shared_memory(gl.float32, [RING, STEP], VECTORS)
    norms = gl.allocate_shared_memory(gl.float32, [RING, STEP], VECTORS)
    exponents = gl.allocate_shared_memory(gl.float32, [RING, STEP], VECTORS)
    return (codes, params, ropes), (sizes, norms, exponents)


@gluon.jit
def _tile(ROWS: gl.constexpr):
    """Return memory for a tile of rows: its queries, and of two blocks all that warps hand over."""
    OPERANDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=ROWS * 2, element_bitwidth=16, rank=2)
    SCORES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=ROWS * 4, element_bitwidth=32, rank=2)
    VECTORS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rope_queries = gl.allocate_shared_memory(gl.float16, [1, ROWS, ROPE], OPERANDS)
    queries = gl.allocate_shared_memory(gl.float16, [TILES, ROWS, STEP], OPERANDS)
    scaled = gl.allocate_shared_memory(gl.float16, [2 * TILES, ROWS, STEP], OPERANDS)
    biases = gl.allocate_shared_memory(gl.float32, [2, ROWS], VECTORS)
    largest = gl.allocate_shared_memory(gl.float32, [4, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    scores = gl.allocate_shared_memory(gl.float32, [2, STEP, ROWS], SCORES)
    weights = gl.allocate_shared_memory(gl.float16, [2, STEP, ROWS], WEIGHTS)
    factors = gl.allocate_shared_memory(gl.float32, [2, ROWS], VECTORS)
    return (queries, rope_queries), (scaled, biases, largest), scores, (weights, factors)


@gluon.jit
def _raw_tiles(HAS_RAW: gl.constexpr):
    """Return memory for the latents of a block of raw tokens; without such tokens next to none."""
    OPERANDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    COUNT: gl.constexpr = TILES if HAS_RAW else 1
    TOKENS: gl.constexpr = STEP if HAS_RAW else 8
    return gl.allocate_shared_memory(gl.float16, [COUNT, TOKENS, STEP], OPERANDS)


@gluon.jit
def attend_columns(pointers, tile, records, raw, paged, work, LAYOUT: gl.constexpr, PLAN: gl.constexpr):
    """Attend with a tile of rows to the blocks of a program."""
    q_ptr, factor_ptr, out_ptr, lse_ptr = pointers
    codes_desc, params_desc, rope_desc, pages = records
    ring, vectors = _ring(codes_desc, params_desc, rope_desc, PLAN)
    queries, own, scores_smem, weights = _tile(PLAN.rows)
    raw_tiles = _raw_tiles(len(raw) > 0)
    RING: gl.constexpr = PLAN.ring
    full, free, sizes_full = barriers(RING, 1), barriers(RING, 4), barriers(RING, 1)
    once, raw_free = barriers(2, 1), barriers(1, 2)
    scaled = (own[0], own[1], barriers(2, 1), barriers(2, 1))
    scores = (scores_smem, barriers(2, 1), barriers(2, 1))
    handed = (weights[0], weights[1], barriers(2, 1), barriers(2, 1))
    fence_async_shared()
    barrier()
    bars = (full, free, sizes_full, once.index(1), raw_free.index(0))
    given = (q_ptr, tile[0], tile[1], queries[0], queries[1], once.index(0), scaled)
    operands = (queries[1], scaled[0], scaled[1], factor_ptr, once.index(0), scaled[2], scaled[3])
    coded = (ring[0], ring[2], vectors, raw_tiles)
    gl.warp_specialize(
        [
            (sums, ((out_ptr, tile[1]), (ring[0], ring[1], ring[2], raw_tiles), bars, handed, work, PLAN)),
            (score, (0, operands, coded, bars, scores, tile, work, PLAN)),
            (score, (1, operands, coded, bars, scores, tile, work, PLAN)),
            (prepare, (given, (ring[1], ring[2], vectors, raw_tiles), bars, raw, work, LAYOUT, PLAN)),
            (weigh, ((lse_ptr, tile[1]), own[2], vectors, free, scores, handed, work[5], PLAN)),
            (copy_blocks, ((codes_desc, params_desc, rope_desc), ring, full, free, paged, LAYOUT)),
            (copy_sizes, (vectors, sizes_full, free, pages, paged, LAYOUT)),
        ],
        [4, 4, 4, 4, 1, 1],
        [80, 80, 80, 56, 24, 24],  # registers; 160 are left for those that sum
    )
