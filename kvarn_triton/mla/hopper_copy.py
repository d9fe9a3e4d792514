"""How `hopper_columns` brings records into shared memory: a ring of blocks of 64 tokens, filled by two warps.

A block is its codes, parameters and rotary channels, copied by the tensor memory accelerator, and the norms of its tokens with
the gain of their page. Blocks of raw tokens are written by other warps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..tile.gluon import copy_tile
from .hopper_blocks import STEP, load_id, part_of, store_sizes


@gluon.jit
def copy_blocks(descs, memory, full, free, paged, LAYOUT: gl.constexpr):
    """Copy block by block of a program's quantized ones: codes, parameters, rotary channels."""
    codes_desc, params_desc, rope_desc = descs
    codes, params, ropes = memory
    RING: gl.constexpr = ropes.shape[0]
    SLABS: gl.constexpr = codes.shape[0] // RING
    BYTES: gl.constexpr = SLABS * codes_desc.block_type.nbytes + params_desc.block_type.nbytes + rope_desc.block_type.nbytes
    for i in range(paged[2]):
        page, part = gl.maximum(load_id(i, paged, LAYOUT), 0), part_of(i, paged, LAYOUT)
        slot = i % RING
        bar = full.index(slot)
        mbarrier.wait(free.index(slot), (i // RING & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        for slab in gl.static_range(SLABS):
            copy_tile(codes_desc, [page, part * STEP, slab, 0], bar, codes.index(slot * SLABS + slab))
        copy_tile(params_desc, [page, 0, 0], bar, params.index(slot))
        copy_tile(rope_desc, [page, part * STEP, 0], bar, ropes.index(slot))


@gluon.jit
def _load_sizes(i, pages, paged, LAYOUT: gl.constexpr):
    """Load the norms of a block and the gain of its page, by one warp."""
    page, part = gl.maximum(load_id(i, paged, LAYOUT), 0), part_of(i, paged, LAYOUT)
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
            size = norm.to(gl.float32)
            store_sizes(vectors, slot, size, gain, size)
            mbarrier.arrive(full.index(slot), count=1)
            norm, gain = next_norm, next_gain
