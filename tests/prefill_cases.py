"""Calls of prefill_attention with several query tokens per sequence."""

from __future__ import annotations

import torch
from helpers import ON_GPU, draw

import kvarn_triton
from kvarn_triton import PageLayout, configs
from kvarn_triton.testing import cache_case

SMALL = PageLayout(64, 64, 4, 2)


def new_scratch(arguments: dict, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return scratch memory for a call, with gaps, NaN everywhere.

    By default of the dtype of the queries; in the interpreter, whose casts to bfloat16 truncate, float16 instead of that.
    """
    layout, table, q = arguments["layout"], arguments["block_table"], arguments["q"]
    if dtype is None:
        dtype = q.dtype if ON_GPU or q.dtype != torch.bfloat16 else torch.float16
    slots = len(arguments["kv_indices"]) if table is None else table.numel()
    shape = (slots + 1, 2, arguments["pages"].shape[1] + 1, layout.page_size, layout.raw_head_dim + 16)
    return torch.full(shape, torch.nan, dtype=dtype, device=q.device)[1:, :, 1:, :, 8:-8]


def with_scratch(**arguments) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Call prefill_attention with new scratch memory."""
    return kvarn_triton.prefill_attention(**arguments, scratch=new_scratch(arguments))


def in_form(form: str, arguments: dict, split_size: int | None = None) -> dict:
    """Return the options of a call in one form of its loop over pages, wherever there is a choice: what a caller would give.

    Those are launch parameters, whatever the GPU and the number of rows; in the form "scratch" memory for pages.
    """
    options: dict = {"split_size": split_size}
    if form == "scratch":
        return options | {"scratch": new_scratch(arguments)}
    q, rows = arguments["q"], None
    if split_size is None:
        batch, heads = len(arguments["seq_lens"]), arguments["pages"].shape[1]
        rows = -(-len(q) // batch) * (q.shape[1] // heads)
    return options | {"config": configs.config_of_form(form, arguments["layout"], q.dtype, q.device, rows)}


def prefill_case(
    layout, lengths, queries, *, new=False, group=2, num_kv_heads=1, dtype=torch.float16, seed=0, **options
) -> dict:
    """Return arguments of `prefill_attention`: sequences of `lengths` tokens of which the last `queries` are asked for.

    With `new` those are outside of the cache, else in its tail.
    """
    cached = [length - count if new else length for length, count in zip(lengths, queries, strict=True)]
    case = cache_case(layout, cached, group=group, num_kv_heads=num_kv_heads, dtype=dtype, seed=seed, **options)
    device, total = case.q.device, sum(queries)
    ends = torch.tensor([0, *queries]).cumsum(0).int().to(device)
    arguments = case.kwargs | {"seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device), "cu_seqlens_q": ends}
    arguments["q"] = draw(total, num_kv_heads * group, layout.head_dim, seed=seed + 1, dtype=dtype, device=device)
    if new:
        for name, head_dim, shift in (("k", layout.head_dim, 2), ("v", layout.v_head_dim, 3)):
            arguments[name] = draw(total, num_kv_heads, head_dim, seed=seed + shift, dtype=dtype, device=device)
    return arguments
