"""Valid arguments of every function that takes tensors, and ways to spoil each, with the messages that name them.

Functions of a step have theirs in `step_errors.py`; latent attention is apart, in `mla_errors.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from error_helpers import (
    AMONG,
    BITS,
    BLOCK_TABLE,
    CODES,
    GAPPED,
    LAYOUT,
    MASKS,
    NOT_A_TENSOR,
    PAGES,
    PER,
    RAW,
    RAW_TABLE,
    SCALE,
    TILES,
    TOKENS,
    gapped,
    set_to,
    to,
)
from step_errors import WRONG_STEPS, arguments_of_steps

from kvarn_triton import PrefillConfig
from kvarn_triton.testing import cache_case


def valid_arguments(device: torch.device) -> dict[str, dict]:
    """Return valid keyword arguments of every function that takes tensors."""
    case = cache_case(LAYOUT, [150, 70], group=3, sink_len=16, device=device)
    tokens = {name: torch.randn(128, 2, 64, device=device).half() for name in ("k", "v")}
    ids = torch.tensor([1, 0], dtype=torch.int32, device=device)
    tile = torch.randn(2, 64, 64, device=device)
    codes = torch.zeros(2, 64, 64, dtype=torch.uint8, device=device)
    scale = torch.ones(2, 64, device=device)
    state, lse = torch.randn(2, 6, 64, device=device), torch.zeros(2, 6, device=device)
    tables = {"raw_pages": case.raw_pages, "raw_table": case.raw_table, "num_quantized": case.num_quantized}
    out = torch.randn(2, 64, 2, 64, device=device)
    options = {"window": 100, "soft_cap": 30.0, "sinks": torch.zeros(6, device=device)}
    among = {name: torch.zeros(9, dtype=kind, device=device) for name, kind in AMONG.items()}
    return {
        "hadamard": {"x": torch.randn(3, 64, device=device), "out": torch.randn(3, 64, device=device)},
        "variance_normalize": {"tiles": tile, "per": "channel"},
        "quantize": {"tiles": tile, "bits": 4, "per": "channel"},
        "dequantize": {"codes": codes, "scale": scale, "zero": scale, "per": "token"},
        "pack": {"codes": codes, "bits": 4, "per": "channel"},
        "unpack": {
            "packed": codes.view(2, 4096)[:, :2048].contiguous(),
            "bits": 4,
            "page_size": 64,
            "head_dim": 64,
            "per": "token",
        },
        "store_pages": {**tokens, "pages": case.pages, "page_ids": ids, "layout": LAYOUT, "token_starts": ids},
        "append_tokens": {**tokens, "raw_pages": case.raw_pages, "slots": torch.arange(128, device=device)},
        "raw_slots": {
            "positions": torch.arange(6, device=device).view(2, 3),
            "raw_table": case.raw_table,
            "sink_len": 16,
            "page_size": 64,
        },
        "commit_pages": {
            **tables,
            "pages": case.pages,
            "block_table": case.block_table,
            "committed_lens": case.seq_lens + 100,
            "layout": LAYOUT,
            "sink_len": 16,
        },
        "cut_back": {
            **tables,
            "pages": case.pages,
            "block_table": case.block_table,
            "new_lens": case.seq_lens - 100,
            "layout": LAYOUT,
            "sink_len": 16,
        },
        "dequantize_pages": {"pages": case.pages, "page_ids": ids, "layout": LAYOUT, "out": (out, out.clone())},
        "decode_attention": {"q": case.q, **case.kwargs, "out": torch.empty_like(case.q), **options},
        "prefill_attention": {
            "q": torch.randn(9, 6, 64, device=device).half(),
            **case.kwargs,
            "cu_seqlens_q": torch.tensor([0, 5, 9], dtype=torch.int32, device=device),
            "k": torch.randn(9, 2, 64, device=device).half(),
            "v": torch.randn(9, 2, 64, device=device).half(),
            "out": torch.zeros(9, 6, 64, device=device).half(),
            "scratch": torch.zeros(case.block_table.numel(), 2, 2, 64, 64, device=device).half(),
            **among,
            **options,
        },
        "build_tree_mask": {
            "parents": torch.zeros(9, dtype=torch.int64, device=device),
            "cu_seqlens_q": torch.tensor([0, 5, 9], dtype=torch.int32, device=device),
        },
        "merge_states": {"out_a": state, "lse_a": lse, "out_b": state, "lse_b": lse},
        **arguments_of_steps(device),
    }


WRONG: dict[str, list[tuple[str, Callable, str]]] = {
    "hadamard": [
        ("x", *NOT_A_TENSOR),
        ("x", to(torch.int32), "expected dtype float16 or bfloat16 or float32, got int32"),
        ("x", lambda x: x[:, :48], r"x.shape\[-1\]: expected one of 64, .*, got 48"),
        ("x", *GAPPED),
        ("out", lambda x: x[:2], r"expected shape \[3, 64\], got \[2, 64\]"),
        ("out", to(torch.float16), "expected dtype float32, got float16"),
        ("out", gapped, "expected the last 2 dimensions contiguous"),
        *[
            ("block_size", set_to(size), f"block_size: expected a power of two from 2 to 64, got {size}")
            for size in (0, 1, 48, 128)
        ],
    ],
    "variance_normalize": TILES + PER,
    "quantize": TILES + BITS + PER,
    "dequantize": [
        *CODES,
        *PER,
        ("scale", to(torch.float64), "expected dtype float16 or float32, got float64"),
        ("scale", lambda x: x[:, :32], r"expected shape \[2, 64\], got \[2, 32\]"),
        ("scale", gapped, "expected the last 2 dimensions contiguous"),
        ("zero", to(torch.float16), "expected dtype float32, got float16"),
        ("zero", lambda x: x[0], r"expected shape \[2, 64\], got \[64\]"),
    ],
    "pack": CODES + BITS + PER,
    "unpack": [
        *BITS,
        *PER,
        ("page_size", set_to(32), "page_size: expected one of 64, 128, got 32"),
        ("head_dim", set_to(72), "head_dim: expected one of 64, .*, got 72"),
        ("packed", to(torch.int8), "expected dtype uint8, got int8"),
        ("packed", lambda x: x[:, :-2], r"expected shape \[\*, 2048\], got \[2, 2046\]"),
        ("packed", gapped, "expected the last 2 dimensions contiguous"),
    ],
    "store_pages": [
        *PAGES,
        *TOKENS,
        ("page_ids", to(torch.int16), "expected dtype int32 or int64, got int16"),
        ("page_ids", lambda x: x[None], r"expected shape \[\*\], got \[1, 2\]"),
        ("page_ids", *GAPPED),
        ("token_starts", to(torch.float32), "expected dtype int32 or int64, got float32"),
        ("token_starts", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
    ],
    "append_tokens": [
        *[wrong for wrong in TOKENS if "64\\]" not in wrong[2]],
        *RAW,
        ("k", lambda x: x[:, :1], r"expected shape \[\*, 2, \*\], got \[128, 1, 64\]"),
        ("k", lambda x: x[..., :32], r"k.shape\[2\]: expected one of 64, .*, 512, got 32"),
        ("v", lambda x: x[:-1], r"expected shape \[128, 2, \*\], got \[127, 2, 64\]"),
        ("v", lambda x: x[..., :48], r"v.shape\[2\]: expected one of 64, .*, 512, got 48"),
        (
            "raw_pages",
            lambda x: torch.cat((x, x), 4),
            r"raw_pages.shape\[4\]: expected 64, the larger head_dim of k and v, got 128",
        ),
        ("raw_pages", lambda x: x[:, :, :, :32], r"raw_pages.shape\[3\]: expected one of 64, 128, got 32"),
        ("raw_pages", lambda x: x[..., :48], r"raw_pages.shape\[4\]: expected one of 64, .*, got 48"),
        ("slots", to(torch.float32), "expected dtype int32 or int64, got float32"),
        ("slots", lambda x: x[:5], r"expected shape \[128\], got \[5\]"),
    ],
    "raw_slots": [
        *RAW_TABLE,
        ("positions", to(torch.float32), "expected dtype int32 or int64, got float32"),
        ("positions", lambda x: x[0], r"expected shape \[\*, \*\], got \[3\]"),
        ("page_size", set_to(16), "page_size: expected one of 64, 128, got 16"),
    ],
    "commit_pages": [
        *PAGES,
        *RAW,
        *RAW_TABLE,
        *BLOCK_TABLE,
        ("raw_pages", lambda x: torch.cat((x, x), 3), r"raw_pages.shape\[3\]: expected 64, got 128"),
        ("raw_pages", lambda x: torch.cat((x, x), 4), r"raw_pages.shape\[4\]: expected 64, got 128"),
        ("committed_lens", to(torch.int64), "expected dtype int32, got int64"),
        ("committed_lens", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
        ("keep_pages", set_to(-1), "keep_pages: expected an integer of at least 0, got -1"),
        ("max_new_pages", set_to(0), "max_new_pages: expected an integer of at least 1, got 0"),
    ],
    "cut_back": [
        *PAGES,
        *RAW,
        *RAW_TABLE,
        *BLOCK_TABLE,
        ("new_lens", to(torch.int64), "expected dtype int32, got int64"),
        ("new_lens", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
    ],
    "dequantize_pages": [
        *PAGES,
        ("page_ids", to(torch.int16), "expected dtype int32 or int64, got int16"),
        ("dtype", set_to(torch.float64), "dtype: expected one of .*, got torch.float64"),
        ("out", lambda out: out[0], "out: expected a tuple of two tensors, got 'Tensor'"),
        ("out", lambda out: (out[0][:1], out[1]), r"out\[0\]: expected shape \[2, 64, 2, 64\], got \[1, 64, 2, 64\]"),
        ("out", lambda out: (out[0], out[1].half()), r"out\[1\]: expected dtype float32, got float16"),
        ("out", lambda out: (gapped(out[0]), out[1]), r"out\[0\]: expected the last dimension contiguous"),
    ],
    "decode_attention": [
        *PAGES,
        *RAW,
        *RAW_TABLE,
        *BLOCK_TABLE,
        ("q", to(torch.float64), "expected dtype float16 or bfloat16 or float32, got float64"),
        ("q", lambda x: x[..., :32], r"expected shape \[\*, \*, 64\], got \[2, 6, 32\]"),
        ("q", *GAPPED),
        ("q", lambda x: x[:, :5], "expected a multiple of the 2 kv heads of pages as query heads, got 5"),
        ("q", lambda x: x[:, :0], "expected a multiple of the 2 kv heads of .*, got 0"),
        ("seq_lens", to(torch.int64), "expected dtype int32, got int64"),
        ("seq_lens", lambda x: x[:1], r"expected shape \[2\], got \[1\]"),
        ("raw_pages", set_to(None), "expected a tensor beside raw_table, num_quantized or sink_len, got None"),
        ("raw_table", set_to(None), "expected a tensor, got NoneType"),
        ("num_quantized", set_to(None), "expected a tensor, got NoneType"),
        ("out", to(torch.float32), "expected dtype float16, got float32"),
        ("out", lambda x: x[:1], r"expected shape \[2, 6, 64\], got \[1, 6, 64\]"),
        ("window", set_to(0), "window: expected None or an integer from 1 to 2147483647, got 0"),
        ("window", set_to(2**31), "window: expected None or an integer from 1 to 2147483647, got 2147483648"),
        ("window", set_to(2.0), "window: expected None or an integer .*, got 2.0"),
        ("soft_cap", set_to(0), "soft_cap: expected None or a number above 0 .from 1e-30 to 1e30., got 0"),
        ("soft_cap", set_to(-30.0), "soft_cap: expected None or a number above 0 .*, got -30.0"),
        ("soft_cap", set_to(float("nan")), "soft_cap: expected None or a number above 0 .*, got nan"),
        ("soft_cap", set_to(float("inf")), "soft_cap: expected None or a number above 0 .*, got inf"),
        ("soft_cap", set_to("30"), "soft_cap: expected None or a number above 0 .*, got '30'"),
        ("sinks", set_to(1.0), "expected a tensor, got float"),
        ("sinks", to(torch.float16), "expected dtype float32, got float16"),
        ("sinks", lambda x: x[:5], r"expected shape \[6\], got \[5\]"),
        ("sinks", *GAPPED),
        *SCALE,
        ("split_size", set_to(0), "split_size: expected an integer of at least 1, got 0"),
        ("split_size", set_to(True), "split_size: expected an integer of at least 1, got True"),
        ("workspace", set_to(torch.zeros(8)), "expected dtype uint8, got float32"),
    ],
    "prefill_attention": [
        *PAGES,
        *RAW,
        *RAW_TABLE,
        *BLOCK_TABLE,
        ("q", to(torch.float64), "expected dtype float16 or bfloat16 or float32, got float64"),
        ("q", lambda x: x[:, :5], "expected a multiple of the 2 kv heads of pages as query heads, got 5"),
        ("seq_lens", set_to(None), "expected a tensor, got NoneType"),
        ("cu_seqlens_q", to(torch.int64), "expected dtype int32, got int64"),
        ("cu_seqlens_q", lambda x: x[:2], r"expected shape \[3\], got \[2\]"),
        ("k", lambda x: x[:8], r"expected shape \[9, 2, 64\], got \[8, 2, 64\]"),
        ("k", to(torch.float32), "expected dtype float16, got float32"),
        ("v", set_to(None), "expected a tensor beside k, and None without it, got None"),
        ("v", to(torch.float32), "expected dtype float16, got float32"),
        ("v", *GAPPED),
        ("out", lambda x: x[:1], r"expected shape \[9, 6, 64\], got \[1, 6, 64\]"),
        ("window", set_to(0), "window: expected None or an integer from 1 to 2147483647, got 0"),
        ("soft_cap", set_to(-1.0), "soft_cap: expected None or a number above 0 .*, got -1.0"),
        ("sinks", lambda x: x[:5], r"expected shape \[6\], got \[5\]"),
        *SCALE,
        ("split_size", set_to(0), "split_size: expected an integer of at least 1, got 0"),
        ("split_size", set_to(True), "split_size: expected an integer of at least 1, got True"),
        ("workspace", set_to(torch.zeros(8)), "expected dtype uint8, got float32"),
        ("scratch", to(torch.float32), "expected dtype float16 or bfloat16, got float32"),
        ("scratch", lambda x: x[:, :1], r"expected shape \[\*, 2, 2, 64, 64\], got \[.*, 1, 2, 64, 64\]"),
        ("scratch", lambda x: x[1:], r"expected a slot for each of the (\d+) entries of block_table, got \d+"),
        ("past_only", set_to(True), "past_only: expected False beside k, got True"),
        ("past_only", set_to(1), "past_only: expected a bool, got 1"),
        ("config", set_to({}), "config: expected a PrefillConfig, got 'dict'"),
        ("config", set_to(PrefillConfig(16, 4, 64, 128)), "config.block_r: expected at most 64, the page_size, got 128"),
        ("config", set_to(PrefillConfig(16, 2, 64, 16, form="registers")), "config.form: expected dequantized with scratch"),
        ("scratch", *GAPPED),
        *MASKS,
    ],
    "build_tree_mask": [
        ("parents", *NOT_A_TENSOR),
        ("parents", to(torch.float32), "expected dtype int32 or int64, got float32"),
        ("parents", lambda x: x[None], r"expected shape \[\*\], got \[1, 9\]"),
        ("cu_seqlens_q", to(torch.int64), "expected dtype int32, got int64"),
        ("cu_seqlens_q", lambda x: x[:0], "expected at least 1 element, got 0"),
    ],
    "merge_states": [
        ("out_a", *NOT_A_TENSOR),
        ("out_a", to(torch.int32), "expected dtype float16 or bfloat16 or float32, got int32"),
        ("out_a", gapped, "expected the last 3 dimensions contiguous"),
        ("lse_a", to(torch.float16), "expected dtype float32, got float16"),
        ("lse_a", lambda x: x[..., None], r"expected shape \[2, 6\], got \[2, 6, 1\]"),
        ("out_b", to(torch.float16), "expected dtype float32, got float16"),
        ("out_b", lambda x: x[:1], r"expected shape \[2, 6, 64\], got \[1, 6, 64\]"),
        ("lse_b", lambda x: x[:1], r"expected shape \[2, 6\], got \[1, 6\]"),
        ("lse_b", set_to(None), "expected a tensor beside out_b, and None without it, got None"),
    ],
    **WRONG_STEPS,
}
