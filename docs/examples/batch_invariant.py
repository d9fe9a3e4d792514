"""The batch-invariant mode: with `split_size` the bits of a sequence do not depend on the rest of the batch."""

import torch

from kvarn_triton import PageLayout, decode_attention, store_pages

torch.manual_seed(0)
layout, num_kv_heads, batch = PageLayout.from_name("k4v2_g64", head_dim=64), 2, 4
k, v = torch.randn(2, batch * 512, num_kv_heads, 64, dtype=torch.float16)
pages = layout.empty_pages(batch * 8, num_kv_heads)
store_pages(k, v, pages, torch.arange(batch * 8), layout)
block_table = torch.arange(batch * 8, dtype=torch.int32).view(batch, 8)
seq_lens = torch.tensor([512, 70, 300, 1], dtype=torch.int32)
q = torch.randn(batch, 8, 64, dtype=torch.float16)

together = decode_attention(q, pages, block_table, seq_lens, layout, split_size=8)  # runs of 8 pages, whatever the batch is
for row in range(batch):
    rows = slice(row, row + 1)
    alone = decode_attention(q[rows], pages, block_table[rows], seq_lens[rows], layout, split_size=8)
    print(f"sequence {row}: the bits alone and in the batch are equal: {torch.equal(alone, together[rows])}")
