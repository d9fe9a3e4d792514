"""Ways to spoil an argument, and what is wrong with arguments that many functions take: what tables of errors are made of.

An entry of a table is (name of the argument, change that spoils it, what the message says of it).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvarn_triton import PageLayout

LAYOUT = PageLayout(64, 64, 4, 2)

AMONG = {"tree_mask": torch.int64, "span_ends": torch.int32}
"""What new tokens see of each other."""


def to(dtype: torch.dtype) -> Callable:
    """Return a change of dtype."""
    return lambda x: x.to(dtype)


def gapped(x: torch.Tensor) -> torch.Tensor:
    """Return the values of a tensor in every other element of memory."""
    return torch.stack((x, x), dim=-1)[..., 0]


def unaligned(pages: torch.Tensor) -> torch.Tensor:
    """Return pages that start 8 bytes past a multiple of 16."""
    memory = torch.zeros(pages.numel() + 8, dtype=torch.uint8, device=pages.device)
    return memory[8:].view(pages.shape)


def set_to(value: object) -> Callable:
    """Return a replacement by a value."""
    return lambda _: value


PAGE_BYTES = LAYOUT.page_bytes
NOT_A_TENSOR = (set_to([1, 2]), "expected a tensor, got list")
GAPPED = (gapped, "expected the last dimension contiguous, got strides")
PAGES = [
    ("pages", *NOT_A_TENSOR),
    ("pages", to(torch.int8), "expected dtype uint8, got int8"),
    ("pages", lambda x: x[..., :-16], rf"expected shape \[\*, \*, {PAGE_BYTES}\], got \[\d+, 2, {PAGE_BYTES - 16}\]"),
    ("pages", lambda x: x[0], r"expected shape \[\*, \*, "),
    ("pages", gapped, "expected the last dimension contiguous"),
    ("pages", unaligned, "expected address and outer strides in multiples of 16 bytes"),
]
TILES = [
    ("tiles", *NOT_A_TENSOR),
    ("tiles", to(torch.float64), "expected dtype float16 or bfloat16 or float32, got float64"),
    ("tiles", lambda x: x[0, 0], r"expected shape \[..., page_size, head_dim\], got \[64\]"),
    ("tiles", lambda x: x[:, :32].contiguous(), r"tiles.shape\[-2\]: expected one of 64, 128, got 32"),
    ("tiles", lambda x: x[..., :48].contiguous(), r"tiles.shape\[-1\]: expected one of 64, .*, got 48"),
    ("tiles", lambda x: x.transpose(1, 2), "expected the last 3 dimensions contiguous, got strides"),
]
CODES = [
    ("codes", to(torch.int32), "expected dtype uint8, got int32"),
    ("codes", lambda x: x[:, :63].contiguous(), r"codes.shape\[-2\]: expected one of 64, 128, got 63"),
    ("codes", gapped, "expected the last 3 dimensions contiguous"),
]
BITS = [("bits", set_to(bits), f"bits: expected one of 2, 3, 4, 5, 6, 8, got {bits}") for bits in (1, 7, 16)]
PER = [("per", set_to("row"), "per: expected one of channel, token, got 'row'")]
TOKENS = [
    ("k", to(torch.int32), "expected dtype float16 or bfloat16 or float32, got int32"),
    ("k", lambda x: x[:, :1], r"expected shape \[\*, 2, 64\], got \[128, 1, 64\]"),
    ("k", lambda x: x[..., :32], r"expected shape \[\*, 2, 64\]"),
    ("k", *GAPPED),
    ("v", to(torch.float32), "expected dtype float16, got float32"),
    ("v", lambda x: x[:-1], r"expected shape \[128, 2, 64\], got \[127, 2, 64\]"),
    ("v", *GAPPED),
]
RAW = [
    ("raw_pages", to(torch.float64), "expected dtype float16 or bfloat16 or float32, got float64"),
    ("raw_pages", lambda x: x[:, :1], r"expected shape \[\*, 2, .*, got \["),
    ("raw_pages", *GAPPED),
]
RAW_TABLE = [
    ("raw_table", to(torch.int64), "expected dtype int32, got int64"),
    ("raw_table", lambda x: x[:1], r"expected shape \[2, \*\], got \[1, 3\]"),
    ("raw_table", lambda x: x[:, :1], "expected at least 2 columns .sink pages and one tail slot., got 1"),
    ("sink_len", set_to(-1), "sink_len: expected an integer of at least 0, got -1"),
    ("sink_len", set_to(16.0), "sink_len: expected an integer of at least 0, got 16.0"),
]
BLOCK_TABLE = [
    ("block_table", to(torch.int64), "expected dtype int32, got int64"),
    ("block_table", lambda x: x[0], r"expected shape \[.*\], got \[\d+\]"),
    ("num_quantized", to(torch.int64), "expected dtype int32, got int64"),
    ("num_quantized", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
    ("block_table", set_to(None), "expected a tensor, or kv_indptr and kv_indices, got None"),
    ("kv_indptr", set_to(torch.zeros(3, dtype=torch.int32)), "expected None beside block_table, got 'Tensor'"),
    ("kv_indices", set_to([1, 2]), "expected None beside block_table, got 'list'"),
]
SCALE = [
    ("sm_scale", set_to(value), "sm_scale: expected None or a finite number .up to 1e30., got ")
    for value in (torch.tensor(0.125), float("nan"), float("inf"), "0.125", True)
]
MASKS = [
    ("tree_mask", *NOT_A_TENSOR),
    ("tree_mask", to(torch.int32), "expected dtype int64, got int32"),
    ("tree_mask", lambda x: x[:8], r"expected shape \[9\], got \[8\]"),
    ("tree_mask", *GAPPED),
    ("span_ends", to(torch.int64), "expected dtype int32, got int64"),
    ("span_ends", lambda x: x[None], r"expected shape \[9\], got \[1, 9\]"),
    ("span_ends", *GAPPED),
]
STEP = [("step", set_to(value), "step: expected a Step, got ") for value in (None, 3)]
