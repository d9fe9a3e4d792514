"""From the bytes of a record to tokens: what a program that dequantizes does with some of its tokens.

    [lanes, rows, m, n]     first a thread holds every 8th channel of some tokens. What is read per channel is read once for all
                            tokens, and steps of the rotation that add channels 8 or more apart are arithmetic of one thread.
    [tokens, block_size]    then it holds 8 neighbouring channels, as they are written, and does the other steps.

Numbers change threads once in between, through shared memory. A row is a token of keys, and of values a byte: tokens that share
it. Operations and their order are those of `reference.cache.decode_records`, which makes the results equal bit for bit in
kernels compiled with `enable_fp_fusion=False`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from ..paging import prefetch
from .arithmetic import fma, log2, power_of_two, split_halves
from .codes import code_in_byte, load_sums
from .high_bits import field_width

STORE_RUN = tl.constexpr(8)
"""Neighbouring channels that a thread writes: 16 bytes of 16-bit numbers."""
ELEMENTS = tl.constexpr(32)
"""Numbers of a chunk that a thread holds, if it needn't hold more channels."""
DOWN = tl.constexpr(37)
"""Decoded numbers are 2**DOWN times too small until they are multiplied by the norm (`_decode`)."""
LANES_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))
"""Which axes of a load Triton spreads over lanes where it knows of no neighbours: the first, or the last. Only speed depends on
it."""


@dataclass(frozen=True)
class ReadPlan:
    """What a kernel that dequantizes pages is compiled for."""

    k_fields: int
    v_fields: int
    blocks: int  # of the rotation, of keys or of values, whichever are more
    num_warps: int
    threads: int
    rotated: bool  # whether tokens stay rotated
    ptx: bool


class Chunk(NamedTuple):
    """What a program dequantizes: a part of the keys or of the values of one page and kv head, in one block of channels."""

    entry: tl.tensor  # of a list of pages
    head: tl.tensor  # int64
    half: tl.tensor  # 0: keys, 1: values
    block: tl.tensor
    part: tl.tensor
    parts: tl.tensor


class Target(NamedTuple):
    """Where tokens of a page go: that of token 0, and how many have a place; None: all."""

    ptr: tl.tensor
    stride_token: tl.tensor
    num_tokens: tl.tensor


@triton.jit
def _index(SIZE: tl.constexpr, AXIS: tl.constexpr):
    """Return 0 ... SIZE - 1 along an axis of [lanes, rows, m, fields, n], in the order of axes that loads have.

    Lanes and rows are masked: Triton then knows of no neighbours in memory, and loads each number in the thread that needs it.
    """
    numbers = tl.arange(0, SIZE)
    if AXIS < 2:
        numbers = numbers & (SIZE - 1)
    for _ in tl.static_range(AXIS if LANES_FIRST else 4 - AXIS):
        numbers = tl.expand_dims(numbers, 0)
    for _ in tl.static_range(4 - AXIS if LANES_FIRST else AXIS):
        numbers = tl.expand_dims(numbers, -1)
    return numbers


@triton.jit
def _spread(x, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Broadcast an index over all lanes and rows, so that every thread loads what it needs."""
    if LANES_FIRST:
        y = tl.broadcast_to(x, (LANES, ROWS, x.shape[2], x.shape[3], x.shape[4]))
    else:
        y = tl.broadcast_to(x, (x.shape[0], x.shape[1], x.shape[2], ROWS, LANES))
    return y


@triton.jit
def _lanes_first(x):
    """Return what was loaded as [lanes, rows, m, fields, n]."""
    return x if LANES_FIRST else tl.permute(x, (4, 3, 2, 1, 0))


@triton.jit
def _scale_and_zero(words, field, BITS: tl.constexpr):
    """Return the scale and zero of parameters, float32, as `_decode` uses them for a field."""
    scale, zero = split_halves(words)
    return scale.to(tl.float32) * power_of_two(field * -field_width(BITS) + (149 - DOWN)), zero.to(tl.float32) * (2.0**-DOWN)


@triton.jit
def _decode(packed, high, field, scale, zero, BITS: tl.constexpr):
    """Return code * scale + zero of a field of bytes, divided by 2**DOWN: float32.

    A code stays at its place in the byte: the bits of a small integer are a subnormal float32, 2**-149 times as large. The
    largest scale, of float16, times the rest of that still is a float32 if the result is divided by 2**DOWN. The product of a
    code and a scale is exact, so that one rounding is that of the reference.
    """
    code = code_in_byte(packed, high, field, BITS)
    return fma(code.to(tl.float32, bitcast=True), scale, zero)


@triton.jit
def _norm_factor(norm, gain, BLOCK: tl.constexpr, ROTATED: tl.constexpr):
    """Return what `_decode` leaves to multiply by, for numbers that stay rotated or for those that `_to_tokens` rotates back.

    It overflows where norm times gain reaches 2**(128 - DOWN). The encoder stays below 2**88 as long as the root mean square of
    a tile is below its limit, 1e19.
    """
    factor = norm.to(tl.float32)
    if not ROTATED:
        factor = factor * (BLOCK**-0.5)
    return factor * gain * (2.0**DOWN)


@triton.jit
def _add_and_subtract(x, HALF: tl.constexpr):
    """Add and subtract numbers [lanes, rows, m, n] at a distance of HALF along the last axis."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] * x.shape[3] // (2 * HALF), 2, HALF))
    a, b = tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3)), x.shape)


@triton.jit
def _butterflies(x):
    """Add and subtract numbers [lanes, rows, m, n] at all distances along the last axis (`arithmetic.butterflies`)."""
    for step in tl.static_range(log2(x.shape[3])):
        x = _add_and_subtract(x, x.shape[3] >> (step + 1))
    return x


@triton.jit
def _to_tokens(x, ROTATED: tl.constexpr):
    """Rotate numbers [lanes, rows, m, n] of channels n * lanes + lane: [m * rows, n * lanes]."""
    if not ROTATED:
        x = _butterflies(x)
    LANES: tl.constexpr = x.shape[0]
    TOKENS: tl.constexpr = x.shape[1] * x.shape[2]
    y = tl.reshape(tl.permute(x, (2, 1, 3, 0)), (1, 1, TOKENS * x.shape[3], LANES))
    if not ROTATED:
        y = _butterflies(y)
    return tl.reshape(y, (TOKENS, x.shape[3] * LANES))


@triton.jit
def store_tokens(out, tile, token):
    """Store tokens [tokens, channels] to their places, where they have one."""
    place = token.to(tl.int64)[:, None] * out.stride_token + tl.arange(0, tile.shape[1])[None, :]
    if out.num_tokens is None:
        tl.store(out.ptr + place, tile.to(out.ptr.dtype.element_ty))
    else:
        tl.store(out.ptr + place, tile.to(out.ptr.dtype.element_ty), (token < out.num_tokens)[:, None])


@triton.jit
def dequantize_keys(out, record_ptr, chunk, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Write a part of a block of the keys of a record; fields of a byte are channels.

    The codes of the next tokens are brought near while some are worked on.
    """
    FIELDS: tl.constexpr = PLAN.k_fields
    G: tl.constexpr = LAYOUT.page_size
    BLOCK: tl.constexpr = LAYOUT.block_size
    out = Target(out.ptr + chunk.block * BLOCK, out.stride_token, out.num_tokens)
    BYTES: tl.constexpr = BLOCK // FIELDS
    LANES: tl.constexpr = min(BYTES, STORE_RUN)
    ROWS: tl.constexpr = PLAN.threads // LANES
    N: tl.constexpr = BYTES // LANES
    M: tl.constexpr = max(min(ELEMENTS // (FIELDS * N), G // ROWS), 1)
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32)) + chunk.block * BLOCK
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    own = (_index(ROWS, 1), _index(LANES, 0))
    place = (_index(M, 2) * ROWS, _index(N, 4) * LANES)
    field = _index(FIELDS, 3)
    params = tl.load(params_ptr + _spread(own[1] + (field * BYTES + place[1]), LANES, ROWS))
    scale, zero = _scale_and_zero(params, field, LAYOUT.k_bits)
    codes_ptr = record_ptr + LAYOUT.k_codes_offset
    STRIDE: tl.constexpr = LAYOUT.head_dim // FIELDS
    CHUNK: tl.constexpr = M * ROWS
    for first in range(chunk.part * CHUNK, G, chunk.parts * CHUNK):
        prefetch(codes_ptr + tl.minimum(first + chunk.parts * CHUNK, G - CHUNK) * STRIDE, CHUNK * STRIDE, "L1", PLAN.ptx)
        token = first + tl.arange(0, CHUNK)
        factor = _norm_factor(tl.load(norm_ptr + token), gain, BLOCK, PLAN.rotated)
        packed, high = load_sums(codes_ptr, (first, chunk.block * BYTES), own, place, G, STRIDE, LAYOUT.k_bits)
        x = _lanes_first(_decode(packed, high, field, scale, zero, LAYOUT.k_bits))
        tile = _to_tokens(tl.reshape(x, (LANES, ROWS, M, FIELDS * N)), PLAN.rotated)
        store_tokens(out, tile * factor[:, None], token)


@triton.jit
def _load_value_params(params_ptr, first_field, own, place, SOME: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr):
    """Return a tuple of the scales and zeros of SOME fields of bytes `own` + `place` of values."""
    return (tl.load(params_ptr + _spread(own, STORE_RUN, ROWS) + ((first_field + _index(SOME, 3)) * BYTES + place)),)


@triton.jit
def _dequantize_values(out, record_ptr, chunk, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Write a part of a block of the values of a record; fields of a byte are tokens, some of which are decoded at a time."""
    FIELDS: tl.constexpr = PLAN.v_fields
    BLOCK: tl.constexpr = LAYOUT.v_block_size
    out = Target(out.ptr + chunk.block * BLOCK, out.stride_token, out.num_tokens)
    BYTES: tl.constexpr = LAYOUT.page_size // FIELDS
    ROWS: tl.constexpr = PLAN.threads // STORE_RUN
    N: tl.constexpr = BLOCK // STORE_RUN
    SOME: tl.constexpr = max(min(ELEMENTS // N, FIELDS), 1)
    M: tl.constexpr = max(min(ELEMENTS // (SOME * N), BYTES // ROWS), 1)
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    norm_ptr = (record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16)) + chunk.block * BLOCK
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1)
    own = (_index(STORE_RUN, 0), _index(ROWS, 1))
    place = (_index(N, 4) * STORE_RUN, _index(M, 2) * ROWS)
    factor = _norm_factor(tl.load(norm_ptr + _spread(own[0] + place[0], STORE_RUN, ROWS)), gain, BLOCK, PLAN.rotated)
    for first in range(chunk.part * M * ROWS, BYTES, chunk.parts * M * ROWS):
        packed, high = load_sums(
            record_ptr + LAYOUT.v_codes_offset,
            (chunk.block * BLOCK, first),
            own,
            place,
            LAYOUT.v_head_dim,
            BYTES,
            LAYOUT.v_bits,
        )
        params = ()
        for first_field in tl.static_range(0, FIELDS, SOME):
            params = params + _load_value_params(params_ptr + first, first_field, own[1], place[1], SOME, BYTES, ROWS)
        for first_field in tl.static_range(0, FIELDS, SOME):
            field = first_field + _index(SOME, 3)
            scale, zero = _scale_and_zero(params[first_field // SOME], field, LAYOUT.v_bits)
            x = _lanes_first(_decode(packed, high, field, scale, zero, LAYOUT.v_bits) * factor)
            tile = _to_tokens(tl.reshape(x, (STORE_RUN, ROWS, M * SOME, N)), PLAN.rotated)
            i = tl.arange(0, M * SOME * ROWS)
            token = (first_field + i // ROWS % SOME) * BYTES + first + i // (SOME * ROWS) * ROWS + i % ROWS
            store_tokens(out, tile, token)


@triton.jit
def dequantize_chunk(outs, record_ptr, chunk, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Write a chunk of a record to its place: outs[0] of keys, outs[1] of values, both a `Target`.

    Nothing is written if only the other half of the record has such a block.
    """
    K_BLOCKS: tl.constexpr = LAYOUT.head_dim // LAYOUT.block_size
    V_BLOCKS: tl.constexpr = LAYOUT.v_head_dim // LAYOUT.v_block_size
    if chunk.half == 0:
        if (K_BLOCKS >= V_BLOCKS) or (chunk.block < K_BLOCKS):
            dequantize_keys(outs[0], record_ptr, chunk, LAYOUT, PLAN)
    elif (V_BLOCKS >= K_BLOCKS) or (chunk.block < V_BLOCKS):
        _dequantize_values(outs[1], record_ptr, chunk, LAYOUT, PLAN)
