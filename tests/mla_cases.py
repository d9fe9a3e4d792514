"""Calls of latent attention that `compile_worker.py` compiles."""

from __future__ import annotations

from collections.abc import Callable

import torch

import kvarn_triton as kvarn
from kvarn_triton import Encoder, MLAConfig, MLALayout

FEW = MLAConfig(16, 64, 4, programs_per_sm=2)
GROUPS = MLAConfig(16, 64, 4, warp_groups=True)
MANY = MLAConfig(64, 64, 8)
QUICK = Encoder(iterations=2, clip=False, fits=0, norm="balance")


def arguments(layout: MLALayout) -> dict:
    """Return a cache of two sequences, as arguments."""
    ints = {"dtype": torch.int32}
    return {
        "pages": torch.zeros(4, layout.page_bytes, dtype=torch.uint8),
        "block_table": torch.zeros(2, 32, **ints),
        "raw_pages": torch.zeros(4, layout.page_size, 576, dtype=torch.float16),
        "raw_table": torch.zeros(2, 2, **ints),
        "num_quantized": torch.zeros(2, **ints),
        "layout": layout,
    }


def decode(
    layout: MLALayout,
    heads: int,
    *,
    raw: bool = True,
    dtype: torch.dtype = torch.float16,
    topk: int = 0,
    config: MLAConfig | None = None,
) -> None:
    """Call mla_decode_attention; `topk`: with lists of so many tokens."""
    call = arguments(layout)
    if not raw:
        call |= dict.fromkeys(("raw_pages", "raw_table", "num_quantized"))
    if topk:
        call["indices"] = torch.zeros(2, topk, dtype=torch.int32)
    lens = torch.zeros(2, dtype=torch.int32)
    q = torch.zeros(2, heads, 576, dtype=dtype)
    kvarn.mla_decode_attention(q, seq_lens=lens, sm_scale=0.1, return_lse=True, config=config, **call)


def small(layout: MLALayout, dtype: torch.dtype) -> None:
    """Call mla_append_tokens and mla_dequantize_pages."""
    call, ids = arguments(layout), torch.zeros(2, dtype=torch.int32)
    latents, rope = torch.zeros(2, 576, dtype=dtype).split([512, 64], dim=1)
    kvarn.mla_append_tokens(latents, rope, call["raw_pages"], ids)
    kvarn.mla_dequantize_pages(call["pages"], ids, layout, dtype=dtype)


def encode(layout: MLALayout, dtype: torch.dtype, encoder: Encoder) -> None:
    """Call mla_store_pages, mla_write_tokens and mla_commit_pages."""
    call = arguments(layout)
    latents, rope = torch.zeros(layout.page_size, 576, dtype=dtype).split([512, 64], dim=1)
    kvarn.mla_store_pages(latents, rope, call["pages"], torch.zeros(1, dtype=torch.int32), layout, encoder=encoder)
    step = kvarn.plan_step(layout.keys, torch.zeros(2).int(), None, call["block_table"], call["raw_table"])
    kvarn.mla_write_tokens(latents[:2], rope[:2], call["pages"], call["raw_pages"], step, layout, encoder=encoder)
    kvarn.mla_commit_pages(**call, committed_lens=torch.zeros(2, dtype=torch.int32), encoder=encoder)


def mla_cases(target: str) -> dict[str, Callable[[], None]]:
    """Return calls of all that attends, appends and reads."""
    cases: dict[str, Callable[[], None]] = {
        "mla 16 heads": lambda: decode(MLALayout(4, 128), 16, raw=False),
        "mla 16 heads, 8 bits": lambda: decode(MLALayout(8, 64), 16),
        "mla 32 heads": lambda: decode(MLALayout(4, 64), 32),
        "mla lists": lambda: decode(MLALayout(4, 64), 16, topk=2048, raw=False),
        "mla lists, 32 heads, 8 bits": lambda: decode(MLALayout(8, 128), 32, topk=2048),
        "mla small": lambda: small(MLALayout(4, 64), torch.bfloat16),
    }
    if target == "sm90":
        cases |= {
            "mla 16 heads, tail": lambda: decode(MLALayout(4, 64), 16),
            "mla 16 heads, 8 bits, quantized only": lambda: decode(MLALayout(8, 128), 16, raw=False, config=GROUPS),
            "mla 128 heads, 8 bits, columns": lambda: decode(MLALayout(8, 64), 128, config=GROUPS),
            "mla 16 heads, quantized only": lambda: decode(MLALayout(4, 64), 16, raw=False),
            "mla 16 heads, no warp groups": lambda: decode(MLALayout(4, 128), 16, raw=False, config=FEW),
            "mla 128 heads, tail": lambda: decode(MLALayout(4, 128), 128, dtype=torch.bfloat16),
            "mla 128 heads, quantized only": lambda: decode(MLALayout(4, 64), 128, raw=False),
            "mla 128 heads, 8 bits, quantized only": lambda: decode(MLALayout(8, 64), 128, raw=False),
            "mla 128 heads, no warp groups": lambda: decode(MLALayout(4, 128), 128, config=MANY),
            "mla lists, 128 heads": lambda: decode(MLALayout(4, 128), 128, topk=2048),
            "mla small, 8 bits": lambda: small(MLALayout(8, 128), torch.float32),
        }
    return cases


def mla_encode_cases(target: str) -> dict[str, Callable[[], None]]:
    """Return calls of all that encodes, without the steps that take the compiler longest."""
    return {"mla encode": lambda: encode(MLALayout(4, 64), torch.bfloat16, QUICK)}


def mla_encode_other_cases(target: str) -> dict[str, Callable[[], None]]:
    """Return the same calls with the largest tiles."""
    return {"mla encode, 8 bits": lambda: encode(MLALayout(8, 128), torch.float32, QUICK)}
