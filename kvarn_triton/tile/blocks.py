"""A tile in registers, as a tuple of blocks: which thread holds what, and sums that cross threads in a known order.

A tile [page_size, head_dim] is cut into blocks [16 tokens, 16 or 32 channels], as many elements as a program has threads: a
thread holds one number of each block, every 16th token and every 16th (32nd) channel. What runs over blocks is arithmetic of
one thread, without moving anything; the rest of a sum crosses the lanes of a warp for channels, and warps for tokens.

    token vector    [16, BLOCK_C]: one number per token, in the lanes of those that hold it (`token_of`). Each lane of a row has
                    one block of tokens, so that what is computed per token is computed once, not in every lane.
    channel vector  [BLOCK_C * blocks]: one number per channel, one per thread (`channel_of`). The blocks are padded to a power
                    of two with repetitions of the first, so that extremes need no mask.

`reference.arithmetic.dot` gives the order of the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..reference import arithmetic
from .arithmetic import CODEC, fma, log2, to_half

TILE_TOKENS = tl.constexpr(arithmetic.BLOCK_TOKENS)
block_channels = triton.constexpr_function(arithmetic.block_channels)


@triton.jit
def add(a, b):
    """Return a + b."""
    return a + b


@triton.jit
def least(a, b):
    """Return the smaller of a and b."""
    return tl.minimum(a, b)


@triton.jit
def most(a, b):
    """Return the larger of a and b."""
    return tl.maximum(a, b)


@triton.jit
def rows_of(block):
    """Return the row of each element of a block [16, BLOCK_C]."""
    return tl.broadcast_to(tl.arange(0, block.shape[0])[:, None], block.shape)


@triton.jit
def lanes_of(block):
    """Return the column of each element of a block [16, BLOCK_C]."""
    return tl.broadcast_to(tl.arange(0, block.shape[1])[None, :], block.shape)


@triton.jit
def split_last(x):
    """Return [..., n] as a tuple of n blocks [...], n a power of two."""
    COUNT: tl.constexpr = x.shape[2]
    parts = (x,)
    for step in tl.static_range(log2(COUNT)):
        even = ()
        odd = ()
        for k in tl.static_range(len(parts)):
            a, b = tl.split(tl.reshape(parts[k], (x.shape[0], x.shape[1], COUNT >> (step + 1), 2)))
            even = even + (a,)
            odd = odd + (b,)
        parts = even + odd
    blocks = ()
    for k in tl.static_range(COUNT):
        blocks = blocks + (tl.reshape(parts[k], (x.shape[0], x.shape[1])),)
    return blocks


@triton.jit
def join_last(blocks):
    """Return a tuple of blocks [16, BLOCK_C] as one tensor [16, BLOCK_C, n]; n is padded with the first to a power of two."""
    ROWS: tl.constexpr = blocks[0].shape[0]
    LANES: tl.constexpr = blocks[0].shape[1]
    COUNT: tl.constexpr = triton.next_power_of_2(len(blocks))
    for _ in tl.static_range(COUNT - len(blocks)):
        blocks = blocks + (blocks[0],)
    for _ in tl.static_range(log2(COUNT)):
        joined = ()
        for k in tl.static_range(len(blocks) // 2):
            joined = joined + (tl.join(blocks[k], blocks[k + len(blocks) // 2]),)
        blocks = joined
    return tl.reshape(blocks[0], (ROWS, LANES, COUNT))


@triton.constexpr_function
def _chunk(page_size, head_dim, dtype):
    """Return how many blocks of tokens are loaded or stored at once.

    One access to many blocks costs the compiler far less time than many to one block each. The limit is 64 KiB of shared
    memory, through which numbers pass from the threads that hold neighbours in memory to those that hold a block.
    """
    limit = 2**16 * 8 // dtype.primitive_bitwidth
    return min(max(limit // (16 * triton.next_power_of_2(head_dim)), 1), page_size // 16)


@triton.jit
def _token_in_tile(P: tl.constexpr, Q: tl.constexpr):
    """Return the token of P x Q blocks [16, 1, blocks] of a tile."""
    BLOCKS: tl.constexpr = triton.next_power_of_2(Q)
    return tl.arange(0, P * BLOCKS)[None, None, :] // BLOCKS * TILE_TOKENS + tl.arange(0, TILE_TOKENS)[:, None, None]


@triton.jit
def _place_in_tile(P: tl.constexpr, Q: tl.constexpr, BLOCK_C: tl.constexpr, stride_token):
    """Return the offsets [16, BLOCK_C, blocks] of P x Q blocks in a tile, and which are not padding."""
    BLOCKS: tl.constexpr = triton.next_power_of_2(Q)
    block = tl.arange(0, P * BLOCKS)[None, None, :]
    token = block // BLOCKS * TILE_TOKENS + tl.arange(0, TILE_TOKENS)[:, None, None]
    channel = block % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :, None]
    return token * stride_token + channel, (channel < Q * BLOCK_C) & (token >= 0)


@triton.jit
def _from_lane(x, lanes, DISTANCE: tl.constexpr):
    """Return what the lane at a distance of a power of two holds."""
    return tl.gather(x, lanes ^ DISTANCE, axis=1)


@triton.jit
def _add_and_subtract(x, HALF: tl.constexpr):
    """Add and subtract channels at a distance of HALF: one step of a rotation of [16, BLOCK_C, blocks].

    `device.hadamard` gives the same bits, but leaves whole tokens in single threads.
    """
    BLOCK_C: tl.constexpr = x.shape[1]
    if HALF < BLOCK_C:
        lanes = tl.broadcast_to(tl.arange(0, BLOCK_C)[None, :, None], x.shape)
        sign = tl.where((lanes & HALF) != 0, -1.0, 1.0)
        y = fma(x, sign, _from_lane(x, lanes, HALF))
    else:
        PAIRS: tl.constexpr = x.shape[2] * BLOCK_C // (2 * HALF)
        pairs = tl.reshape(x, (x.shape[0], BLOCK_C, PAIRS, 2, HALF // BLOCK_C))
        a, b = tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3)), x.shape)
    return y


class Older(NamedTuple):
    """The first tokens of a tile, which are somewhere else, rotated: their memory."""

    ptr: tl.tensor
    stride_token: tl.tensor
    count: tl.tensor
    rounded: tl.tensor  # whether the others are rounded to the dtype of that memory


@triton.jit
def _join_older(x, others, older, token):
    """Round tokens to the dtype of older ones, and put those before them."""
    if older.ptr.dtype.element_ty == tl.float16:
        rounded = to_half(x).to(tl.float32)
    else:
        rounded = x.to(older.ptr.dtype.element_ty).to(tl.float32)
    return tl.where(token < older.count, others, tl.where(older.rounded > 0, rounded, x))


@triton.jit
def load_blocks(
    tile_ptr,
    stride_token,
    G: tl.constexpr,
    D: tl.constexpr,
    DTYPE: tl.constexpr = tl.float32,
    ROTATE: tl.constexpr = 1,
    older=None,
):
    """Load a tile [G, D] as blocks of DTYPE, those of the first 16 tokens first.

    Tokens are rotated by the Hadamard matrix in blocks of ROTATE channels (`reference.hadamard`). `older` has the first ones,
    if they are somewhere else, as float32.
    """
    tl.static_assert(CODEC != "")  # makes all constants of the encoder a part of the kernel's hash
    BLOCK_C: tl.constexpr = block_channels(D)
    Q: tl.constexpr = D // BLOCK_C
    CHUNK: tl.constexpr = _chunk(G, D, tile_ptr.dtype.element_ty)
    place, mask = _place_in_tile(CHUNK, Q, BLOCK_C, stride_token)
    blocks = ()
    for p in tl.static_range(0, G // TILE_TOKENS, CHUNK):
        if older is None:
            x = tl.load(tile_ptr + p * TILE_TOKENS * stride_token + place, mask, other=0).to(DTYPE)
        else:
            token = p * TILE_TOKENS + _token_in_tile(CHUNK, Q)
            new = mask & (token >= older.count)
            x = tl.load(tile_ptr + p * TILE_TOKENS * stride_token + place, new, other=0).to(DTYPE)
        if ROTATE > 1:
            for step in tl.static_range(log2(ROTATE)):
                x = _add_and_subtract(x, ROTATE >> (step + 1))
            x = x * (ROTATE**-0.5)
        parts = split_last(x)
        if older is not None:
            older_place = _place_in_tile(CHUNK, Q, BLOCK_C, older.stride_token)[0]
            y = tl.load(older.ptr + p * TILE_TOKENS * older.stride_token + older_place, mask & (token < older.count), other=0)
            others = split_last(y)
            for k in tl.static_range(len(parts)):
                if k % (len(parts) // CHUNK) < Q:
                    row = (p + k // (len(parts) // CHUNK)) * TILE_TOKENS + rows_of(parts[k])
                    blocks = blocks + (_join_older(parts[k], others[k].to(tl.float32), older, row),)
        else:
            for k in tl.static_range(len(parts)):
                if k % (len(parts) // CHUNK) < Q:
                    blocks = blocks + (parts[k],)
    return blocks


@triton.constexpr_function
def _padded_block(p, k, blocks):
    """Return the index of block k from block of tokens p on, if each of them is padded with repetitions of its last block."""
    padded = triton.next_power_of_2(blocks)
    return (p + k // padded) * blocks + min(k % padded, blocks - 1)


@triton.jit
def store_blocks(tile_ptr, blocks, G: tl.constexpr, D: tl.constexpr):
    """Store blocks to a contiguous tile [G, D]."""
    BLOCK_C: tl.constexpr = block_channels(D)
    Q: tl.constexpr = D // BLOCK_C
    CHUNK: tl.constexpr = _chunk(G, D, tile_ptr.dtype.element_ty)
    place, mask = _place_in_tile(CHUNK, Q, BLOCK_C, D)
    for p in tl.static_range(0, G // TILE_TOKENS, CHUNK):
        parts = ()
        for k in tl.static_range(CHUNK * triton.next_power_of_2(Q)):
            parts = parts + (blocks[_padded_block(p, k, Q)],)
        tl.store(tile_ptr + p * TILE_TOKENS * D + place, join_last(parts).to(tile_ptr.dtype.element_ty), mask)


@triton.jit
def _combine_lanes(partials, lanes, OP: tl.constexpr, DISTANCE: tl.constexpr):
    """Combine lanes at a distance; as long as there are several blocks, each lane keeps the result of half of them."""
    if len(partials) == 1:
        kept = (OP(partials[0], _from_lane(partials[0], lanes, DISTANCE)),)
    else:
        upper = (lanes & DISTANCE) != 0
        kept = ()
        for k in tl.static_range(len(partials) // 2):
            a = partials[k]
            b = partials[k + len(partials) // 2]
            kept = kept + (OP(tl.where(upper, b, a), _from_lane(tl.where(upper, a, b), lanes, DISTANCE)),)
    return kept


@triton.jit
def token_vector(partials, OP: tl.constexpr):
    """Combine a tuple of partial results [16, BLOCK_C], one per block of tokens, over their lanes: a token vector."""
    lanes = lanes_of(partials[0])
    for step in tl.static_range(log2(partials[0].shape[1])):
        partials = _combine_lanes(partials, lanes, OP, partials[0].shape[1] >> (step + 1))
    return partials[0]


@triton.jit
def token_of(vector, COUNT: tl.constexpr):
    """Return the token of each element of a token vector of COUNT blocks."""
    return rows_of(vector) + lanes_of(vector) // (vector.shape[1] // COUNT) * TILE_TOKENS


@triton.jit
def spread_tokens(vector, COUNT: tl.constexpr):
    """Return a token vector as a tuple of COUNT blocks [16, BLOCK_C], the same number in all lanes of a token."""
    spread = ()
    for p in tl.static_range(COUNT):
        lane = tl.full(vector.shape, p * (vector.shape[1] // COUNT), tl.int32)
        spread = spread + (tl.gather(vector, lane, axis=1),)
    return spread


@triton.jit
def _over_rows(x, OP: tl.constexpr):
    """Combine [16, n] over its rows, always the second half with the first: [n]."""
    WIDTH: tl.constexpr = x.shape[1]
    for step in tl.static_range(log2(TILE_TOKENS)):
        a, b = tl.split(tl.permute(tl.reshape(x, (2, TILE_TOKENS >> (step + 1), WIDTH)), (1, 2, 0)))
        x = OP(a, b)
    return tl.reshape(x, (WIDTH,))


@triton.jit
def channel_vector(partials, OP: tl.constexpr):
    """Combine a tuple of partial results [16, BLOCK_C], one per block of channels, over their rows: a channel vector."""
    joined = join_last(partials)
    return _over_rows(tl.reshape(joined, (TILE_TOKENS, joined.shape[1] * joined.shape[2])), OP)


@triton.jit
def channel_of(vector, BLOCK_C: tl.constexpr):
    """Return the channel of each element of a channel vector; those from head_dim on are padding."""
    index = tl.arange(0, vector.shape[0])
    PADDED: tl.constexpr = vector.shape[0] // BLOCK_C
    return index % PADDED * BLOCK_C + index // PADDED


@triton.jit
def spread_channels(vector, COUNT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a channel vector as a tuple of COUNT blocks [16, BLOCK_C], the same number in all rows of a channel."""
    WIDTH: tl.constexpr = vector.shape[0]
    PADDED: tl.constexpr = WIDTH // BLOCK_C
    everywhere = tl.gather(vector, tl.arange(0, TILE_TOKENS * WIDTH) % WIDTH, axis=0)
    spread = split_last(tl.reshape(everywhere, (TILE_TOKENS, BLOCK_C, PADDED)))
    blocks = ()
    for q in tl.static_range(COUNT):
        blocks = blocks + (spread[q],)
    return blocks


@triton.jit
def sum_of_tokens(vector, COUNT: tl.constexpr):
    """Sum a token vector of COUNT blocks, always the second half of the tokens onto the first: a scalar."""
    lanes = lanes_of(vector)
    for step in tl.static_range(log2(COUNT)):
        vector += _from_lane(vector, lanes, vector.shape[1] >> (step + 1))
    return tl.max(_over_rows(vector, add), axis=0)
