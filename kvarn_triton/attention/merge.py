"""Merge the partial results of the pieces of one call of attention.

`_kvarn_merge_splits_kernel` (decode) and `_kvarn_merge_queries_kernel` (prefill): one program merges the partial results of one
query head, or of decode some channels of them, and its attention sink, and rotates the sum back. Grid: (program,), those of a
sequence next to each other, and (token, query head).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .. import configs, gpu, merging
from ..launch import as_rows, on
from ..tile.arithmetic import LOG2E, hadamard, scaled
from .schedule import Tiles, Units, Work, piece_of_unit, plan, rounded_up, row_units, start_of_row
from .softmax import with_sink

LN2 = tl.constexpr(0.6931471805599453)
MERGE_CHANNELS = tl.constexpr(merging.MERGE_CHANNELS)
"""Channels that a merge of decode rotates back at most. Partial results are rotated back by the rest of the matrix, which is
one over blocks of so many channels: its sums are those of registers, and programs can share the channels of a head."""


@dataclass(frozen=True)
class MergePlan:
    """What a merge is compiled for."""

    v_head_dim: int
    channels: int  # of a program
    rotation: int  # block of the rotation that is undone; 1: none
    block_d: int  # the same, padded
    block_s: int  # partial results that are looked at together
    early: bool  # whether the kernel starts before the one that it waits for ends
    empty: bool  # whether a partial result may be one of no key
    group: int  # query heads of a kv head
    tile: int  # query heads of a tile
    units: Units | None


@functools.lru_cache
def _plan_merge(
    channels: tuple[int, int],
    rotation: int,
    block_s: int,
    early: bool,
    empty: bool,
    heads: tuple[int, int],
    units: Units | None,
) -> tuple[MergePlan, int]:
    """Return what a merge is compiled for, and its warps.

    `channels` are those of a head and of a program, `heads` the query heads of a kv head and of a tile.
    """
    block_d = triton.next_power_of_2(channels[1])
    plan = MergePlan(*channels, rotation, block_d, block_s, early, empty, *heads, units)
    return plan, merging.merge_warps(block_s, block_d)


@triton.jit
def merged(partial_ptr, partial_lse_ptr, count, stride, PLAN: tl.constexpr):
    """Return the merged result [1, channels] and log-sum-exp [1], base 2, of `count` results `stride` rows apart."""
    BLOCK_D: tl.constexpr = PLAN.block_d
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < PLAN.channels
    m_i = tl.full((1,), float("-inf"), tl.float32)
    l_i = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    row = tl.arange(0, PLAN.block_s)
    place = row.to(tl.int64) * stride
    for start in range(0, count, PLAN.block_s):
        mask = row < count - start
        base = (tl.zeros((), tl.int64) + start) * stride
        lse = tl.load(partial_lse_ptr + base + place, mask, other=float("-inf"))
        some = mask
        if PLAN.empty:
            some = lse > float("-inf")
        some = some[:, None]
        if PLAN.channels < BLOCK_D:
            some &= mask_d
        partial = tl.load(partial_ptr + base * PLAN.v_head_dim + (place[:, None] * PLAN.v_head_dim + offs_d), some, other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, axis=0))
        origin = m_new
        if PLAN.empty:
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
        weights = tl.exp2(lse - origin)
        alpha = tl.exp2(m_i - origin)
        l_i = l_i * alpha + tl.sum(weights, axis=0)
        acc = acc * alpha[:, None] + tl.sum(partial * weights[:, None], axis=0)[None, :]
        m_i = m_new
    return scaled(acc, 1.0 / tl.where(l_i > 0, l_i, 1.0)), m_i + tl.log2(l_i)


@triton.jit
def store_result(out_ptr, lse_ptr, out, lse, PLAN: tl.constexpr):
    """Rotate a result [1, channels] back and store it, and its log-sum-exp if there is memory for it."""
    offs_d = tl.arange(0, PLAN.block_d)[None, :]
    out = hadamard(out, PLAN.rotation)
    tl.store(out_ptr + offs_d, out.to(out_ptr.dtype.element_ty), offs_d < PLAN.channels)
    if lse_ptr is not None:
        tl.store(lse_ptr + tl.arange(0, 1), lse * LN2)


@triton.jit(
    do_not_specialize=["num_tiles", "num_programs", "few_programs", "sink_len", "split_size"],
    do_not_specialize_on_alignment=["lse_ptr", "seq_lens_ptr", "num_quantized_ptr", "sinks_ptr"],
)
def _kvarn_merge_splits_kernel(
    out,  # Rows [batch, num_q_heads, v_head_dim]
    lse_ptr,  # float32 [batch, num_q_heads], natural logarithm, or None
    partial_ptr,  # float32 [num_partials, tile, v_head_dim], rotated in blocks of MERGE_CHANNELS
    partial_lse_ptr,  # float32 [num_partials, tile], base 2
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch], or None
    sinks_ptr,  # float32 [num_q_heads], natural logarithm, or None
    num_tiles,  # of query heads
    num_programs,
    few_programs,
    sink_len,
    windows,  # Windows
    split_size,
    PLAN: tl.constexpr,
):
    GROUP: tl.constexpr = PLAN.group
    TILE: tl.constexpr = PLAN.tile
    SHARES: tl.constexpr = PLAN.v_head_dim // PLAN.channels
    num_q_heads = num_tiles // triton.cdiv(GROUP, TILE) * GROUP
    first_channel = tl.program_id(0) % SHARES * PLAN.channels
    index = tl.program_id(0) // SHARES
    q_head, row = index % num_q_heads, index // num_q_heads
    batch = tl.num_programs(0) // (num_q_heads * SHARES)
    tile = q_head // GROUP * triton.cdiv(GROUP, TILE) + q_head % GROUP // TILE
    UNITS: tl.constexpr = PLAN.units
    rows = (seq_lens_ptr, num_quantized_ptr, sink_len, windows)
    _, size, longer, split = plan(rows, batch, num_tiles, num_programs, few_programs, split_size, UNITS)
    row_start = start_of_row(rows, row, num_tiles, split, UNITS)
    _, _, _, counts = row_units(rows, row, row >= 0, UNITS)
    units = counts[0] + counts[1] + counts[2]
    first_unit = row_start + tile * rounded_up(units, split)
    first_piece = piece_of_unit(first_unit, size, longer)
    last_piece = piece_of_unit(first_unit + units - 1, size, longer)
    num_parts = tl.where(units > 0, last_piece - first_piece + 1, 0)
    place = (row * num_tiles + tile + first_piece).to(tl.int64) * TILE + q_head % GROUP % TILE
    if sinks_ptr is not None:
        logit = tl.load(sinks_ptr + q_head + tl.arange(0, 1)) * LOG2E
    # The number is never negative: it is asked for so that the compiler leaves nothing of the plan for after the wait.
    if PLAN.early and num_parts > -1000:
        gdc_wait()
    first_ptr = partial_ptr + place * PLAN.v_head_dim + first_channel
    result, lse = merged(first_ptr, partial_lse_ptr + place, num_parts, TILE, PLAN)
    if sinks_ptr is not None:
        result, lse = with_sink(result, lse, logit)
    out_row_ptr = out.ptr + row.to(tl.int64) * out.stride_token + q_head.to(tl.int64) * out.stride_head + first_channel
    lse_row_ptr = lse_ptr
    if lse_ptr is not None:
        lse_row_ptr = lse_ptr + index
    store_result(out_row_ptr, lse_row_ptr, result, lse, PLAN)


def launch_merge_splits(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    sinks: torch.Tensor | None,
    work: Work,
    early: bool,
) -> None:
    """Merge the partial results of a decode call, and the logits of its sinks, into `out` and `lse`; nothing is checked."""
    batch, num_q_heads, v_head_dim = out.shape
    cache = work.cache
    tile, num_tiles = configs.head_tiles(num_q_heads, cache.num_kv_heads)
    block_s = merging.merge_block(work.num_programs, batch * num_tiles, configs.padded(v_head_dim), work.split_size)
    channels = merging.merge_channels(v_head_dim, batch * num_q_heads, out.device, work.split_size)
    heads, rotation = (num_q_heads // cache.num_kv_heads, tile), min(cache.layout.v_block_size, merging.MERGE_CHANNELS)
    plan, num_warps = _plan_merge((v_head_dim, channels), rotation, block_s, early, False, heads, work.units)
    on(out, _kvarn_merge_splits_kernel)[(num_q_heads * batch * (v_head_dim // channels),)](
        as_rows(out),
        lse,
        partial,
        partial_lse,
        cache.seq_lens,
        cache.num_quantized,
        sinks,
        num_tiles,
        work.num_programs,
        work.few_programs,
        cache.sinks,
        work.windows,
        work.split_size,
        PLAN=plan,
        num_warps=num_warps,
        enable_fp_fusion=work.split_size == 0,
        **({"launch_pdl": True} if early else {}),
    )


@triton.jit(
    do_not_specialize=["batch", "num_splits", "first_token", "total_rows", "fill"],
    do_not_specialize_on_alignment=["lse_ptr", "cu_seqlens_ptr", "sinks_ptr"],
)
def _kvarn_merge_queries_kernel(
    out,  # Rows [total_tokens, num_q_heads, v_head_dim]
    lse_ptr,  # float32 [total_tokens, num_q_heads], natural logarithm, or None
    partial_ptr,  # float32 [num_splits, total_tokens, num_q_heads, v_head_dim]
    partial_lse_ptr,  # float32 [num_splits, total_tokens, num_q_heads], base 2
    cu_seqlens_ptr,  # int32 [batch + 1], None if each sequence has one token
    sinks_ptr,  # float32 [num_q_heads], natural logarithm, or None
    batch,
    num_splits,
    first_token,  # of this launch
    total_rows,  # of this launch
    fill,  # whether rows of no sequence are zeroed; their log-sum-exp always is -inf
    PLAN: tl.constexpr,
):
    q_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + q_head
    token = (first_token + tl.program_id(0)).to(tl.int64)
    lse_row_ptr = lse_ptr
    if lse_ptr is not None:
        lse_row_ptr = lse_ptr + token * tl.num_programs(1) + q_head
    out_row_ptr = out.ptr + token * out.stride_token + q_head * out.stride_head
    owned = token >= 0
    if cu_seqlens_ptr is not None:
        owned = (token >= tl.load(cu_seqlens_ptr)) & (token < tl.load(cu_seqlens_ptr + batch))
    if PLAN.early:
        gdc_wait()
    if owned:
        result, lse = merged(partial_ptr + row * PLAN.v_head_dim, partial_lse_ptr + row, num_splits, total_rows, PLAN)
        if sinks_ptr is not None:
            result, lse = with_sink(result, lse, tl.load(sinks_ptr + q_head + tl.arange(0, 1)) * LOG2E)
        store_result(out_row_ptr, lse_row_ptr, result, lse, PLAN)
    else:
        BLOCK_D: tl.constexpr = PLAN.block_d
        offs_d = tl.arange(0, BLOCK_D)
        zeros = tl.zeros((BLOCK_D,), out.ptr.dtype.element_ty)
        tl.store(out_row_ptr + offs_d, zeros, (offs_d < PLAN.v_head_dim) & (tl.zeros_like(offs_d) + fill != 0))
        if lse_ptr is not None:
            tl.store(lse_row_ptr + tl.arange(0, 1), tl.full((1,), float("-inf"), tl.float32))


def launch_merge_queries(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    sinks: torch.Tensor | None,
    tiles: Tiles,
    rotation: int,
) -> None:
    """Merge `partial` [num_splits, tokens, num_q_heads, v_head_dim] of a launch's tiles into `out` and `lse`.

    Results are rotated back in blocks of `rotation` channels. Nothing is checked.
    """
    num_splits, num_tokens, num_q_heads, v_head_dim = partial.shape
    early = gpu.launches_early(out.device)
    block_s = merging.MERGE_BLOCKS[0] if num_splits <= merging.MERGE_BLOCKS[0] else merging.MERGE_BLOCKS[1]
    if tiles.split_size:
        block_s = merging.INVARIANT_MERGE_BLOCK
    plan, num_warps = _plan_merge((v_head_dim, v_head_dim), rotation, block_s, early, True, (1, 1), None)
    on(out, _kvarn_merge_queries_kernel)[(num_tokens, num_q_heads)](
        as_rows(out),
        lse,
        partial,
        partial_lse,
        tiles.cu_seqlens_q,
        sinks,
        tiles.cache.batch,
        num_splits,
        tiles.tokens.start,
        num_tokens * num_q_heads,
        int(tiles.fill),
        PLAN=plan,
        num_warps=num_warps,
        enable_fp_fusion=False,
        **({"launch_pdl": True} if early else {}),
    )
