"""The 16-bit twin of prefill attention: several query tokens per sequence over plain float16 pages, to compare with.

It reads [num_pages, 2, num_kv_heads, page_size, head_dim] through a block table. One program attends with a tile of rows, each
a query head of a token of one kv head, to all pages that the tile sees. All sequences have equally many query tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _twin_prefill_kernel(
    out_ptr,  # [batch * tokens, num_q_heads, head_dim]
    q_ptr,  # like out
    pages_ptr,  # [num_pages, 2, num_kv_heads, page_size, head_dim]
    block_table_ptr,  # int32 [batch, max_pages]
    seq_lens_ptr,  # int32 [batch]
    num_tokens,  # query tokens of a sequence
    qk_scale,  # sm_scale * log2(e)
    stride_page,
    stride_half,
    stride_head,
    stride_table,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    tile, head, row = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_q_heads = tl.num_programs(1) * GROUP
    seq_len = tl.load(seq_lens_ptr + row)
    offs_m, offs_d, offs_t = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_T)
    query = (tile * BLOCK_M + offs_m) // GROUP
    mask_m = query < num_tokens
    place = ((row * num_tokens + query).to(tl.int64) * num_q_heads + head * GROUP + offs_m % GROUP) * HEAD_DIM
    q = tl.load(q_ptr + place[:, None] + offs_d[None, :], mask_m[:, None], other=0.0)
    position = seq_len - num_tokens + query
    first_position = seq_len - num_tokens + tile * BLOCK_M // GROUP
    last = tl.minimum(seq_len, seq_len - num_tokens + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    table_ptr = block_table_ptr + row.to(tl.int64) * stride_table
    head_ptr = pages_ptr + head.to(tl.int64) * stride_head
    for start in tl.range(0, last, BLOCK_T, num_stages=NUM_STAGES):
        page_ptr = head_ptr + tl.load(table_ptr + start // PAGE_SIZE).to(tl.int64) * stride_page
        place_t = (start % PAGE_SIZE + offs_t) * HEAD_DIM
        k = tl.load(page_ptr + place_t[None, :] + offs_d[:, None])
        scores = tl.dot(q, k) * qk_scale
        if start + BLOCK_T > first_position + 1:
            scores = tl.where((start + offs_t)[None, :] <= position[:, None], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        alpha = tl.exp2(m_i - m_new)
        weights = tl.exp2(scores - m_new[:, None])
        l_i = l_i * alpha + tl.sum(weights, axis=1)
        v = tl.load(page_ptr + stride_half + place_t[:, None] + offs_d[None, :])
        acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    tl.store(out_ptr + place[:, None] + offs_d[None, :], (acc / l_i[:, None]).to(out_ptr.dtype.element_ty), mask_m[:, None])


@dataclass(frozen=True)
class PrefillTwinConfig:
    """Launch parameters of the twin."""

    block_m: int = 128
    block_t: int = 64
    num_warps: int = 4
    num_stages: int = 3


CONFIGS = tuple(
    PrefillTwinConfig(*config)
    for config in ((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2))
)


def twin_prefill(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    config: PrefillTwinConfig,
) -> torch.Tensor:
    """Attend causally with the last tokens of each sequence.

    Args:
        q: float16 [batch * tokens, num_q_heads, head_dim], contiguous; head_dim is a power of two.
        pages: float16 [num_pages, 2, num_kv_heads, page_size, head_dim], contiguous.
        block_table: int32 [batch, max_pages].
        seq_lens: int32 [batch], the query tokens included.
        out: where to write, like `q`.
        config: launch parameters.
    """
    batch, (total_tokens, num_q_heads, head_dim) = len(seq_lens), q.shape
    num_kv_heads, page_size = pages.shape[2], pages.shape[3]
    num_tokens, group = total_tokens // batch, num_q_heads // num_kv_heads
    _twin_prefill_kernel[(triton.cdiv(num_tokens * group, config.block_m), num_kv_heads, batch)](
        out,
        q,
        pages,
        block_table,
        seq_lens,
        num_tokens,
        head_dim**-0.5 * math.log2(math.e),
        pages.stride(0),
        pages.stride(1),
        pages.stride(2),
        block_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        GROUP=group,
        BLOCK_M=config.block_m,
        BLOCK_T=min(config.block_t, page_size),
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out
