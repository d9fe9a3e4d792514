"""Calls of prefill_attention with several query tokens per sequence, and what their results may differ from float64."""

from __future__ import annotations

import math

import torch
from helpers import FLOAT32_ERROR, LSE_ERROR, ON_GPU, draw

import kvarn_triton
from kvarn_triton import PageLayout, prefill_attention, reference
from kvarn_triton.testing import cache_case, relative_error

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


def plain_attention(dtype: torch.dtype, arguments: dict, seen: dict) -> torch.Tensor:
    """Return attention whose queries, keys, values and weights are rounded to `dtype`, sums in float32."""
    q, layout = arguments["q"], arguments["layout"]
    out = q.new_zeros(*q.shape[:2], layout.v_head_dim, dtype=torch.float32)
    ends = arguments["cu_seqlens_q"].tolist()
    options = {name: arguments[name] for name in ("raw_pages", "raw_table", "sink_len") if name in arguments}
    for b, length in enumerate(arguments["seq_lens"].tolist()):
        first, last = ends[b], ends[b + 1]
        if first == last:
            continue
        cached = length - (last - first) if "k" in arguments else length
        k, v = reference.gather_cache(
            arguments["pages"], arguments["block_table"], cached, layout, row=b,
            num_quantized=int(arguments["num_quantized"][b]), **options,
        )  # fmt: skip
        if "k" in arguments:
            new_k, new_v = (reference.hadamard(arguments[name][first:last].float()).transpose(0, 1) for name in ("k", "v"))
            k, v = torch.cat((k, new_k), dim=1), torch.cat((v, new_v), dim=1)
        rotated = reference.hadamard(q[first:last].float())
        rotated, k, v = (x.to(dtype).float() for x in (rotated, k, v))
        group = q.shape[1] // k.shape[0]
        scores = torch.einsum("nhgd,htd->nhgt", rotated.unflatten(1, (-1, group)), k) * layout.head_dim**-0.5
        if cap := seen.get("soft_cap"):
            scores = cap * torch.tanh(scores / cap)
        distance = torch.arange(length - (last - first), length)[:, None] - torch.arange(length)
        visible = (distance >= 0) & (distance < seen.get("window", math.inf))
        scores = torch.where(visible[:, None, None].to(q.device), scores, -torch.inf)
        if "sinks" in seen:
            logits = seen["sinks"].view(1, -1, group, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, logits), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :length].to(dtype).float()
        out[first:last] = reference.hadamard(torch.einsum("nhgt,htd->nhgd", weights, v)).flatten(1, 2)
    return out.to(dtype)


def check(arguments: dict, seen: dict | None = None, **options) -> torch.Tensor:
    """Compare a call with float64, the log-sum-exp included; return the result."""
    q, seen = arguments["q"], seen or {}
    out, lse = prefill_attention(**arguments, **seen, **options, return_lse=True)
    exact, exact_lse = reference.prefill_attention(**arguments | {"q": q.double()}, **seen, return_lse=True)
    assert out.dtype == q.dtype and out.shape == (*q.shape[:2], arguments["layout"].v_head_dim) and not out.isnan().any()
    allowed = 2 * relative_error(plain_attention(q.dtype, arguments, seen), exact)
    assert relative_error(out, exact) <= max(allowed, FLOAT32_ERROR)
    attended = exact_lse > -torch.inf
    assert torch.equal(attended, lse > -torch.inf)
    assert ((lse - exact_lse).abs()[attended] <= LSE_ERROR[q.dtype]).all()
    return out
