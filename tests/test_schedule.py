"""How kernels cut the work of a batch, against sums in plain Python, for batches around a block of rows; sizes of merges."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from helpers import check

from kvarn_triton import DecodeConfig, DecodeTable, PageLayout, configs, gpu, merging
from kvarn_triton.attention.schedule import (
    FEW_ROWS,
    LEAST_UNITS,
    ROWS_AT_ONCE,
    TRIES,
    Units,
    find_row,
    piece_of_unit,
    plan,
    start_of_piece,
    start_of_row,
)
from kvarn_triton.attention.workspace import merge_sizes
from kvarn_triton.masking import Windows
from kvarn_triton.tables import Entry
from kvarn_triton.testing import cache_case

PAGE = 64


@triton.jit(do_not_specialize=["sink_len", "num_rows", "num_tiles", "num_programs", "few_programs", "split_size", "count"])
def _schedule_kernel(
    plan_ptr, found_ptr, pieces_ptr, seq_lens_ptr, units_ptr, sink_len, windows, num_rows, num_tiles, num_programs,
    few_programs, split_size, count, UNITS: tl.constexpr,
):  # fmt: skip
    rows = (seq_lens_ptr, None, sink_len, windows)
    pieces, size, longer, split = plan(rows, num_rows, num_tiles, num_programs, few_programs, split_size, UNITS)
    tl.store(plan_ptr, pieces)
    tl.store(plan_ptr + 1, split)
    for i in range(count):
        unit = tl.load(units_ptr + i)
        row, row_start = find_row(rows, unit, num_rows, num_tiles, split, UNITS)
        tl.store(found_ptr + 3 * i, row)
        tl.store(found_ptr + 3 * i + 1, row_start)
        tl.store(found_ptr + 3 * i + 2, start_of_row(rows, row, num_tiles, split, UNITS))
    for piece in range(pieces):
        start = start_of_piece(piece, size, longer)
        end = start_of_piece(piece + 1, size, longer)
        tl.store(pieces_ptr + 4 * piece, start)
        tl.store(pieces_ptr + 4 * piece + 1, end)
        tl.store(pieces_ptr + 4 * piece + 2, piece_of_unit(start, size, longer))
        tl.store(pieces_ptr + 4 * piece + 3, piece_of_unit(end - 1, size, longer))


def aligned(units: int, split: int) -> int:
    """Return units rounded up to whole pieces."""
    return -(-units // split) * split if split else units


def lengths_of(batch: int) -> list[int]:
    """Return lengths of a few pages at both ends, around each block of rows and in between; the others are 0."""
    some = {row % batch for edge in (0, FEW_ROWS.value, ROWS_AT_ONCE.value, batch) for row in (edge - 1, edge)}
    return [1 + (150 + 37 * row) % (3 * PAGE) if row in some else 0 for row in range(batch)]


@pytest.mark.parametrize("split_size", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 2, 31, 32, 33, 129])
@pytest.mark.parametrize(("num_tiles", "programs", "few"), [(1, 64, 3), (3, 4, 4), (2, 4, 4), (2, 5, 2)])
def test_pieces(batch, num_tiles, programs, few, split_size, device):
    """Pieces are the whole line, in order and of equal sizes; each unit finds its row, each end of a piece its piece."""
    lengths = lengths_of(batch)
    units = [-(-length // PAGE) for length in lengths]
    total = sum(units) * num_tiles
    split = split_size
    wanted = few if total < LEAST_UNITS.value * programs else programs
    if split == 0 and total >= programs and total > wanted:
        least = -(-total // wanted)
        sizes = range(least, least + TRIES.value)
        split = next((size for size in sizes if sum(aligned(n, size) for n in units) * num_tiles <= size * wanted), 0)
    starts = [0, *itertools.accumulate(num_tiles * aligned(n, split) for n in units)]
    line = starts.pop()
    asked = sorted(
        {unit for row, n in enumerate(units) if n for unit in (starts[row], starts[row] + num_tiles * aligned(n, split) - 1)}
    )
    size = {"dtype": torch.int32, "device": device}
    numbers, found = torch.zeros(2, **size), torch.zeros(len(asked), 3, **size)
    pieces = torch.full((max(line, wanted), 4), -1, **size)
    _schedule_kernel[(1,)](
        numbers, found, pieces, torch.tensor(lengths, **size), torch.tensor(asked, **size), 0, Windows(None, None), batch,
        num_tiles, programs, few, split_size, len(asked), Units(PAGE, 16, has_raw=False),
    )  # fmt: skip
    count = line // split if split else wanted
    assert numbers.tolist() == [count, split]
    rows = [next(row for row, n in enumerate(units) if unit < starts[row] + num_tiles * aligned(n, split)) for unit in asked]
    assert found.tolist() == [[row, starts[row], starts[row]] for row in rows]
    ends = pieces[:count].tolist()
    assert [end[0] for end in ends] + [line] == [0] + [end[1] for end in ends]
    lens = {end - start for start, end, *_ in ends}
    assert max(lens) - min(lens) <= 1 if split == 0 else lens == {split}
    assert all((first, last) == (piece, piece) for piece, (start, end, first, last) in enumerate(ends) if start < end)


@pytest.mark.parametrize(
    ("programs", "heads", "channels", "block"),
    [
        *((64, 8, 128, 8), (65, 8, 128, 32), (256, 8, 128, 32), (264, 8, 128, 128), (1024, 8, 128, 128), (1056, 8, 128, 256)),
        *(
            (1056, 8, 256, 128),
            (1056, 64, 128, 32),
            (1056, 1024, 128, 8),
            (9999, 1, 64, 256),
            (9999, 1, 512, 128),
            (0, 0, 64, 8),
        ),
    ],
)
def test_size_of_merges(programs, heads, channels, block):
    """As many as a head has programs, two more where those may end inside of it; in the invariant mode always 32."""
    assert merging.merge_block(programs, heads, channels) == block
    assert merging.merge_block(programs, heads, channels, 3) == 32


@pytest.mark.parametrize(
    ("heads", "channels", "split_size", "share"), [(66, 128, 0, 32), (67, 128, 0, 128), (1, 128, 1, 128), (1, 80, 0, 80)]
)
def test_shares_of_merges(heads, channels, split_size, share, monkeypatch):
    """32 channels to a program up to two programs a multiprocessor; all of them beyond, in the invariant mode, and of 80."""
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 132)
    assert merging.merge_channels(channels, heads, torch.device("cpu"), split_size) == share


@pytest.mark.parametrize("layout", [PageLayout(128, 128, 4, 2), PageLayout(64, 64, 4, 2)])
@pytest.mark.parametrize("heads", [(32, 8), (64, 4), (3, 3), (128, 128)])
def test_warmup_has_all_merges(layout, heads, monkeypatch):
    """Every merge that a call of some batch and tables needs is one that a warm-up launches."""
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 132)
    device, num_tiles = torch.device("cpu"), configs.head_tiles(*heads)[1]
    programs = configs.decode_config(layout, torch.float16, device, None, configs.head_tiles(*heads)[0]).programs_per_sm * 132

    def merge_of(batch: int, columns: int, raw_columns: int) -> tuple[bool, int, int]:
        units = batch * (columns + raw_columns * layout.page_size // configs.RAW_BLOCK)
        block = merging.merge_block(min(programs, num_tiles * max(units, 0)), batch * num_tiles, layout.v_head_dim)
        return raw_columns > 0, block, merging.merge_channels(layout.v_head_dim, batch * heads[0], device)

    warm = {merge_of(*size) for size in merge_sizes(layout, torch.float16, device, heads, False, None)}
    sizes = itertools.product((1, 2, 3, 4, 5, 8, 17, 33, 64, 200), (0, 1, 2, 3, 7, 17, 40, 300, 4000), (0, 1, 2, 5))
    assert {merge_of(*size) for size in sizes} <= warm


@pytest.mark.parametrize("block", merging.MERGE_BLOCKS)
def test_merges(block, device, monkeypatch):
    """However many partial results are looked at together: 37 of them take five times to once."""
    monkeypatch.setattr(merging, "merge_block", lambda *numbers: block)
    case = cache_case(PageLayout(64, 64, 4, 2), [36 * 64 + 5, 700], group=2, num_kv_heads=1, num_tail_slots=1, device=device)
    check(case, table=DecodeTable("test", (Entry(64, DecodeConfig(programs_per_sm=40, few_programs_per_sm=40), "test"),)))
