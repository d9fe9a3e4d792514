"""A page read back: its keys and values as numbers, its fields, its bytes."""

import torch
from exact import error

from kvarn_triton import PUBLISHED, PageLayout, dequantize_pages, store_pages

torch.manual_seed(0)
layout, num_kv_heads = PageLayout.from_name("k4v2_g128", head_dim=128), 2
k, v = torch.randn(2, 256, num_kv_heads, 128, dtype=torch.float16)
ids = torch.arange(2)
for name, options in (("default encoder", {}), ("as published", {"encoder": PUBLISHED})):
    pages = layout.empty_pages(2, num_kv_heads)
    store_pages(k, v, pages, ids, layout, **options)
    k_read, v_read = dequantize_pages(pages, ids, layout)  # [pages, page_size, kv heads, head_dim]
    print(
        f"{name}: relative error of keys {error(k_read.flatten(0, 1), k):.3f}, of values {error(v_read.flatten(0, 1), v):.3f}"
    )

print(f"{layout.page_bytes} bytes a page and kv head, {layout.bytes_per_token:.0f} a token; 16 bits take {4 * 128}")
for name, field in layout.fields(pages).items():  # views of the bytes: docs/page_format.md
    print(f"  {name:9} {str(field.dtype).removeprefix('torch.'):8} {list(field.shape[2:])}")
