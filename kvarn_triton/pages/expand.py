"""The launch before the tiles of prefill attention that have scratch memory: it dequantizes every page once that they read.

One program writes the keys or the values of some pages of one row and kv head, in one block of the rotation: rotated as they
are stored, or not. Which pages of a row are seen follows from lengths on the device; each program takes every n-th of them.
Grid: (program,), those of a page next to each other. Bytes moved: each record byte that is seen in, each element out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs
from ..cache import Cache
from ..launch import as_tokens, on
from ..masking import Windows, clamped
from ..paging import ALL_PAGES, first_page_of, first_slot, ids_of_row, seen_by, sink_of
from ..tile.dequantize import Target, dequantize_chunk
from .dequantize import chunk_of_program, read_plan


@triton.jit(
    do_not_specialize=["sink_len", "num_kv_heads", "parts", "columns", "first_page", "ring", "max_pages", "stride_table"],
    do_not_specialize_on_alignment=["table_ptr", "indptr_ptr", "seq_lens_ptr", "cu_seqlens_ptr", "num_quantized_ptr"],
)
def _kvarn_expand_pages_kernel(
    scratch,  # Tokens
    pages,  # Pages
    table_ptr,  # int32 [batch, max_pages], or with CSR [ids]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    cu_seqlens_ptr,  # int32 [batch + 1]
    num_quantized_ptr,  # int32 [batch], None without raw pages
    sink_len,
    window,  # of Windows, that of the body, or None
    num_kv_heads,
    parts,
    columns,  # programs that share the pages of a row
    first_page,  # of this launch; below 0: the first one that is seen, of each row
    ring,  # pages of a row that scratch memory holds at once, and most of this launch
    max_pages,
    stride_table,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
    APART: tl.constexpr,  # the keys of query tokens are not in the cache
):
    chunk = chunk_of_program(num_kv_heads, parts, PLAN)
    column = chunk.entry % columns
    row = chunk.entry // columns
    num_tokens = tl.load(cu_seqlens_ptr + row + 1) - tl.load(cu_seqlens_ptr + row)
    if num_tokens > 0:
        seq_len = tl.load(seq_lens_ptr + row)
        sink = sink_of(sink_len, row, row >= 0)
        if window is not None:
            window = clamped(window, seq_len)
        seen = seen_by(
            (0, num_tokens - 1, num_tokens), row, seq_len, num_quantized_ptr, sink, window,
            LAYOUT.page_size, APART,
        )  # fmt: skip
        slot = first_slot(indptr_ptr, row, max_pages, ring)
        first = first_page_of(first_page, seen.first_page)
        scratch_ptr = scratch.ptr + chunk.head * scratch.stride_head
        ids_ptr = ids_of_row(table_ptr, indptr_ptr, row, stride_table)
        last_page = tl.minimum(seen.quantized, first + tl.minimum(ring, max_pages))
        for i in range(tl.maximum(seen.first_page, first) + column, last_page, columns):
            page = tl.maximum(tl.load(ids_ptr + i), 0).to(tl.int64)
            record_ptr = pages.ptr + page * pages.stride_page + chunk.head * pages.stride_head
            out_ptr = scratch_ptr + (slot + i - first) * scratch.stride_page
            outs = (
                Target(out_ptr, scratch.stride_token, None), Target(out_ptr + scratch.stride_half, scratch.stride_token, None)
            )  # fmt: skip
            dequantize_chunk(outs, record_ptr, chunk, LAYOUT, PLAN)


def launch_expand_pages(
    scratch: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache: Cache,
    windows: Windows,
    apart: bool,
    rotated: bool,
    first_page: int = 0,
    ring: int = ALL_PAGES.value,
) -> None:
    """Write quantized pages that some query sees to their slots of `scratch`, `ring` of each row from `first_page` on.

    Below 0 that is the first page that a query of the row sees. Nothing is checked.
    """
    layout, pages, num_kv_heads = cache.layout, cache.pages, cache.num_kv_heads
    plan = read_plan(layout, pages.device, rotated)
    per_page = plan.blocks * 2 * num_kv_heads
    columns = configs.expand_columns(cache.batch * per_page, min(cache.max_pages, ring), pages.device)
    programs = per_page * columns * cache.batch
    if programs == 0:
        return
    parts = configs.gather_parts(programs, pages.device)
    on(pages, _kvarn_expand_pages_kernel)[(programs * parts,)](
        as_tokens(scratch),
        cache.quantized,
        **cache.tables(),
        cu_seqlens_ptr=cu_seqlens_q,
        window=windows.body,
        num_kv_heads=num_kv_heads,
        parts=parts,
        columns=columns,
        first_page=first_page,
        ring=ring,
        max_pages=cache.max_pages,
        LAYOUT=layout,
        PLAN=plan,
        APART=apart,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
