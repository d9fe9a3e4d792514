"""Quantized pages as plain keys and values, for engines that bring their own attention, and for looking at a cache.

One program decodes the keys or the values of one page of one kv head, in one block of the rotation [page_size, block_size],
some tokens at a time (`tile.dequantize`). It is one warp where that suffices, so that nothing waits at barriers. If there are
few pages, several programs share one. Grid: (program,), those of a page next to each other. Bytes moved: each record byte
in, each element out once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, INDICES, check_choice, check_pages, check_tensor, require
from ..launch import aligned, as_pages, copy_back, on
from ..layout import PageLayout, fields_per_byte
from ..tile.dequantize import ELEMENTS, Chunk, ReadPlan, Target, dequantize_chunk, store_tokens


@functools.lru_cache
def _plan(layout: PageLayout, rotated: bool, warps: tuple[int, int], ptx: bool) -> ReadPlan:
    blocks = max(layout.head_dim // layout.block_size, layout.v_head_dim // layout.v_block_size)
    return ReadPlan(fields_per_byte(layout.k_bits), fields_per_byte(layout.v_bits), blocks, *warps, rotated, ptx)


def read_plan(layout: PageLayout, device: torch.device, rotated: bool) -> ReadPlan:
    """Return what a kernel that dequantizes pages is compiled for; `rotated`: tokens stay rotated."""
    warps = configs.gather_threads(max(layout.block_size, layout.v_block_size), device)
    return _plan(layout, rotated, warps, gpu.uses_ptx())


@triton.jit
def chunk_of_program(num_kv_heads, parts, PLAN: tl.constexpr):
    """Return what a program dequantizes. Those of an entry of a list of pages are next to each other."""
    block = tl.program_id(0) % PLAN.blocks
    part = tl.program_id(0) // PLAN.blocks % parts
    tile = tl.program_id(0) // PLAN.blocks // parts
    return Chunk(tile // 2 // num_kv_heads, (tile // 2 % num_kv_heads).to(tl.int64), tile % 2, block, part, parts)


@triton.jit
def _store_zeros(out, chunk, G: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PLAN: tl.constexpr):
    """Write zeros to a chunk of pages of G tokens and BLOCKS blocks of BLOCK channels."""
    ROWS: tl.constexpr = min(ELEMENTS * PLAN.threads // BLOCK, G)
    if (PLAN.blocks == BLOCKS) or (chunk.block < BLOCKS):
        out = Target(out.ptr + chunk.block * BLOCK, out.stride_token, out.num_tokens)
        for first in range(chunk.part * ROWS, G, chunk.parts * ROWS):
            store_tokens(out, tl.zeros((ROWS, BLOCK), tl.float32), first + tl.arange(0, ROWS))


@triton.jit(do_not_specialize=["num_kv_heads", "parts"], do_not_specialize_on_alignment=["page_ids_ptr"])
def _kvarn_dequantize_pages_kernel(
    k,  # [n, page_size, num_kv_heads, head_dim] and its strides
    v,  # [n, page_size, num_kv_heads, v_head_dim] and its strides
    pages,  # Pages
    page_ids_ptr,  # [n]
    num_kv_heads,
    parts,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    chunk = chunk_of_program(num_kv_heads, parts, PLAN)
    entry = chunk.entry.to(tl.int64)
    page = tl.load(page_ids_ptr + entry).to(tl.int64)
    k_out = Target(k[0] + entry * k[1] + chunk.head * k[3], k[2], None)
    v_out = Target(v[0] + entry * v[1] + chunk.head * v[3], v[2], None)
    if page >= 0:
        record_ptr = pages.ptr + page * pages.stride_page + chunk.head * pages.stride_head
        dequantize_chunk((k_out, v_out), record_ptr, chunk, LAYOUT, PLAN)
    elif chunk.half == 0:
        _store_zeros(k_out, chunk, LAYOUT.page_size, LAYOUT.block_size, LAYOUT.head_dim // LAYOUT.block_size, PLAN)
    else:
        V_BLOCKS: tl.constexpr = LAYOUT.v_head_dim // LAYOUT.v_block_size
        _store_zeros(v_out, chunk, LAYOUT.page_size, LAYOUT.v_block_size, V_BLOCKS, PLAN)


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
        `k` [n, page_size, num_kv_heads, head_dim] and `v` [n, page_size, num_kv_heads, v_head_dim].

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids are not read to be checked.
    """
    num_kv_heads = check_pages(pages, layout)
    check_tensor("page_ids", page_ids, [None], INDICES, device=pages.device)
    check_choice("dtype", dtype, FLOATS)
    num_pages = page_ids.shape[0]
    shape = (num_pages, layout.page_size, num_kv_heads)
    if out is not None:
        require(isinstance(out, tuple) and len(out) == 2, "out", "a tuple of two tensors", type(out).__name__)
        check_tensor("out[0]", out[0], [*shape, layout.head_dim], FLOATS, device=pages.device)
        check_tensor("out[1]", out[1], [*shape, layout.v_head_dim], out[0].dtype, device=pages.device)
    if not gpu.on_device(pages):
        return reference.dequantize_pages(pages, page_ids, layout, dtype=dtype, rotated=rotated, out=out)
    if out is None:
        k, v = (torch.empty(*shape, d, dtype=dtype, device=pages.device) for d in (layout.head_dim, layout.v_head_dim))
    else:
        k, v = out
    if num_pages == 0 or num_kv_heads == 0:
        return k, v
    pages, k_memory, v_memory = aligned(pages), aligned(k), aligned(v)
    plan = read_plan(layout, pages.device, rotated)
    programs = plan.blocks * num_pages * 2 * num_kv_heads
    parts = configs.gather_parts(programs, pages.device)
    on(pages, _kvarn_dequantize_pages_kernel)[(programs * parts,)](
        (k_memory, *k_memory.stride()[:3]),
        (v_memory, *v_memory.stride()[:3]),
        as_pages(pages),
        page_ids,
        num_kv_heads,
        parts,
        LAYOUT=layout,
        PLAN=plan,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
    return copy_back(k_memory, k), copy_back(v_memory, v)
