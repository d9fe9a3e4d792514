"""Paged split-K decode attention over sink, quantized and tail pages in one call.

One program of the first kernel attends with all query heads of one kv head to a run of consecutive pages of one sequence;
the second kernel merges the runs and undoes the rotation. Grids: (split, kv head, sequence) and (query head, sequence).
Bytes moved: every record byte of the sequence once, plus 4 * (head_dim + 1) bytes per query head and split twice.
`attend` says what a program does with a page.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, reference
from .append import check_raw_table
from .attend import attend_quantized, attend_raw, load_query
from .checks import FLOATS, check_aligned, check_pages, check_tensor, require
from .device import INTERPRETED, channel_of_field
from .layout import PageLayout, fields_per_word
from .merge import launch_merge_splits

MAX_GROUP = 16
"""Most query heads per kv head."""


@triton.jit(do_not_specialize=["sink_len", "stride_table", "stride_raw_table", "num_sink_pages", "num_tail_slots"])
def _kvarn_decode_attention_kernel(
    partial_ptr,  # float32 [batch, num_q_heads, num_splits, head_dim], rotated
    partial_lse_ptr,  # float32 [batch, num_q_heads, num_splits], base 2
    q_ptr,  # [batch, num_q_heads, head_dim]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    block_table_ptr,  # int32 [batch, max_pages]
    seq_lens_ptr,  # int32 [batch]
    raw_pages_ptr,  # [num_raw_pages, 2, num_kv_heads, page_size, head_dim]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    num_quantized_ptr,  # int32 [batch]
    qk_scale,  # sm_scale * log2(e)
    sink_len,
    num_sink_pages,
    num_tail_slots,
    stride_q_batch,
    stride_q_head,
    stride_pages_page,
    stride_pages_head,
    stride_table,
    stride_raw_page,
    stride_raw_half,
    stride_raw_head,
    stride_raw_token,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # channels of a key, padded so that every plane has 16
    BLOCK_V: tl.constexpr,  # channels of a value, likewise
    BLOCK_T: tl.constexpr,  # tokens of one step
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    HAS_RAW: tl.constexpr,
    OPERAND: tl.constexpr,
    RAW_OPERAND: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits, num_kv_heads = tl.num_programs(0), tl.num_programs(1)
    G: tl.constexpr = LAYOUT.page_size
    seq_len = tl.load(seq_lens_ptr + row)
    num_body = tl.cdiv(tl.maximum(seq_len - sink_len, 0), G)
    num_sink = tl.cdiv(tl.minimum(seq_len, sink_len), G)
    num_paged = num_body
    if HAS_RAW:
        num_paged = tl.minimum(tl.load(num_quantized_ptr + row), num_body)
    per_split = tl.cdiv(num_sink + num_body, num_splits)
    first = split * per_split
    last = tl.minimum(first + per_split, num_sink + num_body)

    q_head = head * GROUP
    q_row_ptr = q_ptr + row.to(tl.int64) * stride_q_batch + q_head * stride_q_head
    q_planes, q_factor = load_query(q_row_ptr, stride_q_head, GROUP, BLOCK_N, BLOCK_K, LAYOUT, K_FIELDS, OPERAND)
    q_factor = q_factor * qk_scale
    m_i = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_N,), tl.float32)
    accs = ()
    for _ in tl.static_range(V_FIELDS):
        accs = accs + (tl.zeros((BLOCK_V // V_FIELDS, BLOCK_N), tl.float32),)

    heads_ptr = pages_ptr + head.to(tl.int64) * stride_pages_head
    table_ptr = block_table_ptr + row.to(tl.int64) * stride_table
    first_page = tl.maximum(first - num_sink, 0)
    last_page = tl.minimum(last - num_sink, num_paged)
    accs, m_i, l_i = attend_quantized(
        accs, m_i, l_i, q_planes, q_factor, heads_ptr, table_ptr, stride_pages_page, first_page, last_page,
        seq_len - sink_len, LAYOUT, BLOCK_T, K_FIELDS, V_FIELDS, OPERAND, PTX, NUM_STAGES,
    )  # fmt: skip
    if HAS_RAW:
        raw_ptr = raw_pages_ptr + head.to(tl.int64) * stride_raw_head
        raw_row_ptr = raw_table_ptr + row.to(tl.int64) * stride_raw_table
        first_tail = tl.maximum(first - num_sink, num_paged)
        accs, m_i, l_i = attend_raw(
            accs, m_i, l_i, q_planes, q_factor, raw_ptr, raw_row_ptr, stride_raw_page, stride_raw_half, stride_raw_token,
            first, tl.maximum(tl.minimum(last, num_sink) - first, 0), first_tail, tl.maximum(last - num_sink - first_tail, 0),
            num_sink_pages, num_tail_slots, tl.minimum(seq_len, sink_len), seq_len - sink_len,
            LAYOUT, BLOCK_T, K_FIELDS, V_FIELDS, RAW_OPERAND,
        )  # fmt: skip

    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < GROUP
    place = ((row * num_kv_heads + head).to(tl.int64) * GROUP + offs_n) * num_splits + split
    tl.store(partial_lse_ptr + place, m_i + tl.log2(l_i), mask_n)
    offs_w = tl.arange(0, BLOCK_V // V_FIELDS)
    mask = (offs_w < LAYOUT.head_dim // V_FIELDS)[:, None] & mask_n[None, :]
    inverse = 1.0 / tl.where(l_i > 0, l_i, 1.0)
    for f in tl.static_range(V_FIELDS):
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, V_FIELDS)
        tl.store(partial_ptr + place[None, :] * LAYOUT.head_dim + channel[:, None], accs[f] * inverse[None, :], mask)


def decode_workspace_size(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    layout: PageLayout,
    max_pages: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float16,
    num_splits: int | None = None,
) -> int:
    """Return how many bytes of workspace `decode_attention` needs.

    Args:
        batch: sequences.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        layout: the page format.
        max_pages: columns of `block_table` and `raw_table` together.
        device: where the call will run; the default number of splits depends on it.
        dtype: dtype of the queries.
        num_splits: as given to `decode_attention`.
    """
    if num_splits is None:
        num_warps = configs.decode_config(layout, num_q_heads // num_kv_heads, dtype).num_warps
        num_splits = configs.default_num_splits(device, batch * num_kv_heads, max_pages, num_warps)
    return 4 * batch * num_q_heads * num_splits * (layout.head_dim + 1)


def _check_decode(q, pages, block_table, seq_lens, layout, raw_pages, raw_table, num_quantized, sink_len, out) -> int:
    """Check the arguments of `decode_attention` and return the number of kv heads."""
    num_kv_heads = check_pages(pages, layout.page_bytes)
    device = pages.device
    check_tensor("q", q, [None, None, layout.head_dim], FLOATS, device=device)
    batch, num_q_heads = q.shape[0], q.shape[1]
    group = num_q_heads // max(num_kv_heads, 1)
    if group * num_kv_heads != num_q_heads or not 1 <= group <= MAX_GROUP:
        raise ValueError(
            f"q: expected 1 to {MAX_GROUP} times as many query heads as the {num_kv_heads} kv heads of pages, got {num_q_heads}"
        )
    check_tensor("block_table", block_table, [batch, None], torch.int32, device=device)
    check_tensor("seq_lens", seq_lens, [batch], torch.int32, device=device)
    if raw_pages is None:
        if raw_table is not None or num_quantized is not None or sink_len:
            raise ValueError("raw_pages: expected a tensor beside raw_table, num_quantized or sink_len, got None")
    else:
        check_tensor("raw_pages", raw_pages, [None, 2, num_kv_heads, layout.page_size, layout.head_dim], FLOATS, device=device)
        check_tensor("raw_table", raw_table, [batch, None], torch.int32, device=device)
        check_raw_table(raw_table, sink_len, layout.page_size)
        check_tensor("num_quantized", num_quantized, [batch], torch.int32, device=device)
    if out is not None:
        check_tensor("out", out, q.shape, q.dtype, device=device)
    return num_kv_heads


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    sm_scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with one query token per sequence to its sink, quantized and tail pages.

    Args:
        q: float16, bfloat16 or float32 [batch, num_q_heads, head_dim], after the position encoding, not rotated. Query head i
            reads kv head i // group; group = num_q_heads / num_kv_heads may be any integer from 1 to 16.
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        block_table: int32 [batch, max_pages]; column j is the page id of body page j.
        seq_lens: int32 [batch], tokens to attend to. 0 is legal.
        layout: the page format.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, head_dim], rotated keys and values
            of sinks and tails (`append_tokens`). None if everything is quantized.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]; the sink pages, then the ring in which body page j has
            slot j % num_tail_slots. Needed with `raw_pages`.
        num_quantized: int32 [batch], how many body pages are read from `pages`. Needed with `raw_pages`.
        sink_len: tokens at the start of every sequence that stay raw.
        sm_scale: factor of the scores; by default head_dim ** -0.5.
        out: where to write; like `q`, any strides whose innermost is 1.
        return_lse: whether to return the log-sum-exp too.
        num_splits: into how many runs of pages each sequence is cut. By default it follows from the shapes and the device. A
            fixed number makes the bits of a row independent of the rest of the batch.
        workspace: uint8 [at least decode_workspace_size(...)], contiguous; allocated if not given.

    Returns:
        `out`, or `out` and `lse` float32 [batch, num_q_heads] (natural logarithm, of scores times `sm_scale`). A sequence of
        length 0 gives zeros and lse = -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids and lengths are not read to be checked.
    """
    num_kv_heads = _check_decode(q, pages, block_table, seq_lens, layout, raw_pages, raw_table, num_quantized, sink_len, out)
    batch, num_q_heads, head_dim = q.shape
    group = num_q_heads // num_kv_heads
    config = configs.decode_config(layout, group, q.dtype)
    max_pages = block_table.shape[1] + (0 if raw_table is None else raw_table.shape[1])
    if num_splits is None:
        num_splits = configs.default_num_splits(q.device, batch * num_kv_heads, max_pages, config.num_warps)
    require(isinstance(num_splits, int) and num_splits >= 1, "num_splits", "an integer of at least 1", num_splits)
    num_bytes = decode_workspace_size(batch, num_q_heads, num_kv_heads, layout, max_pages, q.device, num_splits=num_splits)
    if workspace is not None:
        check_tensor("workspace", workspace, [None], torch.uint8, device=q.device)
        check_aligned("workspace", workspace, 16)
        require(workspace.numel() >= num_bytes, "workspace", f"at least {num_bytes} bytes", workspace.numel())
    if not configs.on_device(q):
        return reference.decode_attention(
            q, pages, block_table, seq_lens, layout, raw_pages=raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, sm_scale=sm_scale, out=out, return_lse=return_lse,
        )  # fmt: skip
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device) if return_lse else None
    if workspace is None:
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    partial_bytes = 4 * batch * num_q_heads * num_splits * head_dim
    partial = workspace[:partial_bytes].view(torch.float32).view(batch, num_q_heads, num_splits, head_dim)
    partial_lse = workspace[partial_bytes:num_bytes].view(torch.float32).view(batch, num_q_heads, num_splits)
    if batch == 0 or num_q_heads == 0:
        return out if lse is None else (out, lse)

    _launch_decode(
        partial, partial_lse, q, pages, block_table, seq_lens, layout, raw_pages, raw_table, num_quantized, sink_len,
        sm_scale, config,
    )  # fmt: skip
    launch_merge_splits(out, lse, partial, partial_lse, layout)
    return out if lse is None else (out, lse)


def _launch_decode(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    raw_pages: torch.Tensor | None,
    raw_table: torch.Tensor | None,
    num_quantized: torch.Tensor | None,
    sink_len: int,
    sm_scale: float | None,
    config: configs.LaunchConfig,
) -> None:
    """Attend to the runs of pages; the arguments are not checked."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads, num_splits = pages.shape[1], partial.shape[2]
    group = num_q_heads // num_kv_heads
    k_fields, v_fields = fields_per_word(layout.k_bits), fields_per_word(layout.v_bits)
    block_d = triton.next_power_of_2(head_dim)
    has_raw = raw_pages is not None
    raw = raw_pages if raw_pages is not None else q
    num_sink_pages = -(-sink_len // layout.page_size)
    _kvarn_decode_attention_kernel[(num_splits, num_kv_heads, batch)](
        partial,
        partial_lse,
        q,
        pages,
        block_table,
        seq_lens,
        raw,
        block_table if raw_table is None else raw_table,
        seq_lens if num_quantized is None else num_quantized,
        (head_dim**-0.5 if sm_scale is None else sm_scale) * math.log2(math.e),
        sink_len,
        num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - num_sink_pages,
        q.stride(0),
        q.stride(1),
        pages.stride(0),
        pages.stride(1),
        block_table.stride(0),
        raw.stride(0) if has_raw else 0,
        raw.stride(1) if has_raw else 0,
        raw.stride(2) if has_raw else 0,
        raw.stride(3) if has_raw else 0,
        0 if raw_table is None else raw_table.stride(0),
        LAYOUT=layout,
        GROUP=group,
        BLOCK_N=max(triton.next_power_of_2(group), 8),
        BLOCK_K=max(block_d, 16 * k_fields),
        BLOCK_V=max(block_d, 16 * v_fields),
        BLOCK_T=config.block_t,
        K_FIELDS=k_fields,
        V_FIELDS=v_fields,
        HAS_RAW=has_raw,
        OPERAND=tl.float32 if q.dtype == torch.float32 else tl.float16,
        RAW_OPERAND=_raw_operand(q.dtype, raw.dtype),
        PTX=configs.uses_ptx(),
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )


def _raw_operand(q_dtype: torch.dtype, raw_dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which raw pages are multiplied. The interpreter can't multiply bfloat16."""
    if q_dtype == torch.float32 or raw_dtype == torch.float32:
        return tl.float32
    if raw_dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16
    return tl.float16
