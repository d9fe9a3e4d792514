"""Paged split-K decode attention over sink, quantized and tail pages in one call.

One program of the first kernel attends with all query heads of one kv head to a run of consecutive pages of one sequence;
the second kernel merges the runs and undoes the rotation. Grids: (split, kv head, sequence) and (query head, sequence).
Bytes moved: every record byte of the sequence once, plus 4 * (head_dim + 1) bytes per query head and split twice.

Nothing is dequantized. The scale of a key channel is folded into the query, its zero is one number per head, the norm of a
token multiplies a score; the scale of a value token is folded into its weight, its zero is one number per head, the norm of
a channel multiplies the sum of a page. The tensor cores multiply integer codes (`device.field_as_half`). Tokens are the M
dimension of both products, query heads are N.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import configs, reference
from .append import check_raw_table
from .checks import FLOATS, check_aligned, check_pages, check_tensor, require
from .device import (
    INTERPRETED,
    channel_of_field,
    exponent_of,
    field_as_half,
    field_exponent,
    hadamard,
    online_softmax,
    power_of_two,
    split_fields,
)
from .layout import PageLayout, fields_per_word
from .merge import launch_merge_splits

QUERY_EXPONENT = tl.constexpr(4)
"""Rotated queries are scaled to a largest magnitude in [2**3, 2**4): folded with a scale below 1, neither end of float16 is near."""
MAX_GROUP = 16
"""Most query heads per kv head."""


@triton.jit
def load_query(
    q_ptr,
    stride_q_head,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Rotate the queries of one kv head and cut them into planes [words, heads], one per field of a key word.

    Plane f carries the factor 2**-field_exponent(f). Returns the planes and what their product with keys must be
    multiplied by [heads].
    """
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_n < GROUP) & (offs_d < LAYOUT.head_dim)
    q = tl.load(q_ptr + offs_n * stride_q_head + offs_d, mask, other=0.0).to(tl.float32)
    q = hadamard(q, LAYOUT.block_size)
    exponent = tl.maximum(exponent_of(tl.max(tl.abs(q), axis=1)), -100) - QUERY_EXPONENT
    q = q * power_of_two(-exponent)[:, None]
    planes = ()
    parts = split_fields(q, LAYOUT.block_size, FIELDS)
    WIDTH: tl.constexpr = 2 if LAYOUT.k_bits == 3 else LAYOUT.k_bits
    for f in tl.static_range(FIELDS):
        planes = planes + (tl.trans(parts[f] * 0.5 ** field_exponent(f, WIDTH)).to(OPERAND),)
    return planes, power_of_two(exponent)


@triton.jit
def quantized_scores(
    record_ptr, offs_t, q_planes, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr, PTX: tl.constexpr
):
    """Return q k / 2**QUERY_EXPONENT... scores [tokens, heads] of tokens `offs_t` of a record, before the factors of `load_query`."""
    BITS: tl.constexpr = LAYOUT.k_bits
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_W: tl.constexpr = q_planes[0].shape[0]
    BLOCK_N: tl.constexpr = q_planes[0].shape[1]
    offs_w = tl.arange(0, BLOCK_W)
    place = offs_t[:, None] * WORDS + offs_w[None, :]
    mask_w = offs_w < WORDS
    word_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.uint16))
    words = tl.load(word_ptr + place, mask_w[None, :], other=0)
    if BITS == 3:
        byte_ptr = record_ptr + LAYOUT.k_codes_offset + LAYOUT.page_size * WORDS * 2
        top = tl.load(byte_ptr + place, mask_w[None, :], other=0).to(tl.uint16)
    scale_ptr = (record_ptr + LAYOUT.k_scale_offset).to(tl.pointer_type(tl.float16))
    zero_ptr = (record_ptr + LAYOUT.k_zero_offset).to(tl.pointer_type(tl.float16))
    product = tl.zeros((offs_t.shape[0], BLOCK_N), tl.float32)
    offset = tl.zeros((BLOCK_W, BLOCK_N), tl.float32)
    for f in tl.static_range(FIELDS):
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, FIELDS)
        scale = tl.load(scale_ptr + channel, mask_w, other=0.0)
        zero = tl.load(zero_ptr + channel, mask_w, other=0.0).to(tl.float32) * 2.0 ** field_exponent(f, WIDTH)
        offset += q_planes[f].to(tl.float32) * zero[:, None]
        folded = q_planes[f] * scale.to(OPERAND)[:, None]
        codes = field_as_half(words, f, WIDTH, PTX).to(OPERAND)
        product = tl.dot(codes, folded, product, input_precision="ieee")
        if BITS == 3:
            codes = field_as_half(top, f, 1, PTX).to(OPERAND)
            folded = (folded * (4.0 * 2.0 ** (field_exponent(f, WIDTH) - f))).to(OPERAND)
            product = tl.dot(codes, folded, product, input_precision="ieee")
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    norm = tl.load(norm_ptr + offs_t).to(tl.float32)
    return (product * 16777216.0 + tl.sum(offset, axis=0)[None, :]) * norm[:, None]


@triton.jit
def add_quantized_values(
    accs,
    weights,
    alpha,
    record_ptr,
    offs_t,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return accs * alpha + values of tokens `offs_t` of a record times their weights [tokens, heads].

    Accumulator f [words, heads] belongs to the channels of field f of the value words.
    """
    BITS: tl.constexpr = LAYOUT.v_bits
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_W: tl.constexpr = accs[0].shape[0]
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < WORDS
    scale_ptr = (record_ptr + LAYOUT.v_scale_offset).to(tl.pointer_type(tl.float16))
    zero_ptr = (record_ptr + LAYOUT.v_zero_offset).to(tl.pointer_type(tl.float16))
    scale = tl.load(scale_ptr + offs_t).to(tl.float32)
    zero = tl.load(zero_ptr + offs_t).to(tl.float32)
    offset = tl.sum(weights * zero[:, None], axis=0)
    folded = (weights * scale[:, None]).to(OPERAND)
    place = offs_w[:, None] * LAYOUT.page_size + offs_t[None, :]
    word_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.uint16))
    words = tl.load(word_ptr + place, mask_w[:, None], other=0)
    if BITS == 3:
        byte_ptr = record_ptr + LAYOUT.v_codes_offset + LAYOUT.page_size * WORDS * 2
        top = tl.load(byte_ptr + place, mask_w[:, None], other=0).to(tl.uint16)
    norm_ptr = (record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16))
    new = ()
    for f in tl.static_range(FIELDS):
        codes = field_as_half(words, f, WIDTH, PTX).to(OPERAND)
        product = tl.dot(codes, folded, input_precision="ieee") * (16777216.0 / 2.0 ** field_exponent(f, WIDTH))
        if BITS == 3:
            codes = field_as_half(top, f, 1, PTX).to(OPERAND)
            product += tl.dot(codes, folded, input_precision="ieee") * (16777216.0 * 4.0 / 2.0**f)
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, FIELDS)
        norm = tl.load(norm_ptr + channel, mask_w, other=0.0).to(tl.float32)
        new = new + (accs[f] * alpha[None, :] + (product + offset[None, :]) * norm[:, None],)
    return new


@triton.jit
def raw_scores(k_ptr, stride_token, offs_t, valid, q_planes, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr):
    """Return the scores [tokens, heads] of raw keys, before the factors of `load_query`."""
    WIDTH: tl.constexpr = 2 if LAYOUT.k_bits == 3 else LAYOUT.k_bits
    offs_w = tl.arange(0, q_planes[0].shape[0])
    mask = valid[:, None] & (offs_w < LAYOUT.head_dim // FIELDS)[None, :]
    scores = tl.zeros((offs_t.shape[0], q_planes[0].shape[1]), tl.float32)
    for f in tl.static_range(FIELDS):
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, FIELDS)
        keys = tl.load(k_ptr + offs_t[:, None] * stride_token + channel[None, :], mask, other=0.0)
        plane = (q_planes[f].to(tl.float32) * 2.0 ** field_exponent(f, WIDTH)).to(OPERAND)
        scores = tl.dot(keys.to(OPERAND), plane, scores, input_precision="ieee")
    return scores


@triton.jit
def add_raw_values(
    accs, weights, alpha, v_ptr, stride_token, offs_t, valid, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr
):
    """Return accs * alpha + raw values times their weights [tokens, heads]."""
    offs_w = tl.arange(0, accs[0].shape[0])
    mask = valid[None, :] & (offs_w < LAYOUT.head_dim // FIELDS)[:, None]
    new = ()
    for f in tl.static_range(FIELDS):
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, FIELDS)
        values = tl.load(v_ptr + offs_t[None, :] * stride_token + channel[:, None], mask, other=0.0)
        new = new + (tl.dot(values.to(OPERAND), weights.to(OPERAND), accs[f] * alpha[None, :], input_precision="ieee"),)
    return new


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
    STEPS: tl.constexpr = G // BLOCK_T
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
    steps_t = tl.arange(0, BLOCK_T)

    first_page = tl.maximum(first - num_sink, 0)
    last_page = tl.minimum(last - num_sink, num_paged)
    table_ptr = block_table_ptr + row.to(tl.int64) * stride_table
    heads_ptr = pages_ptr + head.to(tl.int64) * stride_pages_head
    for i in tl.range(first_page * STEPS, last_page * STEPS, num_stages=NUM_STAGES):
        page = tl.load(table_ptr + i // STEPS).to(tl.int64)
        record_ptr = heads_ptr + page * stride_pages_page
        offs_t = i % STEPS * BLOCK_T + steps_t
        scores = quantized_scores(record_ptr, offs_t, q_planes, LAYOUT, K_FIELDS, OPERAND, PTX) * q_factor[None, :]
        valid = sink_len + i // STEPS * G + offs_t < seq_len
        weights, alpha, m_i, l_i = online_softmax(tl.where(valid[:, None], scores, float("-inf")), m_i, l_i)
        accs = add_quantized_values(accs, weights, alpha, record_ptr, offs_t, LAYOUT, V_FIELDS, OPERAND, PTX)

    if HAS_RAW:
        sink_pages = tl.maximum(tl.minimum(last, num_sink) - first, 0)
        first_tail = tl.maximum(first, num_sink + num_paged)
        tail_pages = tl.maximum(last - first_tail, 0)
        for i in tl.range(0, (sink_pages + tail_pages) * STEPS, num_stages=1):
            unit = i // STEPS
            in_sink = unit < sink_pages
            body = first_tail + unit - sink_pages - num_sink
            column = tl.where(in_sink, first + unit, num_sink_pages + body % tl.maximum(num_tail_slots, 1))
            position = tl.where(in_sink, (first + unit) * G, sink_len + body * G)
            limit = tl.where(in_sink, tl.minimum(sink_len, seq_len), seq_len)
            page = tl.load(raw_table_ptr + row.to(tl.int64) * stride_raw_table + column).to(tl.int64)
            k_ptr = raw_pages_ptr + page * stride_raw_page + head.to(tl.int64) * stride_raw_head
            offs_t = i % STEPS * BLOCK_T + steps_t
            valid = position + offs_t < limit
            scores = raw_scores(k_ptr, stride_raw_token, offs_t, valid, q_planes, LAYOUT, K_FIELDS, RAW_OPERAND)
            scores = tl.where(valid[:, None], scores * q_factor[None, :], float("-inf"))
            weights, alpha, m_i, l_i = online_softmax(scores, m_i, l_i)
            v_ptr = k_ptr + stride_raw_half
            accs = add_raw_values(
                accs, weights, alpha, v_ptr, stride_raw_token, offs_t, valid, LAYOUT, V_FIELDS, RAW_OPERAND
            )

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
    num_kv_heads = _check_decode(
        q, pages, block_table, seq_lens, layout, raw_pages, raw_table, num_quantized, sink_len, out
    )
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
    )
    launch_merge_splits(out, lse, partial, partial_lse, layout)
    return out if lse is None else (out, lse)


def _raw_operand(q_dtype: torch.dtype, raw_dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which raw pages are multiplied. The interpreter can't multiply bfloat16."""
    if q_dtype == torch.float32 or raw_dtype == torch.float32:
        return tl.float32
    if raw_dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16
    return tl.float16
