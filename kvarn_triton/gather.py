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

from . import configs, reference
from .checks import FLOATS, INDICES, check_choice, check_pages, check_tensor, require
from .expand import decode, index, lanes_first, load_bytes, norm_factor, scale_and_zero, spread, to_tokens
from .layout import PageLayout, fields_per_byte

RUN = tl.constexpr(configs.GATHER_RUN)
ELEMENTS = tl.constexpr(32)
"""Numbers of a chunk that a thread holds, if it needn't hold more channels."""


@triton.jit
def _store_tokens(out_ptr, tile, token, stride_token):
    """Store tokens [tokens, channels] at their places."""
    place = token.to(tl.int64)[:, None] * stride_token + tl.arange(0, tile.shape[1])[None, :]
    tl.store(out_ptr + place, tile.to(out_ptr.dtype.element_ty))


@triton.jit
def _dequantize_keys(
    out_ptr,
    record_ptr,
    block,
    part,
    parts,
    stride_token,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    THREADS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Write a part of a block of the keys of a record; fields of a byte are channels."""
    G: tl.constexpr = LAYOUT.page_size
    BLOCK: tl.constexpr = LAYOUT.block_size
    BYTES: tl.constexpr = BLOCK // FIELDS
    LANES: tl.constexpr = min(BYTES, RUN)
    ROWS: tl.constexpr = THREADS // LANES
    N: tl.constexpr = BYTES // LANES
    M: tl.constexpr = max(min(ELEMENTS // (FIELDS * N), G // ROWS), 1)
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32)) + block * BLOCK
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    own = (index(ROWS, 1), index(LANES, 0))
    place = (index(M, 2) * ROWS, index(N, 4) * LANES)
    field = index(FIELDS, 3)
    params = tl.load(params_ptr + spread(own[1] + (field * BYTES + place[1]), LANES, ROWS))
    scale, zero = scale_and_zero(params, field, LAYOUT.k_bits)
    for first in range(part * M * ROWS, G, parts * M * ROWS):
        packed, high = load_bytes(
            record_ptr + LAYOUT.k_codes_offset,
            (first, block * BYTES),
            own,
            place,
            G,
            LAYOUT.head_dim // FIELDS,
            LAYOUT.k_bits,
        )
        x = lanes_first(decode(packed, high, field, scale, zero, LAYOUT.k_bits))
        tile = to_tokens(tl.reshape(x, (LANES, ROWS, M, FIELDS * N)), ROTATED)
        token = first + tl.arange(0, M * ROWS)
        factor = norm_factor(tl.load(norm_ptr + token), gain, BLOCK, ROTATED)
        _store_tokens(out_ptr, tile * factor[:, None], token, stride_token)


@triton.jit
def _dequantize_values(
    out_ptr,
    record_ptr,
    block,
    part,
    parts,
    stride_token,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    THREADS: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Write a part of a block of the values of a record; fields of a byte are tokens, some of which are decoded at a time."""
    BLOCK: tl.constexpr = LAYOUT.v_block_size
    BYTES: tl.constexpr = LAYOUT.page_size // FIELDS
    ROWS: tl.constexpr = THREADS // RUN
    N: tl.constexpr = BLOCK // RUN
    SOME: tl.constexpr = max(min(ELEMENTS // N, FIELDS), 1)
    M: tl.constexpr = max(min(ELEMENTS // (SOME * N), BYTES // ROWS), 1)
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    norm_ptr = (record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16)) + block * BLOCK
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1)
    own = (index(RUN, 0), index(ROWS, 1))
    place = (index(N, 4) * RUN, index(M, 2) * ROWS)
    factor = norm_factor(tl.load(norm_ptr + spread(own[0] + place[0], RUN, ROWS)), gain, BLOCK, ROTATED)
    for first in range(part * M * ROWS, BYTES, parts * M * ROWS):
        packed, high = load_bytes(
            record_ptr + LAYOUT.v_codes_offset,
            (block * BLOCK, first),
            own,
            place,
            LAYOUT.v_head_dim,
            BYTES,
            LAYOUT.v_bits,
        )
        for first_field in tl.static_range(0, FIELDS, SOME):
            field = first_field + index(SOME, 3)
            params = tl.load(params_ptr + first + spread(own[1], RUN, ROWS) + (field * BYTES + place[1]))
            scale, zero = scale_and_zero(params, field, LAYOUT.v_bits)
            x = lanes_first(decode(packed, high, field, scale, zero, LAYOUT.v_bits) * factor)
            tile = to_tokens(tl.reshape(x, (RUN, ROWS, M * SOME, N)), ROTATED)
            i = tl.arange(0, M * SOME * ROWS)
            token = (first_field + i // ROWS % SOME) * BYTES + first + i // (SOME * ROWS) * ROWS + i % ROWS
            _store_tokens(out_ptr, tile, token, stride_token)


@triton.jit
def _store_zeros(out_ptr, part, parts, stride_token, G: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Write zeros to a block of the tokens of a part."""
    ROWS: tl.constexpr = min(ELEMENTS * THREADS // BLOCK, G)
    for first in range(part * ROWS, G, parts * ROWS):
        _store_tokens(out_ptr, tl.zeros((ROWS, BLOCK), tl.float32), first + tl.arange(0, ROWS), stride_token)


@triton.jit(do_not_specialize=["num_kv_heads", "parts"])
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
    record_ptr = pages_ptr + tl.maximum(page, 0) * stride_pages_page + head * stride_pages_head
    # Programs for blocks that only the other half of a record has write nothing.
    if tile % 2 == 0:
        if (BLOCKS == K_BLOCKS) or (block < K_BLOCKS):
            k_ptr += entry * stride_k_page + head * stride_k_head + block * LAYOUT.block_size
            if page >= 0:
                _dequantize_keys(k_ptr, record_ptr, block, part, parts, stride_k_token, LAYOUT, K_FIELDS, THREADS, ROTATED)
            else:
                _store_zeros(k_ptr, part, parts, stride_k_token, LAYOUT.page_size, LAYOUT.block_size, THREADS)
    elif (BLOCKS == V_BLOCKS) or (block < V_BLOCKS):
        v_ptr += entry * stride_v_page + head * stride_v_head + block * LAYOUT.v_block_size
        if page >= 0:
            _dequantize_values(v_ptr, record_ptr, block, part, parts, stride_v_token, LAYOUT, V_FIELDS, THREADS, ROTATED)
        else:
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
    num_kv_heads = check_pages(pages, layout.page_bytes)
    check_tensor("page_ids", page_ids, [None], INDICES, device=pages.device)
    check_choice("dtype", dtype, FLOATS)
    num_pages = page_ids.shape[0]
    shape = (num_pages, layout.page_size, num_kv_heads)
    if out is not None:
        require(isinstance(out, tuple) and len(out) == 2, "out", "a tuple of two tensors", type(out).__name__)
        check_tensor("out[0]", out[0], [*shape, layout.head_dim], FLOATS, device=pages.device)
        check_tensor("out[1]", out[1], [*shape, layout.v_head_dim], out[0].dtype, device=pages.device)
    if not configs.on_device(pages):
        return reference.dequantize_pages(pages, page_ids, layout, dtype=dtype, rotated=rotated, out=out)
    if out is None:
        k, v = (torch.empty(*shape, d, dtype=dtype, device=pages.device) for d in (layout.head_dim, layout.v_head_dim))
    else:
        k, v = out
    if num_pages == 0 or num_kv_heads == 0:
        return k, v
    num_warps, threads = configs.gather_threads(max(layout.block_size, layout.v_block_size), pages.device)
    num_blocks = max(layout.head_dim // layout.block_size, layout.v_head_dim // layout.v_block_size)
    parts = configs.gather_parts(num_blocks * num_pages * 2 * num_kv_heads, pages.device)
    _kvarn_dequantize_pages_kernel[(num_blocks * parts * num_pages * 2 * num_kv_heads,)](
        k,
        v,
        pages,
        page_ids,
        num_kv_heads,
        parts,
        pages.stride(0),
        pages.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        LAYOUT=layout,
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        THREADS=threads,
        ROTATED=rotated,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    return k, v
