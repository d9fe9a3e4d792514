"""Who attends to what: the work of all sequences and kv heads as one line of units, cut into pieces.

A unit is a quantized page, or a run of `raw_block` raw tokens, which is about as many bytes. With a window only pages and runs
with a token in it are units. Units are ordered by sequence, kv head and position; a piece may end one head and begin the next.
Everything follows from the lengths on the device, so that the grid depends on shapes only, whatever the lengths are, and one
long sequence among short ones is spread over the GPU.

Balanced (split_size = 0): no more pieces than programs; fewer where a piece would have less than LEAST_UNITS, because a program
costs about as much as a page before it has read one. If pieces of some size, hardly longer than an equal share, leave each head
pieces of its own, that is what they get, because a program that ends one head and begins the next starts twice; where there is
less than a unit for each program, looking for such a size costs more than it saves. Otherwise no two pieces differ by more than
one unit.
Invariant (split_size > 0): pieces of split_size units, from the first one of each head. Where a sequence is cut then depends on
its own lengths alone.

Kernels pass on what the units of a row follow from as one tuple `rows`: (seq_lens_ptr, num_quantized_ptr, sink_len, windows).

The part of piece p that belongs to head h (of sequence h // num_kv_heads) is partial result number h + p: both only grow
along the line, so no number occurs twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..cache import Cache
from ..configs import PrefillConfig
from ..masking import Windows, first_seen
from ..paging import sink_of

ROWS_AT_ONCE = tl.constexpr(128)
"""Sequences whose lengths are looked at together."""
FEW_ROWS = tl.constexpr(32)
"""The same where there are no more: one for each thread of a warp."""
LEAST_UNITS = tl.constexpr(5)
"""Units of a piece below which `few_programs` do the work."""
RAW_UNIT = tl.constexpr(32)
"""Raw tokens that count as a page where the programs of a tile of query rows share its work."""
TRIES = tl.constexpr(3)
"""Sizes of pieces that are tried, from an equal share on, before heads share pieces."""


@dataclass(frozen=True)
class Units:
    """What units are: the constants that kernels are compiled for."""

    page_size: int
    raw_block: int
    has_raw: bool


@dataclass(frozen=True)
class Work:
    """Which tokens a decode call attends to, and how that is cut: what both of its kernels have to agree on."""

    cache: Cache
    windows: Windows
    split_size: int  # 0: balanced
    num_programs: int
    few_programs: int
    units: Units


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which query rows a launch is for, and among how many programs the work of each tile is shared."""

    cache: Cache
    cu_seqlens_q: torch.Tensor | None  # None: each sequence has one token
    tokens: range
    num_splits: int
    split_size: int  # 0: equal shares
    fill: bool  # whether rows of no sequence are zeroed; their log-sum-exp always is -inf
    config: PrefillConfig
    ring: int  # pages of a sequence that scratch memory holds at once


@triton.jit
def row_units(rows, row, mask, UNITS: tl.constexpr):
    """Return of each row its length, its first visible position, where its units begin, and how many there are.

    The last two are for the sink, quantized pages and the tail, each counted from its own start. Every unit has a visible
    token.
    """
    G: tl.constexpr = UNITS.page_size
    BLOCK_R: tl.constexpr = UNITS.raw_block
    seq_lens_ptr, num_quantized_ptr, sink_len, windows = rows
    sink_len = sink_of(sink_len, row, mask)
    seq_len = tl.maximum(tl.load(seq_lens_ptr + row, mask, other=0), 0)
    body = tl.maximum(seq_len - sink_len, 0)
    pages = tl.cdiv(body, G)
    zero = tl.zeros_like(body)
    sinks = zero
    tails = zero
    if UNITS.has_raw:
        pages = tl.minimum(tl.maximum(tl.load(num_quantized_ptr + row, mask, other=0), 0), pages)
        sinks = tl.cdiv(tl.minimum(seq_len, sink_len), BLOCK_R)
        tails = tl.cdiv(tl.maximum(body - pages * G, 0), BLOCK_R)
    start = zero
    first_sink = zero
    first_page = zero
    first_tail = zero
    if windows.body is not None:
        start = first_seen(seq_len, windows.body)
        body_start = tl.maximum(start - sink_len, 0)
        first_page = tl.minimum(body_start // G, pages)
        if UNITS.has_raw:
            # The last run of a sink may reach past its end: no run at all if the window begins there.
            if windows.sink is not None:
                first_sink = tl.where(start < sink_len, start // BLOCK_R, sinks)
            first_tail = tl.maximum(body_start - pages * G, 0) // BLOCK_R
    return seq_len, start, (first_sink, first_page, first_tail), (sinks - first_sink, pages - first_page, tails - first_tail)


@triton.jit
def quotient(a, b):
    """Return a // b of two numbers that are not negative, without the instructions that signs take."""
    return (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)


@triton.jit
def rounded_up(units, split_size):
    """Return units rounded up to whole pieces of split_size units, if that is not 0."""
    align = tl.maximum(split_size, 1)
    return quotient(units + (align - 1), align) * align


@triton.jit
def _units_of_block(rows, first_row, batch, split_size, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """Return the units of one head of ROWS rows, rounded up to whole pieces in the invariant mode."""
    row = first_row + tl.arange(0, ROWS)
    _, _, _, counts = row_units(rows, row, row < batch, UNITS)
    return rounded_up(counts[0] + counts[1] + counts[2], split_size)


@triton.jit
def _total_units(rows, batch, num_kv_heads, split_size, UNITS: tl.constexpr):
    """Return the units of all heads, each rounded up to whole pieces of split_size units if that is not 0."""
    total = 0
    if batch <= FEW_ROWS:
        total = tl.sum(_units_of_block(rows, 0, batch, split_size, UNITS, FEW_ROWS), axis=0)
    else:
        for first_row in range(0, batch, ROWS_AT_ONCE):
            total += tl.sum(_units_of_block(rows, first_row, batch, split_size, UNITS, ROWS_AT_ONCE), axis=0)
    return total * num_kv_heads


@triton.jit
def plan(rows, batch, num_kv_heads, num_programs, few_programs, split_size, UNITS: tl.constexpr):
    """Return the number of pieces, the units of a piece, how many pieces at the start have one unit more, and the split size.

    The split size is that of the following functions: 0 where pieces may end one head and begin the next.
    """
    total = _total_units(rows, batch, num_kv_heads, split_size, UNITS)
    pieces = tl.where(total < LEAST_UNITS * num_programs, few_programs, num_programs)
    split = split_size
    if (split_size == 0) & (total >= num_programs) & (total > pieces):
        least = quotient(total + pieces - 1, pieces)
        for candidate in range(least, least + TRIES):
            if split == 0:
                aligned = _total_units(rows, batch, num_kv_heads, candidate, UNITS)
                if aligned <= candidate * pieces:
                    split = candidate
                    total = aligned
    size = total * 0
    if total >= pieces:
        size = quotient(total, pieces)
    longer = total - size * pieces
    if split > 0:
        pieces = quotient(total, split)
        size = split
        longer = 0
    return pieces, size, longer, split


@triton.jit
def start_of_piece(piece, size, longer):
    """Return the first unit of a piece."""
    return piece * size + tl.minimum(piece, longer)


@triton.jit
def piece_of_unit(unit, size, longer):
    """Return the piece that a unit belongs to."""
    past = unit - longer * (size + 1)
    return tl.where(past < 0, quotient(unit, size + 1), longer + quotient(tl.maximum(past, 0), tl.maximum(size, 1)))


@triton.jit
def find_row(rows, unit, batch, num_kv_heads, split_size, UNITS: tl.constexpr):
    """Return the row that a unit belongs to, and the row's first unit."""
    row = 0
    row_start = 0
    if batch <= FEW_ROWS:
        if batch > 1:
            ends = tl.cumsum(_units_of_block(rows, 0, batch, split_size, UNITS, FEW_ROWS), axis=0) * num_kv_heads
            passed = (ends <= unit) & (tl.arange(0, FEW_ROWS) < batch)
            row = tl.sum(passed.to(tl.int32), axis=0)
            row_start = tl.max(tl.where(passed, ends, 0), axis=0)
    else:
        before = 0
        for first_row in range(0, batch, ROWS_AT_ONCE):
            units = _units_of_block(rows, first_row, batch, split_size, UNITS, ROWS_AT_ONCE)
            ends = before + tl.cumsum(units, axis=0) * num_kv_heads
            passed = (ends <= unit) & (first_row + tl.arange(0, ROWS_AT_ONCE) < batch)
            row += tl.sum(passed.to(tl.int32), axis=0)
            row_start = tl.maximum(row_start, tl.max(tl.where(passed, ends, 0), axis=0))
            before += tl.sum(units, axis=0) * num_kv_heads
    return row, row_start


@triton.jit
def start_of_row(rows, row, num_kv_heads, split_size, UNITS: tl.constexpr):
    """Return the first unit of a row."""
    start = 0
    if row > 0:
        start = _total_units(rows, row, num_kv_heads, split_size, UNITS)
    return start


@triton.jit
def _tiles_of_block(cu_seqlens_ptr, first_row, batch, tokens, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return how many tiles of query rows of ROWS_AT_ONCE sequences have a token from `tokens[0]` to `tokens[1]`."""
    row = first_row + tl.arange(0, ROWS_AT_ONCE)
    start = tl.load(cu_seqlens_ptr + row, row < batch, other=0)
    end = tl.load(cu_seqlens_ptr + row + 1, row < batch, other=0)
    first = tl.maximum(tokens[0] - start, 0)
    last = tl.minimum(tokens[1], end) - start
    return tl.where(first < last, tl.cdiv(last * GROUP, BLOCK_M) - first * GROUP // BLOCK_M, 0)


@triton.jit
def find_tile(cu_seqlens_ptr, index, batch, tokens, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the sequence of the tile that has `index` tiles after it, `batch` if there is none, and its number within it.

    Only tiles with a token from `tokens[0]` to `tokens[1]` count. Where there is none, the number is -1 for the first index
    without a tile, and falls.
    """
    total = 0
    for first_row in range(0, batch, ROWS_AT_ONCE):
        total += tl.sum(_tiles_of_block(cu_seqlens_ptr, first_row, batch, tokens, GROUP, BLOCK_M), axis=0)
    tile = total - 1 - index
    row = 0
    row_start = 0
    before = 0
    for first_row in range(0, batch, ROWS_AT_ONCE):
        tiles = _tiles_of_block(cu_seqlens_ptr, first_row, batch, tokens, GROUP, BLOCK_M)
        ends = before + tl.cumsum(tiles, axis=0)
        passed = (ends <= tile) & (first_row + tl.arange(0, ROWS_AT_ONCE) < batch)
        row += tl.sum(passed.to(tl.int32), axis=0)
        row_start = tl.maximum(row_start, tl.max(tl.where(passed, ends, 0), axis=0))
        before += tl.sum(tiles, axis=0)
    row = tl.where(tile < 0, batch, row)
    skipped = tl.maximum(tokens[0] - tl.load(cu_seqlens_ptr + row), 0) * GROUP // BLOCK_M
    return row, tile - row_start + tl.where(tile < 0, 0, skipped)


@triton.jit
def free_token(cu_seqlens_ptr, batch, index):
    """Return the query token before which there are `index` tokens of no sequence: before the first one, or after the last."""
    first = tl.load(cu_seqlens_ptr)
    end = tl.load(cu_seqlens_ptr + batch)
    return index + tl.where(index < first, 0, end - first)


@triton.jit
def share_of_tile(split, num_splits, split_size, num_raw, first_page, last_page):
    """Return the share of program `split` of the `num_splits` of a tile: (first, last) of its raw units and of its pages.

    The line of a tile is num_raw units of RAW_UNIT raw tokens, then its pages. Programs share it equally; in the
    batch-invariant mode (split_size > 0) they have split_size pages each, and the first has all raw units.
    """
    size = tl.maximum(tl.cdiv(num_raw + tl.maximum(last_page - first_page, 0), num_splits), 1)
    first = split * size
    first_raw = tl.minimum(first, num_raw)
    last_raw = tl.minimum(first + size, num_raw)
    first -= num_raw
    if split_size > 0:
        size = split_size
        first = split * size
        first_raw = tl.where(split == 0, 0, num_raw)
        last_raw = num_raw
    last_page = tl.minimum(first_page + first + size, last_page)
    return (first_raw, last_raw), (first_page + tl.maximum(first, 0), last_page)
