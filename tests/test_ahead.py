"""Tokens of scratch memory that all rows of a tile see, which prefill attention attends to before it looks at masks.

On GPUs with warp groups that is a kernel of its own, in the interpreter one that stands for it. What calls see of it is tested
here, and in `test_prefill.py`, where calls with scratch memory are one of the forms of every test.
"""

from __future__ import annotations

import pytest
import torch
from helpers import ON_GPU, assert_same_bits, check, layout_id
from prefill_cases import SMALL, new_scratch, prefill_case

from kvarn_triton import PageLayout, configs, dequantize_pages, gpu, prefill_attention, reference
from kvarn_triton.attention import prefill, prefill_kernel, workspace
from kvarn_triton.cache import Cache
from kvarn_triton.masking import Windows
from kvarn_triton.pages.expand import launch_expand_pages
from kvarn_triton.testing import relative_error

pytestmark = pytest.mark.skipif(
    ON_GPU and not configs.attends_ahead(SMALL, torch.float16, torch.device("cuda", 0), 128), reason="needs wgmma"
)


@pytest.fixture
def covered(monkeypatch) -> list[torch.Tensor]:
    """Return a list to which each launch adds how many tokens its programs attend to ahead.

    There are two multiprocessors, so that one program has all pages of a tile.
    """
    found, launch = [], prefill_kernel.launch_ahead
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 2)

    def spy(*args: object) -> object:
        ahead = launch(*args)
        found.append(ahead.covered.clone())
        return ahead

    monkeypatch.setattr(prefill_kernel, "launch_ahead", spy)
    return found


def ahead(arguments: dict, dtype: torch.dtype | None = None) -> dict:
    """Return the option that makes a call attend ahead."""
    return {"scratch": new_scratch(arguments, dtype)}


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("sink_len", [0, 16, 128])
def test_which_tokens_are_covered(sink_len, new, covered, device):
    """Whole steps of what the first row of a tile sees of full pages; the results are exact."""
    arguments = prefill_case(
        SMALL, [720, 460, 130], [70, 1, 0], new=new, sink_len=sink_len, num_tail_slots=3, device=device, group=4
    )
    check(arguments, **ahead(arguments))
    lengths = arguments["num_quantized"].tolist()
    steps = covered[0].tolist()
    assert max(steps) == lengths[0] * 64 // 128 * 128 >= 256
    assert sorted(set(steps)) == sorted({0, lengths[0] * 64 // 128 * 128, lengths[1] * 64 // 128 * 128})


def test_drafts_in_quantized_pages(covered, device):
    """Rows of a tile whose queries are in quantized pages see different numbers of tokens: those of the first are covered."""
    arguments = prefill_case(SMALL, [384], [100], num_tail_slots=1, device=device)
    check(arguments, **ahead(arguments))
    assert max(covered[0].tolist()) == (384 - 100 + 1) // 128 * 128


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
def test_layouts(layout, dtype, covered, device):
    """Every pair of head_dims that there are kernels for, pages of 64 and of 128 tokens, two sequences, two kv heads."""
    arguments = prefill_case(
        layout, [420, 300], [9, 40], new=True, num_kv_heads=2, group=3, num_tail_slots=1, dtype=dtype, device=device
    )
    check(arguments, **ahead(arguments))
    assert max(covered[0].tolist()) >= 256


def test_what_has_no_such_tiles(covered, device):
    """Windows, soft caps, scales below zero, other head_dims and float32 take the usual way."""
    arguments = prefill_case(SMALL, [300], [9], new=True, device=device)
    for seen in ({"window": 200}, {"soft_cap": 5.0}):
        check(arguments, seen, **ahead(arguments))
    for sm_scale in (-0.3, 0.0):
        check(arguments, sm_scale=sm_scale, **ahead(arguments))
    for layout, dtype in ((PageLayout(80, 64, 4, 2), torch.float16), (SMALL, torch.float32)):
        others = prefill_case(layout, [300], [9], new=True, dtype=dtype, device=device)
        check(others, **ahead(others))
    assert not covered
    check(arguments, {"sinks": torch.randn(2, device=device)}, sm_scale=0.7, **ahead(arguments))
    assert len(covered) == 1


def test_rounds(covered, monkeypatch, device):
    """Tiles whose states would take more than a bound are computed in rounds; bits are the same, padding included."""
    arguments = prefill_case(SMALL, [420, 300, 200], [150, 100, 70], new=True, device=device)
    q = arguments["q"]
    padded = {
        name: torch.cat([x.new_zeros(30, *x.shape[1:]), x, x.new_zeros(900, *x.shape[1:])])
        for name in ("q", "k", "v")
        for x in [arguments[name]]
    }
    arguments |= padded | {"cu_seqlens_q": arguments["cu_seqlens_q"] + 30}
    whole, lse = prefill_attention(**arguments, **ahead(arguments), return_lse=True)
    assert len(covered) == 1
    monkeypatch.setattr(workspace, "ROUND_BYTES", 1 << 17)
    out, lse_of_rounds = prefill_attention(**arguments, **ahead(arguments), return_lse=True)
    assert len(covered) > 2
    assert_same_bits(out, whole)
    assert_same_bits(lse_of_rounds, lse)
    assert not out[:30].any() and not out[-900:].any() and out[30 : 30 + len(q)].abs().amax(dim=(1, 2)).all()


@pytest.mark.parametrize(
    ("layout", "lengths", "queries", "new"),
    [
        pytest.param(SMALL, [1100, 330, 20], [31, 9, 3], True, id="g64"),
        pytest.param(PageLayout(64, 128, 4, 4), [1300, 400], [40, 20], True, id="g128"),
        pytest.param(SMALL, [900, 700], [70, 30], False, id="in-the-cache"),
    ],
)
def test_rounds_of_pages(layout, lengths, queries, new, covered, monkeypatch, device):
    """Memory of a call's own that holds some pages of each sequence is filled in rounds: states go on in the next one."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    arguments = prefill_case(layout, lengths, queries, new=new, num_tail_slots=3 - 2 * new, sink_len=16, group=3, device=device)
    whole = check(arguments)
    page_bytes = 2 * 2 * layout.page_size * 64
    most = 4 * 128 // layout.page_size  # pages of each sequence
    monkeypatch.setattr(configs, "SCRATCH_BYTES", (most * len(lengths) + 1) * page_bytes)
    out = check(arguments)
    assert_same_bits(out, whole)
    assert_same_bits(*covered)
    assert len(covered) == 2 and max(covered[0].tolist()) > most * layout.page_size


@pytest.mark.parametrize("page_size", [64, 128])
def test_rounds_of_pages_among_programs(page_size, covered, monkeypatch, device):
    """Programs that share a tile have pages of some rounds only, in CSR form as in a block table."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 5)
    layout = PageLayout(64, page_size, 4, 4)
    arguments = prefill_case(layout, [1500], [20], new=True, device=device)
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 4 * 128 // page_size * 2 * 2 * page_size * 64)
    out = check(arguments)
    assert len(covered[0].unique()) == (2 if page_size == 64 else 3)
    table = arguments["block_table"]
    csr = arguments | {"block_table": None, "kv_indices": table.flatten()}
    csr["kv_indptr"] = torch.tensor([0, table.numel()], dtype=torch.int32, device=device)
    assert_same_bits(prefill_attention(**csr), out)


def test_memory_of_many_sequences(monkeypatch, device):
    """Sequences of few tokens take a tile each: their states stay within the bound, in rounds, and bits are the same."""
    sizes, launch = [], prefill_kernel.launch_ahead

    def spy(*args: object) -> object:
        states = launch(*args)
        sizes.append(sum(x.nbytes for x in (states.q, states.acc, states.m, states.l)))
        return states

    monkeypatch.setattr(prefill_kernel, "launch_ahead", spy)
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 2)
    arguments = prefill_case(SMALL, [200 + i for i in range(9)], [3, 1, 4, 0, 2, 5, 3, 70, 1], new=True, device=device)
    whole = prefill_attention(**arguments, **ahead(arguments))
    bound = 6 * 128 * (2 * 64 + 4 * 64 + 8)
    assert len(sizes) == 1 and sizes[0] > bound
    monkeypatch.setattr(workspace, "ROUND_BYTES", bound)
    assert_same_bits(prefill_attention(**arguments, **ahead(arguments)), whole)
    assert len(sizes) > 3 and max(sizes[1:]) <= bound


def test_a_round_writes_its_pages_only(device):
    """Pages of earlier rounds are not written again: the slots of pages that there are not keep what is in them."""
    arguments = prefill_case(SMALL, [6 * 64 + 9], [9], new=True, num_tail_slots=1, device=device)
    names = ("layout", "pages", "seq_lens", "block_table", "kv_indptr", "kv_indices", "raw_pages", "raw_table", "num_quantized")
    cache = Cache(*(arguments.get(name) for name in names), arguments.get("sink_len", 0))
    assert arguments["num_quantized"].tolist() == [6]
    scratch = torch.full((4, 2, 1, 64, 64), torch.nan, dtype=torch.float16, device=device)
    launch_expand_pages(scratch, arguments["cu_seqlens_q"], cache, Windows(None, None), True, first_page=4, ring=4)
    expected = dequantize_pages(arguments["pages"], arguments["block_table"][0, 4:6], SMALL, dtype=torch.float16, rotated=True)
    for half, written in enumerate(expected):
        assert_same_bits(scratch[:2, half], written.transpose(1, 2))
    assert scratch[2:].isnan().all()


def test_memory_that_holds_too_little(covered, monkeypatch, device):
    """Where the pages of the query tokens would not be in memory at once, tiles dequantize pages themselves."""
    monkeypatch.setattr(configs, "SCRATCH_TOKENS", 1)
    arguments = prefill_case(SMALL, [900], [300], num_tail_slots=1, device=device)
    launch, splits = prefill_kernel.launch_prefill_tiles, []
    monkeypatch.setattr(prefill, "launch_prefill_tiles", lambda *args: splits.append(args[-1].num_splits) or launch(*args))
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 16)
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 8 * 2 * 2 * 64 * 64)
    check(arguments)
    assert not covered and min(splits) > 1
    monkeypatch.setattr(configs, "SCRATCH_BYTES", 10 * 2 * 2 * 64 * 64)
    check(arguments)
    assert len(covered) == 1


def test_batch_invariance(covered, device):
    """With split_size the bits of a sequence are the same alone, whatever is beside it."""
    arguments = prefill_case(SMALL, [700, 300], [40, 9], new=True, num_kv_heads=2, device=device)
    both = prefill_attention(**arguments, **ahead(arguments), split_size=5)
    rows = {"block_table": 1, "seq_lens": 1, "raw_table": 1, "num_quantized": 1, "cu_seqlens_q": 2, "q": 40, "k": 40, "v": 40}
    alone = {name: x[: rows[name]] if name in rows and x is not None else x for name, x in arguments.items()}
    assert_same_bits(prefill_attention(**alone, **ahead(alone), split_size=5), both[:40])
    assert len(covered[0].unique()) > 2


def test_what_it_gives_is_the_usual_result(covered, monkeypatch, device):
    """The same call with and without, in CSR form, and with memory without gaps: errors are alike, bits those of all three."""
    arguments = prefill_case(SMALL, [700, 65], [33, 1], new=True, device=device, group=5)
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    out = prefill_attention(**arguments, **ahead(arguments))
    table = arguments["block_table"]
    csr = arguments | {"block_table": None, "kv_indices": table.flatten()}
    csr["kv_indptr"] = torch.arange(0, table.numel() + 1, table.shape[1], dtype=torch.int32, device=device)
    assert_same_bits(prefill_attention(**csr, **ahead(csr)), out)
    assert_same_bits(prefill_attention(**arguments, scratch=new_scratch(arguments).contiguous()), out)
    assert len(covered) == 3
    monkeypatch.setattr(configs, "attends_ahead", lambda *args: False)
    usual = prefill_attention(**arguments, **ahead(arguments))
    assert len(covered) == 3 and relative_error(out, exact) < 1.2 * relative_error(usual, exact)
