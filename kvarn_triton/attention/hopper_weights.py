"""Weights of `hopper_drafts`: from products, tiles of 64 tokens, to the operand that values are multiplied by.

The largest score of a row, a column of products, is that of all lanes and warps; sums of weights stay in threads until the end.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_numbers import products_layout

EXCESS = gl.constexpr(8)
"""Exponent of two by which weights may exceed 1: they are float16, and sums of 128 of them times values are float32."""
_FLAGS = gl.constexpr(gl.DistributedLinearLayout([[1], [2]], [[0]] * 5, [[0], [0]], [], [4]))
"""Layout in which a thread has what each warp found."""


@gluon.constexpr_function
def _maxima_layout(rows):
    """Return the layout of four warps' maxima [4 * rows] in which a thread has all of its columns."""
    registers = [[1], *([8 << i] for i in range(rows.bit_length() - 2))]
    return gl.DistributedLinearLayout(registers, [[2], [4], [0], [0], [0]], [[0], [0]], [], [4 * rows])


@gluon.jit
def in_threads(x):
    """Return a tile [64, rows] as [warps, rows of a thread, lanes, rows]."""
    return gl.reshape(x, (4, 2, 8, x.shape[1]))


@gluon.jit
def _advance(largest, m, totals, maxima):
    """Return what scores are relative to, the factor of what was summed before, the new m, and totals times that factor.

    `largest` [64, rows] are the largest scores of each thread's tokens. `maxima` is shared memory.
    """
    ROWS: gl.constexpr = largest.shape[1]
    top = gl.max(gl.max(in_threads(largest), 1), 1)
    maxima.store(gl.reshape(top, (4 * ROWS,)))
    found = gl.max(gl.reshape(maxima.load(_maxima_layout(ROWS)), (4, ROWS)), 0)
    m_new = gl.maximum(m, gl.convert_layout(found, gl.SliceLayout(0, products_layout(ROWS))))
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m - origin)
    WIDE: gl.constexpr = totals.type.layout
    kept = gl.convert_layout(alpha, gl.SliceLayout(0, gl.SliceLayout(1, WIDE)))[None, None, :]
    return origin, alpha, m_new, totals * kept


@gluon.jit
def _exceeds(largest, m, flags):
    """Return whether a score exceeds what scores are relative to by more than EXCESS. `flags` is shared memory."""
    top = gl.max(in_threads(largest), 1)
    limit = gl.convert_layout(m, gl.SliceLayout(0, gl.SliceLayout(1, top.type.layout)))[None, None, :] + EXCESS
    flags.store(gl.max(gl.reshape((top > limit).to(gl.int32), (4, top.shape[1] * top.shape[2])), 1))
    return gl.max(flags.load(_FLAGS), 0) > 0


@gluon.jit
def weigh_page(scores, found, memory, VF: gl.constexpr):
    """Put the weights of a page into shared memory, in the order of planes of values: `registers.token_in_order`.

    Returns the state of a tile (sums, m, totals of weights [4, 8, rows] of each thread), where m is a score that others exceed
    by EXCESS at most: what was summed before is multiplied only if a page has larger ones. `memory`: maxima, flags, weights.
    """
    acc, m, totals = found
    maxima, flags, weights = memory
    ROWS: gl.constexpr = scores[0].shape[1]
    largest = gl.maximum(scores[0], scores[1])
    if _exceeds(largest, m, flags):
        _, alpha, m, totals = _advance(largest, m, totals, maxima)
        acc = (acc[0] * alpha[None, :], acc[1] * alpha[None, :])
    origin = gl.where(m == float("-inf"), 0.0, m)
    low, high = gl.exp2(scores[0] - origin[None, :]), gl.exp2(scores[1] - origin[None, :])
    totals += gl.sum(in_threads(low + high), 1)
    both = gl.permute(gl.join(low.to(gl.float16), high.to(gl.float16)), (2, 0, 1))
    both = gl.permute(gl.reshape(both, (VF, 64 // VF, 2, ROWS)), (0, 2, 1, 3))
    weights.store(gl.reshape(both, (128, ROWS)))
    return acc, m, totals


@gluon.jit
def weigh_tokens(scores, m, totals, maxima, weights):
    """Do the same of 64 tokens in order, in the dtype of `weights`."""
    origin, alpha, m, totals = _advance(scores, m, totals, maxima)
    found = gl.exp2(scores - origin[None, :])
    totals += gl.sum(in_threads(found), 1)
    weights.store(found.to(weights.dtype))
    return alpha, m, totals
