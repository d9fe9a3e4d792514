"""Queries of `hopper_drafts`: which rows a program has, and their rotation, in planes of channels (`query.rotate_planes`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..tile.gluon import reinterpret
from . import query

CHANNELS = gl.constexpr(128)
"""Of keys and of values: one block of the rotation."""
SEQUENCES = gl.constexpr(128)
"""Sequences whose tiles are counted together."""
_THREADS = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
_QUERY_MAX = gl.constexpr(query.QUERY_MAX.value)
_LEAST_QUERY = gl.constexpr(query.LEAST_QUERY.value)
_ON_THE_WAY = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def find_tile(cu_seqlens_ptr, index, batch, GROUP: gl.constexpr, ROWS: gl.constexpr):
    """Return the sequence of a tile, its number within it, and whether there is such a tile."""
    TILES: gl.constexpr = (GROUP + ROWS - 1) // ROWS
    row = index // TILES
    start = row * TILES
    before = batch * TILES
    if cu_seqlens_ptr is not None:
        row, start, before = index * 0, index * 0, index * 0
        for first in range(0, batch, SEQUENCES):
            each = first + gl.arange(0, SEQUENCES, _THREADS)
            begin = gl.load(cu_seqlens_ptr + each, each < batch, other=0)
            end = gl.load(cu_seqlens_ptr + each + 1, each < batch, other=0)
            tiles = gl.maximum(((end - begin) * GROUP + (ROWS - 1)) // ROWS, 0)
            ends = before + gl.associative_scan(tiles, 0, _add)
            passed = (ends <= index) & (each < batch)
            row += gl.sum(passed.to(gl.int32), 0)
            start = gl.maximum(start, gl.max(gl.where(passed, ends, 0), 0))
            before += gl.sum(tiles, 0)
    return row, index - start, index < before


@gluon.constexpr_function
def rows_layout(rows, low):
    """Return a layout of [rows, CHANNELS] in which a thread has 16 channels: those of their low bits, or of their high ones."""
    more = [[16, 0]] if rows == 32 else []
    if low:
        registers, lanes = [[0, 1], [0, 2], [0, 4], [0, 8]], [[0, 16], [0, 32], [0, 64]]
    else:
        registers, lanes = [[0, 16], [0, 32], [0, 64], [0, 1]], [[0, 2], [0, 4], [0, 8]]
    lanes = [*lanes, [1, 0], [2, 0]]
    return gl.DistributedLinearLayout(registers + more, lanes, [[4, 0], [8, 0]], [], [rows, CHANNELS.value])


@gluon.jit
def _butterfly(x, WIDTH: gl.constexpr):
    """Replace neighbouring runs a, b of WIDTH columns by a + b, a - b."""
    ROWS: gl.constexpr = x.shape[0]
    pairs = gl.reshape(x, (ROWS, CHANNELS // (2 * WIDTH), 2, WIDTH))
    a, b = gl.split(gl.permute(pairs, (0, 1, 3, 2)))
    return gl.reshape(gl.permute(gl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, CHANNELS))


@gluon.jit
def rotate(x, slot):
    """Multiply rows [rows, CHANNELS] float32 by the Hadamard matrix of ones. They go through a slot of shared memory."""
    ROWS: gl.constexpr = x.shape[0]
    memory = reinterpret(slot, gl.float32, [ROWS, CHANNELS], _ON_THE_WAY)
    for i in gl.static_range(4):
        x = _butterfly(x, 1 << i)
    memory.store(x)
    x = memory.load(rows_layout(ROWS, False))
    for i in gl.static_range(4, 7):
        x = _butterfly(x, 1 << i)
    return x


@gluon.jit
def store_queries(q, tile, head, slot, memory, FIELDS: gl.constexpr, GROUP: gl.constexpr):
    """Put the rotated queries of a tile into shared memory; return a factor of their scores.

    `memory`: planes, float16 [planes * rows, words]; rows [rows, CHANNELS], a tuple of one or none, and whether these are
    needed. `tile` is (first token of its sequence, first row, number of rows); rows that are not there are 0. The largest
    finite number is QUERY_MAX.
    """
    planes, raw_queries, some = memory
    WORDS: gl.constexpr = CHANNELS // FIELDS // 2
    ROWS: gl.constexpr = planes.shape[0] // (2 * FIELDS)
    LAYOUT: gl.constexpr = rows_layout(ROWS, True)
    first_token, first_row, num_rows = tile
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    token = (first_token + (first_row + row) // GROUP).to(gl.int64)
    q_head = (head * GROUP + (first_row + row) % GROUP).to(gl.int64)
    place = (token * q[1] + q_head * q[2])[:, None] + gl.arange(0, CHANNELS, gl.SliceLayout(0, LAYOUT))[None, :]
    x = rotate(gl.load(q[0] + place, (row < num_rows)[:, None], other=0.0).to(gl.float32), slot)
    size = gl.abs(x)
    largest = gl.max(gl.max(gl.where(size < float("inf"), size, 0.0), 1), 0)
    factor = _QUERY_MAX / gl.maximum(largest, _LEAST_QUERY * CHANNELS**0.5)
    x *= factor
    if len(raw_queries) > 0:  # noqa: SIM102 - known to the compiler
        if some:
            raw_queries[0].store(x.to(raw_queries[0].dtype))
    x = gl.permute(gl.reshape(x.to(gl.float16), (ROWS, FIELDS, WORDS, 2)), (1, 3, 0, 2))
    planes.store(gl.reshape(x, (2 * FIELDS * ROWS, WORDS)))
    return CHANNELS**-0.5 / factor
