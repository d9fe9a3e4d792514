"""Quantized pages as plain keys and values, for engines that bring their own attention, and for looking at a cache.

One program decodes a run of tokens of the keys or the values of one page of one kv head. Grid: (run, page, kv head times two).
Bytes moved: each record byte in, each element out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, reference
from .checks import FLOATS, INDICES, check_choice, check_pages, check_tensor, require
from .device import hadamard, split_halves
from .layout import PageLayout, fields_per_byte
from .packing import load_codes


@triton.jit
def _load_tile(record_ptr, offs_t, VALUES: tl.constexpr, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the rotated keys or values float32 [tokens, BLOCK_D] of tokens `offs_t` of a record."""
    BITS: tl.constexpr = LAYOUT.v_bits if VALUES else LAYOUT.k_bits
    CODES: tl.constexpr = LAYOUT.v_codes_offset if VALUES else LAYOUT.k_codes_offset
    PARAMS: tl.constexpr = LAYOUT.v_params_offset if VALUES else LAYOUT.k_params_offset
    NORM: tl.constexpr = LAYOUT.v_norm_offset if VALUES else LAYOUT.k_norm_offset
    D: tl.constexpr = LAYOUT.head_dim
    offs_t = offs_t[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    mask_t = offs_t >= 0
    G: tl.constexpr = LAYOUT.page_size
    params_ptr = (record_ptr + PARAMS).to(tl.pointer_type(tl.uint32))
    norm_ptr = (record_ptr + NORM).to(tl.pointer_type(tl.float16))
    if VALUES:
        codes = load_codes(record_ptr + CODES, offs_d, offs_t, mask_t & mask_d, D, G, G, BITS, FIELDS)
        params = tl.load(params_ptr + offs_t, mask_t, other=0)
        norm = tl.load(norm_ptr + offs_d, mask_d, other=0.0)
    else:
        codes = load_codes(record_ptr + CODES, offs_t, offs_d, mask_t & mask_d, G, D, LAYOUT.block_size, BITS, FIELDS)
        params = tl.load(params_ptr + offs_d, mask_d, other=0)
        norm = tl.load(norm_ptr + offs_t, mask_t, other=0.0)
    scale, zero = split_halves(params)
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + VALUES)
    return (codes.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)) * norm.to(tl.float32) * gain


@triton.jit
def _dequantize_run(
    out_ptr,
    record_ptr,
    offs_t,
    stride_token,
    valid,
    VALUES: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Write the keys or values of tokens `offs_t` of a record, or zeros if it is not valid."""
    tile = tl.zeros((offs_t.shape[0], BLOCK_D), tl.float32)
    if valid:
        tile = _load_tile(record_ptr, offs_t, VALUES, LAYOUT, FIELDS, BLOCK_D)
    if not ROTATED:
        tile = hadamard(tile, LAYOUT.block_size)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_d < LAYOUT.head_dim) & (offs_t >= 0)[:, None]
    tl.store(out_ptr + offs_t[:, None] * stride_token + offs_d, tile.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _kvarn_dequantize_pages_kernel(
    k_ptr,  # [n, page_size, num_kv_heads, head_dim]
    v_ptr,  # [n, page_size, num_kv_heads, head_dim]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    page_ids_ptr,  # [n]
    stride_pages_page,
    stride_pages_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    index = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(2) // 2).to(tl.int64)
    page = tl.load(page_ids_ptr + index).to(tl.int64)
    record_ptr = pages_ptr + tl.maximum(page, 0) * stride_pages_page + head * stride_pages_head
    offs_t = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(2) % 2 == 0:
        k_ptr += index * stride_k_page + head * stride_k_head
        _dequantize_run(k_ptr, record_ptr, offs_t, stride_k_token, page >= 0, False, LAYOUT, K_FIELDS, BLOCK_D, ROTATED)
    else:
        v_ptr += index * stride_v_page + head * stride_v_head
        _dequantize_run(v_ptr, record_ptr, offs_t, stride_v_token, page >= 0, True, LAYOUT, V_FIELDS, BLOCK_D, ROTATED)


def dequantize_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    *,
    dtype: torch.dtype = torch.float16,
    rotated: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of quantized pages.

    Args:
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        page_ids: int32 or int64 [n]. An id below 0 gives zeros.
        layout: the page format.
        dtype: float16, bfloat16 or float32 of the result; ignored if `out` is given.
        rotated: return keys and values as they are stored, without undoing the Hadamard rotation.
        out: (k, v) to write to, like the results; any strides whose innermost is 1.

    Returns:
        `k` and `v` [n, page_size, num_kv_heads, head_dim].

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids are not read to be checked.
    """
    num_kv_heads = check_pages(pages, layout.page_bytes)
    check_tensor("page_ids", page_ids, [None], INDICES, device=pages.device)
    check_choice("dtype", dtype, FLOATS)
    num_pages = page_ids.shape[0]
    shape = (num_pages, layout.page_size, num_kv_heads, layout.head_dim)
    if out is not None:
        require(isinstance(out, tuple) and len(out) == 2, "out", "a tuple of two tensors", type(out).__name__)
        check_tensor("out[0]", out[0], shape, FLOATS, device=pages.device)
        check_tensor("out[1]", out[1], shape, out[0].dtype, device=pages.device)
    if not configs.on_device(pages):
        return reference.dequantize_pages(pages, page_ids, layout, dtype=dtype, rotated=rotated, out=out)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=pages.device), torch.empty(shape, dtype=dtype, device=pages.device)
    k, v = out
    if num_pages == 0 or num_kv_heads == 0:
        return k, v
    block_d = triton.next_power_of_2(layout.head_dim)
    block_r = min(configs.row_block(block_d), layout.page_size)
    _kvarn_dequantize_pages_kernel[(layout.page_size // block_r, num_pages, 2 * num_kv_heads)](
        k,
        v,
        pages,
        page_ids,
        pages.stride(0),
        pages.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        LAYOUT=layout,
        BLOCK_D=block_d,
        BLOCK_R=block_r,
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        ROTATED=rotated,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return k, v
