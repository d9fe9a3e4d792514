"""A window beside which the sink stays visible (StreamingLLM), in decode and prefill."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import LSE_ERROR
from prefill_cases import SMALL, prefill_case, with_scratch

from kvarn_triton import PageLayout, decode_attention, prefill_attention, reference
from kvarn_triton.testing import cache_case, relative_error

SINK = 20


def expected_of(case, window: int) -> torch.Tensor:
    """Return decode attention to the last `window` tokens and the first SINK ones, written out for each sequence."""
    rows = []
    for row, length in enumerate(case.seq_lens.tolist()):
        k, v = reference.gather_cache(
            case.pages, case.block_table, length, case.layout, row=row, dtype=torch.float64, raw_pages=case.raw_pages,
            raw_table=case.raw_table, num_quantized=int(case.num_quantized[row]), sink_len=SINK,
        )  # fmt: skip
        position = torch.arange(length, device=case.q.device)
        seen = (position >= length - window) | (position < SINK)
        q = reference.hadamard(case.q[row].double()).unflatten(0, (k.shape[0], -1))
        scores = torch.einsum("hgd,htd->hgt", q, k) * case.layout.head_dim**-0.5
        weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
        rows.append(reference.hadamard(torch.einsum("hgt,htd->hgd", weights, v).flatten(0, 1)))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 130])
def test_decode(window, device):
    """One query token sees its window and the sink, no page between them, whatever is there."""
    case = cache_case(SMALL, [200, 30, 7], sink_len=SINK, device=device)
    expected = expected_of(case, window).to(device)
    for split_size in (None, 1):
        out = decode_attention(case.q, **case.kwargs, window=window, keep_sink=True, split_size=split_size)
        assert relative_error(out, expected) < 2e-3
    assert relative_error(reference.decode_attention(case.q, **case.kwargs, window=window, keep_sink=True), expected) < 1e-3


def test_hidden_pages_are_not_read(device):
    """Pages between the sink and the window may have any id."""
    case = cache_case(SMALL, [300], sink_len=SINK, device=device)
    arguments = {"window": 90, "keep_sink": True}
    expected = decode_attention(case.q, **case.kwargs, **arguments)
    case.block_table[0, : (300 - 90 - SINK) // SMALL.page_size] = -(10**6)
    assert torch.equal(decode_attention(case.q, **case.kwargs, **arguments), expected)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("queries", [[3, 1], [40, 150], [150, 30]])
def test_prefill(queries, new, device):
    """Several query tokens, in the cache or new; of a first chunk the sink itself is new; a body that is seen as a whole."""
    arguments = prefill_case(SMALL, [290, 150, 42], [*queries, 5], new=new, group=2, sink_len=SINK, device=device)
    for window in (1, 70):
        options = {"window": window, "keep_sink": True, "return_lse": True}
        expected, expected_lse = reference.prefill_attention(**arguments, **options)
        for call in (prefill_attention, with_scratch):
            out, lse = call(**arguments, **options)
            assert relative_error(out, expected) < 4e-3
            torch.testing.assert_close(lse, expected_lse, rtol=0, atol=LSE_ERROR[torch.float16])


def test_prefill_is_decode_of_each_token(device):
    """The reference of prefill agrees with that of decode, token by token."""
    arguments = prefill_case(SMALL, [200], [60], group=2, sink_len=SINK, dtype=torch.float32, device=device)
    out = reference.prefill_attention(**arguments, window=50, keep_sink=True)
    q, lens = arguments.pop("q"), arguments.pop("seq_lens")
    arguments.pop("cu_seqlens_q")
    for i in (0, 31, 59):
        one = reference.decode_attention(q[i : i + 1], seq_lens=lens - 59 + i, **arguments, window=50, keep_sink=True)
        torch.testing.assert_close(out[i : i + 1], one)


def test_without_a_window_nothing_changes(device):
    """Nothing is hidden then: the bits are those of a call without the option."""
    case = cache_case(PageLayout(64, 64, 4, 2), [150], sink_len=SINK, device=device)
    assert torch.equal(decode_attention(case.q, **case.kwargs, keep_sink=True), decode_attention(case.q, **case.kwargs))
    with pytest.raises(ValueError, match="keep_sink: expected a bool, got 1"):
        decode_attention(case.q, **case.kwargs, window=5, keep_sink=1)
