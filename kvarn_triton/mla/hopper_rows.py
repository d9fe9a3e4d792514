"""What the warps of `hopper` that multiply do: weights of the tokens of a block, and sums of latents by these.

The warps that compute weights are a block ahead of those that sum. They hand over the weights, and the factor of what was
summed before, through shared memory; at the end the factor is one over the sum of all weights.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..mla_layout import LATENT_DIM, ROPE_DIM
from .hopper_latents import STEP

LATENTS = gl.constexpr(LATENT_DIM)
ROPE = gl.constexpr(ROPE_DIM)
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the name until Triton 3.6


@gluon.constexpr_function
def _products_layout(plan):
    """Return the layout of products of a group: [tokens, rows] with queries, and [channels, rows] with weights."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, plan.rows, 16])


@gluon.jit
def load_queries(q_ptr, place, num_rows, queries, rope_queries, ROWS: gl.constexpr):
    """Put the queries of a tile into shared memory; rows that are padding are 0."""
    LATENT_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    ROPE_ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LATENT_ROWS))
    source_ptr = q_ptr + (place + row)[:, None] * (LATENTS + ROPE)
    source_ptr += gl.arange(0, LATENTS, gl.SliceLayout(0, LATENT_ROWS))[None, :]
    queries.store(gl.load(source_ptr, (row < num_rows)[:, None], other=0.0))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ROPE_ROWS))
    source_ptr = q_ptr + LATENTS + (place + row)[:, None] * (LATENTS + ROPE)
    source_ptr += gl.arange(0, ROPE, gl.SliceLayout(0, ROPE_ROWS))[None, :]
    rope_queries.store(gl.load(source_ptr, (row < num_rows)[:, None], other=0.0))


@gluon.constexpr_function
def _largest_layout(plan):
    """Return the layout of the largest scores [4 warps, rows] that a thread loads: all of the rows that it has."""
    registers = [[0, 1], *([0, 8 << i] for i in range((plan.rows // 8).bit_length() - 1)), [1, 0], [2, 0]]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [4, plan.rows])


@gluon.jit
def _largest(scores, memory, PLAN: gl.constexpr):
    """Return the largest score of each row: those of the warps are exchanged at once, and each thread takes the largest."""
    ROWS: gl.constexpr = PLAN.rows
    memory.store(gl.max(gl.reshape(scores, (4, STEP // 4, ROWS)), 1))
    barrier()
    return gl.convert_layout(
        gl.max(memory.load(_largest_layout(PLAN)), 0), gl.SliceLayout(0, _products_layout(PLAN)), assert_trivial=True
    )  # fmt: skip


@gluon.jit
def _advance(products, vectors, factor, m, l_sum, visible, memory, PLAN: gl.constexpr):
    """Return the weights of a block [tokens, rows] for sums and alpha, the factor of older sums; then the new m and l.

    `visible` is where the block begins, the last token that each row sees, and the one that all see.
    """
    latent, rope = products
    TOKENS: gl.constexpr = gl.SliceLayout(1, latent.type.layout)
    sizes, norms, exponents = vectors
    start, last_seen, first_seen = visible
    size, norm, exponent = sizes.load(TOKENS), norms.load(TOKENS), exponents.load(TOKENS)
    scores = gl.fma(latent, size[:, None] + gl.zeros_like(latent), rope) * factor[None, :]
    if start + (STEP - 1) > first_seen:
        token = start + gl.arange(0, STEP, TOKENS)
        scores = gl.where(token[:, None] <= last_seen[None, :], scores, float("-inf"))
        norm = gl.where(token <= gl.max(last_seen, 0), norm, 0.0)
    scores += exponent[:, None]
    m_new = gl.maximum(m, _largest(scores, memory, PLAN))
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)  # rows that see nothing yet
    alpha = gl.exp2(m - origin)
    weights = gl.exp2(scores - origin[None, :])
    l_sum = l_sum * alpha[None, :] + weights * gl.exp2(-exponent)[:, None]
    return (weights * norm[:, None]).to(gl.float16), alpha, m_new, l_sum


@gluon.jit
def scores(operands, blocks, bars, handed, rows, work, PLAN: gl.constexpr):
    """Compute the weights of all blocks of a program for a tile of rows, and its log-sum-exp."""
    queries, rope_queries, largest, factor_ptr, lse_ptr = operands
    latents, ropes, vectors = blocks
    full, _, rope_full, rope_free, sizes_full = bars
    weights_smem, factors, weights_full, weights_free = handed
    place, num_rows, first_row, num_heads, first_seen = rows
    first_page, num_paged, first, in_sink, first_tail, count = work
    ROWS: gl.constexpr = PLAN.rows
    STAGES: gl.constexpr = latents.shape[0]
    ROPES: gl.constexpr = ropes.shape[0]
    LAYOUT: gl.constexpr = _products_layout(PLAN)
    row = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    factor = gl.load(factor_ptr + place + row, row < num_rows, other=0.0)
    last_seen = first_seen + (first_row + row) // num_heads
    none = gl.zeros((STEP, ROWS), gl.float32, LAYOUT)
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(0, LAYOUT))
    l_sum = none  # of the tokens of each thread
    for i in range(count):
        # Opaque, because descriptors of memory that is the same in every step would all be kept, where no registers are left.
        zero = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)
        stage = i % STAGES + zero
        slot = i % ROPES
        j = i - num_paged
        block = gl.where(j < 0, first_page + i, gl.where(j < in_sink, first + j, first_tail + j - in_sink))
        mbarrier.wait(rope_full.index(slot), i // ROPES & 1)
        rope = ropes.index(slot).reshape((STEP, ROPE))
        rope = warpgroup_mma(rope, rope_queries.index(zero).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        latent = warpgroup_mma(latents.index(stage), queries.index(zero).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(sizes_full.index(slot), i // ROPES & 1)
        latent, rope = warpgroup_mma_wait(0, [latent, rope])
        own = (vectors[0].index(slot), vectors[1].index(slot), vectors[2].index(slot))
        weights, alpha, m, l_sum = _advance(
            (latent, rope), own, factor, m, l_sum, (block * STEP, last_seen, first_seen), largest, PLAN
        )  # fmt: skip
        mbarrier.wait(weights_free.index(i % 2), (i // 2 & 1) ^ 1)
        weights_smem.index(i % 2).store(weights)
        factors.index(i % 2).store(alpha)
        fence_async_shared()
        mbarrier.arrive(weights_full.index(i % 2), count=1)
        mbarrier.arrive(rope_free.index(slot), count=1)
    total = gl.sum(l_sum, 0)
    mbarrier.wait(weights_free.index(count % 2), (count // 2 & 1) ^ 1)
    factors.index(count % 2).store(1.0 / gl.where(total > 0, total, 1.0))
    mbarrier.arrive(weights_full.index(count % 2), count=1)
    gl.store(lse_ptr + row, m + gl.log2(total), row < num_rows)


@gluon.jit
def sums(out_ptr, num_rows, latents, bars, handed, count, PLAN: gl.constexpr):
    """Sum the latents of all blocks of a program by their weights, and store the result of a tile of rows."""
    full, free = bars[0], bars[1]
    weights_smem, factors, weights_full, weights_free = handed
    ROWS: gl.constexpr = PLAN.rows
    STAGES: gl.constexpr = latents.shape[0]
    LAYOUT: gl.constexpr = _products_layout(PLAN)
    acc = gl.zeros((LATENTS, ROWS), gl.float32, LAYOUT)
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        mbarrier.wait(weights_full.index(i % 2), i // 2 & 1)
        acc = acc * factors.index(i % 2).load(gl.SliceLayout(0, LAYOUT))[None, :]
        acc = warpgroup_mma(latents.index(stage).permute((1, 0)), weights_smem.index(i % 2), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(free.index(stage), count=1)
        mbarrier.arrive(weights_free.index(i % 2), count=1)
    mbarrier.wait(weights_full.index(count % 2), count // 2 & 1)
    acc = acc * factors.index(count % 2).load(gl.SliceLayout(0, LAYOUT))[None, :]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    channel = gl.arange(0, LATENTS, gl.SliceLayout(1, LAYOUT))
    gl.store(out_ptr + row[None, :] * LATENTS + channel[:, None], acc, (row < num_rows)[None, :])
