"""Prefill attention over plain tokens: what each program attends to, and what such calls leave alone.

On GPUs with warp groups a kernel of its own attends, in the interpreter one that stands for it. What calls see is tested here,
and in `test_prefill.py`, where calls with scratch memory are one of the forms of every test.
"""

from __future__ import annotations

import pytest
import torch
from helpers import ON_GPU, assert_same_bits, check, layout_id
from plain_helpers import NEEDS_PLAIN_KERNEL, cache_of, numbers, numbers_of, scratched
from prefill_cases import SMALL, new_scratch, prefill_case

from kvarn_triton import PageLayout, build_tree_mask, configs, gpu, prefill_attention, reference
from kvarn_triton.attention import prefill
from kvarn_triton.attention.records import COUNT, LEAD, MASKED, WHOLE
from kvarn_triton.masking import Windows
from kvarn_triton.pages.plain_raw import launch_plain_raw
from kvarn_triton.testing import relative_error

pytestmark = NEEDS_PLAIN_KERNEL


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("sink_len", [0, 16, 128])
def test_what_is_listed(sink_len, new, listed, device):
    """Segments are all that a sequence has of new tokens, full pages, its sink and its tail; steps end where rows see them."""
    lengths, queries = [720, 460, 130], [70, 1, 0]
    arguments = prefill_case(SMALL, lengths, queries, new=new, sink_len=sink_len, num_tail_slots=3, device=device, group=4)
    check(arguments, **scratched(arguments))
    (records,), quantized = listed, arguments["num_quantized"].tolist()
    row_of = {ends: row for row, ends in enumerate(arguments["cu_seqlens_q"].tolist()[:2])}
    for record in records[records[:, 2] > 0].tolist():
        row = row_of[record[0]]
        assert record[3] == queries[row]
        first, last = record[1] // 4, (record[1] + record[2] - 1) // 4
        fields = numbers_of(record)
        cached = lengths[row] - queries[row] if new else lengths[row] - queries[row] + last + 1
        pages = min(quantized[row], max(-(-(cached - sink_len) // 64), 0))
        tail = cached - sink_len - quantized[row] * 64
        assert fields["count"] == [
            queries[row] * new, min(pages * 64, max(cached - sink_len, 0)), min(sink_len, cached), max(tail, 0), 0
        ]  # fmt: skip
        for lead, whole, masked, count, shift in zip(*(fields[name] for name in list(fields)[1:6]), strict=True):
            least, most = (max(min(count, query + 1 + shift), 0) for query in (first, last))
            assert (lead, whole, whole + masked) == (0, least // 128, -(-most // 128))
        assert record[4:6] == [sum(fields["masked"]), sum(fields["masked"]) + sum(fields["whole"])]
    assert max(numbers(records, 1, WHOLE)) >= 2


def test_drafts_in_quantized_pages(listed, device):
    """Rows of a tile whose queries are in quantized pages see different numbers of tokens: what not all see has a mask."""
    arguments = prefill_case(SMALL, [384], [100], num_tail_slots=1, device=device)
    check(arguments, **scratched(arguments))
    assert min(numbers(listed[0], 1, WHOLE)) == (384 - 100 + 1) // 128
    assert max(numbers(listed[0], 1, MASKED)) == 1


LAYOUTS = [
    PageLayout(64, 64, 2, 2),
    PageLayout(128, 128, 4, 2),
    PageLayout(128, 64, 3, 8, v_head_dim=64),
    PageLayout(64, 128, 6, 5, v_head_dim=128),
    PageLayout(256, 64, 4, 2),
    PageLayout(64, 64, 4, 4, v_head_dim=256),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layouts(layout, dtype, listed, device):
    """Every pair of head_dims that there are kernels for, pages of 64 and of 128 tokens, two sequences, two kv heads."""
    if dtype == torch.bfloat16 and not ON_GPU:
        pytest.skip("casts to bfloat16 truncate in the interpreter")
    arguments = prefill_case(
        layout,
        [420, 300],
        [9, 40],
        new=True,
        num_kv_heads=2,
        group=3,
        num_tail_slots=1,
        sink_len=70,
        dtype=dtype,
        device=device,
    )
    check(arguments, **scratched(arguments))
    assert max(numbers(listed[0], 1, COUNT)) >= 256


def test_what_takes_the_usual_way(listed, device):
    """Soft caps, scales below zero, trees, other head_dims, float32, and memory of another dtype than the queries."""
    arguments = prefill_case(SMALL, [300], [9], new=True, device=device)
    check(arguments, {"soft_cap": 5.0}, **scratched(arguments))
    for sm_scale in (-0.3, 0.0):
        check(arguments, sm_scale=sm_scale, **scratched(arguments))
    words = build_tree_mask(torch.tensor([-1, 0, 0, 1, 1, 2, 2, 3, 3], device=device), arguments["cu_seqlens_q"])
    check(arguments, {"tree_mask": words}, **scratched(arguments))
    for layout, dtype in ((PageLayout(80, 64, 4, 2), torch.float16), (SMALL, torch.float32)):
        others = prefill_case(layout, [300], [9], new=True, dtype=dtype, device=device)
        check(others, **scratched(others))
    prefill_attention(**arguments, **scratched(arguments, torch.bfloat16))
    assert not listed
    check(arguments, {"sinks": torch.randn(2, device=device)}, sm_scale=0.7, **scratched(arguments))
    assert len(listed) == 1


@pytest.mark.parametrize("keep_sink", [False, True])
@pytest.mark.parametrize("window", [1, 100, 128, 300, 1000])
def test_windows(window, keep_sink, listed, monkeypatch, device):
    """Steps that a window hides are not there, those that it cuts are the lead; a sink that stays has none.

    One sequence has sinks among its new tokens.
    """
    sizes = {"sink_len": 70, "num_tail_slots": 3, "new": True, "group": 3}
    arguments = prefill_case(SMALL, [900, 330, 150], [260, 40, 100], device=device, **sizes)
    seen = {"window": window, "keep_sink": keep_sink}
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()}, **seen)
    assert relative_error(prefill_attention(**arguments, **seen, **scratched(arguments)), exact) < 1e-3
    (records,) = listed
    for record in records[records[:, 2] > 0].tolist():
        first, last = record[1] // 3, (record[1] + record[2] - 1) // 3
        for segment, each in enumerate(zip(*numbers_of(record).values(), strict=True)):
            _, lead, whole, masked, count, shift, size = each
            assert size in {min(window, length) for length in (900, 330, 150)} or segment == 4 or (segment == 2 and keep_sink)
            if whole:
                assert last + 1 - size + shift <= lead * 128 and (lead + whole) * 128 <= min(count, first + 1 + shift)
            assert (whole + masked - 1) * 128 < max(min(count, last + 1 + shift), 1)
    assert any(numbers(records, 4, COUNT)) == keep_sink
    if window == 300:
        assert max(numbers(records, 0, LEAD) + numbers(records, 1, LEAD))
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 33)
    assert relative_error(prefill_attention(**arguments, **seen, **scratched(arguments)), exact) < 1e-3


@pytest.mark.parametrize("keep_sink", [False, True])
def test_windows_in_wide_tables(keep_sink, listed, monkeypatch, device):
    """Memory of the call's own holds what a window shows of each sequence, wherever that begins, however wide tables are."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    arguments = prefill_case(SMALL, [1100, 330, 150], [60, 20, 9], new=True, sink_len=70, num_tail_slots=3, device=device)
    wide = torch.full((3, 40), 2**28, dtype=torch.int32, device=device)
    wide[:, : arguments["block_table"].shape[1]] = arguments["block_table"]
    seen = {"window": 200, "keep_sink": keep_sink}
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()}, **seen)
    sizes, launch = [], prefill.launch_plain_tiles
    monkeypatch.setattr(prefill, "launch_plain_tiles", lambda *args: sizes.append(len(args[4][0])) or launch(*args))
    for table in (arguments["block_table"], wide):
        out = prefill_attention(**arguments | {"block_table": table}, **seen)
        assert relative_error(out, exact) < 1e-3
    csr = arguments | {"block_table": None, "kv_indices": wide.flatten()}
    csr["kv_indptr"] = torch.arange(0, 121, 40, dtype=torch.int32, device=device)
    assert_same_bits(prefill_attention(**csr, **seen), out)
    assert sizes == 3 * [3 * ((200 + 89) // 64 + 2)] and len(listed) == 3
    monkeypatch.setattr(configs, "SCRATCH_BYTES", (sizes[0] - 1) * 2 * 2 * 64 * 64)  # too little: tiles dequantize pages
    assert relative_error(prefill_attention(**csr, **seen), exact) < 1e-3
    assert len(sizes) == 3


def test_spans(listed, device):
    """Tokens of an image see each other: steps that some rows see for a span have a mask, those before the tile none."""
    arguments = prefill_case(SMALL, [500, 260], [330, 200], new=True, device=device)
    ends = torch.zeros(530, dtype=torch.int32, device=device)
    ends[20:300] = 300
    ends[330 + 5 : 330 + 150] = 150
    check(arguments, {"span_ends": ends}, **scratched(arguments))
    assert max(numbers(listed[0], 0, MASKED)) == 3


def test_numbers_of_others_stay_theirs(device):
    """Infinities and NaN of one sequence, and of slots that nothing is in, do not reach another whose steps they are in."""
    arguments = prefill_case(SMALL, [210, 150, 30], [20, 33, 30], new=True, sink_len=16, num_tail_slots=1, device=device)
    clean = prefill_attention(**arguments, **scratched(arguments))
    k, v = arguments["k"].clone(), arguments["v"].clone()
    k[20:53], v[20:53] = torch.inf, torch.nan
    out = prefill_attention(**arguments | {"k": k, "v": v}, **scratched(arguments))
    assert_same_bits(out[:20], clean[:20])
    assert_same_bits(out[53:], clean[53:])
    assert out[20:53].isnan().any()


def test_nothing_cached(listed, monkeypatch, device):
    """A first chunk, over a table of no columns too, with memory of the call's own; heads that are views of one."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    arguments = prefill_case(SMALL, [300, 40], [300, 40], new=True, group=3, num_kv_heads=2, device=device)
    out = check(arguments)
    empty = arguments | {"block_table": arguments["block_table"][:, :0]}
    assert_same_bits(check(empty), out)
    assert len(listed) == 2 and not any(numbers(listed[1], 1, COUNT))
    shared = {name: arguments[name][:, :1].expand(-1, 2, -1) for name in ("k", "v")}
    check(arguments | shared)
    past = {name: x for name, x in arguments.items() if name not in "kv"}
    out, lse = prefill_attention(**past, past_only=True, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all() and len(listed) == 4


def test_rows_of_no_sequence(listed, device):
    """Padding before and behind is zero, its log-sum-exp -inf."""
    arguments = prefill_case(SMALL, [420, 300, 200], [150, 100, 70], new=True, device=device)
    whole, lse = prefill_attention(**arguments, **scratched(arguments), return_lse=True)
    padded = {
        name: torch.cat([x.new_zeros(30, *x.shape[1:]), x, x.new_zeros(900, *x.shape[1:])])
        for name in ("q", "k", "v")
        for x in [arguments[name]]
    }
    arguments |= padded | {"cu_seqlens_q": arguments["cu_seqlens_q"] + 30}
    out, padded_lse = prefill_attention(**arguments, **scratched(arguments), return_lse=True)
    assert_same_bits(out[30:350], whole)
    assert_same_bits(padded_lse[30:350], lse)
    assert not out[:30].any() and not out[350:].any()
    assert (padded_lse[:30] == -torch.inf).all() and (padded_lse[350:] == -torch.inf).all()


@pytest.mark.parametrize("sink_len", [0, 70, 128])
def test_raw_tokens_are_plain(sink_len, device):
    """Sinks come first, then the tail from its first page on, in order, whatever the ring; both lose their rotation."""
    layout = PageLayout(128, 64, 4, 2, v_head_dim=64)
    arguments = prefill_case(
        layout, [740, 64, 300], [9, 5, 0], sink_len=sink_len, num_tail_slots=3, num_kv_heads=2, device=device
    )
    cache = cache_of(arguments)
    written = launch_plain_raw(arguments["cu_seqlens_q"], cache, Windows(None, None), False)
    sink_pages, columns = -(-sink_len // 64), cache.max_raw_pages
    for row, length in enumerate(arguments["seq_lens"].tolist()[:2]):
        first_page = arguments["num_quantized"].tolist()[row]
        places = [(t // 64, t // 64, t % 64) for t in range(min(sink_len, length))]
        for t in range(first_page * 64, max(length - sink_len, 0)):
            ring = sink_pages + t // 64 % (columns - sink_pages)
            places.append((ring, sink_pages + t // 64 - first_page, t % 64))
        assert places
        for half, (head_dim, block) in enumerate(((128, layout.block_size), (64, layout.v_block_size))):
            for source, slot, token in places[:: 1 if ON_GPU else 7]:
                raw = arguments["raw_pages"][arguments["raw_table"][row, source], half, :, token, :head_dim]
                expected = reference.hadamard(raw.float(), block_size=block)
                assert torch.allclose(written[row * columns + slot, half, :, token, :head_dim].float(), expected, atol=2e-3)


def test_batch_invariance(listed, device):
    """With split_size the bits of a sequence are the same alone, whatever is beside it."""
    arguments = prefill_case(SMALL, [700, 300], [40, 9], new=True, num_kv_heads=2, sink_len=16, device=device)
    both = prefill_attention(**arguments, **scratched(arguments), split_size=5)
    rows = {"block_table": 1, "seq_lens": 1, "raw_table": 1, "num_quantized": 1, "cu_seqlens_q": 2, "q": 40, "k": 40, "v": 40}
    alone = {name: x[: rows[name]] if name in rows and x is not None else x for name, x in arguments.items()}
    assert_same_bits(prefill_attention(**alone, **scratched(alone), split_size=5), both[:40])
    assert len(set(numbers(listed[0], 1, COUNT))) > 2


def test_what_it_gives_is_the_usual_result(listed, monkeypatch, device):
    """The same call with and without, in CSR form, and with memory without gaps: errors are alike, bits those of all three."""
    arguments = prefill_case(SMALL, [700, 65], [33, 1], new=True, device=device, group=5)
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    out = prefill_attention(**arguments, **scratched(arguments))
    table = arguments["block_table"]
    csr = arguments | {"block_table": None, "kv_indices": table.flatten()}
    csr["kv_indptr"] = torch.arange(0, table.numel() + 1, table.shape[1], dtype=torch.int32, device=device)
    assert_same_bits(prefill_attention(**csr, **scratched(csr)), out)
    assert_same_bits(prefill_attention(**arguments, scratch=new_scratch(arguments).contiguous()), out)
    assert len(listed) == 3
    monkeypatch.setattr(configs, "has_plain_kernel", lambda *args: False)
    usual = prefill_attention(**arguments, **scratched(arguments))
    assert len(listed) == 3 and relative_error(out, exact) < 1.2 * relative_error(usual, exact)
