"""Decode attention with more than 8 query heads of a kv head, which `attention.drafts` attends to on some GPUs.

In the interpreter another kernel stands for that one, as in `test_drafts.py`.
"""

from __future__ import annotations

import pytest
import torch
from helpers import ON_GPU, assert_same_bits, check, draw, layout_id
from test_drafts import LAYOUT, LAYOUTS

from kvarn_triton import (
    DecodeTable,
    PageLayout,
    configs,
    decode_attention,
    decode_workspace_size,
    gpu,
    merge_states,
    reference,
    schedule_decode,
)
from kvarn_triton.attention import prefill_plan
from kvarn_triton.attention.decode import launch_decode, plan_decode
from kvarn_triton.attention.prefill_plan import fills, share_tiles
from kvarn_triton.cache import Cache, Results
from kvarn_triton.masking import Mask
from kvarn_triton.testing import cache_case, relative_error

HEADS = 2
"""Kv heads of cases of two sequences: with those as many tiles as calls need here, and no more than there are programs."""
LENGTHS = [20 + 3 * 128 + 9, 20 + 128 + 1]


@pytest.fixture(autouse=True)
def few(device, monkeypatch):
    """Let few tiles suffice; skip where decode attention always takes its own kernel."""
    if not configs.has_draft_kernel(LAYOUT, torch.float16, device):
        pytest.skip("this GPU has no products of warp groups")
    monkeypatch.setattr(prefill_plan, "LEAST_TILES", 2 * HEADS)
    prefill_plan._config_of_heads.cache_clear()
    yield
    prefill_plan._config_of_heads.cache_clear()


def taken(arguments: dict, q: torch.Tensor, split_size: int | None = None, table: DecodeTable | None = None, **seen) -> bool:
    """Return whether a call takes the kernel of drafts."""
    cache = Cache(**{"kv_indptr": None, "kv_indices": None} | arguments)
    mask = Mask(None, seen.get("window"), seen.get("soft_cap"), seen.get("sinks"), False)
    return plan_decode(q, cache, mask, Results(None, False, None), split_size, table).tiles is not None


def repeated(arguments: dict, batch: int) -> dict:
    """Return the tables of the first sequence of a call, for so many sequences."""
    names = "seq_lens", "block_table", "raw_table", "num_quantized"
    return {name: arguments[name][:1].expand(batch, *arguments[name].shape[1:]).contiguous() for name in names}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_layouts(layout, dtype, device):
    """Every pair of bits, a sink and a tail, groups of one tile of 16 rows, and of 32."""
    group = 12 if dtype == torch.float16 else 20
    options = {"num_kv_heads": HEADS, "sink_len": 20, "num_tail_slots": 1, "dtype": dtype}
    case = cache_case(layout, LENGTHS, group=group, device=device, **options)
    assert taken(case.kwargs, case.q)
    check(case)


@pytest.mark.parametrize("group", [9, 16, 17, 32, 33, 40])
def test_groups(group, device):
    """As many rows as a tile has, fewer, and several tiles of a token; attention sinks; no raw tokens."""
    case = cache_case(LAYOUT, [300, 5], group=group, num_kv_heads=2 if group <= 32 else 1, device=device)
    assert taken(case.kwargs, case.q)
    check(case, {"sinks": draw(case.q.shape[1], seed=5).to(device)})


def test_lengths(device):
    """No token at all, one, those of a sink alone, the edges of pages, and of blocks of 64 raw tokens."""
    lengths = [0, 1, 64, 65, 100, 100 + 128, 100 + 129, 100 + 255]
    case = cache_case(LAYOUT, lengths, group=9, num_kv_heads=1, sink_len=100, num_tail_slots=1, device=device)
    assert taken(case.kwargs, case.q)
    check(case)


def test_ids_in_one_list(device):
    """`kv_indptr` and `kv_indices` instead of a block table: as many ids may be shared among other programs."""
    case = cache_case(LAYOUT, LENGTHS, group=16, num_kv_heads=HEADS, sink_len=20, num_tail_slots=1, device=device)
    expected = decode_attention(case.q, **case.kwargs)
    table = case.kwargs["block_table"]
    ends = torch.arange(len(table) + 1, dtype=torch.int32, device=device) * table.shape[1]
    arguments = case.kwargs | {"block_table": None, "kv_indptr": ends, "kv_indices": table.flatten().contiguous()}
    result = decode_attention(case.q, **arguments)
    assert relative_error(result, expected) < 1e-3


def test_schedules_are_not_needed(device):
    """With a schedule the result is the same, bit for bit; its check stays."""
    case = cache_case(LAYOUT, LENGTHS, group=16, num_kv_heads=HEADS, device=device)
    tables = {name: case.kwargs[name] for name in ("layout", "seq_lens", "block_table", "raw_table", "num_quantized")}
    heads = {"num_q_heads": 16 * HEADS, "num_kv_heads": HEADS, "dtype": torch.float16}
    schedule = schedule_decode(**tables, **heads)
    assert_same_bits(decode_attention(case.q, **case.kwargs, schedule=schedule), decode_attention(case.q, **case.kwargs))
    with pytest.raises(ValueError, match=r"^schedule: expected one made for"):
        decode_attention(case.q, **case.kwargs, schedule=schedule, window=3)


def test_memory(device):
    """A call says what it needs, `decode_workspace_size` is enough for it and for smaller ones, and results may be strided."""
    case = cache_case(LAYOUT, LENGTHS, group=16, num_kv_heads=HEADS, device=device)
    columns = case.kwargs["block_table"].shape[1]
    size = decode_workspace_size(2, 16 * HEADS, HEADS, LAYOUT, columns, device)
    expected = decode_attention(case.q, **case.kwargs)
    out = torch.full((2, 16 * HEADS + 1, 144), torch.nan, dtype=torch.float16, device=device)[:, 1:, :128]
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    assert_same_bits(decode_attention(case.q, **case.kwargs, workspace=memory, out=out).contiguous(), expected)
    with pytest.raises(ValueError, match="workspace") as error:
        decode_attention(case.q, **case.kwargs, workspace=memory[:16])
    needed = int(str(error.value).split("at least ")[1].split()[0])
    assert needed <= size
    assert_same_bits(decode_attention(case.q, **case.kwargs, workspace=memory[:needed]), expected)
    for batch in range(1, 80):
        cache = Cache(**case.kwargs | repeated(case.kwargs, batch), kv_indptr=None, kv_indices=None)
        size = decode_workspace_size(batch, 40 * HEADS, HEADS, LAYOUT, columns, device)
        memory, mask = torch.empty(size, dtype=torch.uint8, device=device), Mask(None, None, None, None, False)
        for group in (9, 12, 20, 40):
            plan_decode(case.q.new_empty(batch, group * HEADS, 128), cache, mask, Results(None, False, memory), None, None)


def test_parts_are_merged(device):
    """Log-sum-exps are those that `merge_states` expects: quantized pages, and the tail alone, are the sequence."""
    case = cache_case(LAYOUT, LENGTHS, group=16, num_kv_heads=HEADS, num_tail_slots=1, device=device)
    counts = case.num_quantized
    parts = decode_attention(case.q, case.pages, case.block_table, counts * 128, LAYOUT, return_lse=True)
    none = {"raw_table": case.raw_table, "num_quantized": counts * 0}
    tail = decode_attention(
        case.q, case.pages, case.block_table, case.seq_lens - counts * 128, LAYOUT, raw_pages=case.raw_pages, **none,
        return_lse=True,
    )  # fmt: skip
    exact = reference.decode_attention(case.q.double(), **case.kwargs)
    assert relative_error(merge_states(*parts, *tail)[0], exact) < 2e-3


def test_sinks_of_some(device):
    """Sequences with a raw sink beside those without one, as servers with prefix caches have (`plan_step`, `sink_columns`)."""
    options = {"group": 16, "num_kv_heads": HEADS, "num_tail_slots": 2, "device": device}
    cases = [cache_case(LAYOUT, [length], sink_len=sink, **options) for length, sink in ((405, 128), (280, 0))]
    pools = {name: torch.cat([getattr(case, name) for case in cases]) for name in ("pages", "raw_pages", "num_quantized")}
    tables = {"seq_lens": torch.cat([case.seq_lens for case in cases])}
    for name, pool in (("block_table", "pages"), ("raw_table", "raw_pages")):
        one, two = (getattr(case, name) for case in cases)
        wide = torch.zeros(2, max(one.shape[1], two.shape[1]), dtype=torch.int32, device=device)
        wide[0, : one.shape[1]] = one[0]
        wide[1, : two.shape[1]] = two[0] + len(getattr(cases[0], pool))
        tables[name] = wide
    sinks = torch.tensor([128, 0], dtype=torch.int32, device=device)
    cache = Cache(LAYOUT, **pools, **tables, kv_indptr=None, kv_indices=None, sink_len=128, sink_lens=sinks)
    mask, results, q = Mask(None, None, None, None, False), Results(None, False, None), torch.cat([case.q for case in cases])
    plan = plan_decode(q, cache, mask, results, None, None)
    assert plan.tiles is not None
    out = launch_decode(q, mask, results, plan)
    exact = torch.cat([reference.decode_attention(case.q.double(), **case.kwargs) for case in cases])
    assert relative_error(out, exact) < 2e-3


def test_bad_numbers(device):
    """A query head that is not finite touches itself alone."""
    case = cache_case(LAYOUT, LENGTHS, group=16, num_kv_heads=HEADS, device=device)
    expected = decode_attention(case.q, **case.kwargs)
    case.q[0, 3, 5] = torch.nan
    out = decode_attention(case.q, **case.kwargs)
    finite = out.isfinite().all(-1)
    assert int((~finite).sum()) == 1 and not finite[0, 3]
    assert relative_error(out[finite], expected[finite]) < 1e-3


def test_which_calls(device):
    """Enough tiles, no more than programs, 9 heads and more; what changes scores or how work is cut keeps the usual kernel."""
    case = cache_case(LAYOUT, LENGTHS, group=16, num_kv_heads=HEADS, device=device)
    assert taken(case.kwargs, case.q)
    others = ({"window": 9}, {"soft_cap": 9.0}, {"split_size": 1}, {"table": DecodeTable("given", ())})
    assert not any(taken(case.kwargs, case.q, **other) for other in others)
    assert not taken(case.kwargs, case.q.float()) and not taken(case.kwargs, case.q[:, : 8 * HEADS])
    for batch in (1, 2 * gpu.num_programs(device, 4) // HEADS + 1):
        assert not taken(case.kwargs | repeated(case.kwargs, batch), case.q[:1].expand(batch, -1, -1))
    other = cache_case(PageLayout(64, 128, 4, 2), LENGTHS, group=16, num_kv_heads=HEADS, device=device)
    assert not taken(other.kwargs, other.q)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_graph(device):
    """A captured call gives the bits of the call, for other lengths and ids than those of its capture."""
    case = cache_case(LAYOUT, LENGTHS, group=16, num_kv_heads=HEADS, sink_len=20, num_tail_slots=1, device=device)
    out = torch.empty_like(case.q)
    lens = case.kwargs["seq_lens"]
    decode_attention(case.q, **case.kwargs, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(case.q, **case.kwargs, out=out)
    for less in (0, 7):
        lens -= less
        graph.replay()
        assert_same_bits(out, decode_attention(case.q, **case.kwargs))


def test_programs_of_tiles():
    """As many as fit, more where many would stay empty, never more than there are pages; full enough, or it isn't taken."""
    assert [share_tiles(tiles, 528, 256)[0] for tiles in (4, 64, 140, 256, 320, 528)] == [132, 8, 7, 2, 3, 1]
    assert share_tiles(64, 528, 3)[0] == 3 and share_tiles(64, 528, 0)[0] == 1 and share_tiles(2000, 528, 256)[0] == 1
    some = [tiles for tiles in range(1, 1200) if fills(tiles, 528, 256)]
    assert some[0] == 1 and {528, 1056} <= set(some) and not {270, 400, 600, 1057} & set(some)
    assert fills(400, 528, 1)  # nothing to share
