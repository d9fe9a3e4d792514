"""Valid arguments of the functions of a step, and ways to spoil each, as in `error_cases.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from error_helpers import (
    AMONG,
    BLOCK_TABLE,
    GAPPED,
    LAYOUT,
    MASKS,
    NOT_A_TENSOR,
    PAGES,
    RAW,
    RAW_TABLE,
    SCALE,
    STEP,
    set_to,
    to,
)

from kvarn_triton import plan_step
from kvarn_triton.testing import cache_case


def arguments_of_steps(device: torch.device) -> dict[str, dict]:
    """Return valid keyword arguments of the functions of a step, which has 5 tokens of one sequence and 4 of another."""
    case = cache_case(LAYOUT, [150, 70], group=3, sink_len=16, device=device)
    plan = {
        "layout": LAYOUT,
        "seq_lens": case.seq_lens,
        "cu_seqlens_q": torch.tensor([0, 5, 9], dtype=torch.int32, device=device),
        "block_table": case.block_table,
        "raw_table": case.raw_table,
        "num_tokens": 9,
        "sink_len": 16,
        "prefix_lens": torch.zeros(2, dtype=torch.int32, device=device),
    }
    q = torch.randn(9, 6, 64, device=device).half()
    new = {name: torch.randn(9, 2, 64, device=device).half() for name in ("k", "v")}
    pools = {"pages": case.pages, "raw_pages": case.raw_pages, "step": plan_step(**plan)}
    scratch = torch.zeros(case.block_table.numel(), 2, 2, 64, 64, device=device).half()
    attention = {"window": 100, "soft_cap": 30.0, "sinks": torch.zeros(6, device=device), "scratch": scratch}
    attention |= {name: torch.zeros(9, dtype=kind, device=device) for name, kind in AMONG.items()}
    ids = torch.tensor([0, 1], dtype=torch.int32, device=device)
    read = {name: torch.randn(2, 2, 200, 64, device=device) for name in ("k", "v")}
    return {
        "plan_step": plan,
        "write_tokens": {**new, **pools},
        "attend": {"q": q, **new, **pools, **attention, "out": torch.zeros_like(q)},
        "read_tokens": {**read, **pools, "starts": ids},
        "cut_tokens": {**pools, "new_lens": case.seq_lens - 30},
        "copy_raw_pages": {"raw_pages": case.raw_pages, "sources": ids, "targets": ids + 2},
    }


WRONG_STEPS: dict[str, list[tuple[str, Callable, str]]] = {
    "plan_step": [
        *RAW_TABLE,
        *BLOCK_TABLE[:2],
        *BLOCK_TABLE[4:],
        ("seq_lens", *NOT_A_TENSOR),
        ("seq_lens", to(torch.int64), "expected dtype int32, got int64"),
        ("cu_seqlens_q", lambda x: x[:2], r"expected shape \[3\], got \[2\]"),
        ("num_tokens", set_to(None), "num_tokens: expected an integer of at least 0, got None"),
        ("num_tokens", set_to(9.0), "num_tokens: expected an integer of at least 0, got 9.0"),
        ("max_query_len", set_to(-1), "max_query_len: expected an integer of at least 0, got -1"),
        ("rows", set_to(torch.zeros(2)), "expected dtype int32, got float32"),
        ("rows", set_to(torch.zeros(1, dtype=torch.int32)), r"expected shape \[2\], got \[1\]"),
        ("prefix_lens", to(torch.int64), "expected dtype int32, got int64"),
        ("prefix_lens", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
        ("sink_columns", set_to(1), "sink_columns: expected a bool, got 1"),
        ("sink_columns", set_to(True), "sink_columns: expected False where sink_len is no multiple of 64, got True"),
        ("pages_per_block", set_to(0), "pages_per_block: expected an integer of at least 1, got 0"),
        ("max_drafts", set_to(-1), "max_drafts: expected an integer of at least 0, got -1"),
        (
            "max_drafts",
            set_to(100),
            "expected a number for which the 2 tail slots of raw_table suffice .5 are needed., got 100",
        ),
        ("early_pages", set_to(1), "early_pages: expected a bool, got 1"),
        ("out", set_to(3), "out: expected a Step, got 'int'"),
    ],
    "write_tokens": [
        *PAGES,
        *STEP,
        ("raw_pages", lambda x: x[:, :1], r"expected shape \[\*, 2, 2, 64, 64\], got "),
        ("raw_pages", *GAPPED),
        ("k", to(torch.int32), "expected dtype float16 or bfloat16 or float32, got int32"),
        ("k", lambda x: x[:8], r"expected shape \[9, 2, 64\], got \[8, 2, 64\]"),
        ("k", lambda x: x[None].expand(2, -1, -1, -1), "k: expected 9 tokens in all, got '2 sequences'"),
        ("k", lambda x: x[None], r"expected shape \[1, 2, 9, 64\], got \[1, 9, 2, 64\]"),
        ("k", *GAPPED),
        ("v", to(torch.float32), "expected dtype float16, got float32"),
        ("v", *GAPPED),
    ],
    "attend": [
        *PAGES,
        *STEP,
        *SCALE,
        ("q", lambda x: x[:8], r"expected shape \[9, \*, 64\], got \[8, 6, 64\]"),
        ("q", *NOT_A_TENSOR),
        ("q", lambda x: x[:, :5], "expected a multiple of the 2 kv heads of pages as query heads, got 5"),
        ("v", set_to(None), "expected a tensor beside k, and None without it, got None"),
        ("k", lambda x: x[:8], r"expected shape \[9, 2, 64\], got \[8, 2, 64\]"),
        ("out", lambda x: x[:1], r"expected shape \[9, 6, 64\], got \[1, 6, 64\]"),
        ("window", set_to(0), "window: expected None or an integer from 1 to 2147483647, got 0"),
        ("split_size", set_to(0), "split_size: expected an integer of at least 1, got 0"),
        ("workspace", set_to(torch.zeros(8)), "expected dtype uint8, got float32"),
        ("scratch", lambda x: x[1:], r"expected a slot for each of the (\d+) entries of block_table, got \d+"),
        *MASKS,
        ("past_only", set_to(True), "past_only: expected False beside k, got True"),
    ],
    "read_tokens": [
        *PAGES,
        *STEP,
        ("k", to(torch.int32), "expected dtype float16 or bfloat16 or float32, got int32"),
        ("k", lambda x: x[:1], r"expected shape \[2, 2, \*, 64\], got \[1, 2, 200, 64\]"),
        ("v", lambda x: x[:, :, :199], r"expected shape \[2, 2, 200, 64\], got \[2, 2, 199, 64\]"),
        ("v", to(torch.float16), "expected dtype float32, got float16"),
        ("v", *GAPPED),
        ("starts", to(torch.int64), "expected dtype int32, got int64"),
        ("starts", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
    ],
    "cut_tokens": [
        *PAGES,
        *STEP,
        ("raw_pages", *GAPPED),
        ("new_lens", to(torch.int64), "expected dtype int32, got int64"),
        ("new_lens", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
    ],
    "copy_raw_pages": [
        *RAW[:1],
        *RAW[2:],
        ("sources", to(torch.int64), "expected dtype int32, got int64"),
        ("targets", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
        ("targets", to(torch.int64), "expected dtype int32, got int64"),
    ],
}
