"""The softmax that is computed as tokens come, and its state. Scores are kept times log2(e), in base 2.

The state of a row is the largest score so far, m, and the sums relative to it: of weights, l, and of weighted values, acc
(Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..tile.arithmetic import scaled


class State(NamedTuple):
    """What rows of queries have attended to."""

    acc: tl.tensor  # float32 [rows, channels]
    m: tl.tensor  # float32 [rows], base 2
    l: tl.tensor  # float32 [rows]  # noqa: E741


@triton.jit
def new_state(ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the state of rows that have attended to nothing."""
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    return State(tl.zeros((ROWS, CHANNELS), tl.float32), m, tl.zeros((ROWS,), tl.float32))


@triton.jit
def advance(state, scores, FINITE: tl.constexpr):
    """Return the weights [rows, tokens] of scores, the factor of what was summed before, and the new m and l.

    A row may have no finite score yet, and its weights are 0, unless FINITE.
    """
    m = tl.maximum(state.m, tl.max(scores, axis=1))
    origin = m
    if not FINITE:
        origin = tl.where(m == float("-inf"), 0.0, m)
    alpha = tl.exp2(state.m - origin)
    weights = tl.exp2(scores - origin[:, None])
    return weights, alpha, m, state.l * alpha + tl.sum(weights, axis=1)


@triton.jit
def factors_of_part(state, m_part):
    """Return the factors of what was summed before and of a part with a largest score of its own, and the new m."""
    m = tl.maximum(state.m, m_part)
    alpha = tl.exp2(state.m - m)
    beta = tl.exp2(m_part - m)
    return alpha, beta, m


@triton.jit
def log_sum_exp(state):
    """Return the log-sum-exp of each row, base 2."""
    return state.m + tl.log2(state.l)


@triton.jit
def with_sink(out, lse, logit):
    """Return results `out` [rows, channels] and `lse` [rows] with one more token each, of this logit and no value; base 2.

    A logit of infinity takes all weight; one of -infinity none. Of the two equal numbers one can be infinite, hence `where`.
    """
    top = tl.maximum(lse, logit)
    weight = tl.where(lse == top, 1.0, tl.exp2(lse - top))
    total = weight + tl.where((logit == top) & (logit > float("-inf")), 1.0, tl.exp2(logit - top))
    total = tl.where(top == float("-inf"), 1.0, total)
    return scaled(out, weight / total), top + tl.log2(total)
