"""A long chunk of a prompt, whose attention another library computes: keys and values are read back into 16-bit memory first.

Where an engine has a 16-bit kernel that is faster than `attend` at chunks, such as FlashAttention 3, this is how to use it.
Memory for the keys and values of one layer of one sequence serves all. PyTorch's own kernel stands for the other one.
"""

import torch
from exact import error
from torch.nn.attention.bias import causal_lower_right

from kvarn_triton import PageLayout, attend, plan_step, read_tokens, write_tokens

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
ints, floats = {"dtype": torch.int32, "device": device}, {"dtype": torch.float16, "device": device}
layout, sink_len = PageLayout.from_name("k4v4_g64", head_dim=64), 64
num_q_heads, num_kv_heads, chunk = 8, 2, 320
pages = layout.empty_pages(16, num_kv_heads, device)
raw_pages = torch.empty(2, 2, num_kv_heads, layout.page_size, 64, **floats)
block_table, raw_table = torch.arange(16, **ints)[None], torch.arange(2, **ints)[None]
seq_lens, ends = torch.zeros(1, **ints), torch.tensor([0, chunk], **ints)
memory = torch.empty(2, 1, num_kv_heads, 3 * chunk, 64, **floats)  # keys and values of one layer, as long as sequences get

for first in range(0, 3 * chunk, chunk):
    q, k, v = (torch.randn(chunk, heads, 64, **floats) for heads in (num_q_heads, num_kv_heads, num_kv_heads))
    seq_lens += chunk
    step = plan_step(layout, seq_lens, ends, block_table, raw_table, num_tokens=chunk, sink_len=sink_len)
    write_tokens(k, v, pages, raw_pages, step)
    # All tokens in order, and those of the chunk as they are: what `attend` sees too.
    read_tokens(pages, raw_pages, step, memory[0], memory[1])
    all_k, all_v = memory[:, :, :, : first + chunk]
    all_k[0, :, first:], all_v[0, :, first:] = k.transpose(0, 1), v.transpose(0, 1)
    # flash_attn_func(q, k, v, causal=True) of flash-attn takes the same, with tokens before heads.
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], all_k, all_v, attn_mask=causal_lower_right(chunk, first + chunk), enable_gqa=True
    )
    own = attend(q, pages, raw_pages, step, k=k, v=v)
    difference = error(out[0].transpose(0, 1), own)
    print(f"tokens {first} to {first + chunk - 1}: difference {difference:.5f} of the two kernels")
    assert difference < 2e-3
