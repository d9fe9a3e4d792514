"""The batch-invariant mode: with `split_size` the bits of a row follow from its own tokens, length, queries and options alone.

`hypothesis` draws what else a call has: other sequences, wider tables, page ids in CSR form, padding, memory of the caller,
another number of multiprocessors. The yardstick is the row alone, in tables no wider than it needs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from helpers import DTYPES, ON_GPU, assert_same_bits, draw
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from prefill_cases import SMALL, in_form, prefill_case

from kvarn_triton import decode_attention, decode_workspace_size, gpu, prefill_attention, prefill_workspace_size

SINK_LEN, SLOTS, GROUP = 20, 3, 2
FORMS = ("decode", "dequantized", "registers", "folded", "scratch")
EXAMPLES = 300 if ON_GPU else 5
"""For each form; in the interpreter 1.5 seconds each."""


@dataclass
class Surroundings:
    """What a call has beside the row that counts."""

    before: list[int]  # lengths of the sequences before it
    after: list[int]
    columns: int  # of the block table, more than needed
    slots: int  # of the tail ring, more than needed
    csr: bool
    padding: int  # query tokens that no sequence owns
    memory: bool  # whether `out` and `workspace` are the caller's
    multiprocessors: int


ALONE = Surroundings([], [], 0, 0, False, 0, False, 132)
OTHERS = st.one_of(st.lists(st.sampled_from([0, 1, 5, 90]), max_size=2), st.just([0] * 12))
SURROUNDINGS = st.builds(
    Surroundings,
    before=OTHERS,
    after=OTHERS,
    columns=st.sampled_from([0, 1, 7, 30]),
    slots=st.sampled_from([0, 2]),
    csr=st.booleans(),
    padding=st.sampled_from([0, 3]),
    memory=st.booleans(),
    multiprocessors=st.sampled_from([1, 3]),
)


def surrounded(row: dict, around: Surroundings) -> dict:
    """Return the arguments of a call of `prefill_attention` for one sequence, with others and wider tables around it."""
    device, new = row["q"].device, "k" in row
    parts, others = [], around.before + around.after
    for i, length in enumerate(others):
        count = min(length, 1)
        case = prefill_case(
            SMALL, [length], [count], new=new, group=GROUP, dtype=row["q"].dtype, sink_len=SINK_LEN, num_tail_slots=SLOTS,
            seed=50 + i, device=device,
        )  # fmt: skip
        parts.append(case)
    parts.insert(len(around.before), row)
    arguments = {**row}
    width = max(part["block_table"].shape[1] for part in parts) + around.columns
    slots, num_sinks = SLOTS + around.slots, 1
    tables, raw_tables, first, first_raw = [], [], 0, 0
    for part in parts:
        table = torch.full((1, width), 2**28, dtype=torch.int32, device=device)
        table[:, : part["block_table"].shape[1]] = part["block_table"] + first
        raw = torch.full((1, num_sinks + slots), 2**28, dtype=torch.int32, device=device)
        raw[:, :num_sinks] = part["raw_table"][:, :num_sinks] + first_raw
        for page in range(int(part["num_quantized"]), int(part["num_quantized"]) + SLOTS):
            raw[:, num_sinks + page % slots] = part["raw_table"][:, num_sinks + page % SLOTS] + first_raw
        tables.append(table)
        raw_tables.append(raw)
        first += len(part["pages"])
        first_raw += len(part["raw_pages"])
    counts = [len(part["q"]) for part in parts]
    for name in ("q", "k", "v", "pages", "raw_pages", "seq_lens", "num_quantized"):
        if name in row:
            arguments[name] = torch.cat([part[name] for part in parts])
    for name in ("q", "k", "v"):
        if name in row and around.padding:
            x = arguments[name]
            filler = draw(around.padding, *x.shape[1:], seed=7, dtype=x.dtype, device=device)
            arguments[name] = torch.cat((x, filler))
    arguments["cu_seqlens_q"] = torch.tensor([0, *counts], device=device).cumsum(0).int()
    arguments["raw_table"] = torch.cat(raw_tables)
    arguments["block_table"] = torch.cat(tables)
    if around.csr:
        used = [int(part["num_quantized"]) for part in parts]
        ids = [table[0, :count] for table, count in zip(tables, used, strict=True)]
        arguments |= {"block_table": None, "kv_indices": torch.cat([*ids, tables[0][0, :1]])}
        arguments["kv_indptr"] = torch.tensor([0, *used], device=device).cumsum(0).int()
    return arguments


def result_of_row(row: dict, form: str, around: Surroundings, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of one sequence, and its log-sum-exp, of a call with something around it."""
    arguments = surrounded(row, around)
    q, layout, csr = arguments["q"], arguments["layout"], arguments["block_table"] is None
    table = arguments["kv_indices"] if csr else arguments["block_table"]
    batch, heads, device = len(arguments["seq_lens"]), q.shape[1], q.device
    with mock.patch.object(gpu, "num_multiprocessors", lambda device: around.multiprocessors):
        shared = {"split_size": options["split_size"], "dtype": q.dtype}
        if form == "decode":
            ends = arguments.pop("cu_seqlens_q")[1:]
            arguments["q"] = q = torch.cat((q, q[:1]))[(ends - 1).clamp_min(0).long()]
            size = decode_workspace_size(
                batch, heads, 1, layout, table.shape[-1], device, csr=csr,
                max_raw_pages=arguments["raw_table"].shape[1], **shared,
            )  # fmt: skip
        else:
            options = options | in_form(form, arguments, options["split_size"])
            size = prefill_workspace_size(
                len(q), batch, heads, 1, layout, table.shape[-1], device, scratch=form == "scratch",
                config=options.get("config"), **shared,
            )  # fmt: skip
        if around.memory:
            arguments["out"] = torch.full_like(q, torch.nan)
            arguments["workspace"] = torch.full((size,), 255, dtype=torch.uint8, device=device)
        call = decode_attention if form == "decode" else prefill_attention
        out, lse = call(**arguments, **options, return_lse=True)
    place = len(around.before)
    if form == "decode":
        return out[place : place + 1], lse[place : place + 1]
    first, last = arguments["cu_seqlens_q"][place : place + 2].tolist()
    return out[first:last], lse[first:last]


@pytest.mark.parametrize("form", FORMS)
def test_bits_of_a_row(form, device):
    """Everything that a row shares a call with, drawn at random."""

    @seed(0)
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
    )
    @given(
        around=SURROUNDINGS,
        dtype=st.sampled_from(DTYPES),
        length=st.integers(1, 3) | st.integers(60, 250),
        queries=st.sampled_from([1, 2, 9]),
        new=st.booleans(),
        split_size=st.sampled_from([1, 1, 3, 50]),
        seen=st.sampled_from([{}, {"window": 70}, {"soft_cap": 5.0}, {"window": 300, "soft_cap": 5.0}]),
        sinks=st.booleans(),
    )
    def check(around, dtype, length, queries, new, split_size, seen, sinks):
        queries = 1 if form == "decode" else min(queries, length)
        row = prefill_case(
            SMALL, [length], [queries], new=new and form != "decode", group=GROUP, dtype=dtype, sink_len=SINK_LEN,
            num_tail_slots=SLOTS, device=device,
        )  # fmt: skip
        options = {"split_size": split_size, **seen}
        if sinks:
            options["sinks"] = torch.tensor([0.5, -torch.inf], device=device)
        expected = result_of_row(row, form, ALONE, options)
        for result, alone in zip(result_of_row(row, form, around, options), expected, strict=True):
            assert not result.isnan().any()
            assert_same_bits(result, alone)

    check()


@pytest.mark.parametrize("form", ["decode", "registers"])
def test_many_parts(form, device):
    """More partial results than a merge looks at together, beside 39 others on a small GPU, and alone on a large one."""
    pages, queries = (10, 1) if form == "decode" else (5, 2)
    row = prefill_case(
        SMALL, [20 + 64 * pages], [queries], group=GROUP, dtype=torch.float32, sink_len=SINK_LEN,
        num_tail_slots=SLOTS, device=device,
    )  # fmt: skip
    around = replace(ALONE, before=[0] * 39, columns=20, multiprocessors=2)
    for options in ({"split_size": 1}, {"split_size": 6, "sinks": torch.tensor([0.5, 2.0], device=device)}):
        expected = result_of_row(row, form, ALONE, options)
        for result, alone in zip(result_of_row(row, form, around, options), expected, strict=True):
            assert_same_bits(result, alone)
