"""Latent attention (MLA): a prompt into pages, then decode steps, beside attention to all tokens in float32."""

import torch

from kvarn_triton import (
    MLALayout,
    mla_append_tokens,
    mla_commit_pages,
    mla_decode_attention,
    mla_store_pages,
    raw_slots,
)

device = "cuda" if torch.cuda.is_available() else "cpu"
ints = {"dtype": torch.int32, "device": device}
layout = MLALayout(bits=8, page_size=64)
heads, sm_scale = 16, 192**-0.5
tokens = torch.randn(300, 576, device=device)  # what the model caches: latents of 512 channels, and 64 rotary ones
latents, rope = tokens.split([512, 64], dim=1)

pages = layout.empty_pages(8, device)
raw_pages = torch.empty(1, 64, 576, dtype=torch.float16, device=device)  # the tail of one sequence
block_table, raw_table = torch.arange(8, **ints)[None], torch.zeros(1, 1, **ints)

# A prompt of 250 tokens: three pages are full, and 58 tokens are the tail.
mla_store_pages(latents, rope, pages, block_table[0, :3], layout)
num_quantized = torch.tensor([3], **ints)
slots = raw_slots(torch.arange(192, 250, **ints)[None], raw_table, sink_len=0, page_size=64)[0]
mla_append_tokens(latents[192:250], rope[192:250], raw_pages, slots)

for length in range(251, 301):  # decode steps
    lens, new = torch.tensor([length], **ints), slice(length - 1, length)
    slots = raw_slots(lens[:, None] - 1, raw_table, sink_len=0, page_size=64)[0]
    mla_append_tokens(latents[new], rope[new], raw_pages, slots)
    mla_commit_pages(raw_pages, pages, raw_table, block_table, lens, num_quantized, layout)
    q = torch.randn(1, heads, 576, dtype=torch.float16, device=device)  # absorbed, its last 64 channels rotary
    tail = {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": num_quantized}
    out = mla_decode_attention(q, pages, block_table, lens, layout, sm_scale=sm_scale, **tail)

weights = torch.softmax(sm_scale * q[0].float() @ tokens.T, dim=-1)
error = (out[0].float() - weights @ latents).norm() / (weights @ latents).norm()
print(f"{num_quantized.item()} pages are quantized, relative error {error:.4f}")
assert error < 0.02
