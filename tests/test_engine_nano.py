"""The example engine of the docs: nano-vllm's scheduler and block manager over pages, on the CPU, no interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nanovllm") is None or importlib.util.find_spec("xxhash") is None,
    reason="needs nano-vllm: pip install --no-deps nano-vllm-fork xxhash",
)
NOISE = 0.15
"""Of logits whose standard deviation is 1: 8-bit pages and float16 weights beside float32 make less than half of it."""
TIE = 0.03
"""Of two logits that are so close either is the best."""


def ran(*command: str) -> str:
    """The last line that a program prints. It runs on the CPU, in a process of its own: the engine's functions are replaced."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("sink_pages", [1, pytest.param(0, marks=pytest.mark.slow("nano-vllm on a CPU"))])
def test_tokens(sink_pages):
    """Greedy tokens through 8-bit pages are those of the model in transformers, in float32 and without a cache.

    Eight requests share four slots and seven blocks. Some hit blocks that the same step writes, some those of an earlier one.
    """
    found = json.loads(ran("tests/nano_worker.py", "k8v8_g64", str(sink_pages)))
    assert found["same_step"] >= 1 and found["other_step"] >= 1
    assert found["reused"] >= 3 and found["most"] == 4
    assert found["used_at_end"] == 0 and found["free"] == 4  # nothing is lost
    for row in found["rows"]:
        assert 0.5 < row["spread"] < 2 and row["distinct"] > 5, row
        assert row["error"] < NOISE, row
        assert row["gap"] < TIE, row
        assert row["equal"] >= 0.9 * row["tokens"], row


@pytest.mark.slow("nano-vllm on a CPU")
def test_measurement(tmp_path):
    """The measurement of `perf/nano.py` runs with a tiny model."""
    file = tmp_path / "nano.json"
    ran("perf/nano.py", "--tiny", "--context", "300", "--json", str(file))
    rows = json.loads(file.read_text())["sweeps"]["nano-vllm"]
    assert [(row["cache"], row["batch"] > 1) for row in rows] == [
        ("k4v2_g128", False), ("k4v2_g128", True), ("16 bits", False), ("16 bits", True),
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 and row["model_ms"] > 0 for row in rows)
