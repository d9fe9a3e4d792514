"""Prefill attention over plain tokens whose memory holds some pages only: rounds of pages, and of query tokens whose states
are kept between them."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, check
from plain_helpers import NEEDS_PLAIN_KERNEL, cache_of, numbers
from prefill_cases import SMALL, prefill_case

from kvarn_triton import PageLayout, configs, dequantize_pages, gpu, prefill_attention
from kvarn_triton.attention import prefill, workspace
from kvarn_triton.attention.records import COUNT
from kvarn_triton.masking import Windows
from kvarn_triton.pages.expand import launch_expand_pages
from kvarn_triton.testing import relative_error

pytestmark = NEEDS_PLAIN_KERNEL


@pytest.mark.parametrize(
    ("layout", "lengths", "queries", "new"),
    [
        pytest.param(SMALL, [1100, 330, 20], [31, 9, 3], True, id="g64"),
        pytest.param(PageLayout(64, 128, 4, 4), [1300, 400], [40, 20], True, id="g128"),
        pytest.param(SMALL, [900, 700], [70, 30], False, id="in-the-cache"),
    ],
)
def test_rounds_of_pages(layout, lengths, queries, new, listed, monkeypatch, device):
    """Memory of a call's own that holds some pages of each sequence is filled in rounds: states go on in the next one."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    arguments = prefill_case(layout, lengths, queries, new=new, num_tail_slots=3 - 2 * new, sink_len=16, group=3, device=device)
    whole, pages = check(arguments), numbers(listed[0], 1, COUNT)
    page_bytes = 2 * 2 * layout.page_size * 64
    most = 512 // layout.page_size  # pages of each sequence
    monkeypatch.setattr(configs, "SCRATCH_BYTES", (most * len(lengths) + 1) * page_bytes)
    out = check(arguments)
    rounds = [numbers(records, 1, COUNT) for records in listed[1:]]
    assert len(rounds) == -(-arguments["block_table"].shape[1] // most) > 1
    assert [sum(parts) for parts in zip(*rounds, strict=True)] == pages and max(pages) > most * layout.page_size
    assert relative_error(out, whole.double()) < 5e-4


@pytest.mark.parametrize("page_size", [64, 128])
def test_rounds_of_pages_among_programs(page_size, listed, monkeypatch, device):
    """Programs that share a tile have pages of some rounds only, in CSR form as in a block table."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 5)
    layout = PageLayout(64, page_size, 4, 4)
    arguments = prefill_case(layout, [1500], [20], new=True, device=device)
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 4 * 128 // page_size * 2 * 2 * page_size * 64)
    out = check(arguments)
    assert len(set(map(tuple, (numbers(records, 1, COUNT) for records in listed)))) == 3
    table = arguments["block_table"]
    csr = arguments | {"block_table": None, "kv_indices": table.flatten()}
    csr["kv_indptr"] = torch.tensor([0, table.numel()], dtype=torch.int32, device=device)
    assert_same_bits(prefill_attention(**csr), out)


def test_memory_of_states(listed, monkeypatch, device):
    """States between rounds of pages stay within a bound: the query tokens are computed in rounds too; bits are the same."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    lengths, queries = [700, 701, 20, 702, 703, 30], [3, 12, 0, 5, 1, 1]
    arguments = prefill_case(SMALL, lengths, queries, new=True, device=device)
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 6 * 8 * 2 * 2 * 64 * 64)
    whole = check(arguments)
    assert len(listed) == 2
    bound = 6 * 128 * 4 * 66
    monkeypatch.setattr(workspace, "ROUND_BYTES", bound)
    assert_same_bits(prefill_attention(**arguments), whole)
    sizes = [len(records) * 128 * 4 * 66 for records in listed]
    assert sizes[0] > bound >= max(sizes[2:]) and len(sizes) > 6


def test_a_round_writes_its_pages_only(device):
    """Pages of earlier rounds are not written again: the slots of pages that there are not keep what is in them."""
    arguments = prefill_case(SMALL, [6 * 64 + 9], [9], new=True, num_tail_slots=1, device=device)
    assert arguments["num_quantized"].tolist() == [6]
    for rotated in (True, False):
        scratch = torch.full((4, 2, 1, 64, 64), torch.nan, dtype=torch.float16, device=device)
        ends, seen = arguments["cu_seqlens_q"], Windows(None, None)
        launch_expand_pages(scratch, ends, cache_of(arguments), seen, True, rotated, first_page=4, ring=4)
        ids = arguments["block_table"][0, 4:6]
        expected = dequantize_pages(arguments["pages"], ids, SMALL, dtype=torch.float16, rotated=rotated)
        for half, written in enumerate(expected):
            assert_same_bits(scratch[:2, half], written.transpose(1, 2))
        assert scratch[2:].isnan().all()


def test_memory_that_holds_too_little(listed, monkeypatch, device):
    """Where a round would be a few pages of each sequence, tiles dequantize pages themselves."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    arguments = prefill_case(SMALL, [900], [100], num_tail_slots=1, device=device)
    launch, splits = prefill.launch_prefill_tiles, []
    monkeypatch.setattr(prefill, "launch_prefill_tiles", lambda *args: splits.append(args[-1].num_splits) or launch(*args))
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 16)
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 7 * 2 * 2 * 64 * 64)
    check(arguments)
    assert not listed and min(splits) > 1
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 8 * 2 * 2 * 64 * 64)
    check(arguments)
    assert len(listed) == 2
