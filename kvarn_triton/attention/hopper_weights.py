"""Weights of `hopper_drafts`: from products of 128 tokens, in two tiles of 64 rows, to the operand that meets values.

The largest score of a row, a column of products, is that of all lanes and warps; sums of weights stay in threads until the end.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .hopper_numbers import products_layout


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
def _largest(scores, memory):
    """Return the largest score of each row [rows], in the layout of a column of products."""
    ROWS: gl.constexpr = scores[0].shape[1]
    top = gl.max(gl.max(in_threads(gl.maximum(scores[0], scores[1])), 1), 1)
    memory.store(gl.reshape(top, (4 * ROWS,)))
    found = gl.max(gl.reshape(memory.load(_maxima_layout(ROWS)), (4, ROWS)), 0)
    return gl.convert_layout(found, gl.SliceLayout(0, products_layout(ROWS)))


@gluon.jit
def weigh(scores, m, state, maxima, weights, VF: gl.constexpr):
    """Put the weights of a page into shared memory, in the order of planes of values: `registers.token_in_order`.

    Returns the factor of what was summed before, and the new m and sums of weights [4, 8, rows] of each thread.
    """
    ROWS: gl.constexpr = scores[0].shape[1]
    m_new = gl.maximum(m, _largest(scores, maxima))
    origin = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m - origin)
    low, high = gl.exp2(scores[0] - origin[None, :]), gl.exp2(scores[1] - origin[None, :])
    WIDE: gl.constexpr = state.type.layout
    kept = gl.convert_layout(alpha, gl.SliceLayout(0, gl.SliceLayout(1, WIDE)))[None, None, :]
    state = state * kept + gl.sum(in_threads(low + high), 1)
    both = gl.permute(gl.join(low.to(gl.float16), high.to(gl.float16)), (2, 0, 1))
    both = gl.permute(gl.reshape(both, (VF, 64 // VF, 2, ROWS)), (0, 2, 1, 3))
    weights.store(gl.reshape(both, (128, ROWS)))
    return alpha, m_new, state
