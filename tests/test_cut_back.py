"""Cutting sequences back into quantized pages: the kernel has the bits of the reference, and attention sees what is left."""

from __future__ import annotations

import pytest
import torch
from helpers import UNEQUAL_LAYOUTS, assert_rounded_alike, assert_same_bits, draw, layout_id

from kvarn_triton import PageLayout, append_tokens, check_cache, cut_back, decode_attention, ops, raw_slots, reference
from kvarn_triton.testing import cache_case, relative_error

SMALL = PageLayout(64, 64, 4, 2)
SINK = 16
LENGTHS = [330, 330, 330, 330, 150, 90, 20, 10]
NEW_LENGTHS = [100, SINK + 64, SINK + 65, SINK + 63, 150, 80, 7, 0]
"""Inside a page, at the end of one, a token behind that and before it; not cut; in the tail; in the sink; nothing."""


def cut_arguments(case, new_lens, csr: bool) -> dict:
    """Return arguments of a call."""
    device = case.pages.device
    arguments = {name: getattr(case, name) for name in ("raw_pages", "pages", "raw_table", "block_table", "num_quantized")}
    arguments |= {"new_lens": torch.tensor(new_lens, dtype=torch.int32, device=device), "layout": case.layout, "sink_len": SINK}
    if csr:
        columns = case.block_table.shape[1]
        indptr = torch.arange(len(new_lens) + 1, dtype=torch.int32, device=device) * columns
        arguments |= {"block_table": None, "kv_indptr": indptr, "kv_indices": case.block_table.flatten()}
    return arguments


@pytest.mark.parametrize(
    ("layout", "raw_dtype", "csr"),
    [(SMALL, torch.float32, False), (SMALL, torch.float16, True), (PageLayout(80, 64, 3, 8), torch.bfloat16, False)]
    + [(layout, torch.float16, False) for layout in (*UNEQUAL_LAYOUTS[:2], PageLayout(80, 64, 5, 6))],
    ids=layout_id,
)
def test_bits(layout, raw_dtype, csr, device):
    """Pages become the raw tokens that the reference makes of them; counts are lowered, and everything else stays."""
    size = layout.page_size
    lengths = [SINK + size * 3 + 5, SINK + size * 2, SINK + size + 3]
    new_lens = [SINK + size + 9, SINK + size, SINK + size + 1]
    case = cache_case(
        layout, lengths, num_kv_heads=2, group=1, sink_len=SINK, raw_dtype=raw_dtype, num_tail_slots=1, device=device
    )
    results = []
    for api in (cut_back, reference.cut_back, ops.cut_back):
        arguments = cut_arguments(case, new_lens, csr)
        arguments |= {name: arguments[name].clone() for name in ("raw_pages", "num_quantized")}
        before = arguments["num_quantized"].tolist()
        api(**arguments, advance=False)
        assert arguments["num_quantized"].tolist() == before == [3, 2, 1]
        api(**arguments)
        assert arguments["num_quantized"].tolist() == [1, 1, 1]
        results.append(arguments["raw_pages"])
    changed = (results[1] != case.raw_pages) & ~(results[1].isnan() & case.raw_pages.isnan())
    assert changed.any(dim=-1).flatten(1).any(dim=1).sum() == 1  # one page of the pool
    assert_rounded_alike(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0))
    assert_same_bits(results[2].nan_to_num(7.0), results[0].nan_to_num(7.0))


@pytest.mark.parametrize("slots", [1, 3])
def test_attention_after_a_cut(slots, device):
    """Attention sees the tokens that are left, as they were read before, and one that is appended: not what was cut off."""
    case = cache_case(
        SMALL, LENGTHS, num_kv_heads=2, group=2, dtype=torch.float32, sink_len=SINK, num_tail_slots=slots, device=device
    )
    kwargs, left = case.kwargs, []
    options = {name: kwargs[name] for name in ("raw_pages", "raw_table", "sink_len")}
    for row, length in enumerate(NEW_LENGTHS):
        counts = int(case.num_quantized[row])
        left.append(
            reference.gather_cache(case.pages, case.block_table, length, SMALL, row=row, num_quantized=counts, **options)
        )
    cut_back(**cut_arguments(case, NEW_LENGTHS, False))
    k, v = (draw(len(LENGTHS), 2, 64, seed=seed, device=device) for seed in (5, 6))
    new_lens = torch.tensor(NEW_LENGTHS, dtype=torch.int32, device=device)
    slots_of = raw_slots(new_lens[:, None], case.raw_table, sink_len=SINK, page_size=64)
    append_tokens(k, v, case.raw_pages, slots_of.flatten())
    cut = kwargs | {"seq_lens": new_lens + 1}
    check_cache(**cut)
    out = decode_attention(case.q, **cut)
    for row, length in enumerate(NEW_LENGTHS):
        keys, values = (
            torch.cat((old, reference.hadamard(new[row][:, None])), dim=1) for old, new in zip(left[row], (k, v), strict=True)
        )
        query, positions = reference.hadamard(case.q[row : row + 1]), torch.arange(length + 1, device=device)
        expected, _ = reference.attention.attend(query, keys, values, positions[-1:], positions, 0.125)
        assert relative_error(out[row], reference.hadamard(expected)[0]) < 1e-5


def test_ids_below_zero(device):
    """Nothing is read or written for an id below 0."""
    case = cache_case(SMALL, [330], num_kv_heads=1, group=1, sink_len=SINK, device=device)
    before = case.raw_pages.clone()
    for name in ("block_table", "raw_table"):
        for api in (cut_back, reference.cut_back):
            arguments = cut_arguments(case, [100], False)
            api(**arguments | {name: torch.full_like(arguments[name], -1), "num_quantized": arguments["num_quantized"].clone()})
            assert_same_bits(case.raw_pages, before)
