"""Two sequences that begin alike share the pages of their prefix: the same ids stand in both rows of the block table."""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, decode_attention, store_pages

torch.manual_seed(0)
layout, num_kv_heads = PageLayout.from_name("k4v2_g64", head_dim=64), 2
prefix = torch.randn(2, 4 * 64, num_kv_heads, 64, dtype=torch.float16)  # keys and values of 4 pages
own = torch.randn(2, 2, 2 * 64, num_kv_heads, 64, dtype=torch.float16)  # 2 pages more of each sequence

pages = layout.empty_pages(8, num_kv_heads)
store_pages(*prefix, pages, torch.arange(4), layout)
for row in range(2):
    store_pages(*own[row], pages, torch.arange(2) + 4 + 2 * row, layout)
block_table = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7]], dtype=torch.int32)

q = torch.randn(2, 8, 64, dtype=torch.float16)
out = decode_attention(q, pages, block_table, torch.full((2,), 384, dtype=torch.int32), layout)
for row in range(2):
    k, v = torch.cat((prefix, own[row]), dim=1)
    print(f"sequence {row}: relative error {error(out[row], attention(q[row], k, v)):.3f}")
print(f"{len(block_table.unique())} pages in use for {block_table.numel()} in the tables")
