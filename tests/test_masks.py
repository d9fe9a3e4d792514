"""What new tokens see of each other: trees of drafts, blocks of drafts, spans of image tokens; and nothing else changes.

The reference is compared with a matrix that loops write down, kernels with the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from helpers import LSE_ERROR, SLOW, check, draw, layout_id
from prefill_cases import SMALL, in_form, prefill_case, with_scratch

from kvarn_triton import (
    PageLayout,
    append_tokens,
    attend,
    build_tree_mask,
    decode_attention,
    ops,
    plan_step,
    prefill_attention,
    reference,
    write_tokens,
)
from kvarn_triton.testing import relative_error

ALL = 2**31 - 1
FORMS = pytest.mark.parametrize("form", ["dequantized", "registers", pytest.param("folded", marks=SLOW), "scratch"])


def paths_of(parents: Sequence[int]) -> list[list[int]]:
    """Return the way from the root to each token of a tree."""
    paths: list[list[int]] = []
    for token, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), token])
    return paths


def random_parents(count: int, seed: int = 0) -> list[int]:
    """Return parents of a tree with several roots, each before its children."""
    random = torch.Generator().manual_seed(seed)
    return [int(torch.randint(-1, max(min(token, token // 2 + 2), 0), (1,), generator=random)) for token in range(count)]


def random_masks(queries: Sequence[int], device: torch.device, seed: int = 0) -> dict:
    """Return words for all new tokens, some without a bit and some with all, and ends of spans, some past the last token."""
    random, total = torch.Generator().manual_seed(seed), sum(queries)
    words = torch.randint(-(2**63), 2**63 - 1, (total,), generator=random)
    kind = torch.rand(total, generator=random)
    words = torch.where(kind < 0.3, 0, torch.where(kind > 0.8, -1, words))
    ends = torch.randint(-3, 100, (total,), generator=random).int()
    return {"tree_mask": words.to(device), "span_ends": ends.to(device)}


def seen_tokens(arguments: dict, options: dict, row: int) -> list[list[int]]:
    """Return the positions that each new token of a sequence sees, written out."""
    first, last = (int(x) for x in arguments["cu_seqlens_q"][row : row + 2])
    count, before = last - first, int(arguments["seq_lens"][row]) - (last - first)
    window, kept = options.get("window") or ALL, arguments["sink_len"] if options.get("keep_sink") else 0
    seen = []
    for i in range(count):
        end = max(i + 1, int(options["span_ends"][first + i])) if "span_ends" in options else i + 1
        place, new = i, [j for j in range(min(end, count)) if j > i - window or before + j < kept]
        word = int(options["tree_mask"][first + i]) % 2**64 if "tree_mask" in options and count <= 64 else 0
        bits = [j for j in range(count) if word >> j & 1]
        if bits:
            place, new = len(bits) - 1, bits
        older = [p for p in range(before) if p > before + place - window or p < kept]
        seen.append(older + [before + j for j in new])
    return seen


def expected_of(arguments: dict, options: dict) -> torch.Tensor:
    """Return attention of each new token to what it sees, one after the other, in float64."""
    layout, rows = arguments["layout"], []
    for row, length in enumerate(arguments["seq_lens"].tolist()):
        first, last = (int(x) for x in arguments["cu_seqlens_q"][row : row + 2])
        k, v = reference.gather_cache(
            arguments["pages"], arguments["block_table"], length - (last - first), layout, row=row, dtype=torch.float64,
            raw_pages=arguments["raw_pages"], raw_table=arguments["raw_table"], sink_len=arguments["sink_len"],
            num_quantized=int(arguments["num_quantized"][row]),
        )  # fmt: skip
        new = (reference.hadamard(arguments[name][first:last].double()).transpose(0, 1) for name in ("k", "v"))
        k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), new, strict=True))
        for i, seen in enumerate(seen_tokens(arguments, options, row)):
            q = reference.hadamard(arguments["q"][first + i].double()).unflatten(0, (k.shape[0], -1))
            scores = torch.einsum("hgd,htd->hgt", q, k[:, seen]) * layout.head_dim**-0.5
            rows.append(reference.hadamard(torch.einsum("hgt,htd->hgd", scores.softmax(-1), v[:, seen]).flatten(0, 1)))
    return torch.stack(rows)


OPTIONS = [{}, {"window": 30}, {"window": 5}, {"window": 9, "keep_sink": True}, {"window": 150}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("names", [("tree_mask",), ("span_ends",), ("tree_mask", "span_ends")], ids="-".join)
def test_reference_is_the_matrix(names, options, device):
    """Words, spans and both, with windows, of 64 tokens, more, few and a first chunk that has the sink in it."""
    queries = [64, 65, 7, 40]
    arguments = prefill_case(SMALL, [170, 90, 100, 40], queries, new=True, sink_len=20, dtype=torch.float32, device=device)
    options = options | {name: random_masks(queries, device)[name] for name in names}
    out = reference.prefill_attention(**arguments | {"q": arguments["q"].double()}, **options)
    torch.testing.assert_close(out, expected_of(arguments, options))


@FORMS
@pytest.mark.parametrize("group", [1, 5, 16])
@pytest.mark.parametrize("layout", [SMALL, PageLayout(80, 64, 3, 8, v_head_dim=64)], ids=layout_id)
def test_words_and_spans(layout, group, form, device):
    """Rows of one program see different new tokens; a token may take several tiles, and a tile several steps."""
    queries = [64, 5, 66] if group == 5 else [9, 64, 1]
    arguments = prefill_case(layout, [170, 70, 100], queries, new=True, group=group, sink_len=16, device=device)
    masks = random_masks(queries, device, seed=group)
    for names in (("tree_mask",), ("span_ends",), ("tree_mask", "span_ends")):
        check(arguments, {name: masks[name] for name in names}, **in_form(form, arguments))


@FORMS
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_windows(options, form, device):
    """A window hides older tokens by a token's place on its path, and of the new ones those of spans alone."""
    queries = [64, 65, 7, 40]
    lengths = [270, 90, 100, 40]
    arguments = prefill_case(SMALL, lengths, queries, new=True, group=4, sink_len=20, num_tail_slots=1, device=device)
    for (name, masks), split_size in zip(random_masks(queries, device).items(), (None, 1), strict=True):
        some = {name: masks, "return_lse": True, **options}
        out, lse = prefill_attention(**arguments, **some, **in_form(form, arguments, split_size))
        expected, expected_lse = reference.prefill_attention(**arguments | {"q": arguments["q"].double()}, **some)
        assert relative_error(out, expected) < 2e-3
        torch.testing.assert_close(lse, expected_lse, rtol=0, atol=LSE_ERROR[torch.float16])


def test_what_a_window_hides_is_not_read(device):
    """Ids of pages before the window of the first place on a path may be anything, wherever in the call a token stands."""
    arguments = prefill_case(SMALL, [64 * 4 + 40], [40], new=True, group=16, num_tail_slots=1, device=device)
    masks = {"tree_mask": random_masks([40], device)["tree_mask"]}
    expected = reference.prefill_attention(**arguments, **masks, window=100)
    hidden = arguments["block_table"].clone()
    hidden[:, : (64 * 4 + 1 - 100) // 64] = 2**28
    for call in (prefill_attention, with_scratch):
        out = call(**arguments | {"block_table": hidden}, **masks, window=100)
        assert relative_error(out, expected) < 4e-3


@pytest.mark.parametrize("window", [None, 40])
def test_paths_of_a_tree(window, device):
    """A draft gets what it would get if the tokens of its path were the only new ones, with a window too."""
    count = 24
    parents = random_parents(count)
    paths = paths_of(parents)
    assert len({len(path) for path in paths}) > 4 and parents.count(-1) > 1
    arguments = prefill_case(SMALL, [100 + count], [count], new=True, sink_len=16, group=4, device=device)
    words = build_tree_mask(torch.tensor(parents, device=device), arguments["cu_seqlens_q"])
    out = prefill_attention(**arguments, tree_mask=words, window=window)
    for token in (0, 7, 15, count - 1):
        path = paths[token]
        alone = arguments | {name: arguments[name][path] for name in ("q", "k", "v")}
        alone["seq_lens"] = torch.tensor([100 + len(path)], dtype=torch.int32, device=device)
        alone["cu_seqlens_q"] = torch.tensor([0, len(path)], dtype=torch.int32, device=device)
        assert relative_error(out[token], prefill_attention(**alone, window=window)[-1]) < 1e-3


@pytest.mark.parametrize("count", [5, 64, 150])
def test_block(count, device):
    """A span over all new tokens is a block whose tokens see each other, as PyTorch's attention that is not causal."""
    arguments = prefill_case(SMALL, [count], [count], new=True, device=device)
    spans = torch.full((count,), ALL, dtype=torch.int32, device=device)
    q, k, v = (arguments[name].double().transpose(0, 1) for name in ("q", "k", "v"))
    exact = torch.nn.functional.scaled_dot_product_attention(q, *(x.expand(len(q), -1, -1) for x in (k, v)))
    for call in (prefill_attention, with_scratch):
        assert relative_error(call(**arguments, span_ends=spans).transpose(0, 1), exact) < 1e-3


def test_image_in_two_chunks(device):
    """The part of a span in a later chunk sees the earlier part, which is in the cache; the earlier part not the later one."""
    arguments = prefill_case(SMALL, [100], [100], new=True, group=2, device=device)
    whole = torch.zeros(100, dtype=torch.int32, device=device)
    whole[30:80] = 80
    out = prefill_attention(**arguments, span_ends=whole)
    first = arguments | {name: arguments[name][:60] for name in ("q", "k", "v")}
    first |= {
        name: torch.tensor(x, dtype=torch.int32, device=device) for name, x in (("seq_lens", [60]), ("cu_seqlens_q", [0, 60]))
    }
    part = prefill_attention(**first, span_ends=whole[:60])
    cut = torch.where(whole > 60, 60, whole)
    expected = prefill_attention(**arguments, span_ends=torch.where(torch.arange(100, device=device) < 60, cut, whole))
    assert relative_error(part, expected[:60]) < 1e-3
    assert relative_error(out[60:], expected[60:]) < 1e-3 and relative_error(out[30:60], expected[30:60]) > 1e-2


def test_causal_words_and_spans(device):
    """Words of 0, words of too many tokens, bits of no token and spans that have ended change nothing."""
    queries = [65, 9]
    arguments = prefill_case(SMALL, [170, 70], queries, new=True, sink_len=16, device=device)
    expected = prefill_attention(**arguments)
    words = random_masks([65], device)["tree_mask"]
    none = torch.cat((words, torch.full((9,), -(2**9), device=device)))  # bits from 9 on
    chain = torch.cat((words, 2 ** torch.arange(1, 10, device=device) - 1))
    ends = torch.cat([torch.arange(n, dtype=torch.int32, device=device) - 5 for n in queries])
    for masks in ({"tree_mask": none}, {"tree_mask": chain}, {"span_ends": ends}, {"tree_mask": none, "span_ends": ends}):
        for call in (prefill_attention, reference.prefill_attention):
            assert relative_error(call(**arguments, **masks), expected) < 1e-3


def test_any_bits(device):
    """A token may see a later one alone, and not itself: with an empty cache it gets the value of that one."""
    arguments = prefill_case(SMALL, [3], [3], new=True, device=device)
    out = prefill_attention(**arguments, tree_mask=torch.tensor([4, 2, 1], device=device))
    for token, other in ((0, 2), (1, 1), (2, 0)):
        value = arguments["v"][other].float().expand(2, -1)
        torch.testing.assert_close(out[token].float(), value, rtol=1e-3, atol=1e-3)


def test_soft_cap_sinks_and_rounds(device, monkeypatch):
    """With other options, in rounds of a few tokens, padding before and behind: words are those of the tokens of the call."""
    from kvarn_triton.attention import workspace

    queries = [20, 33]
    arguments = prefill_case(SMALL, [170, 90], queries, new=True, sink_len=16, device=device)
    options = random_masks(queries, device) | {"soft_cap": 5.0, "sinks": torch.tensor([1.0, -2.0], device=device)}
    expected = reference.prefill_attention(**arguments, **options)
    padded = {name: torch.cat([arguments[name][:7], arguments[name], arguments[name][:3]]) for name in ("q", "k", "v")}
    padded["cu_seqlens_q"] = arguments["cu_seqlens_q"] + 7
    options |= {name: torch.cat([options[name][:7], options[name], options[name][:3]]) for name in ("tree_mask", "span_ends")}
    monkeypatch.setattr(workspace, "ROUND_BYTES", 2**17)
    out = prefill_attention(**arguments | padded, **options, split_size=1)
    assert relative_error(out[7:-3], expected) < 1e-3 and not out[:7].any() and not out[-3:].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_words_of_parents(dtype, device):
    """Words of trees of several sequences: none, one chain of 64, too many tokens, parents behind, padding on both sides."""
    counts = [3, 0, 64, 65, 30, 0]
    trees = [[1, 2, -1], [], list(range(-1, 63)), list(range(-1, 64)), random_parents(30, 1), []]
    parents = torch.tensor([5, 5, *(x for tree in trees for x in tree), 0], dtype=dtype, device=device)
    ends = torch.tensor([2] + [2 + sum(counts[: i + 1]) for i in range(6)], dtype=torch.int32, device=device)
    found = build_tree_mask(parents, ends).tolist()
    expected = [0, 0]
    for tree in trees:
        for token in range(len(tree)):
            word = 0
            while token >= 0:
                word, token = word | 1 << token, tree[token]
            expected.append(word if len(tree) <= 64 else 0)
    assert [word % 2**64 for word in found] == [*expected, 0]
    empty = build_tree_mask(parents[:0], ends[:1] * 0)
    assert empty.shape == (0,) and empty.dtype == torch.int64


def test_refusals(device):
    """Masks are of new tokens that are given; steps of decodes have none."""
    arguments = prefill_case(SMALL, [70], [3], num_tail_slots=2, device=device)
    for name, masks in random_masks([3], device).items():
        with pytest.raises(ValueError, match=f"{name}: expected None without k and v, got 'a tensor'"):
            prefill_attention(**arguments, **{name: masks})
        lens, table = arguments["seq_lens"], arguments["block_table"]
        step = plan_step(SMALL, lens, None, table, arguments["raw_table"])
        with pytest.raises(ValueError, match=f"{name}: expected None without cu_seqlens_q, got 'a tensor'"):
            attend(arguments["q"][:1], arguments["pages"], arguments["raw_pages"], step, **{name: masks[:1]})


def test_operator(device):
    """Masks get through the operator, in a compiled graph too."""
    queries = [9, 4]
    arguments = prefill_case(SMALL, [80, 70], queries, new=True, device=device)
    masks = random_masks(queries, device)
    expected = prefill_attention(**arguments, **masks)
    compiled = torch.compile(ops.prefill_attention, fullgraph=True, backend="aot_eager")
    for call in (ops.prefill_attention, compiled):
        assert torch.equal(call(**arguments, **masks), expected)


class Server:
    """One sequence over pages with a ring for drafts; a step at a time."""

    def __init__(self, device: torch.device) -> None:
        self.pages = SMALL.empty_pages(6, 1, device)
        self.raw_pages = torch.full((4, 2, 1, 64, 64), torch.nan, dtype=torch.float16, device=device)
        self.ints = {"dtype": torch.int32, "device": device}
        self.length = 0

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
        """Attend with new tokens and write them."""
        self.length += len(q)
        self.plan = plan_step(
            SMALL, torch.tensor([self.length], **self.ints), torch.tensor([0, len(q)], **self.ints),
            torch.arange(6, **self.ints)[None], torch.arange(4, **self.ints)[None], num_tokens=len(q), sink_len=64,
            max_drafts=40,
        )  # fmt: skip
        write_tokens(k, v, self.pages, self.raw_pages, self.plan)
        return attend(q, self.pages, self.raw_pages, self.plan, k=k, v=v, **options)


def test_steps_of_a_server(device):
    """Drafts of a tree are attended to, the tokens of one path are kept, and the next step is as if they alone had come."""
    q, k, v = (draw(300, heads, 64, seed=seed, dtype=torch.float16, device=device) for seed, heads in enumerate((4, 1, 1)))
    tree, plain = Server(device), Server(device)
    for server in (tree, plain):
        server.step(q[:170], k[:170], v[:170])
    parents = random_parents(40, seed=3)
    path = max(paths_of(parents), key=len)
    drafts = slice(170, 210)
    words = build_tree_mask(torch.tensor(parents, device=device), torch.tensor([0, 40], **tree.ints))
    out = tree.step(q[drafts], k[drafts], v[drafts], tree_mask=words)
    slots = torch.full((40,), -1, device=device)
    slots[path] = tree.plan.slots[: len(path)]
    append_tokens(k[drafts], v[drafts], tree.raw_pages, slots)
    tree.length -= 40 - len(path)
    kept = torch.tensor(path, device=device) + 170
    expected = plain.step(q[kept], k[kept], v[kept])
    assert relative_error(out[path], expected) < 1e-3
    for first, last in ((210, 280), (280, 290)):  # pages of drafts complete
        outs = [server.step(q[first:last], k[first:last], v[first:last]) for server in (tree, plain)]
        assert torch.equal(*outs)
    assert torch.equal(tree.plan.num_quantized, plain.plan.num_quantized) and math.isfinite(float(outs[0].sum()))
    lens = torch.tensor([tree.length], **tree.ints)
    tables = {name: getattr(tree.plan, name) for name in ("block_table", "raw_table", "num_quantized", "sink_len")}
    ones = [
        decode_attention(q[:1], s.pages, seq_lens=lens, layout=SMALL, raw_pages=s.raw_pages, **tables) for s in (tree, plain)
    ]
    assert torch.equal(*ones)
