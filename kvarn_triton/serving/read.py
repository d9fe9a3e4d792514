"""Reading a cache back: the tokens of sequences, in order and not rotated, from the sink, from pages and from the tail.

One program has the keys or the values of one page of one sequence and kv head, in one block of the rotation; it dequantizes
them, or rotates raw tokens back. Grid: (program,), for as many pages of each sequence as the result has room for. Bytes moved:
each byte of a record or raw token in, each element out, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..cache import cache_of, checked_for_attention
from ..checks import FLOATS, check_tensor
from ..launch import aligned, copy_back, on
from ..pages.dequantize import chunk_of_program, read_plan
from ..paging import ids_of_row, sink_of
from ..step import Step
from ..tile.arithmetic import hadamard
from ..tile.dequantize import ELEMENTS, Target, dequantize_chunk, store_tokens
from .write import as_batch


@triton.jit
def _read_raw(
    out, tile_ptr, stride_token, chunk, G: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PLAN: tl.constexpr
):
    """Rotate a chunk of a raw page back, and write it."""
    ROWS: tl.constexpr = min(ELEMENTS * PLAN.threads // BLOCK, G)
    if (PLAN.blocks == BLOCKS) or (chunk.block < BLOCKS):
        out = Target(out.ptr + chunk.block * BLOCK, out.stride_token, out.num_tokens)
        tile_ptr += chunk.block * BLOCK
        for first in range(chunk.part * ROWS, G, chunk.parts * ROWS):
            token = first + tl.arange(0, ROWS)
            place = token.to(tl.int64)[:, None] * stride_token + tl.arange(0, BLOCK)[None, :]
            x = tl.load(tile_ptr + place, (token < out.num_tokens)[:, None], other=0).to(tl.float32)
            store_tokens(out, hadamard(x, BLOCK), token)


@triton.jit
def _target(x, row, head, start, num_tokens):
    """Return the place of the tokens from `start` on of a row."""
    place = row.to(tl.int64) * x.stride_sequence + head * x.stride_head + start.to(tl.int64) * x.stride_token
    return Target(x.ptr + place, x.stride_token, num_tokens)


@triton.jit(
    do_not_specialize=[
        "num_kv_heads", "parts", "columns", "limit", "sink_len", "num_tail_slots", "stride_table", "stride_raw_table",
    ],
    do_not_specialize_on_alignment=[
        "table_ptr", "indptr_ptr", "seq_lens_ptr", "num_quantized_ptr", "raw_table_ptr", "starts_ptr",
    ],
)  # fmt: skip
def _kvarn_read_tokens_kernel(
    k,  # Batch [batch, num_kv_heads, limit, head_dim]
    v,  # Batch [batch, num_kv_heads, limit, v_head_dim]
    pages,  # Pages
    raw,  # Tokens
    table_ptr,  # int32 [batch, max_pages], or with CSR [n]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    starts_ptr,  # int32 [batch], or None
    num_kv_heads,
    parts,
    columns,  # pages of a sequence
    limit,
    sink_len,
    num_tail_slots,
    stride_table,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    chunk = chunk_of_program(num_kv_heads, parts, PLAN)
    row = chunk.entry // columns
    column = chunk.entry % columns
    length = tl.load(seq_lens_ptr + row)
    start = 0
    if starts_ptr is not None:
        start = tl.maximum(tl.load(starts_ptr + row), 0)
    sink = sink_of(sink_len, row, row >= 0)
    num_sink_pages = tl.cdiv(sink, G)
    body = column - num_sink_pages
    first = tl.where(body < 0, column * G, sink + body * G)
    num_tokens = tl.minimum(tl.where(body < 0, tl.minimum(sink, length), length) - first, limit - start - first)
    if num_tokens > 0:
        k_out = _target(k, row, chunk.head, start + first, num_tokens)
        v_out = _target(v, row, chunk.head, start + first, num_tokens)
        if (body >= 0) & (body < tl.load(num_quantized_ptr + row)):
            page = tl.maximum(tl.load(ids_of_row(table_ptr, indptr_ptr, row, stride_table) + body), 0).to(tl.int64)
            record_ptr = pages.ptr + page * pages.stride_page + chunk.head * pages.stride_head
            dequantize_chunk((k_out, v_out), record_ptr, chunk, LAYOUT, PLAN)
        else:
            raw_column = tl.where(body < 0, column, num_sink_pages + tl.maximum(body, 0) % num_tail_slots)
            page = tl.maximum(tl.load(raw_table_ptr + row.to(tl.int64) * stride_raw_table + raw_column), 0).to(tl.int64)
            tile_ptr = raw.ptr + page * raw.stride_page + chunk.head * raw.stride_head
            if chunk.half == 0:
                K_BLOCKS: tl.constexpr = LAYOUT.head_dim // LAYOUT.block_size
                _read_raw(k_out, tile_ptr, raw.stride_token, chunk, G, LAYOUT.block_size, K_BLOCKS, PLAN)
            else:
                V_BLOCKS: tl.constexpr = LAYOUT.v_head_dim // LAYOUT.v_block_size
                tile_ptr += raw.stride_half
                _read_raw(v_out, tile_ptr, raw.stride_token, chunk, G, LAYOUT.v_block_size, V_BLOCKS, PLAN)


def read_tokens(
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
) -> None:
    """Write all keys and values of the sequences of a step to memory, in order and not rotated, in one launch.

    Args:
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim].
        step: `plan_step`; its tokens are read too, so that they must have been written. A step of no tokens will do.
        k: float16, bfloat16 or float32 [batch, num_kv_heads, n, head_dim], any strides whose innermost is 1; the token at
            position p of sequence b goes to k[b, :, starts[b] + p], if there is such a place. Other places keep what they have.
        v: like `k`, with v_head_dim.
        starts: int32 [batch], where sequences begin; 0 by default, and where it is below 0.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written.
    """
    cache = checked_for_attention(cache_of(pages, raw_pages, step), step.batch)
    num_kv_heads, layout, device = cache.num_kv_heads, step.layout, step.seq_lens.device
    check_tensor("k", k, [step.batch, num_kv_heads, None, layout.head_dim], FLOATS, device=device)
    limit = k.shape[2]
    check_tensor("v", v, [step.batch, num_kv_heads, limit, layout.v_head_dim], k.dtype, device=device)
    if starts is not None:
        check_tensor("starts", starts, [step.batch], torch.int32, device=device)
    if not gpu.on_device(pages):
        reference.read_tokens(pages, raw_pages, step, k, v, starts=starts)
        return
    columns = -(-limit // layout.page_size) + 1  # the last page of a sink may be shorter
    plan = read_plan(layout, device, rotated=False)
    programs = plan.blocks * 2 * num_kv_heads * step.batch * columns
    if programs == 0 or limit == 0:
        return
    k_memory, v_memory = aligned(k), aligned(v)
    parts = configs.gather_parts(programs, device)
    on(pages, _kvarn_read_tokens_kernel)[(programs * parts,)](
        as_batch(k_memory),
        as_batch(v_memory),
        cache.quantized,
        **cache.tables(),
        **cache.raw_tables(),
        starts_ptr=starts,
        num_kv_heads=num_kv_heads,
        parts=parts,
        columns=columns,
        limit=limit,
        LAYOUT=layout,
        PLAN=plan,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
    copy_back(k_memory, k)
    copy_back(v_memory, v)
