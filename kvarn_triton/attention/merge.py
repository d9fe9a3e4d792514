"""Merge partial attention results: the pieces of one decode call, or two results over disjoint keys.

`_kvarn_merge_splits_kernel`: one program merges the partial results of one query head, and its attention sink, and rotates the
sum back. Grid: (program,), those of a sequence next to each other. `_kvarn_merge_states_kernel`: one program merges a run of
rows of two results. Grid: (run,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .. import configs, gpu, reference
from ..checks import FLOATS, check_tensor
from ..launch import aligned, on
from ..layout import PageLayout
from ..tile.arithmetic import LOG2E, hadamard
from .schedule import Work, piece_of_unit, plan, row_units, start_of_row

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def with_sink(out, lse, logit):
    """Return results `out` [rows, channels] and `lse` [rows] with one more token each, of this logit and no value; base 2.

    A logit of infinity takes all weight; one of -infinity none. Of the two equal numbers one can be infinite, hence `where`.
    """
    top = tl.maximum(lse, logit)
    weight = tl.where(lse == top, 1.0, tl.exp2(lse - top))
    total = weight + tl.where((logit == top) & (logit > float("-inf")), 1.0, tl.exp2(logit - top))
    total = tl.where(top == float("-inf"), 1.0, total)
    return out * (weight / total)[:, None], top + tl.log2(total)


@triton.jit(
    do_not_specialize=["num_tiles", "num_programs", "few_programs", "sink_len", "window", "split_size"],
    do_not_specialize_on_alignment=["lse_ptr", "seq_lens_ptr", "num_quantized_ptr", "sinks_ptr"],
)
def _kvarn_merge_splits_kernel(
    out_ptr,  # [batch, num_q_heads, v_head_dim]
    lse_ptr,  # float32 [batch, num_q_heads], natural logarithm; unused if not RETURN_LSE
    partial_ptr,  # float32 [num_partials, TILE, v_head_dim], rotated
    partial_lse_ptr,  # float32 [num_partials, TILE], base 2
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch]
    sinks_ptr,  # float32 [num_q_heads], natural logarithm; unused if not HAS_SINKS
    num_tiles,  # of query heads
    num_programs,
    few_programs,
    sink_len,
    window,
    split_size,
    stride_out_batch,
    stride_out_head,
    D_V: tl.constexpr,
    ROTATION: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    TILE: tl.constexpr,  # query heads of a tile
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    EARLY: tl.constexpr,
):
    num_q_heads = num_tiles // triton.cdiv(GROUP, TILE) * GROUP
    q_head, row = tl.program_id(0) % num_q_heads, tl.program_id(0) // num_q_heads
    batch = tl.num_programs(0) // num_q_heads
    tile = q_head // GROUP * triton.cdiv(GROUP, TILE) + q_head % GROUP // TILE
    rows = (seq_lens_ptr, num_quantized_ptr, sink_len, window)
    _, size, longer, split = plan(rows, batch, num_tiles, num_programs, few_programs, split_size, UNITS)
    row_start = start_of_row(rows, row, num_tiles, split, UNITS)
    _, _, _, counts = row_units(rows, row, row >= 0, UNITS)
    units = counts[0] + counts[1] + counts[2]
    align = tl.maximum(split, 1)
    first_unit = row_start + tile * (tl.cdiv(units, align) * align)
    first_piece = piece_of_unit(first_unit, size, longer)
    last_piece = piece_of_unit(first_unit + units - 1, size, longer)
    num_parts = tl.where(units > 0, last_piece - first_piece + 1, 0)
    place = (row * num_tiles + tile + first_piece).to(tl.int64) * TILE + q_head % GROUP % TILE
    partial_ptr += place * D_V
    partial_lse_ptr += place

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D_V
    m_i = tl.full((1,), float("-inf"), tl.float32)
    l_i = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    logit = m_i
    if HAS_SINKS:
        logit = tl.load(sinks_ptr + q_head + tl.arange(0, 1)) * LOG2E
    if EARLY:
        gdc_wait()
    for start in range(0, num_parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        mask = part < num_parts
        lse = tl.load(partial_lse_ptr + part * TILE, mask, other=float("-inf"))
        partial = tl.load(partial_ptr + part[:, None] * (TILE * D_V) + offs_d, mask[:, None] & mask_d, other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, axis=0))
        weights = tl.exp2(lse - m_new)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(weights, axis=0)
        acc = acc * alpha[:, None] + tl.sum(partial * weights[:, None], axis=0)[None, :]
        m_i = m_new
    out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    merged_lse = m_i + tl.log2(l_i)
    if HAS_SINKS:
        out, merged_lse = with_sink(out, merged_lse, logit)
    out = hadamard(out, ROTATION)
    out_row_ptr = out_ptr + row.to(tl.int64) * stride_out_batch + q_head.to(tl.int64) * stride_out_head
    tl.store(out_row_ptr + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask_d[None, :])
    if RETURN_LSE:
        tl.store(lse_ptr + tl.program_id(0) + tl.arange(0, 1), merged_lse * LN2)


def launch_merge_splits(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    sinks: torch.Tensor | None,
    num_kv_heads: int,
    layout: PageLayout,
    work: Work,
    early: bool,
) -> None:
    """Merge the partial results of a decode call, and the logits of its sinks, into `out` and `lse`; nothing is checked."""
    batch, num_q_heads, v_head_dim = out.shape
    block_d = triton.next_power_of_2(v_head_dim)
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    block_s = configs.merge_block(work.num_programs, batch * num_tiles, work.split_size)
    on(out, _kvarn_merge_splits_kernel)[(num_q_heads * batch,)](
        out,
        partial_lse if lse is None else lse,
        partial,
        partial_lse,
        work.seq_lens,
        work.seq_lens if work.num_quantized is None else work.num_quantized,
        partial_lse if sinks is None else sinks,
        num_tiles,
        work.num_programs,
        work.few_programs,
        work.sink_len,
        work.window or 0,
        work.split_size,
        out.stride(0),
        out.stride(1),
        D_V=v_head_dim,
        ROTATION=layout.v_block_size,
        GROUP=num_q_heads // num_kv_heads,
        TILE=tile,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        UNITS=work.units,
        HAS_SINKS=sinks is not None,
        RETURN_LSE=lse is not None,
        EARLY=early,
        num_warps=configs.merge_warps(block_s, block_d),
        enable_fp_fusion=True,
        **({"launch_pdl": True} if early else {}),
    )


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["lse_a_ptr", "lse_b_ptr"])
def _kvarn_merge_states_kernel(
    out_ptr,  # [rows, v_head_dim]
    lse_ptr,  # float32 [rows], natural logarithm
    out_a_ptr,  # [rows, v_head_dim]
    lse_a_ptr,  # float32 [rows]
    out_b_ptr,  # [rows, v_head_dim]
    lse_b_ptr,  # float32 [rows]
    num_rows,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < num_rows
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    place = rows[:, None] * D_V + offs_d
    mask = mask_r[:, None] & (offs_d < D_V)
    lse_a = tl.load(lse_a_ptr + rows, mask_r, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + rows, mask_r, other=float("-inf"))
    top = tl.maximum(lse_a, lse_b)
    some = top > float("-inf")
    # Equal numbers are compared because both may be infinite.
    weight_a = tl.where((lse_a == top) & some, 1.0, tl.exp(lse_a - tl.where(some, top, 0.0)))
    weight_b = tl.where((lse_b == top) & some, 1.0, tl.exp(lse_b - tl.where(some, top, 0.0)))
    total = weight_a + weight_b
    part_a = tl.load(out_a_ptr + place, mask & (weight_a > 0)[:, None], other=0.0).to(tl.float32)
    part_b = tl.load(out_b_ptr + place, mask & (weight_b > 0)[:, None], other=0.0).to(tl.float32)
    merged = (part_a * weight_a[:, None] + part_b * weight_b[:, None]) / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + place, merged.to(out_ptr.dtype.element_ty), mask)
    tl.store(lse_ptr + rows, tl.log(total) + top, mask_r)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention results of the same queries over two disjoint sets of keys.

    Args:
        out_a: float16, bfloat16 or float32 [..., v_head_dim], contiguous.
        lse_a: float32 [...], natural logarithm of the sum of exponentiated scores; -inf where nothing was attended. Logits of
            attention sinks are included, so give `sinks` to one of the two calls only.
        out_b: like `out_a`.
        lse_b: like `lse_a`.

    Returns:
        `out` like `out_a` and `lse` like `lse_a`, exactly what one call over all keys gives up to rounding. Where both lse
        are -inf, `out` is zero and `lse` -inf; `out` of an empty side is not read.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride.
    """
    dims = out_a.dim() if isinstance(out_a, torch.Tensor) else 0
    check_tensor("out_a", out_a, [None] * dims, FLOATS, contiguous_dims=dims)
    check_tensor("lse_a", lse_a, out_a.shape[:-1], torch.float32, device=out_a.device, contiguous_dims=dims - 1)
    check_tensor("out_b", out_b, out_a.shape, out_a.dtype, device=out_a.device, contiguous_dims=dims)
    check_tensor("lse_b", lse_b, out_a.shape[:-1], torch.float32, device=out_a.device, contiguous_dims=dims - 1)
    if not gpu.on_device(out_a):
        return reference.merge_states(out_a, lse_a, out_b, lse_b)
    out_a, out_b = aligned(out_a), aligned(out_b)
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    num_rows, block_d = lse.numel(), triton.next_power_of_2(out_a.shape[-1])
    block_r = configs.row_block(block_d)
    if num_rows:
        on(out, _kvarn_merge_states_kernel)[(triton.cdiv(num_rows, block_r),)](
            out,
            lse,
            out_a,
            lse_a,
            out_b,
            lse_b,
            num_rows,
            D_V=out_a.shape[-1],
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, lse
