"""Lengths, windows and first queries at every boundary of a page and of a step: G - 2 to G + 2.

Kernels decide for a whole page or step whether a mask is needed at all. A decision that is off by one shows only where a
boundary falls on one exact token, and there by an error of a tenth.
"""

from __future__ import annotations

import pytest
import torch
from helpers import ON_GPU, draw
from prefill_cases import in_form, prefill_case

from kvarn_triton import PageLayout, decode_attention, prefill_attention, reference
from kvarn_triton.testing import cache_case, relative_error

LAYOUT = PageLayout(64, 64, 8, 8)
AROUND = [62, 63, 64, 65, 66]
LENGTHS = AROUND + [length + 64 for length in AROUND]
FORMS = pytest.mark.parametrize("form", ["dequantized", "registers", "folded", "scratch"])
ERROR = 3e-3
"""Of a row: rounding to float16 of queries, weights and values gives less than 2e-3, one token too many or too few 5e-2."""


def assert_rows(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare each row [rows, heads, channels] by itself."""
    errors = (result.double() - expected.double()).flatten(1).norm(dim=1) / expected.double().flatten(1).norm(dim=1)
    assert (errors < ERROR).all(), errors.tolist()


def quantized(lengths: list[int], device) -> dict:
    """Return a call of decode attention over quantized pages only, all sequences over the same ones, cut short anywhere."""
    case = cache_case(LAYOUT, [256], num_tail_slots=1, group=1, num_kv_heads=1, device=device)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    table = case.block_table.expand(len(lengths), -1).contiguous()
    return {"pages": case.pages, "block_table": table, "seq_lens": lens, "layout": LAYOUT}


@pytest.mark.parametrize(
    ("lengths", "window"), [(LENGTHS, None), ([190, 191, 192, 193, 194], 128), ([189, 190, 191, 192, 193, 194], 126)]
)
def test_decode(lengths, window, device):
    """Quantized pages that end, and windows that begin, at each of these tokens."""
    arguments = quantized(lengths, device) | {"window": window}
    q = 2 * draw(len(lengths), 1, 64, seed=3, dtype=torch.float16, device=device)
    assert_rows(decode_attention(q, **arguments), reference.decode_attention(q.double(), **arguments))


def called(form: str, arguments: dict) -> torch.Tensor:
    """Call prefill_attention in one form of its loop over pages."""
    return prefill_attention(**arguments, **in_form(form, arguments))


@FORMS
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(
    ("lengths", "count", "window"),
    [(LENGTHS, 1, None), (LENGTHS, 3, None), ([190, 191, 192, 193, 194], 1, 128), ([189, 190, 191, 192, 193, 194], 2, 126)],
)
def test_prefill(lengths, count, window, new, form, device):
    """The same, and queries whose first one is at each of these tokens, in the cache or outside of it."""
    lengths = [length + count * new for length in lengths]
    arguments = quantized(lengths, device) | {"window": window}
    total = count * len(lengths)
    arguments["q"] = 2 * draw(total, 1, 64, seed=3, dtype=torch.float16, device=device)
    arguments["cu_seqlens_q"] = torch.arange(0, total + 1, count, dtype=torch.int32, device=device)
    if new:
        arguments |= {name: draw(total, 1, 64, seed=i, dtype=torch.float16, device=device) for i, name in enumerate("kv")}
    assert_rows(called(form, arguments), reference.prefill_attention(**arguments | {"q": arguments["q"].double()}))


@pytest.mark.parametrize("form", ["dequantized", "registers", "folded"])
@pytest.mark.parametrize("window", [None, 15, 16, 17, 31, 32, 33, 63, 64, 65] if ON_GPU else [None, 16, 17, 31, 65])
def test_new_tokens(window, form, device):
    """Tiles that begin inside a token and a step of new tokens; windows of about a step. The first token is seen or is not."""
    arguments = prefill_case(LAYOUT, [70], [70], new=True, group=3, num_tail_slots=1, device=device) | {"window": window}
    assert_rows(called(form, arguments), reference.prefill_attention(**arguments | {"q": arguments["q"].double()}))


@FORMS
@pytest.mark.parametrize("window", [3, 20, 40])
def test_raw_tokens_before_a_window(window, form, device):
    """Raw tokens that no query sees may be anything: those of the sink and of the tail."""
    arguments = prefill_case(LAYOUT, [120], [2], sink_len=16, num_tail_slots=3, device=device) | {"window": window}
    expected = called(form, arguments)
    assert int(arguments["num_quantized"]) == 0
    raw, table = arguments["raw_pages"], arguments["raw_table"][0].tolist()
    for position in range(120 - 2 - window + 1):
        body = position - 16
        page, token = (table[0], position) if body < 0 else (table[1 + body // 64], body % 64)
        raw[page, :, :, token] = torch.nan
    assert torch.equal(called(form, arguments), expected)


def test_more_than_a_block_of_splits(device):
    """The merge of prefill looks at 32 runs at a time; here there are 34, of which the last ones count."""
    arguments = prefill_case(PageLayout(64, 64, 2, 2), [34 * 64], [1], group=1, num_tail_slots=1, device=device)
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    assert_rows(prefill_attention(**arguments, split_size=1), exact)


def test_more_than_two_blocks_of_rows(device):
    """Lengths are looked at 128 at a time: the first, the middle and the last of 260 rows have tokens."""
    lengths = [0] * 260
    for row in (1, 127, 128, 255, 256, 259):
        lengths[row] = 5 + row % 3
    case = cache_case(LAYOUT, lengths, group=1, num_kv_heads=1, num_tail_slots=1, device=device)
    some = case.seq_lens > 0
    for options in ({}, {"split_size": 1}) if ON_GPU else ({"split_size": 1},):
        out = decode_attention(case.q, **case.kwargs, **options)
        assert (out[~some] == 0).all()
        assert_rows(out[some], reference.decode_attention(case.q.double(), **case.kwargs)[some])
    ends = torch.cat((torch.zeros(1, device=device), some.cumsum(0))).int()
    arguments = case.kwargs | {"q": case.q[some], "cu_seqlens_q": ends}
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    assert_rows(prefill_attention(**arguments), exact)


def test_stride_of_halves(device):
    """Keys and values of raw pages may lie in memory of their own: the stride between them is no part of a page's."""
    case = cache_case(LAYOUT, [100], group=1, num_kv_heads=1, sink_len=16, device=device)
    expected = decode_attention(case.q, **case.kwargs)
    apart = torch.full_like(case.raw_pages.transpose(0, 1).contiguous(), torch.nan).transpose(0, 1)
    apart.copy_(case.raw_pages)
    assert apart.stride(0) < apart.stride(1)
    assert torch.equal(decode_attention(case.q, **case.kwargs | {"raw_pages": apart}), expected)
    lens = torch.tensor([1], dtype=torch.int32, device=device)
    arguments = case.kwargs | {"q": case.q, "cu_seqlens_q": torch.cat((lens - 1, lens))}
    expected = prefill_attention(**arguments)
    assert torch.equal(prefill_attention(**arguments | {"raw_pages": apart}), expected)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_mean_code_of_folded_weights(bits, device):
    """What rounding folded weights leaves over is taken back, times the mean code: without that the error is 5e-4 and more."""
    layout = PageLayout(64, 64, bits, bits)
    arguments = prefill_case(layout, [192], [8], num_tail_slots=1, device=device)
    arguments["q"] *= 0.01  # weights are almost equal: all of them count
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    assert relative_error(called("folded", arguments), exact) < 4e-4


def test_the_last_of_many_runs_weighs_most(device):
    """What a merge summed before is scaled down when a later step finds a larger score; a last run may be short."""
    arguments = prefill_case(LAYOUT, [34 * 64], [1], group=1, num_tail_slots=1, device=device)
    k, v = draw(64, 1, 64, seed=8), draw(64, 1, 64, seed=9)
    k += 0.5 * arguments["q"].float().cpu()  # scores larger by 4
    pages = arguments["pages"].cpu()
    reference.store_pages(k, v, pages, arguments["block_table"][0, 33:].cpu(), LAYOUT)
    arguments["pages"] = pages.to(device)
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    for split_size in (1, 33):
        assert_rows(prefill_attention(**arguments, split_size=split_size), exact)
    del arguments["cu_seqlens_q"]
    assert_rows(decode_attention(**arguments, split_size=1), exact)
