"""Tiles of query rows of prefill attention: which rows they are, and where their results go."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..masking import MOST_DRAFTS, first_of_sink, num_bits, words_of
from ..tile.arithmetic import LOG2E, hadamard, scaled, store_rows
from .merge import LN2
from .schedule import free_token, share_of_tile
from .softmax import log_sum_exp, with_sink
from .tokens import num_raw_units


class Tile(NamedTuple):
    """Consecutive query rows of one sequence and kv head; rows past the last one have a mask of 0."""

    row_start: tl.tensor  # query token of the call at which the sequence starts
    num_tokens: tl.tensor  # query tokens of the sequence
    first_query: tl.tensor  # of them, the one of the first row
    last_query: tl.tensor  # of them, the one of the last row
    query: tl.tensor  # of each row
    token: tl.tensor  # query token of the call, int64, of each row
    q_head: tl.tensor  # of each row
    mask: tl.tensor


@triton.jit
def tile_of(cu_seqlens_ptr, row, number, head, masking, PLAN: tl.constexpr):
    """Return tile `number` of a row and kv head.

    With a window, a token with a word of a tree mask is at its place on its path; the first and the last query are then bounds
    of those places.
    """
    row_start = tl.load(cu_seqlens_ptr + row)
    num_tokens = tl.load(cu_seqlens_ptr + row + 1) - row_start
    first_row = number * PLAN.block_m
    num_rows = tl.minimum(num_tokens * PLAN.group - first_row, PLAN.block_m)
    offs_m = tl.arange(0, PLAN.block_m)
    query = (first_row + offs_m) // PLAN.group
    q_head = head * PLAN.group + (first_row + offs_m) % PLAN.group
    last_query = (first_row + num_rows - 1) // PLAN.group
    token = (row_start + query).to(tl.int64)
    first_query = first_row // PLAN.group
    mask = offs_m < num_rows
    if masking.windows.body is not None and masking.among.tree_mask is not None:
        words = words_of(masking.among.tree_mask, token, mask, num_tokens)
        query = tl.where(words != 0, num_bits(words) - 1, query)
        first_query = tl.where(num_tokens <= MOST_DRAFTS, 0, first_query)
        last_query = tl.where(num_tokens <= MOST_DRAFTS, num_tokens - 1, last_query)
    return Tile(row_start, num_tokens, first_query, last_query, query, token, q_head, mask)


@triton.jit
def shares(split, num_splits, split_size, seen, sink_len, windows, RAW: tl.constexpr, LAYOUT: tl.constexpr):
    """Return (first, last) of what is seen of the sink and of the tail, and a program's share of raw units and of pages."""
    spans = (
        (first_of_sink(seen.oldest + sink_len, windows), tl.minimum(seen.num_valid + sink_len, sink_len)),
        (tl.maximum(seen.oldest, seen.quantized * LAYOUT.page_size), seen.num_valid),
    )
    num_raw = 0
    if RAW:
        num_raw = num_raw_units(spans[0][0], spans[0][1]) + num_raw_units(spans[1][0], spans[1][1])
    raw_share, span = share_of_tile(split, num_splits, split_size, num_raw, seen.first_page, seen.quantized)
    return spans, raw_share, span


@triton.jit
def store_results(
    out, lse_ptr, sinks_ptr, state, tile, tokens, split, num_q_heads, ROTATION: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Store the results of a tile, rotated back in blocks of ROTATION channels, or its partial results, as they are."""
    acc = scaled(state.acc, 1.0 / tl.where(state.l > 0, state.l, 1.0))
    lse = log_sum_exp(state)
    place = tile.token
    mask = tile.mask
    if PLAN.single:
        # The operations of a merge of one run, so that the bits are the same where the table has room for more.
        if sinks_ptr is not None:
            acc, lse = with_sink(acc, lse, tl.load(sinks_ptr + tile.q_head) * LOG2E)
        if ROTATION > 1:
            acc = hadamard(acc, ROTATION)
        lse = lse * LN2
    else:
        mask = mask & (place >= tokens[0]) & (place < tokens[1])
        place = split * (tokens[1] - tokens[0]).to(tl.int64) + place - tokens[0]
    store_rows(out.ptr, place * out.stride_token + tile.q_head.to(tl.int64) * out.stride_head, acc, mask, PLAN.v_head_dim)
    if lse_ptr is not None:
        tl.store(lse_ptr + place * num_q_heads + tile.q_head, lse, mask)


@triton.jit
def store_free_rows(
    out, lse_ptr, cu_seqlens_ptr, batch, number, head, tokens, num_q_heads, fill, PLAN: tl.constexpr
):  # fmt: skip
    """Store the results of rows of no sequence, those of tokens from tokens[0] to tokens[1].

    There are as many programs without a tile as it takes to give each of those rows to one of them.
    """
    BLOCK_M: tl.constexpr = PLAN.block_m
    V_CHANNELS: tl.constexpr = PLAN.v_channels
    free = number * BLOCK_M + tl.arange(0, BLOCK_M)
    first, end = tl.load(cu_seqlens_ptr), tl.load(cu_seqlens_ptr + batch)
    before = tl.minimum(tokens[0], first) + tl.maximum(tokens[0] - end, 0)
    place = free_token(cu_seqlens_ptr, batch, before + free // PLAN.group).to(tl.int64)
    q_head = (head * PLAN.group + free % PLAN.group).to(tl.int64)
    mask = place < tokens[1]
    zeros = tl.zeros((BLOCK_M, V_CHANNELS), tl.float32)
    filled = mask & (tl.zeros_like(free) + fill != 0)
    store_rows(out.ptr, place * out.stride_token + q_head * out.stride_head, zeros, filled, PLAN.v_head_dim)
    if lse_ptr is not None:
        tl.store(lse_ptr + place * num_q_heads + q_head, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask)
