"""One decode step over a cache that is all quantized: store full pages, attend with one query token per sequence."""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, decode_attention, store_pages

torch.manual_seed(0)
layout = PageLayout.from_name("k4v2_g128", head_dim=128)  # 4-bit keys, 2-bit values, pages of 128 tokens
batch, num_pages, num_q_heads, num_kv_heads = 2, 4, 8, 2

# The activations of both sequences one after the other, [tokens, kv heads, head_dim], after the position encoding.
k, v = torch.randn(2, batch * num_pages * 128, num_kv_heads, 128, dtype=torch.float16)
pages = layout.empty_pages(batch * num_pages, num_kv_heads)
store_pages(k, v, pages, torch.arange(batch * num_pages), layout)  # page i takes the tokens from 128 * i on

block_table = torch.arange(batch * num_pages, dtype=torch.int32).view(batch, num_pages)
seq_lens = torch.tensor([512, 300], dtype=torch.int32)  # the second sequence sees 300 tokens of its pages
q = torch.randn(batch, num_q_heads, 128, dtype=torch.float16)
out = decode_attention(q, pages, block_table, seq_lens, layout)

for row, length in enumerate(seq_lens.tolist()):
    tokens = slice(512 * row, 512 * row + length)
    print(f"sequence {row}, {length} tokens: relative error {error(out[row], attention(q[row], k[tokens], v[tokens])):.3f}")
