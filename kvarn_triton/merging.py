"""Launch parameters of merges of partial results: how many are looked at together, and how programs share channels."""

from __future__ import annotations

import torch

from . import gpu

MERGE_BLOCKS = (8, 32, 128, 256)
"""Partial results that a merging program may look at together; 256 where registers hold them, up to 128 channels."""

INVARIANT_MERGE_BLOCK = MERGE_BLOCKS[1]
"""The same in the batch-invariant mode, where the order of sums may follow from nothing outside of a sequence."""


def merge_block(num_programs: int, num_heads: int, block_d: int, split_size: int = 0) -> int:
    """Return how many partial results of a head are looked at together, if `num_programs` programs attend to `num_heads`.

    Where programs are a multiple of heads, as a rule each has one unit of work, or pieces end where heads do. A head whose
    pieces don't has up to two results more.
    """
    if split_size:
        return INVARIANT_MERGE_BLOCK
    expected, rest = divmod(num_programs, max(num_heads, 1))
    blocks = MERGE_BLOCKS if block_d <= 128 else MERGE_BLOCKS[:-1]
    return next((block for block in blocks if block >= expected + 2 * (rest > 0)), blocks[-1])


MERGE_CHANNELS = 32
"""Channels that a program of a merge has at least: what it rotates back by itself (`attention.merge`)."""


def merge_channels(v_head_dim: int, num_heads: int, device: torch.device, split_size: int = 0) -> int:
    """Return how many channels a program merges, if `num_heads` heads of all sequences are merged.

    As few as can be, as long as two programs for each multiprocessor suffice, else all, as in the batch-invariant mode. One
    program for each head lets most of a GPU idle in small batches, and loads as much as fills its registers.
    """
    if split_size or v_head_dim % MERGE_CHANNELS:
        return v_head_dim
    few = num_heads * (v_head_dim // MERGE_CHANNELS) <= gpu.num_programs(device, 2)
    return MERGE_CHANNELS if few else v_head_dim


def merge_warps(block_s: int, block_d: int) -> int:
    """Return the warps of a program that merges `block_s` partial results at a time: 128 of their numbers per thread."""
    return max(block_s * block_d // 4096, 1)
