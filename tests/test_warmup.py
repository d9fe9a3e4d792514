"""Compiling ahead: nothing is compiled in a step after `warmup`, and `no_compilation` refuses what would be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvarn_triton import PageLayout, warmup

TESTS = Path(__file__).parent


def test_no_compilation_after_warmup():
    """One warm-up serves every batch, context, sink and split; another group is refused with the kernel's name."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "warmup_worker.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "refused: _kvarn_decode_attention_kernel is not compiled" in result.stdout
    assert result.stdout.endswith("ok\n")


@pytest.mark.parametrize(
    ("layout", "options"),
    [(PageLayout(64, 64, 4, 2), {}), (PageLayout(64, 64, 4, 2, v_head_dim=80), {"prefill": True})],
    ids=["decode", "prefill, values of another head_dim"],
)
def test_warmup_runs(layout, options, device):
    """The launches of a warm-up find nothing to do and write nothing anybody could see."""
    warmup(layout, 4, 2, device, dtype=torch.float16, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_q_heads": 3}, "num_q_heads: expected a multiple of num_kv_heads, got 3"),
        ({"num_kv_heads": 0}, "num_q_heads: expected a multiple of num_kv_heads, got 4"),
        ({"dtype": torch.float64}, "dtype: expected one of"),
        ({"raw_dtype": torch.int8}, "raw_dtype: expected one of"),
    ],
)
def test_warmup_refuses(arguments, message, device):
    """Wrong options are named before anything is compiled."""
    options = {"num_q_heads": 4, "num_kv_heads": 2, "device": device} | arguments
    with pytest.raises(ValueError, match=message):
        warmup(PageLayout(64, 64, 4, 2), **options)
