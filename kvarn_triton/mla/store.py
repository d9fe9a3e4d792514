"""Quantize full pages of latents: rotate, balance, round, pack and scatter in one launch, rotary channels beside them.

One program writes one page. Its latents [page_size, 512] stay in registers from loading to packing, as keys do
(`pages.store`). Grid: (page,). Bytes moved: each activation once, each record byte once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, INDICES, check_tensor, require
from ..encoder import DEFAULT, Encoder
from ..launch import aligned, on
from ..layout import fields_per_byte
from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout, check_mla_pages
from ..pages.store import store_tile
from ..tile.arithmetic import to_half
from ..tile.blocks import load_blocks

LATENTS = tl.constexpr(LATENT_DIM)
ROPE = tl.constexpr(ROPE_DIM)


@triton.jit
def store_record(blocks, rope, record_ptr, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, ENCODER: tl.constexpr):
    """Write the record of rotated latents, a tile in blocks, and rotary channels float16 [page_size, 64]."""
    store_tile(blocks, record_ptr, False, LAYOUT, FIELDS, ENCODER)
    # A record of keys and values has the gain of its values there.
    tl.store((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1, 0.0)
    rope_ptr = (record_ptr + LAYOUT.rope_offset).to(tl.pointer_type(tl.float16))
    tl.store(rope_ptr + tl.arange(0, LAYOUT.page_size)[:, None] * ROPE + tl.arange(0, ROPE)[None, :], rope)


@triton.jit(do_not_specialize_on_alignment=["page_ids_ptr", "token_starts_ptr"])
def _kvarn_mla_store_pages_kernel(
    pages,  # uint8 [num_pages, page_bytes] and its stride
    latents,  # [num_tokens, 512] and its stride
    rope,  # [num_tokens, 64] and its stride
    page_ids_ptr,  # [n]
    token_starts_ptr,  # [n], or None
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    ENCODER: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    index = tl.program_id(0)
    page = tl.load(page_ids_ptr + index).to(tl.int64)
    if token_starts_ptr is None:
        start = index.to(tl.int64) * G
    else:
        start = tl.load(token_starts_ptr + index).to(tl.int64)
    if page >= 0:
        stride_token = latents[1].to(tl.int64)
        blocks = load_blocks(latents[0] + start * stride_token, stride_token, G, LATENTS, ROTATE=LAYOUT.block_size)
        token = start + tl.arange(0, G)
        x = tl.load(rope[0] + token[:, None] * rope[1] + tl.arange(0, ROPE)[None, :]).to(tl.float32)
        store_record(blocks, to_half(x), pages[0] + page * pages[1], LAYOUT, FIELDS, ENCODER)


def mla_store_pages(
    latents: torch.Tensor,
    rope: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: MLALayout,
    *,
    token_starts: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize full pages of latents and write them into `pages`, with the rotary channels of their tokens in float16.

    Args:
        latents: float16, bfloat16 or float32 [num_tokens, 512], as the model caches them (normalized), not rotated by any
            Hadamard matrix; any stride. May be a view of tokens of 576 channels.
        rope: like `latents`, [num_tokens, 64], after the position encoding. Saturates at 65504.
        pages: uint8 [num_pages, page_bytes], written in place.
        page_ids: int32 or int64 [n]; page i is written to `pages[page_ids[i]]`, ids below 0 are skipped.
        layout: the page format.
        token_starts: int32 or int64 [n]; page i takes the tokens from `token_starts[i]` on, `page_size` of them. By default
            i * page_size.
        encoder: options of the encoder.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids and starts are not read to be checked.
    """
    check_mla_pages(pages, layout)
    check_tensor("page_ids", page_ids, [None], INDICES, device=pages.device)
    check_tokens(latents, rope, pages.device)
    num_pages = page_ids.shape[0]
    if token_starts is not None:
        check_tensor("token_starts", token_starts, [num_pages], INDICES, device=pages.device)
    else:
        least = num_pages * layout.page_size
        require(latents.shape[0] >= least, "latents", f"at least {least} tokens", latents.shape[0])
    if not gpu.on_device(pages):
        order = reference.ANY_ORDER
        reference.mla_store_pages(
            latents, rope, pages, page_ids, layout, token_starts=token_starts, encoder=encoder, arithmetic=order
        )
        return
    if num_pages == 0:
        return
    if token_starts is not None and token_starts.dtype != page_ids.dtype:
        page_ids, token_starts = page_ids.long(), token_starts.long()  # two kernels are compiled, not four
    pages, latents, rope = aligned(pages), aligned(latents), aligned(rope)
    on(pages, _kvarn_mla_store_pages_kernel)[(num_pages,)](
        (pages, pages.stride(0)),
        (latents, latents.stride(0)),
        (rope, rope.stride(0)),
        page_ids,
        token_starts,
        LAYOUT=layout,
        FIELDS=fields_per_byte(layout.bits),
        ENCODER=encoder,
        **configs.encode_options(layout.keys, pages.device),
        enable_fp_fusion=False,
    )


def check_tokens(latents: torch.Tensor, rope: torch.Tensor, device: torch.device, count: int | None = None) -> None:
    """Check the latents and rotary channels of tokens, of `count` if there have to be so many."""
    check_tensor("latents", latents, [None, LATENT_DIM], FLOATS, device=device)
    require(count is None or latents.shape[0] == count, "latents", f"{count} tokens", latents.shape[0])
    check_tensor("rope", rope, [latents.shape[0], ROPE_DIM], latents.dtype, device=device)
