"""Attention over raw tokens, those of sinks and tails: what one program does with a run of them.

Query heads are rows, in two terms each (`operands`), tokens are columns of the product with keys, channels of the product with
values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..paging import load_page_id
from .folded import capped
from .operands import sum_of_terms, two_terms
from .query import plane_channels, raw_query


@triton.jit
def _raw_run(
    i,
    first_sink,
    num_sinks,
    first_tail,
    tail_token,
    num_sink_pages,
    num_tail_slots,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the first token of run i, in the sink or in the body, and its page's column in the raw table."""
    in_sink = i < num_sinks
    start = tl.where(in_sink, (first_sink + i) * BLOCK_R, tail_token + (first_tail + i - num_sinks) * BLOCK_R)
    return start, tl.where(in_sink, start // G, num_sink_pages + start // G % tl.maximum(num_tail_slots, 1))


@triton.jit
def attend_raw(
    acc,
    m_i,
    l_i,
    planes,
    q_factor,
    raw_pages_ptr,
    table_ptr,
    stride_page,
    stride_half,
    stride_token,
    first_sink,
    num_sinks,
    first_tail,
    num_tails,
    tail_token,
    num_sink_pages,
    num_tail_slots,
    sink_visible,
    body_visible,
    cap,
    LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    K_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by runs of BLOCK_R raw tokens of one kv head: num_sinks of the sink, then num_tails of the tail.

    The first are runs first_sink of the sink and first_tail of the tail, which starts at token tail_token of the body.
    sink_visible and body_visible say from which token on, and up to which, those of the sink and of the body are seen, at least
    one in every run; without HAS_WINDOW from the first token on.
    """
    G: tl.constexpr = LAYOUT.page_size
    D_V: tl.constexpr = LAYOUT.v_head_dim
    terms, unit = raw_query(planes, LAYOUT, K_FIELDS, OPERAND)
    q_factor = q_factor * unit
    byte = tl.arange(0, planes[0].shape[1])
    offs_d = tl.arange(0, acc.shape[1])
    count = num_sinks + num_tails
    num_columns = num_sink_pages + num_tail_slots
    start, column = _raw_run(
        0, first_sink, num_sinks, first_tail, tail_token, num_sink_pages, num_tail_slots, G, BLOCK_R
    )  # fmt: skip
    page = tl.zeros((), tl.int32)
    if count > 0:
        page = load_page_id(table_ptr, column, num_columns, PTX)
    for i in tl.range(0, count, num_stages=NUM_STAGES):
        in_sink = i < num_sinks
        page_ptr = raw_pages_ptr + page.to(tl.int64) * stride_page
        next_start, column = _raw_run(
            i + 1, first_sink, num_sinks, first_tail, tail_token, num_sink_pages, num_tail_slots, G, BLOCK_R
        )  # fmt: skip
        page = load_page_id(table_ptr, column, num_columns, PTX)
        offs_t = tl.arange(0, BLOCK_R)
        valid = start + offs_t < tl.where(in_sink, sink_visible[1], body_visible[1])
        if HAS_WINDOW:
            valid &= start + offs_t >= tl.where(in_sink, sink_visible[0], body_visible[0])
        place = (start % G + offs_t) * stride_token
        product = tl.zeros((terms[0].shape[0], BLOCK_R), tl.float32)
        for f in tl.static_range(K_FIELDS):
            channel, mask = plane_channels(f, LAYOUT, K_FIELDS, byte)
            keys = tl.load(page_ptr + place[None, :] + channel[:, None], valid[None, :] & mask[:, None], other=0.0)
            product = tl.dot(terms[f], keys.to(OPERAND), product, input_precision="ieee")
        scores = sum_of_terms(product) * q_factor[:, None]
        if HAS_CAP:
            scores = capped(scores, cap)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, axis=1))
        alpha = tl.exp2(m_i - m_new)
        weights = tl.exp2(scores - m_new[:, None])
        m_i = m_new
        l_i = l_i * alpha + tl.sum(weights, axis=1)
        mask = valid[:, None] & (offs_d < D_V)[None, :]
        values = tl.load(page_ptr + stride_half + place[:, None] + offs_d[None, :], mask, other=0.0)
        product = tl.dot(two_terms(weights, OPERAND, False), values.to(OPERAND), input_precision="ieee")
        acc = acc * alpha[:, None] + sum_of_terms(product)
        start = next_start
    return acc, m_i, l_i
