"""A prompt in two chunks, then decode steps: sink and tail in 16 bits, full pages quantized as they complete.

`docs/server_loop.py` is the same for many sequences, with a shared prefix and sequences that end.
"""

import torch
from exact import attention, error

from kvarn_triton import PageLayout, append_tokens, commit_pages, decode_attention, prefill_attention, raw_slots, store_pages

torch.manual_seed(0)
layout, sink_len = PageLayout.from_name("k4v4_g64", head_dim=64), 64
num_q_heads, num_kv_heads, page_size, dtype = 8, 2, layout.page_size, torch.float16
pages = layout.empty_pages(8, num_kv_heads)
raw_pages = torch.empty(2, 2, num_kv_heads, page_size, 64, dtype=dtype)
cache = {
    "raw_pages": raw_pages,
    "raw_table": torch.tensor([[0, 1]], dtype=torch.int32),  # raw page 0 is the sink, raw page 1 the tail
    "num_quantized": torch.zeros(1, dtype=torch.int32),
    "sink_len": sink_len,
}
block_table = torch.arange(8, dtype=torch.int32)[None]  # ids of all pages that the sequence will need
seq_lens = torch.zeros(1, dtype=torch.int32)
history = torch.empty(2, 0, num_kv_heads, 64, dtype=dtype)  # exact keys and values, for the comparison alone


def write_chunk(k: torch.Tensor, v: torch.Tensor, begin: int) -> None:
    """Quantize the chunk's full pages; sink and tail go to the raw pages. `begin` is the chunk's first position."""
    end = begin + k.shape[0]
    first, full = max(begin - sink_len, 0) // page_size, max(end - sink_len, 0) // page_size
    starts = sink_len + page_size * torch.arange(first, full)
    store_pages(k, v, pages, block_table[0, first:full], layout, token_starts=starts - begin)
    cache["num_quantized"].fill_(full)
    positions = torch.arange(begin, end)
    quantized = (positions >= sink_len) & (positions < sink_len + full * page_size)
    slots = raw_slots(positions.masked_fill(quantized, -1)[None], cache["raw_table"], sink_len=sink_len, page_size=page_size)
    append_tokens(k, v, raw_pages, slots.flatten())


for num_tokens in (sink_len + 2 * page_size, 100):  # the first chunk ends where a page ends, so that the second begins with one
    q = torch.randn(num_tokens, num_q_heads, 64, dtype=dtype)
    k, v = torch.randn(2, num_tokens, num_kv_heads, 64, dtype=dtype)
    seq_lens += num_tokens
    # Attention first: causal, over the cache as it was and the chunk's exact keys and values.
    cu_seqlens_q = torch.tensor([0, num_tokens], dtype=torch.int32)
    out = prefill_attention(q, pages, block_table, seq_lens, cu_seqlens_q, layout, k=k, v=v, **cache)
    write_chunk(k, v, history.shape[1])
    history = torch.cat((history, torch.stack((k, v))), dim=1)
    print(f"chunk of {num_tokens}: relative error of its last token {error(out[-1], attention(q[-1], *history)):.3f}")

for _ in range(60):
    q = torch.randn(1, num_q_heads, 64, dtype=dtype)
    k, v = torch.randn(2, 1, num_kv_heads, 64, dtype=dtype)
    slots = raw_slots(seq_lens[:, None], cache["raw_table"], sink_len=sink_len, page_size=page_size)
    append_tokens(k, v, raw_pages, slots.flatten())
    seq_lens += 1
    commit_pages(raw_pages, pages, cache["raw_table"], block_table, seq_lens, cache["num_quantized"], layout, sink_len=sink_len)
    out = decode_attention(q, pages, block_table, seq_lens, layout, **cache)
    history = torch.cat((history, torch.stack((k, v))), dim=1)
print(f"{seq_lens.item()} tokens, {cache['num_quantized'].item()} pages quantized: relative error", end=" ")
print(f"{error(out[0], attention(q[0], *history)):.3f}")
