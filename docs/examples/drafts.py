"""Speculative decoding: drafts are appended, verified in one call, and those that are rejected are cut off again."""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, append_tokens, prefill_attention, raw_slots, store_pages

torch.manual_seed(0)
layout, num_kv_heads, dtype = PageLayout.from_name("k4v4_g64", head_dim=64), 2, torch.float16
k, v = torch.randn(2, 256 + 4, num_kv_heads, 64, dtype=dtype)  # 4 pages and 4 drafts
pages, raw_pages = layout.empty_pages(4, num_kv_heads), torch.empty(2, 2, num_kv_heads, 64, 64, dtype=dtype)
store_pages(k[:256], v[:256], pages, torch.arange(4), layout)
cache = {
    "raw_pages": raw_pages,
    "raw_table": torch.tensor([[0, 1]], dtype=torch.int32),  # two tail slots, for drafts may cross a page
    "num_quantized": torch.tensor([4], dtype=torch.int32),
}
slots = raw_slots(torch.arange(256, 260)[None], cache["raw_table"], sink_len=0, page_size=64)
append_tokens(k[256:], v[256:], raw_pages, slots.flatten())

q = torch.randn(4, 8, 64, dtype=dtype)
block_table, seq_lens = torch.arange(4, dtype=torch.int32)[None], torch.tensor([260], dtype=torch.int32)
cu_seqlens_q = torch.tensor([0, 4], dtype=torch.int32)
out = prefill_attention(q, pages, block_table, seq_lens, cu_seqlens_q, layout, **cache)  # draft i sees the drafts up to i
for i in range(4):
    print(f"draft {i}: relative error {error(out[i], attention(q[i], k[: 257 + i], v[: 257 + i])):.3f}")

seq_lens -= 2  # the model rejected two: their slots are overwritten by the next step
print(f"{seq_lens.item()} tokens are left")
