"""Cutting sequences back: where a new end is inside of a quantized page, its tokens become raw ones of the tail again.

One program expands the keys or the values of that page of one row and kv head, in one block of the rotation (`expand`), and
returns at once if the row has no such page. Grid: (program,), those of a row next to each other; it follows from shapes alone.
Bytes moved per page that is expanded: its record and its raw tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..launch import aligned, check_pool, on
from ..layout import PageLayout, fields_per_byte
from ..paging import ids_of_row
from ..tile.dequantize import dequantize_block, num_blocks
from .commit import check_completion

_NOT_SPECIALIZED = [
    "num_kv_heads", "parts", "sink_len", "num_sink_pages", "num_tail_slots", "stride_raw_table", "stride_table",
]  # fmt: skip
_ANY_ADDRESS = ["raw_table_ptr", "table_ptr", "kv_indptr_ptr", "new_lens_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_cut_back_kernel(
    raw_pages_ptr,  # [num_raw_pages, 2, num_kv_heads, page_size, raw_head_dim]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    kv_indptr_ptr,  # int32 [batch + 1]; unused if not CSR
    new_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch]
    num_kv_heads,
    parts,
    sink_len,
    num_sink_pages,
    num_tail_slots,
    stride_pages_page,
    stride_pages_head,
    stride_raw_page,
    stride_raw_half,
    stride_raw_head,
    stride_raw_token,
    stride_raw_table,
    stride_table,
    LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    THREADS: tl.constexpr,
    CSR: tl.constexpr,
    PTX: tl.constexpr,
):
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS % parts
    tile = tl.program_id(0) // BLOCKS // parts
    head = (tile // 2 % num_kv_heads).to(tl.int64)
    row = tile // 2 // num_kv_heads
    length = tl.maximum(tl.load(new_lens_ptr + row) - sink_len, 0)
    body = length // LAYOUT.page_size
    if (body < tl.load(num_quantized_ptr + row)) & (length % LAYOUT.page_size > 0):
        page = tl.load(ids_of_row(table_ptr, kv_indptr_ptr, row, stride_table, CSR) + body).to(tl.int64)
        column = num_sink_pages + body % num_tail_slots
        raw_page = tl.load(raw_table_ptr + row.to(tl.int64) * stride_raw_table + column).to(tl.int64)
        if (page >= 0) & (raw_page >= 0):
            record_ptr = pages_ptr + page * stride_pages_page + head * stride_pages_head
            out_ptr = raw_pages_ptr + raw_page * stride_raw_page + head * stride_raw_head
            dequantize_block(
                out_ptr, out_ptr + stride_raw_half, record_ptr, tile % 2, block, part, parts,
                stride_raw_token, stride_raw_token, LAYOUT, K_FIELDS, V_FIELDS, THREADS, True, PTX,
            )  # fmt: skip


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
    batch = check_completion(
        raw_pages, pages, raw_table, block_table, new_lens, num_quantized, layout, sink_len, kv_indptr, kv_indices, "new_lens"
    )
    raw_pages, pages = check_pool("raw_pages", raw_pages), aligned(pages)
    num_kv_heads = pages.shape[1]
    if not gpu.on_device(pages):
        reference.cut_back(
            raw_pages, pages, raw_table, block_table, new_lens, num_quantized, layout,
            sink_len=sink_len, advance=advance, kv_indptr=kv_indptr, kv_indices=kv_indices,
        )  # fmt: skip
        return
    num_warps, threads = configs.gather_threads(max(layout.block_size, layout.v_block_size), pages.device)
    programs = num_blocks(layout) * 2 * num_kv_heads * batch
    if programs == 0:
        return
    parts = configs.gather_parts(programs, pages.device)
    num_sink_pages = -(-sink_len // layout.page_size)
    on(pages, _kvarn_cut_back_kernel)[(programs * parts,)](
        raw_pages,
        pages,
        raw_table,
        kv_indices if block_table is None else block_table,
        new_lens if kv_indptr is None else kv_indptr,
        new_lens,
        num_quantized,
        num_kv_heads,
        parts,
        sink_len,
        num_sink_pages,
        raw_table.shape[1] - num_sink_pages,
        *pages.stride()[:2],
        *raw_pages.stride()[:4],
        raw_table.stride(0),
        0 if block_table is None else block_table.stride(0),
        LAYOUT=layout,
        BLOCKS=num_blocks(layout),
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        THREADS=threads,
        CSR=block_table is None,
        PTX=gpu.uses_ptx(),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
    if advance:
        reference.cache.lower_counts(num_quantized, new_lens, layout, sink_len)
