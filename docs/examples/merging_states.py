"""Attention in two calls over disjoint parts of a context, merged, as in context parallelism."""

import torch
from exact import error

from kvarn_triton import PageLayout, decode_attention, merge_states, store_pages

torch.manual_seed(0)
layout, num_kv_heads = PageLayout.from_name("k4v2_g64", head_dim=64), 2
k, v = torch.randn(2, 512, num_kv_heads, 64, dtype=torch.float16)
pages = layout.empty_pages(8, num_kv_heads)
store_pages(k, v, pages, torch.arange(8), layout)
block_table = torch.arange(8, dtype=torch.int32)[None]
q = torch.randn(1, 8, 64, dtype=torch.float16)


def attend(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the pages from `first` to `last`, and return the log-sum-exp too."""
    seq_lens = torch.tensor([64 * (last - first)], dtype=torch.int32)
    return decode_attention(q, pages, block_table[:, first:last], seq_lens, layout, return_lse=True)


merged, merged_lse = merge_states(*attend(0, 5), *attend(5, 8))
whole, whole_lse = attend(0, 8)
print(f"two calls beside one: out differs by {error(merged, whole):.1e}, lse by {(merged_lse - whole_lse).abs().max():.1e}")
