"""Quantize full pages: rotate, balance, round, pack and scatter in one launch.

One program encodes tile after tile, a tile being the keys or the values of one page of one kv head [page_size, head_dim].
It gathers a tile from activations of any strides, rotates it into a scratch tile of its own, which stays in the L2 cache,
reads it back in the thread layout that suits the balancing, keeps it in registers from there on, and writes codes and scales
into the record. Grid: as many programs as the GPU holds. Bytes moved: each activation once, each record byte once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs, reference
from .checks import FLOATS, INDICES, check_pages, check_tensor
from .device import encode_tile, hadamard, join_halves
from .encoder import DEFAULT, Encoder
from .layout import PageLayout, fields_per_byte
from .packing import pack_codes


@triton.jit
def store_tile(
    tile,
    record_ptr,
    scratch_ptr,
    VALUES: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EQUIVARIANT: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Encode one rotated tile [page_size, channels] and write its half of the record.

    Codes go through the scratch tile, because bytes gather numbers that other threads hold. The caller has a barrier
    between its last use of the scratch tile and this call, and another one after it.
    """
    BITS: tl.constexpr = LAYOUT.v_bits if VALUES else LAYOUT.k_bits
    FIELDS: tl.constexpr = V_FIELDS if VALUES else K_FIELDS
    CODES: tl.constexpr = LAYOUT.v_codes_offset if VALUES else LAYOUT.k_codes_offset
    PARAMS: tl.constexpr = LAYOUT.v_params_offset if VALUES else LAYOUT.k_params_offset
    NORM: tl.constexpr = LAYOUT.v_norm_offset if VALUES else LAYOUT.k_norm_offset
    D: tl.constexpr = LAYOUT.head_dim
    offs_d = tl.arange(0, tile.shape[1])
    offs_t = tl.arange(0, tile.shape[0])
    mask_d = offs_d < D
    codes, scale, zero, norm, gain = encode_tile(tile, mask_d, D, BITS, not VALUES, ITERATIONS, EQUIVARIANT)
    codes_ptr = scratch_ptr.to(tl.pointer_type(tl.int32))
    tl.store(codes_ptr + offs_t[:, None] * tile.shape[1] + offs_d[None, :], codes)
    params = join_halves(scale.to(tl.float16), zero.to(tl.float16))
    params_ptr = (record_ptr + PARAMS).to(tl.pointer_type(tl.uint32))
    norm_ptr = (record_ptr + NORM).to(tl.pointer_type(tl.float16))
    gains_ptr = (record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32))
    if VALUES:
        tl.store(params_ptr + offs_t, params)
        tl.store(norm_ptr + offs_d, norm.to(tl.float16), mask_d)
        tl.store(gains_ptr + 1, gain)
    else:
        tl.store(params_ptr + offs_d, params, mask_d)
        tl.store(norm_ptr + offs_t, norm.to(tl.float16))
        PADDING: tl.constexpr = (LAYOUT.page_bytes - LAYOUT.gains_offset) // 4
        place = tl.arange(0, 32)
        tl.store(gains_ptr + place, tl.where(place == 0, gain, 0.0), (place != 1) & (place < PADDING))
    tl.debug_barrier()
    G: tl.constexpr = tile.shape[0]
    if VALUES:
        pack_codes(codes_ptr, record_ptr + CODES, 1, tile.shape[1], D, G, G, BITS, FIELDS, G // FIELDS, 4096 // G)
    else:
        pack_codes(
            codes_ptr, record_ptr + CODES, tile.shape[1], 1, G, D, LAYOUT.block_size, BITS, FIELDS,
            tile.shape[1] // FIELDS, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _rotate_to_scratch(
    scratch_ptr, x_ptr, start, stride_token, LAYOUT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Rotate the tokens of one page, BLOCK_R at a time, into float32 scratch [page_size, BLOCK_D]."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    for first in range(0, LAYOUT.page_size, BLOCK_R):
        offs_t = first + tl.arange(0, BLOCK_R)[:, None]
        mask = (offs_d < LAYOUT.head_dim) & (offs_t >= 0)
        x = tl.load(x_ptr + (start + offs_t) * stride_token + offs_d, mask, other=0.0).to(tl.float32)
        tl.store(scratch_ptr + offs_t * BLOCK_D + offs_d, hadamard(x, LAYOUT.block_size))


@triton.jit(do_not_specialize=["num_tiles", "num_kv_heads"])
def _kvarn_store_pages_kernel(
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    scratch_ptr,  # float32 [num_programs, page_size, BLOCK_D]
    k_ptr,  # [num_tokens, num_kv_heads, head_dim]
    v_ptr,  # [num_tokens, num_kv_heads, head_dim]
    page_ids_ptr,  # [n]
    token_starts_ptr,  # [n], unused if not HAS_STARTS
    num_tiles,  # n * num_kv_heads * 2
    num_kv_heads,
    stride_pages_page,
    stride_pages_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    LAYOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # tokens rotated at a time
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EQUIVARIANT: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    scratch_ptr += tl.program_id(0) * G * BLOCK_D
    place = tl.arange(0, G)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    for tile_index in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        index = tile_index // (2 * num_kv_heads)
        head = (tile_index // 2 % num_kv_heads).to(tl.int64)
        page = tl.load(page_ids_ptr + index).to(tl.int64)
        start = index.to(tl.int64) * G
        if HAS_STARTS:
            start = tl.load(token_starts_ptr + index).to(tl.int64)
        if page >= 0:
            record_ptr = pages_ptr + page * stride_pages_page + head * stride_pages_head
            if tile_index % 2 == 0:
                _rotate_to_scratch(scratch_ptr, k_ptr + head * stride_k_head, start, stride_k_token, LAYOUT, BLOCK_D, BLOCK_R)
                tl.debug_barrier()
                tile = tl.load(scratch_ptr + place)
                tl.debug_barrier()
                store_tile(tile, record_ptr, scratch_ptr, False, LAYOUT, K_FIELDS, V_FIELDS, ITERATIONS, EQUIVARIANT, BLOCK_R)
            else:
                _rotate_to_scratch(scratch_ptr, v_ptr + head * stride_v_head, start, stride_v_token, LAYOUT, BLOCK_D, BLOCK_R)
                tl.debug_barrier()
                tile = tl.load(scratch_ptr + place)
                tl.debug_barrier()
                store_tile(tile, record_ptr, scratch_ptr, True, LAYOUT, K_FIELDS, V_FIELDS, ITERATIONS, EQUIVARIANT, BLOCK_R)
            tl.debug_barrier()


def store_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    *,
    token_starts: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize full pages straight from the K and V activations and write them into `pages`.

    Args:
        k: float16, bfloat16 or float32 [num_tokens, num_kv_heads, head_dim], after the position encoding, not rotated; any
            strides whose innermost is 1.
        v: like `k`.
        pages: uint8 [num_pages, num_kv_heads, page_bytes], written in place.
        page_ids: int32 or int64 [n]; page i is written to `pages[page_ids[i]]`, ids below 0 are skipped.
        layout: the page format.
        token_starts: int32 or int64 [n]; page i takes the tokens from `token_starts[i]` on, `page_size` of them. By default
            i * page_size.
        encoder: options of the encoder.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids and starts are not read to be checked.
    """
    num_kv_heads = check_pages(pages, layout.page_bytes)
    check_tensor("page_ids", page_ids, [None], INDICES, device=pages.device)
    num_pages = page_ids.shape[0]
    check_tensor("k", k, [None, num_kv_heads, layout.head_dim], FLOATS, device=pages.device)
    check_tensor("v", v, [k.shape[0], num_kv_heads, layout.head_dim], k.dtype, device=pages.device)
    if token_starts is not None:
        check_tensor("token_starts", token_starts, [num_pages], INDICES, device=pages.device)
    elif k.shape[0] < num_pages * layout.page_size:
        raise ValueError(f"k: expected at least {num_pages * layout.page_size} tokens, got {k.shape[0]}")
    if not configs.on_device(pages):
        reference.store_pages(k, v, pages, page_ids, layout, token_starts=token_starts, encoder=encoder)
        return
    if num_pages == 0:
        return
    config = configs.store_config(layout)
    num_tiles = num_pages * num_kv_heads * 2
    num_programs = min(num_tiles, configs.num_multiprocessors(pages.device) * config.programs_per_sm)
    block_d = triton.next_power_of_2(layout.head_dim)
    scratch = torch.empty(num_programs, layout.page_size, block_d, dtype=torch.float32, device=pages.device)
    _kvarn_store_pages_kernel[(num_programs,)](
        pages,
        scratch,
        k,
        v,
        page_ids,
        page_ids if token_starts is None else token_starts,
        num_tiles,
        num_kv_heads,
        pages.stride(0),
        pages.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        LAYOUT=layout,
        BLOCK_D=block_d,
        BLOCK_R=config.block_t,
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        HAS_STARTS=token_starts is not None,
        ITERATIONS=encoder.iterations,
        EQUIVARIANT=encoder.equivariant,
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
