"""Where pages are: jit helpers that load page ids and bring records near."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .masking import first_seen


@triton.jit
def ids_of_row(table_ptr, indptr_ptr, row, stride_table):
    """Return where the page ids of a row begin: in a block table, or with `indptr_ptr` in the indices of a CSR table."""
    if indptr_ptr is None:
        row_ptr = table_ptr + row.to(tl.int64) * stride_table
    else:
        row_ptr = table_ptr + tl.load(indptr_ptr + row)
    return row_ptr


ALL_PAGES = tl.constexpr(2**31 - 1)
"""As the number of pages of a sequence that scratch memory holds at once: those of its whole table."""


@triton.jit
def first_slot(indptr_ptr, row, max_pages, ring):
    """Return the first slot of scratch memory of a row, for the page that is the first one of a launch (`first_page_of`).

    `ring` pages of each row are in it at once, or those of its table (`ALL_PAGES`).
    """
    if indptr_ptr is None:
        slot = row.to(tl.int64) * tl.minimum(max_pages, ring)
    else:
        slot = tl.where(ring == ALL_PAGES, tl.load(indptr_ptr + row).to(tl.int64), row.to(tl.int64) * ring)
    return slot


@triton.jit
def first_page_of(first_page, first_seen_page):
    """Return the first page of a row in scratch memory: that of the launch, or below 0 the first one that is seen."""
    return tl.where(first_page < 0, first_seen_page, first_page)


@triton.jit
def num_ids_of_row(indptr_ptr, row, mask, max_pages):
    """Return how many page ids a row has, or each of several rows."""
    if indptr_ptr is None:
        count = max_pages
    else:
        count = tl.load(indptr_ptr + row + 1, mask, other=0) - tl.load(indptr_ptr + row, mask, other=0)
    return count


@triton.jit
def sink_of(sink_len, row, mask):
    """Return the length of the sink of a row, or of several: `sink_len` is that of all, or a pointer to one for each."""
    if sink_len.dtype.is_ptr():
        length = tl.load(sink_len + row, mask, other=0)
    else:
        length = sink_len
    return length


class Seen(NamedTuple):
    """What queries see of the body of a sequence. Positions are those within the body; the sink has negative ones."""

    first_page: tl.tensor
    quantized: tl.tensor  # pages; raw ones follow
    num_valid: tl.tensor  # where the seen part of the cache ends
    oldest: tl.tensor  # position


@triton.jit
def seen_by(queries, row, seq_len, num_quantized_ptr, sink_len, window, PAGE_SIZE: tl.constexpr, APART: tl.constexpr):
    """Return what queries see of the cached body of a row: `queries` are (first, last) of its last tokens, and their number.

    A window (of `masking.Windows`, or None) is no larger than the sequence. APART: the keys of those tokens are not in the
    cache.
    """
    first_query, last_query, num_tokens = queries
    shift = seq_len - num_tokens - sink_len
    cached = tl.maximum(seq_len - num_tokens, 0) if APART else seq_len
    num_valid = tl.minimum(cached - sink_len, shift + last_query + 1)
    if window is None:
        oldest = -sink_len
    else:
        # Not the larger of a number and -sink_len: ptxas loses the sign where it takes the larger of three numbers at once.
        oldest = first_seen(seq_len - num_tokens + first_query + 1, window) - sink_len
    quantized = tl.cdiv(tl.maximum(num_valid, 0), PAGE_SIZE)
    if num_quantized_ptr is not None:
        quantized = tl.minimum(tl.maximum(tl.load(num_quantized_ptr + row), 0), quantized)
    return Seen(tl.maximum(oldest, 0) // PAGE_SIZE, quantized, num_valid, oldest)


@triton.jit
def load_page_id(table_ptr, column, last, PTX: tl.constexpr):
    """Load the page id of a column, or of the last column before `last`; 0 if there is none, and nothing is read.

    An id below 0 becomes 0: that of a page which exists.

    The loops over pages load an id one step before the copies that need it. Triton's pipeliner would make an asynchronous
    copy of a load of its own, and wait for each copy as soon as it is issued; it lets inline PTX alone, even where a loop has
    no step at all, hence the predicate.
    """
    id_ptr = table_ptr + tl.minimum(column, last - 1)
    if PTX:
        page = tl.inline_asm_elementwise(
            "{ .reg .pred some; setp.gt.s32 some, $2, 0; mov.b32 $0, 0; @some ld.global.b32 $0, [$1]; max.s32 $0, $0, 0; }",
            "=&r,l,r", [id_ptr.to(tl.int64), last], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        page = tl.maximum(tl.load(id_ptr, last > 0, other=0), 0)
    return page


@triton.jit
def prefetch(memory_ptr, BYTES: tl.constexpr, CACHE: tl.constexpr, PTX: tl.constexpr):
    """Start bringing some bytes into a cache, "L1" or "L2", so that they are near when they are needed."""
    if PTX:
        LINES: tl.constexpr = triton.cdiv(BYTES, 128)
        line = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
        address = memory_ptr.to(tl.int64) + line * 128
        tl.inline_asm_elementwise(
            "prefetch.global." + CACHE + " [$1]; mov.u32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
        )  # fmt: skip
