"""The whole method in plain PyTorch: the specification of this package, and its implementation for CPU tensors.

Read `codec` first (what happens to one tile), then `packing` (its codes as bytes), `cache` (pages, tails) and `attention`.
Each public function has the name, the arguments and the meaning of the kernel's launcher in `kvarn_triton`. Nothing here
imports a kernel. `arithmetic` says in which order sums are added. There are no gradients: results never require any, and pools
never join a graph, whatever their arguments do.
"""

import torch

from . import codec
from .arithmetic import ANY_ORDER, KERNEL_ORDER, Arithmetic
from .attention import build_tree_mask, decode_attention, gather_cache, merge_states, prefill_attention
from .cache import append_tokens, commit_pages, cut_back, dequantize_pages, raw_slots, store_pages
from .codec import encode
from .mla import (
    mla_append_tokens,
    mla_attend,
    mla_commit_pages,
    mla_decode_attention,
    mla_dequantize_pages,
    mla_store_pages,
    mla_write_tokens,
)
from .packing import pack, unpack
from .step import attend, copy_raw_pages, cut_tokens, plan_step, read_tokens, write_tokens

dequantize = torch.no_grad()(codec.dequantize)
hadamard = torch.no_grad()(codec.hadamard)
quantize = torch.no_grad()(codec.quantize)
variance_normalize = torch.no_grad()(codec.variance_normalize)

__all__ = [
    "ANY_ORDER",
    "KERNEL_ORDER",
    "Arithmetic",
    "append_tokens",
    "attend",
    "build_tree_mask",
    "commit_pages",
    "copy_raw_pages",
    "cut_back",
    "cut_tokens",
    "decode_attention",
    "dequantize",
    "dequantize_pages",
    "encode",
    "gather_cache",
    "hadamard",
    "merge_states",
    "mla_append_tokens",
    "mla_attend",
    "mla_commit_pages",
    "mla_decode_attention",
    "mla_dequantize_pages",
    "mla_store_pages",
    "mla_write_tokens",
    "pack",
    "plan_step",
    "prefill_attention",
    "quantize",
    "raw_slots",
    "read_tokens",
    "store_pages",
    "unpack",
    "variance_normalize",
    "write_tokens",
]
