"""A sliding window: pages that no query will see again are freed, and their ids may be anything."""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, decode_attention, store_pages

torch.manual_seed(0)
layout, num_kv_heads, length, window = PageLayout.from_name("k4v4_g64", head_dim=64), 2, 512, 200
k, v = torch.randn(2, length, num_kv_heads, 64, dtype=torch.float16)
pages = layout.empty_pages(8, num_kv_heads)
store_pages(k, v, pages, torch.arange(8), layout)
block_table = torch.arange(8, dtype=torch.int32)[None]

first = (length - window) // 64  # the first page with a token in the window
pages[:first] = 255  # whatever another sequence writes there
block_table[0, :first] = -1
q = torch.randn(1, 8, 64, dtype=torch.float16)
out = decode_attention(q, pages, block_table, torch.tensor([length], dtype=torch.int32), layout, window=window)
exact = attention(q[0], k[-window:], v[-window:])
print(f"{first} of 8 pages freed: relative error of the last {window} tokens {error(out[0], exact):.3f}")
