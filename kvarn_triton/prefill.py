"""Attention of several query tokens per sequence: chunked prefill, verification of drafts, first chunks.

One program attends with a tile of rows, each a query head of a token, of one kv head to the pages that its last row sees;
each page is dequantized once for all of them. Where there are fewer tiles than the GPU holds programs, pages are split among
several programs and a second kernel merges their results. Grid: (tile, kv head, split).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, reference
from .attend_many import attend_pages
from .attend_tokens import attend_new, attend_raw_run
from .cache_checks import check_attention
from .checks import FLOATS, check_aligned, check_tensor, require
from .device import LOG2E, hadamard
from .layout import PageLayout, fields_per_byte
from .merge import LN2
from .query import rotate_rows

BLOCK_B = tl.constexpr(128)
"""Sequences whose lengths are looked at together."""

_NOT_SPECIALIZED = [
    "batch", "sink_len", "num_sink_pages", "num_tail_slots", "split_size", "window", "stride_table", "stride_raw_table",
    "total_tokens",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""


@triton.jit
def _find_tile(cu_seqlens_ptr, tile, batch, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the sequence that a tile belongs to, `batch` if there is no such tile, and the sequence's first tile."""
    row = 0
    row_start = 0
    before = 0
    for first in range(0, batch, BLOCK_B):
        rows = first + tl.arange(0, BLOCK_B)
        start = tl.load(cu_seqlens_ptr + rows, rows < batch, other=0)
        end = tl.load(cu_seqlens_ptr + rows + 1, rows < batch, other=0)
        tiles = tl.cdiv((end - start) * GROUP, BLOCK_M)
        ends = before + tl.cumsum(tiles, axis=0)
        passed = (ends <= tile) & (rows < batch)
        row += tl.sum(passed.to(tl.int32), axis=0)
        row_start = tl.maximum(row_start, tl.max(tl.where(passed, ends, 0), axis=0))
        before += tl.sum(tiles, axis=0)
    return row, row_start


@triton.jit
def _store_rows(out_ptr, place, values, mask, D: tl.constexpr):
    """Store rows [rows, channels] at places [rows]."""
    offs_d = tl.arange(0, values.shape[1])
    tl.store(
        out_ptr + place[:, None] + offs_d[None, :],
        values.to(out_ptr.dtype.element_ty),
        mask[:, None] & (offs_d < D)[None, :],
    )


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _kvarn_prefill_attention_kernel(
    out_ptr,  # [total_tokens, num_q_heads, head_dim]
    lse_ptr,  # float32 [total_tokens, num_q_heads], natural logarithm; unused if not RETURN_LSE
    partial_ptr,  # float32 [num_splits, total_tokens, num_q_heads, head_dim], rotated if not HAS_NEW
    partial_lse_ptr,  # float32 [num_splits, total_tokens, num_q_heads], base 2
    q_ptr,  # [total_tokens, num_q_heads, head_dim]
    k_ptr,  # [total_tokens, num_kv_heads, head_dim], the new keys if HAS_NEW
    v_ptr,
    cu_seqlens_ptr,  # int32 [batch + 1]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    table_ptr,  # int32 [batch, max_pages], or [ids] if CSR
    indptr_ptr,  # int32 [batch + 1] if CSR
    seq_lens_ptr,  # int32 [batch]
    raw_pages_ptr,  # [num_raw_pages, 2, num_kv_heads, page_size, head_dim]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    num_quantized_ptr,  # int32 [batch]
    sinks_ptr,  # float32 [num_q_heads]
    qk_scale,  # sm_scale * log2(e)
    soft_cap,  # soft_cap * log2(e)
    window,
    batch,
    total_tokens,
    sink_len,
    num_sink_pages,
    num_tail_slots,
    split_size,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_pages_page,
    stride_pages_head,
    stride_table,
    stride_raw_page,
    stride_raw_half,
    stride_raw_head,
    stride_raw_token,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    BLOCK_M: tl.constexpr,  # rows of a tile
    CHANNELS: tl.constexpr,  # channels of a value, padded to a power of two
    BLOCK_T: tl.constexpr,  # quantized tokens of one product with keys
    BLOCK_R: tl.constexpr,  # raw or new tokens of one step
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    QUERY_OPERAND: tl.constexpr,
    RAW_OPERAND: tl.constexpr,
    HAS_RAW: tl.constexpr,
    HAS_NEW: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CSR: tl.constexpr,
    SINGLE: tl.constexpr,  # one split: the result itself is written
    RETURN_LSE: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.head_dim
    tile, head, split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_q_heads = tl.num_programs(1) * GROUP
    row, row_start = _find_tile(cu_seqlens_ptr, tile, batch, GROUP, BLOCK_M)
    if row < batch:
        first_token = tl.load(cu_seqlens_ptr + row)
        num_tokens = tl.load(cu_seqlens_ptr + row + 1) - first_token
        seq_len = tl.load(seq_lens_ptr + row)
        first_row = (tile - row_start) * BLOCK_M
        num_rows = tl.minimum(num_tokens * GROUP - first_row, BLOCK_M)
        first_query = first_row // GROUP
        last_query = (first_row + num_rows - 1) // GROUP

        # Positions within the body; the sink has negative ones.
        offs_m = tl.arange(0, BLOCK_M)
        query = (first_row + offs_m) // GROUP
        shift = seq_len - num_tokens - sink_len
        cached = tl.maximum(seq_len - num_tokens, 0) if HAS_NEW else seq_len
        num_valid = tl.minimum(cached - sink_len, shift + last_query + 1)
        oldest = tl.maximum(shift + first_query - window + 1, -sink_len) if HAS_WINDOW else -sink_len
        num_pages = tl.cdiv(tl.maximum(num_valid, 0), G)
        quantized = num_pages
        if HAS_RAW:
            quantized = tl.minimum(tl.load(num_quantized_ptr + row), num_pages)
        first_page = tl.maximum(oldest, 0) // G
        size = tl.maximum(tl.cdiv(tl.maximum(quantized - first_page, 0), tl.num_programs(2)), 1)
        if split_size > 0:
            size = split_size
        first_page += split * size
        last_page = tl.minimum(first_page + size, quantized)

        mask_m = offs_m < num_rows
        q_head = head * GROUP + (first_row + offs_m) % GROUP
        token = (first_token + query).to(tl.int64)
        offs_d = tl.arange(0, CHANNELS)
        place = token * stride_q_token + q_head * stride_q_head
        q = tl.load(q_ptr + place[:, None] + offs_d[None, :], mask_m[:, None] & (offs_d < D)[None, :], other=0.0)
        rotated, q_factor = rotate_rows(q, LAYOUT, K_FIELDS, OPERAND)
        q_factor = q_factor * qk_scale
        m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, CHANNELS), tl.float32)
        table_row_ptr = table_ptr
        if CSR:
            table_row_ptr += tl.load(indptr_ptr + row)
        else:
            table_row_ptr += row.to(tl.int64) * stride_table
        acc, m_i, l_i = attend_pages(
            acc, m_i, l_i, rotated, q_factor, soft_cap,
            pages_ptr + head.to(tl.int64) * stride_pages_head, table_row_ptr, stride_pages_page,
            first_page, last_page, num_valid, shift + query, shift + first_query, shift + last_query, window,
            LAYOUT, BLOCK_T, K_FIELDS, V_FIELDS, OPERAND, HAS_WINDOW, HAS_CAP, PTX, NUM_STAGES,
        )  # fmt: skip
        if HAS_RAW:
            if split == 0:
                raw_row_ptr = raw_table_ptr + row.to(tl.int64) * stride_raw_table
                raw_head_ptr = raw_pages_ptr + head.to(tl.int64) * stride_raw_head
                for part in tl.static_range(2):
                    # The sink, whose tokens count from 0 on, then the tail.
                    base = sink_len * (1 - part)
                    acc, m_i, l_i = attend_raw_run(
                        acc, m_i, l_i, rotated, q_factor, soft_cap, raw_head_ptr, raw_row_ptr,
                        stride_raw_page, stride_raw_half, stride_raw_token,
                        tl.maximum(oldest, quantized * G) if part else oldest + sink_len,
                        num_valid if part else tl.minimum(num_valid + sink_len, sink_len),
                        num_sink_pages * part, tl.maximum(num_tail_slots if part else num_sink_pages, 1),
                        shift + query + base, window,
                        LAYOUT, BLOCK_R, K_FIELDS, RAW_OPERAND, HAS_WINDOW, HAS_CAP, PTX, NUM_STAGES,
                    )  # fmt: skip
        if SINGLE or HAS_NEW:
            acc = hadamard(acc, LAYOUT.block_size)
        if HAS_NEW:
            if split == 0:
                acc, m_i, l_i = attend_new(
                    acc, m_i, l_i, q.to(QUERY_OPERAND), qk_scale, soft_cap,
                    k_ptr + first_token.to(tl.int64) * stride_k_token + head * stride_k_head,
                    v_ptr + first_token.to(tl.int64) * stride_v_token + head * stride_v_head,
                    stride_k_token, stride_v_token,
                    tl.maximum(first_query - window + 1, 0) // BLOCK_R * BLOCK_R if HAS_WINDOW else 0,
                    last_query + 1, query, first_query, last_query, window,
                    D, BLOCK_R, HAS_WINDOW, HAS_CAP, NUM_STAGES,
                )  # fmt: skip

        if SINGLE:
            if HAS_SINKS:
                logit = tl.load(sinks_ptr + q_head) * LOG2E
                m_new = tl.maximum(m_i, logit)
                origin = tl.where(m_new == float("-inf"), 0.0, m_new)
                alpha = tl.exp2(m_i - origin)
                acc = acc * alpha[:, None]
                l_i = l_i * alpha + tl.exp2(logit - origin)
                m_i = m_new
            acc = acc * (1.0 / tl.where(l_i > 0, l_i, 1.0))[:, None]
            _store_rows(out_ptr, token * stride_out_token + q_head * stride_out_head, acc, mask_m, D)
            if RETURN_LSE:
                tl.store(lse_ptr + token * num_q_heads + q_head, (m_i + tl.log2(l_i)) * LN2, mask_m)
        else:
            acc = acc * (1.0 / tl.where(l_i > 0, l_i, 1.0))[:, None]
            place = (split * total_tokens.to(tl.int64) + token) * num_q_heads + q_head
            _store_rows(partial_ptr, place * D, acc, mask_m, D)
            tl.store(partial_lse_ptr + place, m_i + tl.log2(l_i), mask_m)


@triton.jit(do_not_specialize=["num_splits", "total_rows"])
def _kvarn_merge_queries_kernel(
    out_ptr,  # [total_tokens, num_q_heads, head_dim]
    lse_ptr,  # float32 [total_tokens, num_q_heads], natural logarithm; unused if not RETURN_LSE
    partial_ptr,  # float32 [num_splits, total_tokens, num_q_heads, head_dim]
    partial_lse_ptr,  # float32 [num_splits, total_tokens, num_q_heads], base 2
    cu_seqlens_ptr,  # int32 [batch + 1]
    sinks_ptr,  # float32 [num_q_heads]
    batch,
    num_splits,
    total_rows,
    stride_out_token,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    ROTATION: tl.constexpr,  # 1 if the partial results are not rotated
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
):
    q_head, token = tl.program_id(0), tl.program_id(1)
    row = token.to(tl.int64) * tl.num_programs(0) + q_head
    if token < tl.load(cu_seqlens_ptr + batch):
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM
        m_i = tl.full((1,), float("-inf"), tl.float32)
        l_i = tl.zeros((1,), tl.float32)
        acc = tl.zeros((1, BLOCK_D), tl.float32)
        if HAS_SINKS:
            m_i = tl.load(sinks_ptr + q_head + tl.arange(0, 1)) * LOG2E
            l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
        for start in range(0, num_splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            mask = split < num_splits
            place = split.to(tl.int64) * total_rows + row
            lse = tl.load(partial_lse_ptr + place, mask, other=float("-inf"))
            partial = tl.load(
                partial_ptr + place[:, None] * HEAD_DIM + offs_d, (lse > float("-inf"))[:, None] & mask_d, other=0.0
            )
            m_new = tl.maximum(m_i, tl.max(lse, axis=0))
            origin = tl.where(m_new == float("-inf"), 0.0, m_new)
            weights = tl.exp2(lse - origin)
            alpha = tl.exp2(m_i - origin)
            l_i = l_i * alpha + tl.sum(weights, axis=0)
            acc = acc * alpha[:, None] + tl.sum(partial * weights[:, None], axis=0)[None, :]
            m_i = m_new
        out = hadamard(acc / tl.where(l_i > 0, l_i, 1.0)[:, None], ROTATION)
        place = token.to(tl.int64) * stride_out_token + q_head * stride_out_head
        tl.store(out_ptr + place + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask_d[None, :])
        if RETURN_LSE:
            tl.store(lse_ptr + row + tl.arange(0, 1), (m_i + tl.log2(l_i)) * LN2)


def prefill_workspace_size(
    total_tokens: int, batch: int, num_q_heads: int, num_kv_heads: int, layout: PageLayout, max_pages: int, device: torch.device,
    *, dtype: torch.dtype = torch.float16, split_size: int | None = None,
) -> int:  # fmt: skip
    """Return how many bytes of workspace `prefill_attention` needs; 0 where pages are not split.

    Args:
        total_tokens: query tokens of all sequences.
        batch: sequences.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        layout: the page format.
        max_pages: columns of `block_table`; with `kv_indices`, its length.
        device: where the call will run; the number of programs depends on it.
        dtype: dtype of the queries.
        split_size: as given to `prefill_attention`.
    """
    config = configs.prefill_config(layout, dtype, total_tokens, batch, num_q_heads // max(num_kv_heads, 1), split_size)
    splits = _num_splits(total_tokens, batch, num_q_heads, num_kv_heads, max_pages, device, config, split_size)
    return 0 if splits == 1 else 4 * splits * total_tokens * num_q_heads * (layout.head_dim + 1)


def _num_splits(
    total_tokens: int, batch: int, num_q_heads: int, num_kv_heads: int, max_pages: int, device: torch.device,
    config: configs.PrefillConfig, split_size: int | None,
) -> int:  # fmt: skip
    """Return among how many programs the pages of a tile are split."""
    if split_size is not None:
        return max(-(-max_pages // split_size), 1)
    rows = -(-total_tokens // max(batch, 1)) * (num_q_heads // max(num_kv_heads, 1))
    tiles = batch * -(-rows // config.block_m) * num_kv_heads
    programs = configs.num_programs(device, config.programs_per_sm)
    return max(min(programs // max(tiles, 1), max_pages), 1)


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    layout: PageLayout,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with several query tokens per sequence, causally: chunked prefill, verification of drafts, first chunks.

    The query tokens of a sequence are its last ones: token i of n is at position `seq_lens[b] - n + i` and sees all
    positions up to its own. The keys and values of these n tokens are `k` and `v` if given, exact and not in the cache
    yet; otherwise they are in the cache like all others (`append_tokens`).

    Args:
        q: float16, bfloat16 or float32 [total_tokens, num_q_heads, head_dim], the query tokens of all sequences one after the
            other, after the position encoding, not rotated.
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        block_table: int32 [batch, max_pages]; column j is the page id of body page j. None with `kv_indptr`.
        seq_lens: int32 [batch], tokens of each sequence, its query tokens included.
        cu_seqlens_q: int32 [batch + 1]; the query tokens of sequence b are those from cu_seqlens_q[b] to cu_seqlens_q[b + 1] of
            `q`. What follows after cu_seqlens_q[batch] is padding: its output is not written.
        layout: the page format.
        k: new keys like q, [total_tokens, num_kv_heads, head_dim], not rotated. None if they are in the cache.
        v: new values, like `k`.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, head_dim], rotated keys and values
            of sinks and tails (`append_tokens`). None if everything is quantized.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]. Needed with `raw_pages`.
        num_quantized: int32 [batch], how many body pages are read from `pages`. Needed with `raw_pages`.
        sink_len: tokens at the start of every sequence that stay raw.
        kv_indptr: int32 [batch + 1], with `kv_indices` instead of `block_table`: body page j of sequence b is
            kv_indices[kv_indptr[b] + j].
        kv_indices: int32 [n], page ids.
        sm_scale: factor of the scores; by default head_dim ** -0.5.
        window: how many positions a query sees, its own included. Pages that no query of a sequence sees are not read.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: float32 [num_q_heads], a logit per query head that takes weight and has no value.
        out: where to write; like `q`, any strides whose innermost is 1.
        return_lse: whether to return the log-sum-exp too.
        split_size: batch-invariant mode: pages of one run into which each sequence is cut, so that the bits of a row depend
            on its sequence alone. By default as many runs as it takes to give every multiprocessor work.
        workspace: uint8 [at least prefill_workspace_size(...)], contiguous; allocated if not given.

    Returns:
        `out`, or `out` and `lse` float32 [total_tokens, num_q_heads] (natural logarithm, sinks included). A query that sees
        nothing gives zeros and lse = -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids and lengths are not read to be checked.
    """
    num_kv_heads = check_attention(
        q, None, pages, block_table, seq_lens, layout,
        raw_pages=raw_pages, raw_table=raw_table, num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr,
        kv_indices=kv_indices, window=window, soft_cap=soft_cap, sinks=sinks, out=out,
    )  # fmt: skip
    total_tokens, num_q_heads, head_dim = q.shape
    batch = seq_lens.shape[0]
    check_tensor("cu_seqlens_q", cu_seqlens_q, [batch + 1], torch.int32, device=q.device)
    require((k is None) == (v is None), "v", "a tensor beside k, and None without it", None if v is None else "a tensor")
    if k is not None and v is not None:
        check_tensor("k", k, [total_tokens, num_kv_heads, head_dim], FLOATS, device=q.device)
        check_tensor("v", v, k.shape, k.dtype, device=q.device)
    if split_size is not None:
        require(isinstance(split_size, int) and split_size >= 1, "split_size", "an integer of at least 1", split_size)
    config = configs.prefill_config(layout, q.dtype, total_tokens, batch, num_q_heads // max(num_kv_heads, 1), split_size)
    table = block_table if block_table is not None else kv_indices
    assert table is not None
    splits = _num_splits(total_tokens, batch, num_q_heads, num_kv_heads, table.shape[-1], q.device, config, split_size)
    num_bytes = 0 if splits == 1 else 4 * splits * total_tokens * num_q_heads * (head_dim + 1)
    if workspace is not None:
        check_tensor("workspace", workspace, [None], torch.uint8, device=q.device)
        check_aligned("workspace", workspace, 16)
        require(workspace.numel() >= num_bytes, "workspace", f"at least {num_bytes} bytes", workspace.numel())
    if not configs.on_device(q):
        return reference.prefill_attention(
            q, pages, block_table, seq_lens, cu_seqlens_q, layout, k=k, v=v, raw_pages=raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices, sm_scale=sm_scale,
            window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
        )  # fmt: skip
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(total_tokens, num_q_heads, dtype=torch.float32, device=q.device) if return_lse else None
    if workspace is None:
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    if total_tokens and num_q_heads and batch:
        _launch_prefill(
            out, lse, workspace, q, k, v, cu_seqlens_q, pages, block_table, kv_indptr, kv_indices, seq_lens, layout, raw_pages,
            raw_table, num_quantized, sink_len, sm_scale, window, soft_cap, sinks, splits, split_size or 0, config,
        )  # fmt: skip
    return out if lse is None else (out, lse)


def _launch_prefill(
    out, lse, workspace, q, k, v, cu_seqlens_q, pages, block_table, kv_indptr, kv_indices, seq_lens, layout, raw_pages, raw_table,
    num_quantized, sink_len, sm_scale, window, soft_cap, sinks, splits, split_size, config,
) -> None:  # fmt: skip
    """Attend, and merge if there are several splits; the arguments are not checked."""
    total_tokens, num_q_heads, head_dim = q.shape
    batch, num_kv_heads = seq_lens.shape[0], pages.shape[1]
    group = num_q_heads // num_kv_heads
    k_fields, v_fields = fields_per_byte(layout.k_bits), fields_per_byte(layout.v_bits)
    channels = triton.next_power_of_2(head_dim)
    has_raw, has_new, csr = raw_pages is not None, k is not None, block_table is None
    raw, new_k, new_v = raw_pages if has_raw else q, k if has_new else q, v if has_new else q
    table = kv_indices if csr else block_table
    num_sink_pages = -(-sink_len // layout.page_size)
    partial, partial_lse = out, seq_lens
    if splits > 1:
        count = splits * total_tokens * num_q_heads
        floats = workspace[: 4 * count * (head_dim + 1)].view(torch.float32)
        partial, partial_lse = floats[: count * head_dim], floats[count * head_dim :]
    operand = configs.operand(q.dtype, torch.float16)
    _kvarn_prefill_attention_kernel[(triton.cdiv(total_tokens * group, config.block_m) + batch, num_kv_heads, splits)](
        out,
        partial_lse if lse is None else lse,
        partial,
        partial_lse,
        q,
        new_k,
        new_v,
        cu_seqlens_q,
        pages,
        table,
        kv_indptr if csr else seq_lens,
        seq_lens,
        raw,
        table if raw_table is None else raw_table,
        seq_lens if num_quantized is None else num_quantized,
        seq_lens if sinks is None else sinks,
        (head_dim**-0.5 if sm_scale is None else sm_scale) * math.log2(math.e),
        (soft_cap or 0.0) * math.log2(math.e),
        window or 0,
        batch,
        total_tokens,
        sink_len,
        num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - num_sink_pages,
        split_size,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        new_k.stride(0),
        new_k.stride(1),
        new_v.stride(0),
        new_v.stride(1),
        pages.stride(0),
        pages.stride(1),
        0 if csr else block_table.stride(0),
        *(raw.stride()[:4] if has_raw else (0, 0, 0, 0)),
        0 if raw_table is None else raw_table.stride(0),
        LAYOUT=layout,
        GROUP=group,
        BLOCK_M=config.block_m,
        CHANNELS=channels,
        BLOCK_T=config.block_t,
        BLOCK_R=config.block_r,
        K_FIELDS=k_fields,
        V_FIELDS=v_fields,
        OPERAND=operand,
        QUERY_OPERAND=configs.operand(q.dtype, q.dtype),
        RAW_OPERAND=configs.operand(q.dtype, raw.dtype),
        HAS_RAW=has_raw,
        HAS_NEW=has_new,
        HAS_WINDOW=window is not None,
        HAS_CAP=soft_cap is not None,
        HAS_SINKS=sinks is not None,
        CSR=csr,
        SINGLE=splits == 1,
        RETURN_LSE=lse is not None,
        PTX=configs.uses_ptx(),
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
    )
    if splits > 1:
        block_d = triton.next_power_of_2(head_dim)
        block_s = min(triton.next_power_of_2(splits), 32)
        _kvarn_merge_queries_kernel[(num_q_heads, total_tokens)](
            out,
            partial_lse if lse is None else lse,
            partial,
            partial_lse,
            cu_seqlens_q,
            seq_lens if sinks is None else sinks,
            batch,
            splits,
            total_tokens * num_q_heads,
            out.stride(0),
            out.stride(1),
            HEAD_DIM=head_dim,
            ROTATION=1 if has_new else layout.block_size,
            BLOCK_D=block_d,
            BLOCK_S=block_s,
            HAS_SINKS=sinks is not None,
            RETURN_LSE=lse is not None,
            num_warps=configs.merge_warps(block_s, block_d),
            enable_fp_fusion=True,
        )
