"""The look at a cache for development: each mistake is named by its first entry, and a cache without one passes."""

from __future__ import annotations

import pytest
import torch

from kvarn_triton import PageLayout, check_cache, decode_attention, dequantize_pages, store_pages
from kvarn_triton.testing import cache_case

LAYOUT, SINK = PageLayout(64, 64, 4, 2), 80


def cache(device: torch.device, csr: bool = False) -> dict:
    """Return three sequences of 4, 1 and 0 quantized pages, with two sink pages and two tail slots, and a row of padding."""
    case = cache_case(LAYOUT, [80 + 64 * 4 + 70, 80 + 64 + 64, 40, 0], num_kv_heads=2, sink_len=SINK, device=device)
    arguments = case.kwargs
    assert arguments["num_quantized"].tolist() == [4, 1, 0, 0]
    if csr:
        counts = arguments["num_quantized"].tolist()
        arguments["kv_indices"] = torch.cat([arguments["block_table"][row, :n] for row, n in enumerate(counts)])
        arguments["kv_indptr"] = torch.tensor([0, *counts], device=device).cumsum(0).int()
        arguments["block_table"] = None
    return arguments


@pytest.mark.parametrize("csr", [False, True])
def test_right_caches_pass(csr, device):
    """So do caches that share prefixes, and those without raw pages. Entries that attention doesn't read may be anything."""
    arguments = cache(device, csr)
    check_cache(**arguments)
    if not csr:
        arguments["block_table"][1, 0] = arguments["block_table"][0, 0]
        arguments["raw_table"][1, :2] = arguments["raw_table"][0, :2]
        arguments["block_table"][:, 4:] = -7
        arguments["raw_table"][3] = 10**9
        check_cache(**arguments)
        plain = {name: arguments[name] for name in ("pages", "block_table", "layout")}
        check_cache(**plain, seq_lens=torch.tensor([256, 64, 0, 0], dtype=torch.int32, device=device))


def test_pages_before_a_window(device):
    """Their entries may be anything: a server frees them."""
    arguments = cache(device)
    arguments["block_table"][0, :3] = -1
    arguments["raw_table"][0, :2] = -1
    with pytest.raises(ValueError, match=r"^block_table\[0, 0\]"):
        check_cache(**arguments)
    check_cache(**arguments, window=406 - 80 - 64 * 3)
    with pytest.raises(ValueError, match=r"^block_table\[0, 2\]"):
        check_cache(**arguments, window=406 - 80 - 64 * 3 + 1)
    with pytest.raises(ValueError, match=r"^raw_table\[0, 0\]"):
        check_cache(**arguments, window=406 - 80 - 64 * 3, keep_sink=True)


def put(name: str, place: int | tuple[int, ...], value: int):
    """Return a change of one entry."""

    def change(arguments: dict) -> None:
        arguments[name][place] = value

    return change


def share(name: str, place: tuple[int, int], other: tuple[int, int]):
    """Return a change that gives one entry the id of another."""

    def change(arguments: dict) -> None:
        arguments[name][place] = arguments[name][other]

    return change


def overwrite(value: int):
    """Return a change that loses the record of the last head of a page that is in use."""

    def change(arguments: dict) -> None:
        arguments["pages"][arguments["block_table"][0, 2].long(), 1] = value

    return change


def move_records(arguments: dict) -> None:
    """Read records at other offsets than they were written with."""
    arguments["pages"] = arguments["pages"].roll(16, dims=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("seq_lens", 1, -4), r"seq_lens\[1\]: expected at least 0, got -4"),
        (
            put("seq_lens", 0, 10**6),
            r"num_quantized\[0\]: expected from \d+ to \d+ at a length of 1000000 with 2 tail slots, got 4",
        ),
        (put("num_quantized", 1, 3), r"num_quantized\[1\]: expected from 0 to 2 at a length of 208 with 2 tail slots, got 3"),
        (put("num_quantized", 0, -1), r"num_quantized\[0\]: expected from 4 to 5 .*, got -1"),
        (put("num_quantized", 0, 3), r"num_quantized\[0\]: expected from 4 to 5 .*, got 3"),
        (put("block_table", (0, 3), -1), r"block_table\[0, 3\]: expected a page id from 0 to \d+, got -1"),
        (put("block_table", (1, 0), 999), r"block_table\[1, 0\]: expected a page id from 0 to \d+, got 999"),
        (put("raw_table", (2, 0), -2), r"raw_table\[2, 0\]: expected a raw page id from 0 to \d+, got -2"),
        (put("raw_table", (0, 3), 999), r"raw_table\[0, 3\]: expected a raw page id from 0 to \d+, got 999"),
        (share("block_table", (0, 3), (0, 1)), r"block_table\[0, 3\]: expected a page that block_table\[0, 1\], another place"),
        (share("block_table", (1, 0), (0, 2)), r"block_table\[1, 0\]: expected a page that block_table\[0, 2\], another place"),
        (
            share("raw_table", (1, 3), (0, 3)),
            r"raw_table\[1, 3\]: expected a raw page of its own, not that of raw_table\[0, 3\]",
        ),
        (
            share("raw_table", (1, 3), (0, 0)),
            r"raw_table\[1, 3\]: expected a raw page of its own, not that of raw_table\[0, 0\]",
        ),
        (overwrite(255), r"block_table\[0, 2\]: expected a page written as PageLayout.*, where head 1 has no such record"),
        (overwrite(0), r"block_table\[0, 2\]: expected a page written as "),
        (move_records, r"block_table\[0, 0\]: expected a page written as .*, where head 0 has no such record"),
    ],
)
def test_mistakes_are_named(change, message, device):
    """The first wrong entry is named, what was expected of it, and what it is."""
    arguments = cache(device)
    change(arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_cache(**arguments)


def test_csr_mistakes(device):
    """Entries of CSR tables are named as such."""
    arguments = cache(device, csr=True)
    for name, place, value, message in (
        ("kv_indices", 4, -3, r"kv_indices\[4\]: expected a page id from 0 to \d+, got -3"),
        ("kv_indptr", 1, 2, r"seq_lens\[0\]: expected no more pages than the 2 of its table, got 406"),
        ("kv_indptr", 2, 1, r"kv_indptr\[2\]: expected from 4 to 5, got 1"),
    ):
        wrong = arguments | {name: arguments[name].clone()}
        wrong[name][place] = value
        with pytest.raises(ValueError, match=f"^{message}"):
            check_cache(**wrong)


def test_pools_know_their_layout(device):
    """A pool of `empty_pages` is refused with another layout whose records have the same size, before anything is written."""
    layout, other = PageLayout.from_name("k4v2_g128"), PageLayout.from_name("k3v3_g128")
    assert layout.page_bytes == other.page_bytes
    pages = layout.empty_pages(2, 1, device)
    assert pages.shape == layout.pages_shape(2, 1) and pages.dtype == torch.uint8 and pages.device == device
    before, ids = pages.clone(), torch.zeros(1, dtype=torch.int32, device=device)
    k, q = torch.zeros(128, 1, 128, device=device), torch.zeros(1, 1, 128, device=device)
    message = r"^layout: expected PageLayout\(.*k_bits=4.*, for which pages was made, got .*k_bits=3"
    for call in (
        lambda layout: store_pages(k, k, pages, ids, layout),
        lambda layout: dequantize_pages(pages, ids, layout),
        lambda layout: decode_attention(q, pages, ids[None], ids, layout),
        lambda layout: check_cache(pages, ids[None], ids, layout),
    ):
        with pytest.raises(ValueError, match=message):
            call(other)
        assert torch.equal(pages, before)
    store_pages(k, k, pages, ids, layout)
    store_pages(k, k, pages[:], ids, other)  # a view is tied to no layout
