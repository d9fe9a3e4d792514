"""Memory of attention calls: rows that no sequence owns, bounds of workspaces, rounds where partial results would not fit."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from helpers import LSE_ERROR, ON_GPU, assert_same_bits
from prefill_cases import SMALL, prefill_case

import kvarn_triton.attention.workspace
from kvarn_triton import (
    PageLayout,
    decode_attention,
    decode_workspace_size,
    prefill_attention,
    prefill_workspace_size,
    reference,
)
from kvarn_triton.testing import cache_case


def with_free_rows(arguments: dict, before: int, after: int) -> dict:
    """Return a call with query tokens of no sequence before and after the others."""
    padded = dict(arguments)
    for name in ("q", "k", "v"):
        if name in arguments:
            x = arguments[name]
            nan = [torch.full_like(x[:1], torch.nan).expand(n, -1, -1) for n in (before, after)]
            padded[name] = torch.cat((nan[0], x, nan[1]))
    return padded | {"cu_seqlens_q": arguments["cu_seqlens_q"] + before}


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 70), (5, 4)])
@pytest.mark.parametrize("split_size", [None, 1])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_of_no_sequence(before, after, split_size, sinks, device):
    """They are left alone in the caller's memory, and zeros otherwise; their lse is -inf; queries there may be NaN (KF 24)."""
    arguments = prefill_case(SMALL, [200, 90, 70], [3, 0, 2], new=True, group=3, num_kv_heads=2, sink_len=16, device=device)
    arguments["sinks"] = torch.zeros(6, device=device) if sinks else None
    expected, expected_lse = prefill_attention(**arguments, split_size=split_size, return_lse=True)
    padded = with_free_rows(arguments, before, after)
    owned = slice(before, before + len(expected))
    for api in (prefill_attention, reference.prefill_attention):
        given = torch.full((before + after + len(expected), *expected.shape[1:]), 7.0, dtype=expected.dtype, device=device)
        for out in (None, given):
            result, lse = api(**padded, split_size=split_size, out=out, return_lse=True)
            free = torch.cat((result[:before], result[owned.stop :])), torch.cat((lse[:before], lse[owned.stop :]))
            assert (free[0] == (0 if out is None else 7)).all() and (free[1] == -torch.inf).all()
            if api is prefill_attention and split_size:
                assert_same_bits(result[owned].contiguous(), expected)
                assert_same_bits(lse[owned].contiguous(), expected_lse)
            else:  # other tiles
                torch.testing.assert_close(result[owned], expected, rtol=1e-2, atol=2e-3)
                torch.testing.assert_close(lse[owned], expected_lse, rtol=0, atol=LSE_ERROR[expected.dtype])


def test_no_sequence(device):
    """Without any sequence all rows are nobody's."""
    arguments = prefill_case(SMALL, [70], [2], device=device)
    arguments |= {name: arguments[name][:0] for name in ("block_table", "seq_lens", "raw_table", "num_quantized")}
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_q"][:1]
    out, lse = prefill_attention(**arguments, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_rounds_of_tokens(device, monkeypatch):
    """Tokens that are computed in rounds, of whole tiles, of parts of one, or of one token, have the bits of a single round."""
    arguments = prefill_case(SMALL, [330, 70, 200], [6, 2, 40], new=True, group=3, sink_len=16, device=device)
    padded = with_free_rows(arguments, 2, 3)
    expected, expected_lse = prefill_attention(**padded, split_size=1, return_lse=True)
    pages = arguments["block_table"].shape[1]
    token_bytes = 4 * pages * 3 * 65
    for tokens in (64, 20, 7, 1) if ON_GPU else (20, 7):
        monkeypatch.setattr(kvarn_triton.attention.workspace, "ROUND_BYTES", tokens * token_bytes)
        size = prefill_workspace_size(53, 3, 3, 1, SMALL, pages, device, split_size=1)
        assert size == min(tokens, 53) * token_bytes
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        out, lse = prefill_attention(**padded, split_size=1, return_lse=True, workspace=workspace)
        assert_same_bits(out, expected)
        assert_same_bits(lse, expected_lse)


@pytest.mark.parametrize("csr", [False, True])
def test_rounds_of_sequences(csr, device, monkeypatch):
    """Sequences of a decode step that are computed in rounds have the bits of a single round."""
    case = cache_case(SMALL, [330, 0, 70, 200, 130], num_kv_heads=2, group=2, sink_len=16, device=device)
    arguments = {"q": case.q, **case.kwargs, "split_size": 1, "return_lse": True}
    columns = case.block_table.shape[1]
    if csr:
        indptr = torch.arange(6, dtype=torch.int32, device=device) * columns
        arguments |= {"block_table": None, "kv_indptr": indptr, "kv_indices": case.block_table.flatten()}
    expected, expected_lse = decode_attention(**arguments)
    monkeypatch.setattr(kvarn_triton.attention.workspace, "ROUND_BYTES", 2**16)
    columns = len(arguments["kv_indices"]) if csr else columns
    options = {"max_raw_pages": case.raw_table.shape[1], "csr": csr, "split_size": 1}
    size = decode_workspace_size(5, 4, 2, SMALL, columns, device, **options)
    assert size <= 2**16
    out, lse = decode_attention(**arguments, workspace=torch.empty(size, dtype=torch.uint8, device=device))
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)


def test_bounds_of_long_contexts(device):
    """What once took 17 and 4 GB: 8,192 new tokens over 128K, and 256 sequences with a table for 1M."""
    layout = PageLayout()
    assert prefill_workspace_size(8192, 1, 32, 8, layout, 1024, device, split_size=8) <= 2**28
    assert decode_workspace_size(256, 32, 8, layout, 8192, device, split_size=8) <= 2**28


def needed(function: str, sizes: dict, device: torch.device) -> int:
    """Return how many bytes a call asks for: those of the message that refuses a workspace of none."""
    layout, batch, heads = PageLayout(64, 64, 4, 2), sizes["batch"], sizes["num_q_heads"]
    ints = {"dtype": torch.int32, "device": device}
    q = torch.zeros(sizes.get("total_tokens", batch), heads, 64, dtype=torch.float16, device=device)
    arguments = {
        "q": q,
        "pages": torch.zeros(layout.pages_shape(1, sizes["num_kv_heads"]), dtype=torch.uint8, device=device),
        "seq_lens": torch.zeros(batch, **ints),
        "layout": layout,
        "split_size": sizes["split_size"],
        "workspace": torch.zeros(0, dtype=torch.uint8, device=device),
        "block_table": torch.zeros(batch, sizes["max_pages"], **ints),
    }
    try:
        if function == "decode":
            decode_attention(**arguments)
        else:
            prefill_attention(**arguments, cu_seqlens_q=torch.zeros(batch + 1, **ints))
    except ValueError as error:
        return int(str(error).split("at least ")[1].split()[0])
    return 0


@pytest.mark.parametrize("function", ["decode", "prefill"])
def test_sizes_are_bounds(function, device, monkeypatch):
    """A workspace suffices for every smaller step, and no argument that grows makes it smaller (KF 26)."""
    monkeypatch.setattr(kvarn_triton.attention.workspace, "ROUND_BYTES", 2**18)
    monkeypatch.setattr(kvarn_triton.gpu, "num_multiprocessors", lambda device: 7)
    rng, layout = random.Random(5), PageLayout(64, 64, 4, 2)
    size_of = {"decode": decode_workspace_size, "prefill": prefill_workspace_size}[function]
    names = {"batch": 40, "num_q_heads": 24, "num_kv_heads": 4, "max_pages": 40}
    if function == "prefill":
        names = {"total_tokens": 150, **names}
    for _ in range(60):
        split_size = rng.choice([None, 1, 3])
        top = {name: rng.randint(1, most) for name, most in names.items()}
        top["num_q_heads"] = max(top["num_q_heads"], top["num_kv_heads"])
        size = size_of(layout=layout, device=device, split_size=split_size, **top)
        for name, _ in itertools.product(names, range(2)):
            less = top | {name: rng.randint(1, top[name])}
            if less["num_q_heads"] >= less["num_kv_heads"]:
                assert size_of(layout=layout, device=device, split_size=split_size, **less) <= size, (top, less)
        smaller = {name: rng.randint(1, value) for name, value in top.items()}
        smaller["num_q_heads"] = smaller["num_kv_heads"] * rng.randint(1, top["num_q_heads"] // top["num_kv_heads"])
        assert needed(function, smaller | {"split_size": split_size}, device) <= size, (top, smaller)
