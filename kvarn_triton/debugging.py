"""For development: look at the tables and lengths of a cache, which no other call reads, and name what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from .cache import Cache, cache_of, check_body_tables, check_raw_pages, check_raw_table
from .checks import check_pages, check_tensor
from .layout import PageLayout
from .step import Step


class _Entry(NamedTuple):
    """An entry of a table: what it is called, the id in it, and which page of its sequence that is."""

    name: str
    page: int
    place: int


def check_cache(
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    window: int | None = None,
    keep_sink: bool = False,
) -> None:
    """Read the tables and lengths of a cache back and raise for the first entry that is wrong: for development.

    It waits for the GPU and copies to the host: call it between steps, not in them. It looks, in this order, for what is out of
    range, stale or shared by mistake: lengths and counts (below 0; beyond the table; pages counted that are not full; more
    unquantized pages than the ring has slots, as when `commit_pages` was forgotten), ids of every page that attention would
    read (out of range; twice in one sequence; in two sequences at different places; a tail of one sequence that another one has
    too), and the records of those pages (never written, or written with other offsets). What it can't see: a page that belongs
    to somebody else by now, raw tokens that were not appended, and layouts of the same offsets (`PageLayout.empty_pages` ties
    a pool to its layout).

    Args:
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        block_table: int32 [batch, max_pages]; None with `kv_indptr` and `kv_indices`.
        seq_lens: int32 [batch]; rows of length 0 are not looked at.
        layout: the page format.
        raw_pages: as given to `decode_attention`, like all that follow.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots].
        num_quantized: int32 [batch].
        sink_len: tokens at the start of every sequence that stay raw.
        kv_indptr: int32 [batch + 1].
        kv_indices: int32 [n].
        window: the largest window of a call; entries of pages before it are not looked at.
        keep_sink: as given to attention: with a window, entries of the sink are looked at too.

    Raises:
        ValueError: for the first wrong entry, by name and index, or a wrong shape, dtype, device or option. Nothing is written.
    """
    num_kv_heads = check_pages(pages, layout)
    batch = check_body_tables(block_table, kv_indptr, kv_indices, None, pages.device)
    check_tensor("seq_lens", seq_lens, [batch], torch.int32, device=pages.device)
    if raw_pages is not None:
        check_raw_pages(raw_pages, num_kv_heads, pages.device)
        check_tensor("raw_table", raw_table, [batch, None], torch.int32, device=pages.device)
        check_tensor("num_quantized", num_quantized, [batch], torch.int32, device=pages.device)
        assert raw_table is not None
        check_raw_table(raw_table, sink_len, layout.page_size)
    cache = Cache(
        layout, pages, seq_lens, block_table, kv_indptr, kv_indices, raw_pages, raw_table, num_quantized, sink_len
    )  # fmt: skip
    _check(cache, window, keep_sink)


def check_step(
    pages: torch.Tensor, raw_pages: torch.Tensor, step: Step, *, window: int | None = None, keep_sink: bool = False
) -> None:
    """Read the plan of a step back, after its tokens are written, and raise for the first entry that is wrong.

    For development: it waits for the GPU. What it looks for is what `check_cache` says; tables are those of the plan, in the
    order of the step.

    Args:
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim].
        step: `plan_step`.
        window: the largest window of a call; entries of pages before it are not looked at.
        keep_sink: as given to attention.

    Raises:
        ValueError: for the first wrong entry, by name and index, or a wrong shape, dtype, device or option. Nothing is written.
    """
    cache = cache_of(pages, raw_pages, step)
    check_raw_pages(raw_pages, check_pages(pages, step.layout), pages.device)
    _check(cache, window, keep_sink)


def _check(cache: Cache, window: int | None, keep_sink: bool) -> None:
    """Raise for the first entry of the tables of a cache that is wrong."""
    pages, raw_pages, size = cache.pages, cache.raw_pages, cache.layout.page_size
    lens = cache.seq_lens.tolist()
    sinks = [cache.sink_len] * len(lens) if cache.sink_lens is None else cache.sink_lens.tolist()
    counts = [-(-max(length - sink, 0) // size) for length, sink in zip(lens, sinks, strict=True)]
    raw_ids: list[list[int]] = []
    if cache.raw_table is not None and cache.num_quantized is not None:
        raw_ids, counts = cache.raw_table.tolist(), cache.num_quantized.tolist()
    ids, name = _page_ids(cache.block_table, cache.kv_indptr, cache.kv_indices)
    slots = cache.max_raw_pages - cache.num_sink_pages
    used: list[_Entry] = []
    sunk: list[_Entry] = []
    tails: list[_Entry] = []
    for row, (length, sink_len) in enumerate(zip(lens, sinks, strict=True)):
        _expect(length >= 0, f"seq_lens[{row}]", "at least 0", length)
        if length == 0:
            continue
        body, count = max(length - sink_len, 0), counts[row]
        start = 0 if window is None else max(length - window, 0)
        first = max(start - sink_len, 0) // size
        if raw_ids:
            least, most = max(-(-body // size) - slots, 0), body // size
            expected = f"from {least} to {most} at a length of {length} with {slots} tail slots"
            _expect(least <= count <= most, f"num_quantized[{row}]", expected, count)
            for j in range(max(count, first), -(-body // size)):
                column = -(-sink_len // size) + j % slots
                tails.append(_Entry(f"raw_table[{row}, {column}]", raw_ids[row][column], j))
            for j in range(0 if keep_sink else start // size, -(-min(length, sink_len) // size)):
                sunk.append(_Entry(f"raw_table[{row}, {j}]", raw_ids[row][j], j))
        _expect(count <= len(ids[row]), f"seq_lens[{row}]", f"no more pages than the {len(ids[row])} of its table", length)
        used += [_Entry(name(row, j), ids[row][j], sink_len // size + j) for j in range(first, count)]
    for entry in used:
        _expect(0 <= entry.page < pages.shape[0], entry.name, f"a page id from 0 to {pages.shape[0] - 1}", entry.page)
    for entry in sunk + tails:
        most = 0 if raw_pages is None else raw_pages.shape[0]
        _expect(0 <= entry.page < most, entry.name, f"a raw page id from 0 to {most - 1}", entry.page)
    _check_places(used)
    owners = _check_places(sunk)
    for entry in tails:
        owner = owners.setdefault(entry.page, entry)
        _expect(owner is entry, entry.name, f"a raw page of its own, not that of {owner.name}", entry.page)
    _check_records(pages, used, cache.layout)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")


def _page_ids(
    block_table: torch.Tensor | None, kv_indptr: torch.Tensor | None, kv_indices: torch.Tensor | None
) -> tuple[list[list[int]], Callable[[int, int], str]]:
    """Return the ids of every row, and what an entry is called."""
    if block_table is not None:
        return block_table.tolist(), lambda row, j: f"block_table[{row}, {j}]"
    assert kv_indptr is not None and kv_indices is not None
    starts, indices = kv_indptr.tolist(), kv_indices.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        _expect(0 <= start <= len(indices), f"kv_indptr[{row}]", f"from 0 to {len(indices)}", start)
        _expect(start <= end <= len(indices), f"kv_indptr[{row + 1}]", f"from {start} to {len(indices)}", end)
    rows = [indices[start:end] for start, end in itertools.pairwise(starts)]
    return rows, lambda row, j: f"kv_indices[{starts[row] + j}]"


def _check_places(entries: list[_Entry]) -> dict[int, _Entry]:
    """Check that sequences share pages as prefixes only: at the same place, and so once in a row. Returns who has a page."""
    owners: dict[int, _Entry] = {}
    for entry in entries:
        owner = owners.setdefault(entry.page, entry)
        expected = f"a page that {owner.name}, another place of a sequence, does not have"
        _expect(owner.place == entry.place, entry.name, expected, entry.page)
    return owners


def _check_records(pages: torch.Tensor, used: list[_Entry], layout: PageLayout) -> None:
    """Check what the format says of every record (`docs/page_format.md`)."""
    if not used or pages.shape[1] == 0:
        return
    records = pages[torch.tensor([entry.page for entry in used], device=pages.device)]
    fields = layout.fields(records)
    good = (records[..., layout.gains_offset + 8 :] == 0).all(-1)
    for name in ("k", "v"):
        gain, norm = fields[f"{name}_gain"][..., 0], fields[f"{name}_norm"].float()
        good &= (gain > 0) & gain.isfinite() & (torch.frexp(gain).mantissa == 0.5)
        good &= (norm >= 0).all(-1) & (norm.amax(-1) >= 0.5) & (norm.amax(-1) <= 1)
        good &= fields[f"{name}_scale"].isfinite().all(-1) & fields[f"{name}_zero"].isfinite().all(-1)
    wrong = (~good).nonzero().tolist()
    if wrong:
        i, head = wrong[0]
        got = f"page {used[i].page}, where head {head} has no such record"
        raise ValueError(f"{used[i].name}: expected a page written as {layout}, got {got}")
