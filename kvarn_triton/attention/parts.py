"""What a program of a decode call attends to, part by part; and the first parts of all programs as a list, made beforehand.

A part is what a piece of the work (`schedule`) has of one sequence and tile of query heads. A program finds its first part by
itself, which takes it a chain of loads: lengths, then the id of a page. Or it loads its record of a list that one launch made
for all layers of a step. Later parts are found in either case. One program makes one record. Grid: (program,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import configs, gpu
from ..launch import on
from ..paging import ids_of_row, load_page_id
from .schedule import Units, Work, find_row, plan, quotient, rounded_up, row_units, start_of_piece

RECORD = tl.constexpr(32)
"""Numbers of a record: a cache line of 128 bytes."""


@dataclass(frozen=True, eq=False)
class DecodeSchedule:
    """What the programs of decode attention begin with: made once a step by `schedule_decode`, for all layers."""

    records: torch.Tensor
    """int32 [rounds, programs, 32]."""
    made_for: str
    """Which calls it is for: those of other sizes and options refuse it."""


class Cut(NamedTuple):
    """How the line of units is cut: as `schedule.plan` returns it."""

    pieces: tl.tensor
    size: tl.tensor
    longer: tl.tensor
    split: tl.tensor


class Part(NamedTuple):
    """The part of a piece that belongs to one sequence and tile of query heads."""

    piece: tl.tensor
    number: tl.tensor  # of its partial result
    next_unit: tl.tensor  # after it
    row: tl.tensor
    head: tl.tensor  # kv head
    first_head: tl.tensor  # query head of that kv head
    seq_len: tl.tensor
    start: tl.tensor  # first position that is seen
    first_page: tl.tensor  # of the body
    last_page: tl.tensor
    page: tl.tensor  # id of the first page, 0 if there is none
    runs: tl.tensor  # of raw tokens: as `tokens.Runs` has them


@dataclass(frozen=True)
class PartPlan:
    """What parts are compiled for; `DecodePlan` has all of it too."""

    group: int  # query heads of a kv head
    tile: int  # query heads of a tile
    units: Units
    ptx: bool


@triton.jit
def _part_from(piece, unit, cut, rows, tables, batch, num_tiles, PLAN: tl.constexpr):
    """Return the part of a piece that begins with a unit; `tables` are (ids_ptr, indptr_ptr, stride)."""
    UNITS: tl.constexpr = PLAN.units
    TILES: tl.constexpr = triton.cdiv(PLAN.group, PLAN.tile)
    end = start_of_piece(piece + 1, cut.size, cut.longer)
    row, row_start = find_row(rows, unit, batch, num_tiles, cut.split, UNITS)
    seq_len, start, begins, counts = row_units(rows, row, row < batch, UNITS)
    num_sinks, num_paged, num_tails = counts
    units_of_row = num_sinks + num_paged + num_tails
    aligned_units = rounded_up(units_of_row, cut.split)
    tile = quotient(unit - row_start, tl.maximum(aligned_units, 1))  # 0 behind the last row
    first = unit - row_start - tile * aligned_units
    last = tl.minimum(first + end - unit, units_of_row)
    first_page = begins[1] + tl.maximum(first - num_sinks, 0)
    last_page = begins[1] + tl.minimum(last - num_sinks, num_paged)
    if rows[3].body is not None:
        last_page = tl.where(first_page < last_page, last_page, 0)  # no id is read where there is no page
    first_tail = tl.maximum(first - num_sinks - num_paged, 0)
    num_runs = tl.maximum(tl.minimum(last, num_sinks) - first, 0), tl.maximum(last - num_sinks - num_paged - first_tail, 0)
    tail_token = (begins[1] + num_paged) * UNITS.page_size
    # Not in a branch, at whose end the compiler would wait for it.
    ids_ptr = ids_of_row(tables[0], tables[1], row, tables[2])
    page = load_page_id(ids_ptr, first_page, tl.where(first_page < last_page, last_page, 0), PLAN.ptx)
    return Part(
        piece, row * num_tiles + tile + piece, row_start + (tile + 1) * aligned_units, row, tile // TILES,
        tile % TILES * PLAN.tile, seq_len, start, first_page, last_page, page,
        (begins[0] + first, num_runs[0], begins[2] + first_tail, num_runs[1], tail_token),
    )  # fmt: skip


@triton.jit
def first_part(rows, tables, sizes, PLAN: tl.constexpr):
    """Return how the line is cut, the first part of this program, and whether there is one.

    `sizes` are (batch, num_tiles, num_programs, few_programs, split_size).
    """
    batch, num_tiles, num_programs, few_programs, split_size = sizes
    UNITS: tl.constexpr = PLAN.units
    pieces, size, longer, split = plan(rows, batch, num_tiles, num_programs, few_programs, split_size, UNITS)
    cut = Cut(pieces, size, longer, split)
    piece = tl.program_id(0)
    unit = start_of_piece(piece, size, longer)
    some = (piece < pieces) & (unit < start_of_piece(piece + 1, size, longer))
    return cut, _part_from(piece, unit, cut, rows, tables, batch, num_tiles, PLAN), some


@triton.jit
def next_part(part, cut, rows, tables, sizes, PLAN: tl.constexpr):
    """Return the part after another one of this program, and whether there is one."""
    piece, unit = part.piece, part.next_unit
    if unit >= start_of_piece(piece + 1, cut.size, cut.longer):
        piece += sizes[2]
        unit = start_of_piece(piece, cut.size, cut.longer)
    some = (piece < cut.pieces) & (unit < start_of_piece(piece + 1, cut.size, cut.longer))
    if some:
        part = _part_from(piece, unit, cut, rows, tables, sizes[0], sizes[1], PLAN)
    return part, some


@triton.jit
def load_part(record_ptr):
    """Return what `first_part` does, of the record of this program."""
    piece = tl.program_id(0)
    record_ptr += piece * RECORD
    cut = Cut(tl.load(record_ptr + 1), tl.load(record_ptr + 2), tl.load(record_ptr + 3), tl.load(record_ptr + 4))
    part = Part(
        piece, tl.load(record_ptr + 5), tl.load(record_ptr + 6), tl.load(record_ptr + 7), tl.load(record_ptr + 8),
        tl.load(record_ptr + 9), tl.load(record_ptr + 10), tl.load(record_ptr + 11), tl.load(record_ptr + 12),
        tl.load(record_ptr + 13), tl.load(record_ptr + 14),
        (
            tl.load(record_ptr + 15), tl.load(record_ptr + 16), tl.load(record_ptr + 17), tl.load(record_ptr + 18),
            tl.load(record_ptr + 19),
        ),
    )  # fmt: skip
    return cut, part, tl.load(record_ptr) != 0


@triton.jit(
    do_not_specialize=["batch", "num_tiles", "few_programs", "sink_len", "split_size", "stride_table"],
    do_not_specialize_on_alignment=["table_ptr", "indptr_ptr", "seq_lens_ptr", "num_quantized_ptr"],
)
def _kvarn_schedule_decode_kernel(
    record_ptr,  # int32 [programs, RECORD]
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch], None without raw pages
    windows,  # Windows
    batch,
    num_tiles,  # of query heads
    few_programs,
    sink_len,
    split_size,
    stride_table,
    PLAN: tl.constexpr,
):
    rows = (seq_lens_ptr, num_quantized_ptr, sink_len, windows)
    sizes = (batch, num_tiles, tl.num_programs(0), few_programs, split_size)
    cut, part, some = first_part(rows, (table_ptr, indptr_ptr, stride_table), sizes, PLAN)
    record_ptr += tl.program_id(0) * RECORD
    tl.store(record_ptr, some.to(tl.int32))
    for i in tl.static_range(4):
        tl.store(record_ptr + 1 + i, cut[i])
    for i in tl.static_range(10):
        tl.store(record_ptr + 5 + i, part[1 + i])
    for i in tl.static_range(5):
        tl.store(record_ptr + 15 + i, part.runs[i])


def launch_schedule_decode(records: torch.Tensor, num_q_heads: int, work: Work) -> None:
    """Write the first parts of the programs of a call to `records` [programs, RECORD]; nothing is checked."""
    cache = work.cache
    group = num_q_heads // cache.num_kv_heads
    on(records, _kvarn_schedule_decode_kernel)[(work.num_programs,)](
        records,
        **cache.tables(),
        windows=work.windows,
        batch=cache.batch,
        num_tiles=configs.head_tiles(num_q_heads, cache.num_kv_heads)[1],
        few_programs=work.few_programs,
        split_size=work.split_size,
        PLAN=PartPlan(group, configs.head_tiles(group, 1)[0], work.units, gpu.uses_ptx()),
        num_warps=1,
        enable_fp_fusion=False,
    )
