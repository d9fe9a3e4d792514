"""Prefill attention over plain tokens for GPUs of compute capability 9.0: products by warp groups, copies by the accelerator.

A program attends with a tile of 128 query rows to the segments of tokens that its record lists (`records`). One warp copies
keys and values into shared memory (`hopper_copy`); two warp groups, of 64 rows each, work on them: while the tensor cores
multiply the keys of a step and the values of the step before, the other units compute the weights of the step
(FlashAttention-3, arXiv 2407.08608). It is written in Gluon, because Triton waits for a product as soon as its result is used
outside of products.

Steps that need a mask come first, in a loop of their own. Grid: (program,), those of a kv head next to each other. Bytes moved:
keys and values once for each program, most of them from the L2 cache; queries and results once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from .. import configs
from ..launch import Rows, on
from . import records
from .hopper_copy import copy_tokens, number_of, step_of
from .hopper_store import HALF, store_results
from .prefill_plan import PrefillPlan
from .schedule import Tiles

if TYPE_CHECKING:
    from .plain import PlainWork

RECORD = gl.constexpr(records.RECORD.value)
COUNT = gl.constexpr(records.COUNT.value)
SHIFT = gl.constexpr(records.SHIFT.value)
WINDOW = gl.constexpr(records.WINDOW.value)


@gluon.jit
def _advance(products, m, l_sum, factor, dtype: gl.constexpr):
    """Return the weights of products with keys, the factor of what was summed before, and the new m and l (`softmax`)."""
    m_new = gl.maximum(m, gl.max(products, 1) * factor)
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m - origin)
    weights = gl.exp2(products * factor - origin[:, None])
    return weights.to(dtype), alpha, m_new, l_sum * alpha + gl.sum(weights, 1)


@gluon.jit
def _masked(products, i, num_masked, record_ptr, query, reach):
    """Return the products of step i, -inf where a row does not see the token, and how many of the step's tokens there are.

    `query` [rows] are numbers of new tokens, and `reach` those before which all are that a row sees.
    """
    T: gl.constexpr = products.shape[1]
    segment, step = step_of(i, record_ptr)
    count = number_of(record_ptr, COUNT, segment) - step * T
    shift = number_of(record_ptr, SHIFT, segment) - step * T
    end = gl.minimum(count, reach + shift)
    first = query + 1 + (shift - number_of(record_ptr, WINDOW, segment))
    if i >= num_masked:
        count = gl.to_tensor(T)
        end = gl.full_like(end, T)
        first = gl.full_like(first, 0)
    token = gl.arange(0, T, gl.SliceLayout(0, products.type.layout))[None, :]
    return gl.where((token < end[:, None]) & (token >= first[:, None]), products, float("-inf")), count


@gluon.jit
def _clear(v, v_full, phase, count):
    """Put values of tokens from `count` on to 0: their weights are, but they may be no numbers.

    Both warp groups do it for all tokens, so that neither waits for the other.
    """
    T: gl.constexpr = v.shape[0]
    CHANNELS: gl.constexpr = v.shape[1]
    ROWS: gl.constexpr = 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHANNELS, CHANNELS // 8], [4, 1], [1, 0])
    if count < T:
        mbarrier.wait(v_full, phase)
        for first in gl.static_range(0, T, ROWS):
            if count < first + ROWS:
                rows = v.slice(first, ROWS)
                there = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) < count
                values = rows.load(LAYOUT)
                rows.store(gl.where(there[:, None], values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def _load_queries(q, query, tile, head, GROUP: gl.constexpr):
    """Load the queries of a warp group into shared memory; rows that are not there are 0."""
    q_ptr, stride_token, stride_head = q
    first_token, first_row, num_rows = tile
    CHANNELS: gl.constexpr = query.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHANNELS, CHANNELS // 8], [4, 1], [1, 0])
    row = gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    token = (first_token + (first_row + row) // GROUP).to(gl.int64)
    q_head = (head * GROUP + (first_row + row) % GROUP).to(gl.int64)
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(0, LAYOUT))
    place = (token * stride_token + q_head * stride_head)[:, None] + channel[None, :]
    query.store(gl.load(q_ptr + place, (row < num_rows)[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def _keys(k, stage):
    T: gl.constexpr = k.shape[1] * k.shape[4]
    return k.index(stage).reshape((T, k.shape[5])).permute((1, 0))


@gluon.jit
def _values(v, stage):
    T: gl.constexpr = v.shape[1] * v.shape[4]
    return v.index(stage).reshape((T, v.shape[5]))


@gluon.jit
def _attend(half: gl.constexpr, smem, bars, place, rounds, rows, GROUP: gl.constexpr, SINGLE: gl.constexpr):
    """Attend with half of the rows: products with the keys of a step, and with the values of the one before, run together.

    Rows go on from their states, if rounds of pages came before, and leave states, if rounds follow.
    """
    queries, k, v = smem
    k_full, k_free, v_full, v_free = bars
    record_ptr, program, head = place
    first_round, last_round, states_ptr = rounds
    q, results, span_ends_ptr, factor = rows
    STAGES: gl.constexpr = k.shape[0]
    T: gl.constexpr = k.shape[1] * k.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, v.shape[5], 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    tile = (gl.load(record_ptr), gl.load(record_ptr + 1) + half * HALF, gl.load(record_ptr + 2) - half * HALF)
    num_masked = gl.load(record_ptr + 4)
    steps = gl.load(record_ptr + 5)
    rows_of_half = queries.index(half)
    _load_queries(q, rows_of_half, tile, head, GROUP)
    none = gl.zeros((HALF, T), gl.float32, SCORES)
    row = gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    query = (tile[1] + row) // GROUP
    reach = query + 1
    if span_ends_ptr is not None:
        ends = gl.load(span_ends_ptr + tile[0] + query, row < tile[2], other=0)
        reach = gl.maximum(reach, gl.minimum(ends, gl.load(record_ptr + 3)))
    state_row = program.to(gl.int64) * 2 * HALF + half * HALF
    acc_row = (state_row + gl.arange(0, HALF, gl.SliceLayout(1, SUMS)))[:, None] * v.shape[5]
    acc_ptr = states_ptr + acc_row + gl.arange(0, v.shape[5], gl.SliceLayout(0, SUMS))[None, :]
    num_rows = gl.num_programs(0).to(gl.int64) * 2 * HALF
    m_ptr = states_ptr + num_rows * v.shape[5] + state_row + row
    acc = gl.load(acc_ptr, first_round == 0, other=0.0)
    m = gl.load(m_ptr, first_round == 0, other=float("-inf"))
    l_sum = gl.load(m_ptr + num_rows, first_round == 0, other=0.0)
    mbarrier.wait(k_full.index(0), 0)
    products = warpgroup_mma(rows_of_half, _keys(k, 0), none, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, [products])
    mbarrier.arrive(k_free.index(0), count=1)
    products, count = _masked(products, 0, num_masked, record_ptr, query, reach)
    weights, alpha, m, l_sum = _advance(products, m, l_sum, factor, v.dtype)
    _clear(_values(v, 0), v_full.index(0), 0, count)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    operand = gl.convert_layout(weights, OPERAND)
    mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES & 1, pred=steps > 1)
    for WHOLE in gl.static_range(2):
        first = gl.maximum(num_masked, 1) if WHOLE else 1
        for i in range(first, steps if WHOLE else num_masked):
            stage = i % STAGES
            older = (i - 1) % STAGES
            products = warpgroup_mma(rows_of_half, _keys(k, stage), none, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(older), (i - 1) // STAGES & 1)
            acc = warpgroup_mma(operand, _values(v, older), acc, is_async=True)
            products = warpgroup_mma_wait(1, [products])
            mbarrier.arrive(k_free.index(stage), count=1)
            if not WHOLE:
                products, count = _masked(products, i, num_masked, record_ptr, query, reach)
            weights, alpha, m, l_sum = _advance(products, m, l_sum, factor, v.dtype)
            # Here, because ptxas moves nothing across the loop that this is: it would wait for the product before the weights.
            mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < steps)
            acc, weights = warpgroup_mma_wait(0, [acc, weights])
            mbarrier.arrive(v_free.index(older), count=1)
            if not WHOLE:
                _clear(_values(v, stage), v_full.index(stage), i // STAGES & 1, count)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
            operand = gl.convert_layout(weights, OPERAND)
    last = (steps - 1) % STAGES
    mbarrier.wait(v_full.index(last), (steps - 1) // STAGES & 1)
    acc = warpgroup_mma(operand, _values(v, last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    if last_round != 0:
        store_results(acc, m, l_sum, results, tile, head, GROUP, SINGLE)
    else:
        gl.store(acc_ptr, acc)
        gl.store(m_ptr, m)
        gl.store(m_ptr + num_rows, l_sum)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return barriers that so many arrivals complete."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit(
    do_not_specialize=["num_kv_heads", "num_splits", "first_token", "num_tokens", "first_round", "last_round"],
    do_not_specialize_on_alignment=["lse_ptr", "records_ptr", "span_ends_ptr", "sinks_ptr"],
)
def _kvarn_attend_hopper_kernel(
    out,  # Rows, or of partial results, as in `prefill_kernel`
    lse_ptr,  # float32, or None; likewise
    q,  # Rows
    k_new,  # [1, 1, num_kv_heads, total_tokens, head_dim], like all keys and values described
    v_new,
    k_paged,  # scratch memory [num_slots, 2, num_kv_heads, page_size, head_dim]
    v_paged,
    k_raw,  # raw tokens, likewise
    v_raw,
    records_ptr,  # int32 [programs, RECORD] (`records`)
    states_ptr,  # float32: acc [programs * 128, v_head_dim], m and l [programs * 128], base 2; unused if there is one round
    span_ends_ptr,  # int32 [total_tokens], or None
    sinks_ptr,  # float32 [num_q_heads], or None
    factor,  # of scores, base 2
    num_kv_heads,
    num_splits,
    first_token,  # of this launch
    num_tokens,  # of this launch
    first_round,  # whether this is the first round of pages
    last_round,
    GROUP: gl.constexpr,
    G: gl.constexpr,
    STAGES: gl.constexpr,
    SINGLE: gl.constexpr,  # one share: the result itself is written
):
    if not SINGLE:
        gdc_launch_dependents()  # the merge
    count = gl.num_programs(0) // num_kv_heads
    head = gl.program_id(0) // count
    split = gl.program_id(0) % count % num_splits
    program = gl.program_id(0) % count * num_kv_heads + head
    record_ptr = records_ptr + program * RECORD
    if gl.load(record_ptr + 5) > 0:
        dtype: gl.constexpr = k_paged.dtype
        K_CHANNELS: gl.constexpr = k_paged.block_type.shape[4]
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        queries = gl.allocate_shared_memory(dtype, [2, HALF, K_CHANNELS], LAYOUT)
        k = gl.allocate_shared_memory(dtype, [STAGES] + k_paged.block_type.shape, k_paged.layout)
        v = gl.allocate_shared_memory(dtype, [STAGES] + v_paged.block_type.shape, v_paged.layout)
        bars = (barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2))
        fence_async_shared()
        smem = (queries, k, v)
        place = (record_ptr, program, head)
        rounds = (first_round, last_round, states_ptr)
        tokens = (split.to(gl.int64) * num_tokens - first_token, first_token, first_token + num_tokens)
        results = (out, lse_ptr, sinks_ptr, tokens, num_kv_heads * GROUP)
        rows = (q, results, span_ends_ptr, factor)
        gl.warp_specialize(
            [
                (_attend, (0, smem, bars, place, rounds, rows, GROUP, SINGLE)),
                (_attend, (1, smem, bars, place, rounds, rows, GROUP, SINGLE)),
                (copy_tokens, ((k_new, k_paged, k_raw), (v_new, v_paged, v_raw), smem, bars, record_ptr, head, G)),
            ],
            [4, 1],
            [240, 24],
        )


def _described(x: torch.Tensor, channels: int, block: list[int]) -> TensorDescriptor:
    """Describe a tensor [., ., heads, tokens, ...], of which blocks of tokens with their first channels are copied."""
    shape, strides = [*x.shape[:4], channels], list(x.stride())
    for i in range(3, -1, -1):
        strides[i] = strides[i] or x.shape[i + 1] * strides[i + 1]  # 0 where there is one, or where nothing is read
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5)
    return TensorDescriptor(x, shape, strides, [*block, channels], layout)


def _slots(memory: torch.Tensor, channels: int, tokens: int) -> TensorDescriptor:
    """Describe pages [slots, 2, num_kv_heads, page_size, channels], of which `tokens` keys or values of a head are copied."""
    return _described(memory, channels, [max(tokens // memory.shape[3], 1), 1, 1, min(tokens, memory.shape[3])])


def _rows(rows: Rows, tokens: int) -> TensorDescriptor:
    """Describe rows [total_tokens, num_kv_heads, channels], of which `tokens` of a head are copied."""
    x = rows.ptr if all(rows.ptr.stride()) else rows.ptr.contiguous()
    return _described(x.transpose(0, 1)[None, None], x.shape[2], [1, 1, 1, tokens])


def launch_hopper(work: PlainWork, tiles: Tiles, plan: PrefillPlan, rounds: tuple[bool, bool]) -> None:
    """Attend as records say; nothing is checked. `rounds`: whether it is the first and the last round of pages."""
    layout = tiles.cache.layout
    tokens, stages = configs.plain_steps(layout)
    dims = layout.head_dim, layout.v_head_dim
    paged = [_slots(work.scratch, channels, tokens) for channels in dims]
    raw = paged if work.raw is None else [_slots(work.raw, channels, tokens) for channels in dims]
    new = paged if work.new is None else [_rows(rows, tokens) for rows in work.new]
    on(work.scratch, _kvarn_attend_hopper_kernel)[(len(work.records),)](
        work.out,
        work.lse,
        work.q,
        *new,
        *paged,
        *raw,
        work.records,
        work.states,
        work.masking.among.span_ends,
        work.sinks,
        work.masking.scores.scale,
        tiles.cache.num_kv_heads,
        tiles.num_splits,
        tiles.tokens.start,
        len(tiles.tokens),
        *map(int, rounds),
        GROUP=plan.group,
        G=layout.page_size,
        STAGES=stages,
        SINGLE=plan.single,
        num_warps=4,
        enable_fp_fusion=True,
    )
