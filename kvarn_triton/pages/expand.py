"""The launch before the tiles of prefill attention that have scratch memory: it dequantizes every page once that they read.

One program writes the keys or the values of some pages of one row and kv head, in one block of the rotation, rotated as they
are stored (`expand`). Which pages of a row are seen follows from lengths on the device; each program takes every n-th of them.
Grid: (program,), those of a page next to each other. Bytes moved: each record byte that is seen in, each element out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu
from ..launch import on
from ..layout import PageLayout, fields_per_byte
from ..paging import body_seen, first_slot, ids_of_row
from ..tile.dequantize import dequantize_block, num_blocks


@triton.jit(
    do_not_specialize=["sink_len", "window", "num_kv_heads", "parts", "columns", "max_pages", "stride_table"],
    do_not_specialize_on_alignment=["table_ptr", "indptr_ptr", "seq_lens_ptr", "cu_seqlens_ptr", "num_quantized_ptr"],
)
def _kvarn_expand_pages_kernel(
    scratch_ptr,  # [num_slots, 2, num_kv_heads, page_size, raw_head_dim]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    table_ptr,  # int32 [batch, max_pages], or [ids] if CSR
    indptr_ptr,  # int32 [batch + 1] if CSR
    seq_lens_ptr,  # int32 [batch]
    cu_seqlens_ptr,  # int32 [batch + 1]
    num_quantized_ptr,  # int32 [batch]
    sink_len,
    window,
    num_kv_heads,
    parts,
    columns,  # programs that share the pages of a row
    max_pages,
    stride_scratch_slot,
    stride_scratch_half,
    stride_scratch_head,
    stride_scratch_token,
    stride_pages_page,
    stride_pages_head,
    stride_table,
    LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    THREADS: tl.constexpr,
    HAS_RAW: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CSR: tl.constexpr,
    PTX: tl.constexpr,
):
    block = tl.program_id(0) % BLOCKS
    part = tl.program_id(0) // BLOCKS % parts
    tile = tl.program_id(0) // BLOCKS // parts
    half = tile % 2
    head = (tile // 2 % num_kv_heads).to(tl.int64)
    column = tile // 2 // num_kv_heads % columns
    row = tile // 2 // num_kv_heads // columns
    num_tokens = tl.load(cu_seqlens_ptr + row + 1) - tl.load(cu_seqlens_ptr + row)
    if num_tokens > 0:
        first_page, last_page, _, _, _ = body_seen(
            row, tl.load(seq_lens_ptr + row), num_tokens, 0, num_tokens - 1, num_quantized_ptr, sink_len, window,
            LAYOUT.page_size, HAS_RAW, HAS_NEW, HAS_WINDOW,
        )  # fmt: skip
        slot = first_slot(indptr_ptr, row, max_pages, CSR)
        scratch_ptr += head * stride_scratch_head
        ids_ptr = ids_of_row(table_ptr, indptr_ptr, row, stride_table, CSR)
        for i in range(first_page + column, last_page, columns):
            page = tl.maximum(tl.load(ids_ptr + i), 0).to(tl.int64)
            record_ptr = pages_ptr + page * stride_pages_page + head * stride_pages_head
            out_ptr = scratch_ptr + (slot + i) * stride_scratch_slot
            dequantize_block(
                out_ptr, out_ptr + stride_scratch_half, record_ptr, half, block, part, parts,
                stride_scratch_token, stride_scratch_token, LAYOUT, K_FIELDS, V_FIELDS, THREADS, True, PTX,
            )  # fmt: skip


def launch_expand_pages(
    scratch: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    num_quantized: torch.Tensor | None,
    sink_len: int,
    window: int | None,
    has_new: bool,
) -> None:
    """Write the quantized pages that some query sees to their slots of `scratch`; nothing is checked."""
    table = kv_indices if block_table is None else block_table
    assert table is not None
    batch, num_kv_heads, max_pages = seq_lens.shape[0], pages.shape[1], table.shape[-1]
    num_warps, threads = configs.gather_threads(max(layout.block_size, layout.v_block_size), pages.device)
    per_page = num_blocks(layout) * 2 * num_kv_heads
    columns = configs.expand_columns(batch * per_page, max_pages, pages.device)
    programs = per_page * columns * batch
    if programs == 0:
        return
    parts = configs.gather_parts(programs, pages.device)
    on(pages, _kvarn_expand_pages_kernel)[(programs * parts,)](
        scratch,
        pages,
        table,
        seq_lens if kv_indptr is None else kv_indptr,
        seq_lens,
        cu_seqlens_q,
        seq_lens if num_quantized is None else num_quantized,
        sink_len,
        window or 0,
        num_kv_heads,
        parts,
        columns,
        max_pages,
        *scratch.stride()[:4],
        pages.stride(0),
        pages.stride(1),
        0 if block_table is None else block_table.stride(0),
        LAYOUT=layout,
        BLOCKS=num_blocks(layout),
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        THREADS=threads,
        HAS_RAW=num_quantized is not None,
        HAS_NEW=has_new,
        HAS_WINDOW=window is not None,
        CSR=block_table is None,
        PTX=gpu.uses_ptx(),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )
