"""Latent attention to lists of tokens, against float64; what is not listed is not read."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits
from mla_helpers import CASES, LAYOUTS, call_of_magnitude, check_decode, layout_id, lists_of, moved

import kvarn_triton as kvarn
from kvarn_triton import MLAConfig
from kvarn_triton.testing import relative_error
from kvarn_triton.testing.latents import latent_case

LISTED = CASES | {"drafts with a tail": {"num_queries": 6, "num_heads": 1, "sink_len": 128, "num_tail_slots": 1}}


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=layout_id)
def test_lists(name, layout, device):
    """Each query token attends to the tokens of its list, in pages, sink and tail, as often as they are there."""
    call = latent_case(layout, [300, 0, 128, 33, 1], **LISTED[name])
    if name == "20 heads":
        call["q"] = call["q"].bfloat16()
    check_decode(call | {"indices": lists_of(call, 75)}, device)


@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
def test_lists_heads(num_heads, device):
    """As many heads as models have, with the launch parameters of each."""
    call = latent_case(LAYOUTS[0], [70, 200], num_heads=num_heads, sink_len=64, num_tail_slots=1)
    check_decode(call | {"indices": lists_of(call, 64)}, device)


@pytest.mark.parametrize("config", [MLAConfig(16, 16, 4, 1), MLAConfig(32, 64, 4, 1), MLAConfig(64, 32, 8)])
def test_lists_configs(config, device):
    """Other tiles than the default; on a GPU all of them have to fit."""
    call = latent_case(LAYOUTS[2], [130, 77], num_heads=33, sink_len=64, num_tail_slots=1)
    check_decode(call | {"indices": lists_of(call, 100)}, device, config=config)


def test_list_of_all_tokens(device):
    """A list of all tokens, in any order and longer than what is looked up at once, is attention to all of them."""
    call = moved(latent_case(LAYOUTS[0], [300, 64, 0], sink_len=64, num_tail_slots=2, num_queries=2), device)
    order = torch.randperm(2100, generator=torch.Generator().manual_seed(1)).int().to(device)
    everything, lse = kvarn.mla_decode_attention(**call, return_lse=True)
    for indices in (order, order.sort().values):
        out, list_lse = kvarn.mla_decode_attention(**call, indices=indices.expand(3, 2, 2100), return_lse=True)
        assert relative_error(out, everything) < 2**-9
        torch.testing.assert_close(list_lse, lse, rtol=0, atol=1e-4)


def test_what_is_not_listed_is_not_read(device):
    """Pages without a listed token, and raw tokens that are not listed, may hold anything; so may the table of such pages."""
    call = latent_case(LAYOUTS[0], [400], sink_len=64, num_tail_slots=1)
    listed = torch.tensor([[3, 70, 100, 64, 390, 399, -1, 127]], dtype=torch.int32)
    expected = kvarn.mla_decode_attention(**moved(call, device), indices=listed.to(device))
    pages, raw_pages, table = (call[name].clone() for name in ("pages", "raw_pages", "block_table"))
    kept = torch.zeros(raw_pages.shape[:2], dtype=torch.bool)
    for position in (3, 390, 399):
        kept[call["raw_table"][0, 0 if position < 64 else 1], position % 64] = True
    raw_pages[~kept] = torch.nan
    pages[torch.arange(len(pages)) != table[0, 0]] = 255
    table[0, 1:] = -5
    spoiled = call | {"pages": pages, "raw_pages": raw_pages, "block_table": table}
    assert_same_bits(kvarn.mla_decode_attention(**moved(spoiled, device), indices=listed.to(device)), expected)


def test_splits_of_lists(device):
    """Any number of splits gives the same result up to rounding, and a row the same bits whatever else is in the batch."""
    call = latent_case(LAYOUTS[0], [200, 64, 3], sink_len=64, num_tail_slots=1, num_queries=2)
    call = moved(call | {"indices": lists_of(call, 150)}, device)
    results = {n: kvarn.mla_decode_attention(**call, num_splits=n) for n in (1, 2, 3, 40)}
    for result in results.values():
        assert relative_error(result, results[1]) < 2**-9
    names = ("q", "block_table", "seq_lens", "raw_table", "num_quantized", "indices")
    for row in range(3):
        alone = call | {name: call[name][row : row + 1] for name in names}
        assert_same_bits(kvarn.mla_decode_attention(**alone, num_splits=3)[0], results[3][row])


def test_query_tokens_as_sequences(device):
    """Query tokens that are sequences of their own, with the tables of their sequence, get what they do together."""
    call = latent_case(LAYOUTS[0], [150, 70], num_heads=3, sink_len=64, num_tail_slots=1, num_queries=3)
    call = moved(call | {"indices": lists_of(call, 40)}, device)
    apart = call | {name: call[name].flatten(0, 1) for name in ("q", "indices")}
    apart |= {name: call[name].repeat_interleave(3, 0) for name in ("block_table", "raw_table", "num_quantized")}
    apart["seq_lens"] = (call["seq_lens"][:, None] + torch.arange(-2, 1, device=device)).flatten().int()
    results = [kvarn.mla_decode_attention(**x, num_splits=2).flatten() for x in (call, apart)]
    assert_same_bits(*results)


def test_views_of_lists(device):
    """Lists may be views of something larger, and empty."""
    call = latent_case(LAYOUTS[0], [100, 64], num_heads=4, num_tail_slots=1, num_queries=2)
    lists = lists_of(call, 40)
    memory = torch.full((2, 3, 50), 1, dtype=torch.int32)
    memory[:, 1:, 3:43] = lists
    call, memory = moved(call, device), memory.to(device)
    expected = kvarn.mla_decode_attention(**call, indices=lists.to(device))
    assert_same_bits(kvarn.mla_decode_attention(**call, indices=memory[:, 1:, 3:43]), expected)
    pages = torch.full((len(call["pages"]), call["layout"].page_bytes + 128), 255, dtype=torch.uint8, device=device)
    pages[:, : call["layout"].page_bytes] = call["pages"]
    raw_pages = torch.full((len(call["raw_pages"]), 65, 608), torch.nan, dtype=torch.float16, device=device)
    raw_pages[:, 1:, 16:592] = call["raw_pages"]
    views = {"pages": pages[:, : call["layout"].page_bytes], "raw_pages": raw_pages[:, 1:, 16:592]}
    assert_same_bits(kvarn.mla_decode_attention(**call | views, indices=lists.to(device)), expected)
    out, lse = kvarn.mla_decode_attention(**call, indices=memory[:, 1:, :0], return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("magnitude", [2.0**-12, 2.0**10])
def test_magnitudes_of_lists(magnitude, device):
    """A block of tokens from pages of very different gains."""
    call = call_of_magnitude(magnitude)
    call["indices"] = torch.randperm(180, generator=torch.Generator().manual_seed(2))[None, :170].int()
    check_decode(call, device)
