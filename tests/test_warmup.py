"""Compiling ahead: nothing is compiled in a step after `warmup`, and `no_compilation` refuses what would be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import variant_cases
from helpers import ON_GPU

from kvarn_triton import MLALayout, PageLayout, mla_warmup, no_compilation, warmup

TESTS = Path(__file__).parent


def run_worker(name: str, *arguments: str) -> str:
    """Run a program without the interpreter and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, str(TESTS / name), *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["stub"], id="stub"),
        pytest.param([], marks=[pytest.mark.slow("the compiler"), pytest.mark.rare], id="binaries"),
    ],
)
def test_no_compilation_after_warmup(arguments):
    """One warm-up serves every batch, context, sink and split; another group is refused with the kernel's name.

    Kernels are known by what Triton would compile for a call; that the compiler takes all of them is the second case.
    """
    output = run_worker("warmup_worker.py", *arguments)
    assert "refused: _kvarn_decode_attention_kernel is not compiled" in output
    assert output.endswith("ok\n")


def test_no_property_of_tensors_chooses_a_kernel():
    """Addresses, strides, sizes of 1, batches, widths and lengths: every call takes a kernel that there is already (KF 30)."""
    assert run_worker("variants_worker.py").split() == []


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_variants_without_compilation(device):
    """The same calls run on a GPU, inside `no_compilation`."""
    variant_cases.run(300, device, no_compilation)
    torch.cuda.synchronize()


def test_variants_of_addresses(device):
    """The same calls are right to make: in the interpreter, without a warm-up."""
    for seed in range(2):
        for calls in (
            *(variant_cases.warmed_calls, variant_cases.step_calls),
            *(variant_cases.latent_calls, variant_cases.other_calls),
        ):
            for call in calls(variant_cases.Variants(seed, device, most=3)).values():
                call()


@pytest.mark.parametrize(
    ("layout", "options"),
    [(PageLayout(64, 64, 4, 2), {}), (PageLayout(64, 64, 4, 2, v_head_dim=80), {"prefill": True})],
    ids=["decode", "prefill, values of another head_dim"],
)
def test_warmup_runs(layout, options, device):
    """The launches of a warm-up find nothing to do and write nothing anybody could see."""
    warmup(layout, 2, 1, device, dtype=torch.float16, **options)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": PageLayout(64, 64, 4, 2)}, "layout: expected an MLALayout, got 'PageLayout'"),
        ({"num_heads": 0}, "num_heads: expected an integer of at least 1, got 0"),
        ({"dtype": torch.float32}, "dtype: expected one of torch.float16, torch.bfloat16, got torch.float32"),
        ({"max_queries": 0}, "max_queries: expected an integer of at least 1, got 0"),
        ({"config": 3}, "config: expected an MLAConfig, got 'int'"),
        ({"dequantize": torch.int8}, "dequantize: expected one of"),
    ],
)
def test_mla_warmup_refuses(arguments, message, device):
    """Wrong options are named before anything is compiled."""
    with pytest.raises(ValueError, match=message):
        mla_warmup(**{"layout": MLALayout(), "num_heads": 4, "device": device} | arguments)
