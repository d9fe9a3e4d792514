"""prefill_attention against float64 attention over the same cache: several query tokens per sequence, causally.

The error may be twice that of plain attention whose operands are rounded to the working dtype (`helpers.check`).
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import ALL_LAYOUTS, DTYPES, LAYOUTS, ON_GPU, assert_same_bits, check, draw, layout_id, strided
from prefill_cases import SMALL, in_form, prefill_case

from kvarn_triton import (
    PageLayout,
    PrefillConfig,
    append_tokens,
    configs,
    decode_attention,
    gpu,
    merge_states,
    prefill_attention,
    prefill_workspace_size,
    raw_slots,
    reference,
)
from kvarn_triton.attention.prefill import plan_prefill
from kvarn_triton.cache import Cache, Results
from kvarn_triton.masking import Mask
from kvarn_triton.testing import cache_case, relative_error

LAYOUTS_OF_VALUES = pytest.mark.parametrize("layout", [SMALL, PageLayout(64, 64, 4, 2, v_head_dim=80)], ids=layout_id)
FORMS = pytest.mark.parametrize("form", ["dequantized", "registers", "folded", "scratch"])


@FORMS
@pytest.mark.parametrize("index", range(len(ALL_LAYOUTS)), ids=[layout_id(layout) for layout in ALL_LAYOUTS])
def test_layouts(index, form, device):
    """Every pair of bits, every shape, every dtype, drafts in the cache and new tokens, few rows and many (KF 1, KF 9)."""
    layout, dtype, new = ALL_LAYOUTS[index], DTYPES[index % 3], bool(index // 2 % 2)
    queries = [5, 3] if index % 4 < 2 else [40, 2]
    sink_len = (0, 16, layout.page_size)[index // 2 % 3]
    group = 1 + index % 5
    lengths = [sink_len + layout.page_size * 2 + 9, sink_len + layout.page_size + 1]
    options = {"group": group, "num_tail_slots": 1, "dtype": dtype, "sink_len": sink_len}
    arguments = prefill_case(layout, lengths, queries, new=new, device=device, **options)
    assert arguments["num_quantized"].tolist() == ([1, 0] if new else [2, 1])
    check(arguments, **in_form(form, arguments))


@FORMS
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16, 20])
def test_groups(group, form, device):
    """Tiles of rows begin and end inside tokens, and a token may take several tiles."""
    arguments = prefill_case(SMALL, [150, 70, 3], [7, 1, 3], new=group % 2 == 0, group=group, sink_len=16, device=device)
    check(arguments, **in_form(form, arguments))


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("queries", [[1, 1, 1], [64, 0, 1], [65, 12, 33], [130, 7, 64]])
def test_query_counts(queries, new, device):
    """One token, none, a whole sequence, more than a page; every one sees just what comes before it."""
    num_tail_slots = 4 if not new else 2  # without new keys all query tokens are in the tail
    check(prefill_case(SMALL, [200, 12, 64], queries, new=new, sink_len=10, num_tail_slots=num_tail_slots, device=device))


@FORMS
@pytest.mark.parametrize("queries", [[4, 3], [50, 30]])
def test_queries_inside_quantized_pages(queries, form, device):
    """Drafts may be quantized too: pages are causal within themselves."""
    arguments = prefill_case(SMALL, [192, 128], queries, num_tail_slots=1, device=device)
    check(arguments, **in_form(form, arguments, split_size=3))


@FORMS
@pytest.mark.parametrize("new", [False, True])
def test_lengths_inside_quantized_pages(new, form, device):
    """Of a quantized page only the first tokens may count: a sequence was cut short."""
    arguments = prefill_case(SMALL, [200, 136], [8, 8], new=new, num_tail_slots=1, device=device)
    arguments["seq_lens"] -= 22
    check(arguments, **in_form(form, arguments))


@pytest.mark.parametrize(("half", "sm_scale"), [("k", 4.0), ("v", None)])
def test_the_mean_code_is_taken_out(half, sm_scale, device):
    """Numbers near the middle of their range, with a zero that makes them small: a mean code multiplies no rounding error.

    All codes are the two in the middle of 256. Their mean times the rounding error of a folded query or weight is more than 10
    times the error that plain attention may have.
    """
    layout = PageLayout(64, 64, 8, 8)
    arguments = prefill_case(layout, [192, 128], [4, 3], num_tail_slots=1)
    offset, size = getattr(layout, f"{half}_codes_offset"), getattr(layout, f"{half}_codes_bytes")
    codes = arguments["pages"][..., offset : offset + size]
    codes.copy_(127 + (draw(*codes.shape, seed=1) > 0))
    offset = getattr(layout, f"{half}_params_offset")
    params = arguments["pages"][..., offset : offset + 4 * 64]
    scales_and_zeros = params.contiguous().view(torch.float16).unflatten(-1, (64, 2))
    scales_and_zeros[..., 1] = -127.5 * scales_and_zeros[..., 0]
    params.copy_(scales_and_zeros.flatten(-2).view(torch.uint8))
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    check(arguments, sm_scale=sm_scale, **in_form("folded", arguments))


@LAYOUTS_OF_VALUES
def test_first_chunk(layout, device):
    """Nothing is cached yet: attention over the new tokens alone, as PyTorch's own."""
    arguments = prefill_case(layout, [150, 20], [150, 20], new=True, device=device)
    out = check(arguments)
    for first, last in ((0, 150), (150, 170)):
        q, k, v = (arguments[name][first:last].double().transpose(0, 1) for name in ("q", "k", "v"))
        k, v = (x.expand(len(q), -1, -1) for x in (k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert relative_error(out[first:last].transpose(0, 1), exact) < 1e-3


@FORMS
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("window", [1, 5, 64, 74, 100, 1000])
def test_window(window, new, form, device):
    """Windows that end inside new tokens, tail, pages and sink; ids of pages outside are not looked at."""
    queries = [6, 3] if window % 2 else [45, 20]
    arguments = prefill_case(SMALL, [272, 90], queries, new=new, sink_len=70, num_tail_slots=3, device=device)
    freed = arguments["block_table"].clone()
    for b, (length, count) in enumerate(zip([272, 90], queries, strict=True)):
        unseen = max(length - count - window + 1 - 70, 0) // 64
        freed[b, :unseen] = 2**28
    split_size = 100 if window > 64 else None  # all pages to one program
    out = check(arguments, {"window": window}, **in_form(form, arguments, split_size))
    raw = arguments["raw_table"].clone()
    for b, (length, count) in enumerate(zip([272, 90], queries, strict=True)):
        cached, oldest = length - (count if new else 0), max(length - count - window + 1, 0)
        used = {p // 64 for p in range(oldest, min(cached, 70))}
        for p in range(max(oldest - 70, int(arguments["num_quantized"][b]) * 64), max(cached - 70, 0)):
            used.add(2 + p // 64 % 3)
        raw[b, [column for column in range(5) if column not in used]] = 2**28
    freed_arguments = arguments | {"block_table": freed, "raw_table": raw}
    assert_same_bits(prefill_attention(**freed_arguments, window=window, **in_form(form, arguments, split_size)), out)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("lengths", [[50, 12], [200, 71]])
def test_the_largest_window(lengths, new, device):
    """A window larger than any position, above all of queries inside the sink, is none."""
    arguments = prefill_case(SMALL, lengths, [9, 4], new=new, sink_len=70, num_tail_slots=3, device=device)
    for split_size in (None, 1):
        out = check(arguments, {"window": 2**31 - 1}, split_size=split_size)
        assert_same_bits(out, prefill_attention(**arguments, split_size=split_size))


@FORMS
@LAYOUTS_OF_VALUES
@pytest.mark.parametrize("new", [False, True])
def test_soft_cap_and_sinks(new, layout, form, device):
    """Scores of up to 40 capped at 20, and a logit that takes weight from them, with and without a window."""
    queries = [6, 3] if new else [18, 5]
    arguments = prefill_case(layout, [200, 90], queries, new=new, sink_len=20, num_tail_slots=3, k_scale=3, device=device)
    sinks = torch.tensor([1.0, -torch.inf], device=device)
    for seen in ({"soft_cap": 20.0}, {"sinks": sinks}, {"soft_cap": 20.0, "sinks": sinks, "window": 80}):
        for split_size in (None, 1):
            check(arguments, seen, **in_form(form, arguments, split_size))


@FORMS
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 100.0, 1e4])
def test_magnitudes(scale, form, device):
    """Keys and values of any size neither overflow nor vanish (KF 7)."""
    arguments = prefill_case(SMALL, [192], [6], num_tail_slots=1, k_scale=scale, v_scale=scale, device=device)
    arguments["q"] = (arguments["q"].float() / scale).to(torch.float16) if scale > 1 else arguments["q"]
    check(arguments, **in_form(form, arguments))


@FORMS
def test_pages_of_different_magnitude(form, device):
    """Values that grow from page to page by 2**6, and shrink again: what was summed before is kept in proportion."""
    arguments = prefill_case(SMALL, [256], [6], num_tail_slots=1, device=device)
    k, v = (draw(256, 1, 64, seed=seed) for seed in (8, 9))
    v *= torch.tensor([1.0, 64.0, 4096.0, 8.0]).repeat_interleave(64)[:, None, None]
    pages = arguments["pages"].cpu()
    reference.store_pages(k, v, pages, arguments["block_table"][0].cpu(), SMALL)
    for split_size in (None, 4):  # a page to a program, all pages to one
        check(arguments | {"pages": pages.to(device)}, **in_form(form, arguments, split_size))


def test_equals_decode(device):
    """One query token per sequence gives what `decode_attention` gives."""
    case = cache_case(SMALL, [150, 70, 1], group=4, sink_len=16, device=device)
    ends = torch.arange(4, dtype=torch.int32, device=device)
    out = prefill_attention(case.q, **case.kwargs, cu_seqlens_q=ends)
    assert relative_error(out, decode_attention(case.q, **case.kwargs)) < 1e-3


def test_appended_equals_new(device):
    """Tokens given as `k` and `v` count as they do once they are in the tail."""
    arguments = prefill_case(SMALL, [150], [20], new=True, sink_len=16, num_tail_slots=3, device=device)
    expected = prefill_attention(**arguments)
    positions = torch.arange(130, 150, device=device)[None]
    slots = raw_slots(positions, arguments["raw_table"], sink_len=16, page_size=64)[0]
    append_tokens(arguments.pop("k"), arguments.pop("v"), arguments["raw_pages"], slots)
    assert relative_error(prefill_attention(**arguments), expected) < 1e-3


@FORMS
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("split_size", [1, 2, 5])
def test_splits_and_batch_invariance(split_size, new, form, device):
    """The bits of a sequence are the same alone, beside others and in another place; padding is not written."""
    arguments = prefill_case(SMALL, [330, 70, 200], [6, 2, 17], new=new, sink_len=16, device=device)
    out = check(arguments, **in_form(form, arguments, split_size))
    again = prefill_attention(**arguments, **in_form(form, arguments, split_size))
    assert_same_bits(again, out)
    alone = {name: arguments[name][2:] for name in ("block_table", "seq_lens", "raw_table", "num_quantized")}
    alone |= {name: arguments[name][8:] for name in ("q", "k", "v") if name in arguments}
    alone["cu_seqlens_q"] = torch.tensor([0, 17], dtype=torch.int32, device=device)
    alone = arguments | alone
    assert_same_bits(prefill_attention(**alone, **in_form(form, alone, split_size)), out[8:])


def test_padding(device):
    """Query tokens after the last sequence are left alone, split or not."""
    arguments = prefill_case(SMALL, [200, 90], [3, 2], device=device)
    out = check(arguments)
    for split_size in (None, 1):
        padded = torch.full((9, *out.shape[1:]), 7.0, dtype=out.dtype, device=device)
        q = torch.cat((arguments["q"], arguments["q"][:4]))
        prefill_attention(**arguments | {"q": q}, out=padded, split_size=split_size)
        assert (padded[5:] == 7).all() and relative_error(padded[:5], out) < 1e-3


@LAYOUTS_OF_VALUES
def test_csr_strides_and_workspace(layout, device):
    """CSR tables, views with gaps, memory of the caller: the same bits."""
    arguments = prefill_case(layout, [330, 70], [6, 9], new=True, num_kv_heads=2, sink_len=16, device=device)
    expected = prefill_attention(**arguments, split_size=2)
    counts = arguments["num_quantized"].tolist()
    indices = torch.cat([arguments["block_table"][b, :count] for b, count in enumerate(counts)])
    csr = arguments | {"block_table": None, "kv_indices": indices}
    csr["kv_indptr"] = torch.tensor([0, *counts], device=device).cumsum(0).int()
    for name in ("q", "k", "v"):
        csr[name] = strided(arguments[name])
    size = prefill_workspace_size(15, 2, 4, 2, layout, len(indices), device, split_size=2)
    out = strided(torch.zeros_like(expected))
    prefill_attention(**csr, split_size=2, out=out, workspace=torch.empty(size, dtype=torch.uint8, device=device))
    assert_same_bits(out.contiguous(), expected)
    with pytest.raises(ValueError, match="workspace: expected at least"):
        prefill_attention(**csr, split_size=2, workspace=torch.empty(size - 16, dtype=torch.uint8, device=device))


def test_many_sequences(device):
    """More sequences than are looked at together; most have no query token."""
    queries = [0] * 140
    for b, count in ((0, 2), (127, 1), (128, 3), (139, 2)):
        queries[b] = count
    lengths = [max(count, 1) + b % 3 for b, count in enumerate(queries)]
    check(prefill_case(SMALL, lengths, queries, num_tail_slots=1, device=device))


@FORMS
@pytest.mark.parametrize("queries", [[5, 1, 3, 0, 4], [40, 2, 3, 1, 12]])
def test_context_in_two_parts(queries, form, device):
    """What was there before (`past_only`) and the new tokens can be attended to in two calls, and merged.

    Each query sees all that was there, as a decode query that is at the end of it. One sequence has nothing but new tokens,
    one is cut off in the middle of a quantized page.
    """
    lengths = [16 + 192 + 9, 150, 3, 90, 16 + 128 + 12]
    lengths = [max(length, count) for length, count in zip(lengths, queries, strict=True)]
    arguments = prefill_case(SMALL, lengths, queries, new=True, sink_len=16, num_tail_slots=1, device=device)
    arguments["seq_lens"][4] -= 20
    whole = prefill_attention(**arguments)
    past = {name: value for name, value in arguments.items() if name not in ("k", "v")}
    options = in_form(form, past)
    out, lse = prefill_attention(**past, past_only=True, return_lse=True, **options)

    counts = torch.tensor(queries, device=device)
    rows = torch.arange(5, device=device).repeat_interleave(counts)
    lens = (arguments["seq_lens"] - counts).clamp(min=0).int()[rows]
    tables = {name: arguments[name][rows] for name in ("block_table", "raw_table", "num_quantized")}
    decodes = past | tables | {"q": arguments["q"].double(), "seq_lens": lens}
    decodes.pop("cu_seqlens_q")
    exact, exact_lse = reference.decode_attention(**decodes, return_lse=True)
    assert (lens == 0).any() and (out[lens == 0] == 0).all()
    assert relative_error(out, exact) < 1e-3
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=5e-3)

    new_out, new_lse = prefill_attention(**arguments | {"seq_lens": counts.int()}, return_lse=True)
    assert relative_error(merge_states(out, lse, new_out, new_lse)[0], whole) < 1e-3


def test_launch_parameters(monkeypatch):
    """The more rows, the larger the tiles; the batch-invariant mode knows neither tokens nor sequences."""
    device = torch.device("cpu")

    def config(tokens: int, split_size: int | None = None, layout: PageLayout = LAYOUTS[8], dtype=torch.float16):
        chosen = configs.prefill_config(layout, dtype, device, tokens, 1, 4, split_size)
        return chosen.block_m, chosen.form

    few, more, folded = (16, "registers"), (32, "registers"), (16, "folded")
    assert [config(tokens) for tokens in (4, 5, 8, 9)] == [few, more, more, (64, "dequantized")]
    assert [config(tokens) for tokens in (16, 17)] == [(64, "dequantized"), (128, "dequantized")]
    assert config(4, 8) == config(2048, 8) == (64, "dequantized")
    assert config(4, dtype=torch.float32) == config(4, layout=PageLayout(head_dim=512)) == folded
    assert config(4, layout=PageLayout(head_dim=256)) == few
    monkeypatch.setattr(configs, "holds_dequantized_pages", lambda device: False)
    assert config(4) == few and config(2048) == config(4, 8) == more
    monkeypatch.setattr(gpu, "arch_of", lambda device: "gfx942")
    assert config(4) == config(2048) == config(4, 8) == folded


@pytest.mark.parametrize("given", [PrefillConfig(128, 4, 32, 16), PrefillConfig(32, 2, 16, 64, form="registers")])
def test_takes_launch_parameters(given, device):
    """A caller's launch parameters are those of the call, and its workspace follows them."""
    arguments = prefill_case(SMALL, [200, 90], [9, 2], new=True, group=3, sink_len=16, device=device)
    q, ends, size = arguments["q"], arguments["cu_seqlens_q"], (11, 2, 3, 1, SMALL, arguments["block_table"].shape[1], device)
    cache = Cache(SMALL, arguments["pages"], arguments["seq_lens"], arguments["block_table"], *[None] * 5, 0)
    plan = plan_prefill(q, ends, cache, Mask(None, None, None, None, False), Results(None, False, None), None, None, given)
    assert plan.tiles.config == given
    num_bytes = prefill_workspace_size(*size, config=given)
    assert plan.num_bytes <= num_bytes
    check(arguments, config=given, workspace=torch.empty(num_bytes, dtype=torch.uint8, device=device))


@pytest.mark.skipif(not ON_GPU, reason="needs 2.4 GB of pages and a long loop")
@pytest.mark.parametrize("queries", [4, 64])
def test_a_million_tokens(queries, device):
    """Byte offsets above 2**31: 8,192 pages of which a few are different."""
    layout, heads, count = PageLayout(), 24, 8192
    case = cache_case(layout, [512], num_kv_heads=heads, group=1, num_tail_slots=1, device=device)
    pages = torch.empty(layout.pages_shape(count, heads), dtype=torch.uint8, device=device)
    for first in range(0, count, 4):
        pages[first : first + 4] = case.pages[case.block_table[0].long()]
    assert pages.numel() > 2**31
    q = draw(queries, heads, 128, dtype=torch.float16, device=device)
    ends = torch.tensor([0, queries], dtype=torch.int32, device=device)
    lens = torch.tensor([count * 128], dtype=torch.int32, device=device)
    table = torch.arange(count, dtype=torch.int32, device=device)[None]
    out, lse = prefill_attention(q, pages, table, lens, ends, layout, window=count * 128, return_lse=True)
    short = torch.tensor([512], dtype=torch.int32, device=device)
    last_q, last = q[-1:], torch.tensor([0, 1], dtype=torch.int32, device=device)
    expected, expected_lse = reference.prefill_attention(
        last_q.double(), pages[:4], table[:, :4], short, last, layout, return_lse=True
    )
    assert relative_error(out[-1:], expected) < 2e-3
    torch.testing.assert_close(lse[-1:], expected_lse + math.log(count / 4), rtol=0, atol=5e-3)
