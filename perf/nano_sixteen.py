"""Attention over 16 bits for nano-vllm where flash_attn is not installed: the paged twin, or PyTorch's attention on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.functional import scaled_dot_product_attention
from twin import twin_attention


@triton.jit
def _store_kernel(
    pages_ptr, x_ptr, slots_ptr, stride_page, stride_token, BLOCK: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Store the keys or values [heads, head_dim] of one token to pages [n, heads, BLOCK, head_dim]."""
    slot = tl.load(slots_ptr + tl.program_id(0)).to(tl.int64)
    if slot >= 0:
        head, offs_d = tl.arange(0, HEADS)[:, None], tl.arange(0, HEAD_DIM)[None, :]
        x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * stride_token + head * HEAD_DIM + offs_d)
        place = slot // BLOCK * stride_page + slot % BLOCK * HEAD_DIM + head * (BLOCK * HEAD_DIM) + offs_d
        tl.store(pages_ptr + place, x)


class SixteenBitAttention(torch.nn.Module):
    """Takes the place of nano-vllm's `Attention`. Its memory has the same size, with tokens inside heads."""

    def __init__(self, num_heads: int, head_dim: int, scale: float, num_kv_heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = num_kv_heads, head_dim
        self.k_cache = self.v_cache = torch.tensor([])  # nano-vllm sets them

    def pages(self) -> torch.Tensor:
        """Return the memory as [blocks, 2, heads, block, head_dim]: two pieces, of keys and of values."""
        blocks, block = self.k_cache.shape[:2]
        inner = self.heads * block * self.head_dim
        between = self.v_cache.storage_offset() - self.k_cache.storage_offset()
        strides = (inner, between, block * self.head_dim, self.head_dim, 1)
        size = (blocks, 2, self.heads, block, self.head_dim)
        return self.k_cache.as_strided(size, strides, self.k_cache.storage_offset())

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write new tokens, then attend. Decode steps only: others are of memory being measured, and no prompt is computed."""
        from nanovllm.utils.context import get_context

        context = get_context()
        if context.is_prefill:
            return torch.zeros_like(q)
        pages = self.pages()
        if not q.is_cuda:
            return self._attend_on_cpu(q, k, v, pages, context)
        for half, x in enumerate((k, v)):
            _store_kernel[(len(x),)](
                pages[:, half], x, context.slot_mapping, pages.stride(0), x.stride(0), BLOCK=pages.shape[3], HEADS=self.heads,
                HEAD_DIM=self.head_dim,
            )  # fmt: skip
        return twin_attention(q.contiguous(), pages, context.block_tables, context.context_lens, torch.empty_like(q))

    def _attend_on_cpu(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, context: Any
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        for i, length in enumerate(context.context_lens.tolist()):
            block, offset = divmod(int(context.slot_mapping[i]), pages.shape[3])
            pages[block, 0, :, offset], pages[block, 1, :, offset] = k[i], v[i]
            ids = context.block_tables[i, : -(-length // pages.shape[3])]
            keys, values = pages[ids].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
            out[i] = scaled_dot_product_attention(q[i][None, :, None], keys[None], values[None], enable_gqa=True)[0, :, 0]
        return out
