"""Steps of an engine through `plan_step`, `write_tokens`, `attend` and `read_tokens`, against an oracle that keeps every
token."""

from __future__ import annotations

import pytest
import torch
from engine import Case, Engine
from helpers import ON_GPU

import kvarn_triton
from kvarn_triton import PageLayout, reference

SMALL = PageLayout(64, 64, 4, 2)
CASES = {
    "prefix-cache": Case(SMALL, sink_len=64, sink_columns=True),
    "prefix-cache-drafts": Case(SMALL, sink_len=128, sink_columns=True, max_drafts=5, num_tail_slots=2),
    "blocks-of-2": Case(SMALL, sink_len=64, sink_columns=True, pages_per_block=2, max_blocks=4, num_blocks=10, num_kv_heads=2),
    "csr": Case(SMALL, sink_len=64, sink_columns=True, csr=True, num_tail_slots=3),
    "csr-body": Case(SMALL, sink_len=16, csr=True),
    "no-sink": Case(SMALL, max_drafts=3, num_tail_slots=2, dtype=torch.bfloat16, raw_dtype=torch.float32),
    "short-sink": Case(PageLayout(64, 64, 3, 2), sink_len=100, raw_dtype=torch.bfloat16 if ON_GPU else torch.float16),
    "long-drafts": Case(SMALL, sink_len=16, max_drafts=40, num_tail_slots=3),
}


def run(api, name: str, device: torch.device, seeds: range, steps: int) -> Engine:
    """Drive an engine; return the last one."""
    for seed in seeds:
        engine = Engine(api, CASES[name], device, seed)
        for _ in range(steps):
            engine.step()
    return engine


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    """Steps of the reference."""
    run(reference, name, torch.device("cpu"), range(6), 14)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name, device):
    """Steps of the kernels."""
    run(kvarn_triton, name, device, range(40 if ON_GPU else 1), 14 if ON_GPU else 5)


def test_everything_happens():
    """Runs have prefix hits, of blocks of the same step too, rejected drafts, and requests that are preempted."""
    engines = []
    for seed in range(8):
        engines.append(Engine(reference, CASES["prefix-cache-drafts"], torch.device("cpu"), seed))
        for _ in range(14):
            engines[-1].step()
    for name in ("hits", "same_step_hits", "rejected", "preempted"):
        assert sum(getattr(engine, name) for engine in engines) >= 3, name
