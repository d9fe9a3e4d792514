"""Valid arguments of the functions of latent attention, and ways to spoil each, as in `error_cases.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from error_helpers import GAPPED, NOT_A_TENSOR, STEP, gapped, set_to, to, unaligned

from kvarn_triton import MLALayout, PageLayout, plan_step
from kvarn_triton.testing.latents import latent_case

LAYOUT = MLALayout(4, 64)


def valid_mla_arguments(device: torch.device) -> dict[str, dict]:
    """Return valid keyword arguments of every function of latent attention that takes tensors."""
    call = latent_case(LAYOUT, [150, 70], num_heads=3, sink_len=64, num_tail_slots=1)
    call = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    latents, rope = torch.randn(128, 576, device=device).half().split([512, 64], dim=1)
    ids = torch.tensor([1, 0], dtype=torch.int32, device=device)
    out = torch.zeros(2, 64, 512, device=device), torch.zeros(2, 64, 64, device=device)
    tables = {name: call[name] for name in ("raw_pages", "pages", "raw_table", "block_table", "num_quantized")}
    plan = plan_step(LAYOUT.keys, call["seq_lens"], None, call["block_table"], call["raw_table"], sink_len=64)
    step = {"pages": call["pages"], "raw_pages": call["raw_pages"], "step": plan, "layout": LAYOUT}
    return {
        "mla_store_pages": {
            "latents": latents,
            "rope": rope,
            "pages": call["pages"],
            "page_ids": ids,
            "layout": LAYOUT,
            "token_starts": ids,
        },
        "mla_append_tokens": {
            "latents": latents[:5],
            "rope": rope[:5],
            "raw_pages": call["raw_pages"],
            "slots": torch.arange(5, device=device),
        },
        "mla_commit_pages": {**tables, "committed_lens": call["seq_lens"], "layout": LAYOUT, "sink_len": 64},
        "mla_dequantize_pages": {"pages": call["pages"], "page_ids": ids, "layout": LAYOUT, "out": out},
        "mla_decode_attention": {
            **call,
            "out": torch.zeros(2, 3, 512, device=device).half(),
            "indices": torch.tensor([[3, -1, 140], [0, 69, 70]], dtype=torch.int32, device=device),
        },
        "mla_write_tokens": {"latents": latents[:2], "rope": rope[:2], **step},
        "mla_attend": {"q": call["q"], **step, "sm_scale": 0.1},
    }


PAGES = [
    ("pages", *NOT_A_TENSOR),
    ("pages", to(torch.int8), "expected dtype uint8, got int8"),
    ("pages", lambda x: x[..., :-16], rf"expected shape \[\*, {LAYOUT.page_bytes}\], got \[\d+, {LAYOUT.page_bytes - 16}\]"),
    ("pages", lambda x: x[0], r"expected shape \[\*, "),
    ("pages", gapped, "expected the last dimension contiguous"),
    ("pages", unaligned, "expected address and outer strides in multiples of 16 bytes"),
    ("layout", set_to("k4"), "layout: expected an MLALayout, got 'str'"),
]
TOKENS = [
    ("latents", *NOT_A_TENSOR),
    ("latents", to(torch.int32), "expected dtype float16 or bfloat16 or float32, got int32"),
    ("latents", lambda x: x[:, :256], r"expected shape \[\*, 512\], got "),
    ("latents", *GAPPED),
    ("rope", to(torch.float32), "expected dtype float16, got float32"),
    ("rope", lambda x: x[:-1], r"expected shape \[\d+, 64\], got "),
    ("rope", *GAPPED),
]
TABLES = [
    ("raw_pages", to(torch.bfloat16), "expected dtype float16, got bfloat16"),
    ("raw_pages", lambda x: x[:, :, :512], r"expected shape \[\*, 64, 576\], got "),
    ("raw_pages", *GAPPED),
    ("raw_table", to(torch.int64), "expected dtype int32, got int64"),
    ("raw_table", lambda x: x[:1], r"expected shape \[2, \*\], got \[1, 2\]"),
    ("raw_table", lambda x: x[:, :1], "expected at least 2 columns .sink pages and one tail slot., got 1"),
    ("sink_len", set_to(-64), "sink_len: expected a multiple of 64, the page_size, got -64"),
    ("sink_len", set_to(16), "sink_len: expected a multiple of 64, the page_size, got 16"),
    ("block_table", to(torch.int64), "expected dtype int32, got int64"),
    ("block_table", lambda x: x[0], r"expected shape \[\*, \*\], got \[\d+\]"),
    ("num_quantized", to(torch.int64), "expected dtype int32, got int64"),
    ("num_quantized", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
]
PLANS = [
    *STEP,
    ("step", lambda x: dataclasses.replace(x, block_table=None), "step: expected a plan with a block_table, got "),
    ("step", lambda x: dataclasses.replace(x, sink_lens=x.seq_lens), "step: expected a plan without sink_columns, got "),
    ("step", lambda x: dataclasses.replace(x, sink_len=16), "step: expected a plan whose sink_len is a multiple of 64, got 16"),
    ("step", lambda x: dataclasses.replace(x, layout=PageLayout(512, 128, 4, 4)), "step: expected pages of 64 tokens, got 128"),
    ("raw_pages", set_to(None), "raw_pages: expected a tensor, got 'NoneType'"),
    ("raw_pages", to(torch.bfloat16), "expected dtype float16, got bfloat16"),
]
WRONG_MLA: dict[str, list[tuple[str, Callable, str]]] = {
    "mla_store_pages": [
        *PAGES,
        *TOKENS,
        ("page_ids", to(torch.int16), "expected dtype int32 or int64, got int16"),
        ("token_starts", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
    ],
    "mla_append_tokens": [
        *TOKENS,
        ("raw_pages", to(torch.float32), "expected dtype float16, got float32"),
        ("raw_pages", *GAPPED),
        ("slots", to(torch.float32), "expected dtype int32 or int64, got float32"),
        ("slots", lambda x: x[:4], r"expected shape \[5\], got \[4\]"),
    ],
    "mla_commit_pages": [
        *PAGES,
        *TABLES,
        ("raw_pages", set_to(None), "raw_pages: expected a tensor, got 'NoneType'"),
        ("committed_lens", to(torch.int64), "expected dtype int32, got int64"),
    ],
    "mla_dequantize_pages": [
        *PAGES,
        ("page_ids", to(torch.int16), "expected dtype int32 or int64, got int16"),
        ("dtype", set_to(torch.float64), "dtype: expected one of .*, got torch.float64"),
        ("out", lambda out: out[0], "out: expected a tuple of two tensors, got 'Tensor'"),
        ("out", lambda out: (out[0][:1], out[1]), r"out\[0\]: expected shape \[2, 64, 512\], got \[1, 64, 512\]"),
        ("out", lambda out: (out[0], out[1].half()), r"out\[1\]: expected dtype float32, got float16"),
    ],
    "mla_decode_attention": [
        *PAGES,
        *TABLES,
        ("q", *NOT_A_TENSOR),
        ("q", to(torch.float32), "expected dtype float16 or bfloat16, got float32"),
        ("q", lambda x: x[..., :512], r"expected shape \[2, \*, 576\], got \[2, 3, 512\]"),
        ("q", lambda x: x[:1], r"expected shape \[2, \*, 576\], got \[1, 3, 576\]"),
        ("q", *GAPPED),
        ("seq_lens", to(torch.int64), "expected dtype int32, got int64"),
        ("raw_pages", set_to(None), "expected a tensor beside raw_table, num_quantized or sink_len, got None"),
        ("raw_table", set_to(None), "expected a tensor, got NoneType"),
        ("num_quantized", set_to(None), "expected a tensor, got NoneType"),
        ("out", to(torch.float32), "expected dtype float16, got float32"),
        ("out", lambda x: x[:1], r"expected shape \[2, 3, 512\], got \[1, 3, 512\]"),
        ("indices", to(torch.int64), "expected dtype int32, got int64"),
        ("indices", lambda x: x[0], r"expected shape \[2, \*\], got \[3\]"),
        ("indices", lambda x: x[:1], r"expected shape \[2, \*\], got \[1, 3\]"),
        ("indices", lambda x: x[:, None], r"expected shape \[2, \*\], got \[2, 1, 3\]"),
        ("indices", *GAPPED),
        ("pages", lambda x: x[:1].expand(2**25, -1), r"expected less than 2\*\*31 tokens beside indices, got \[33554432, "),
        ("raw_pages", lambda x: x[:1].expand(2**25, -1, -1), r"expected less than 2\*\*31 tokens beside indices, got "),
        ("num_splits", set_to(0), "num_splits: expected an integer of at least 1, got 0"),
        ("config", set_to({}), "config: expected an MLAConfig, got 'dict'"),
        *[
            ("sm_scale", set_to(value), r"sm_scale: expected a finite number \(up to 1e30\), got ")
            for value in (None, True, "1", float("nan"), float("inf"), torch.tensor(1.0))
        ],
    ],
    "mla_write_tokens": [
        *PAGES,
        *TOKENS,
        *PLANS,
        ("latents", lambda x: x[:1], "latents: expected 2 tokens, got 1"),
    ],
    "mla_attend": [
        *PAGES,
        *PLANS,
        ("q", to(torch.float32), "expected dtype float16 or bfloat16, got float32"),
        ("indices", set_to(torch.zeros(2, 3).long()), "expected dtype int32, got int64"),
        ("num_splits", set_to(0), "num_splits: expected an integer of at least 1, got 0"),
    ],
}
