"""Raw and new tokens of `hopper_drafts`, 64 at a time: through one slot of shared memory, keys first, then values.

They are few beside pages: nothing is copied ahead. New tokens are rotated as those of the cache are, which lets all results of
a program be of one kind.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from ..tile.gluon import barrier, reinterpret
from .hopper_numbers import products_layout
from .hopper_planes import CHANNELS, rotate, rows_layout
from .hopper_weights import weigh_tokens

BLOCK = gl.constexpr(64)
"""Tokens of a unit: the rows of a product."""
UNIT = gl.constexpr(2)
"""Pages that take as long as such a unit."""
_TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.jit
def _load(x_ptr, stride_token, count, ROWS: gl.constexpr):
    """Load 64 tokens, or `count`, and else zeros: tiles [rows, CHANNELS]."""
    LAYOUT: gl.constexpr = rows_layout(ROWS, True)
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(0, LAYOUT))
    loaded = ()
    for i in gl.static_range(BLOCK // ROWS):
        token = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        place = (token.to(gl.int64) * stride_token)[:, None] + channel[None, :]
        loaded = loaded + (gl.load(x_ptr + place, (token < count)[:, None], other=0.0),)
    return loaded


@gluon.jit
def _store(loaded, count, tile, slot, ROTATED: gl.constexpr):
    """Put `count` tokens, and zeros, into a tile of shared memory; those not ROTATED are rotated through another slot."""
    ROWS: gl.constexpr = loaded[0].shape[0]
    for i in gl.static_range(BLOCK // ROWS):
        x = loaded[i]
        if not ROTATED:
            x = gl.zeros((ROWS, CHANNELS), tile.dtype, rows_layout(ROWS, False))
            if i * ROWS < count:
                x = (rotate(loaded[i].to(gl.float32), slot) * CHANNELS**-0.5).to(tile.dtype)
        tile.slice(i * ROWS, ROWS).store(x)


@gluon.jit
def _attend_block(source, count, end, found, memory, factor, ROTATED: gl.constexpr):
    """Advance the state of a tile by 64 tokens, of which there are `count`, and of which a row sees those before `end` [rows].

    `source`: pointers to the keys and the values, and their strides. `memory`: two slots, maxima, weights, queries.
    """
    k_ptr, v_ptr, stride_key, stride_value = source
    acc, m, totals = found
    slot, other, maxima, weights, queries = memory
    ROWS: gl.constexpr = end.shape[0]
    TOKENS: gl.constexpr = gl.SliceLayout(1, products_layout(ROWS))
    tile = reinterpret(slot, queries.dtype, [BLOCK, CHANNELS], _TILE)
    own = reinterpret(weights, queries.dtype, weights.shape, weights.layout).slice(0, BLOCK)
    keys = _load(k_ptr, stride_key, count, ROWS)
    barrier()  # all are past what was in the slot
    _store(keys, count, tile, other, ROTATED)
    values = _load(v_ptr, stride_value, count, ROWS)
    fence_async_shared()
    barrier()
    none = gl.zeros((BLOCK, ROWS), gl.float32, products_layout(ROWS))
    products = warpgroup_mma(tile, queries.permute((1, 0)), none, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, [products])
    seen = gl.arange(0, BLOCK, TOKENS)[:, None] < end[None, :]
    scores = gl.where(seen, products * factor, float("-inf"))
    alpha, m, totals = weigh_tokens(scores, m, totals, maxima, own)
    barrier()  # all are past the products
    _store(values, count, tile, other, ROTATED)
    fence_async_shared()
    barrier()
    result = ()
    for half in gl.static_range(2):
        channels = tile.slice(half * 64, 64, dim=1).permute((1, 0))
        result = result + (warpgroup_mma(channels, own, acc[half] * alpha[None, :], is_async=True),)
    return warpgroup_mma_wait(0, result), m, totals


@gluon.jit
def num_blocks(lengths, NEW: gl.constexpr, RAW: gl.constexpr):
    """Return how many units new tokens, sink and tail are. `lengths`: the last query, tokens of the sink, of the tail."""
    last_query, sink_end, tail = lengths
    new = last_query * 0
    sink = last_query * 0
    rest = last_query * 0
    if NEW:
        new = last_query // BLOCK + 1
    if RAW:
        sink = (gl.maximum(sink_end, 0) + (BLOCK - 1)) // BLOCK
        rest = (gl.maximum(tail, 0) + (BLOCK - 1)) // BLOCK
    return new, sink, rest


@gluon.jit
def attend_tokens(units, sources, seen, found, memory, factor):
    """Advance the state of a tile by a share of units of new tokens, of the sink, and of the tail, in that order.

    `units`: the first and the last one, and how many there are of each kind. `sources`: `new` and `raw` tokens, each () if
    there are none. `seen`: `query` and `lengths`. `memory` as in `_attend_block`.

    `new`: pointers to the first new key and value of a sequence and kv head, and their strides. `raw`: a pointer to the keys of
    a kv head, strides of pages, halves and tokens, pointers to the row of the raw table of sinks and of the tail, and how many
    slots that has. `query` [rows] are numbers among the query tokens, `lengths` (new tokens, sink, tokens of it, position of
    the first query in the body, where the tail begins there, and where it ends).
    """
    share, blocks = units
    new, raw = sources
    query, lengths = seen
    num_new, sink_len, sink_end, shift, tail_start, tail_end = lengths
    if len(new) > 0:
        for i in range(share[0], gl.minimum(share[1], blocks[0])):
            start = i * BLOCK
            place = start.to(gl.int64)
            source = (new[0] + place * new[2], new[1] + place * new[3], new[2], new[3])
            end = query + 1 - start
            found = _attend_block(source, num_new - start, end, found, memory, factor, False)
    if len(raw) > 0:
        keys_ptr, stride_page, stride_half, stride_token, sinks_ptr, tail_ptr, num_slots = raw
        for i in range(gl.maximum(share[0], blocks[0]), share[1]):
            in_sink = i - blocks[0] < blocks[1]
            start = gl.where(in_sink, i - blocks[0], i - blocks[0] - blocks[1]) * BLOCK + gl.where(in_sink, 0, tail_start)
            column_ptr = sinks_ptr + start // 128
            if not in_sink:
                column_ptr = tail_ptr + start // 128 % num_slots
            page = gl.maximum(gl.load(column_ptr), 0).to(gl.int64)
            k_ptr = keys_ptr + page * stride_page + (start % 128).to(gl.int64) * stride_token
            count = gl.where(in_sink, sink_end, tail_end) - start
            end = gl.minimum(query + 1 + shift + gl.where(in_sink, sink_len, 0) - start, count)
            source = (k_ptr, k_ptr + stride_half, stride_token, stride_token)
            found = _attend_block(source, count, end, found, memory, factor, True)
    return found
