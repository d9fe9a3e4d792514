"""The blockwise Hadamard rotation.

One program rotates a run of rows. Grid: (run,). Bytes moved: each element in and out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, check_choice, check_tensor, require
from ..launch import aligned, copy_back, on
from ..layout import SUPPORTED_HEAD_DIMS, largest_power_of_two_divisor
from ..tile import arithmetic as device


@triton.jit(do_not_specialize=["num_rows"])
def _kvarn_hadamard_kernel(
    out_ptr,  # [rows, head_dim]
    x_ptr,  # [rows, head_dim]
    num_rows,
    stride_x_row,
    stride_out_row,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (rows < num_rows) & (offs_d < HEAD_DIM)
    x = tl.load(x_ptr + rows * stride_x_row + offs_d, mask, other=0.0).to(tl.float32)
    rotated = device.hadamard(x, BLOCK)
    tl.store(out_ptr + rows * stride_out_row + offs_d, rotated.to(out_ptr.dtype.element_ty), mask)


def hadamard(x: torch.Tensor, *, block_size: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x` with its last dimension multiplied by an orthonormal, block-diagonal Hadamard matrix.

    Args:
        x: float16, bfloat16 or float32 [..., head_dim]; head_dim 64, 80, 96, 112, 128, 192, 256 or 512. A view whose leading
            dimensions can't be merged is copied first.
        block_size: channels of one block, a power of two from 2 that divides head_dim. By default the largest: head_dim
            itself if it is a power of two, otherwise the matrix is block diagonal.
        out: where to write; contiguous, like `x`; may be `x`.

    Returns:
        A tensor like `x`. The matrix is symmetric, so the function is its own inverse up to rounding.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or block size.
    """
    dims = x.dim() if isinstance(x, torch.Tensor) else 1
    check_tensor("x", x, [None] * dims, FLOATS)
    head_dim = x.shape[-1] if dims else 0
    check_choice("x.shape[-1]", head_dim, SUPPORTED_HEAD_DIMS)
    largest = largest_power_of_two_divisor(head_dim)
    block = largest if block_size is None else block_size
    valid = isinstance(block, int) and 2 <= block <= largest and largest % block == 0
    require(valid, "block_size", f"a power of two from 2 to {largest}", block_size)
    if out is not None:
        check_tensor("out", out, x.shape, x.dtype, device=x.device, contiguous_dims=dims)
    if not gpu.on_device(x):
        return reference.hadamard(x, block_size=block, out=out)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = aligned(x.reshape(-1, head_dim))
    result = aligned(out.view(-1, head_dim))
    block_d = triton.next_power_of_2(head_dim)
    block_r = configs.row_block(block_d)
    if rows.shape[0]:
        on(x, _kvarn_hadamard_kernel)[(triton.cdiv(rows.shape[0], block_r),)](
            result,
            rows,
            rows.shape[0],
            rows.stride(0),
            result.stride(0),
            HEAD_DIM=head_dim,
            BLOCK=block,
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            num_warps=4,
            enable_fp_fusion=False,
        )
        copy_back(result, out.view(-1, head_dim))
    return out
