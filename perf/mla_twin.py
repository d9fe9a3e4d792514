"""The 16-bit twin of latent attention: the same kernel over plain float16 latents, to compare with.

It reads [num_pages, page_size, 576] through a block table, or tokens by their slots, 1,152 bytes a token. A block of tokens is
an operand of both products, as in the quantized kernel, which differs from it in how a block comes to be. A second kernel
merges the splits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LATENT, ROPE = tl.constexpr(512), tl.constexpr(64)
HALF = tl.constexpr(256)


@triton.jit
def _load_row_parts(x_ptr, place, mask):
    """Return the latents, in halves, and the rotary channels of rows at some places."""
    offs_h = tl.arange(0, HALF)[None, :]
    low = tl.load(x_ptr + place[:, None] + offs_h, mask[:, None], other=0.0)
    high = tl.load(x_ptr + HALF + place[:, None] + offs_h, mask[:, None], other=0.0)
    rope = tl.load(x_ptr + LATENT + place[:, None] + tl.arange(0, ROPE)[None, :], mask[:, None], other=0.0)
    return low, high, rope


@triton.jit
def _twin_mla_kernel(
    out_ptr,  # float32 [num_splits, batch * heads, 512]
    lse_ptr,  # float32 [num_splits, batch * heads], base 2
    q_ptr,  # float16 [batch, heads, 576]
    pages_ptr,  # float16 [num_pages, page_size, 576]
    block_table_ptr,  # int32 [batch, max_pages], or with LISTED slots of tokens [batch, topk]
    seq_lens_ptr,  # int32 [batch]
    qk_scale,  # sm_scale * log2(e)
    num_heads,
    num_splits,
    batch,
    stride_table,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    LISTED: tl.constexpr,
):
    tiles = tl.cdiv(num_heads, BLOCK_M)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % num_splits
    row = tl.program_id(0) // tiles // num_splits
    offs_m, offs_t, offs_h = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T), tl.arange(0, HALF)
    head = tile * BLOCK_M + offs_m
    mask_m = head < num_heads
    place = row.to(tl.int64) * num_heads + head
    seq_len = tl.load(seq_lens_ptr + row)
    num_blocks = tl.cdiv(seq_len, BLOCK_T)
    share, rest = num_blocks // num_splits, num_blocks % num_splits
    first = split * share + tl.minimum(split, rest)
    last = first + share + (split < rest).to(tl.int32)
    q_low, q_high, q_rope = _load_row_parts(q_ptr, place * (LATENT + ROPE), mask_m)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    low_acc = tl.zeros((BLOCK_M, HALF), tl.float32)
    high_acc = tl.zeros((BLOCK_M, HALF), tl.float32)
    table_ptr = block_table_ptr + row.to(tl.int64) * stride_table
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        start = block * BLOCK_T
        if LISTED:
            tokens = tl.load(table_ptr + tl.minimum(start + offs_t, seq_len - 1)).to(tl.int64) * (LATENT + ROPE)
        else:
            page = tl.load(table_ptr + start // PAGE_SIZE).to(tl.int64)
            tokens = (page * PAGE_SIZE + start % PAGE_SIZE + offs_t) * (LATENT + ROPE)
        low, high, rope = _load_row_parts(pages_ptr, tokens, offs_t >= 0)
        # As in the quantized kernel, no product continues another one's sum, so that warps share them out.
        scores = tl.dot(q_rope, tl.trans(rope)) * qk_scale
        scores += tl.dot(q_low, tl.trans(low)) * qk_scale
        scores += tl.dot(q_high, tl.trans(high)) * qk_scale
        if start + BLOCK_T > seq_len:
            scores = tl.where((start + offs_t)[None, :] < seq_len, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        alpha = tl.exp2(m_i - m_new)
        weights = tl.exp2(scores - m_new[:, None])
        l_i = l_i * alpha + tl.sum(weights, axis=1)
        operand = weights.to(low.dtype)
        low_acc = tl.dot(operand, low, low_acc * alpha[:, None])
        high_acc = tl.dot(operand, high, high_acc * alpha[:, None])
        m_i = m_new
    result = split.to(tl.int64) * batch * num_heads + place
    inverse = 1.0 / tl.where(l_i > 0, l_i, 1.0)
    out_row_ptr = out_ptr + result[:, None] * LATENT
    tl.store(out_row_ptr + offs_h[None, :], low_acc * inverse[:, None], mask_m[:, None])
    tl.store(out_row_ptr + HALF + offs_h[None, :], high_acc * inverse[:, None], mask_m[:, None])
    tl.store(lse_ptr + result, m_i + tl.log2(l_i), mask_m)


@triton.jit
def _twin_mla_merge_kernel(out_ptr, partial_ptr, lse_ptr, num_splits, BLOCK_S: tl.constexpr):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    offs_d, offs_s = tl.arange(0, LATENT), tl.arange(0, BLOCK_S)
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros((LATENT,), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        place = (start + offs_s).to(tl.int64) * rows + row
        lse = tl.load(lse_ptr + place, start + offs_s < num_splits, other=float("-inf"))
        some = lse > float("-inf")
        partial = tl.load(partial_ptr + place[:, None] * LATENT + offs_d[None, :], some[:, None], other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, axis=0))
        weights = tl.where(some, tl.exp2(lse - m_new), 0.0)
        alpha = tl.where(m_i > float("-inf"), tl.exp2(m_i - m_new), 0.0)
        l_i = l_i * alpha + tl.sum(weights, axis=0)
        acc = acc * alpha + tl.sum(partial * weights[:, None], axis=0)
        m_i = m_new
    tl.store(out_ptr + row * LATENT + offs_d, (acc / l_i).to(out_ptr.dtype.element_ty))


@dataclass(frozen=True)
class TwinConfig:
    """Launch parameters of the twin."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


CONFIGS = {
    "few": [TwinConfig(16, 32, 4, 2, 3), TwinConfig(16, 32, 4, 3, 2), TwinConfig(16, 64, 4, 2, 2), TwinConfig(16, 64, 8, 2, 2)],
    "many": [
        TwinConfig(64, 64, 8, 2),
        TwinConfig(64, 32, 8, 3),
        TwinConfig(64, 32, 8, 2),
        TwinConfig(32, 64, 8, 2),
        TwinConfig(32, 32, 4, 2, 2),
    ],
}
"""Of up to 16 heads, and of more."""


def twin_mla(
    q: torch.Tensor, pages: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, sm_scale: float,
    num_programs: int, config: TwinConfig, listed: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Return attention [batch, heads, 512] of absorbed queries; about `num_programs` run at once for each that fits.

    `listed`: the table has slots of tokens, as many as `seq_lens` says.
    """
    (batch, heads, _), page_size = q.shape, pages.shape[1]
    tiles = -(-heads // config.block_m)
    most = max(block_table.shape[1] * (1 if listed else page_size) // (4 * config.block_t), 1)
    splits = min(max(num_programs * config.programs_per_sm // (batch * tiles), 1), most)
    partial = torch.empty(splits, batch * heads, 512, dtype=torch.float32, device=q.device)
    lse = torch.empty(splits, batch * heads, dtype=torch.float32, device=q.device)
    _twin_mla_kernel[(tiles * splits * batch,)](
        partial, lse, q, pages, block_table, seq_lens, sm_scale * math.log2(math.e), heads, splits, batch,
        block_table.stride(0), PAGE_SIZE=page_size, BLOCK_M=config.block_m, BLOCK_T=config.block_t,
        NUM_STAGES=config.num_stages, LISTED=listed, num_warps=config.num_warps,
    )  # fmt: skip
    out = torch.empty(batch, heads, 512, dtype=q.dtype, device=q.device)
    _twin_mla_merge_kernel[(batch * heads,)](out, partial, lse, splits, BLOCK_S=8, num_warps=4)
    return out
