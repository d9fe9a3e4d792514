"""The blocks of `hopper`, 64 tokens each: where they lie, in pages and in raw ones, and what belongs to their tokens."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout

STEP = gl.constexpr(64)
"""Tokens of a block, which are on one page; pairs of bytes of a slab, and rows of a product of a warp group."""
LATENTS = gl.constexpr(LATENT_DIM)
ROPE = gl.constexpr(ROPE_DIM)
LOWEST = gl.constexpr(-100)
"""Least exponent of a gain, as in `rows`."""
NUMBERS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
"""A number for each token, of four warps."""


def describe(
    pages: torch.Tensor, layout: MLALayout, codes: bool
) -> tuple[TensorDescriptor | None, TensorDescriptor, TensorDescriptor]:
    """Describe pages, of which slabs of codes (or not: None), the parameters, and the rotary channels of a block are copied.

    A slab is 128 bytes of the codes of each token of a block.
    """

    def described(x: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=1 + len(shape))
        return TensorDescriptor(x, [len(x), *shape], [x.stride(0), *strides], [1, *block], shared)

    halves, words, width = pages.view(torch.int16), pages.view(torch.int32), LATENT_DIM * layout.bits // 16
    slabs = described(halves, [layout.page_size, width // 64, 64], [width, 64, 1], [64, 1, 64]) if codes else None
    params = described(words[:, layout.k_params_offset // 4 :], [16, 32], [32, 1], [16, 32])
    rope = pages.view(torch.float16)[:, layout.rope_offset // 2 :]
    return slabs, params, described(rope, [layout.page_size, 64], [64, 1], [64, 64])


@gluon.jit
def load_id(i, paged, LAYOUT: gl.constexpr):
    """Load the page id of the i-th block of a program's quantized ones, or of the last one."""
    ids_ptr, first_block, num_paged, first_body, num_ids = paged
    BLOCKS: gl.constexpr = LAYOUT.page_size // STEP
    block = first_block + gl.minimum(i, num_paged - 1) - first_body
    return gl.load(ids_ptr + gl.minimum(block // BLOCKS, num_ids - 1))


@gluon.jit
def part_of(i, paged, LAYOUT: gl.constexpr):
    """Return which block of its page is the i-th one, or the last one."""
    return (paged[1] + gl.minimum(i, paged[2] - 1) - paged[3]) % (LAYOUT.page_size // STEP)


@gluon.jit
def raw_block_of(j, work):
    """Return which block of its sequence is the j-th of the raw ones of a program: sink, then tail."""
    _, _, first, in_sink, first_tail, _ = work
    return gl.where(j < in_sink, first + j, first_tail + j - in_sink)


@gluon.jit
def block_of(i, work):
    """Return which block of its sequence is block i of a program: its quantized ones come first."""
    j = i - work[1]
    return gl.where(j < 0, work[0] + i, raw_block_of(j, work))


@gluon.jit
def find_raw(j, raw, work, LAYOUT: gl.constexpr):
    """Return the raw page of the j-th raw block, and which of the sequence's pages it is, and which block of it."""
    BLOCKS: gl.constexpr = LAYOUT.page_size // STEP
    _, _, _, table_ptr, num_sink_pages, num_tail_slots, _ = raw
    block = raw_block_of(j, work)
    index = block // BLOCKS
    column = gl.where(j < work[3], index, num_sink_pages + (index - num_sink_pages) % num_tail_slots)
    return gl.maximum(gl.load(table_ptr + column), 0).to(gl.int64), index, block % BLOCKS


@gluon.jit
def store_sizes(vectors, slot, norm, gain, weighed):
    """Store the norms of a block times the gain, what its weights are multiplied by, and the exponent of the gain."""
    sizes, norms, exponents = vectors
    exponent = gl.maximum((gain.to(gl.int32, bitcast=True) >> 23 & 255) - 127, LOWEST).to(gl.float32)
    sizes.index(slot).store(norm * gain)
    norms.index(slot).store(weighed)
    exponents.index(slot).store(gl.zeros_like(norm) + exponent)
