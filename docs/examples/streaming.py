"""A window beside which the first tokens stay visible (StreamingLLM): decode over a conversation that never ends."""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, append_tokens, decode_attention, raw_slots, store_pages

torch.manual_seed(0)
layout, num_kv_heads, length, window, sink_len = PageLayout.from_name("k4v4_g64", head_dim=64), 2, 528, 200, 16
k, v = torch.randn(2, length, num_kv_heads, 64, dtype=torch.float16)
ints = {"dtype": torch.int32}

# The sink is in 16 bits; the 8 pages behind it are quantized.
raw_pages, raw_table = torch.empty(2, 2, num_kv_heads, 64, 64, dtype=torch.float16), torch.arange(2, **ints)[None]
append_tokens(
    k[:sink_len],
    v[:sink_len],
    raw_pages,
    raw_slots(torch.arange(sink_len)[None], raw_table, sink_len=sink_len, page_size=64)[0],
)
pages, block_table = layout.empty_pages(8, num_kv_heads), torch.arange(8, **ints)[None]
store_pages(k[sink_len:], v[sink_len:], pages, torch.arange(8), layout)

first = (length - window - sink_len) // 64  # the first page with a token in the window: those before it are freed
pages[:first] = 255
block_table[0, :first] = -1
q = torch.randn(1, 8, 64, dtype=torch.float16)
raw = {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": torch.tensor([8], **ints), "sink_len": sink_len}
out = decode_attention(q, pages, block_table, torch.tensor([length], **ints), layout, window=window, keep_sink=True, **raw)
seen = torch.cat((torch.arange(sink_len), torch.arange(length - window, length)))
print(
    f"{first} of 8 pages freed: relative error of the sink and the last {window} tokens "
    f"{error(out[0], attention(q[0], k[seen], v[seen])):.3f}"
)
