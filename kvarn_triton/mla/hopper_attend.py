"""What two warp groups of `hopper` do with a tile of 64 rows: scores, weights, and half of the channels each.

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

from .hopper_fill import HALVES, LATENTS, PAIRS, ROPE, ROPES, ROWS, STEP, load_pairs, split_pairs

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
"""Products [rows, tokens] of a warp group."""
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""Products [rows, channels of a plane]."""
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # the name until Triton 3.6


@gluon.jit
def _load_queries(half: gl.constexpr, q_ptr, place, num_rows, queries):
    """Put half of the channels of a tile of queries into shared memory."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, HALVES))
    first_ptr = q_ptr + place * (LATENTS + ROPE) + half * (LATENTS // 2)
    planes = split_pairs(load_pairs(first_ptr, row * ((LATENTS + ROPE) // 2), row < num_rows))
    for byte in gl.static_range(2):
        queries.index(half * 2 + byte).store(planes[byte])


@gluon.jit
def _load_rope(q_ptr, place, num_rows, rope_queries):
    """Put the rotary channels of a tile of queries into shared memory."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ROPES))
    ptr = q_ptr + place * (LATENTS + ROPE) + LATENTS
    column = gl.arange(0, ROPE, gl.SliceLayout(0, ROPES))
    rope_queries.store(gl.load(ptr + (row * (LATENTS + ROPE))[:, None] + column[None, :], (row < num_rows)[:, None], other=0.0))


@gluon.jit
def _sum(half: gl.constexpr, acc, weights, latents, slot):
    """Begin to add the latents of a slot, times weights, to the sums of half of the channels."""
    low = warpgroup_mma(weights, latents.index(slot * 4 + half * 2), acc[0], is_async=True)
    return low, warpgroup_mma(weights, latents.index(slot * 4 + half * 2 + 1), acc[1], is_async=True)


@gluon.jit
def _score(queries, rope_queries, latents, ropes, full, slot, phase):
    """Begin to multiply a tile of queries by the latents of a slot, and by its rotary channels, as soon as they are there."""
    none = gl.zeros((ROWS, STEP), gl.float32, SCORES)
    mbarrier.wait(full.index(slot * 2), phase)
    found = warpgroup_mma(queries.index(0), latents.index(slot * 4).permute((1, 0)), none, use_acc=False, is_async=True)
    found = warpgroup_mma(queries.index(1), latents.index(slot * 4 + 1).permute((1, 0)), found, is_async=True)
    mbarrier.wait(full.index(slot * 2 + 1), phase)
    rope = warpgroup_mma(rope_queries, ropes.permute((1, 0)), none, use_acc=False, is_async=True)
    found = warpgroup_mma(queries.index(2), latents.index(slot * 4 + 2).permute((1, 0)), found, is_async=True)
    found = warpgroup_mma(queries.index(3), latents.index(slot * 4 + 3).permute((1, 0)), found, is_async=True)
    return found, rope


@gluon.jit
def _weigh(found, rope, vectors, slot, block, seen, m, l_sum):
    """Return weights float16 of products, the factor of what was summed before, and the new m and l (`rows`)."""
    factor, last_seen, first_seen = seen
    TOKENS: gl.constexpr = gl.SliceLayout(0, SCORES)
    size = vectors[0].index(slot).load(TOKENS)
    scores = gl.fma(found, gl.zeros_like(found) + size[None, :], rope) * factor[:, None]
    if block * STEP + (STEP - 1) > first_seen:
        token = block * STEP + gl.arange(0, STEP, TOKENS)
        scores = gl.where(token[None, :] <= last_seen[:, None], scores, float("-inf"))
    exponent = vectors[2].index(slot).load(gl.SliceLayout(1, SCORES))
    m_new = gl.maximum(m, gl.max(scores, 1) + exponent)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)  # rows that see nothing yet
    alpha = gl.exp2(m - origin)
    weights = gl.exp2(scores - (origin - exponent)[:, None])
    l_sum = l_sum * alpha + gl.sum(weights, 1) * gl.exp2(-exponent)
    norm = vectors[1].index(slot).load(TOKENS)
    # A norm that no row looks at may be anything.
    weights = gl.where(weights == 0.0, 0.0, weights * norm[None, :])
    return weights.to(gl.float16), alpha, m_new, l_sum


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
def _block_of(i, work):
    """Return which block of its sequence is block i of a program."""
    first_page, num_paged, first, in_sink, first_tail, _ = work
    j = i - num_paged
    return gl.where(j < 0, first_page + i, gl.where(j < in_sink, first + j, first_tail + j - in_sink))


@gluon.jit
def attend(pointers, tile, memory, handed, bars, work):
    """Compute scores and weights of all blocks of a program, and the sums of the first half of the channels."""
    q_ptr, factor_ptr, out_ptr, lse_ptr = pointers
    place, num_rows, first_row, num_heads, first_seen = tile
    queries, rope_queries, latents, ropes, vectors = memory
    weights_smem, factors, weights_full, weights_free, started = handed
    full, free, scored = bars
    count = work[5]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    factor = gl.load(factor_ptr + place + row, row < num_rows, other=0.0)
    seen = (factor, first_seen + (first_row + row) // num_heads, first_seen)
    _load_queries(0, q_ptr, place, num_rows, queries)
    _load_rope(q_ptr, place, num_rows, rope_queries)
    fence_async_shared()
    barrier()
    mbarrier.wait(started, 0)
    acc = (gl.zeros((ROWS, PAIRS), gl.float32, SUMS), gl.zeros((ROWS, PAIRS), gl.float32, SUMS))
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l_sum = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, SCORES))
    found, rope = _score(queries, rope_queries, latents, ropes, full, 0, 0)
    found, rope = warpgroup_mma_wait(0, [found, rope])
    mbarrier.arrive(scored, count=1)
    weights, alpha, m, l_sum = _weigh(found, rope, vectors, 0, _block_of(0, work), seen, m, l_sum)
    weights_smem.index(0).store(weights)
    factors.index(0).store(alpha)
    fence_async_shared()
    mbarrier.arrive(weights_full.index(0), count=1)
    for i in range(1, count):
        slot = i % 2
        acc = _sum(0, acc, weights_smem.index(slot ^ 1), latents, slot ^ 1)
        found, rope = _score(queries, rope_queries, latents, ropes, full, slot, i // 2 & 1)
        acc = warpgroup_mma_wait(5, acc)
        mbarrier.arrive(free.index((slot ^ 1) * 2), count=1)
        found, rope = warpgroup_mma_wait(0, [found, rope])
        mbarrier.arrive(scored, count=1)
        weights, alpha, m, l_sum = _weigh(found, rope, vectors, slot, _block_of(i, work), seen, m, l_sum)
        mbarrier.wait(weights_free.index(slot), (i // 2 & 1) ^ 1)
        weights_smem.index(slot).store(weights)
        factors.index(slot).store(alpha)
        fence_async_shared()
        mbarrier.arrive(weights_full.index(slot), count=1)
        acc = _scaled(acc, alpha)
    last = (count - 1) % 2
    acc = _sum(0, acc, weights_smem.index(last), latents, last)
    inverse = 1.0 / gl.where(l_sum > 0, l_sum, 1.0)
    mbarrier.wait(weights_free.index(last ^ 1), (count // 2 & 1) ^ 1)
    factors.index(last ^ 1).store(inverse)
    mbarrier.arrive(weights_full.index(last ^ 1), count=1)
    gl.store(lse_ptr + row, m + gl.log2(l_sum), row < num_rows)
    acc = warpgroup_mma_wait(0, acc)
    _store(0, out_ptr, num_rows, _scaled(acc, inverse))


@gluon.jit
def attend_second(pointers, tile, memory, handed, bars, work, LATE: gl.constexpr):
    """Compute the sums of the second half of the channels, with weights of the other warp group.

    Those of a block run while the other group computes the weights of the next one, when it has no products.
    """
    q_ptr, _, out_ptr, _ = pointers
    place, num_rows, _, _, _ = tile
    queries, _, latents, _, _ = memory
    weights_smem, factors, weights_full, weights_free, started = handed
    _, free, scored = bars
    count = work[5]
    _load_queries(1, q_ptr, place, num_rows, queries)
    fence_async_shared()
    mbarrier.arrive(started, count=1)
    acc = (gl.zeros((ROWS, PAIRS), gl.float32, SUMS), gl.zeros((ROWS, PAIRS), gl.float32, SUMS))
    for i in range(count):
        slot = i % 2
        mbarrier.wait(weights_full.index(slot), i // 2 & 1)
        acc = _scaled(acc, factors.index(slot).load(gl.SliceLayout(1, SCORES)))
        if LATE:
            mbarrier.wait(scored, (i + 1) & 1, pred=i + 1 < count)
        acc = _sum(1, acc, weights_smem.index(slot), latents, slot)
        acc = warpgroup_mma_wait(0, acc)
        mbarrier.arrive(weights_free.index(slot), count=1)
        mbarrier.arrive(free.index(slot * 2 + 1), count=1)
    last = count % 2
    mbarrier.wait(weights_full.index(last), count // 2 & 1)
    _store(1, out_ptr, num_rows, _scaled(acc, factors.index(last).load(gl.SliceLayout(1, SCORES))))
