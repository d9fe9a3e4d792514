"""Peers of latent attention: what is missing is named, libraries are called with what they take and checked before timing."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import draw

sys.path.insert(0, str(Path(__file__).parent.parent / "perf"))
import mla_peers
import peers

CONTEXT = 150
FA3_SCHEMA = """fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q,
Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, float softmax_scale, bool is_causal,
int window_size_left, int window_size_right, float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata,
int num_splits, bool? pack_gqa, int sm_margin, int cp_world_size) -> Tensor[]"""


@pytest.fixture
def case(device) -> mla_peers.SixteenBitLatents:
    """Two sets of two sequences, whose last page is in use only in part."""
    q = [draw(2, 16, 576, seed=i, dtype=torch.float16, device=device) for i in range(2)]
    pages = draw(12, 64, 576, seed=2, dtype=torch.float16, device=device)
    tables = list(torch.randperm(12, generator=torch.Generator().manual_seed(3)).int().view(2, 2, 3).to(device))
    return mla_peers.SixteenBitLatents(q, pages, tables, CONTEXT, 0.05)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention [heads, 512] of one query token."""
    weights = torch.softmax(scale * q.double() @ keys.double().T, dim=-1)
    return (weights @ values.double()).half()


class FlashMLA:
    """Stands for the library: makes metadata only in a call without any."""

    def __init__(self) -> None:
        self.made = 0

    def dense_decode_fwd(self, q, cache, width, lens, table, scale, causal, metadata, splits, out):
        """As the operator's arguments are in order."""
        assert q.shape[1:] == (1, 16, 576) and cache.shape[2] == 1 and width == 512 and not causal
        if metadata is None:
            self.made += 1
            metadata, splits = torch.zeros(1), torch.ones(1)
        for row, length in enumerate(lens.tolist()):
            tokens = cache[table[row].long(), :, 0].flatten(0, 1)[:length]
            out[row, 0] = attend(q[row, 0], tokens, tokens[:, :512], scale)
        return out, None, metadata, splits


class FA3:
    """Stands for the library: keys of the rotary channels, values of the latents, whose products with q_v are scores too."""

    def __init__(self) -> None:
        schema = torch._C.parse_schema(FA3_SCHEMA.replace("\n", " "))
        fields = {"default": SimpleNamespace(_schema=schema), "__call__": lambda _, *given: self.run(given)}
        self.fwd = type("Operator", (), fields)()
        self.names = [argument.name for argument in schema.arguments]

    def get_scheduler_metadata(self, batch, q_len, context, heads, kv_heads, width, value_width, *rest):
        """Only whom it is made for."""
        assert (batch, q_len, context, heads, kv_heads, width, value_width) == (2, 1, CONTEXT, 16, 1, 64, 512)
        return torch.zeros(1)

    def run(self, given):
        """As the schema names the arguments."""
        x = SimpleNamespace(**dict(zip(self.names, given, strict=True)))
        assert x.k_new is None and x.cp_world_size == 1 and x.scheduler_metadata is not None
        for row, length in enumerate(x.seqused_k.tolist()):
            ids = x.page_table[row].long()
            rope, latents = (cache[ids, :, 0].flatten(0, 1)[:length] for cache in (x.k, x.v))
            q = torch.cat((x.q_v[row], x.q[row]), dim=-1)
            x.out[row] = attend(q, torch.cat((latents, rope), dim=-1), latents, x.softmax_scale)
        return [x.out]


class Wrapper:
    """Stands for FlashInfer's; one generation doesn't take the heads."""

    def __init__(self, memory, backend) -> None:
        self.backend = backend

    def plan(self, **given):
        """Keep what it is told."""
        if self.backend == "fa3":
            raise ValueError("no such heads\nand more")
        self.plan = SimpleNamespace(**given)

    def run(self, q, q_rope, latents, rope, *, out, return_lse):
        """Attend to what the plan says."""
        for row, length in enumerate(self.plan.kv_len_arr.tolist()):
            ids = self.plan.kv_indices[self.plan.kv_indptr[row] : self.plan.kv_indptr[row + 1]].long()
            tokens = torch.cat((latents, rope), dim=-1)[ids].flatten(0, 1)[:length]
            out[row] = attend(torch.cat((q[row], q_rope[row]), dim=-1), tokens, tokens[:, :512], self.plan.sm_scale)
        return out


@pytest.fixture
def found(monkeypatch) -> dict:
    """All three."""
    monkeypatch.setattr(mla_peers, "say", lambda text: None)
    flashinfer = SimpleNamespace(mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper))
    return {"FlashMLA": FlashMLA(), "FA3": FA3(), "FlashInfer": flashinfer}


def test_each_is_called_as_it_wants(case, found):
    """Attention made from the arguments is attention; every set has a call; metadata is made once, outside of the calls."""
    right, wrong = mla_peers.right_variants(found, case)
    assert list(right) == ["FlashMLA", "FA3, own splits", "FA3, 32 splits", "FlashInfer fa2"] and wrong == {}
    tokens = case.pages[case.tables[1][-1].long()].flatten(0, 1)[:CONTEXT]
    expected = attend(case.q[1][-1], tokens, tokens[:, :512], 0.05)
    for calls in right.values():
        assert len(calls) == 2
        torch.testing.assert_close(calls[1]().view(2, 16, 512)[-1], expected)
    assert found["FlashMLA"].made == 1


def test_what_is_wrong_is_not_timed(case, found, monkeypatch):
    """A kernel that leaves a token out, or can't run, is named with its error; others stay."""
    right_one = FlashMLA.dense_decode_fwd
    monkeypatch.setattr(FlashMLA, "dense_decode_fwd", lambda s, q, c, w, lens, *rest: right_one(s, q, c, w, lens - 1, *rest))
    monkeypatch.setattr(FA3, "get_scheduler_metadata", lambda *given: 1 / 0)
    right, wrong = mla_peers.right_variants(found, case)
    assert list(right) == ["FlashInfer fa2"]
    assert wrong["FlashMLA"].startswith("FlashMLA: error ") and wrong["FA3"] == "ZeroDivisionError: division by zero"


def test_missing_ones_are_named(monkeypatch, tmp_path):
    """Without the libraries, with a library for another GPU, and with one that doesn't fit, a sentence says so."""
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    said: list[str] = []
    monkeypatch.setattr(mla_peers, "say", said.append)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found, missing = mla_peers.find_mla_peers()
    assert found == {} and missing["FlashMLA"] == missing["FA3"] == "vllm is not installed"
    assert "mla: without FlashMLA: vllm is not installed" in said and "flashinfer can't be imported" in missing["FlashInfer"]
    spec = ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "_flashmla_C.abi3.so").write_text("not a library")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    missing = mla_peers.find_mla_peers()[1]
    assert missing["FA3"] == "no _vllm_fa3_C*.so in an installed vllm" and missing["FlashMLA"] == "it needs sm90"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert mla_peers.find_mla_peers()[1]["FlashMLA"].startswith("_flashmla_C.abi3.so can't be loaded (")
