"""Where pages are: jit helpers that load page ids and bring records near."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ids_of_row(table_ptr, indptr_ptr, row, stride_table, CSR: tl.constexpr):
    """Return where the page ids of a row begin: in a block table, or in the indices of a CSR table."""
    if CSR:
        row_ptr = table_ptr + tl.load(indptr_ptr + row)
    else:
        row_ptr = table_ptr + row.to(tl.int64) * stride_table
    return row_ptr


@triton.jit
def num_ids_of_row(indptr_ptr, row, mask, max_pages, CSR: tl.constexpr):
    """Return how many page ids a row has, or each of several rows."""
    count = max_pages
    if CSR:
        count = tl.load(indptr_ptr + row + 1, mask, other=0) - tl.load(indptr_ptr + row, mask, other=0)
    return count


@triton.jit
def load_page_id(table_ptr, column, last, PTX: tl.constexpr):
    """Load the page id of a column, or of the last column before `last`; 0 if there is none, and nothing is read.

    The loops over pages load an id one step before the copies that need it. Triton's pipeliner would make an asynchronous
    copy of a load of its own, and wait for each copy as soon as it is issued; it lets inline PTX alone, even where a loop has
    no step at all, hence the predicate.
    """
    id_ptr = table_ptr + tl.minimum(column, last - 1)
    if PTX:
        page = tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.gt.s32 some, $2, 0; mov.b32 $0, 0; @some ld.global.b32 $0, [$1]; }",
            "=&r,l,r", [id_ptr.to(tl.int64), last], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        page = tl.load(id_ptr, last > 0, other=0)
    return page


@triton.jit
def prefetch_record(record_ptr, BYTES: tl.constexpr, PTX: tl.constexpr):
    """Start bringing a record into the L2 cache, so that it is near when the query is ready."""
    if PTX:
        LINES: tl.constexpr = triton.cdiv(BYTES, 128)
        line = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
        address = record_ptr.to(tl.int64) + line * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
        )  # fmt: skip
