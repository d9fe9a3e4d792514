"""Attention of many queries to tokens in 16 bits: of sinks and tails, of dequantized pages, and new ones outside of the cache.

What one program does with a tile of query rows; masks and softmax are those of `attend_many`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..paging import load_page_id
from .folded import advance_softmax, capped
from .pages import channel_in_order, visible
from .schedule import RAW_UNIT


@triton.jit
def num_raw_units(first, last):
    """Return how many units of RAW_UNIT tokens the raw tokens `first` to `last` are."""
    return tl.cdiv(tl.maximum(last - first, 0), RAW_UNIT)


@triton.jit
def attend_raw_units(
    acc,
    m_i,
    l_i,
    q,
    q_factor,
    soft_cap,
    raw_pages_ptr,
    table_ptr,
    stride_page,
    stride_half,
    stride_token,
    first_unit,
    last_unit,
    sink,
    tail,
    sink_len,
    num_sink_pages,
    num_tail_slots,
    position,
    window,
    LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    K_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by raw units first_unit to last_unit of one kv head: those of the sink, then those of the tail.

    `sink` and `tail` are the tokens that some query sees, (first, last), counted from the start of the sequence and of the
    body. `position` [rows] are those of the queries within the body.
    """
    before = 0
    for part in tl.static_range(2):
        first, last = tail if part else sink
        units = num_raw_units(first, last)
        first_of_part = tl.minimum(tl.maximum(first_unit - before, 0), units)
        last_of_part = tl.minimum(last_unit - before, units)
        end = tl.where(first_of_part < last_of_part, tl.minimum(first + last_of_part * RAW_UNIT, last), 0)
        acc, m_i, l_i = _attend_raw_run(
            acc, m_i, l_i, q, q_factor, soft_cap, raw_pages_ptr, table_ptr, stride_page, stride_half, stride_token,
            first + first_of_part * RAW_UNIT, end, num_sink_pages * part,
            tl.maximum(num_tail_slots if part else num_sink_pages, 1), position + sink_len * (1 - part), window,
            LAYOUT, BLOCK_R, K_FIELDS, OPERAND, HAS_WINDOW, HAS_CAP, PTX, NUM_STAGES,
        )  # fmt: skip
        before += units
    return acc, m_i, l_i


@triton.jit
def _attend_raw_run(
    acc,
    m_i,
    l_i,
    q,
    q_factor,
    soft_cap,
    raw_pages_ptr,
    table_ptr,
    stride_page,
    stride_half,
    stride_token,
    first,
    last,
    first_column,
    num_columns,
    position,
    window,
    LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    K_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by raw tokens `first` to `last` of one kv head.

    Token t is in page t // page_size of the sink or of the body, whose id is in column first_column + page % num_columns of
    the raw table. `position` [rows] counts as tokens do.
    """
    G: tl.constexpr = LAYOUT.page_size
    D_V: tl.constexpr = LAYOUT.v_head_dim
    channel, mask_c = channel_in_order(tl.arange(0, q.shape[1]), q.shape[1] // K_FIELDS, LAYOUT, K_FIELDS)
    offs_d = tl.arange(0, acc.shape[1])
    offs_t = tl.arange(0, BLOCK_R)
    for start in tl.range(first // BLOCK_R * BLOCK_R, last, BLOCK_R, num_stages=NUM_STAGES):
        page = load_page_id(table_ptr, first_column + start // G % num_columns, first_column + num_columns, PTX)
        page_ptr = raw_pages_ptr + page.to(tl.int64) * stride_page
        token = start + offs_t
        valid = (token >= first) & (token < last)
        place = (start % G + offs_t) * stride_token
        keys = tl.load(page_ptr + place[None, :] + channel[:, None], valid[None, :] & mask_c[:, None], other=0.0)
        scores = tl.dot(q.to(OPERAND), keys.to(OPERAND), input_precision="ieee") * q_factor
        if HAS_CAP:
            scores = capped(scores, soft_cap)
        scores = tl.where(visible(position, token, window, HAS_WINDOW) & valid[None, :], scores, float("-inf"))
        weights, alpha, m_i, l_i = advance_softmax(scores, m_i, l_i)
        mask = valid[:, None] & (offs_d < D_V)[None, :]
        values = tl.load(page_ptr + stride_half + place[:, None] + offs_d[None, :], mask, other=0.0)
        acc = tl.dot(weights.to(OPERAND), values.to(OPERAND), acc * alpha[:, None], input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def _attend_step(
    acc,
    m_i,
    l_i,
    q,
    q_factor,
    soft_cap,
    k_ptrs,
    v_ptrs,
    k_mask,
    v_mask,
    token,
    last,
    hidden,
    position,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by tokens whose keys are at k_ptrs [channels, tokens] and values at v_ptrs [tokens, channels].

    Masks of loads may be None. Only where `hidden` some query may not see some token, or some token is not before `last`.
    """
    keys = tl.load(k_ptrs, k_mask, other=None if k_mask is None else 0.0)
    scores = tl.dot(q, keys.to(q.dtype), input_precision="ieee") * q_factor
    if HAS_CAP:
        scores = capped(scores, soft_cap)
    if hidden:
        seen = token[None, :] <= tl.minimum(position, last - 1)[:, None]
        if HAS_WINDOW:
            seen = seen & (token[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    weights, alpha, m_i, l_i = advance_softmax(scores, m_i, l_i)
    values = tl.load(v_ptrs, v_mask, other=None if v_mask is None else 0.0)
    acc = tl.dot(weights.to(q.dtype), values.to(q.dtype), acc * alpha[:, None], input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def attend_expanded(
    acc,
    m_i,
    l_i,
    q,
    q_factor,
    soft_cap,
    scratch_ptr,
    slot,
    stride_slot,
    stride_half,
    stride_token,
    first_page,
    last_page,
    num_valid,
    position,
    first_position,
    last_position,
    window,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by body pages first_page to last_page of one kv head, dequantized: page 0 is in slot `slot`.

    The first num_valid tokens of the body count. `position` [rows] are those of the queries within the body, from
    first_position to last_position. Channels of `q` are in order.
    """
    G: tl.constexpr = LAYOUT.page_size
    offs_k = tl.arange(0, q.shape[1])
    offs_v = tl.arange(0, acc.shape[1])
    offs_t = tl.arange(0, BLOCK_T)
    k_mask: tl.constexpr = None
    v_mask: tl.constexpr = None
    if q.shape[1] != LAYOUT.head_dim:
        k_mask = (offs_k < LAYOUT.head_dim)[:, None]
    if acc.shape[1] != LAYOUT.v_head_dim:
        v_mask = (offs_v < LAYOUT.v_head_dim)[None, :]
    q = q.to(OPERAND)
    for start in tl.range(first_page * G, tl.minimum(last_page * G, num_valid), BLOCK_T, num_stages=NUM_STAGES):
        page_ptr = scratch_ptr + (slot + start // G) * stride_slot
        place = (start % G + offs_t) * stride_token
        hidden = start + BLOCK_T > tl.minimum(num_valid, first_position + 1)
        if HAS_WINDOW:
            hidden = hidden | (start <= last_position - window)
        acc, m_i, l_i = _attend_step(
            acc, m_i, l_i, q, q_factor, soft_cap,
            page_ptr + place[None, :] + offs_k[:, None], page_ptr + stride_half + place[:, None] + offs_v[None, :],
            k_mask, v_mask, start + offs_t, num_valid, hidden, position, window, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
    return acc, m_i, l_i


@triton.jit
def attend_new(
    acc,
    m_i,
    l_i,
    q,
    qk_scale,
    soft_cap,
    k_ptr,
    v_ptr,
    stride_k_token,
    stride_v_token,
    first,
    last,
    position,
    first_position,
    last_position,
    window,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by new tokens `first` to `last` of one sequence and kv head, neither rotated nor in the cache.

    `q` [rows, channels] is not rotated either. `position` [rows], from first_position to last_position, counts new tokens.
    """
    offs_k = tl.arange(0, q.shape[1])
    offs_v = tl.arange(0, acc.shape[1])
    offs_t = tl.arange(0, BLOCK_R)
    k_mask: tl.constexpr = None
    v_mask: tl.constexpr = None
    if q.shape[1] != D:
        k_mask = (offs_k < D)[:, None]
    if acc.shape[1] != D_V:
        v_mask = (offs_v < D_V)[None, :]
    for start in tl.range(first, last, BLOCK_R, num_stages=NUM_STAGES):
        # Past the last token that some query sees, it is loaded again.
        place = tl.minimum(start + offs_t, last - 1).to(tl.int64)
        k_ptrs = k_ptr + place[None, :] * stride_k_token + offs_k[:, None]
        v_ptrs = v_ptr + place[:, None] * stride_v_token + offs_v[None, :]
        hidden = start + BLOCK_R > tl.minimum(last, first_position + 1)
        if HAS_WINDOW:
            hidden = hidden | (start <= last_position - window)
        acc, m_i, l_i = _attend_step(
            acc, m_i, l_i, q, qk_scale, soft_cap, k_ptrs, v_ptrs, k_mask, v_mask,
            start + offs_t, last, hidden, position, window, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
    return acc, m_i, l_i
