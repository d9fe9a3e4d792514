"""The loops over tokens in 16 bits: of sinks and tails, of dequantized pages, and new ones outside of the cache."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..launch import Tokens
from ..masking import hides, recent, shown, weighed
from ..paging import load_page_id
from .operands import sum_of_terms, two_terms
from .query import channel_in_order, plane_channels, raw_query
from .schedule import RAW_UNIT
from .softmax import State, advance


@triton.jit
def of_head(tokens, head):
    """Return the pages of tokens of one kv head."""
    ptr = tokens.ptr + head.to(tl.int64) * tokens.stride_head
    return Tokens(ptr, tokens.stride_page, tokens.stride_half, tokens.stride_head, tokens.stride_token)


class Runs(NamedTuple):
    """Runs of raw tokens: num_sinks of the sink from run first_sink on, then num_tails of the tail from run first_tail on."""

    first_sink: tl.tensor
    num_sinks: tl.tensor
    first_tail: tl.tensor
    num_tails: tl.tensor
    tail_token: tl.tensor  # of the body, at which the tail starts
    num_sink_pages: tl.tensor
    num_tail_slots: tl.tensor


@triton.jit
def run_of(i, runs, G: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return the first token of run i, in the sink or in the body, and its page's column in the raw table."""
    in_sink = i < runs.num_sinks
    in_tail = runs.tail_token + (runs.first_tail + i - runs.num_sinks) * BLOCK_R
    start = tl.where(in_sink, (runs.first_sink + i) * BLOCK_R, in_tail)
    return start, tl.where(in_sink, start // G, runs.num_sink_pages + start // G % tl.maximum(runs.num_tail_slots, 1))


@triton.jit
def seen_of_run(i, token, runs, masking, sink_seen, body_seen):
    """Return which tokens of run i are seen, of the sink or of the body."""
    in_sink = i < runs.num_sinks
    seen = token < tl.where(in_sink, sink_seen[1], body_seen[1])
    if masking.windows.body is not None:
        seen &= token >= tl.where(in_sink, sink_seen[0], body_seen[0])
    return seen


@triton.jit
def attend_raw_once(
    state,
    planes,
    q_factor,
    masking,
    raw,
    table_ptr,
    runs,
    sink_seen,
    body_seen,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state of one query token by runs of PLAN.units.raw_block raw tokens of one kv head, at least one.

    Query heads are rows, in two terms each (`operands`). sink_seen and body_seen say from which token on, and up to which,
    those of the sink and of the body are seen, at least one in every run; without a window from the first token on.
    """
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_R: tl.constexpr = PLAN.units.raw_block
    FIELDS: tl.constexpr = PLAN.k_fields
    OPERAND: tl.constexpr = PLAN.raw_operand
    terms, unit = raw_query(planes, LAYOUT, FIELDS, OPERAND)
    q_factor = q_factor * unit
    byte = tl.arange(0, planes[0].shape[1])
    offs_d = tl.arange(0, state.acc.shape[1])
    count = runs.num_sinks + runs.num_tails
    num_columns = runs.num_sink_pages + runs.num_tail_slots
    start, column = run_of(0, runs, G, BLOCK_R)
    page = load_page_id(table_ptr, column, num_columns, PLAN.ptx)
    for i in tl.range(0, count, num_stages=PLAN.num_stages):
        page_ptr = raw.ptr + page.to(tl.int64) * raw.stride_page
        next_start, column = run_of(i + 1, runs, G, BLOCK_R)
        page = load_page_id(table_ptr, column, num_columns, PLAN.ptx)
        offs_t = tl.arange(0, BLOCK_R)
        valid = seen_of_run(i, start + offs_t, runs, masking, sink_seen, body_seen)
        place = (start % G + offs_t) * raw.stride_token
        product = tl.zeros((terms[0].shape[0], BLOCK_R), tl.float32)
        for f in tl.static_range(FIELDS):
            channel, mask = plane_channels(f, LAYOUT, FIELDS, byte)
            keys = tl.load(page_ptr + place[None, :] + channel[:, None], valid[None, :] & mask[:, None], other=0.0)
            product = tl.dot(terms[f], keys.to(OPERAND), product, input_precision="ieee")
        scores = weighed(sum_of_terms(product) * q_factor[:, None], masking)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        weights, alpha, m, l_sum = advance(state, scores, True)
        mask = valid[:, None] & (offs_d < LAYOUT.v_head_dim)[None, :]
        values = tl.load(page_ptr + raw.stride_half + place[:, None] + offs_d[None, :], mask, other=0.0)
        product = tl.dot(two_terms(weights, OPERAND, False), values.to(OPERAND), input_precision="ieee")
        state = State(state.acc * alpha[:, None] + sum_of_terms(product), m, l_sum)
        start = next_start
    return state


@triton.jit
def num_raw_units(first, last):
    """Return how many units of RAW_UNIT tokens the raw tokens `first` to `last` are."""
    return tl.cdiv(tl.maximum(last - first, 0), RAW_UNIT)


@triton.jit
def attend_raw_units(
    state,
    q,
    q_factor,
    masking,
    raw,
    table_ptr,
    columns,
    share,
    spans,
    positions,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state of a tile of queries by raw units share[0] to share[1] of one kv head: of the sink, then of the tail.

    `columns` of the raw table are those of sinks and those of the tail. `spans` of both are the tokens that some query sees,
    (first, last), counted from the start of the sequence and of the body; `positions` [rows] of the queries are counted so
    too.
    """
    before = 0
    for part in tl.static_range(2):
        first, last = spans[part]
        units = num_raw_units(first, last)
        first_of_part = tl.minimum(tl.maximum(share[0] - before, 0), units)
        last_of_part = tl.minimum(share[1] - before, units)
        end = tl.where(first_of_part < last_of_part, tl.minimum(first + last_of_part * RAW_UNIT, last), 0)
        state = _attend_raw_run(
            state, q, q_factor, masking, raw, table_ptr, (columns[0] * part, tl.maximum(columns[part], 1)),
            (first + first_of_part * RAW_UNIT, end), positions[part], masking.windows[part], LAYOUT, PLAN,
        )  # fmt: skip
        before += units
    return state


@triton.jit
def _attend_raw_run(
    state,
    q,
    q_factor,
    masking,
    raw,
    table_ptr,
    columns,
    span,
    position,
    window,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state by raw tokens span[0] to span[1] of one kv head.

    Token t is in page t // page_size of the sink or of the body, whose id is in column columns[0] + page % columns[1] of the
    raw table. `position` [rows] counts as tokens do.
    """
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_R: tl.constexpr = PLAN.block_r
    OPERAND: tl.constexpr = PLAN.raw_operand
    first_column, num_columns = columns
    first, last = span
    channel, mask_c = channel_in_order(tl.arange(0, q.shape[1]), q.shape[1] // PLAN.k_fields, LAYOUT, PLAN.k_fields)
    offs_d = tl.arange(0, state.acc.shape[1])
    offs_t = tl.arange(0, BLOCK_R)
    for start in tl.range(first // BLOCK_R * BLOCK_R, last, BLOCK_R, num_stages=PLAN.token_stages):
        page = load_page_id(table_ptr, first_column + start // G % num_columns, first_column + num_columns, PLAN.ptx)
        page_ptr = raw.ptr + page.to(tl.int64) * raw.stride_page
        token = start + offs_t
        valid = (token >= first) & (token < last)
        place = (start % G + offs_t) * raw.stride_token
        state = _attend_step(
            state, q, q_factor, masking,
            (page_ptr + place[None, :] + channel[:, None], page_ptr + raw.stride_half + place[:, None] + offs_d[None, :]),
            (valid[None, :] & mask_c[:, None], valid[:, None] & (offs_d < LAYOUT.v_head_dim)[None, :]),
            token, valid, True, position, position, window, None, OPERAND,
        )  # fmt: skip
    return state


@triton.jit
def _attend_step(
    state,
    q,
    q_factor,
    masking,
    ptrs,
    masks,
    token,
    valid,
    hidden,
    newest,
    position,
    window,
    sink_end,
    OPERAND: tl.constexpr,
):
    """Advance the state by tokens whose keys are at ptrs[0] [channels, tokens] and values at ptrs[1] [tokens, channels].

    Masks of loads, and `valid` [tokens] or [rows, tokens], may be None. Only where `hidden` some token may be newer than
    `newest` [rows], too old for the window of a query at `position` [rows], or not valid. Tokens before `sink_end` are of the
    sink. Both may be None.
    """
    k_mask, v_mask = masks
    keys = tl.load(ptrs[0], k_mask, other=None if k_mask is None else 0.0)
    scores = weighed(tl.dot(q.to(OPERAND), keys.to(OPERAND), input_precision="ieee") * q_factor, masking)
    if hidden:
        seen = token[None, :] <= newest[:, None]
        if valid is not None:
            seen = seen & (valid[None, :] if len(valid.shape) == 1 else valid)
        if window is not None:
            seen = seen & recent(token, position, window, masking.windows, sink_end)
        scores = tl.where(seen, scores, float("-inf"))
    weights, alpha, m, l_sum = advance(state, scores, False)
    values = tl.load(ptrs[1], v_mask, other=None if v_mask is None else 0.0)
    acc = tl.dot(weights.to(OPERAND), values.to(OPERAND), state.acc * alpha[:, None], input_precision="ieee")
    return State(acc, m, l_sum)


@triton.jit
def attend_scratch(
    state,
    q,
    q_factor,
    masking,
    expanded,
    span,
    num_valid,
    queries,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state of a tile of queries by tokens span[0] to span[1] of the body, dequantized.

    `expanded` are scratch memory of one kv head, and the slot of page 0. The other arguments are those of
    `pages.attend_pages`. Channels of `q` are in order.
    """
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_T: tl.constexpr = PLAN.block_t
    position, first_position, last_position = queries
    scratch, slot = expanded
    offs_k = tl.arange(0, q.shape[1])[:, None]
    offs_v = tl.arange(0, state.acc.shape[1])[None, :]
    offs_t = tl.arange(0, BLOCK_T)
    k_mask: tl.constexpr = None
    v_mask: tl.constexpr = None
    if q.shape[1] != LAYOUT.head_dim:
        k_mask = offs_k < LAYOUT.head_dim
    if state.acc.shape[1] != LAYOUT.v_head_dim:
        v_mask = offs_v < LAYOUT.v_head_dim
    newest = tl.minimum(position, num_valid - 1)
    OPERAND: tl.constexpr = PLAN.scratch_operand
    window = masking.windows.body
    q = q.to(OPERAND)
    for start in tl.range(span[0], tl.minimum(span[1], num_valid), BLOCK_T, num_stages=PLAN.token_stages):
        page_ptr = scratch.ptr + (slot + start // G) * scratch.stride_page
        place = (start % G + offs_t) * scratch.stride_token
        hidden = start + BLOCK_T > tl.minimum(num_valid, first_position + 1)
        if window is not None:
            hidden = hidden | hides(window, start, last_position)
        state = _attend_step(
            state, q, q_factor, masking,
            (page_ptr + place[None, :] + offs_k, page_ptr + scratch.stride_half + place[:, None] + offs_v), (k_mask, v_mask),
            start + offs_t, None, hidden, newest, position, window, None, OPERAND,
        )  # fmt: skip
    return state


@triton.jit
def attend_new(
    state,
    q,
    masking,
    k,
    v,
    span,
    queries,
    sink_end,
    reach,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state of a tile of queries by new tokens span[0] to span[1] of one sequence and kv head.

    Neither they nor `q` [rows, channels] are rotated. `queries` are as in `pages.attend_pages`, but count new tokens. Those
    before `sink_end` are of the sink. `reach` is what queries see (`masking.reach_of`); None: those up to their own.
    """
    BLOCK_R: tl.constexpr = PLAN.block_r
    position, first_position, last_position = queries
    offs_k = tl.arange(0, q.shape[1])[:, None]
    offs_v = tl.arange(0, state.acc.shape[1])[None, :]
    offs_t = tl.arange(0, BLOCK_R)
    k_mask: tl.constexpr = None
    v_mask: tl.constexpr = None
    if q.shape[1] != LAYOUT.head_dim:
        k_mask = offs_k < LAYOUT.head_dim
    if state.acc.shape[1] != LAYOUT.v_head_dim:
        v_mask = offs_v < LAYOUT.v_head_dim
    first, last = span
    newest = tl.minimum(position, last - 1)
    if reach is not None:
        words, ends = reach
        newest = ends - 1
        position = tl.where(words != 0, 0, position)  # no window hides what a word shows
    window = masking.windows.body
    for start in tl.range(first, last, BLOCK_R, num_stages=PLAN.token_stages):
        # Past the last token that some query sees, it is loaded again.
        place = tl.minimum(start + offs_t, last - 1).to(tl.int64)
        hidden = start + BLOCK_R > tl.minimum(last, first_position + 1)
        if window is not None:
            hidden = hidden | hides(window, start, last_position)
        valid = None
        if masking.among.tree_mask is not None:
            valid = shown(words, place)
        state = _attend_step(
            state, q, masking.scores.scale, masking,
            (k.ptr + place[None, :] * k.stride_token + offs_k, v.ptr + place[:, None] * v.stride_token + offs_v),
            (k_mask, v_mask), start + offs_t, valid, hidden, newest, position, window, sink_end, q.dtype,
        )  # fmt: skip
    return state
