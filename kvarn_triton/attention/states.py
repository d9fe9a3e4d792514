"""Merge the results of several attention calls over disjoint keys.

One program merges a run of rows of all results. Grid: (run,). Bytes moved: each result with a key once, and the merged one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, check_tensor, require
from ..launch import aligned, on


@triton.jit
def _add_state(total, acc, out_ptr, lse_ptr, top, mask_r, mask):
    """Return the sum of weights [rows], and of weighted results [rows, channels], with one result more."""
    lse = tl.load(lse_ptr, mask_r, other=float("-inf"))
    some = top > float("-inf")
    # Equal numbers are compared because both may be infinite.
    weight = tl.where((lse == top) & some, 1.0, tl.exp(lse - tl.where(some, top, 0.0)))
    part = tl.load(out_ptr, mask & (weight > 0)[:, None], other=0.0).to(tl.float32)
    return total + weight, acc + part * weight[:, None]


@triton.jit(
    do_not_specialize=["num_rows", "num_others", "stride_out", "stride_lse"],
    do_not_specialize_on_alignment=["first_lse_ptr", "other_lse_ptr"],
)
def _kvarn_merge_states_kernel(
    out_ptr,  # [rows, v_head_dim]
    lse_ptr,  # float32 [rows], natural logarithm
    first_ptr,  # [rows, v_head_dim]
    first_lse_ptr,  # float32 [rows]
    other_ptr,  # [num_others, rows, v_head_dim]
    other_lse_ptr,  # float32 [num_others, rows]
    num_rows,
    num_others,
    stride_out,  # of the other results
    stride_lse,
    D_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < num_rows
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    place = rows[:, None] * D_V + offs_d
    mask = mask_r[:, None] & (offs_d < D_V)
    top = tl.load(first_lse_ptr + rows, mask_r, other=float("-inf"))
    for part in range(num_others):
        top = tl.maximum(top, tl.load(other_lse_ptr + tl.cast(part, tl.int64) * stride_lse + rows, mask_r, other=float("-inf")))
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    total, acc = _add_state(total, acc, first_ptr + place, first_lse_ptr + rows, top, mask_r, mask)
    for part in range(num_others):
        start = tl.multiple_of(tl.cast(part, tl.int64) * stride_out, 16)  # as `aligned` has it
        state_lse_ptr = other_lse_ptr + tl.cast(part, tl.int64) * stride_lse + rows
        total, acc = _add_state(total, acc, other_ptr + start + place, state_lse_ptr, top, mask_r, mask)
    merged = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + place, merged.to(out_ptr.dtype.element_ty), mask)
    tl.store(lse_ptr + rows, tl.log(total) + top, mask_r)


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor | None = None, lse_b: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention results of the same queries over disjoint sets of keys: two results, or n of them stacked.

    Args:
        out_a: float16, bfloat16 or float32 [..., v_head_dim], contiguous. Without `out_b`: [n, ..., v_head_dim], n results,
            each contiguous, with any stride between them.
        lse_a: float32 [...], natural logarithm of the sum of exponentiated scores; -inf where nothing was attended. Logits of
            attention sinks are included, so give `sinks` to one of the calls only. Without `out_b`: [n, ...].
        out_b: like `out_a`, or None.
        lse_b: like `lse_a`, or None.

    Returns:
        `out` like one result and `lse` like its log-sum-exp, what one call over all keys gives up to rounding: of each result,
        and of the merged one. Where every lse is -inf, `out` is zero and `lse` -inf; `out` of an empty side is not read.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride.
    """
    dims = out_a.dim() if isinstance(out_a, torch.Tensor) else 0
    stacked = out_b is None
    check_tensor("out_a", out_a, [None] * dims, FLOATS, contiguous_dims=dims - stacked)
    check_tensor("lse_a", lse_a, out_a.shape[:-1], torch.float32, device=out_a.device, contiguous_dims=dims - 1 - stacked)
    require((lse_b is None) == stacked, "lse_b", "a tensor beside out_b, and None without it", _named(lse_b))
    if out_b is not None and lse_b is not None:
        check_tensor("out_b", out_b, out_a.shape, out_a.dtype, device=out_a.device, contiguous_dims=dims)
        check_tensor("lse_b", lse_b, out_a.shape[:-1], torch.float32, device=out_a.device, contiguous_dims=dims - 1)
    elif dims < 2 or not len(out_a):
        raise ValueError(f"out_a: expected shape [n, ..., v_head_dim] without out_b, n at least 1, got {list(out_a.shape)}")
    if not gpu.on_device(out_a):
        return reference.merge_states(out_a, lse_a, out_b, lse_b)
    out_a = aligned(out_a)
    if out_b is None or lse_b is None:
        return _launch_merge_states(out_a[0], lse_a[0], out_a[1:], lse_a[1:])
    return _launch_merge_states(out_a, lse_a, aligned(out_b)[None], lse_b[None])


def _named(value: torch.Tensor | None) -> str | None:
    return None if value is None else "a tensor"


def _launch_merge_states(
    first: torch.Tensor, first_lse: torch.Tensor, others: torch.Tensor, others_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge a result with others [num_others, ...]; nothing is checked."""
    out = torch.empty_like(first, memory_format=torch.contiguous_format, requires_grad=False)
    lse = torch.empty_like(first_lse, memory_format=torch.contiguous_format, requires_grad=False)
    num_rows, block_d = lse.numel(), configs.padded(first.shape[-1])
    block_r = configs.row_block(block_d)
    if num_rows:
        on(out, _kvarn_merge_states_kernel)[(-(-num_rows // block_r),)](
            out,
            lse,
            first,
            first_lse,
            others,
            others_lse,
            num_rows,
            len(others),
            others.stride(0),
            others_lse.stride(0),
            D_V=first.shape[-1],
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out, lse
