"""A decode step inside `torch.compile(fullgraph=True)`: the functions of `kvarn_triton.ops` are operators.

The backend here is "eager", which traces the step to one graph and needs no compiler; a model leaves `backend` out.
"""

import torch

from kvarn_triton import PageLayout, ops

torch.manual_seed(0)
layout, sink_len, dtype = PageLayout.from_name("k4v2_g64", head_dim=64), 64, torch.float16
pages = torch.zeros(layout.pages_shape(16, 2), dtype=torch.uint8)
raw_pages = torch.zeros(4, 2, 2, 64, 64, dtype=dtype)
raw_table = torch.arange(4, dtype=torch.int32).view(2, 2)
block_table = torch.arange(16, dtype=torch.int32).view(2, 8)
seq_lens, num_quantized = torch.zeros(2, 2, dtype=torch.int32)


@torch.compile(fullgraph=True, backend="eager")
def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Append a token to each sequence, complete pages, attend."""
    slots = ops.raw_slots(seq_lens[:, None], raw_table, sink_len=sink_len, page_size=64).flatten()
    ops.append_tokens(k, v, raw_pages, slots)
    seq_lens.add_(1)
    ops.commit_pages(raw_pages, pages, raw_table, block_table, seq_lens, num_quantized, layout, sink_len=sink_len)
    raw = {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": num_quantized, "sink_len": sink_len}
    return ops.decode_attention(q, pages, block_table, seq_lens, layout, **raw)


with torch.no_grad():
    for _ in range(130):
        out = step(torch.randn(2, 8, 64, dtype=dtype), *torch.randn(2, 2, 2, 64, dtype=dtype))
print(f"{seq_lens.tolist()} tokens, {num_quantized.tolist()} pages quantized, out {list(out.shape)}")
