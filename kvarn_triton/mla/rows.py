"""A tile of query rows of latent attention, and what every kernel does with it: scores, softmax, sums, results.

A block of tokens is an operand of two products on the tensor cores: with the queries (scores) and with the weights (values).

A token is x * norm * gain, its score s. Weights are relative to the largest 2**s * gain so far, gain being a power of two of
the whole page: one exponential serves both sums, and no magnitude of a page leaves float16.

    p = 2**(s - m) * gain        acc = sum p * norm * x        l = sum p / gain        out = acc / l        lse = m + log2(l)
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..mla_layout import LATENT_DIM, ROPE_DIM
from ..tile.arithmetic import exponent_of, fma, power_of_two

LATENTS = tl.constexpr(LATENT_DIM)
ROPE = tl.constexpr(ROPE_DIM)
LEAST_EXPONENT = tl.constexpr(-100)
"""Least exponent of a gain, the encoder's own, as weights have it: that of pages of zero bytes has to have an inverse, too."""


class Queries(NamedTuple):
    """A tile of query rows."""

    planes: tuple  # float16 [rows, channels], one of each plane
    rope: tl.tensor  # float16 [rows, 64]
    factor: tl.tensor  # float32 [rows], of scores
    index: tl.tensor  # int32 [rows], of the query token in its sequence's


class Rows(NamedTuple):
    """The state of a tile of query rows."""

    acc: tuple  # float32 [rows, channels], one of each plane
    m: tl.tensor  # float32 [rows], base 2
    l: tl.tensor  # float32 [rows]  # noqa: E741


@triton.jit
def load_planes(x_ptr, place, mask, PLANES: tl.constexpr):
    """Return rows of 512 numbers at some places [rows, 1] as planes [rows, channels]; those outside of the mask are 0."""
    CHANNELS: tl.constexpr = LATENTS // PLANES
    offs_c = tl.arange(0, CHANNELS)
    planes = ()
    for plane in tl.static_range(PLANES):
        planes = planes + (tl.load(x_ptr + plane * CHANNELS + place + offs_c[None, :], mask, other=0.0),)
    return planes


@triton.jit
def load_queries(q_ptr, factor_ptr, place, row, mask, num_heads, PLANES: tl.constexpr):
    """Return the queries of a tile of rows."""
    start = (place * (LATENTS + ROPE))[:, None]
    rope = tl.load(q_ptr + LATENTS + start + tl.arange(0, ROPE)[None, :], mask[:, None], other=0.0)
    factor = tl.load(factor_ptr + place, mask, other=0.0)
    return Queries(load_planes(q_ptr, start, mask[:, None], PLANES), rope, factor, row // num_heads)


@triton.jit
def scores_of(queries, planes, rope, size):
    """Return the scores [rows, tokens] of tokens, of whose latents `size` [tokens] is the length.

    No product continues another one's sum: for one that does, Triton gives all warps the same rows.
    """
    scores = tl.dot(queries.rope, tl.trans(rope))
    sizes = tl.broadcast_to(size[None, :], scores.shape)
    for plane in tl.static_range(len(planes)):
        scores = fma(tl.dot(queries.planes[plane], tl.trans(planes[plane])), sizes, scores)
    return scores * queries.factor[:, None]


@triton.jit
def masked(scores, queries, token, first_seen):
    """Return scores of which those of tokens that a row doesn't see are -inf.

    Behind a branch Triton shares the rows of products of warp groups out, too; small tiles spill registers there.
    """
    if scores.shape[0] < 64 or tl.max(token, axis=0) > first_seen:
        scores = tl.where(token[None, :] <= (first_seen + queries.index)[:, None], scores, float("-inf"))
    return scores


@triton.jit
def advance(state, scores, norm, gain, planes):
    """Return the state of rows after tokens with these scores, norms and numbers; norm None: all norms and gains are 1.

    The gain is that of the page of all tokens, or one for each token.
    """
    exponent = 0
    if norm is not None:
        exponent = tl.maximum(exponent_of(gain) - 1, LEAST_EXPONENT)
        if gain.type.is_block():
            scores += exponent.to(tl.float32)[None, :]
            inverse = power_of_two(-exponent)[None, :]
            exponent = 0
    m = tl.maximum(state.m, tl.max(scores, axis=1) + exponent)
    origin = tl.where(m == float("-inf"), 0.0, m)  # rows that see nothing yet
    alpha = tl.exp2(state.m - origin)
    weights = tl.exp2(scores - (origin - exponent)[:, None])
    if norm is None:
        total = tl.sum(weights, axis=1)
    elif gain.type.is_block():
        total = tl.sum(weights * inverse, axis=1)
        weights *= norm[None, :]
    else:
        total = tl.sum(weights, axis=1)
        weights *= norm[None, :]
        total *= power_of_two(-exponent)
    operand = weights.to(tl.float16)
    acc = ()
    for plane in tl.static_range(len(planes)):
        acc = acc + (tl.dot(operand, planes[plane], state.acc[plane] * alpha[:, None]),)
    return Rows(acc, m, state.l * alpha + total)


@triton.jit
def new_rows(ROWS: tl.constexpr, PLANES: tl.constexpr):
    """Return the state of rows that have attended to nothing."""
    acc = ()
    for _ in tl.static_range(PLANES):
        acc = acc + (tl.zeros((ROWS, LATENTS // PLANES), tl.float32),)
    return Rows(acc, tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32))


@triton.jit
def store_rows(out_ptr, lse_ptr, place, mask, state, PLANES: tl.constexpr):
    """Store the results of rows [rows] to their places."""
    CHANNELS: tl.constexpr = LATENTS // PLANES
    offs_c = tl.arange(0, CHANNELS)[None, :]
    inverse = tl.fdiv(1.0, tl.where(state.l > 0, state.l, 1.0))
    for plane in tl.static_range(PLANES):
        part_ptr = out_ptr + plane * CHANNELS + place[:, None] * LATENTS
        tl.store(part_ptr + offs_c, state.acc[plane] * inverse[:, None], mask[:, None])
    tl.store(lse_ptr + place, state.m + tl.log2(state.l), mask)
