"""Speculative decoding with a tree: drafts see their ancestors, and the tokens of one path are written when it is chosen."""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, append_tokens, build_tree_mask, prefill_attention, raw_slots, store_pages

torch.manual_seed(0)
layout, num_kv_heads, dtype = PageLayout.from_name("k4v4_g64", head_dim=64), 2, torch.float16
k, v = torch.randn(2, 256 + 6, num_kv_heads, 64, dtype=dtype)  # 4 pages and 6 drafts
pages, raw_pages = layout.empty_pages(4, num_kv_heads), torch.empty(2, 2, num_kv_heads, 64, 64, dtype=dtype)
store_pages(k[:256], v[:256], pages, torch.arange(4), layout)
cache = {
    "raw_pages": raw_pages,
    "raw_table": torch.tensor([[0, 1]], dtype=torch.int32),
    "num_quantized": torch.tensor([4], dtype=torch.int32),
}

#   0 -- 1 -- 3 -- 5      The position of a draft, for the position encoding of the model, is 256 plus the number of its
#   |    `--- 4           ancestors: 256, 257, 257, 258, 258, 259.
#   `--- 2
parents = torch.tensor([-1, 0, 0, 1, 1, 3], dtype=torch.int32)
ends = torch.tensor([0, 6], dtype=torch.int32)
tree_mask = build_tree_mask(parents, ends)
print("bits:", " ".join(f"{word:06b}" for word in tree_mask.tolist()))

q = torch.randn(6, 8, 64, dtype=dtype)
block_table, seq_lens = torch.arange(4, dtype=torch.int32)[None], torch.tensor([256 + 6], dtype=torch.int32)
drafts = {"k": k[256:], "v": v[256:], "tree_mask": tree_mask}  # not in the cache yet
out = prefill_attention(q, pages, block_table, seq_lens, ends, layout, **cache, **drafts)
for i, path in ((2, [0, 2]), (4, [0, 1, 4]), (5, [0, 1, 3, 5])):
    seen = [*range(256), *(256 + j for j in path)]
    print(f"draft {i}: relative error {error(out[i], attention(q[i], k[seen], v[seen])):.3f}")

accepted = [0, 1, 4]  # the model chose these: they are written one behind the other, the others nowhere
slots = torch.full((6,), -1)
slots[accepted] = raw_slots(torch.arange(256, 259)[None], cache["raw_table"], sink_len=0, page_size=64).flatten()
append_tokens(k[256:], v[256:], raw_pages, slots)
seq_lens.fill_(259)

ends = torch.tensor([0, 1], dtype=torch.int32)
out = prefill_attention(q[4:5], pages, block_table, seq_lens, ends, layout, **cache)  # the last of them, from the cache
seen = [*range(256), *(256 + j for j in accepted)]
print(f"{seq_lens.item()} tokens are left; relative error of the last {error(out[0], attention(q[4], k[seen], v[seen])):.3f}")
