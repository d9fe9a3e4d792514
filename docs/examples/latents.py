"""Latent attention (MLA): a prompt into pages, then decode steps, beside attention to all tokens in float32."""

import torch

from kvarn_triton import MLALayout, mla_attend, mla_write_tokens, plan_step

device = "cuda" if torch.cuda.is_available() else "cpu"
ints = {"dtype": torch.int32, "device": device}
layout = MLALayout(bits=8, page_size=64)
heads, sm_scale = 16, 192**-0.5
tokens = torch.randn(300, 576, device=device)  # what the model caches: latents of 512 channels, and 64 rotary ones
latents, rope = tokens.split([512, 64], dim=1)

pages = layout.empty_pages(8, device)
raw_pages = torch.empty(2, 64, 576, dtype=torch.float16, device=device)
block_table = torch.arange(8, **ints)[None]  # of one sequence
raw_table = torch.arange(2, **ints)[None]  # the tail; with a sink, its pages would be first

# A prompt of 250 tokens: three pages are full, and 58 tokens are the tail. A plan serves all layers.
seq_lens, ends = torch.tensor([250], **ints), torch.tensor([0, 250], **ints)
step = plan_step(layout.keys, seq_lens, ends, block_table, raw_table, num_tokens=250)
mla_write_tokens(latents[:250], rope[:250], pages, raw_pages, step, layout)

for length in range(251, 301):  # decode steps
    seq_lens += 1
    step = plan_step(layout.keys, seq_lens, None, block_table, raw_table)
    new = slice(length - 1, length)
    mla_write_tokens(latents[new], rope[new], pages, raw_pages, step, layout)
    q = torch.randn(1, heads, 576, dtype=torch.float16, device=device)  # absorbed, its last 64 channels rotary
    out = mla_attend(q, pages, raw_pages, step, layout, sm_scale=sm_scale)

weights = torch.softmax(sm_scale * q[0].float() @ tokens.T, dim=-1)
error = (out[0].float() - weights @ latents).norm() / (weights @ latents).norm()
print(f"{step.num_quantized.item()} pages are quantized, relative error {error:.4f}")
assert error < 0.02

# The same to a list of 100 tokens only, as an indexer of DeepSeek V3.2 chooses them.
listed = torch.randperm(300, device=device)[:100]
out = mla_attend(q, pages, raw_pages, step, layout, sm_scale=sm_scale, indices=listed[None].int())
weights = torch.softmax(sm_scale * q[0].float() @ tokens[listed].T, dim=-1)
expected = weights @ latents[listed]
assert (out[0].float() - expected).norm() / expected.norm() < 0.02
