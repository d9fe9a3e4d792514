"""The plug-in for vLLM: what it reads from a configuration, its memory, releases, and, where vLLM is installed, vLLM itself."""

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

from kvarn_triton import PageLayout
from kvarn_triton.integrations.vllm import choice as choices
from kvarn_triton.integrations.vllm import register, releases
from kvarn_triton.integrations.vllm.capacity import Capacity, advice
from kvarn_triton.integrations.vllm.choice import Choice, asked, choice_of, names

ROOT = Path(__file__).parent.parent
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


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
