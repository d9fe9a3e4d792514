"""Queries of latent attention as the decode kernel multiplies them: latents rotated, in float16, the rest in one factor.

One program prepares one row, a query head of a token. Grid: (row,). Bytes moved: each query in once and out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import gpu
from ..launch import as_rows, on
from ..mla_layout import LATENT_DIM, ROPE_DIM, TOKEN_DIM
from ..tile.arithmetic import LOG2E, bounded_exponent, hadamard, power_of_two


@triton.jit
def _kvarn_mla_rotate_queries_kernel(
    rotated_ptr,  # float16 [rows, 576]
    factor_ptr,  # float32 [rows]
    q,  # Rows [tokens, heads, 576]
    sm_scale,
    D: tl.constexpr,
    D_R: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    q_ptr = q.ptr + token * q.stride_token + head * q.stride_head
    offs_d, offs_r = tl.arange(0, D)[None, :], tl.arange(0, D_R)[None, :]
    latent = hadamard(tl.load(q_ptr + offs_d).to(tl.float32), D)
    rope = tl.load(q_ptr + D + offs_r).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(latent)), tl.max(tl.abs(rope)))
    exponent = bounded_exponent(largest)
    gauge = power_of_two(-exponent)
    rotated_row_ptr = rotated_ptr + row.to(tl.int64) * (D + D_R)
    tl.store(rotated_row_ptr + offs_d, (latent * gauge).to(tl.float16))
    tl.store(rotated_row_ptr + D + offs_r, (rope * gauge).to(tl.float16))
    tl.store(factor_ptr + row, power_of_two(exponent) * (sm_scale * LOG2E))


def rotate_queries(q: torch.Tensor, sm_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rotated queries float16 [rows, 576] of `q` [tokens, heads, 576], and the factor of each row's scores.

    The largest number of a row is brought into [0.5, 1) by a power of two, which is part of the factor, with `sm_scale` and
    log2(e): nothing overflows float16. The next kernel may start early, and waits.
    """
    tokens, heads = q.shape[:2]
    rotated = torch.empty(tokens * heads, TOKEN_DIM, dtype=torch.float16, device=q.device)
    factor = torch.empty(tokens * heads, dtype=torch.float32, device=q.device)
    on(q, _kvarn_mla_rotate_queries_kernel)[(tokens, heads)](
        rotated, factor, as_rows(q), sm_scale, D=LATENT_DIM, D_R=ROPE_DIM, EARLY=gpu.launches_early(q.device), num_warps=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    return rotated, factor
