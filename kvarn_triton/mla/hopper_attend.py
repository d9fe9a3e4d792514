"""What two warp groups of `hopper_tile` do with a tile of 64 rows: every second block each, and half of the channels of all.

A group computes the scores and weights of its own blocks. It keeps the weights as an operand, and hands them to the other group
in shared memory, with the maxima to which they are relative: both sum all blocks, in order. While one group computes weights,
the tensor cores have the products of the other.
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

from .hopper_blocks import LATENTS, ROPE, STEP, block_of
from .hopper_fill import PAIRS, load_queries, load_rope

ROWS = gl.constexpr(64)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
"""Products [rows, tokens] of a warp group."""
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
"""Products [rows, channels of a plane]."""
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
"""Weights in registers."""
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""A number that all threads have."""
SLACK = gl.constexpr(8.0)
"""How much larger, base 2, a score is than the largest one before when sums are scaled: weights are at most 256."""


@gluon.jit
def _opaque():
    """Return 0, which the compiler doesn't know.

    Descriptors of memory that is the same in every step would all be kept, where no registers are left.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _sum(half: gl.constexpr, acc, weights, latents, slot):
    """Begin to add the latents of a slot, times weights, to the sums of half of the channels."""
    first = _opaque() + slot * 4 + half * 2
    low = warpgroup_mma(weights, latents.index(first), acc[0], is_async=True)
    return low, warpgroup_mma(weights, latents.index(first + 1), acc[1], is_async=True)


@gluon.jit
def _multiply(part: gl.constexpr, found, queries, latents, full, slot, i):
    """Begin to multiply a tile of queries by half of the channels of a slot, as soon as they are there."""
    zero = _opaque()
    first = zero + slot * 4 + part * 2
    mbarrier.wait(full.index(slot * 2 + part), i // 2 & 1)
    for plane in gl.static_range(2):
        keys = latents.index(first + plane).permute((1, 0))
        sums = part + plane > 0
        found = warpgroup_mma(queries.index(zero + part * 2 + plane), keys, found, use_acc=sums, is_async=True)
    return found


@gluon.jit
def _sized(found, vectors, slot, block, rows):
    """Return products times the sizes of their tokens: -inf where a row doesn't see a token."""
    _, last_seen, first_seen = rows
    TOKENS: gl.constexpr = gl.SliceLayout(0, SCORES)
    scores = found * vectors[0].index(slot).load(TOKENS)[None, :]
    if block * STEP + (STEP - 1) > first_seen:
        token = block * STEP + gl.arange(0, STEP, TOKENS)
        scores = gl.where(token[None, :] <= last_seen[:, None], scores, float("-inf"))
    return scores


@gluon.jit
def _add_rope(scores, rope_queries, ropes):
    """Begin to add the products of rotary channels."""
    keys = ropes.index(0).reshape((STEP, ROPE)).permute((1, 0))
    return warpgroup_mma(rope_queries.index(_opaque()), keys, scores, is_async=True)


@gluon.jit
def _raise(scores, vectors, slot, factor, m):
    """Return the new m (`rows`), and the exponent of the gain.

    m stays until a score is much larger: no weight is above 2**SLACK.
    """
    exponent = vectors[2].index(slot).load(gl.SliceLayout(1, SCORES))
    largest = gl.max(scores, 1) * factor + exponent
    grown = (largest > m + SLACK) | (largest != largest)
    return gl.where(grown, largest, m), exponent


@gluon.jit
def _weights(scores, factor, m, exponent):
    """Return the weights of scores."""
    none = gl.zeros_like(scores)
    less = exponent - gl.where(m == float("-inf"), 0.0, m)
    return gl.exp2(gl.fma(scores, none + factor[:, None], none + less[:, None]))


@gluon.jit
def _total(weights, inverse):
    """Return the sums of the weights of rows that each thread has, times one over a gain: [rows, lanes of a row]."""
    parts = gl.sum(gl.reshape(weights, (ROWS, STEP // 8, 4, 2)), 3)
    total = gl.sum(parts, 1)
    return total * gl.convert_layout(inverse, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _scaled(state, m_new):
    """Return sums of channels and of weights relative to another m."""
    acc, l_sum, m = state
    factor = gl.exp2(m - gl.where(m_new == float("-inf"), 0.0, m_new))  # rows that see nothing yet
    wide = gl.convert_layout(factor, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    part = gl.convert_layout(factor, gl.SliceLayout(1, l_sum.type.layout), assert_trivial=True)[:, None]
    return (acc[0] * wide, acc[1] * wide), l_sum * part, m_new


@gluon.jit
def _hand_over(operand, m, handed):
    """Store the weights of a block, and m."""
    weights_smem, maxima, full = handed
    weights_smem.store(operand)
    maxima.store(m)
    fence_async_shared()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _take_over(half: gl.constexpr, state, i, latents, handed):
    """Begin to sum block i, of the other group, as soon as its weights are there; return the state, relative to its m."""
    weights_smem, maxima, full = handed
    mbarrier.wait(full, i & 1)
    acc, l_sum, m = _scaled(state, maxima.load(gl.SliceLayout(1, SCORES)))
    return _sum(half, acc, weights_smem, latents, 1 - half), l_sum, m


@gluon.jit
def _attend_block(half: gl.constexpr, first: gl.constexpr, state, i, rows, shared, work):
    """Compute scores and weights of block i, and sum the block before, of the other group, and this one.

    The block before is summed behind the products with latents, so that its slot is filled anew while weights are computed.
    """
    factor, _, _ = rows
    memory, handed, bars = shared
    queries, rope_queries, latents, ropes, vectors = memory
    full, free, scored, rope_full = bars
    found = _multiply(0, gl.zeros((ROWS, STEP), gl.float32, SCORES), queries, latents, full, half, i)
    found = _multiply(1, found, queries, latents, full, half, i)
    if first:
        found = warpgroup_mma_wait(0, [found])
    else:
        state = _take_over(half, state, i - 1, latents, handed)
        found = warpgroup_mma_wait(2, [found])
    scores = _sized(found, vectors, half, block_of(i, work), rows)
    mbarrier.wait(rope_full, i & 1)
    scores = _add_rope(scores, rope_queries, ropes)
    if not first:
        acc, l_sum, m = state
        low, high = warpgroup_mma_wait(1, acc)
        mbarrier.arrive(free.index((1 - half) * 2 + half), count=1)
        state = ((low, high), l_sum, m)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(scored, count=1)
    m_new, exponent = _raise(scores, vectors, half, factor, state[2])
    weights = _weights(scores, factor, m_new, exponent)
    total = _total(weights, gl.exp2(-exponent))
    norm = vectors[1].index(half).load(gl.SliceLayout(0, SCORES))
    operand = (weights * norm[None, :]).to(gl.float16)
    _hand_over(operand, m_new, handed)
    acc, l_sum, m = _scaled(state, m_new)
    acc = _sum(half, acc, gl.convert_layout(operand, OPERAND), latents, half)
    low, high = warpgroup_mma_wait(0, acc)
    mbarrier.arrive(free.index(half * 2 + half), count=1)
    return (low, high), l_sum + total, m


@gluon.jit
def _store(half: gl.constexpr, out_ptr, num_rows, acc, inverse):
    """Store the sums of half of the channels, times a factor of each row."""
    pairs = gl.join(acc[0], acc[1])
    sums = gl.reshape(pairs, (ROWS, LATENTS // 2))
    LAYOUT: gl.constexpr = sums.type.layout
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    channel = half * (LATENTS // 2) + gl.arange(0, LATENTS // 2, gl.SliceLayout(0, LAYOUT))
    sums *= gl.convert_layout(inverse, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None]
    gl.store(out_ptr + row[:, None] * LATENTS + channel[None, :], sums, (row < num_rows)[:, None])


@gluon.jit
def attend(half: gl.constexpr, pointers, tile, memory, handed, ends, bars, work):
    """Attend to every second block of a program from number `half` on, and sum half of the channels of all blocks."""
    q_ptr, factor_ptr, out_ptr, lse_ptr = pointers
    place, num_rows, first_row, num_heads, first_seen = tile
    queries, rope_queries, latents, _, _ = memory
    totals, loaded, done = ends
    count = work[5]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    # Not 0, by which a score of -inf would be none.
    factor = gl.maximum(gl.abs(gl.load(factor_ptr + place + row, row < num_rows, other=0.0)), 1e-37)
    rows = (factor, first_seen + (first_row + row) // num_heads, first_seen)
    load_queries(half, q_ptr, factor_ptr, place, num_rows, queries)
    if half == 0:
        load_rope(q_ptr, factor_ptr, place, num_rows, rope_queries)
    fence_async_shared()
    mbarrier.arrive(loaded.index(half), count=1)
    mbarrier.wait(loaded.index(0), 0)
    mbarrier.wait(loaded.index(1), 0)
    none = gl.zeros((ROWS, PAIRS), gl.float32, SUMS)
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    nothing = _total(gl.zeros((ROWS, STEP), gl.float32, SCORES), gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, SCORES)))
    state = ((none, none), nothing, m)
    shared = (memory, handed, bars)
    if half == 0:
        state = _attend_block(half, True, state, 0, rows, shared, work)
    for i in range(2 - half, count, 2):
        state = _attend_block(half, False, state, i, rows, shared, work)
    if (count - 1) % 2 != half:
        acc, l_sum, m = _take_over(half, state, count - 1, latents, handed)
        low, high = warpgroup_mma_wait(0, acc)
        state = ((low, high), l_sum, m)
    acc, l_sum, m = state
    totals.index(half).store(gl.convert_layout(gl.sum(l_sum, 1), gl.SliceLayout(1, SCORES)))
    mbarrier.arrive(done.index(half), count=1)
    mbarrier.wait(done.index(1 - half), 0)
    total = totals.index(0).load(gl.SliceLayout(1, SCORES)) + totals.index(1).load(gl.SliceLayout(1, SCORES))
    if half == 0:
        gl.store(lse_ptr + row, m + gl.log2(total), row < num_rows)
    _store(half, out_ptr, num_rows, acc, 1.0 / gl.where(total > 0, total, 1.0))


@gluon.jit
def attend_first(pointers, tile, memory, handed, ends, bars, work):
    """Attend to blocks 0, 2, ..."""
    attend(0, pointers, tile, memory, handed, ends, bars, work)


@gluon.jit
def attend_second(pointers, tile, memory, handed, ends, bars, work):
    """Attend to blocks 1, 3, ..."""
    attend(1, pointers, tile, memory, handed, ends, bars, work)
