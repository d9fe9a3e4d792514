"""How `hopper_columns` brings records and raw tokens into shared memory: a ring of blocks of 64 tokens, filled by two warps.

A block is its codes, parameters and rotary channels, copied by the tensor memory accelerator, and the norms of its tokens with
the gain of their page. Of raw tokens, which other warps write, it has rotary channels and norms of 1 alone.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout

_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name until Triton 3.6
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # likewise
STEP = gl.constexpr(64)
"""Tokens of a block, pairs of bytes of a slab, and rows of a product of a warp group."""
LATENTS = gl.constexpr(LATENT_DIM)
ROPE = gl.constexpr(ROPE_DIM)
LOWEST = gl.constexpr(-100)
"""Least exponent of a gain, as in `rows`."""


def describe(pages: torch.Tensor, layout: MLALayout) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """Describe pages, of which slabs of codes, the parameters, and the rotary channels of a block are copied.

    A slab is 128 bytes of the codes of each token of a block.
    """

    def described(x: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
        shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=1 + len(shape))
        return TensorDescriptor(x, [len(x), *shape], [x.stride(0), *strides], [1, *block], shared)

    halves, words, width = pages.view(torch.int16), pages.view(torch.int32), LATENT_DIM * layout.bits // 16
    codes = described(halves, [layout.page_size, width // 64, 64], [width, 64, 1], [64, 1, 64])
    params = described(words[:, layout.k_params_offset // 4 :], [16, 32], [32, 1], [16, 32])
    rope = pages.view(torch.float16)[:, layout.rope_offset // 2 :]
    return codes, params, described(rope, [layout.page_size, 64], [64, 1], [64, 64])


@gluon.jit
def _find_block(i, paged, LAYOUT: gl.constexpr):
    """Return the page of the i-th block of a program's quantized ones, or of the last one, and which of the page it is."""
    ids_ptr, first_block, num_paged, first_body, num_ids = paged
    BLOCKS: gl.constexpr = LAYOUT.page_size // STEP
    block = first_block + gl.minimum(i, num_paged - 1) - first_body
    return gl.maximum(gl.load(ids_ptr + gl.minimum(block // BLOCKS, num_ids - 1)), 0), block % BLOCKS


@gluon.jit
def copy_blocks(descs, memory, full, free, paged, LAYOUT: gl.constexpr):
    """Copy block by block of a program's quantized ones: codes, parameters, rotary channels."""
    codes_desc, params_desc, rope_desc = descs
    codes, params, ropes = memory
    RING: gl.constexpr = ropes.shape[0]
    SLABS: gl.constexpr = codes.shape[0] // RING
    BYTES: gl.constexpr = SLABS * codes_desc.block_type.nbytes + params_desc.block_type.nbytes + rope_desc.block_type.nbytes
    for i in range(paged[2]):
        page, part = _find_block(i, paged, LAYOUT)
        slot = i % RING
        bar = full.index(slot)
        mbarrier.wait(free.index(slot), (i // RING & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        for slab in gl.static_range(SLABS):
            _copy(codes_desc, [page, part * STEP, slab, 0], bar, codes.index(slot * SLABS + slab))
        _copy(params_desc, [page, 0, 0], bar, params.index(slot))
        _copy(rope_desc, [page, part * STEP, 0], bar, ropes.index(slot))


@gluon.jit
def store_sizes(vectors, slot, norm, gain, full):
    """Store the norms of a block, times the gain too, and the exponent of the gain."""
    sizes, norms, exponents = vectors
    exponent = gl.maximum((gain.to(gl.int32, bitcast=True) >> 23 & 255) - 127, LOWEST).to(gl.float32)
    sizes.index(slot).store(norm * gain)
    norms.index(slot).store(norm)
    exponents.index(slot).store(gl.zeros_like(norm) + exponent)
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _load_sizes(i, pages, paged, LAYOUT: gl.constexpr):
    """Load the norms of a block and the gain of its page, by one warp."""
    page, part = _find_block(i, paged, LAYOUT)
    record_ptr = pages[0] + page.to(gl.int64) * pages[1]
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(gl.pointer_type(gl.float16), bitcast=True) + part * STEP
    norm = gl.load(norm_ptr + gl.arange(0, STEP, gl.BlockedLayout([2], [32], [1], [0])))
    return norm, gl.load((record_ptr + LAYOUT.gains_offset).to(gl.pointer_type(gl.float32), bitcast=True))


@gluon.jit
def copy_sizes(vectors, full, free, pages, paged, LAYOUT: gl.constexpr):
    """Copy what belongs to the tokens of a program's quantized blocks, and to their pages."""
    SLOTS: gl.constexpr = vectors[0].shape[0]
    if paged[2] > 0:
        norm, gain = _load_sizes(0, pages, paged, LAYOUT)
        for i in range(paged[2]):
            next_norm, next_gain = _load_sizes(i + 1, pages, paged, LAYOUT)
            slot = i % SLOTS
            mbarrier.wait(free.index(slot), (i // SLOTS & 1) ^ 1)
            store_sizes(vectors, slot, norm.to(gl.float32), gain, full)
            norm, gain = next_norm, next_gain
