"""Errors to expect on random numbers, which are the worst there is: no channel, token or score stands out.

README quotes the last column. Errors are relative, in the Frobenius norm, against exact keys and values in float32.
"""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, decode_attention, dequantize_pages, store_pages

NUM_TOKENS = 1024

torch.manual_seed(0)
k, v = torch.randn(2, NUM_TOKENS, 2, 128)
q = torch.randn(1, 8, 128)
ids = torch.arange(NUM_TOKENS // 128, dtype=torch.int32)
print("| | keys | values | attention output |\n|---|---|---|---|")
for preset in ("k8v8_g128", "k4v4_g128", "k4v2_g128", "k2v2_g128"):
    layout = PageLayout.from_name(preset, head_dim=128)
    pages = layout.empty_pages(len(ids), 2)
    store_pages(k, v, pages, ids, layout)
    read = dequantize_pages(pages, ids, layout, dtype=torch.float32)
    out = decode_attention(q, pages, ids[None], torch.tensor([NUM_TOKENS], dtype=torch.int32), layout)
    found = *(error(x.flatten(0, 1), y) for x, y in zip(read, (k, v), strict=True)), error(out[0], attention(q[0], k, v))
    print(f"| `{preset}` | " + " | ".join(f"{x:.3f}" for x in found) + " |")
