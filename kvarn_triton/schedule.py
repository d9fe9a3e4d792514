"""Who attends to what: the work of all sequences and kv heads as one line of units, cut into pieces.

A unit is a quantized page, or a run of BLOCK_R raw tokens, which is about as many bytes. Units are ordered by sequence, kv
head and position; a piece may end one head and begin the next. Everything follows from the lengths on the device, so that
the grid depends on shapes only, whatever the lengths are, and one long sequence among short ones is spread over the GPU.

Balanced (split_size = 0): no more pieces than programs; fewer where a piece would have less than LEAST_UNITS, because a program
costs about as much as a page before it has read one. If pieces of some size, hardly longer than an equal share, leave each head
pieces of its own, that is what they get, because a program that ends one head and begins the next starts twice; where there is
less than a unit for each program, looking for such a size costs more than it saves. Otherwise no two pieces differ by more than
one unit.
Invariant (split_size > 0): pieces of split_size units; every head starts a new piece. Where a sequence is cut then depends on
its own length alone.

The part of piece p that belongs to head h (of sequence h // num_kv_heads) is partial result number h + p: both only grow
along the line, so no number occurs twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_B = tl.constexpr(128)
"""Sequences whose lengths are looked at together."""
LEAST_UNITS = tl.constexpr(5)
"""Units of a piece below which `few_programs` do the work."""
TRIES = tl.constexpr(3)
"""Sizes of pieces that are tried, from an equal share on, before heads share pieces."""


@triton.jit
def row_lengths(
    seq_lens_ptr, num_quantized_ptr, rows, mask, sink_len, G: tl.constexpr, BLOCK_R: tl.constexpr, HAS_RAW: tl.constexpr
):
    """Return of each row its length, and its units in the sink, in quantized pages and in the tail."""
    seq_len = tl.load(seq_lens_ptr + rows, mask, other=0)
    body = tl.maximum(seq_len - sink_len, 0)
    pages = tl.cdiv(body, G)
    sink_units = tl.zeros_like(body)
    tail_units = tl.zeros_like(body)
    if HAS_RAW:
        pages = tl.minimum(tl.load(num_quantized_ptr + rows, mask, other=0), pages)
        sink_units = tl.cdiv(tl.minimum(seq_len, sink_len), BLOCK_R)
        tail_units = tl.cdiv(tl.maximum(body - pages * G, 0), BLOCK_R)
    return seq_len, sink_units, pages, tail_units


@triton.jit
def _units_of_rows(
    seq_lens_ptr,
    num_quantized_ptr,
    first_row,
    batch,
    sink_len,
    split_size,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_RAW: tl.constexpr,
):
    """Return the units of one head of BLOCK_B rows, rounded up to whole pieces in the invariant mode."""
    rows = first_row + tl.arange(0, BLOCK_B)
    _, sink, pages, tail = row_lengths(seq_lens_ptr, num_quantized_ptr, rows, rows < batch, sink_len, G, BLOCK_R, HAS_RAW)
    align = tl.maximum(split_size, 1)
    return tl.cdiv(sink + pages + tail, align) * align


@triton.jit
def _total_units(
    seq_lens_ptr,
    num_quantized_ptr,
    batch,
    num_kv_heads,
    sink_len,
    split_size,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_RAW: tl.constexpr,
):
    """Return the units of all heads, each rounded up to whole pieces of split_size units if that is not 0."""
    total = 0
    for first_row in range(0, batch, BLOCK_B):
        units = _units_of_rows(
            seq_lens_ptr, num_quantized_ptr, first_row, batch, sink_len, split_size, G, BLOCK_R, HAS_RAW
        )  # fmt: skip
        total += tl.sum(units, axis=0) * num_kv_heads
    return total


@triton.jit
def plan(
    seq_lens_ptr,
    num_quantized_ptr,
    batch,
    num_kv_heads,
    num_programs,
    few_programs,
    sink_len,
    split_size,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_RAW: tl.constexpr,
):
    """Return the number of pieces, the units of a piece, how many pieces at the start have one unit more, and the split size.

    The split size is that of the following functions: 0 where pieces may end one head and begin the next.
    """
    total = _total_units(
        seq_lens_ptr, num_quantized_ptr, batch, num_kv_heads, sink_len, split_size, G, BLOCK_R, HAS_RAW
    )  # fmt: skip
    pieces = tl.where(total < LEAST_UNITS * num_programs, few_programs, num_programs)
    split = split_size
    if (split_size == 0) & (total >= num_programs):
        least = tl.maximum(tl.cdiv(total, pieces), 1)
        for candidate in range(least, least + TRIES):
            if split == 0:
                aligned = _total_units(
                    seq_lens_ptr, num_quantized_ptr, batch, num_kv_heads, sink_len, candidate, G, BLOCK_R, HAS_RAW
                )  # fmt: skip
                if aligned <= candidate * pieces:
                    split = candidate
                    total = aligned
    size = total // pieces
    longer = total - size * pieces
    if split > 0:
        pieces = total // split
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
    return tl.where(past < 0, unit // (size + 1), longer + past // tl.maximum(size, 1))


@triton.jit
def find_row(
    seq_lens_ptr,
    num_quantized_ptr,
    unit,
    batch,
    num_kv_heads,
    sink_len,
    split_size,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_RAW: tl.constexpr,
):
    """Return the row that a unit belongs to, and the row's first unit."""
    row = 0
    row_start = 0
    before = 0
    for first_row in range(0, batch, BLOCK_B):
        units = _units_of_rows(
            seq_lens_ptr, num_quantized_ptr, first_row, batch, sink_len, split_size, G, BLOCK_R, HAS_RAW
        )  # fmt: skip
        ends = before + tl.cumsum(units, axis=0) * num_kv_heads
        passed = (ends <= unit) & (first_row + tl.arange(0, BLOCK_B) < batch)
        row += tl.sum(passed.to(tl.int32), axis=0)
        row_start = tl.maximum(row_start, tl.max(tl.where(passed, ends, 0), axis=0))
        before += tl.sum(units, axis=0) * num_kv_heads
    return row, row_start


@triton.jit
def start_of_row(
    seq_lens_ptr,
    num_quantized_ptr,
    row,
    num_kv_heads,
    sink_len,
    split_size,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_RAW: tl.constexpr,
):
    """Return the first unit of a row."""
    start = 0
    for first_row in range(0, row, BLOCK_B):
        units = _units_of_rows(
            seq_lens_ptr, num_quantized_ptr, first_row, row, sink_len, split_size, G, BLOCK_R, HAS_RAW
        )  # fmt: skip
        start += tl.sum(units, axis=0) * num_kv_heads
    return start
