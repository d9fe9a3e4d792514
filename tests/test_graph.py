"""Serving steps captured in a CUDA graph and replayed with other lengths give the bits of eager steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from helpers import ON_GPU, assert_same_bits, draw

from kvarn_triton import (
    PageLayout,
    append_tokens,
    attend,
    commit_pages,
    decode_attention,
    decode_workspace_size,
    plan_step,
    prefill_attention,
    prefill_workspace_size,
    raw_slots,
    write_tokens,
)
from kvarn_triton.testing import cache_case

pytestmark = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
LAYOUT = PageLayout(128, 64, 4, 2)
KV_HEADS, Q_HEADS, STEPS, SINK_LEN, NUM_PAGES = 2, 8, 300, 64, 6
STARTS = (0, 30, 0, 64, 101)
BATCH = len(STARTS)
PADDED_ROW = 2


class Step:
    """Buffers of one decode step: append, commit, attend. Lengths and all decisions live on the device."""

    def __init__(self, device: torch.device) -> None:
        columns = 3
        self.pages = torch.full(LAYOUT.pages_shape(BATCH * NUM_PAGES, KV_HEADS), 255, dtype=torch.uint8, device=device)
        raw_shape = (BATCH * columns, 2, KV_HEADS, LAYOUT.page_size, LAYOUT.head_dim)
        self.raw_pages = torch.full(raw_shape, torch.nan, dtype=torch.float16, device=device)
        random = torch.Generator().manual_seed(0)
        self.block_table = torch.randperm(BATCH * NUM_PAGES, generator=random).view(BATCH, -1).int().to(device)
        self.raw_table = torch.randperm(BATCH * columns, generator=random).view(BATCH, -1).int().to(device)
        self.num_quantized = torch.zeros(BATCH, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(BATCH, dtype=torch.int32, device=device)
        self.active = torch.ones(BATCH, dtype=torch.int32, device=device)
        self.active[PADDED_ROW] = 0
        self.k, self.v = (torch.zeros(BATCH, KV_HEADS, LAYOUT.head_dim, dtype=torch.float16, device=device) for _ in range(2))
        self.q = torch.zeros(BATCH, Q_HEADS, LAYOUT.head_dim, dtype=torch.float16, device=device)
        self.out = torch.zeros_like(self.q)
        size = decode_workspace_size(BATCH, Q_HEADS, KV_HEADS, LAYOUT, NUM_PAGES, device, max_raw_pages=columns)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device=device)

    def run(self) -> None:
        """Append one token to each active sequence and attend."""
        positions = torch.where(self.active > 0, self.seq_lens, -1)[:, None]
        slots = raw_slots(positions, self.raw_table, sink_len=SINK_LEN, page_size=LAYOUT.page_size)
        append_tokens(self.k, self.v, self.raw_pages, slots.flatten())
        self.seq_lens += self.active
        tables = self.raw_table, self.block_table, self.seq_lens, self.num_quantized
        commit_pages(self.raw_pages, self.pages, *tables, LAYOUT, sink_len=SINK_LEN)
        decode_attention(
            self.q,
            self.pages,
            self.block_table,
            self.seq_lens,
            LAYOUT,
            raw_pages=self.raw_pages,
            raw_table=self.raw_table,
            num_quantized=self.num_quantized,
            sink_len=SINK_LEN,
            out=self.out,
            workspace=self.workspace,
        )

    def restart(self) -> None:
        """Forget all tokens; the memory keeps its bytes."""
        self.num_quantized.zero_()
        self.seq_lens.copy_(torch.tensor(STARTS, dtype=torch.int32))
        self.raw_pages.zero_()


class TwoCalls(Step):
    """The same step as a plan and two calls, over tables with a row for each request; drafts of up to two tokens."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rows = torch.arange(BATCH, dtype=torch.int32, device=device)

    def run(self) -> None:
        """Append one token to each active sequence and attend."""
        self.seq_lens += self.active
        step = plan_step(
            LAYOUT, self.seq_lens, None, self.block_table, self.raw_table, sink_len=SINK_LEN, rows=self.rows, max_drafts=2
        )  # fmt: skip
        write_tokens(self.k, self.v, self.pages, self.raw_pages, step)
        attend(self.q, self.pages, self.raw_pages, step, out=self.out, workspace=self.workspace)


@contextlib.contextmanager
def without_synchronization() -> Iterator[None]:
    """Make everything fail that waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replayed_steps_equal_eager_steps(device):
    """300 steps from one graph: over the ends of sinks and pages, ragged, with a padded row, in recycled memory.

    No step waits for the GPU, eager or replayed (KF 12, 24, 25, 30, 31).
    """
    eager, replayed = Step(device), Step(device)
    for step in (eager, replayed):
        step.run()  # compiles
        step.restart()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.run()
    replayed.restart()
    inputs = {
        name: draw(STEPS, BATCH, heads, LAYOUT.head_dim, seed=seed, dtype=torch.float16, device=device)
        for seed, (name, heads) in enumerate((("k", KV_HEADS), ("v", KV_HEADS), ("q", Q_HEADS)))
    }
    outs = []
    with without_synchronization():
        for i in range(STEPS):
            for step in (eager, replayed):
                for name, values in inputs.items():
                    getattr(step, name).copy_(values[i])
            eager.run()
            graph.replay()
            outs.append((eager.out.clone(), replayed.out.clone()))
    for expected, out in outs:
        assert_same_bits(out, expected)
        assert (out[PADDED_ROW] == 0).all()
    assert_same_bits(replayed.pages, eager.pages)
    lens = [0 if row == PADDED_ROW else start + STEPS for row, start in enumerate(STARTS)]
    assert replayed.seq_lens.tolist() == lens
    quantized = [max(length - SINK_LEN, 0) // LAYOUT.page_size for length in lens]
    assert replayed.num_quantized.tolist() == eager.num_quantized.tolist() == quantized


def test_replayed_plan(device):
    """One graph of a plan and two calls serves steps of any lengths and request rows, with the bits of eager steps."""
    eager, replayed = TwoCalls(device), TwoCalls(device)
    for step in (eager, replayed):
        step.run()  # compiles
        step.restart()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.run()
    replayed.restart()
    tokens = draw(STEPS, BATCH, 2 * KV_HEADS + Q_HEADS, LAYOUT.head_dim, seed=1, dtype=torch.float16, device=device)
    orders = [torch.randperm(BATCH, generator=torch.Generator().manual_seed(i)).int().to(device) for i in range(STEPS)]
    by_request = torch.tensor(STARTS, dtype=torch.int32, device=device)
    outs = []
    with without_synchronization():
        for i in range(STEPS):
            for step in (eager, replayed):
                for value, new in zip((step.k, step.v, step.q), tokens[i].split((KV_HEADS, KV_HEADS, Q_HEADS), 1), strict=True):
                    value.copy_(new)
                step.rows.copy_(orders[i])
                step.seq_lens.copy_(by_request[orders[i].long()])
                step.active.fill_(1)
            eager.run()
            graph.replay()
            by_request[orders[i].long()] = eager.seq_lens
            outs.append((eager.out.clone(), replayed.out.clone()))
    for expected, out in outs:
        assert_same_bits(out, expected)
    assert_same_bits(replayed.pages, eager.pages)
    assert_same_bits(replayed.raw_pages, eager.raw_pages)
    assert int(by_request.max()) > SINK_LEN + 2 * LAYOUT.page_size


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_replayed_prefill_equals_eager_calls(new, scratch, device):
    """Drafts in the cache and new tokens, ragged, with lengths and query counts that change between replays (KF 12, 30)."""
    max_queries = 40
    case = cache_case(
        LAYOUT, [500, 430, 300], group=Q_HEADS // KV_HEADS, num_kv_heads=KV_HEADS, sink_len=SINK_LEN, device=device, seed=3
    )
    arguments = case.kwargs | {"cu_seqlens_q": torch.zeros(4, dtype=torch.int32, device=device)}
    lengths = arguments["seq_lens"].clone()
    arguments |= {"seq_lens": lengths.clone(), "num_quantized": arguments["num_quantized"].clone()}
    names = ("q", "k", "v") if new else ("q",)
    for seed, name in enumerate(names):
        heads = Q_HEADS if name == "q" else KV_HEADS
        arguments[name] = draw(max_queries, heads, LAYOUT.head_dim, seed=seed, dtype=torch.float16, device=device)
    pages_per_row = arguments["block_table"].shape[1]
    size = prefill_workspace_size(max_queries, 3, Q_HEADS, KV_HEADS, LAYOUT, pages_per_row, device, scratch=scratch)
    memory = {"workspace": torch.zeros(size, dtype=torch.uint8, device=device), "out": torch.zeros_like(arguments["q"])}
    if scratch:
        shape = (3 * pages_per_row, *arguments["raw_pages"].shape[1:])
        memory["scratch"] = torch.full(shape, torch.nan, dtype=torch.float16, device=device)
    prefill_attention(**arguments, **memory)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefill_attention(**arguments, **memory)
    for counts in ((8, 8, 8), (1, 0, 30), (33, 5, 2)):
        queries = torch.tensor(counts, dtype=torch.int32, device=device)
        cu_seqlens = torch.cat((queries.new_zeros(1), queries.cumsum(0).int()))
        with without_synchronization():
            arguments["cu_seqlens_q"].copy_(cu_seqlens)
            arguments["seq_lens"].copy_(lengths + queries if new else lengths)
            memory["out"].fill_(torch.nan)
            graph.replay()
            replayed = memory["out"].clone()
            memory["out"].fill_(torch.nan)
            if scratch:
                memory["scratch"].fill_(torch.nan)
            prefill_attention(**arguments, **memory)
        assert_same_bits(replayed[: sum(counts)], memory["out"][: sum(counts)])
        assert not replayed[: sum(counts)].isnan().any()
