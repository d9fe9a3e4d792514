"""What two warp groups of `hopper_tile` do with a tile of 64 rows: scores, weights, and half of the channels each.

Both keep the sums of their half in registers. The first one computes scores and weights, which the second one takes from shared
memory.
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

from .hopper_blocks import LATENTS, ROPE, STEP, barrier, block_of
from .hopper_fill import PAIRS, load_queries, load_rope

ROWS = gl.constexpr(64)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
"""Products [rows, tokens] of a warp group."""
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""Products [rows, channels of a plane]."""
SLACK = gl.constexpr(8.0)
"""How much larger, base 2, a score is than the largest one before when sums are scaled: weights are at most 256."""


@gluon.jit
def _sum(half: gl.constexpr, acc, weights, latents, slot):
    """Begin to add the latents of a slot, times weights, to the sums of half of the channels."""
    low = warpgroup_mma(weights, latents.index(slot * 4 + half * 2), acc[0], is_async=True)
    return low, warpgroup_mma(weights, latents.index(slot * 4 + half * 2 + 1), acc[1], is_async=True)


@gluon.jit
def _score(queries, rope_queries, latents, ropes, bars, slot, i):
    """Begin to multiply a tile of queries by the latents of a slot, and by its rotary channels, as soon as they are there."""
    full, rope_full = bars
    phase = i // 2 & 1
    # Opaque: descriptors of memory that is the same in every step would all be kept, where no registers are left.
    zero = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)
    none = gl.zeros((ROWS, STEP), gl.float32, SCORES)
    mbarrier.wait(full.index(slot * 2), phase)
    found = warpgroup_mma(queries.index(zero + 0), latents.index(slot * 4).permute((1, 0)), none, use_acc=False, is_async=True)
    found = warpgroup_mma(queries.index(zero + 1), latents.index(slot * 4 + 1).permute((1, 0)), found, is_async=True)
    mbarrier.wait(rope_full, i & 1)
    mbarrier.wait(full.index(slot * 2 + 1), phase)
    keys = ropes.index(0).reshape((STEP, ROPE)).permute((1, 0))
    rope = warpgroup_mma(rope_queries.index(zero), keys, none, use_acc=False, is_async=True)
    found = warpgroup_mma(queries.index(zero + 2), latents.index(slot * 4 + 2).permute((1, 0)), found, is_async=True)
    found = warpgroup_mma(queries.index(zero + 3), latents.index(slot * 4 + 3).permute((1, 0)), found, is_async=True)
    return found, rope


@gluon.jit
def _weigh(found, rope, vectors, slot, block, seen, m):
    """Return the weights of products, the factor of what was summed before, the new m (`rows`), and whether any row's is new.

    m stays until a score is much larger: no weight is above 2**SLACK. One over the gain comes with it.
    """
    factor, last_seen, first_seen = seen
    TOKENS: gl.constexpr = gl.SliceLayout(0, SCORES)
    size = vectors[0].index(slot).load(TOKENS)
    scores = gl.fma(found, gl.zeros_like(found) + size[None, :], rope)
    if block * STEP + (STEP - 1) > first_seen:
        token = block * STEP + gl.arange(0, STEP, TOKENS)
        scores = gl.where(token[None, :] <= last_seen[:, None], scores, float("-inf"))
    exponent = vectors[2].index(slot).load(gl.SliceLayout(1, SCORES))
    largest = gl.max(scores, 1) * factor + exponent
    grown = (largest > m + SLACK) | (largest != largest)
    m_new = gl.where(grown, largest, m)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)  # rows that see nothing yet
    alpha = gl.exp2(m - origin)
    none = gl.zeros_like(scores)
    weights = gl.exp2(gl.fma(scores, none + factor[:, None], none + (exponent - origin)[:, None]))
    return weights, alpha, m_new, gl.exp2(-exponent), gl.max(grown.to(gl.int32), 0)


@gluon.jit
def _total(weights, inverse):
    """Return the sums of the weights of rows that each thread has, times one over a gain: [rows, lanes of a row]."""
    parts = gl.sum(gl.reshape(weights, (ROWS, STEP // 8, 4, 2)), 3)
    total = gl.sum(parts, 1)
    return total * gl.convert_layout(inverse, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _operand(weights, vectors, slot):
    """Return weights times norms."""
    norm = vectors[1].index(slot).load(gl.SliceLayout(0, SCORES))
    return (weights * norm[None, :]).to(gl.float16)


@gluon.jit
def _scaled(acc, factor):
    """Return sums times a factor of each row."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    return acc[0] * factor, acc[1] * factor


@gluon.jit
def _store(half: gl.constexpr, out_ptr, num_rows, acc):
    """Store the sums of half of the channels."""
    pairs = gl.join(acc[0], acc[1])
    sums = gl.reshape(pairs, (ROWS, LATENTS // 2))
    LAYOUT: gl.constexpr = sums.type.layout
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    channel = half * (LATENTS // 2) + gl.arange(0, LATENTS // 2, gl.SliceLayout(0, LAYOUT))
    gl.store(out_ptr + row[:, None] * LATENTS + channel[None, :], sums, (row < num_rows)[:, None])


@gluon.jit
def _hand_over(weights, alpha, weights_smem, factors, full):
    """Store the weights of a block, and the factor of what was summed before."""
    weights_smem.store(weights)
    factors.store(alpha)
    fence_async_shared()
    mbarrier.arrive(full, count=1)


@gluon.jit
def attend(pointers, tile, memory, handed, bars, work):
    """Compute scores and weights of all blocks of a program, and the sums of the first half of the channels."""
    q_ptr, factor_ptr, out_ptr, lse_ptr = pointers
    place, num_rows, first_row, num_heads, first_seen = tile
    queries, rope_queries, latents, ropes, vectors = memory
    weights_smem, factors, weights_full, weights_free, started = handed
    full, free, scored, rope_full = bars
    arrived = (full, rope_full)
    count = work[5]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    # Not 0, by which a score of -inf would be none.
    factor = gl.maximum(gl.abs(gl.load(factor_ptr + place + row, row < num_rows, other=0.0)), 1e-37)
    seen = (factor, first_seen + (first_row + row) // num_heads, first_seen)
    load_queries(0, q_ptr, factor_ptr, place, num_rows, queries)
    load_rope(q_ptr, factor_ptr, place, num_rows, rope_queries)
    fence_async_shared()
    barrier()
    mbarrier.wait(started, 0)
    acc = (gl.zeros((ROWS, PAIRS), gl.float32, SUMS), gl.zeros((ROWS, PAIRS), gl.float32, SUMS))
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    found, rope = _score(queries, rope_queries, latents, ropes, arrived, 0, 0)
    found, rope = warpgroup_mma_wait(0, [found, rope])
    mbarrier.arrive(scored, count=1)
    weights, alpha, m, inverse, _ = _weigh(found, rope, vectors, 0, block_of(0, work), seen, m)
    l_sum = _total(weights, inverse)
    _hand_over(_operand(weights, vectors, 0), alpha, weights_smem, factors, weights_full)
    for i in range(1, count):
        slot = i % 2
        acc = _sum(0, acc, weights_smem, latents, slot ^ 1)
        found, rope = _score(queries, rope_queries, latents, ropes, arrived, slot, i)
        acc = warpgroup_mma_wait(5, acc)
        mbarrier.arrive(free.index((slot ^ 1) * 2), count=1)
        found, rope = warpgroup_mma_wait(0, [found, rope])
        mbarrier.arrive(scored, count=1)
        weights, alpha, m, inverse, grown = _weigh(found, rope, vectors, slot, block_of(i, work), seen, m)
        part = gl.convert_layout(alpha, gl.SliceLayout(1, l_sum.type.layout), assert_trivial=True)
        l_sum = l_sum * part[:, None] + _total(weights, inverse)
        operand = _operand(weights, vectors, slot)
        if grown > 0:
            acc = _scaled(acc, alpha)
        mbarrier.wait(weights_free, (i & 1) ^ 1)
        _hand_over(operand, alpha, weights_smem, factors, weights_full)
    acc = _sum(0, acc, weights_smem, latents, (count - 1) % 2)
    total = gl.convert_layout(gl.sum(l_sum, 1), gl.SliceLayout(1, SCORES))
    inverse = 1.0 / gl.where(total > 0, total, 1.0)
    mbarrier.wait(weights_free, (count & 1) ^ 1)
    factors.store(inverse)
    mbarrier.arrive(weights_full, count=1)
    gl.store(lse_ptr + row, m + gl.log2(total), row < num_rows)
    acc = warpgroup_mma_wait(0, acc)
    _store(0, out_ptr, num_rows, _scaled(acc, inverse))


@gluon.jit
def attend_second(pointers, tile, memory, handed, bars, work):
    """Compute the sums of the second half of the channels, with weights of the other warp group.

    Those of a block run while the other group computes the weights of the next one, when it has no products.
    """
    q_ptr, factor_ptr, out_ptr, _ = pointers
    place, num_rows, _, _, _ = tile
    queries, _, latents, _, _ = memory
    weights_smem, factors, weights_full, weights_free, started = handed
    free, scored = bars[1], bars[2]
    count = work[5]
    load_queries(1, q_ptr, factor_ptr, place, num_rows, queries)
    fence_async_shared()
    mbarrier.arrive(started, count=1)
    acc = (gl.zeros((ROWS, PAIRS), gl.float32, SUMS), gl.zeros((ROWS, PAIRS), gl.float32, SUMS))
    for i in range(count):
        slot = i % 2
        mbarrier.wait(weights_full, i & 1)
        acc = _scaled(acc, factors.load(gl.SliceLayout(1, SCORES)))
        mbarrier.wait(scored, (i + 1) & 1, pred=i + 1 < count)
        acc = _sum(1, acc, weights_smem, latents, slot)
        acc = warpgroup_mma_wait(0, acc)
        mbarrier.arrive(weights_free, count=1)
        mbarrier.arrive(free.index(slot * 2 + 1), count=1)
    mbarrier.wait(weights_full, count & 1)
    _store(1, out_ptr, num_rows, _scaled(acc, factors.load(gl.SliceLayout(1, SCORES))))
