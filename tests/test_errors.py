"""Refusals: every wrong argument raises a ValueError that names it, before anything is written. No call waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import torch
from error_cases import WRONG, valid_arguments
from error_helpers import gapped, set_to, to
from helpers import ON_GPU, bits_of
from mla_errors import WRONG_MLA, valid_mla_arguments

import kvarn_triton as kvarn
from kvarn_triton import Encoder, PageLayout, PrefillConfig
from kvarn_triton.testing import cache_case


def tensors_of(arguments: dict) -> list[torch.Tensor]:
    """Return the tensors among the arguments, those of tuples too."""
    values = [part for value in arguments.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [value for value in values if isinstance(value, torch.Tensor)]


ALL_WRONG = WRONG | WRONG_MLA


def all_valid_arguments(function: str, device: torch.device) -> dict:
    """Return valid keyword arguments of a function."""
    return (valid_mla_arguments if function in WRONG_MLA else valid_arguments)(device)[function]


@pytest.mark.parametrize("function", ALL_WRONG)
def test_wrong_arguments(function, device):
    """Each wrong argument is named in the message, and nothing is written."""
    arguments = all_valid_arguments(function, device)
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    for name, change, message in ALL_WRONG[function]:
        wrong = arguments | {name: change(arguments.get(name))}
        pattern = message if message.startswith((name, f"{name}.")) else f"^{name}.*: {message}"
        with pytest.raises(ValueError, match=pattern):
            getattr(kvarn, function)(**wrong)
    for tensor, old in zip(tensors_of(arguments), before, strict=True):
        assert torch.equal(bits_of(tensor), bits_of(old))


@pytest.mark.parametrize("function", ALL_WRONG)
def test_valid_arguments(function, device):
    """The arguments that the test above spoils are valid."""
    getattr(kvarn, function)(**all_valid_arguments(function, device))


@pytest.mark.parametrize("function", ["commit_pages", "decode_attention", "prefill_attention"])
def test_csr_tables(function, device):
    """Page ids in CSR form are as good as a block table; each wrong one is named, and nothing is written."""
    arguments = valid_arguments(device)[function]
    table = arguments["block_table"]
    indptr = torch.tensor([0, *range(table.shape[1], table.numel() + 1, table.shape[1])], dtype=torch.int32, device=device)
    arguments |= {"block_table": None, "kv_indptr": indptr, "kv_indices": table.flatten()}
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    for name, change, message in [
        ("kv_indptr", set_to(None), "expected a tensor, got NoneType"),
        ("kv_indptr", to(torch.int64), "expected dtype int32, got int64"),
        ("kv_indptr", lambda x: x[None], r"expected shape \[.*\], got \[1, 3\]"),
        ("kv_indptr", gapped, "expected the last dimension contiguous"),
        ("kv_indices", set_to(None), "expected a tensor, got NoneType"),
        ("kv_indices", to(torch.int64), "expected dtype int32, got int64"),
        ("kv_indices", lambda x: x[None], r"expected shape \[\*\], got \[1, "),
        ("kv_indices", gapped, "expected the last dimension contiguous"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            getattr(kvarn, function)(**arguments | {name: change(arguments[name])})
    for tensor, old in zip(tensors_of(arguments), before, strict=True):
        assert torch.equal(bits_of(tensor), bits_of(old))
    getattr(kvarn, function)(**arguments)


def test_csr_table_of_another_batch(device):
    """A table that has rows for other than the sequences of the call is refused, by the first argument that differs."""
    arguments = valid_arguments(device)
    for function, message in (
        ("decode_attention", r"kv_indptr: expected shape \[3\], got \[2\]"),
        ("commit_pages", r"raw_table: expected shape \[1, \*\], got \[2, 3\]"),
    ):
        ids = torch.zeros(2, dtype=torch.int32, device=device)
        with pytest.raises(ValueError, match=message):
            getattr(kvarn, function)(**arguments[function] | {"block_table": None, "kv_indptr": ids, "kv_indices": ids})
    empty = ids[:0]
    with pytest.raises(ValueError, match="kv_indptr: expected at least 1 element, got 0"):
        kvarn.commit_pages(**arguments["commit_pages"] | {"block_table": None, "kv_indptr": empty, "kv_indices": ids})


def arguments_of_other_values(device: torch.device) -> dict[str, dict]:
    """Return valid arguments of the functions that take keys of 64 and values of 128 channels."""
    layout = PageLayout(64, 64, 4, 2, v_head_dim=128)
    case = cache_case(layout, [150, 70], group=3, sink_len=16, device=device)
    k, v = torch.zeros(128, 2, 64, device=device).half(), torch.zeros(128, 2, 128, device=device).half()
    ids = torch.tensor([1, 0], dtype=torch.int32, device=device)
    out = torch.zeros(2, 64, 2, 64, device=device), torch.zeros(2, 64, 2, 128, device=device)
    return {
        "store_pages": {"k": k, "v": v, "pages": case.pages, "page_ids": ids, "layout": layout},
        "append_tokens": {"k": k, "v": v, "raw_pages": case.raw_pages, "slots": torch.arange(128, device=device)},
        "commit_pages": {
            **{name: getattr(case, name) for name in ("raw_pages", "pages", "raw_table", "block_table", "num_quantized")},
            "committed_lens": case.seq_lens,
            "layout": layout,
            "sink_len": 16,
        },
        "dequantize_pages": {"pages": case.pages, "page_ids": ids, "layout": layout, "out": out},
        "decode_attention": {"q": case.q, **case.kwargs, "out": torch.zeros(2, 6, 128, device=device).half()},
        "prefill_attention": {
            "q": torch.zeros(9, 6, 64, device=device).half(),
            **case.kwargs,
            "cu_seqlens_q": torch.tensor([0, 5, 9], dtype=torch.int32, device=device),
            "k": k[:9],
            "v": v[:9],
            "out": torch.zeros(9, 6, 128, device=device).half(),
        },
    }


def first_half(x: torch.Tensor) -> torch.Tensor:
    """Return the first half of the channels."""
    return x[..., : x.shape[-1] // 2]


def with_layout(*sizes: int) -> Callable:
    """Return a replacement by another layout."""
    return set_to(PageLayout(*sizes))


@pytest.mark.parametrize(
    ("function", "name", "change", "message"),
    [
        ("store_pages", "v", first_half, r"v: expected shape \[128, 2, 128\], got \[128, 2, 64\]"),
        ("store_pages", "layout", with_layout(128, 64, 4, 2), r"pages: expected shape \[\*, \*, 7424\]"),
        ("append_tokens", "v", first_half, r"raw_pages.shape\[4\]: expected 64, the larger head_dim of k and v, got 128"),
        ("append_tokens", "raw_pages", first_half, r"raw_pages.shape\[4\]: expected 128, the larger .*, got 64"),
        ("commit_pages", "raw_pages", first_half, r"raw_pages.shape\[4\]: expected 128, got 64"),
        ("dequantize_pages", "out", lambda x: x[:1] * 2, r"out\[1\]: expected shape \[2, 64, 2, 128\], got \[2, 64, 2, 64\]"),
        ("decode_attention", "raw_pages", first_half, r"raw_pages: expected shape \[\*, 2, 2, 64, 128\]"),
        ("decode_attention", "out", first_half, r"out: expected shape \[2, 6, 128\], got \[2, 6, 64\]"),
        ("decode_attention", "q", lambda x: torch.cat((x, x), -1), r"q: expected shape \[\*, \*, 64\]"),
        ("prefill_attention", "v", first_half, r"v: expected shape \[9, 2, 128\], got \[9, 2, 64\]"),
        ("prefill_attention", "out", first_half, r"out: expected shape \[9, 6, 128\], got \[9, 6, 64\]"),
    ],
)
def test_values_of_another_head_dim(function, name, change, message, device):
    """What has the channels of keys where it should have those of values is refused, and the other way round."""
    arguments = arguments_of_other_values(device)[function]
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(kvarn, function)(**arguments | {name: change(arguments[name])})
    getattr(kvarn, function)(**arguments)


def test_too_few_tokens(device):
    """Default token starts need page_size tokens for each id."""
    arguments = valid_arguments(device)["store_pages"] | {"token_starts": None}
    arguments |= {"k": arguments["k"][:127], "v": arguments["v"][:127]}
    with pytest.raises(ValueError, match="k: expected at least 128 tokens, got 127"):
        kvarn.store_pages(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, "iterations: expected an integer from 0 to 64, got -1"),
        ({"iterations": 65}, "iterations: .* got 65"),
        ({"iterations": 8.0}, "iterations: .* got 8.0"),
        ({"equivariant": 1}, "equivariant: expected True or False, got 1"),
        ({"clip": None}, "clip: expected True or False, got None"),
        ({"fits": 17}, "fits: expected an integer from 0 to 16, got 17"),
        ({"fits": True}, "fits: .* got True"),
        ({"norm": "squares"}, "norm: expected one of .*balance.*length.*, got 'squares'"),
    ],
)
def test_encoder(options, message):
    """Options of the encoder are checked when it is made."""
    with pytest.raises(ValueError, match=message):
        Encoder(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "halves"}, "form: expected one of dequantized, registers, folded, warp_groups, got 'halves'"),
        ({"block_m": 48}, "block_m: expected a power of two from 16 to 256, got 48"),
        ({"block_m": 64, "form": "registers"}, "block_m: expected a power of two from 16 to 32, got 64"),
        ({"num_warps": 0}, "num_warps: expected a power of two from 1 to 16, got 0"),
        ({"block_t": 8}, "block_t: expected a power of two from 16 to 128, got 8"),
        ({"block_r": 256}, "block_r: .* got 256"),
        ({"block_d": True}, "block_d: .* got True"),
        ({"num_stages": 0}, "num_stages: expected an integer of at least 1, got 0"),
        ({"programs_per_sm": 17}, "programs_per_sm: expected at most 16, got 17"),
    ],
)
def test_prefill_config(options, message):
    """Launch parameters are checked when they are made."""
    with pytest.raises(ValueError, match=f"^{message}"):
        PrefillConfig(**{"block_m": 32, "num_warps": 4, "block_t": 64, "block_r": 32} | options)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [(torch.float32, 64, "folded for float32 and 64 channels"), (torch.float16, 512, "folded for float16 and 512 channels")],
)
def test_the_only_form(dtype, head_dim, message, device):
    """Queries of float32, and many channels, have one form of the loop over pages; parameters of another are refused."""
    case = cache_case(PageLayout(head_dim, 64, 4, 2), [70], dtype=dtype, group=1, num_kv_heads=1, device=device)
    arguments = case.kwargs | {"q": case.q, "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32, device=device)}
    with pytest.raises(ValueError, match=f"^config.form: expected {message}, got 'dequantized'"):
        kvarn.prefill_attention(**arguments, config=PrefillConfig(16, 4, 64, 32))
    sizes = 1, 1, 1, 1, case.kwargs["layout"], 1, torch.device(device)
    with pytest.raises(ValueError, match=f"^config.form: expected {message}, got 'dequantized'"):
        kvarn.prefill_workspace_size(*sizes, dtype=dtype, config=PrefillConfig(16, 4, 64, 32))
    with pytest.raises(ValueError, match=r"^config: expected a PrefillConfig, got 'str'"):
        kvarn.prefill_workspace_size(*sizes, dtype=dtype, config="fast")


@pytest.mark.parametrize("function", ["decode_attention", "prefill_attention"])
def test_numbers_as_scale(function, device):
    """Numbers of numpy and integers are numbers."""
    arguments = valid_arguments(device)[function]
    call = getattr(kvarn, function)
    expected = call(**arguments, sm_scale=0.125).clone()
    assert torch.equal(call(**arguments, sm_scale=numpy.float32(0.125)), expected)
    assert torch.equal(call(**arguments, sm_scale=numpy.int64(2)), call(**arguments, sm_scale=2.0).clone())


@pytest.mark.skipif(not ON_GPU, reason="needs two kinds of device")
def test_wrong_device(device):
    """A tensor on another device is refused by name."""
    arguments = valid_arguments(device)["decode_attention"]
    with pytest.raises(ValueError, match="block_table: expected device cuda:0, got cpu"):
        kvarn.decode_attention(**arguments | {"block_table": arguments["block_table"].cpu()})


@pytest.mark.skipif(not ON_GPU, reason="the CPU has nothing to wait for")
def test_no_synchronization(device):
    """No function waits for the GPU (KF 31)."""
    arguments = valid_arguments(device) | valid_mla_arguments(device)
    for function, valid in arguments.items():
        getattr(kvarn, function)(**valid)  # compiled by now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function, valid in arguments.items():
            getattr(kvarn, function)(**valid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
