"""The loops over quantized pages of one sequence and kv head: an id, the scores of a page, its values.

A page is read in one of five forms: integers of 8 bits (`digits` and, of few heads, `columns`: one query token), as it is in
numbers of 16 bits (`halves`), dequantized in registers (`registers`: few rows), or dequantized through shared memory
(`dequantized`: many rows).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..masking import hides, visible, weighed
from ..paging import ids_of_row, load_page_id
from .columns import add_column_values, column_scores, spread_rows
from .dequantized import LEAST_UNIT, add_dequantized_values, dequantized_scores
from .digits import add_digit_values, digit_scores
from .halves import add_half_values, half_scores
from .operands import split_planes
from .registers import add_register_values, register_scores, token_in_order
from .softmax import State


class Records(NamedTuple):
    """The quantized pages of one sequence and kv head."""

    ptr: tl.tensor  # of the record of page 0
    ids_ptr: tl.tensor  # of the id of body page 0
    stride_page: tl.tensor


@triton.jit
def records_of(pages, head, table_ptr, indptr_ptr, row, stride_table):
    """Return the quantized pages of a row and kv head."""
    ids_ptr = ids_of_row(table_ptr, indptr_ptr, row, stride_table)
    return Records(pages.ptr + head.to(tl.int64) * pages.stride_head, ids_ptr, pages.stride_page)


@triton.jit
def attend_pages_once(
    state,
    planes,
    q_factor,
    masking,
    records,
    page,
    span,
    seen,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state of one query token by body pages span[0] to span[1], whose first has id `page`.

    Tokens seen[0] to seen[1] of the body are seen, at least one in every page; without a window from the first token on.
    """
    G: tl.constexpr = LAYOUT.page_size
    first_seen, num_valid = seen
    for i in tl.range(span[0], tl.minimum(span[1], tl.cdiv(num_valid, G)), num_stages=PLAN.num_stages):
        record_ptr = records.ptr + page.to(tl.int64) * records.stride_page
        page = load_page_id(records.ids_ptr, i + 1, span[1], PLAN.ptx)
        token = tl.arange(0, G)
        if PLAN.columns:
            token = spread_rows(token)
            scores = column_scores(record_ptr, planes, q_factor, LAYOUT, PLAN)
        else:
            scores = digit_scores(record_ptr, planes, q_factor, LAYOUT, PLAN)
        scores = weighed(scores, masking)
        params = tl.load((record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32)) + token)
        at_edge = (i + 1) * G > num_valid
        if masking.windows.body is not None:
            at_edge |= i * G < first_seen
        if at_edge:
            valid = i * G + token < num_valid
            if masking.windows.body is not None:
                valid &= i * G + token >= first_seen
            if PLAN.columns:
                scores = tl.where(valid[:, None], scores, float("-inf"))
            else:
                scores = tl.where(valid[None, :], scores, float("-inf"))
            params = tl.where(valid, params, 0)  # a token that isn't seen may be of any magnitude, or not a number
        if PLAN.columns:
            state = add_column_values(state, scores, params, record_ptr, LAYOUT, PLAN)
        else:
            state = add_digit_values(state, scores, params, record_ptr, LAYOUT, PLAN)
    return state


@triton.jit
def attend_pages(
    state,
    q,
    q_factor,
    masking,
    records,
    span,
    num_valid,
    queries,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Advance the state of a tile of queries by body pages span[0] to span[1], of whose tokens num_valid count.

    `queries` are the positions [rows] of the queries within the body, the first and the last of them. PLAN.block_d channels of
    values are multiplied at once, unless they are dequantized. `q` are planes (`query.rotate_planes`) in the form "registers".
    """
    G: tl.constexpr = LAYOUT.page_size
    position, first_position, last_position = queries
    unit = tl.full((), LEAST_UNIT, tl.float32)
    planes = q
    column = tl.arange(0, G)
    if PLAN.form == "registers":
        column = token_in_order(column, LAYOUT, PLAN.v_fields)
    elif PLAN.form == "folded":
        planes = split_planes(q, PLAN.k_fields)
    page = tl.zeros((), tl.int32)
    if span[0] < span[1]:
        page = load_page_id(records.ids_ptr, span[0], span[1], PLAN.ptx)
    for i in tl.range(span[0], span[1], num_stages=PLAN.num_stages):
        record_ptr = records.ptr + page.to(tl.int64) * records.stride_page
        page = load_page_id(records.ids_ptr, i + 1, span[1], PLAN.ptx)
        if PLAN.form == "registers":
            scores = register_scores(record_ptr, planes, q_factor, LAYOUT, PLAN)
        elif PLAN.form == "folded":
            factor = tl.full((state.acc.shape[0],), 1.0, tl.float32) * q_factor
            scores = half_scores(record_ptr, planes, factor, LAYOUT, PLAN)
        else:
            scores = dequantized_scores(record_ptr, q, q_factor, LAYOUT, PLAN)
        scores = weighed(scores, masking)
        hidden = (i + 1) * G > tl.minimum(num_valid, first_position + 1)
        if masking.windows.body is not None:
            hidden = hidden | hides(masking.windows.body, i * G, last_position)
        if hidden:
            key = i * G + column
            seen = visible(position, key, masking.windows.body) & (key < num_valid)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        if PLAN.form == "registers":
            state = add_register_values(state, scores, record_ptr, LAYOUT, PLAN)
        elif PLAN.form == "folded":
            state = add_half_values(state, scores, record_ptr, LAYOUT, PLAN)
        else:
            state, unit = add_dequantized_values(state, unit, scores, record_ptr, LAYOUT, PLAN)
    if PLAN.form == "dequantized":
        state = State(state.acc * unit, state.m, state.l)
    return state
