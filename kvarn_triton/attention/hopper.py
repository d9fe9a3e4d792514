"""Attention without masks for GPUs of compute capability 9.0: products by warp groups, copies by the tensor memory accelerator.

A program attends with 128 query rows to a run of 16-bit tokens. One warp copies keys and values into shared memory; two warp
groups, of 64 rows each, work on them: while the tensor cores multiply the keys of a step and the values of the step before, the
other units compute the weights of the step (FlashAttention-3, arXiv 2407.08608). It is written in Gluon, because Triton waits
for a product as soon as its result is used outside of products.

Grid: (program,), those of a kv head next to each other. Bytes moved: keys and values once for each program, most of them from
the L2 cache; rows and states once.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import configs
from ..launch import on
from ..layout import PageLayout
from .ahead import Ahead

_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name until Triton 3.6
HALF = gl.constexpr(64)
"""Query rows of a warp group: those of its product."""


@gluon.jit
def _copy(descs, smem, bars, program, run, G: gl.constexpr):
    """Copy the queries, and keys and values step by step, each into the stage that both warp groups have left."""
    q_desc, k_desc, v_desc = descs
    q, k, v = smem
    q_full, k_full, k_free, v_full, v_free = bars
    slot, head, steps, _ = run
    STAGES: gl.constexpr = k.shape[0]
    T: gl.constexpr = k.shape[1] * k.shape[4]
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
    for half in gl.static_range(2):
        _copy_tile(q_desc, [(program * 2 + half) * HALF, 0], q_full, q.index(half))
    for i in range(steps):
        stage = i % STAGES
        phase = i // STAGES & 1
        page = slot + i * T // G
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        _copy_tile(k_desc, [page, 0, head, i * T % G, 0], k_full.index(stage), k.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        _copy_tile(v_desc, [page, 1, head, i * T % G, 0], v_full.index(stage), v.index(stage))


@gluon.jit
def _advance(products, m, l_sum, factor, dtype: gl.constexpr):
    """Return the weights of products with keys, the factor of what was summed before, and the new m and l (`softmax`)."""
    m_new = gl.maximum(m, gl.max(products, 1) * factor)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m - origin)
    weights = gl.exp2(products * factor - origin[:, None])
    return weights.to(dtype), alpha, m_new, l_sum * alpha + gl.sum(weights, 1)


@gluon.jit
def _attend(half: gl.constexpr, smem, bars, states, program, run, factor):
    """Attend with half of the rows: products with the keys of a step, and with the values of the one before, run together.

    Rows go on from their states, if there are tokens before.
    """
    _, _, steps, before = run
    q, k, v = smem
    q_full, k_full, k_free, v_full, v_free = bars
    acc_ptr, m_ptr, l_ptr = states
    STAGES: gl.constexpr = k.shape[0]
    K_CHANNELS: gl.constexpr = k.shape[5]
    V_CHANNELS: gl.constexpr = v.shape[5]
    T: gl.constexpr = k.shape[1] * k.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V_CHANNELS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    none = gl.zeros((HALF, T), gl.float32, SCORES)
    first_row = program.to(gl.int64) * 2 * HALF + half * HALF
    channel = gl.arange(0, V_CHANNELS, gl.SliceLayout(0, SUMS))
    place = (first_row + gl.arange(0, HALF, gl.SliceLayout(1, SUMS)))[:, None] * V_CHANNELS + channel[None, :]
    row = first_row + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    acc = gl.load(acc_ptr + place, before > 0, other=0.0)
    m = gl.load(m_ptr + row, before > 0, other=float("-inf"))
    l_sum = gl.load(l_ptr + row, before > 0, other=0.0)
    mbarrier.wait(q_full, 0)
    query = q.index(half)
    mbarrier.wait(k_full.index(0), 0)
    products = warpgroup_mma(query, k.index(0).reshape((T, K_CHANNELS)).permute((1, 0)), none, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, [products])
    mbarrier.arrive(k_free.index(0), count=1)
    weights, alpha, m, l_sum = _advance(products, m, l_sum, factor, v.dtype)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    operand = gl.convert_layout(weights, OPERAND)
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=steps > 1)
    for i in range(1, steps):
        stage = i % STAGES
        older = (i - 1) % STAGES
        products = warpgroup_mma(
            query, k.index(stage).reshape((T, K_CHANNELS)).permute((1, 0)), none, use_acc=False, is_async=True
        )
        mbarrier.wait(v_full.index(older), (i - 1) // STAGES & 1)
        acc = warpgroup_mma(operand, v.index(older).reshape((T, V_CHANNELS)), acc, is_async=True)
        products = warpgroup_mma_wait(1, [products])
        mbarrier.arrive(k_free.index(stage), count=1)
        weights, alpha, m, l_sum = _advance(products, m, l_sum, factor, v.dtype)
        # Here, because ptxas moves nothing across the loop that this is: it would wait for the product before the weights.
        mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < steps)
        acc, weights = warpgroup_mma_wait(0, [acc, weights])
        mbarrier.arrive(v_free.index(older), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
        operand = gl.convert_layout(weights, OPERAND)
    last = (steps - 1) % STAGES
    mbarrier.wait(v_full.index(last), (steps - 1) // STAGES & 1)
    acc = warpgroup_mma(operand, v.index(last).reshape((T, V_CHANNELS)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    gl.store(acc_ptr + place, acc)
    gl.store(m_ptr + row, m)
    gl.store(l_ptr + row, l_sum)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return barriers that so many arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit(do_not_specialize=["num_kv_heads"])
def _kvarn_attend_hopper_kernel(
    acc_ptr,  # float32 [programs * 128, v_head_dim]
    m_ptr,  # float32 [programs * 128], base 2
    l_ptr,  # float32 [programs * 128]
    q_desc,  # [programs * 128, head_dim], rotated
    k_desc,  # scratch memory [num_slots, 2, num_kv_heads, page_size, head_dim]
    v_desc,  # the same with v_head_dim
    factor_ptr,  # float32 [programs]
    runs_ptr,  # int32 [programs, 3], as in `ahead.Ahead`
    num_kv_heads,
    G: gl.constexpr,
    T: gl.constexpr,
    STAGES: gl.constexpr,
):
    count = gl.num_programs(0) // num_kv_heads
    head = gl.program_id(0) // count
    program = gl.program_id(0) % count * num_kv_heads + head
    steps = gl.load(runs_ptr + program * 3 + 1) // T
    if steps > 0:
        run = (gl.load(runs_ptr + program * 3), head, steps, gl.load(runs_ptr + program * 3 + 2))
        factor = gl.load(factor_ptr + program)
        dtype: gl.constexpr = q_desc.dtype
        q = gl.allocate_shared_memory(dtype, [2, HALF, q_desc.block_type.shape[1]], q_desc.layout)
        k = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
        v = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
        q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(q_full, count=1)
        bars = (q_full, barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2))
        fence_async_shared()
        smem = (q, k, v)
        states = (acc_ptr, m_ptr, l_ptr)
        gl.warp_specialize(
            [
                (_attend, (0, smem, bars, states, program, run, factor)),
                (_attend, (1, smem, bars, states, program, run, factor)),
                (_copy, ((q_desc, k_desc, v_desc), smem, bars, program, run, G)),
            ],
            [4, 1],
            [240, 24],
        )


def _rows(x: torch.Tensor, channels: int) -> TensorDescriptor:
    """Describe rows [rows, channels], of which those of a warp group are copied."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(x, list(x.shape), [channels, 1], [HALF.value, channels], layout)


def _steps(scratch: torch.Tensor, channels: int, tokens: int) -> TensorDescriptor:
    """Describe scratch memory, of which the first channels of `tokens` keys or values of a head are copied at once."""
    shape, page_size, strides = scratch.shape, scratch.shape[3], list(scratch.stride())
    block = [max(tokens // page_size, 1), 1, 1, min(tokens, page_size), channels]
    for i in range(3, -1, -1):
        strides[i] = strides[i] or shape[i + 1] * strides[i + 1]  # 0 where there is one, or where nothing is read
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
    return TensorDescriptor(scratch, [*shape[:4], channels], strides, block, layout)


def launch_hopper(ahead: Ahead, scratch: torch.Tensor, layout: PageLayout) -> None:
    """Attend with rows of queries to their runs of scratch memory; nothing is checked."""
    tokens, stages = configs.hopper_steps(layout)
    on(scratch, _kvarn_attend_hopper_kernel)[(len(ahead.factor),)](
        ahead.acc,
        ahead.m,
        ahead.l,
        _rows(ahead.q, layout.head_dim),
        _steps(scratch, layout.head_dim, tokens),
        _steps(scratch, layout.v_head_dim, tokens),
        ahead.factor,
        ahead.runs,
        scratch.shape[2],
        G=layout.page_size,
        T=tokens,
        STAGES=stages,
        num_warps=4,
        enable_fp_fusion=True,
    )
