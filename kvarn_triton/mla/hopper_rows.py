"""What the warps of `hopper_columns` that multiply do: scores of the tokens of a block, and sums of latents by weights.

Both make operands of products of the codes themselves, in registers: tokens are the rows of the one, channels those of the
other. Scores, weights, and factors of what was summed before go from warps to warps through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_blocks import LATENTS, ROPE, STEP, raw_block_of
from .hopper_queries import TILES, channel_of, params_of_tiles, products_layout
from .latents import pairs_ptx


@gluon.constexpr_function
def _operand_layout(rows):
    """Return the layout of the other operand of these products, in registers."""
    return gl.DotOperandLayout(0, products_layout(rows), 2)


@gluon.constexpr_function
def _params_layout():
    """Return the layout of parameters [16, 32] in which a thread has those of the channels that are its rows."""
    lanes = [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]]
    return gl.DistributedLinearLayout([[0, 1], [0, 16], [4, 0], [8, 0]], lanes, [[1, 0], [2, 0]], [], [16, 32])


@gluon.jit
def _codes(words, byte: gl.constexpr, BITS: gl.constexpr):
    """Return the codes of a byte of each pair, less the middle one, a tensor float16 for each field."""
    if BITS == 4:
        planes = gl.inline_asm_elementwise(
            pairs_ptx(BITS, byte, True), "=&r,=&r,r", [words], (gl.float16, gl.float16), is_pure=True, pack=2
        )  # fmt: skip
    else:
        planes = (
            gl.inline_asm_elementwise(pairs_ptx(BITS, byte, True), "=&r,r", [words], gl.float16, is_pure=True, pack=2),
        )  # fmt: skip
    return planes


@gluon.jit
def _products(codes, scaled, slot, buffer, rope, none, PLAN: gl.constexpr):
    """Return the products [tokens, rows] of a block with queries: of its codes, less the middle one, and of rotary channels."""
    SLABS: gl.constexpr = PLAN.bits // 2
    FIELDS: gl.constexpr = 8 // PLAN.bits
    ROWS: gl.constexpr = none.shape[1]
    result = none
    rope_products = none
    for slab in gl.static_range(SLABS):
        words = codes.index(slot * SLABS + slab).reshape((STEP, STEP)).load(_operand_layout(ROWS))
        for byte in gl.static_range(2):
            planes = _codes(words, byte, PLAN.bits)
            for field in gl.static_range(FIELDS):
                queries = scaled.index(buffer * TILES + (slab * 2 + byte) * FIELDS + field).permute((1, 0))
                result = warpgroup_mma(planes[field], queries, result, use_acc=slab + byte + field > 0, is_async=True)
            # ptxas lets products follow each other only while nothing else writes registers that they read.
            if slab == SLABS - 1 and byte == 1:
                rope_products = warpgroup_mma(rope[0], rope[1], none, use_acc=False, is_async=True)
                result, rope_products = warpgroup_mma_wait(0, [result, rope_products])
            else:
                result = warpgroup_mma_wait(0, [result])
    return result, rope_products


@gluon.jit
def _raw_products(tiles, scaled, buffer, rope, none):
    """Return the same of raw tokens."""
    rope_products = warpgroup_mma(rope[0], rope[1], none, use_acc=False, is_async=True)
    result = none
    for tile in gl.static_range(TILES):
        queries = scaled.index(buffer * TILES + tile).permute((1, 0))
        result = warpgroup_mma(tiles.index(tile), queries, result, use_acc=tile > 0, is_async=True)
    return warpgroup_mma_wait(0, [result, rope_products])


@gluon.jit
def _hand_over(i, block, products, tile, vectors, bars, PLAN: gl.constexpr):
    """Store the scores of block i of a program, which is `block` of its sequence, and say what is free again."""
    latent, rope = products
    biases, scores_smem, scores_full, scores_free, scaled_free = tile[0]
    factor, last_seen, first_seen = tile[1]
    free, sizes_full = bars
    LAYOUT: gl.constexpr = products_layout(PLAN.rows)
    TOKENS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    RING: gl.constexpr = vectors[0].shape[0]
    bias = biases.index(i % 2).load(gl.SliceLayout(0, LAYOUT))
    mbarrier.wait(sizes_full.index(i % RING), i // RING & 1)
    size = vectors[0].index(i % RING).load(TOKENS)
    found = gl.fma(latent + bias[None, :], size[:, None] + gl.zeros_like(rope), rope) * factor[None, :]
    if block * STEP + (STEP - 1) > first_seen:
        token = block * STEP + gl.arange(0, STEP, TOKENS)
        found = gl.where(token[:, None] <= last_seen[None, :], found, float("-inf"))
    mbarrier.wait(scores_free.index(i % 2), (i // 2 & 1) ^ 1)
    scores_smem.index(i % 2).store(found)
    mbarrier.arrive(scores_full.index(i % 2), count=1)
    mbarrier.arrive(scaled_free.index(i % 2), count=1)
    mbarrier.arrive(free.index(i % RING), count=1)


@gluon.jit
def score(group: gl.constexpr, operands, blocks, bars, handed, rows, work, PLAN: gl.constexpr):
    """Compute the scores, base 2, of every second block of a program, from block `group` on."""
    rope_queries, scaled, biases, factor_ptr, started, scaled_full, scaled_free = operands
    codes, ropes, vectors, tiles = blocks
    full, free, sizes_full, raw_full, raw_free = bars
    place, num_rows, first_row, num_heads, first_seen = rows
    first_page, num_paged, count = work[0], work[1], work[5]
    ROWS: gl.constexpr = PLAN.rows
    RING: gl.constexpr = ropes.shape[0]
    LAYOUT: gl.constexpr = products_layout(ROWS)
    row = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    factor = gl.load(factor_ptr + place + row, row < num_rows, other=0.0)
    tile = (
        (biases, handed[0], handed[1], handed[2], scaled_free),
        (factor, first_seen + (first_row + row) // num_heads, first_seen),
    )  # fmt: skip
    none = gl.zeros((STEP, ROWS), gl.float32, LAYOUT)
    mbarrier.wait(started, 0)
    for i in range(group, num_paged, 2):
        # Opaque, because descriptors of memory that is the same in every step would all be kept, where no registers are left.
        zero = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)
        slot = i % RING + zero
        mbarrier.wait(full.index(slot), i // RING & 1)
        mbarrier.wait(scaled_full.index(i % 2), i // 2 & 1)
        rope = (ropes.index(slot).reshape((STEP, ROPE)), rope_queries.index(zero).permute((1, 0)))
        products = _products(codes, scaled, slot, i % 2 + zero, rope, none, PLAN)
        _hand_over(i, first_page + i, products, tile, vectors, (free, sizes_full), PLAN)
    if tiles.shape[0] > 1:
        for i in range(num_paged + ((num_paged + group) & 1), count, 2):
            zero = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)
            slot = i % RING + zero
            j = i - num_paged
            mbarrier.wait(full.index(slot), i // RING & 1)
            mbarrier.wait(scaled_full.index(i % 2), i // 2 & 1)
            mbarrier.wait(raw_full, j & 1)
            rope = (ropes.index(slot).reshape((STEP, ROPE)), rope_queries.index(zero).permute((1, 0)))
            products = _raw_products(tiles, scaled, i % 2 + zero, rope, none)
            mbarrier.arrive(raw_free, count=1)
            _hand_over(i, raw_block_of(j, work), products, tile, vectors, (free, sizes_full), PLAN)


@gluon.jit
def _numbers(words, params, first: gl.constexpr, BITS: gl.constexpr):
    """Return the numbers of a byte of each pair, [channels, tokens] float16 for each field: those of tiles from a first one."""
    BYTE: gl.constexpr = first // (8 // BITS) % 2
    scale, zero = params[first]
    if BITS == 4:
        next_scale, next_zero = params[first + 1]
        planes = gl.inline_asm_elementwise(
            pairs_ptx(BITS, BYTE, False), "=&r,=&r,r,r,r,r,r",
            [words, scale[:, None], next_scale[:, None], zero[:, None], next_zero[:, None]], (gl.float16, gl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        numbers = gl.inline_asm_elementwise(
            pairs_ptx(BITS, BYTE, False), "=&r,r,r,r", [words, scale[:, None], zero[:, None]], gl.float16, is_pure=True, pack=2
        )  # fmt: skip
        planes = (numbers,)
    return planes


@gluon.jit
def _scaled_by(sums, factor):
    """Return sums of eight tiles times a factor of each row."""
    result = ()
    for tile in gl.static_range(TILES):
        result = result + (sums[tile] * factor[None, :],)
    return result


@gluon.jit
def _sum_codes(acc, codes, params, slot, weights, factor, ready, PLAN: gl.constexpr):
    """Return the sums of eight tiles after the latents of a block, of codes.

    `factor` is memory of the factor of what was summed before, and `ready` the barrier of weights and factor, and its phase:
    the first numbers are made before they are there.
    """
    SLABS: gl.constexpr = PLAN.bits // 2
    FIELDS: gl.constexpr = 8 // PLAN.bits
    OPERAND: gl.constexpr = _operand_layout(acc[0].shape[1])
    own = params_of_tiles(params.reshape((16, 32)).load(_params_layout()), PLAN.bits, gl.SliceLayout(1, OPERAND))
    result = ()
    for slab in gl.static_range(SLABS):
        words = codes.index(slot * SLABS + slab).reshape((STEP, STEP)).permute((1, 0)).load(OPERAND)
        planes = _numbers(words, own, slab * 2 * FIELDS, PLAN.bits)
        planes = planes + _numbers(words, own, (slab * 2 + 1) * FIELDS, PLAN.bits)
        if slab == 0:
            mbarrier.wait(ready[0], ready[1])
            acc = _scaled_by(acc, factor.load(gl.SliceLayout(0, products_layout(acc[0].shape[1]))))
        found = ()
        for plane in gl.static_range(2 * FIELDS):
            found = found + (warpgroup_mma(planes[plane], weights, acc[slab * 2 * FIELDS + plane], is_async=True),)
        result = result + warpgroup_mma_wait(0, found)  # as above
    return result


@gluon.jit
def sums(target, blocks, bars, handed, work, PLAN: gl.constexpr):
    """Sum the latents of all blocks of a program by their weights, and store the result of a tile of rows."""
    codes, params, ropes, tiles = blocks
    full, free, _, raw_full, raw_free = bars
    weights_smem, factors, weights_full, weights_free = handed
    num_paged, count = work[1], work[5]
    ROWS: gl.constexpr = PLAN.rows
    BITS: gl.constexpr = PLAN.bits
    RING: gl.constexpr = ropes.shape[0]
    LAYOUT: gl.constexpr = products_layout(ROWS)
    HEADS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    acc = ()
    for _ in gl.static_range(TILES):
        acc = acc + (gl.zeros((STEP, ROWS), gl.float32, LAYOUT),)
    for i in range(num_paged):
        zero = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)
        slot = i % RING + zero
        mbarrier.wait(full.index(slot), i // RING & 1)
        ready = (weights_full.index(i % 2), i // 2 & 1)
        weights = weights_smem.index(i % 2)
        acc = _sum_codes(acc, codes, params.index(slot), slot, weights, factors.index(i % 2), ready, PLAN)
        mbarrier.arrive(free.index(slot), count=1)
        mbarrier.arrive(weights_free.index(i % 2), count=1)
    if tiles.shape[0] > 1:
        for i in range(num_paged, count):
            slot = i % RING
            mbarrier.wait(raw_full, i - num_paged & 1)
            mbarrier.wait(weights_full.index(i % 2), i // 2 & 1)
            acc = _scaled_by(acc, factors.index(i % 2).load(HEADS))
            result = ()
            for tile in gl.static_range(TILES):
                operand = tiles.index(tile).permute((1, 0))
                result = result + (warpgroup_mma(operand, weights_smem.index(i % 2), acc[tile], is_async=True),)
            acc = warpgroup_mma_wait(0, result)
            mbarrier.arrive(raw_free, count=1)
            mbarrier.arrive(free.index(slot), count=1)
            mbarrier.arrive(weights_free.index(i % 2), count=1)
    mbarrier.wait(weights_full.index(count % 2), count // 2 & 1)
    acc = _scaled_by(acc, factors.index(count % 2).load(HEADS))
    row = gl.arange(0, ROWS, HEADS)
    for tile in gl.static_range(TILES):
        channel = channel_of(tile, BITS) + 2 * gl.arange(0, STEP, gl.SliceLayout(1, LAYOUT))
        gl.store(target[0] + row[None, :] * LATENTS + channel[:, None], acc[tile], (row < target[1])[None, :])
