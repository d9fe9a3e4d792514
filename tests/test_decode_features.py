"""Window, soft cap, attention sinks and CSR tables of decode_attention, against float64 attention over the same cache."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from helpers import assert_same_bits, check, draw, layout_id

from kvarn_triton import PageLayout, decode_attention, decode_workspace_size, merge_states, reference
from kvarn_triton.attention.schedule import Units, row_units
from kvarn_triton.attention.workspace import MostWork, num_partials
from kvarn_triton.masking import Mask, capped
from kvarn_triton.testing import CacheCase, cache_case, relative_error

LAYOUT = PageLayout(64, 64, 4, 2)
OTHER_VALUES = PageLayout(64, 64, 4, 2, v_head_dim=96)
LONG = 272
"""Tokens of the longest sequence: 70 of the sink in two pages, pages of tokens 70 and 134, a tail that begins at 198."""


def windowed_case(device, lengths=(LONG, 65, 0), layout=LAYOUT, **options) -> CacheCase:
    """Return a case with a sink that ends inside a page and inside a run."""
    options = {"group": 2, "num_kv_heads": 1, "sink_len": 70, "device": device} | options
    return cache_case(layout, lengths, **options)


def free_unseen(case: CacheCase, window: int) -> None:
    """Set ids of pages without a visible token to -1, where memory that decodes to NaN lies, and unseen raw tokens to NaN."""
    size, sink_len = case.layout.page_size, case.sink_len
    num_sink_pages = -(-sink_len // size)
    slots = case.raw_table.shape[1] - num_sink_pages
    case.pages = torch.cat((torch.full_like(case.pages[:1], 255), case.pages))[1:]
    case.raw_pages = torch.cat((torch.full_like(case.raw_pages[:1], torch.nan), case.raw_pages))[1:]
    for row, length in enumerate(case.seq_lens.tolist()):
        start = max(length - window, 0)
        seen_pages, seen_columns = set(), set()
        for position in range(length):
            body = position - sink_len
            column = position // size if body < 0 else num_sink_pages + body // size % slots
            if body >= 0 and body // size < case.num_quantized[row]:
                if position >= start:
                    seen_pages.add(body // size)
            elif position >= start:
                seen_columns.add(column)
            else:
                case.raw_pages[case.raw_table[row, column], :, :, (position if body < 0 else body) % size] = torch.nan
        for table, seen in ((case.block_table, seen_pages), (case.raw_table, seen_columns)):
            for column in set(range(table.shape[1])) - seen:
                table[row, column] = -1


@pytest.mark.parametrize("window", [1, 10, 11, 74, 75, 138, 139, 202, 203, 208, 209, LONG, 2**31 - 1])
def test_window(window, device):
    """Windows that begin at, before and after the ends of tail, pages, sink and runs; what lies before isn't read."""
    case = windowed_case(device)
    free_unseen(case, window)
    check(case, seen={"window": window}, split_size=None if window % 2 else 2)


@pytest.mark.parametrize("window", [1, 27, 28, 91, 92, 93, 400])
def test_window_over_quantized_pages_only(window, device):
    """Pages alone, the last of which is cut short by the length too: 27 tokens of it count."""
    case = cache_case(LAYOUT, [192, 64], num_tail_slots=1, group=3, num_kv_heads=1, device=device)
    case.seq_lens -= torch.tensor([37, 0], dtype=torch.int32, device=device)
    free_unseen(case, window)
    names = ("pages", "block_table", "seq_lens", "layout")
    arguments = {name: getattr(case, name) for name in names} | {"window": window, "return_lse": True}
    out, lse = decode_attention(case.q, **arguments)
    exact, exact_lse = reference.decode_attention(case.q.double(), **arguments)
    assert relative_error(out, exact) < 1e-3  # float16 rounding: 2**-11 of q, weights and out each
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=5e-3)


@triton.jit(do_not_specialize=["sink_len", "batch"])
def _row_units_kernel(out_ptr, seq_lens_ptr, num_quantized_ptr, sink_len, windows, batch, UNITS: tl.constexpr):
    row = tl.arange(0, 512)
    mask = row < batch
    rows = (seq_lens_ptr, num_quantized_ptr, sink_len, windows)
    _, start, begins, counts = row_units(rows, row, mask, UNITS)
    tl.store(out_ptr + row * 7, start, mask)
    for part in tl.static_range(3):
        tl.store(out_ptr + row * 7 + 1 + part, begins[part], mask)
        tl.store(out_ptr + row * 7 + 4 + part, counts[part], mask)


@pytest.mark.parametrize("sink_len", [0, 32, 70])
def test_units_of_a_window(sink_len, device):
    """The units of a row are the pages and runs with a visible token: of every length up to 299."""
    lengths = torch.arange(300, dtype=torch.int32, device=device)
    quantized = ((lengths - sink_len).clamp_min(0) // 64 - lengths % 2).clamp_min(0)
    for window in (1, 15, 16, 17, 63, 64, 65, 100, 230, 298, 299, 300):
        out = torch.empty(300, 7, dtype=torch.int32, device=device)
        windows = Mask(None, window, None, None, keep_sink=False).windows
        _row_units_kernel[(1,)](out, lengths, quantized, sink_len, windows, 300, Units(64, 16, has_raw=True))
        for length, count, found in zip(lengths.tolist(), quantized.tolist(), out.tolist(), strict=True):
            start = max(length - window, 0)
            body = [position - sink_len for position in range(max(start, sink_len), length)]
            expected = (
                {position // 16 for position in range(start, min(length, sink_len))},
                {position // 64 for position in body if position // 64 < count},
                {(position - 64 * count) // 16 for position in body if position // 64 >= count},
            )
            assert found[0] == start
            for part, numbers in enumerate(expected):
                assert set(range(found[1 + part], found[1 + part] + found[4 + part])) == numbers


def test_window_of_all_tokens_changes_no_bit(device):
    """A window that covers every sequence gives the bits of a call without one."""
    case = windowed_case(device)
    assert_same_bits(
        decode_attention(case.q, **case.kwargs, split_size=3, window=LONG),
        decode_attention(case.q, **case.kwargs, split_size=3),
    )


def test_window_batch_invariance(device):
    """With fixed splits a row in a window has the same bits alone as beside others."""
    case = windowed_case(device, (150, LONG, 0, 80))
    options = {"split_size": 2, "window": 90, "return_lse": True}
    out, lse = decode_attention(case.q, **case.kwargs, **options)
    for row in range(4):
        one = slice(row, row + 1)
        tables = {name: getattr(case, name)[one] for name in ("block_table", "seq_lens", "raw_table", "num_quantized")}
        alone, lse_alone = decode_attention(case.q[one], **case.kwargs | tables, **options)
        assert_same_bits(alone, out[one])
        assert_same_bits(lse_alone, lse[one])


@triton.jit
def _capped_kernel(out_ptr, x_ptr, cap):
    place = tl.arange(0, 1024)
    tl.store(out_ptr + place, capped(tl.load(x_ptr + place), cap))


@pytest.mark.parametrize("cap", [1e-3, 1.0, 50.0, 1e6])
def test_capped(cap, device):
    """cap * tanh(x / cap) of numbers of every size has the accuracy of float32; of infinity it is cap."""
    x = cap * torch.cat((torch.logspace(-12, 3, 400), torch.linspace(0.6, 0.65, 110), torch.tensor([torch.inf, 0.0])))
    x = torch.cat((x, -x)).to(device)
    out = torch.empty_like(x)
    _capped_kernel[(1,)](out, x, cap)
    torch.testing.assert_close(out.double(), cap * torch.tanh(x.double() / cap), rtol=1e-6, atol=0)


@pytest.mark.parametrize("soft_cap", [1.0, 30.0, 50.0])
def test_soft_cap(soft_cap, device):
    """Scores of up to a hundred, raw ones and those of pages; without the cap the result is another."""
    case = windowed_case(device, (230, 71), sink_len=16, dtype=torch.float32)
    out = check(case, sm_scale=4.0, seen={"soft_cap": soft_cap})
    assert relative_error(decode_attention(case.q, **case.kwargs, sm_scale=4.0), out) > 1e-2


@pytest.mark.parametrize("soft_cap", [1, 30.0])
def test_soft_cap_in_16_bits(soft_cap, device):
    """Ordinary scores; a cap may be an integer."""
    check(windowed_case(device, (150, 20), sink_len=16), seen={"soft_cap": soft_cap})


def sinks_of(*values: float, device) -> torch.Tensor:
    """Return a logit for each query head."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def test_sinks(device):
    """Logits from nothing to everything; a sequence of length 0 gives zeros and the logit."""
    case = windowed_case(device, (150, 0, 5), group=7, sink_len=16)
    sinks = sinks_of(-math.inf, -1e3, -3, 0, 4, 12, 1e3, device=device)
    for split_size in (None, 1):
        check(case, seen={"sinks": sinks}, split_size=split_size)
    out, lse = decode_attention(case.q, **case.kwargs, sinks=sinks, return_lse=True)
    plain, plain_lse = decode_attention(case.q, **case.kwargs, return_lse=True)
    assert_same_bits(out[:, :2], plain[:, :2])
    assert (out[:, -1] == 0).all()
    torch.testing.assert_close(lse[1], sinks, rtol=1e-6, atol=0)
    torch.testing.assert_close(lse[:, 6], sinks[6].expand(3), rtol=1e-6, atol=0)
    assert_same_bits(lse[::2, :1], plain_lse[::2, :1])
    weight = torch.exp(plain_lse - lse)[::2, :, None]
    assert relative_error(out[::2], plain[::2].double() * weight) < 1e-3  # both rounded to float16


def test_sinks_in_one_of_two_merged_calls(device):
    """The results of two parts, of which one has the sinks, merge to that of the whole."""
    case = cache_case(LAYOUT, [256, 192], num_tail_slots=1, group=2, dtype=torch.float32, device=device)
    sinks, lens = draw(4, device=device), case.seq_lens
    arguments = {"pages": case.pages, "layout": LAYOUT, "return_lse": True}
    whole, whole_lse = decode_attention(case.q, block_table=case.block_table, seq_lens=lens, sinks=sinks, **arguments)
    table = case.block_table
    first = decode_attention(case.q, block_table=table[:, :2], seq_lens=lens.clamp(max=128), sinks=sinks, **arguments)
    second = decode_attention(case.q, block_table=table[:, 2:], seq_lens=lens - 128, **arguments)
    out, lse = merge_states(*first, *second)
    assert relative_error(out, whole) < 1e-6
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [LAYOUT, OTHER_VALUES], ids=layout_id)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("split_size", [None, 3])
def test_everything_at_once(split_size, dtype, layout, device):
    """Window, soft cap and sinks in one call, over two kv heads and two tiles of query heads each."""
    case = windowed_case(device, (240, 71, 0), layout, group=9, num_kv_heads=2, dtype=dtype)
    free_unseen(case, 175)
    seen = {"window": 175, "soft_cap": 5.0, "sinks": draw(18, seed=5, device=device)}
    check(case, seen=seen, split_size=split_size)


def csr_of(case: CacheCase, counts: list[int], offset: int = 0) -> dict:
    """Return CSR tables with the first ids of each row of the block table, and a strange id before and behind all of them."""
    device = case.q.device
    stray = torch.full((offset,), -(10**6), dtype=torch.int32, device=device)
    runs = [row[:count] for row, count in zip(case.block_table, counts, strict=True)]
    indptr = offset + torch.tensor([0, *counts]).cumsum(0)
    return {"block_table": None, "kv_indptr": indptr.int().to(device), "kv_indices": torch.cat((stray, *runs, stray))}


@pytest.mark.parametrize("layout", [LAYOUT, OTHER_VALUES], ids=layout_id)
@pytest.mark.parametrize("seen", [{}, {"window": 100}], ids=str)
def test_csr(seen, layout, device):
    """The bits of the same ids in a block table, whatever lies around them; the workspace asked for is enough."""
    case = windowed_case(device, (LONG, 0, 140, 65, 150), layout, sink_len=16)
    counts = case.num_quantized.tolist()
    tables = csr_of(case, counts, offset=1)
    options = {"split_size": 3, "return_lse": True} | seen
    expected, expected_lse = decode_attention(case.q, **case.kwargs, **options)
    size = decode_workspace_size(
        5, 2, 1, layout, tables["kv_indices"].shape[0], device=device, max_raw_pages=3, csr=True, split_size=3
    )
    workspace = torch.full((size + 64,), 255, dtype=torch.uint8, device=device)
    out, lse = decode_attention(case.q, **case.kwargs | tables, **options, workspace=workspace[:size])
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    assert (workspace[size:] == 255).all()
    with pytest.raises(ValueError, match=f"workspace: expected at least {size} bytes"):
        decode_attention(case.q, **case.kwargs | tables, **options, workspace=workspace[: size - 1])
    balanced = decode_attention(case.q, **case.kwargs | tables, **seen)
    assert relative_error(balanced, expected) < 1e-3


def test_partial_results_of_csr_rows():
    """However the ids are shared out among sequences, there is a partial result for each piece."""
    random = torch.Generator().manual_seed(0)
    for split_size in (1, 2, 3, 5, 8, 50):
        for max_raw_pages in (0, 1, 3):
            pages = torch.randint(0, 20, (6,), generator=random)
            raw = max_raw_pages * 4
            pieces = int((-(-(pages + raw) // split_size)).sum())
            most = MostWork(LAYOUT, int(pages.sum()), max_raw_pages, True, split_size)
            room = num_partials(6, 2, most, 4)
            assert 2 * (6 + pieces) <= room <= 2 * (6 + pieces + 6 + int(pages.sum()) // split_size)
