"""The 16-bit twin: paged split-K decode attention over plain float16 or bfloat16 pages, to compare with.

It reads [num_pages, 2, num_kv_heads, page_size, head_dim] through a block table. One program attends with all query heads
of a kv head, padded to 16 rows, to a run of consecutive pages; each key and value is read once. A second kernel merges the
runs; where a sequence has one run there is no second kernel. `sixteen_bit` picks the fastest of a few launch configurations for
the very inputs that are timed, which the quantized kernel isn't given: where the two are close, that favours 16 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ROWS = 16
"""Rows of the tensor cores' smallest product; groups of query heads are padded to it."""


@triton.jit
def _twin_attention_kernel(
    out_ptr,  # [batch, num_q_heads, head_dim] if SINGLE, else float32 [batch, num_q_heads, num_splits, head_dim]
    lse_ptr,  # float32 [batch, num_q_heads, num_splits], base 2; unused if SINGLE
    q_ptr,  # [batch, num_q_heads, head_dim]
    pages_ptr,  # [num_pages, 2, num_kv_heads, page_size, head_dim]
    block_table_ptr,  # int32 [batch, max_pages]
    seq_lens_ptr,  # int32 [batch]
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
    SINGLE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits, num_kv_heads = tl.num_programs(0), tl.num_programs(1)
    STEPS: tl.constexpr = PAGE_SIZE // BLOCK_T
    seq_len = tl.load(seq_lens_ptr + row)
    num_steps = tl.cdiv(seq_len, BLOCK_T)
    per_split = tl.cdiv(tl.cdiv(seq_len, PAGE_SIZE), num_splits) * STEPS
    first = split * per_split
    last = tl.minimum(first + per_split, num_steps)

    offs_m, offs_d, offs_t = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_T)
    mask_m = offs_m < GROUP
    q_head = (row * num_kv_heads + head).to(tl.int64) * GROUP + offs_m
    q = tl.load(q_ptr + q_head[:, None] * HEAD_DIM + offs_d[None, :], mask_m[:, None], other=0.0)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    table_ptr = block_table_ptr + row.to(tl.int64) * stride_table
    head_ptr = pages_ptr + head.to(tl.int64) * stride_head
    for i in tl.range(first, last, num_stages=NUM_STAGES):
        page = tl.load(table_ptr + i // STEPS).to(tl.int64)
        tokens = i % STEPS * BLOCK_T + offs_t
        k_ptr = head_ptr + page * stride_page
        place = tokens[:, None] * HEAD_DIM + offs_d[None, :]
        k = tl.load(k_ptr + place)
        scores = tl.dot(q, tl.trans(k)) * qk_scale
        scores = tl.where((i * BLOCK_T + offs_t < seq_len)[None, :], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        alpha = tl.exp2(m_i - m_new)
        weights = tl.exp2(scores - m_new[:, None])
        l_i = l_i * alpha + tl.sum(weights, axis=1)
        v = tl.load(k_ptr + stride_half + place)
        acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new

    acc = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    place = (q_head * num_splits + split)[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask_m[:, None])
    if not SINGLE:
        tl.store(lse_ptr + q_head * num_splits + split, m_i + tl.log2(l_i), mask_m)


@triton.jit(do_not_specialize=["num_splits"])
def _twin_merge_kernel(
    out_ptr,  # [rows, head_dim]
    partial_ptr,  # float32 [rows, num_splits, head_dim]
    lse_ptr,  # float32 [rows, num_splits], base 2
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_d, offs_s = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_S)
    mask_s = offs_s < num_splits
    lse = tl.load(lse_ptr + row * num_splits + offs_s, mask_s, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    place = (row * num_splits + offs_s)[:, None] * HEAD_DIM + offs_d[None, :]
    partial = tl.load(partial_ptr + place, (lse > float("-inf"))[:, None], other=0.0)
    total = tl.sum(weights, axis=0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty))


@dataclass(frozen=True)
class TwinConfig:
    """Launch parameters of the twin; `waves` is how many programs each multiprocessor is to get."""

    block_t: int = 64
    num_warps: int = 4
    num_stages: int = 3
    waves: int = 4


CONFIGS = tuple(
    TwinConfig(block_t, num_warps, num_stages)
    for block_t, num_warps, num_stages in ((32, 2, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 2))
)
WAVES = (2, 4, 8)
MAX_SPLITS = 128


def default_num_splits(num_rows: int, max_pages: int, waves: int) -> int:
    """Return into how many runs of pages each sequence is cut; `num_rows` is sequences times kv heads."""
    multiprocessors = 1
    if torch.cuda.is_available():
        multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return max(min(-(-waves * multiprocessors // num_rows), max_pages, MAX_SPLITS), 1)


def twin_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    config: TwinConfig = TwinConfig(),
    partial: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Attend with one query per sequence to 16-bit pages.

    Args:
        q: float16 or bfloat16 [batch, num_q_heads, head_dim], contiguous; head_dim is a power of two.
        pages: like q, [num_pages, 2, num_kv_heads, page_size, head_dim], contiguous.
        block_table: int32 [batch, max_pages].
        seq_lens: int32 [batch].
        out: where to write, like `q`.
        config: launch parameters.
        partial: what `allocate_partial` returns, for calls without an allocation.
    """
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = pages.shape[2], pages.shape[3]
    num_splits = default_num_splits(batch * num_kv_heads, block_table.shape[1], config.waves)
    single = num_splits == 1
    target, lse = (out, out) if single else partial or allocate_partial(q, num_splits)
    _twin_attention_kernel[(num_splits, num_kv_heads, batch)](
        target,
        lse,
        q,
        pages,
        block_table,
        seq_lens,
        head_dim**-0.5 * math.log2(math.e),
        pages.stride(0),
        pages.stride(1),
        pages.stride(2),
        block_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        GROUP=num_q_heads // num_kv_heads,
        BLOCK_M=ROWS,
        BLOCK_T=min(config.block_t, page_size),
        SINGLE=single,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    if not single:
        _twin_merge_kernel[(batch * num_q_heads,)](
            out,
            target,
            lse,
            num_splits,
            HEAD_DIM=head_dim,
            BLOCK_S=triton.next_power_of_2(num_splits),
            num_warps=4,
        )
    return out


def allocate_partial(q: torch.Tensor, num_splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for the results of `num_splits` runs per query head and their base-2 log-sum-exps."""
    partial = torch.empty(*q.shape[:2], num_splits, q.shape[2], dtype=torch.float32, device=q.device)
    return partial, partial.new_empty(*q.shape[:2], num_splits)
