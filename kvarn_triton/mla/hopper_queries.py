"""What warps of `hopper_columns` do that prepare a block and weigh it: queries times the scales of its page, softmax of scores.

The 512 channels are eight tiles of 64. A pair of bytes has, in 4 bits, a channel of four tiles, and in 8 bits of two: tile
t = slab * PLANES + plane has the channels 2 * (64 * slab + i) + byte + 256 * field, where plane = byte * FIELDS + field.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..tile.gluon import barrier, split_pairs
from .hopper_blocks import LATENTS, NUMBERS, ROPE, STEP, find_raw, store_sizes

TILES = gl.constexpr(8)


@gluon.constexpr_function
def products_layout(rows):
    """Return the layout of products [tokens, rows] with queries, and [channels, rows] with weights."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 16])


@gluon.constexpr_function
def _largest_layout(rows):
    """Return the layout of the largest scores [4 warps, rows] that a thread loads: all of the rows that it has."""
    registers = [[0, 1], *([0, 8 << i] for i in range((rows // 8).bit_length() - 1)), [1, 0], [2, 0]]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [4, rows])


@gluon.constexpr_function
def channel_of(tile, bits):
    """Return the first channel of a tile, from which on it has every second one."""
    fields = 8 // bits
    plane, slab = tile % (2 * fields), tile // (2 * fields)
    return 128 * slab + plane // fields + 256 * (plane % fields)


@gluon.constexpr_function
def queries_layout(rows):
    """Return the layout of a tile of queries [rows, 64] of four warps: a thread has two channels of a quarter of the rows."""
    registers = [[0, 1], *([1 << i, 0] for i in range((rows // 4).bit_length() - 1))]
    lanes = [[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout(registers, lanes, [[rows // 4, 0], [rows // 2, 0]], [], [rows, 64])


@gluon.constexpr_function
def _params_layout():
    """Return the layout of parameters [16, 32] in which a thread has those of its channels."""
    registers = [[0, 1], [0, 2], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(registers, [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[0, 0], [0, 0]], [], [16, 32])


@gluon.jit
def params_of_tiles(words, BITS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the scales and zeros of eight tiles, each [64] float16 of a layout, of parameters [16, 32]."""
    FIELDS: gl.constexpr = 8 // BITS
    # [slab or field, slab, channel, byte]
    even, odd = gl.split(gl.permute(gl.reshape(words, (2, 2, STEP, 2)), (2, 0, 1, 3)))
    pairs = gl.split(even) + gl.split(odd)
    found = ()
    for i in gl.static_range(4):
        found = found + gl.split(pairs[i])
    # `found` is [byte][low bit of the first axes][high bit]; tiles are [slab][byte][field].
    result = ()
    for tile in gl.static_range(TILES):
        if FIELDS == 2:
            word = found[tile % 4 // 2 * 4 + tile // 4 * 2 + tile % 2]  # type: ignore[var-annotated]
        else:
            word = found[tile % 2 * 4 + tile // 2 % 2 * 2 + tile // 4]
        scale, zero = split_pairs(word)
        scale = gl.convert_layout(scale, LAYOUT, assert_trivial=True)
        result = result + ((scale, gl.convert_layout(zero, LAYOUT, assert_trivial=True)),)
    return result


@gluon.jit
def _load_queries(q_ptr, place, num_rows, queries, rope_queries, BITS: gl.constexpr):
    """Put the queries of a tile of rows into shared memory, tile by tile of channels, then rotary ones."""
    ROWS: gl.constexpr = queries.shape[1]
    QUERIES: gl.constexpr = queries_layout(ROWS)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, QUERIES))
    source_ptr = q_ptr + ((place + row) * (LATENTS + ROPE))[:, None]
    mask = (row < num_rows)[:, None]
    column = gl.arange(0, STEP, gl.SliceLayout(0, QUERIES))[None, :]
    rope_queries.index(0).store(gl.load(source_ptr + LATENTS + column, mask, other=0.0))
    for tile in gl.static_range(TILES):
        queries.index(tile).store(gl.load(source_ptr + (channel_of(tile, BITS) + 2 * column), mask, other=0.0))


@gluon.jit
def _store_queries(queries, params, memory, i, BITS: gl.constexpr):
    """Store queries times scales as operands, and their products with middle codes, for block i; no `params`: of raw tokens.

    The products with codes are those of codes less the middle one.
    """
    scaled, biases, full, free = memory
    ROWS: gl.constexpr = queries.shape[1]
    QUERIES: gl.constexpr = queries_layout(ROWS)
    MIDDLE: gl.constexpr = 2.0 ** (BITS - 1)
    mbarrier.wait(free.index(i % 2), (i // 2 & 1) ^ 1)
    bias = gl.zeros((ROWS, STEP), gl.float16, QUERIES)
    for tile in gl.static_range(TILES):
        query = queries.index(tile).load(QUERIES)
        if len(params) > 0:
            scale, zero = params[tile]
            scaled.index(i % 2 * TILES + tile).store(query * scale[None, :])
            bias += query * (scale * MIDDLE + zero)[None, :]
        else:
            scaled.index(i % 2 * TILES + tile).store(query)
    biases.index(i % 2).store(gl.sum(bias.to(gl.float32), 1))
    fence_async_shared()
    mbarrier.arrive(full.index(i % 2), count=1)


@gluon.jit
def _copy_raw(tiles, ropes, place, BITS: gl.constexpr):
    """Put a block of a raw page into shared memory: `place` is the page, the stride of tokens, the first one, and their end."""
    raw_ptr, stride_token, first, num_valid = place
    TOKENS: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    token = first + gl.arange(0, STEP, gl.SliceLayout(1, TOKENS))
    source_ptr = raw_ptr + (token * stride_token)[:, None]
    mask = (token < num_valid)[:, None]
    column = gl.arange(0, STEP, gl.SliceLayout(0, TOKENS))[None, :]
    for tile in gl.static_range(TILES):
        tiles.index(tile).store(gl.load(source_ptr + (channel_of(tile, BITS) + 2 * column), mask, other=0.0))
    ropes.reshape((STEP, ROPE)).store(gl.load(source_ptr + LATENTS + column, mask, other=0.0))


@gluon.jit
def _prepare_raw(i, memory, bars, raw, work, LAYOUT: gl.constexpr):
    """Put the raw tokens of block i into shared memory, with norms of 1."""
    _, ropes, vectors, tiles = memory
    full, free, sizes_full, raw_full, raw_free = bars
    RING: gl.constexpr = ropes.shape[0]
    slot = i % RING
    j = i - work[1]
    page, index, part = find_raw(j, raw, work, LAYOUT)
    mbarrier.wait(free.index(slot), (i // RING & 1) ^ 1)
    mbarrier.wait(raw_free, (j & 1) ^ 1)
    source = (raw[0] + page * raw[1], raw[2], part * STEP, raw[6] - index * LAYOUT.page_size)
    _copy_raw(tiles, ropes.index(slot), source, LAYOUT.bits)
    fence_async_shared()
    mbarrier.arrive(raw_full, count=1)
    mbarrier.arrive(full.index(slot), count=1)
    one = gl.full((STEP,), 1.0, gl.float32, NUMBERS)
    store_sizes(vectors, slot, one, gl.to_tensor(1.0), one)
    mbarrier.arrive(sizes_full.index(slot), count=1)


@gluon.jit
def prepare(operands, memory, bars, raw, work, LAYOUT: gl.constexpr, PLAN: gl.constexpr):
    """Prepare every block of a program: the queries for it, and a block of raw tokens as a whole."""
    q_ptr, place, num_rows, queries, rope_queries, started, scaled = operands
    params, ropes = memory[0], memory[1]
    full, free = bars[0], bars[1]
    ROWS: gl.constexpr = PLAN.rows
    RING: gl.constexpr = ropes.shape[0]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, queries_layout(ROWS))
    _load_queries(q_ptr, place, num_rows, queries, rope_queries, LAYOUT.bits)
    fence_async_shared()
    mbarrier.arrive(started, count=1)
    for i in range(work[1]):
        slot = i % RING
        mbarrier.wait(full.index(slot), i // RING & 1)
        words = params.index(slot).reshape((16, 32)).load(_params_layout())
        _store_queries(queries, params_of_tiles(words, LAYOUT.bits, COLUMNS), scaled, i, LAYOUT.bits)
        mbarrier.arrive(free.index(slot), count=1)
    if len(raw) > 0:
        for i in range(work[1], work[5]):
            _prepare_raw(i, memory, bars, raw, work, LAYOUT)
            _store_queries(queries, (), scaled, i, LAYOUT.bits)
            mbarrier.arrive(free.index(i % RING), count=1)


@gluon.jit
def _largest(scores, memory, ROWS: gl.constexpr):
    """Return the largest score of each row: those of the warps are exchanged at once, and each thread takes the largest."""
    memory.store(gl.max(gl.reshape(scores, (4, STEP // 4, ROWS)), 1))
    barrier()
    largest = gl.max(memory.load(_largest_layout(ROWS)), 0)
    return gl.convert_layout(largest, gl.SliceLayout(0, products_layout(ROWS)), assert_trivial=True)


@gluon.jit
def _hand_over(handed, i, weights, factor):
    """Store the weights of block i, and the factor of what was summed before."""
    weights_smem, factors, full, free = handed
    mbarrier.wait(free.index(i % 2), (i // 2 & 1) ^ 1)
    weights_smem.index(i % 2).store(weights)
    factors.index(i % 2).store(factor)
    fence_async_shared()
    mbarrier.arrive(full.index(i % 2), count=1)


@gluon.jit
def weigh(target, largest, vectors, free, scores, handed, count, PLAN: gl.constexpr):
    """Compute the weights of every block of a program, relative to the largest score so far, and their sum.

    At the end one over the sum is handed over as a factor, and the log-sum-exp is stored.
    """
    scores_smem, scores_full, scores_free = scores
    ROWS: gl.constexpr = PLAN.rows
    RING: gl.constexpr = vectors[0].shape[0]
    PRODUCTS: gl.constexpr = products_layout(ROWS)
    TOKENS: gl.constexpr = gl.SliceLayout(1, PRODUCTS)
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(0, PRODUCTS))
    l_sum = gl.zeros((STEP, ROWS), gl.float32, PRODUCTS)  # of the tokens of each thread
    for i in range(count):
        slot = i % RING
        mbarrier.wait(scores_full.index(i % 2), i // 2 & 1)
        found = scores_smem.index(i % 2).load(PRODUCTS)
        norm, exponent = vectors[1].index(slot).load(TOKENS), vectors[2].index(slot).load(TOKENS)
        found += exponent[:, None]
        m_new = gl.maximum(m, _largest(found, largest, ROWS))
        origin = gl.where(m_new == float("-inf"), 0.0, m_new)  # rows that see nothing yet
        alpha = gl.exp2(m - origin)
        weights = gl.exp2(found - origin[None, :])
        l_sum = l_sum * alpha[None, :] + weights * gl.exp2(-exponent)[:, None]
        m = m_new
        # A norm that no row looks at may be anything.
        weights = gl.where(weights == 0.0, 0.0, weights * norm[:, None])
        _hand_over(handed, i, weights.to(gl.float16), alpha)
        mbarrier.arrive(scores_free.index(i % 2), count=1)
        mbarrier.arrive(free.index(slot), count=1)
    total = gl.sum(l_sum, 0)
    nothing = gl.zeros((STEP, ROWS), gl.float16, PRODUCTS)
    _hand_over(handed, count, nothing, 1.0 / gl.where(total > 0, total, 1.0))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, PRODUCTS))
    gl.store(target[0] + row, m + gl.log2(total), row < target[1])
