"""Cutting sequences back: where a new end is inside of a quantized page, its tokens become raw ones of the tail again.

One program expands the keys or the values of that page of one row and kv head, in one block of the rotation, and
returns at once if the row has no such page. Grid: (program,), those of a row next to each other; it follows from shapes alone.
Bytes moved per page that is expanded: its record and its raw tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..cache import Cache, checked_for_completion
from ..launch import on
from ..layout import PageLayout
from ..paging import ids_of_row, sink_of
from ..tile.dequantize import Target, dequantize_chunk
from .dequantize import chunk_of_program, read_plan

_NOT_SPECIALIZED = ["num_kv_heads", "parts", "sink_len", "num_tail_slots", "stride_raw_table", "stride_table"]
_ANY_ADDRESS = ["raw_table_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_cut_back_kernel(
    pages,  # Pages
    raw,  # Tokens
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch], the new lengths
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    num_quantized_ptr,  # int32 [batch]
    num_kv_heads,
    parts,
    sink_len,
    num_tail_slots,
    stride_table,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    chunk = chunk_of_program(num_kv_heads, parts, PLAN)
    row = chunk.entry
    sink = sink_of(sink_len, row, row >= 0)
    length = tl.maximum(tl.load(seq_lens_ptr + row) - sink, 0)
    body = length // LAYOUT.page_size
    if (body < tl.load(num_quantized_ptr + row)) & (length % LAYOUT.page_size > 0):
        page = tl.load(ids_of_row(table_ptr, indptr_ptr, row, stride_table) + body).to(tl.int64)
        column = tl.cdiv(sink, LAYOUT.page_size) + body % num_tail_slots
        raw_page = tl.load(raw_table_ptr + row.to(tl.int64) * stride_raw_table + column).to(tl.int64)
        if (page >= 0) & (raw_page >= 0):
            record_ptr = pages.ptr + page * pages.stride_page + chunk.head * pages.stride_head
            out_ptr = raw.ptr + raw_page * raw.stride_page + chunk.head * raw.stride_head
            outs = Target(out_ptr, raw.stride_token, None), Target(out_ptr + raw.stride_half, raw.stride_token, None)
            dequantize_chunk(outs, record_ptr, chunk, LAYOUT, PLAN)


def cut_back(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor | None,
    new_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: PageLayout,
    *,
    sink_len: int = 0,
    advance: bool = True,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """Cut sequences back to `new_lens` tokens, which may be inside of pages that are quantized: a conversation is edited.

    Quantized pages behind the new end are no longer counted. The one that the new end is inside of is dequantized into its slot
    of the tail ring, from where it is read and appended to like any other; it may be shared, for it is not written. When it is
    full again `commit_pages` quantizes it a second time: numbers that were rounded once are rounded again. Nothing is read back
    to the host. Afterwards lower `seq_lens` to `new_lens`, and give pages that are not needed back. Where only raw tokens are
    cut off, as with rejected drafts, lowering `seq_lens` is enough, and this call changes nothing.

    Args:
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim], written in
            place. Numbers beyond the range of float16 become infinite in a float16 pool.
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        raw_table: int32 [batch, num_sink_pages + num_tail_slots].
        block_table: int32 [batch, max_pages]; None with `kv_indptr` and `kv_indices`.
        new_lens: int32 [batch], tokens that each sequence keeps; for sequences that are not cut their length.
        num_quantized: int32 [batch], updated in place.
        layout: the page format.
        sink_len: tokens at the start of every sequence that stay raw.
        advance: whether to lower `num_quantized`. Layers that share it pass False, all but the last.
        kv_indptr: int32 [batch + 1], rising; where the page ids of each sequence begin in `kv_indices`.
        kv_indices: int32 [n], page ids.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option, and for two forms of page ids, or none; nothing is
            written. Ids and lengths are not read to be checked; nothing is written for an id below 0.
    """
    cache = Cache(
        layout, pages, new_lens, block_table, kv_indptr, kv_indices, raw_pages, raw_table, num_quantized, sink_len
    )  # fmt: skip
    cache = checked_for_completion(cache, "new_lens")
    if not gpu.on_device(pages):
        reference.cut_back(
            raw_pages, pages, raw_table, block_table, new_lens, num_quantized, layout,
            sink_len=sink_len, advance=advance, kv_indptr=kv_indptr, kv_indices=kv_indices,
        )  # fmt: skip
        return
    launch_cut_back(cache)
    if advance and cache.batch and cache.num_kv_heads:
        reference.cache.lower_counts(num_quantized, new_lens, layout, sink_len)


def launch_cut_back(cache: Cache) -> None:
    """Dequantize pages that the lengths of a cache end inside of; nothing is checked."""
    layout, device = cache.layout, cache.pages.device
    plan = read_plan(layout, device, rotated=True)
    programs = plan.blocks * 2 * cache.num_kv_heads * cache.batch
    if programs == 0:
        return
    parts = configs.gather_parts(programs, device)
    on(cache.pages, _kvarn_cut_back_kernel)[(programs * parts,)](
        cache.quantized,
        **cache.tables(),
        **cache.raw_tables(),
        num_kv_heads=cache.num_kv_heads,
        parts=parts,
        LAYOUT=layout,
        PLAN=plan,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
