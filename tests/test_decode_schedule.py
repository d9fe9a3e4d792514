"""Schedules of decode attention, made ahead for all layers of a step: the bits of calls without one, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import ON_GPU, assert_same_bits

import kvarn_triton.attention.workspace
from kvarn_triton import (
    DecodeConfig,
    DecodeSchedule,
    DecodeTable,
    PageLayout,
    decode_attention,
    gpu,
    plan_step,
    reference,
    schedule_decode,
    schedule_step,
)
from kvarn_triton.tables import Entry
from kvarn_triton.testing import CacheCase, cache_case

SMALL = PageLayout(64, 64, 4, 2)
RAGGED = [150, 0, 61, 210]
TABLE = DecodeTable("test", (Entry(64, DecodeConfig(programs_per_sm=3, few_programs_per_sm=2, columns=True), "test"),))
"""More programs than one, so that heads share them and programs share heads."""


def schedule_of(case: CacheCase, **options) -> DecodeSchedule:
    """Return the schedule of calls over a case."""
    kwargs = case.kwargs
    names = ("raw_table", "num_quantized", "sink_len", "kv_indptr", "kv_indices")
    given = {name: kwargs[name] for name in names if name in kwargs}
    heads = case.q.shape[1], case.pages.shape[1]
    return schedule_decode(
        kwargs["layout"], case.seq_lens, kwargs["block_table"], *heads, dtype=case.q.dtype, **given, **options
    )


@pytest.mark.parametrize(("group", "num_kv_heads"), [(2, 2), (9, 1)])
@pytest.mark.parametrize("split_size", [None, 2])
@pytest.mark.parametrize("seen", [{}, {"window": 100}, {"window": 100, "keep_sink": True}], ids=["all", "window", "sink"])
def test_same_bits(group, num_kv_heads, split_size, seen, device):
    """Results and log-sum-exps are those of a call that finds its parts by itself, whatever the cut."""
    case = cache_case(SMALL, RAGGED, group=group, num_kv_heads=num_kv_heads, sink_len=48, device=device)
    options = {"split_size": split_size, "table": TABLE, **seen}
    expected = decode_attention(case.q, **case.kwargs, **options, return_lse=True)
    found = decode_attention(case.q, **case.kwargs, **options, return_lse=True, schedule=schedule_of(case, **options))
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("lengths", [[5], [64, 64, 64], [500], [64] * 33, [0, 0], []])
def test_pages_only(lengths, device):
    """The same without raw pages, for one page and many, nothing, and more sequences than are looked at together."""
    case = cache_case(SMALL, lengths or [1], group=1, num_kv_heads=1, device=device)
    kwargs = {name: case.kwargs[name] for name in ("pages", "layout")}
    lens, table = case.seq_lens[: len(lengths)], case.block_table[: len(lengths)]
    q, ids = case.q[: len(lengths)], (table, lens)
    schedule = schedule_decode(SMALL, lens, table, q.shape[1], case.pages.shape[1], table=TABLE)
    found = decode_attention(q, block_table=ids[0], seq_lens=ids[1], table=TABLE, schedule=schedule, **kwargs)
    assert_same_bits(found, decode_attention(q, block_table=ids[0], seq_lens=ids[1], table=TABLE, **kwargs))


def test_indices(device):
    """The same with page ids in CSR form."""
    case = cache_case(SMALL, RAGGED, sink_len=16, device=device)
    kwargs, columns = dict(case.kwargs), case.block_table.shape[1]
    indptr = torch.arange(len(RAGGED) + 1, dtype=torch.int32, device=device) * columns
    kwargs |= {"block_table": None, "kv_indptr": indptr, "kv_indices": case.block_table.flatten()}
    names = ("raw_table", "num_quantized", "sink_len", "kv_indptr", "kv_indices")
    schedule = schedule_decode(SMALL, case.seq_lens, None, case.q.shape[1], 2, **{name: kwargs[name] for name in names})
    assert_same_bits(decode_attention(case.q, **kwargs, schedule=schedule), decode_attention(case.q, **kwargs))


def test_rounds(device, monkeypatch):
    """Sequences that are computed in rounds have a schedule for each round."""
    case = cache_case(SMALL, RAGGED, sink_len=16, device=device)
    expected = decode_attention(case.q, **case.kwargs, split_size=1)
    monkeypatch.setattr(kvarn_triton.attention.workspace, "ROUND_BYTES", 30000)
    schedule = schedule_of(case, split_size=1)
    assert len(schedule.records) > 1
    assert_same_bits(decode_attention(case.q, **case.kwargs, split_size=1, schedule=schedule), expected)


def test_one_memory_for_all_steps(device):
    """A schedule is written to the memory of an earlier one, and is that of the lengths at that time."""
    case = cache_case(SMALL, [210, 150], sink_len=16, device=device)
    schedule = schedule_of(case)
    stale = schedule.records.clone()
    case.seq_lens.sub_(40)
    again = schedule_of(case, out=schedule)
    assert again is schedule and not torch.equal(schedule.records, stale)
    expected = decode_attention(case.q, **case.kwargs)
    assert_same_bits(decode_attention(case.q, **case.kwargs, schedule=again), expected)


def test_records_are_read(device):
    """What a program begins with is what its record says: another page id there gives another result."""
    case = cache_case(SMALL, [330], device=device)
    schedule = schedule_of(case)
    schedule.records[0, 0, 14] = (schedule.records[0, 0, 14] + 1) % len(case.pages)
    expected = decode_attention(case.q, **case.kwargs)
    assert not torch.equal(decode_attention(case.q, **case.kwargs, schedule=schedule), expected)


@pytest.mark.parametrize("sink_columns", [False, True])
def test_steps(sink_columns, device):
    """Schedules of plans, those with sinks of different lengths too."""
    case = cache_case(SMALL, [150, 61, 90], sink_len=64, num_tail_slots=3, device=device)
    table, raw = case.block_table, case.raw_table.clone()
    if sink_columns:
        table = torch.cat((torch.zeros_like(table[:, :1]), table), dim=1)
        raw[1, 0] = -1
    step = plan_step(SMALL, case.seq_lens, None, table, raw, sink_len=64, sink_columns=sink_columns)
    schedule = schedule_step(step, case.q.shape[1], 2, dtype=case.q.dtype)
    assert ("sink_len 64 or 0" in schedule.made_for) == sink_columns  # sinks of one length are another matter
    call = case.q, case.pages, case.raw_pages, step
    assert_same_bits(kvarn_triton.attend(*call, schedule=schedule), kvarn_triton.attend(*call))


@pytest.mark.skipif(not ON_GPU, reason="graphs need a GPU")
def test_graphs(device):
    """A captured schedule follows lengths that change between replays."""
    case = cache_case(SMALL, [210, 150], sink_len=16, device=device)
    out = torch.empty_like(case.q)
    schedule = schedule_of(case)
    decode_attention(case.q, **case.kwargs, schedule=schedule, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(case.q, **case.kwargs, schedule=schedule_of(case, out=schedule), out=out)
    for _ in range(3):
        case.seq_lens.sub_(30)
        graph.replay()
        assert_same_bits(out, decode_attention(case.q, **case.kwargs))


OTHERS = {
    "sequences": lambda case: {"rows": 1},
    "window": lambda case: {"window": 9},
    "split_size": lambda case: {"split_size": 2},
    "programs": lambda case: {"table": TABLE},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_calls_are_refused(what, device, monkeypatch):
    """A schedule of other sizes or options is named, with what was expected and what came; nothing is written."""
    case = cache_case(SMALL, [210, 150], sink_len=16, device=device)
    schedule, options = schedule_of(case), OTHERS[what](case)
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 2)
    if options.pop("rows", None):
        given = {"q": case.q[:1], **case.kwargs}
        names = ("block_table", "seq_lens", "raw_table", "num_quantized")
        given |= {name: given[name][:1] for name in names}
    else:
        given = {"q": case.q, **case.kwargs}
    out = torch.full_like(given["q"], 7.0)
    with pytest.raises(ValueError, match=r"schedule: expected one made for .*, got 'one for 2 sequences"):
        decode_attention(**given, **options, schedule=schedule, out=out)
    assert (out == 7).all()


def test_errors(device):
    """Objects that are no schedules, tensors of another shape or device, and steps of several tokens."""
    case = cache_case(SMALL, [210, 150], sink_len=16, device=device)
    schedule = schedule_of(case)
    for wrong, message in (
        (schedule.records, "schedule: expected a DecodeSchedule, got 'Tensor'"),
        (dataclasses.replace(schedule, records=schedule.records[:, :1]), "schedule.records: expected shape"),
        (dataclasses.replace(schedule, records=schedule.records.long()), "schedule.records: expected dtype int32"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(case.q, **case.kwargs, schedule=wrong)
    with pytest.raises(ValueError, match="out: expected one made for"):
        schedule_of(case, window=5, out=schedule)
    lens, table = case.seq_lens, case.block_table
    for options, message in (
        ({"num_q_heads": 3}, "num_q_heads: expected a multiple of num_kv_heads .2., got 3"),
        ({"window": 0}, "window: expected"),
        ({"split_size": 0}, "split_size: expected"),
        ({"dtype": torch.int8}, "dtype: expected one of"),
        ({"raw_table": case.raw_table}, "num_quantized: expected a tensor"),
        ({"sink_len": 4}, "raw_pages: expected a tensor beside"),
        ({"out": 1}, "out: expected a DecodeSchedule, got 'int'"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule_decode(
                **{"layout": SMALL, "seq_lens": lens, "block_table": table, "num_q_heads": 4, "num_kv_heads": 2} | options
            )
    ends = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    step = plan_step(SMALL, lens, ends, table, case.raw_table, num_tokens=2, sink_len=16)
    with pytest.raises(ValueError, match="step: expected one planned without cu_seqlens_q"):
        schedule_step(step, 4, 2)
    with pytest.raises(ValueError, match="schedule: expected None beside cu_seqlens_q"):
        kvarn_triton.attend(case.q, case.pages, case.raw_pages, step, schedule=schedule)


def test_without_a_gpu(monkeypatch):
    """Where kernels don't run attention is the reference: it takes a schedule, into which nothing was written."""
    case = cache_case(SMALL, [70], device="cpu")
    monkeypatch.setattr(gpu, "on_device", lambda tensor: False)
    schedule = schedule_of(case)
    expected = reference.decode_attention(case.q, **case.kwargs)
    assert_same_bits(decode_attention(case.q, **case.kwargs, schedule=schedule), expected)
    assert_same_bits(reference.decode_attention(case.q, **case.kwargs, schedule=schedule), expected)
