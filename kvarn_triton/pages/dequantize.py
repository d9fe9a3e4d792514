"""Quantized pages as plain keys and values, for engines that bring their own attention, and for looking at a cache.

One program decodes the keys or the values of one page of one kv head, in one block of the rotation [page_size, block_size], a
chunk of tokens at a time (`expand`). It is one warp where that suffices, so that nothing waits at barriers. If there are few
pages, several programs share the chunks. Grid: (program,), those of a page next to each other. Bytes moved: each record byte
in, each element out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, INDICES, check_choice, check_pages, check_tensor, require
from ..launch import aligned, copy_back, on
from ..layout import PageLayout, fields_per_byte
from ..tile.dequantize import ELEMENTS, dequantize_block, num_blocks, store_tokens


@triton.jit
def _store_zeros(out_ptr, part, parts, stride_token, G: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Write zeros to a block of the tokens of a part."""
    ROWS: tl.constexpr = min(ELEMENTS * THREADS // BLOCK, G)
    for first in range(part * ROWS, G, parts * ROWS):
        store_tokens(out_ptr, tl.zeros((ROWS, BLOCK), tl.float32), first + tl.arange(0, ROWS), stride_token)


@triton.jit(do_not_specialize=["num_kv_heads", "parts"], do_not_specialize_on_alignment=["page_ids_ptr"])
def _kvarn_dequantize_pages_kernel(
    k_ptr,  # [n, page_size, num_kv_heads, head_dim]
    v_ptr,  # [n, page_size, num_kv_heads, v_head_dim]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    page_ids_ptr,  # [n]
    num_kv_heads,
    parts,
    stride_pages_page,
    stride_pages_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    LAYOUT: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    THREADS: tl.constexpr,
    ROTATED: tl.constexpr,
    PTX: tl.constexpr,
):
    K_BLOCKS: tl.constexpr = LAYOUT.head_dim // LAYOUT.block_size
    V_BLOCKS: tl.constexpr = LAYOUT.v_head_dim // LAYOUT.v_block_size
    BLOCKS: tl.constexpr = max(K_BLOCKS, V_BLOCKS)
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS % parts
    tile = tl.program_id(0) // BLOCKS // parts
    entry = (tile // (2 * num_kv_heads)).to(tl.int64)
    head = (tile // 2 % num_kv_heads).to(tl.int64)
    page = tl.load(page_ids_ptr + entry).to(tl.int64)
    half = tile % 2
    k_ptr += entry * stride_k_page + head * stride_k_head
    v_ptr += entry * stride_v_page + head * stride_v_head
    if page >= 0:
        record_ptr = pages_ptr + page * stride_pages_page + head * stride_pages_head
        dequantize_block(
            k_ptr, v_ptr, record_ptr, half, block, part, parts, stride_k_token, stride_v_token,
            LAYOUT, K_FIELDS, V_FIELDS, THREADS, ROTATED, PTX,
        )  # fmt: skip
    elif half == 0:
        if (BLOCKS == K_BLOCKS) or (block < K_BLOCKS):
            k_ptr += block * LAYOUT.block_size
            _store_zeros(k_ptr, part, parts, stride_k_token, LAYOUT.page_size, LAYOUT.block_size, THREADS)
    elif (BLOCKS == V_BLOCKS) or (block < V_BLOCKS):
        v_ptr += block * LAYOUT.v_block_size
        _store_zeros(v_ptr, part, parts, stride_v_token, LAYOUT.page_size, LAYOUT.v_block_size, THREADS)


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
    num_warps, threads = configs.gather_threads(max(layout.block_size, layout.v_block_size), pages.device)
    programs = num_blocks(layout) * num_pages * 2 * num_kv_heads
    parts = configs.gather_parts(programs, pages.device)
    on(pages, _kvarn_dequantize_pages_kernel)[(programs * parts,)](
        k_memory,
        v_memory,
        pages,
        page_ids,
        num_kv_heads,
        parts,
        pages.stride(0),
        pages.stride(1),
        *k_memory.stride()[:3],
        *v_memory.stride()[:3],
        LAYOUT=layout,
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        THREADS=threads,
        ROTATED=rotated,
        PTX=gpu.uses_ptx(),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return copy_back(k_memory, k), copy_back(v_memory, v)
