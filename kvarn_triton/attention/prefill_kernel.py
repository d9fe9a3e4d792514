"""The first kernel of prefill attention: it attends with tiles of query rows to pages, raw tokens and new tokens.

A row is a query head of a token; a tile is BLOCK_M consecutive rows of one sequence and kv head, those of one token after those
of the one before. One program attends with a tile to a share of the raw tokens and pages that its last row sees, and, with
the first share, to new tokens. Grid: (program,), those of a tile next to each other, from the last tile to the first; those for
which there is no tile come last, because multiprocessors that get them first get less of the rest. Bytes moved: each record
byte once for each tile; 4 * (v_head_dim + 1) bytes per row and share, twice, where there are several shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .. import configs, gpu
from ..launch import on
from ..layout import PageLayout, fields_per_byte
from ..paging import body_seen, first_slot, ids_of_row
from ..tile.arithmetic import LOG2E, hadamard, load_rows, store_rows
from .merge import LN2, with_sink
from .pages import attend_pages
from .query import rotate_planes, rotate_rows, rows_of_planes
from .schedule import find_tile, free_token, share_of_tile
from .tokens import attend_expanded, attend_new, attend_raw_units, num_raw_units

_NOT_SPECIALIZED = [
    "batch", "num_kv_heads", "num_splits", "sink_len", "num_sink_pages", "num_tail_slots", "split_size", "window",
    "stride_table", "stride_raw_table", "first_token", "total_tokens", "fill", "max_pages",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""
_ANY_ADDRESS = [
    "lse_ptr", "partial_lse_ptr", "cu_seqlens_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "raw_table_ptr",
    "num_quantized_ptr", "sinks_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED, do_not_specialize_on_alignment=_ANY_ADDRESS)
def _kvarn_prefill_attention_kernel(
    out_ptr,  # [total_tokens, num_q_heads, v_head_dim]
    lse_ptr,  # float32 [total_tokens, num_q_heads], natural logarithm; unused if not RETURN_LSE
    partial_ptr,  # float32 [num_splits, total_tokens, num_q_heads, v_head_dim], rotated if not HAS_NEW
    partial_lse_ptr,  # float32 [num_splits, total_tokens, num_q_heads], base 2
    q_ptr,  # [total_tokens, num_q_heads, head_dim]
    k_ptr,  # [total_tokens, num_kv_heads, head_dim], the new keys if HAS_NEW
    v_ptr,  # [total_tokens, num_kv_heads, v_head_dim]
    cu_seqlens_ptr,  # int32 [batch + 1]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    table_ptr,  # int32 [batch, max_pages], or [ids] if CSR
    indptr_ptr,  # int32 [batch + 1] if CSR
    seq_lens_ptr,  # int32 [batch]
    raw_pages_ptr,  # [num_raw_pages, 2, num_kv_heads, page_size, raw_head_dim]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    num_quantized_ptr,  # int32 [batch]
    scratch_ptr,  # [num_slots, 2, num_kv_heads, page_size, raw_head_dim], the dequantized pages if HAS_SCRATCH
    sinks_ptr,  # float32 [num_q_heads]
    qk_scale,  # sm_scale * log2(e)
    soft_cap,  # soft_cap * log2(e)
    window,
    batch,
    num_kv_heads,
    num_splits,
    first_token,  # of this launch
    total_tokens,  # of this launch
    fill,  # whether rows of no sequence are zeroed, if SINGLE; their log-sum-exp always is -inf
    sink_len,
    num_sink_pages,
    num_tail_slots,
    split_size,
    max_pages,  # columns of a block table
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
    stride_scratch_slot,
    stride_scratch_half,
    stride_scratch_head,
    stride_scratch_token,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    BLOCK_M: tl.constexpr,  # rows of a tile
    K_CHANNELS: tl.constexpr,  # channels of a key, padded to a power of two
    V_CHANNELS: tl.constexpr,  # channels of a value, padded to a power of two
    BLOCK_T: tl.constexpr,  # tokens of pages of one product with keys
    BLOCK_D: tl.constexpr,  # channels of one product with values, if FOLDED
    BLOCK_R: tl.constexpr,  # raw or new tokens of one step
    K_FIELDS: tl.constexpr,  # 1 if HAS_SCRATCH: channels are in order
    V_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    QUERY_OPERAND: tl.constexpr,
    RAW_OPERAND: tl.constexpr,
    SCRATCH_OPERAND: tl.constexpr,
    FORM: tl.constexpr,  # of the loop over pages (`configs.PrefillConfig`)
    HAS_SCRATCH: tl.constexpr,  # pages are read from there, not from `pages_ptr`
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
    EARLY_MERGE: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.head_dim
    D_V: tl.constexpr = LAYOUT.v_head_dim
    TOKEN_STAGES: tl.constexpr = 1 if max(K_CHANNELS, V_CHANNELS) > 256 else NUM_STAGES  # shared memory of 99 KB holds no more
    # Queries kept for later would take registers or shared memory from the loop over pages.
    RELOAD: tl.constexpr = HAS_SCRATCH or FORM == "registers"
    RAW_FIRST: tl.constexpr = FORM == "registers"  # rows, joined of planes, are not needed after pages
    if EARLY_MERGE:
        gdc_launch_dependents()
    head = tl.program_id(0) % num_kv_heads
    split = tl.program_id(0) // num_kv_heads % num_splits
    num_q_heads = num_kv_heads * GROUP
    tokens = (first_token, first_token + total_tokens)
    row, tile = find_tile(cu_seqlens_ptr, tl.program_id(0) // num_kv_heads // num_splits, batch, tokens, GROUP, BLOCK_M)
    if row < batch:
        row_start = tl.load(cu_seqlens_ptr + row)
        num_tokens = tl.load(cu_seqlens_ptr + row + 1) - row_start
        seq_len = tl.load(seq_lens_ptr + row)
        first_row = tile * BLOCK_M
        num_rows = tl.minimum(num_tokens * GROUP - first_row, BLOCK_M)
        first_query = first_row // GROUP
        last_query = (first_row + num_rows - 1) // GROUP

        first_page, quantized, num_valid, oldest, window = body_seen(
            row, seq_len, num_tokens, first_query, last_query, num_quantized_ptr, sink_len, window,
            G, HAS_RAW, HAS_NEW, HAS_WINDOW,
        )  # fmt: skip
        offs_m = tl.arange(0, BLOCK_M)
        query = (first_row + offs_m) // GROUP
        shift = seq_len - num_tokens - sink_len  # the position of the first query within the body
        sink = oldest + sink_len, tl.minimum(num_valid + sink_len, sink_len)
        tail = tl.maximum(oldest, quantized * G), num_valid
        num_raw = num_raw_units(sink[0], sink[1]) + num_raw_units(tail[0], tail[1]) if HAS_RAW else 0
        first_raw, last_raw, first_page, last_page = share_of_tile(
            split, num_splits, split_size, num_raw, first_page, quantized
        )  # fmt: skip

        mask_m = offs_m < num_rows
        q_head = head * GROUP + (first_row + offs_m) % GROUP
        token = (row_start + query).to(tl.int64)
        q_place = token * stride_q_token + q_head.to(tl.int64) * stride_q_head
        if FORM == "registers":
            rotated, q_factor = rotate_planes(q_ptr, q_place, mask_m, LAYOUT, K_FIELDS, QUERY_OPERAND, OPERAND)
        else:
            q = load_rows(q_ptr, q_place, mask_m, D, K_CHANNELS)
            if HAS_SCRATCH:
                rotated, q_factor = rotate_rows(q.to(QUERY_OPERAND), LAYOUT, K_FIELDS, OPERAND, K_CHANNELS <= 128)
            else:
                rotated = tl.zeros((BLOCK_M, K_CHANNELS), OPERAND)
                q_factor = 1.0
                if num_valid > -sink_len:  # otherwise nothing is cached
                    rotated, q_factor = rotate_rows(q, LAYOUT, K_FIELDS, OPERAND, False)
        q_factor = q_factor * qk_scale
        m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, V_CHANNELS), tl.float32)
        for part in tl.static_range(2):
            if (part == 0) == RAW_FIRST:
                if HAS_RAW and first_raw < last_raw:
                    acc, m_i, l_i = attend_raw_units(
                        acc, m_i, l_i, rows_of_planes(rotated) if RAW_FIRST else rotated, q_factor, soft_cap,
                        raw_pages_ptr + head.to(tl.int64) * stride_raw_head,
                        raw_table_ptr + row.to(tl.int64) * stride_raw_table,
                        stride_raw_page, stride_raw_half, stride_raw_token,
                        first_raw, last_raw, sink, tail, sink_len, num_sink_pages, num_tail_slots, shift + query, window,
                        LAYOUT, BLOCK_R, K_FIELDS, RAW_OPERAND, HAS_WINDOW, HAS_CAP, PTX, TOKEN_STAGES,
                    )  # fmt: skip
            elif HAS_SCRATCH:
                acc, m_i, l_i = attend_expanded(
                    acc, m_i, l_i, rotated, q_factor, soft_cap,
                    scratch_ptr + head.to(tl.int64) * stride_scratch_head, first_slot(indptr_ptr, row, max_pages, CSR),
                    stride_scratch_slot, stride_scratch_half, stride_scratch_token,
                    first_page, last_page, num_valid, shift + query, shift + first_query, shift + last_query, window,
                    LAYOUT, BLOCK_T, SCRATCH_OPERAND, HAS_WINDOW, HAS_CAP, TOKEN_STAGES,
                )  # fmt: skip
            else:
                acc, m_i, l_i = attend_pages(
                    acc, m_i, l_i, rotated, q_factor, soft_cap,
                    pages_ptr + head.to(tl.int64) * stride_pages_head,
                    ids_of_row(table_ptr, indptr_ptr, row, stride_table, CSR), stride_pages_page,
                    first_page, last_page, num_valid, shift + query, shift + first_query, shift + last_query, window,
                    LAYOUT, BLOCK_T, BLOCK_D, K_FIELDS, V_FIELDS, OPERAND, FORM, HAS_WINDOW, HAS_CAP, PTX, NUM_STAGES,
                )  # fmt: skip
        if HAS_NEW and (not HAS_SCRATCH or num_valid > -sink_len):
            acc = hadamard(acc, LAYOUT.v_block_size)
        if HAS_NEW and split == 0:
            rows = load_rows(q_ptr, q_place, mask_m, D, K_CHANNELS) if RELOAD else q
            acc, m_i, l_i = attend_new(
                acc, m_i, l_i, rows.to(QUERY_OPERAND), qk_scale, soft_cap,
                k_ptr + row_start.to(tl.int64) * stride_k_token + head.to(tl.int64) * stride_k_head,
                v_ptr + row_start.to(tl.int64) * stride_v_token + head.to(tl.int64) * stride_v_head,
                stride_k_token, stride_v_token,
                tl.maximum(first_query - window + 1, 0) if HAS_WINDOW else 0,
                last_query + 1, query, first_query, last_query, window,
                D, D_V, BLOCK_R, HAS_WINDOW, HAS_CAP, TOKEN_STAGES,
            )  # fmt: skip

        acc = acc * (1.0 / tl.where(l_i > 0, l_i, 1.0))[:, None]
        lse = m_i + tl.log2(l_i)
        if SINGLE:
            # The operations of a merge of one run, so that the bits are the same where the table has room for more.
            if HAS_SINKS:
                acc, lse = with_sink(acc, lse, tl.load(sinks_ptr + q_head) * LOG2E)
            if not HAS_NEW:
                acc = hadamard(acc, LAYOUT.v_block_size)
            store_rows(out_ptr, token * stride_out_token + q_head.to(tl.int64) * stride_out_head, acc, mask_m, D_V)
            if RETURN_LSE:
                tl.store(lse_ptr + token * num_q_heads + q_head, lse * LN2, mask_m)
        else:
            mask_m = mask_m & (token >= tokens[0]) & (token < tokens[1])
            place = (split * total_tokens.to(tl.int64) + token - tokens[0]) * num_q_heads + q_head
            store_rows(partial_ptr, place * D_V, acc, mask_m, D_V)
            tl.store(partial_lse_ptr + place, lse, mask_m)
    elif SINGLE:
        # There are as many programs without a tile as it takes to give each row that no sequence owns to one of them.
        free = (-1 - tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        free_place = free_token(cu_seqlens_ptr, batch, free // GROUP).to(tl.int64)
        free_head = (head * GROUP + free % GROUP).to(tl.int64)
        mask_f = free_place < total_tokens
        zeros = tl.zeros((BLOCK_M, V_CHANNELS), tl.float32)
        store_rows(
            out_ptr,
            free_place * stride_out_token + free_head * stride_out_head,
            zeros,
            mask_f & (tl.zeros_like(free) + fill != 0),
            D_V,
        )
        if RETURN_LSE:
            tl.store(lse_ptr + free_place * num_q_heads + free_head, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask_f)


def launch_prefill_tiles(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    partial: torch.Tensor | None,
    partial_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    raw_pages: torch.Tensor | None,
    raw_table: torch.Tensor | None,
    num_quantized: torch.Tensor | None,
    scratch: torch.Tensor | None,
    sink_len: int,
    sm_scale: float | None,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    num_splits: int,
    split_size: int,
    config: configs.PrefillConfig,
    tokens: range,
    fill: bool,
) -> None:
    """Attend with all tiles that have one of some tokens, to `partial` if there are several splits; nothing is checked."""
    _, num_q_heads, head_dim = q.shape
    batch, num_kv_heads = seq_lens.shape[0], pages.shape[1]
    group = num_q_heads // num_kv_heads
    k_channels, v_channels = triton.next_power_of_2(head_dim), triton.next_power_of_2(layout.v_head_dim)
    table = kv_indices if block_table is None else block_table
    assert table is not None
    raw = q if raw_pages is None else raw_pages
    expanded = q if scratch is None else scratch
    new_k, new_v = (q if x is None else x for x in (k, v))
    num_sink_pages = -(-sink_len // layout.page_size)
    tiles = triton.cdiv(len(tokens) * group, config.block_m) + batch + (tokens.start > 0)  # one may begin before them
    on(q, _kvarn_prefill_attention_kernel)[(tiles * num_kv_heads * num_splits,)](
        out,
        seq_lens if lse is None else lse,
        out if partial is None else partial,
        seq_lens if partial_lse is None else partial_lse,
        q, new_k, new_v, cu_seqlens_q, pages, table,
        seq_lens if kv_indptr is None else kv_indptr,
        seq_lens,
        raw,
        table if raw_table is None else raw_table,
        seq_lens if num_quantized is None else num_quantized,
        expanded,
        seq_lens if sinks is None else sinks,
        (head_dim**-0.5 if sm_scale is None else sm_scale) * LOG2E.value,
        (soft_cap or 0.0) * LOG2E.value,
        window or 0,
        batch, num_kv_heads, num_splits, tokens.start, len(tokens), int(fill), sink_len, num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - num_sink_pages,
        split_size,
        table.shape[-1],
        *q.stride()[:2], *out.stride()[:2], *new_k.stride()[:2], *new_v.stride()[:2], *pages.stride()[:2],
        0 if block_table is None else block_table.stride(0),
        *((0, 0, 0, 0) if raw_pages is None else raw_pages.stride()[:4]),
        0 if raw_table is None else raw_table.stride(0),
        *((0, 0, 0, 0) if scratch is None else scratch.stride()[:4]),
        LAYOUT=layout,
        GROUP=group,
        BLOCK_M=config.block_m,
        K_CHANNELS=k_channels,
        V_CHANNELS=v_channels,
        BLOCK_T=config.block_t,
        BLOCK_D=min(config.block_d, v_channels),
        BLOCK_R=config.block_r,
        K_FIELDS=fields_per_byte(layout.k_bits) if scratch is None else 1,
        V_FIELDS=fields_per_byte(layout.v_bits),
        OPERAND=configs.operand(q.dtype, torch.float16),
        QUERY_OPERAND=configs.operand(q.dtype, q.dtype),
        RAW_OPERAND=configs.operand(q.dtype, raw.dtype),
        SCRATCH_OPERAND=configs.operand(q.dtype, expanded.dtype),
        FORM=config.form,
        HAS_SCRATCH=scratch is not None,
        HAS_RAW=raw_pages is not None,
        HAS_NEW=k is not None,
        HAS_WINDOW=window is not None,
        HAS_CAP=soft_cap is not None,
        HAS_SINKS=sinks is not None,
        CSR=block_table is None,
        SINGLE=num_splits == 1,
        RETURN_LSE=lse is not None and num_splits == 1,
        PTX=gpu.uses_ptx(),
        NUM_STAGES=config.num_stages,
        EARLY_MERGE=num_splits > 1 and gpu.launches_early(q.device),
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
    )  # fmt: skip
