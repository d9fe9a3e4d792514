"""The form of `hopper` for tiles of 16 query rows: numbers of a block of tokens in shared memory, query rows as columns.

Two warp groups make the numbers, beside a warp that copies rotary channels and parameters (`hopper_fill`). Two others attend, each
to every second block, with a state of its own; the first one joins both at the end. Tokens are the rows of the product with queries,
and channels those of the product with weights: 16 query rows are 16 columns, and none is padding.
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

from ..attention.hopper import barriers
from .hopper_copy import LATENTS, ROPE, STEP, barrier
from .hopper_fill import PAIRS, block_of, copy_params, fill, load_queries, load_rope

ROWS = gl.constexpr(16)
SLOTS = gl.constexpr(3)
"""Blocks in shared memory."""
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
"""Whether memory is looked at as of another type by this name: after Triton 3.6."""
PRODUCTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
"""Products [tokens, rows] with queries, and [channels, rows] with weights."""


@gluon.constexpr_function
def _largest_layout():
    """Return the layout of the largest scores [4 warps, rows] that a thread loads: all of the rows that it has."""
    registers, lanes = [[0, 1], [0, 8], [1, 0], [2, 0]], [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [4, 16])


@gluon.jit
def _score(i, zero, memory, bars):
    """Return the products of a block with queries: of latents, and of rotary channels."""
    queries, rope_queries, latents, ropes, _ = memory
    full, _, scored, rope_full = bars
    RING: gl.constexpr = ropes.shape[0]
    slot = i % SLOTS + zero
    none = gl.zeros((STEP, ROWS), gl.float32, PRODUCTS)
    mbarrier.wait(full.index(slot), i // SLOTS & 1)
    found = none
    for plane in gl.static_range(4):
        columns = queries.index(plane + zero).permute((1, 0))
        found = warpgroup_mma(latents.index(slot * 4 + plane), columns, found, use_acc=plane > 0, is_async=True)
    # The other group has read those of the block before: a barrier of two phases tells no more of them apart.
    mbarrier.wait(scored.index(i % RING), (i // RING & 1) ^ 1)
    mbarrier.wait(rope_full.index(i % RING), i // RING & 1)
    keys = ropes.index(i % RING + zero).reshape((STEP, ROPE))
    rope = warpgroup_mma(keys, rope_queries.index(zero).permute((1, 0)), none, use_acc=False, is_async=True)
    found, rope = warpgroup_mma_wait(0, [found, rope])
    mbarrier.arrive(scored.index(i % RING), count=1)
    return found, rope


@gluon.jit
def _largest(scores, memory):
    """Return the largest score of each row: those of the warps are exchanged at once, and each thread takes the largest."""
    memory.store(gl.max(gl.reshape(scores, (4, STEP // 4, ROWS)), 1))
    barrier()
    largest = gl.max(memory.load(_largest_layout()), 0)
    return gl.convert_layout(largest, gl.SliceLayout(0, PRODUCTS), assert_trivial=True)


@gluon.jit
def _weigh(products, vectors, slot, largest, block, seen, state):
    """Return the weights of a block, the factor of what was summed before, and the new state (m, l of each thread; `rows`)."""
    found, rope = products
    factor, last_seen, first_seen = seen
    m, l_sum = state
    TOKENS: gl.constexpr = gl.SliceLayout(1, PRODUCTS)
    size, norm = vectors[0].index(slot).load(TOKENS), vectors[1].index(slot).load(TOKENS)
    exponent = vectors[2].index(slot).load(gl.SliceLayout(0, PRODUCTS))
    scores = gl.fma(found, gl.zeros_like(found) + size[:, None], rope) * factor[None, :]
    if block * STEP + (STEP - 1) > first_seen:
        token = block * STEP + gl.arange(0, STEP, TOKENS)
        scores = gl.where(token[:, None] <= last_seen[None, :], scores, float("-inf"))
    m_new = gl.maximum(m, _largest(scores, largest) + exponent)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)  # rows that see nothing yet
    alpha = gl.exp2(m - origin)
    weights = gl.exp2(scores - (origin - exponent)[None, :])
    l_sum = l_sum * alpha[None, :] + weights * gl.exp2(-exponent)[None, :]
    return (weights * norm[:, None]).to(gl.float16), alpha, (m_new, l_sum)


@gluon.jit
def _scaled(acc, factor):
    """Return sums of four planes times a factor of each row."""
    result = ()
    for plane in gl.static_range(4):
        result = result + (acc[plane] * factor[None, :],)
    return result


@gluon.jit
def _sum(acc, weights, latents, slot):
    """Return sums and the latents of a slot, times weights."""
    result = ()
    for plane in gl.static_range(4):
        operand = latents.index(slot * 4 + plane).permute((1, 0))
        result = result + (warpgroup_mma(operand, weights, acc[plane], is_async=True),)
    return warpgroup_mma_wait(0, result)


@gluon.jit
def _left(latents, count, plane: gl.constexpr):
    """Return memory for the sums of a plane of the second group: its last slot, which nobody fills again."""
    slot = (count // 2 * 2 - 1 + SLOTS) % SLOTS
    FLOATS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    COUNT: gl.constexpr = STEP * PAIRS // (2 * ROWS)
    memory = latents.index(slot * 4 + plane)
    if RENAMED:
        sums = memory.reinterpret(gl.float32, [COUNT, ROWS], FLOATS)
    else:
        sums = memory._reinterpret(gl.float32, [COUNT, ROWS], FLOATS)
    return sums.slice(0, PAIRS)


@gluon.jit
def _store(out_ptr, num_rows, acc):
    """Store the sums of four planes, two of which have the channels of a half in turn."""
    row = gl.arange(0, ROWS, gl.SliceLayout(0, PRODUCTS))
    for plane in gl.static_range(4):
        channel = plane // 2 * (LATENTS // 2) + plane % 2 + 2 * gl.arange(0, PAIRS, gl.SliceLayout(1, PRODUCTS))
        gl.store(out_ptr + row[None, :] * LATENTS + channel[:, None], acc[plane], (row < num_rows)[None, :])


@gluon.jit
def _attend(group: gl.constexpr, pointers, tile, memory, own, bars, work):
    """Attend to every second block, from block `group` on; the second group leaves its state for the first one."""
    q_ptr, factor_ptr, out_ptr, lse_ptr = pointers
    place, num_rows, first_row, num_heads, first_seen = tile
    latents, vectors = memory[2], memory[4]
    weights_smem, largest, states, started, done = own
    ROW: gl.constexpr = gl.SliceLayout(0, PRODUCTS)
    row = gl.arange(0, ROWS, ROW)
    factor = gl.load(factor_ptr + place + row, row < num_rows, other=0.0)
    factor = gl.abs(factor)
    seen = (factor, first_seen + (first_row + row) // num_heads, first_seen)
    load_queries(group, q_ptr, factor_ptr, place, num_rows, memory[0])
    if group == 0:
        load_rope(q_ptr, factor_ptr, place, num_rows, memory[1])
    fence_async_shared()
    mbarrier.arrive(started, count=1)
    mbarrier.wait(started, 0)
    acc = ()
    for _ in gl.static_range(4):
        acc = acc + (gl.zeros((PAIRS, ROWS), gl.float32, PRODUCTS),)
    m = gl.full((ROWS,), float("-inf"), gl.float32, ROW)
    l_sum = gl.zeros((STEP, ROWS), gl.float32, PRODUCTS)  # of the tokens of each thread
    for i in range(group, work[5], 2):
        # Opaque: descriptors of memory that is the same in every step would all be kept, where no registers are left.
        zero = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)
        slot = i % SLOTS + zero
        products = _score(i, zero, memory, bars)
        state = (m, l_sum)
        weights, alpha, state = _weigh(products, vectors, slot, largest.index(group), block_of(i, work), seen, state)
        m, l_sum = state
        weights_smem.index(group).store(weights)
        fence_async_shared()
        barrier()
        acc = _sum(_scaled(acc, alpha), weights_smem.index(group + zero), latents, slot)
        mbarrier.arrive(bars[1].index(slot), count=1)
    total = gl.sum(l_sum, 0)
    if group == 1:
        for plane in gl.static_range(4):
            _left(latents, work[5], plane).store(acc[plane])
        states.index(0).store(m)
        states.index(1).store(total)
        mbarrier.arrive(done, count=1)
    else:
        mbarrier.wait(done, 0)
        other = states.index(0).load(ROW)
        m_all = gl.maximum(m, other)
        origin = gl.where(m_all == float("-inf"), 0.0, m_all)
        own_factor, other_factor = gl.exp2(m - origin), gl.exp2(other - origin)
        total = total * own_factor + states.index(1).load(ROW) * other_factor
        inverse = 1.0 / gl.where(total > 0, total, 1.0)
        acc = _scaled(acc, own_factor * inverse)
        joined = ()
        for plane in gl.static_range(4):
            joined = joined + (acc[plane] + _left(latents, work[5], plane).load(PRODUCTS) * (other_factor * inverse)[None, :],)
        _store(out_ptr, num_rows, joined)
        gl.store(lse_ptr + row, m_all + gl.log2(total), row < num_rows)


@gluon.jit
def attend_few(pointers, tile, records, raw, paged, work, LAYOUT: gl.constexpr, PLAN: gl.constexpr):
    """Attend with a tile of rows to the blocks of a program."""
    OPERANDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    VECTORS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROUND: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    params_desc, rope_desc, pages = records
    queries = gl.allocate_shared_memory(gl.float16, [4, ROWS, PAIRS], OPERANDS)
    rope_queries = gl.allocate_shared_memory(gl.float16, [1, ROWS, ROPE], OPERANDS)
    latents = gl.allocate_shared_memory(gl.float16, [4 * SLOTS, STEP, PAIRS], OPERANDS)
    ropes = gl.allocate_shared_memory(gl.float16, [1] + rope_desc.block_type.shape, rope_desc.layout)
    params = gl.allocate_shared_memory(gl.int32, [1] + params_desc.block_type.shape, params_desc.layout)
    weights = gl.allocate_shared_memory(gl.float16, [2, STEP, ROWS], WEIGHTS)
    largest = gl.allocate_shared_memory(gl.float32, [2, 4, ROWS], ROUND)
    states = gl.allocate_shared_memory(gl.float32, [2, ROWS], VECTORS)
    sizes = gl.allocate_shared_memory(gl.float32, [SLOTS, STEP], VECTORS)
    norms = gl.allocate_shared_memory(gl.float32, [SLOTS, STEP], VECTORS)
    exponents = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], VECTORS)
    full, free, scored, rope_full = barriers(SLOTS, 2), barriers(SLOTS, 1), barriers(1, 1), barriers(1, 1)
    params = (params, barriers(1, 1), barriers(1, 2))
    started, done = barriers(1, 2), barriers(1, 1)
    own = (weights, largest, states, started.index(0), done.index(0))
    fence_async_shared()
    barrier()
    bars = (full, free, scored, rope_full)
    vectors = (sizes, norms, exponents)
    memory = (queries, rope_queries, latents, ropes, vectors)
    slots, sources = (latents, ropes, vectors), (pages, paged, raw)
    gl.warp_specialize(
        [
            (_attend, (0, pointers, tile, memory, own, bars, work)),
            (_attend, (1, pointers, tile, memory, own, bars, work)),
            (fill, ((0, 2), slots, params, bars, sources, work, LAYOUT)),
            (fill, ((1, 2), slots, params, bars, sources, work, LAYOUT)),
            (copy_params, ((params_desc, rope_desc), ropes, params, (rope_full, scored), pages, paged, LAYOUT)),
        ],
        [4, 4, 4, 1],
        [120, 104, 104, 24],  # registers; those that are left are the first one's
    )
