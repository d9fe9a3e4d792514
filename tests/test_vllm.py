"""The plug-in for vLLM: what it reads from a configuration, its plans of steps, and, where vLLM is installed, vLLM itself."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_server import Server

from kvarn_triton import PageLayout, gpu
from kvarn_triton.integrations.vllm import choice as choices
from kvarn_triton.integrations.vllm import register, releases
from kvarn_triton.integrations.vllm.capacity import Capacity, advice
from kvarn_triton.integrations.vllm.choice import Choice, asked, choice_of, names
from kvarn_triton.integrations.vllm.slots import Rows, SlotsByBlock, SlotsByRow

ROOT = Path(__file__).parent.parent
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(autouse=True)
def reference_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run CPU tensors through the reference, not through Triton's interpreter."""
    monkeypatch.setattr(gpu, "on_device", lambda tensor: tensor.is_cuda)


def config_of(**changes: Any) -> SimpleNamespace:
    """Return what a `VllmConfig` has of what is read, for k4v2_g64."""
    fields = {
        "attention_config": SimpleNamespace(backend=SimpleNamespace(name="CUSTOM"), backend_per_kind={}),
        "cache_config": SimpleNamespace(cache_dtype="auto", enable_prefix_caching=True),
        "additional_config": {"kvarn_layout": "k4v2_g64"},
        "speculative_config": None,
        "kv_transfer_config": None,
        "parallel_config": SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        "scheduler_config": SimpleNamespace(max_num_seqs=16),
        "use_v2_model_runner": True,
    }
    return SimpleNamespace(**fields | changes)


def test_choice():
    """A configuration is read as it is meant, by either name of a layout."""
    choice = choice_of(config_of())
    assert choice == Choice("k4v2_g64", 1, 0, 16, True, True)
    assert (choice.page_size, choice.sink_len, choice.columns, choice.num_raw_pages) == (64, 64, 2, 32)
    named = config_of(
        cache_config=SimpleNamespace(cache_dtype="kvarn_k3v3_g128", enable_prefix_caching=False), additional_config={}
    )
    assert choice_of(named).layout(80) == PageLayout(80, 128, 3, 3)
    drafts = SimpleNamespace(method="ngram", num_speculative_tokens=5)
    choice = choice_of(config_of(speculative_config=drafts, use_v2_model_runner=False))
    assert (choice.max_drafts, choice.tail_slots, choice.num_slots, choice.prefix_caching) == (5, 2, 48, True)
    assert len(set(names())) == 72 and all(PageLayout.from_name(name.removeprefix("kvarn_")) for name in names())


def test_asked():
    """The plug-in is asked for by the backend CUSTOM, for all layers or those of full attention, and by nothing else."""
    custom, other = SimpleNamespace(name="CUSTOM"), SimpleNamespace(name="FLASH_ATTN")
    for backend, per_kind, expected in (
        (custom, {}, True),
        (None, {}, False),
        (other, {}, False),
        (other, {"full_attention": custom}, True),
        (None, {"sliding_window": custom}, False),
    ):
        config = config_of(attention_config=SimpleNamespace(backend=backend, backend_per_kind=per_kind))
        assert asked(config) == expected
    assert not asked(None)


MEMORY = int(0.92 * 80e9 - 16e9)
"""Of a cache in vLLM, in bytes: a GPU of 80 GB, of which vLLM takes 0.92 by default, with a model of 16 GB."""


@pytest.mark.parametrize(
    ("layout", "requests", "expected"),
    [
        ("k4v2_g64", 1024, 3.09),
        ("k4v2_g64", 256, 4.08),
        ("k4v2_g128", 1024, 1.89),
        ("k4v2_g128", 256, 3.99),
        ("k2v2_g64", 1024, 4.27),
        ("k4v4_g64", 1024, 2.42),
    ],
)
def test_capacity(layout: str, requests: int, expected: float):
    """Tokens of an 8B shape against 16 bits, with the most requests that vLLM runs by default on GPUs of 70 GB, and on others.

    A user is told where 16-bit tokens take more than a tenth.
    """
    config = config_of(
        additional_config={"kvarn_layout": layout}, scheduler_config=SimpleNamespace(max_num_seqs=requests)
    )  # fmt: skip
    choice = choice_of(config)
    cache = Capacity(choice, num_layers=32, num_kv_heads=8, head_dim=128)
    times = cache.tokens(MEMORY) / (MEMORY // (32 * 8 * 128 * 2 * 2))
    assert expected <= times < expected + 0.02
    told = advice(choice, cache.raw_bytes, MEMORY - cache.raw_bytes)
    assert (told is not None) == (cache.raw_bytes > 0.1 * MEMORY)
    if told is not None:
        fewer = dataclasses.replace(choice, max_requests=int(told.split("with ")[1].split(" ")[0]))
        assert 0.09 < dataclasses.replace(cache, choice=fewer).raw_bytes / MEMORY <= 0.1
        assert ("_g64" in told) == layout.endswith("_g128")
    little = advice(dataclasses.replace(choice, max_requests=6), 90.0, 10.0)  # no number of requests is few enough
    assert little is not None and "needs more memory" in little


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"additional_config": {}}, "kvarn_layout: expected a layout"),
        ({"additional_config": {"kvarn_layout": "k7v2_g64"}}, "kvarn_layout: expected a layout"),
        ({"additional_config": {"kvarn_layout": "k4v2_g64", "kvarn_sink_pages": 2}}, "kvarn_sink_pages: expected 0 or 1"),
        ({"cache_config": SimpleNamespace(cache_dtype="fp8", enable_prefix_caching=False)}, "kv_cache_dtype: expected 'auto'"),
        ({"speculative_config": SimpleNamespace(method="eagle", num_speculative_tokens=2)}, "speculative method"),
        ({"kv_transfer_config": object()}, "kv_transfer_config: expected none"),
        (
            {"parallel_config": SimpleNamespace(decode_context_parallel_size=2, prefill_context_parallel_size=1)},
            "decode_context_parallel_size: expected 1",
        ),
    ],
)
def test_refused(changes: dict, message: str):
    """What isn't there is refused by the name that a user knows it by."""
    with pytest.raises(ValueError, match=message):
        choice_of(config_of(**changes))


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


def test_releases():
    """A release is taken, or refused in one sentence with its name."""
    assert releases.refusal("0.32.0") is None and releases.refusal("0.33.1+cpu") is None
    for version in ("0.31.2", "0.34.0", "1.0.0", "0.3.3"):
        assert releases.refusal(version) == f"kvarn_triton's plug-in is for vLLM 0.32 and 0.33, and this is vLLM {version}."
    with pytest.raises(ImportError, match=r"for vLLM 0\.32 and 0\.33"):
        releases.check("0.31.0")


def test_entry_point():
    """vLLM finds the plug-in by the entry point of this distribution, and importing the package doesn't import vLLM."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    line = lines[lines.index('[project.entry-points."vllm.general_plugins"]') + 1]
    assert line == 'kvarn_triton = "kvarn_triton.integrations.vllm:register"' and register.__name__ == "register"
    code = "import sys, kvarn_triton, kvarn_triton.integrations.vllm; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_other_release(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A release that the plug-in isn't for, and that lacks everything, is left alone but for a sentence of the log."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.27.1"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    register()
    assert [record.message for record in caplog.records] == [releases.refusal("0.27.1")]


@needs_vllm
def test_contract():
    """Every attribute and parameter of vLLM that is used is there. A new release fails here, with names."""
    version = importlib.import_module("vllm").__version__
    assert releases.refusal(version) is None
    assert releases.differences(version) == []


@needs_vllm
def test_contract_names_what_changed(monkeypatch: pytest.MonkeyPatch):
    """A changed parameter or a missing attribute is named."""
    version = importlib.import_module("vllm").__version__
    backend = importlib.import_module("vllm.v1.attention.backend")
    monkeypatch.setattr(backend.AttentionBackend, "customize_spec", classmethod(lambda cls, config: config))
    monkeypatch.delattr(backend.AttentionBackend, "supports_sink")
    found = releases.differences(version)
    assert len(found) == 2 and "customize_spec: begins with" in found[0] + found[1]
    with pytest.raises(ImportError, match="supports_sink: not there"):
        releases.check(version)


@needs_vllm
def test_bytes_of_a_block(monkeypatch: pytest.MonkeyPatch):
    """A block has the bytes of its pages; a layer with a window, or a block of half a page, is left alone."""
    module = importlib.import_module("kvarn_triton.integrations.vllm.backend")
    interface = importlib.import_module("vllm.v1.kv_cache_interface")
    monkeypatch.setattr(module, "current_choice", lambda: choices.choice_of(config_of()))
    heads = {"num_kv_heads": 2, "head_size": 64, "head_size_v": 64, "dtype": torch.bfloat16}
    layout = PageLayout.from_name("k4v2_g64", 64)
    for size in (64, 128):
        spec = module.KVarNBackend.customize_spec(interface.FullAttentionSpec(block_size=size, **heads))
        assert spec.page_size_bytes == 2 * layout.page_bytes * size // 64
        assert module.KVarNBackend.customize_spec(spec) == spec
    for spec in (
        interface.FullAttentionSpec(block_size=32, **heads),
        interface.SlidingWindowSpec(block_size=64, sliding_window=128, **heads),
    ):
        assert module.KVarNBackend.customize_spec(spec) is spec


@needs_vllm
@pytest.mark.parametrize(("order", "expected"), [("LBHNC", 21 * 262144), ("BLHNC", 21 * 59392)])
def test_blocks_beside_windows(order: str, expected: int, monkeypatch: pytest.MonkeyPatch):
    """Beside layers with a window vLLM pads pages to 16 bits, unless a block holds the pages of all layers.

    21 layers of each kind, 8 kv heads, head_dim 128: bytes of a block of 64 tokens in full attention.
    """
    module = importlib.import_module("kvarn_triton.integrations.vllm.backend")
    interface = importlib.import_module("vllm.v1.kv_cache_interface")
    layout = interface.KVCacheLayout[order]
    assert layout in module.KVarNBackend.supported_kv_cache_layouts()
    monkeypatch.setattr(module, "current_choice", lambda: choices.choice_of(config_of()))
    heads = {"block_size": 64, "num_kv_heads": 8, "head_size": 128, "head_size_v": 128, "dtype": torch.bfloat16}
    full = module.KVarNBackend.customize_spec(interface.FullAttentionSpec(**heads))
    specs = {f"{i}": interface.SlidingWindowSpec(sliding_window=4096, **heads) if i % 2 else full for i in range(42)}
    config = config_of()
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    config.attention_config.hisparse_config = None
    config.cache_config.get_resolved_kv_cache_layout = lambda: layout
    groups = importlib.import_module("vllm.v1.core.kv_cache_utils").get_kv_cache_groups(config, specs)
    (group,) = (each for each in groups if "0" in each.layer_names)
    size = group.kv_cache_spec.page_size_bytes
    assert (size if order == "BLHNC" else size * len(group.layer_names)) == expected


@needs_vllm
@pytest.mark.slow("starting vLLM")
def test_generation(tmp_path: Path):
    """vLLM generates with pages, and nearly the tokens of its own cache: logits of a random model are close together."""
    command = [
        sys.executable,
        "perf/vllm_text.py",
        "--random",
        str(tmp_path),
        "--only",
        "plain",
        "prefix caching",
        "--new-tokens",
        "9",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "requests and" in line]
    assert len(lines) == 2
    for line in lines:
        equal, total = (int(word) for word in line.split(" requests and ")[1].split(" tokens")[0].split(" of "))
        assert equal > 0.8 * total, line
