"""The raw tokens of a cache of latents: appended to the pool, and quantized once a page is finished.

`_kvarn_mla_append_tokens_kernel`: one program rotates and writes one token. Grid: (token,). `_kvarn_mla_commit_pages_kernel`:
one program quantizes the next page of one sequence if its tokens are all committed, and returns at once otherwise. Grid:
(sequence,). `_kvarn_mla_advance_kernel` counts those pages afterwards. Grids follow from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import INDICES, check_tensor, require
from ..encoder import DEFAULT, Encoder
from ..launch import aligned, on
from ..layout import fields_per_byte
from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout
from ..tile.arithmetic import hadamard, to_half
from ..tile.blocks import load_blocks
from .cache import LatentCache, check_raw_latents, checked
from .store import check_tokens, store_record

LATENTS = tl.constexpr(LATENT_DIM)
ROPE = tl.constexpr(ROPE_DIM)


@triton.jit(do_not_specialize=["page_size"], do_not_specialize_on_alignment=["slots_ptr"])
def _kvarn_mla_append_tokens_kernel(
    raw,  # float16 [num_raw_pages, page_size, 576] and its strides
    latents,  # [num_tokens, 512] and its stride
    rope,  # [num_tokens, 64] and its stride
    slots_ptr,  # [num_tokens]
    page_size,
):
    token = tl.program_id(0).to(tl.int64)
    offs_c, offs_r = tl.arange(0, LATENTS)[None, :], tl.arange(0, ROPE)[None, :]
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        raw_ptr = raw[0] + slot // page_size * raw[1] + slot % page_size * raw[2]
        x = tl.load(latents[0] + token * latents[1] + offs_c).to(tl.float32)
        tl.store(raw_ptr + offs_c, to_half(hadamard(x, LATENTS)))
        y = tl.load(rope[0] + token * rope[1] + offs_r).to(tl.float32)
        tl.store(raw_ptr + LATENTS + offs_r, to_half(y))


def mla_append_tokens(latents: torch.Tensor, rope: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Rotate the latents of tokens and write them, with their rotary channels, into the raw pool.

    Args:
        latents: float16, bfloat16 or float32 [num_tokens, 512], not rotated; any stride.
        rope: like `latents`, [num_tokens, 64], after the position encoding.
        raw_pages: float16 [num_raw_pages, page_size, 576], written in place: rotated latents, then rotary channels; numbers
            saturate at 65504.
        slots: int32 or int64 [num_tokens]; raw page id * page_size + offset in the page (`raw_slots`). Below 0: skipped.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Slots are not read to be checked.
    """
    check_raw_latents(raw_pages)
    check_tokens(latents, rope, raw_pages.device)
    check_tensor("slots", slots, [latents.shape[0]], INDICES, device=raw_pages.device)
    if not gpu.on_device(raw_pages):
        reference.mla_append_tokens(latents, rope, raw_pages, slots)
        return
    launch_append(latents, rope, raw_pages, slots)


def launch_append(latents: torch.Tensor, rope: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Append tokens; nothing is checked."""
    if latents.shape[0] == 0:
        return
    raw_pages, latents, rope = aligned(raw_pages), aligned(latents), aligned(rope)  # of the pool a view
    on(raw_pages, _kvarn_mla_append_tokens_kernel)[(latents.shape[0],)](
        (raw_pages, *raw_pages.stride()[:2]),
        (latents, latents.stride(0)),
        (rope, rope.stride(0)),
        slots,
        raw_pages.shape[1],
        num_warps=1,
        enable_fp_fusion=False,
    )


@triton.jit
def _due_page(table_ptr, lens_ptr, num_quantized_ptr, row, sink_len, max_pages, stride_table, mask, G: tl.constexpr):
    """Return the body page of each row that is next, and the id of its quantized page, -1 if it is not due."""
    body = tl.load(num_quantized_ptr + row, mask, other=-1)
    finished = tl.maximum(tl.load(lens_ptr + row, mask, other=0) - sink_len, 0) // G
    due = mask & (body >= 0) & (body < tl.minimum(finished, max_pages))
    return body, tl.load(table_ptr + row.to(tl.int64) * stride_table + body, due, other=-1)


_NOT_SPECIALIZED = ["sink_len", "max_pages", "num_tail_slots", "stride_table", "stride_raw_table", "batch"]
_ANY_ADDRESS = ["table_ptr", "raw_table_ptr", "lens_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED[:-1], do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_mla_commit_pages_kernel(
    pages,  # uint8 [num_pages, page_bytes] and its stride
    raw,  # float16 [num_raw_pages, page_size, 576] and its strides
    table_ptr,  # int32 [batch, max_pages]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch]
    sink_len,
    max_pages,
    num_tail_slots,
    stride_table,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    ENCODER: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    row = tl.program_id(0)
    body, page = _due_page(
        table_ptr, lens_ptr, num_quantized_ptr, row, sink_len, max_pages, stride_table, row >= 0, G
    )  # fmt: skip
    if page >= 0:
        column = sink_len // G + body % num_tail_slots
        raw_page = tl.load(raw_table_ptr + row.to(tl.int64) * stride_raw_table + column)
        raw_ptr = raw[0] + tl.maximum(raw_page, 0).to(tl.int64) * raw[1]
        blocks = load_blocks(raw_ptr, raw[2].to(tl.int64), G, LATENTS)
        place = tl.arange(0, G)[:, None].to(tl.int64) * raw[2] + tl.arange(0, ROPE)[None, :]
        rope = tl.load(raw_ptr + LATENTS + place)
        store_record(blocks, rope, pages[0] + page.to(tl.int64) * pages[1], LAYOUT, FIELDS, ENCODER)


@triton.jit(
    do_not_specialize=["sink_len", "max_pages", "stride_table", "batch"],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "num_quantized_ptr"],
)
def _kvarn_mla_advance_kernel(
    table_ptr,  # int32 [batch, max_pages]
    lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch], updated in place
    sink_len,
    max_pages,
    stride_table,
    batch,
    G: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    mask = row < batch
    body, page = _due_page(table_ptr, lens_ptr, num_quantized_ptr, row, sink_len, max_pages, stride_table, mask, G)
    tl.store(num_quantized_ptr + row, body + 1, mask & (page >= 0))


def mla_commit_pages(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: MLALayout,
    *,
    sink_len: int = 0,
    advance: bool = True,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize the next page of each tail if its tokens are all committed, and advance `num_quantized`.

    Body page j of a sequence, the next one being `num_quantized`, is due if `sink_len + (j + 1) * page_size <=
    committed_lens`. One call quantizes at most one page of a sequence; nothing is read back to the host.

    Args:
        raw_pages: float16 [num_raw_pages, page_size, 576] (`mla_append_tokens`).
        pages: uint8 [num_pages, page_bytes], written in place.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]; body page j is in column num_sink_pages + j % num_tail_slots.
        block_table: int32 [batch, max_pages]; ids of pages, set before they complete. A page with an id below 0 is neither
            written nor counted.
        committed_lens: int32 [batch], tokens that will not be rolled back; drafts don't count.
        num_quantized: int32 [batch], body pages in quantized form; updated in place.
        layout: the page format.
        sink_len: tokens at the start of every sequence that stay raw, a multiple of page_size.
        advance: whether to count the pages. Layers that share their tables pass False but for the last of a step.
        encoder: options of the encoder.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option; nothing is written. Ids and lengths are not read to be
            checked.
    """
    require(raw_pages is not None, "raw_pages", "a tensor", "NoneType")
    cache = LatentCache(layout, pages, block_table, committed_lens, raw_pages, raw_table, num_quantized, sink_len)
    cache = checked(cache, "committed_lens")
    if not gpu.on_device(pages):
        reference.mla_commit_pages(
            raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, layout, sink_len=sink_len,
            advance=advance, encoder=encoder, arithmetic=reference.ANY_ORDER,
        )  # fmt: skip
        return
    if cache.batch == 0:
        return
    assert cache.raw_pages is not None
    shared: dict[str, Any] = {"sink_len": sink_len, "max_pages": block_table.shape[1], "stride_table": block_table.stride(0)}
    shared |= {"table_ptr": block_table, "lens_ptr": committed_lens, "num_quantized_ptr": num_quantized}
    on(pages, _kvarn_mla_commit_pages_kernel)[(cache.batch,)](
        (cache.pages, cache.pages.stride(0)),
        (cache.raw_pages, *cache.raw_pages.stride()[:2]),
        raw_table_ptr=raw_table,
        num_tail_slots=raw_table.shape[1] - cache.num_sink_pages,
        stride_raw_table=raw_table.stride(0),
        LAYOUT=layout,
        FIELDS=fields_per_byte(layout.bits),
        ENCODER=encoder,
        **shared,
        **configs.encode_options(layout.keys, pages.device),
        enable_fp_fusion=False,
    )
    if advance:
        on(pages, _kvarn_mla_advance_kernel)[(-(-cache.batch // 256),)](
            **shared, batch=cache.batch, G=layout.page_size, ROWS_AT_ONCE=256, num_warps=1, enable_fp_fusion=False
        )
