"""Attention over parts of the keys, merged: results of several calls by `merge_states`, and the runs and pieces of pages into
which one call of decode_attention is cut."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, assert_same_bits, check, draw, quantized_case

from kvarn_triton import DecodeConfig, DecodeTable, PageLayout, decode_attention, merge_states, reference
from kvarn_triton.tables import Entry
from kvarn_triton.testing import cache_case, relative_error


@pytest.mark.parametrize("split_size", [1, 2, 3, 4, 7, 40])
def test_splits(split_size, device):
    """Runs of any number of pages, more than there are included; a sequence starts new runs (KF 23)."""
    case = cache_case(PageLayout(64, 64, 4, 2), [290, 64, 1, 0], group=3, num_kv_heads=1, sink_len=64, device=device)
    check(case, split_size=split_size)


def with_programs(programs: int, few: int) -> DecodeTable:
    """Return a table that launches that many programs per multiprocessor, of which the interpreter has two."""
    config = DecodeConfig(programs_per_sm=programs, few_programs_per_sm=few)
    return DecodeTable("test", (Entry(64, config, "test"),))


@pytest.mark.parametrize(("programs", "few"), [(1, 1), (2, 1), (3, 3), (4, 2), (9, 9)])
def test_balanced_pieces(programs, few, device):
    """Pieces end inside heads, at their ends and in other sequences; one long sequence among short and empty ones."""
    case = cache_case(PageLayout(64, 64, 4, 2), [0, 70, 600, 0, 64, 1], group=2, sink_len=40, device=device)
    check(case, table=with_programs(programs, few))


def test_more_rows_than_are_looked_at_together(device):
    """Lengths are summed in blocks of 128 rows; the rows of the second block find their pieces too."""
    lengths = [0] * 131
    for row in (0, 3, 127, 128, 130):
        lengths[row] = 30 + row
    case = cache_case(PageLayout(64, 64, 4, 2), lengths, group=1, num_kv_heads=1, num_tail_slots=1, device=device)
    for options in ({"table": with_programs(2, 2)}, {"split_size": 1}):
        out, lse = decode_attention(case.q, **case.kwargs, **options, return_lse=True)
        exact, exact_lse = reference.decode_attention(case.q.double(), **case.kwargs, return_lse=True)
        assert relative_error(out, exact) < 1e-3
        torch.testing.assert_close(lse, exact_lse, rtol=0, atol=2e-3)


@pytest.mark.parametrize("split_size", [1, 37])
def test_many_pages(split_size, device):
    """More runs than one step of the merge takes; and many pages in one run."""
    case = cache_case(PageLayout(64, 64, 2, 2), [36 * 64 + 5], group=1, num_kv_heads=1, device=device)
    check(case, split_size=split_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_states(dtype, device):
    """Two results over disjoint keys; an empty side is not read, two empty ones give zero and -inf (KF 23)."""
    out_a, out_b = (draw(5, 7, 80, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    lse_a, lse_b = 30 * draw(5, 7, seed=2, device=device), 30 * draw(5, 7, seed=3, device=device)
    lse_a[0], lse_b[1] = -torch.inf, -torch.inf
    lse_a[2], lse_b[2] = -torch.inf, -torch.inf
    out_a[lse_a == -torch.inf] = torch.nan
    out_b[lse_b == -torch.inf] = torch.nan
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    assert_same_bits(out[0], out_b[0])
    assert_same_bits(out[1], out_a[1])
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()
    exact, exact_lse = reference.merge_states(out_a.double(), lse_a, out_b.double(), lse_b)
    # One rounding of the result; the interpreter's cast to bfloat16 truncates, which doubles it.
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-21}[dtype]
    assert relative_error(out[3:], exact[3:]) < rounding
    torch.testing.assert_close(lse, exact_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_of_stacked_states(dtype, count, device):
    """Any number of results, some of no key, with other memory between them; two of them give the bits of the pair."""
    memory = draw(count, 5 * 7 * 80 + 48, dtype=dtype, device=device)
    outs = memory[:, 16:-32].view(count, 5, 7, 80)
    lses = (30 * draw(count, 5 * 7 + 1, seed=2, device=device))[:, 1:].view(count, 5, 7)
    lses[0, 0], lses[count - 1, 1], lses[:, 2] = -torch.inf, -torch.inf, -torch.inf
    outs[lses == -torch.inf] = torch.nan
    out, lse = merge_states(outs, lses)
    assert out.is_contiguous() and out.shape == (5, 7, 80) and lse.shape == (5, 7)
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()
    weights = torch.softmax(lses[:, 3:].double(), 0)
    exact = (outs[:, 3:].double() * weights[..., None]).sum(0)
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float32: 2**-21}[dtype]
    assert relative_error(out[3:], exact) < rounding
    exact_lse = torch.logsumexp(lses.double(), 0)
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-6, atol=1e-5)
    referenced, referenced_lse = reference.merge_states(outs.double(), lses)
    assert relative_error(referenced[3:], exact) < 1e-13
    torch.testing.assert_close(referenced_lse, exact_lse.float(), rtol=0, atol=0)
    if count == 2:
        for found, expected in zip((out, lse), merge_states(outs[0], lses[0], outs[1], lses[1]), strict=True):
            assert_same_bits(found, expected)


def test_merge_of_no_states(device):
    """A stack of nothing, or what is no stack, is refused; one without rows is not."""
    for shape in ((0, 3, 64), (64,)):
        with pytest.raises(ValueError, match=r"out_a: expected shape \[n, ..., v_head_dim\] without out_b, n at least 1, got"):
            merge_states(torch.zeros(shape, device=device), torch.zeros(shape[:-1], device=device))
    assert merge_states(torch.zeros(2, 0, 64, device=device), torch.zeros(2, 0, device=device))[0].shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_merged_halves_equal_the_whole(dtype, device):
    """Attention over each half of the pages, merged by log-sum-exp, is attention over all."""
    arguments = quantized_case(device, dtype=dtype)
    whole, whole_lse = decode_attention(**arguments, return_lse=True)
    lens, parts = arguments["seq_lens"], []
    for columns, part_lens in ((slice(0, 2), lens.clamp(max=128)), (slice(2, None), (lens - 128).clamp(min=0))):
        part = arguments | {"block_table": arguments["block_table"][:, columns], "seq_lens": part_lens}
        parts += decode_attention(**part, return_lse=True)
    out, lse = merge_states(*parts)
    assert relative_error(out, whole) < (1e-3 if dtype == torch.float16 else 1e-6)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-5)
