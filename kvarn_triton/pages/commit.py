"""Page completion: quantize the pages of the tail whose tokens are all committed. The device decides which those are.

One program of the first kernel encodes one tile of (sequence, new page, kv head, keys or values) if that is due, and returns
at once otherwise. The second kernel advances the counts of quantized pages. Grids follow from shapes alone, so that both replay
from a captured graph. Bytes moved per page that completes: its raw tile and its record.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..cache import Cache, checked_for_completion
from ..checks import require
from ..encoder import DEFAULT, Encoder
from ..launch import on
from ..layout import PageLayout, fields_per_byte
from ..paging import ids_of_row, num_ids_of_row
from ..tile.blocks import load_blocks
from .store import store_tile


@triton.jit
def _last_due(committed_len, num_quantized, sink_len, keep_pages, max_new_pages, max_pages, G: tl.constexpr):
    """Return the number of quantized pages that a row has after this call, if any are added."""
    finished = tl.maximum(committed_len - sink_len, 0) // G - keep_pages
    return tl.minimum(tl.minimum(finished, num_quantized + max_new_pages), max_pages)


_NOT_SPECIALIZED = [
    "num_kv_heads", "max_new_pages", "max_pages", "sink_len", "num_tail_slots", "keep_pages", "stride_raw_table",
    "stride_table",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
_ANY_ADDRESS = ["raw_table_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "num_quantized_ptr"]


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_commit_pages_kernel(
    pages,  # Pages
    raw,  # Tokens
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch], the committed lengths
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    num_quantized_ptr,  # int32 [batch]
    num_kv_heads,
    max_new_pages,
    max_pages,
    sink_len,
    num_tail_slots,
    keep_pages,
    stride_table,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    ENCODER: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.head_dim
    D_V: tl.constexpr = LAYOUT.v_head_dim
    tile = tl.program_id(0)
    head = (tile // 2 % num_kv_heads).to(tl.int64)
    row = tile // (2 * num_kv_heads * max_new_pages)
    first = tl.load(num_quantized_ptr + row)
    body = first + tile // (2 * num_kv_heads) % max_new_pages
    committed_len = tl.load(seq_lens_ptr + row)
    max_pages = num_ids_of_row(indptr_ptr, row, row >= 0, max_pages)
    last = _last_due(committed_len, first, sink_len, keep_pages, max_new_pages, max_pages, G)
    page = tl.full((), -1, tl.int64)
    if (body < last) & (first >= 0):
        page = tl.load(ids_of_row(table_ptr, indptr_ptr, row, stride_table) + body).to(tl.int64)
    if page >= 0:
        column = tl.cdiv(sink_len, G) + body % num_tail_slots
        raw_page = tl.load(raw_table_ptr + row.to(tl.int64) * stride_raw_table + column)
        tile_ptr = raw.ptr + tl.maximum(raw_page, 0).to(tl.int64) * raw.stride_page + head * raw.stride_head
        record_ptr = pages.ptr + page * pages.stride_page + head * pages.stride_head
        stride_token = raw.stride_token.to(tl.int64)
        if D == D_V:
            # Tiles of one size are loaded by the same code.
            blocks = load_blocks(tile_ptr + tile % 2 * raw.stride_half, stride_token, G, D)
            if tile % 2 == 0:
                store_tile(blocks, record_ptr, False, LAYOUT, K_FIELDS, ENCODER)
            else:
                store_tile(blocks, record_ptr, True, LAYOUT, V_FIELDS, ENCODER)
        elif tile % 2 == 0:
            k_blocks = load_blocks(tile_ptr, stride_token, G, D)
            store_tile(k_blocks, record_ptr, False, LAYOUT, K_FIELDS, ENCODER)
        else:
            v_blocks = load_blocks(tile_ptr + raw.stride_half, stride_token, G, D_V)
            store_tile(v_blocks, record_ptr, True, LAYOUT, V_FIELDS, ENCODER)


@triton.jit(
    do_not_specialize=["batch", "max_new_pages", "max_pages", "sink_len", "keep_pages", "stride_table"],
    do_not_specialize_on_alignment=["num_quantized_ptr", "seq_lens_ptr", "table_ptr", "indptr_ptr"],
)
def _kvarn_advance_quantized_kernel(
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch], the committed lengths
    num_quantized_ptr,  # int32 [batch], updated in place
    batch,
    max_new_pages,
    max_pages,
    sink_len,
    keep_pages,
    stride_table,
    G: tl.constexpr,
    ROWS_AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    mask = row < batch
    first = tl.load(num_quantized_ptr + row, mask, other=0)
    committed_len = tl.load(seq_lens_ptr + row, mask, other=0)
    max_pages = num_ids_of_row(indptr_ptr, row, mask, max_pages)
    last = tl.where(first < 0, first, _last_due(committed_len, first, sink_len, keep_pages, max_new_pages, max_pages, G))
    if indptr_ptr is None:
        place = row.to(tl.int64) * stride_table
    else:
        place = tl.load(indptr_ptr + row, mask, other=0).to(tl.int64)
    count = first
    for i in range(max_new_pages):  # the page after the last one that has been written
        due = mask & (count == first + i) & (count < last)
        page = tl.load(table_ptr + place + count, due, other=-1)
        count += (page >= 0).to(tl.int32)
    tl.store(num_quantized_ptr + row, count, mask)


def commit_pages(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor | None,
    committed_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: PageLayout,
    *,
    sink_len: int = 0,
    keep_pages: int = 0,
    max_new_pages: int = 1,
    advance: bool = True,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize the pages of the tail whose tokens are all committed, and advance `num_quantized`.

    Body page j of a sequence is due if `sink_len + (j + 1 + keep_pages) * page_size <= committed_lens`. It is read from its
    slot of the tail ring and written to `pages[block_table[row, j]]`, or to the page whose id `kv_indices` holds. Nothing is
    read back to the host: the launch is the same whether pages complete or not, and a page is quantized once, because
    `num_quantized` says which have been.

    Args:
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim], rotated.
        pages: uint8 [num_pages, num_kv_heads, page_bytes], written in place.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]. A step of n tokens needs keep_pages + 1 +
            ceil((n - 1) / page_size) slots.
        block_table: int32 [batch, max_pages]; ids of pages that the sequence will need, set before they complete. A page with
            an id below 0 is neither written nor counted, and no page after it is counted: it is due until it has an id, for as
            long as the ring keeps its tokens. None with `kv_indptr` and `kv_indices`.
        committed_lens: int32 [batch], tokens that will not be rolled back; drafts don't count.
        num_quantized: int32 [batch], body pages in quantized form; updated in place.
        layout: the page format.
        sink_len: tokens at the start of every sequence that stay raw.
        keep_pages: finished pages at the end of a sequence that stay raw; the ring needs a slot for each.
        max_new_pages: most pages of one sequence that one call quantizes: the tokens of a step over page_size, rounded up.
        advance: whether to count the pages in `num_quantized`. Layers that share their tables share it too: pass False for all
            layers of a step but the last.
        kv_indptr: int32 [batch + 1], rising; where the page ids of each sequence begin in `kv_indices`, and the last one's end.
        kv_indices: int32 [n]; `kv_indices[kv_indptr[b] + j]` is the page id of body page j of sequence b. A sequence gets no
            more pages than it has ids, however many tokens are committed.
        encoder: options of the encoder.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option, and for two forms of page ids, or none; nothing is
            written. Ids and lengths are not read to be checked.
    """
    cache = Cache(
        layout, pages, committed_lens, block_table, kv_indptr, kv_indices, raw_pages, raw_table, num_quantized, sink_len
    )  # fmt: skip
    cache = checked_for_completion(cache, "committed_lens")
    require(isinstance(keep_pages, int) and keep_pages >= 0, "keep_pages", "an integer of at least 0", keep_pages)
    require(isinstance(max_new_pages, int) and max_new_pages >= 1, "max_new_pages", "an integer of at least 1", max_new_pages)
    if not gpu.on_device(pages):
        reference.commit_pages(
            raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, layout,
            sink_len=sink_len, keep_pages=keep_pages, max_new_pages=max_new_pages, advance=advance, kv_indptr=kv_indptr,
            kv_indices=kv_indices, encoder=encoder, arithmetic=reference.ANY_ORDER,
        )  # fmt: skip
        return
    batch, num_kv_heads = cache.batch, cache.num_kv_heads
    if batch == 0:
        return
    due = {
        "max_new_pages": min(max_new_pages, max(cache.max_pages, 1)),  # a larger grid would find nothing more to do
        "max_pages": 0 if cache.csr else cache.max_pages,
        "keep_pages": keep_pages,
    }
    on(pages, _kvarn_commit_pages_kernel)[(batch * due["max_new_pages"] * num_kv_heads * 2,)](
        cache.quantized,
        **cache.tables(),
        **cache.raw_tables(),
        **due,
        num_kv_heads=num_kv_heads,
        LAYOUT=layout,
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        ENCODER=encoder,
        **configs.encode_options(layout, pages.device),
        enable_fp_fusion=False,
    )
    if advance:
        on(pages, _kvarn_advance_quantized_kernel)[(-(-batch // 256),)](
            **cache.tables(), **due, batch=batch, G=layout.page_size, ROWS_AT_ONCE=256, num_warps=1, enable_fp_fusion=True
        )
