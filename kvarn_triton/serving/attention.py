"""Attention of a step: the plan of the step chooses between decode and prefill attention, and brings the tables of both."""

from __future__ import annotations

import torch

from .. import configs, gpu, reference
from ..attention.decode import launch_decode, plan_decode
from ..attention.parts import DecodeSchedule
from ..attention.prefill import launch_prefill, plan_prefill
from ..cache import Results, cache_of, check_new, check_queries, check_split_size, checked_for_attention
from ..checks import FLOATS, check_tensor, require
from ..masking import Mask
from ..step import Step


def attend(
    q: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    table: configs.DecodeTable | None = None,
    keep_sink: bool = False,
    config: configs.PrefillConfig | None = None,
    tree_mask: torch.Tensor | None = None,
    span_ends: torch.Tensor | None = None,
    past_only: bool = False,
    schedule: DecodeSchedule | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries of a step, after `write_tokens`: decode attention if it has one token for each sequence.

    That is so if the step was planned without `cu_seqlens_q`; otherwise it is prefill attention, for prompts, chunks and
    drafts.

    Args:
        q: float16, bfloat16 or float32 [num_tokens, num_q_heads, head_dim], after the position encoding, not rotated. Or
            [batch, num_q_heads, n, head_dim], whose tokens are taken one sequence after the other; that is a copy where those
            of two sequences are not as far apart as two of one.
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim].
        step: `plan_step`.
        k: the step's keys like `q`, as `write_tokens` got them: queries see the new tokens exactly, and not as they were
            written. Decode attention reads them from the cache, with or without `k`.
        v: the step's values, like `k`.
        sm_scale: as in `decode_attention` and `prefill_attention`, like all that follow.
        window: how many positions a query sees, its own included.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: float32 [num_q_heads], a logit per query head that takes weight and has no value.
        out: where to write: [num_tokens, num_q_heads, v_head_dim].
        return_lse: whether to return the log-sum-exp too.
        split_size: batch-invariant mode.
        workspace: uint8, contiguous, for partial results (`decode_workspace_size`, `prefill_workspace_size`).
        scratch: memory for dequantized pages, of prefill attention.
        table: launch parameters, of decode attention.
        keep_sink: with a window, whether the first `sink_len` tokens stay visible beside it. Not where a sequence may be
            without a raw sink, because its plan has `sink_columns`.
        config: launch parameters, of prefill attention.
        tree_mask: int64 [num_tokens], which new tokens each new token sees, of prefill attention with `k` and `v`.
        span_ends: int32 [num_tokens], ends of spans of new tokens that see each other, likewise.
        past_only: of prefill attention: queries don't see the new tokens, to which another call attends.
        schedule: what `schedule_step` made of the plan, for decode attention.

    Returns:
        `out` [num_tokens, num_q_heads, v_head_dim], or `out` and `lse` float32 [num_tokens, num_q_heads]. Rows of padding are
        zeros and -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option; nothing is written.
    """
    cache = checked_for_attention(cache_of(pages, raw_pages, step), step.batch)
    require(not (keep_sink and step.sink_lens is not None), "keep_sink", "False beside sink_columns", keep_sink)
    flat = reference.step.flat_tokens
    q, k, v = flat(q), None if k is None else flat(k), None if v is None else flat(v)
    check_tensor("q", q, [step.num_tokens, None, step.layout.head_dim], FLOATS, device=step.seq_lens.device)
    mask = Mask(sm_scale, window, soft_cap, sinks, keep_sink, tree_mask, span_ends, past_only)
    results = Results(out, return_lse, workspace)
    check_queries(q, cache, mask, out)
    check_split_size(split_size)
    ends = step.cu_seqlens_q
    if ends is None:
        for name, tensor in (("scratch", scratch), ("tree_mask", tree_mask), ("span_ends", span_ends)):
            require(tensor is None, name, "None without cu_seqlens_q", "a tensor")
        require(not past_only, "past_only", "False without cu_seqlens_q", past_only)
        decode = plan_decode(q, cache, mask, results, split_size, table, schedule)
    else:
        require(schedule is None, "schedule", "None beside cu_seqlens_q", "one")
        check_new(q, (k, v), ends, cache, mask)
        prefill = plan_prefill(q, ends, cache, mask, results, split_size, scratch, config)
    if not gpu.on_device(q):
        return reference.attend(
            q, pages, raw_pages, step, k=k, v=v, sm_scale=mask.sm_scale, window=window, soft_cap=soft_cap, sinks=sinks, out=out,
            return_lse=return_lse, keep_sink=keep_sink, tree_mask=tree_mask, span_ends=span_ends, past_only=past_only,
        )  # fmt: skip
    return launch_decode(q, mask, results, decode) if ends is None else launch_prefill(q, (k, v), mask, results, prefill)
