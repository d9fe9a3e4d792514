"""Quantize full pages: rotate, balance, round, pack and scatter in one launch.

One program encodes one tile, the keys or the values of one page of one kv head [page_size, head_dim], from activations of any
strides; it stays in registers from loading to packing (`blocks`, `encode`). Grid: (tile,), keys and values of a head next to
each other. Bytes moved: each activation once, each record byte once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, INDICES, check_pages, check_tensor
from ..encoder import DEFAULT, Encoder
from ..launch import aligned, as_pages, as_rows, on
from ..layout import PageLayout, fields_per_byte
from ..tile.arithmetic import join_halves
from ..tile.blocks import TILE_TOKENS, block_channels, channel_of, load_blocks, token_of
from ..tile.encode import encode_blocks
from .packing import store_codes


@triton.jit
def store_tile(
    blocks,
    record_ptr,
    VALUES: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    ENCODER: tl.constexpr,
):
    """Encode a rotated tile and write its half of the record: codes, parameters, norms, gain."""
    BITS: tl.constexpr = LAYOUT.v_bits if VALUES else LAYOUT.k_bits
    CODES: tl.constexpr = LAYOUT.v_codes_offset if VALUES else LAYOUT.k_codes_offset
    PARAMS: tl.constexpr = LAYOUT.v_params_offset if VALUES else LAYOUT.k_params_offset
    NORM: tl.constexpr = LAYOUT.v_norm_offset if VALUES else LAYOUT.k_norm_offset
    D: tl.constexpr = LAYOUT.v_head_dim if VALUES else LAYOUT.head_dim
    G: tl.constexpr = LAYOUT.page_size
    codes, scale, zero, norm, gain = encode_blocks(blocks, G, D, BITS, not VALUES, ENCODER)
    params = join_halves(scale.to(tl.float16), zero.to(tl.float16))
    params_ptr = (record_ptr + PARAMS).to(tl.pointer_type(tl.uint32))
    norm_ptr = (record_ptr + NORM).to(tl.pointer_type(tl.float16))
    gains_ptr = (record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32))
    if VALUES:
        token = token_of(scale, G // TILE_TOKENS)
        channel = channel_of(norm, block_channels(D))
        tl.store(params_ptr + token, params)
        tl.store(norm_ptr + channel, norm.to(tl.float16), channel < D)
        tl.store(gains_ptr + 1, gain)
        store_codes(record_ptr + CODES, codes, G, D, G, BITS, FIELDS, False)
    else:
        token = token_of(norm, G // TILE_TOKENS)
        channel = channel_of(scale, block_channels(D))
        tl.store(params_ptr + channel, params, channel < D)
        tl.store(norm_ptr + token, norm.to(tl.float16))
        PADDING: tl.constexpr = (LAYOUT.page_bytes - LAYOUT.gains_offset) // 4
        place = tl.arange(0, 32)
        tl.store(gains_ptr + place, tl.where(place == 0, gain, 0.0), (place != 1) & (place < PADDING))
        store_codes(record_ptr + CODES, codes, G, D, LAYOUT.block_size, BITS, FIELDS, True)


@triton.jit(do_not_specialize=["num_kv_heads"], do_not_specialize_on_alignment=["page_ids_ptr", "token_starts_ptr"])
def _kvarn_store_pages_kernel(
    pages,  # Pages
    k,  # Rows [num_tokens, num_kv_heads, head_dim]
    v,  # Rows [num_tokens, num_kv_heads, v_head_dim]
    page_ids_ptr,  # [n]
    token_starts_ptr,  # [n], or None
    num_kv_heads,
    LAYOUT: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    ENCODER: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.head_dim
    D_V: tl.constexpr = LAYOUT.v_head_dim
    tile = tl.program_id(0)
    index = tile // (2 * num_kv_heads)
    head = (tile // 2 % num_kv_heads).to(tl.int64)
    page = tl.load(page_ids_ptr + index).to(tl.int64)
    if token_starts_ptr is None:
        start = index.to(tl.int64) * G
    else:
        start = tl.load(token_starts_ptr + index).to(tl.int64)
    if page >= 0:
        record_ptr = pages.ptr + page * pages.stride_page + head * pages.stride_head
        values = tile % 2 == 1
        x_ptr = tl.where(values, v.ptr, k.ptr)
        stride_token = tl.where(values, v.stride_token, k.stride_token).to(tl.int64)
        x_ptr += start * stride_token + head * tl.where(values, v.stride_head, k.stride_head)
        if D == D_V:
            # Tiles of one size are loaded and rotated by the same code.
            blocks = load_blocks(x_ptr, stride_token, G, D, ROTATE=LAYOUT.block_size)
            if values:
                store_tile(blocks, record_ptr, True, LAYOUT, V_FIELDS, ENCODER)
            else:
                store_tile(blocks, record_ptr, False, LAYOUT, K_FIELDS, ENCODER)
        elif values:
            v_blocks = load_blocks(x_ptr, stride_token, G, D_V, ROTATE=LAYOUT.v_block_size)
            store_tile(v_blocks, record_ptr, True, LAYOUT, V_FIELDS, ENCODER)
        else:
            k_blocks = load_blocks(x_ptr, stride_token, G, D, ROTATE=LAYOUT.block_size)
            store_tile(k_blocks, record_ptr, False, LAYOUT, K_FIELDS, ENCODER)


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
        v: like `k`, with v_head_dim.
        pages: uint8 [num_pages, num_kv_heads, page_bytes], written in place.
        page_ids: int32 or int64 [n]; page i is written to `pages[page_ids[i]]`, ids below 0 are skipped.
        layout: the page format.
        token_starts: int32 or int64 [n]; page i takes the tokens from `token_starts[i]` on, `page_size` of them. By default
            i * page_size.
        encoder: options of the encoder.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids and starts are not read to be checked.
    """
    num_kv_heads = check_pages(pages, layout)
    check_tensor("page_ids", page_ids, [None], INDICES, device=pages.device)
    num_pages = page_ids.shape[0]
    check_tensor("k", k, [None, num_kv_heads, layout.head_dim], FLOATS, device=pages.device)
    check_tensor("v", v, [k.shape[0], num_kv_heads, layout.v_head_dim], k.dtype, device=pages.device)
    if token_starts is not None:
        check_tensor("token_starts", token_starts, [num_pages], INDICES, device=pages.device)
    elif k.shape[0] < num_pages * layout.page_size:
        raise ValueError(f"k: expected at least {num_pages * layout.page_size} tokens, got {k.shape[0]}")
    if not gpu.on_device(pages):
        order = reference.ANY_ORDER
        reference.store_pages(k, v, pages, page_ids, layout, token_starts=token_starts, encoder=encoder, arithmetic=order)
        return
    if num_pages == 0:
        return
    if token_starts is not None and token_starts.dtype != page_ids.dtype:
        page_ids, token_starts = page_ids.long(), token_starts.long()  # two kernels are compiled, not four
    pages, k, v = aligned(pages), aligned(k), aligned(v)
    on(pages, _kvarn_store_pages_kernel)[(num_pages * num_kv_heads * 2,)](
        as_pages(pages),
        as_rows(k),
        as_rows(v),
        page_ids,
        token_starts,
        num_kv_heads,
        LAYOUT=layout,
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        ENCODER=encoder,
        **configs.encode_options(layout, pages.device),
        enable_fp_fusion=False,
    )
