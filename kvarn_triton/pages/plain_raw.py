"""Raw tokens as plain ones: a launch before prefill attention undoes the rotation of sinks and tails that its queries see.

One program writes some tokens of one page, the keys or the values of one kv head. The sink pages of a sequence come first, then
its tail, whatever the order of the tail's ring. Pages of which nothing is seen are not read, and tokens before a window become
zeros. Grid: (program,), those of a page next to each other. Bytes moved: each token that is seen in and out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs
from ..cache import Cache
from ..launch import as_tokens, on
from ..masking import Windows, clamped, first_of_sink
from ..paging import seen_by, sink_of
from ..tile.arithmetic import hadamard, load_rows, store_rows


@triton.jit
def _copy_rotated(to_ptr, source_ptr, places, masks, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy rows of channels, rotated; those without the first of two masks are zeros."""
    rows = load_rows(source_ptr, places[0], masks[0], CHANNELS, CHANNELS).to(tl.float32)
    store_rows(to_ptr, places[1], hadamard(rows, BLOCK), masks[1], CHANNELS)


@triton.jit(
    do_not_specialize=["sink_len", "num_kv_heads", "num_columns", "num_tail_slots", "stride_raw_table"],
    do_not_specialize_on_alignment=["raw_table_ptr", "seq_lens_ptr", "cu_seqlens_ptr", "num_quantized_ptr"],
)
def _kvarn_plain_raw_kernel(
    plain,  # Tokens [batch * num_columns, 2, num_kv_heads, page_size, channels]
    raw,  # Tokens
    raw_table_ptr,  # int32 [batch, num_columns]
    seq_lens_ptr,  # int32 [batch]
    cu_seqlens_ptr,  # int32 [batch + 1]
    num_quantized_ptr,  # int32 [batch]
    windows,  # Windows
    sink_len,
    num_kv_heads,
    num_columns,
    num_tail_slots,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    APART: tl.constexpr,  # the keys of query tokens are not in the cache
    ROWS: tl.constexpr,  # tokens of a program
):
    G: tl.constexpr = LAYOUT.page_size
    PARTS: tl.constexpr = G // ROWS
    part = tl.program_id(0) % PARTS
    half = tl.program_id(0) // PARTS % 2
    head = tl.program_id(0) // (2 * PARTS) % num_kv_heads
    slot = tl.program_id(0) // (2 * PARTS) // num_kv_heads
    row, column = slot // num_columns, slot % num_columns
    num_tokens = tl.load(cu_seqlens_ptr + row + 1) - tl.load(cu_seqlens_ptr + row)
    sink = sink_of(sink_len, row, row >= 0)
    seq_len = tl.load(seq_lens_ptr + row)
    if windows.body is not None:
        window = clamped(windows.body, seq_len)
        windows = Windows(None if windows.sink is None else window, window)
    seen = seen_by((0, num_tokens - 1, num_tokens), row, seq_len, num_quantized_ptr, sink, windows.body, G, APART)
    sink_pages = tl.cdiv(sink, G)
    in_sink = column < sink_pages
    page = tl.where(in_sink, column, seen.quantized + column - sink_pages)
    source = tl.where(in_sink, column, sink_pages + page % num_tail_slots)
    first = tl.where(in_sink, first_of_sink(seen.oldest + sink, windows), seen.oldest) - page * G
    last = tl.where(in_sink, tl.minimum(seen.num_valid + sink, sink), seen.num_valid) - page * G
    there = (num_tokens > 0) & (first < tl.minimum(last, G)) & (part * ROWS < last)
    token = part * ROWS + tl.arange(0, ROWS)
    if there & (in_sink | (column - sink_pages < num_tail_slots)):
        masks = (token >= first) & (token < last), token < last
        raw_page = tl.maximum(tl.load(raw_table_ptr + row.to(tl.int64) * stride_raw_table + source), 0).to(tl.int64)
        source_ptr = raw.ptr + raw_page * raw.stride_page + half * raw.stride_half + head.to(tl.int64) * raw.stride_head
        to = slot.to(tl.int64) * plain.stride_page + half * plain.stride_half + head.to(tl.int64) * plain.stride_head
        to_ptr = plain.ptr + to
        places = token * raw.stride_token, token * plain.stride_token
        if half == 0:
            _copy_rotated(to_ptr, source_ptr, places, masks, LAYOUT.head_dim, LAYOUT.block_size)
        else:
            _copy_rotated(to_ptr, source_ptr, places, masks, LAYOUT.v_head_dim, LAYOUT.v_block_size)


def launch_plain_raw(cu_seqlens_q: torch.Tensor, cache: Cache, windows: Windows, apart: bool) -> torch.Tensor | None:
    """Return the raw pages with a token that some query sees, plain [batch * columns of the raw table, ...].

    None without raw pages. Nothing is checked. head_dims are powers of two.
    """
    raw, layout = cache.raw_pages, cache.layout
    if raw is None or cache.num_quantized is None:
        return None
    plain = torch.empty(cache.batch * cache.max_raw_pages, *raw.shape[1:], dtype=raw.dtype, device=raw.device)
    rows = min(configs.row_block(layout.raw_head_dim), layout.page_size)
    tables = cache.raw_tables() | {"num_quantized_ptr": cache.num_quantized, "seq_lens_ptr": cache.seq_lens}
    on(raw, _kvarn_plain_raw_kernel)[(len(plain) * cache.num_kv_heads * 2 * (layout.page_size // rows),)](
        as_tokens(plain),
        **tables,
        cu_seqlens_ptr=cu_seqlens_q,
        windows=windows,
        sink_len=cache.sinks,
        num_kv_heads=cache.num_kv_heads,
        num_columns=cache.max_raw_pages,
        LAYOUT=layout,
        APART=apart,
        ROWS=rows,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return plain
