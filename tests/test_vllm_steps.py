"""Steps of the plug-in for vLLM: plans and slots in a server like vLLM's, against the formula, by requests and by blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from vllm_server import Server

from kvarn_triton import gpu
from kvarn_triton.integrations.vllm.choice import Choice
from kvarn_triton.integrations.vllm.slots import Rows, SlotsByBlock, SlotsByRow

pytestmark = pytest.mark.usefixtures("without_kernels")

BASE = Choice("k8v8_g64", sink_pages=1, max_drafts=0, max_requests=4, prefix_caching=False, known_rows=True)
CASES = [
    {},
    {"prefix_caching": True},
    {"prefix_caching": True, "sink_pages": 0},
    {"max_drafts": 5},
    {"max_drafts": 40, "sink_pages": 0},
    {"max_drafts": 5, "prefix_caching": True},
    {"max_drafts": 40, "prefix_caching": True, "sink_pages": 0},
]
NAMES = "plain", "prefix", "prefix, no sink", "drafts", "drafts, no sink", "both", "both, no sink"


@pytest.mark.parametrize("known_rows", [True, False], ids=["rows", "blocks"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_server(case: dict, known_rows: bool, device: torch.device):
    """Steps of a server like vLLM's, dummy ones between them, are those of exact attention up to the rounding of 8 bits."""
    if device.type == "cuda" and not known_rows:
        pytest.skip("requests are known by blocks on CPUs only")
    seen: dict[str, int] = {}
    for seed in range(3):
        server = Server(dataclasses.replace(BASE, known_rows=known_rows, **case), seed, device, fixed=known_rows)
        for _ in range(120):
            while len(server.waiting) < 3:
                server.arrive()
            server.step()
            assert server.worst < 0.02, (seed, server.worst, server.seen)
        seen = {name: seen.get(name, 0) + count for name, count in server.seen.items()}
    assert all(seen[name] > 3 for name in ("decodes", "mixed", "ended", "preempted")), seen
    assert seen["hits"] > 3 or not case.get("prefix_caching"), seen
    assert seen["taken back"] > 3 or not case.get("max_drafts"), seen


def test_plans_stay_where_they_are():
    """Plans of decodes alone are at the same addresses in every step, those of smaller batches too."""
    server = Server(dataclasses.replace(BASE, max_requests=3), 0, torch.device("cpu"), fixed=True)
    seen: dict[int, set[tuple[int, ...]]] = {}
    for _ in range(150):
        while len(server.waiting) < 3:
            server.arrive()
        server.step()
        for (batch, width), step in server.planner.steps.items():
            tensors = [getattr(step, field.name) for field in dataclasses.fields(step)]
            tensors += [each.records for key, each in server.planner.schedules.items() if key[:2] == (batch, width)]
            seen.setdefault(batch, set()).add(tuple(each.data_ptr() for each in tensors if isinstance(each, torch.Tensor)))
    assert len(seen) > 1 and all(len(each) == 1 for each in seen.values())
    schedules = server.planner.schedules
    assert len(schedules) == 2 * len(server.planner.steps)
    assert len({each.records.untyped_storage().data_ptr() for each in schedules.values()}) < len(schedules)


@pytest.mark.slow("the interpreter")
@pytest.mark.parametrize("case", CASES[1:6:2], ids=NAMES[1:6:2])
def test_server_kernels(case: dict, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The same through kernels, plans of decodes in their memory included."""
    monkeypatch.setattr(gpu, "on_device", lambda tensor: True)
    server = Server(dataclasses.replace(BASE, **case), 5, device, fixed=True)
    for _ in range(60):
        while len(server.waiting) < 3:
            server.arrive()
        server.step()
        assert server.worst < 0.02, (server.worst, server.seen)
    assert server.worst > 1e-4, "no page was read"


@pytest.mark.parametrize("whole", [True, False], ids=["made", "lost"])
def test_schedules(whole: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """Decodes begin with what the planner wrote down for them, and with nothing else: without it they are wrong."""
    monkeypatch.setattr(gpu, "on_device", lambda tensor: True)
    server = Server(BASE, 5, device, fixed=True)
    plan = server.planner.plan

    def plan_and_lose(*args: Any) -> Any:
        plans = plan(*args)
        for schedule in plans.schedules.values():
            assert schedule.records.any()
            schedule.records.mul_(int(whole))
        return plans

    monkeypatch.setattr(server.planner, "plan", plan_and_lose)
    while not server.seen["decodes"]:
        while len(server.waiting) < 3:
            server.arrive()
        server.step()
    assert (server.worst < 0.02) == whole


class Captured(Server):
    """A server whose steps of decodes alone are replays of one CUDA graph, captured in a dummy step."""

    graph: Any = None

    def padding(self, count: int) -> int:
        """Fill the batch that was captured."""
        return self.choice.max_requests - count

    def forward(self, plans: Any, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Replay, if the step is one of decodes alone."""
        if plans.prefills is not None or len(q) != self.choice.max_requests:
            return super().forward(plans, q, kv)
        if self.graph is None:
            self.inputs = q.clone(), kv.clone()
            super().forward(plans, *self.inputs)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = super().forward(plans, *self.inputs)
        for mine, given in zip(self.inputs, (q, kv), strict=True):
            mine.copy_(given)
        self.graph.replay()
        self.seen["replays"] = self.seen.get("replays", 0) + 1
        return self.out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("case", CASES[:3], ids=["plain", "prefix", "prefix, no sink"])
def test_captured(case: dict, device: torch.device):
    """One captured graph serves all steps of decodes, and dummy steps write nothing."""
    server = Captured(dataclasses.replace(BASE, **case), 0, device, fixed=True)
    for _ in range(300):
        while len(server.waiting) < 3:
            server.arrive()
        server.step()
        assert server.worst < 0.02, (server.worst, server.seen)
    assert server.seen["replays"] > 20, server.seen


def rows_of(*rows: tuple[int, int, int]) -> Rows:
    """Return rows of (tokens before the step, tokens after it, first block)."""
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*rows, strict=True)]
    return Rows(columns[1], columns[0], columns[2][:, None] + torch.arange(4, dtype=torch.int32))


def test_sink_by_row():
    """A request has a raw sink where it computed its first tokens, and only there."""
    slots = SlotsByRow(dataclasses.replace(BASE, prefix_caching=True), torch.device("cpu"))
    row = torch.tensor([2])

    def sink(*each: tuple[int, int, int]) -> list[int]:
        return slots.raw_table(rows_of(*each), row if len(each) == 1 else torch.tensor([1, 2]))[:, 0].tolist()

    assert sink((0, 64, 10)) == [4]
    assert sink((64, 65, 10)) == [4]
    assert sink((64, 128, 10)) == [-1], "another request hit the prefix cache"
    assert sink((128, 129, 10)) == [-1], "it still has no raw sink"
    assert sink((0, 64, 20)) == [4]
    assert sink((64, 70, 30)) == [-1], "a hit of the same length, of other blocks"
    assert sink((0, 128, 20)) == [4]
    assert sink((0, 128, 20), (0, 0, 0)) == [2, 4], "block 20 is written anew in row 1, row 2 is padding"
    assert sink((128, 130, 20)) == [-1], "the raw sink of row 2 has what block 20 held before"


def test_slots_by_block():
    """Requests with the same first block share a raw sink; a slot that is gone is an error or, once quantized, a page."""
    slots = SlotsByBlock(dataclasses.replace(BASE, prefix_caching=True, known_rows=False), torch.device("cpu"))
    table = slots.raw_table(rows_of((64, 100, 10), (0, 70, 10), (0, 0, 0)))
    assert table[0, 0] == table[1, 0] >= 0 and table[0, 1] != table[1, 1]
    slots.sinks.of.clear()
    assert slots.raw_table(rows_of((100, 101, 10)))[0, 0] == -1
    slots.tails.of.clear()
    with pytest.raises(RuntimeError, match="went to another one"):
        slots.raw_table(rows_of((101, 102, 10)))
