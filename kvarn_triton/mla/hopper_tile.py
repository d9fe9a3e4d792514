"""The form of `hopper` for tiles of 64 query rows: numbers of a block of tokens in shared memory, which all rows read.

A warp group makes the numbers (`hopper_fill`), beside a warp that copies rotary channels and parameters. Two groups take turns
with blocks (`hopper_attend`): each multiplies the queries by the numbers of its own, computes weights, and sums half of the
channels of all blocks.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..attention.hopper import barriers
from ..tile.gluon import barrier
from .hopper_attend import attend_first, attend_second
from .hopper_blocks import ROPE, STEP
from .hopper_fill import PAIRS, copy_params, fill


@gluon.jit
def attend_tile(pointers, tile, records, raw, paged, work, LAYOUT: gl.constexpr, PLAN: gl.constexpr):
    """Attend with a tile of rows to the blocks of a program."""
    OPERANDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    VECTORS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS: gl.constexpr = PLAN.rows
    params_desc, rope_desc, pages = records
    queries = gl.allocate_shared_memory(gl.float16, [4, ROWS, PAIRS], OPERANDS)
    rope_queries = gl.allocate_shared_memory(gl.float16, [1, ROWS, ROPE], OPERANDS)
    latents = gl.allocate_shared_memory(gl.float16, [8, STEP, PAIRS], OPERANDS)
    ropes = gl.allocate_shared_memory(gl.float16, [1] + rope_desc.block_type.shape, rope_desc.layout)
    params = gl.allocate_shared_memory(gl.int32, [2] + params_desc.block_type.shape, params_desc.layout)
    weights = gl.allocate_shared_memory(gl.float16, [ROWS, STEP], OPERANDS)
    maxima = gl.allocate_shared_memory(gl.float32, [ROWS], VECTORS)
    totals = gl.allocate_shared_memory(gl.float32, [2, ROWS], VECTORS)
    sizes = gl.allocate_shared_memory(gl.float32, [2, STEP], VECTORS)
    norms = gl.allocate_shared_memory(gl.float32, [2, STEP], VECTORS)
    exponents = gl.allocate_shared_memory(gl.float32, [2, STEP], VECTORS)
    full, free, alone = barriers(4, 1), barriers(4, 1), barriers(3, 1)
    params = (params, barriers(2, 1), barriers(2, 1))
    handed = (weights, maxima, alone.index(0))
    ends = (totals, barriers(2, 1), barriers(2, 1))
    fence_async_shared()
    barrier()
    bars = (full, free, alone.index(1), alone.index(2))
    vectors = (sizes, norms, exponents)
    memory = (queries, rope_queries, latents, ropes, vectors)
    gl.warp_specialize(
        [
            (attend_first, (pointers, tile, memory, handed, ends, bars, work)),
            (attend_second, (pointers, tile, memory, handed, ends, bars, work)),
            (fill, ((latents, ropes, vectors), params, bars, (pages, paged, raw), work, LAYOUT)),
            (copy_params, ((params_desc, rope_desc), ropes, params, (alone.index(2), alone.index(1)), pages, paged, LAYOUT)),
        ],
        [4, 4, 1],
        [200, 88, 24],  # registers; those that are left are the first one's
    )
