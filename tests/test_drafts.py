"""Few query rows on GPUs with products of warp groups, which have a kernel of their own.

On a GPU of compute capability 9.0 that kernel runs. In the interpreter the kernel of other calls stands for it: what is around
it is tested, and which calls take it.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import ON_GPU, check, draw, layout_id
from prefill_cases import SMALL, prefill_case
from test_masks import random_masks

from kvarn_triton import PageLayout, PrefillConfig, configs, gpu, prefill_attention, prefill_workspace_size, reference
from kvarn_triton.testing import attention_in, relative_error

LAYOUT = PageLayout(128, 128, 4, 2)
LAYOUTS = [PageLayout(128, 128, k_bits, v_bits) for k_bits in (2, 4) for v_bits in (2, 4)]


@pytest.fixture(autouse=True)
def there(device):
    """Skip where no call takes that kernel: its form is refused there."""
    if not configs.has_draft_kernel(LAYOUT, torch.float16, device):
        pytest.skip("this GPU has no products of warp groups")


def drafts(rows: int, device: torch.device) -> dict:
    """Return launch parameters of a call with at most so many rows of a sequence and kv head."""
    return {"config": configs.config_of_form("warp_groups", LAYOUT, torch.float16, device, rows)}


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_layouts(layout, new, rows, device):
    """Every pair of bits, tiles of 16 and 32 rows, a sink and a tail, drafts in the cache and new ones, 16-bit dtypes."""
    dtype = torch.bfloat16 if rows == 32 else torch.float16
    options = {"new": new, "group": 4, "num_kv_heads": 2, "sink_len": 20, "num_tail_slots": 1, "dtype": dtype}
    arguments = prefill_case(layout, [20 + 3 * 128 + 9, 20 + 128 + 1, 7], [rows // 4, 3, 1], device=device, **options)
    check(arguments, **drafts(rows, device))


@pytest.mark.parametrize("group", [1, 3, 5, 8, 16, 20])
def test_groups(group, device):
    """Tiles of rows begin and end inside tokens, and a token may take several tiles."""
    arguments = prefill_case(LAYOUT, [400, 260, 3], [7, 1, 3], new=group % 2 == 0, group=group, sink_len=16, device=device)
    for rows in (16, 32):
        check(arguments, **drafts(rows, device))


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_boundaries(count, new, device):
    """The first query at each token around the end of a page: who attends to that page must agree."""
    lengths = [length + count * new for length in (126, 127, 128, 129, 130, 255, 256, 257, 258)]
    arguments = prefill_case(LAYOUT, [384], [1], group=1, num_tail_slots=1, device=device)
    table = arguments["block_table"].expand(len(lengths), -1).contiguous()
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    arguments = {"pages": arguments["pages"], "block_table": table, "seq_lens": lens, "layout": LAYOUT}
    total = count * len(lengths)
    arguments["q"] = 2 * draw(total, 2, 128, seed=3, dtype=torch.float16, device=device)
    arguments["cu_seqlens_q"] = torch.arange(0, total + 1, count, dtype=torch.int32, device=device)
    if new:
        arguments |= {name: draw(total, 1, 128, seed=i, dtype=torch.float16, device=device) for i, name in enumerate("kv")}
    out = prefill_attention(**arguments, **drafts(16, device))
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    errors = (out.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert (errors < 3e-3).all(), errors.tolist()


def test_lengths_inside_quantized_pages(device):
    """Of a quantized page only the first tokens may count; of a sequence that was cut short none may."""
    arguments = prefill_case(LAYOUT, [400, 300, 200], [8, 8, 2], new=True, num_tail_slots=1, device=device)
    arguments["seq_lens"] -= torch.tensor([22, 130, 195], dtype=torch.int32, device=device)
    check(arguments, **drafts(16, device))


@pytest.mark.parametrize("queries", [[70, 64, 3], [1, 200, 65]])
def test_many_new_tokens(queries, device):
    """More new tokens than a block has, and sequences that lie wholly in them."""
    lengths = [count + before for count, before in zip(queries, (300, 0, 130), strict=True)]
    arguments = prefill_case(LAYOUT, lengths, queries, new=True, group=2, sink_len=20, num_tail_slots=2, device=device)
    check(arguments, **drafts(32, device))


@pytest.mark.parametrize("sink_len", [0, 1, 63, 64, 65, 128, 200])
def test_sinks_of_any_length(sink_len, device):
    """Blocks of raw tokens end with the sink, and with the tail, wherever that is; short sequences end inside of the sink."""
    lengths = [sink_len + 128 * 2 + 64 + 5, sink_len + 130, max(sink_len - 3, 4)]
    options = {"group": 4, "sink_len": sink_len, "num_tail_slots": 2, "new": sink_len % 2 == 0}
    arguments = prefill_case(LAYOUT, lengths, [4, 3, 2], device=device, **options)
    check(arguments, **drafts(16, device))


def test_sinks_csr_strides_padding(device):
    """Logits of attention sinks, ids in one list, rows with gaps, tokens of no sequence, a sequence without any."""
    arguments = prefill_case(LAYOUT, [400, 150, 290, 5], [4, 0, 3, 2], new=True, group=4, num_kv_heads=2, device=device)
    sinks = draw(8, seed=5).to(device)
    expected = check(arguments, {"sinks": sinks}, **drafts(16, device))
    table = arguments["block_table"]
    counts = torch.tensor([0, *([table.shape[1]] * 4)], device=device).cumsum(0).int()
    arguments |= {"block_table": None, "kv_indptr": counts, "kv_indices": table.flatten().contiguous(), "sinks": sinks}
    for name in ("q", "k", "v"):
        x = arguments[name]
        wide = torch.full((len(x) + 5, x.shape[1] + 1, x.shape[2] + 16), torch.nan, dtype=x.dtype, device=device)
        wide[2:-3, 1:, :-16] = x
        arguments[name] = wide[:, 1:, :-16]
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_q"] + 2
    out = prefill_attention(**arguments, **drafts(16, device))
    assert relative_error(out[2:-3], expected) < 1e-3 and (out[:2] == 0).all() and (out[-3:] == 0).all()


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("factor", [0.05, 1, 3])
def test_scores_that_differ(factor, rows, new, device, monkeypatch):
    """One program has all pages, whose scores are like those before, a little larger, and far larger: then it scales sums."""
    monkeypatch.setattr(gpu, "num_programs", lambda *_: 1)
    arguments = prefill_case(LAYOUT, [1300, 700], [rows // 4, 3], new=new, group=4, num_kv_heads=2, device=device)
    arguments["q"] *= factor
    arguments["q"][:2] *= 2
    check(arguments, **drafts(rows, device))


@pytest.mark.parametrize("number", [-torch.inf, torch.nan])
def test_bad_queries(number, device):
    """One number of one query head and token: that row is not finite, all others are as they were."""
    arguments = prefill_case(LAYOUT, [300, 160], [3, 3], group=2, sink_len=16, num_tail_slots=1, device=device)
    expected = prefill_attention(**arguments, **drafts(16, device))
    arguments["q"][0, 1, 5] = number
    out = prefill_attention(**arguments, **drafts(16, device))
    finite = out.isfinite().all(-1)
    assert int((~finite).sum()) == 1 and not finite[0, 1]
    assert relative_error(out[finite], expected[finite]) < 1e-3


@pytest.mark.parametrize("number", [torch.inf, torch.nan] if ON_GPU else [torch.nan])
def test_bad_tokens(number, device):
    """A key that is not finite, raw or new, touches the rows that see it, and none of another sequence."""
    options = {"new": True, "group": 4, "sink_len": 16, "num_tail_slots": 1}
    for name, first in (("k", 1), ("raw_pages", 0)):
        arguments = prefill_case(LAYOUT, [300, 160], [8, 8], **options, device=device)
        if name == "k":
            arguments["k"][1, :, 5] = number
        else:
            arguments["raw_pages"][int(arguments["raw_table"][0, 0]), 0, :, 3] = number
        finite = prefill_attention(**arguments, **drafts(32, device)).isfinite().all(-1)
        assert finite[:first].all() and not finite[first:8].any() and finite[8:].all()


def test_large_and_unlike_queries(device):
    """Queries of very different sizes in one tile, and scores that outgrow those of pages before."""
    arguments = prefill_case(LAYOUT, [900], [4], group=4, num_tail_slots=1, device=device)
    arguments["q"] *= torch.logspace(-2, 1, 4, device=device)[:, None, None].half()
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    plain = relative_error(attention_in(torch.float16, arguments), exact)
    assert relative_error(prefill_attention(**arguments, **drafts(16, device)), exact) < 2 * plain


def test_what_others_own_is_not_read(device):
    """Ids after the last whole page may be anything, and so may memory of other pages (NaN, `cache_case`)."""
    arguments = prefill_case(LAYOUT, [700, 300], [3, 2], new=True, sink_len=16, num_tail_slots=2, device=device)
    expected = prefill_attention(**arguments, **drafts(16, device))
    table = arguments["block_table"]
    for row, count in enumerate(arguments["num_quantized"].tolist()):
        table[row, count:] = 2**28
    assert torch.equal(prefill_attention(**arguments, **drafts(16, device)), expected)


def test_a_call_takes_it_where_it_fits(device):
    """Up to 32 rows, of values of 4 bits 17 and more, 128 channels and tokens, queries of 16 bits, and no `split_size`."""

    def form(layout=LAYOUT, dtype=torch.float16, tokens=4, split_size=None):
        return configs.prefill_config(layout, dtype, device, tokens, 1, 4, split_size).form

    fours = [PageLayout(128, 128, k_bits, 4) for k_bits in (2, 4)]
    assert [form(tokens=n) for n in (1, 4, 5, 8)] == ["warp_groups"] * 4
    assert [form(layout, tokens=n) for n in (4, 5, 8) for layout in fours] == ["registers"] * 2 + ["warp_groups"] * 4
    assert form(tokens=9) == configs.prefill_form(device, 36)
    assert form(dtype=torch.float32, tokens=8) == "folded" and form(split_size=2, tokens=8) != "warp_groups"
    assert form(PageLayout(128, 128, 2, 2), tokens=8) == "warp_groups"
    others = (PageLayout(64, 128, 4, 2), PageLayout(128, 64, 4, 2), PageLayout(128, 128, 8, 2))
    assert all(form(layout, tokens=8) == "registers" for layout in others)


def test_refusals(device):
    """The form is refused where the kernel has no answer, and names what the argument is."""
    arguments = prefill_case(LAYOUT, [300], [4], new=True, num_tail_slots=1, device=device)
    config = dataclasses.replace(drafts(16, device)["config"], block_t=64, block_r=64)
    masks = random_masks([4], device)
    cases = [{"window": 9}, {"soft_cap": 9.0}, {"split_size": 1}, *({name: x} for name, x in masks.items())]
    cases.append({"raw_pages": arguments["raw_pages"].float()})
    cases.append(prefill_case(SMALL, [300], [4], new=True, num_tail_slots=1, device=device))
    for options in cases:
        with pytest.raises(ValueError, match=r"^config.form: expected another one .*got 'warp_groups'"):
            prefill_attention(**arguments | options, config=config)
    with pytest.raises(ValueError, match="num_warps"):
        PrefillConfig(16, 2, 128, 128, form="warp_groups")
    with pytest.raises(ValueError, match="block_m"):
        dataclasses.replace(config, block_m=64)


@pytest.mark.parametrize("name", ["window", "soft_cap", "split_size", "tree_mask", "span_ends", "raw_pages"])
def test_calls_that_go_another_way(name, device):
    """What that kernel has no answer to is computed as before."""
    arguments = prefill_case(LAYOUT, [300, 200], [8, 8], new=True, group=4, sink_len=16, num_tail_slots=1, device=device)
    masks = random_masks([8, 8], device)
    some = {"window": 200, "soft_cap": 3.0, "split_size": 1, **masks, "raw_pages": arguments["raw_pages"].float()}[name]
    seen = {} if name in ("split_size", "raw_pages") else {name: some}
    check(arguments | ({name: some} if name == "raw_pages" else {}), seen, **({name: some} if name == "split_size" else {}))


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_workspace_suffices(tokens, device):
    """What is asked for before suffices, for fewer tokens, sequences and pages too, and never depends on lengths."""
    arguments = prefill_case(LAYOUT, [300, 200], [tokens] * 2, new=True, group=4, num_tail_slots=1, device=device)
    size = prefill_workspace_size(16, 4, 4, 1, LAYOUT, 8, device)
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
    out = prefill_attention(**arguments, workspace=workspace)
    assert relative_error(out, reference.prefill_attention(**arguments | {"q": arguments["q"].double()})) < 2e-3


def test_more_tiles_than_programs(device):
    """Parameters that were given are kept where tiles are more than programs run at once, and memory for them suffices."""
    config = drafts(32, device)
    batch = gpu.num_programs(device, config["config"].programs_per_sm) + 5
    arguments = prefill_case(LAYOUT, [130] * batch, [8] * batch, new=True, group=4, num_tail_slots=1, device=device)
    size = prefill_workspace_size(8 * batch, batch, 4, 1, LAYOUT, arguments["block_table"].shape[1], device, **config)
    assert size >= 8 * batch * 4 * (LAYOUT.v_head_dim + 1) * 4
    workspace = torch.full((size,), 255, dtype=torch.uint8, device=device)
    out = prefill_attention(**arguments, **config, workspace=workspace)
    assert relative_error(out, reference.prefill_attention(**arguments | {"q": arguments["q"].double()})) < 2e-3


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_captured(device):
    """A graph gives the same bits, over and over, with other numbers in the same memory."""
    arguments = prefill_case(
        LAYOUT, [5000, 3000, 900], [4, 4, 3], new=True, group=4, num_kv_heads=4, sink_len=128, device=device
    )
    size = prefill_workspace_size(11, 3, 16, 4, LAYOUT, arguments["block_table"].shape[1], device, **drafts(16, device))
    memory = drafts(16, device) | {
        "out": torch.empty_like(arguments["q"]),
        "workspace": torch.empty(size, dtype=torch.uint8, device=device),
    }
    prefill_attention(**arguments, **memory)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            prefill_attention(**arguments, **memory)
    for seed in range(20):
        arguments["q"].copy_(draw(*arguments["q"].shape, seed=seed))
        graph.replay()
        found = memory["out"].clone()
        assert torch.equal(found, prefill_attention(**arguments, **drafts(16, device)))
        assert relative_error(found, reference.prefill_attention(**arguments | {"q": arguments["q"].double()})) < 2e-3
