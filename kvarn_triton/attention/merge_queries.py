"""The second kernel of prefill attention: it merges the runs into which the pages of a tile were split.

One program merges the partial results of one query head of a token. Grid: (token, query head).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .. import configs, gpu
from ..launch import on
from ..layout import PageLayout
from ..tile.arithmetic import LOG2E, hadamard
from .merge import LN2, with_sink


@triton.jit(
    do_not_specialize=["batch", "num_splits", "first_token", "total_rows", "fill"],
    do_not_specialize_on_alignment=["lse_ptr", "cu_seqlens_ptr", "sinks_ptr"],
)
def _kvarn_merge_queries_kernel(
    out_ptr,  # [total_tokens, num_q_heads, v_head_dim]
    lse_ptr,  # float32 [total_tokens, num_q_heads], natural logarithm; unused if not RETURN_LSE
    partial_ptr,  # float32 [num_splits, total_tokens, num_q_heads, v_head_dim]
    partial_lse_ptr,  # float32 [num_splits, total_tokens, num_q_heads], base 2
    cu_seqlens_ptr,  # int32 [batch + 1]
    sinks_ptr,  # float32 [num_q_heads]
    batch,
    num_splits,
    first_token,  # of this launch
    total_rows,  # of this launch
    fill,  # whether rows of no sequence are zeroed; their log-sum-exp always is -inf
    stride_out_token,
    stride_out_head,
    D_V: tl.constexpr,
    ROTATION: tl.constexpr,  # 1 if the partial results are not rotated
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    EARLY: tl.constexpr,
):
    q_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + q_head
    token = (first_token + tl.program_id(0)).to(tl.int64)
    lse_row_ptr = lse_ptr + token * tl.num_programs(1) + q_head + tl.arange(0, 1)
    out_row_ptr = out_ptr + token * stride_out_token + q_head * stride_out_head
    owned = (token >= tl.load(cu_seqlens_ptr)) & (token < tl.load(cu_seqlens_ptr + batch))
    if EARLY:
        gdc_wait()
    if owned:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < D_V
        m_i = tl.full((1,), float("-inf"), tl.float32)
        l_i = tl.zeros((1,), tl.float32)
        acc = tl.zeros((1, BLOCK_D), tl.float32)
        for start in range(0, num_splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            mask = split < num_splits
            place = split.to(tl.int64) * total_rows + row
            lse = tl.load(partial_lse_ptr + place, mask, other=float("-inf"))
            partial = tl.load(partial_ptr + place[:, None] * D_V + offs_d, (lse > float("-inf"))[:, None] & mask_d, other=0.0)
            m_new = tl.maximum(m_i, tl.max(lse, axis=0))
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
            weights = tl.exp2(lse - origin)
            alpha = tl.exp2(m_i - origin)
            l_i = l_i * alpha + tl.sum(weights, axis=0)
            acc = acc * alpha[:, None] + tl.sum(partial * weights[:, None], axis=0)[None, :]
            m_i = m_new
        out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
        merged_lse = m_i + tl.log2(l_i)
        if HAS_SINKS:
            out, merged_lse = with_sink(out, merged_lse, tl.load(sinks_ptr + q_head + tl.arange(0, 1)) * LOG2E)
        out = hadamard(out, ROTATION)
        tl.store(out_row_ptr + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask_d[None, :])
        if RETURN_LSE:
            tl.store(lse_row_ptr, merged_lse * LN2)
    else:
        offs_d = tl.arange(0, BLOCK_D)
        zeros = tl.zeros((BLOCK_D,), out_ptr.dtype.element_ty)
        tl.store(out_row_ptr + offs_d, zeros, (offs_d < D_V) & (tl.zeros_like(offs_d) + fill != 0))
        if RETURN_LSE:
            tl.store(lse_row_ptr, tl.full((1,), float("-inf"), tl.float32))


def launch_merge_queries(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    sinks: torch.Tensor | None,
    layout: PageLayout,
    rotated: bool,
    first_token: int,
    fill: bool,
    split_size: int,
) -> None:
    """Merge `partial` [num_splits, tokens, num_q_heads, v_head_dim], of tokens from `first_token` on, into `out` and `lse`.

    Nothing is checked.
    """
    num_splits, num_tokens, num_q_heads, v_head_dim = partial.shape
    block_d = triton.next_power_of_2(v_head_dim)
    early = gpu.launches_early(out.device)
    block_s = configs.MERGE_BLOCKS[0] if num_splits <= configs.MERGE_BLOCKS[0] else configs.MERGE_BLOCKS[1]
    if split_size:
        block_s = configs.INVARIANT_MERGE_BLOCK
    on(out, _kvarn_merge_queries_kernel)[(num_tokens, num_q_heads)](
        out,
        partial_lse if lse is None else lse,
        partial,
        partial_lse,
        cu_seqlens_q,
        partial_lse if sinks is None else sinks,
        cu_seqlens_q.shape[0] - 1,
        num_splits,
        first_token,
        num_tokens * num_q_heads,
        int(fill),
        out.stride(0),
        out.stride(1),
        D_V=v_head_dim,
        ROTATION=layout.v_block_size if rotated else 1,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        HAS_SINKS=sinks is not None,
        RETURN_LSE=lse is not None,
        EARLY=early,
        num_warps=configs.merge_warps(block_s, block_d),
        enable_fp_fusion=True,
        **({"launch_pdl": True} if early else {}),
    )
