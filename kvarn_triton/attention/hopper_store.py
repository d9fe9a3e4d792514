"""What a warp group of `hopper` stores of its 64 rows: results, or partial ones, as `tiles.store_results` does."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..tile import arithmetic
from . import merge

HALF = gl.constexpr(64)
"""Query rows of a warp group: those of its product."""
_LOG2E = gl.constexpr(arithmetic.LOG2E.value)
_LN2 = gl.constexpr(merge.LN2.value)


@gluon.constexpr_function
def _layout_of_results(channels, single, sums):
    """Return the layout in which sums are stored: as they are, or as results of 16 bits.

    Four threads have two neighbours of each of four groups of eight channels; of results each has one group.
    """
    if not single:
        return sums
    registers = [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]][: 2 + channels.bit_length() - 4]
    lanes, warps = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [HALF.value, channels])


@gluon.jit
def _with_sink(lse, logit):
    """Return the factor of results, and the log-sum-exp, with one token more, of this logit and no value (`softmax`)."""
    top = gl.maximum(lse, logit)
    weight = gl.where(lse == top, 1.0, gl.exp2(lse - top))
    total = weight + gl.where((logit == top) & (logit > float("-inf")), 1.0, gl.exp2(logit - top))
    total = gl.where(top == float("-inf"), 1.0, total)
    return weight / total, top + gl.log2(total)


@gluon.jit
def store_results(acc, m, l_sum, results, tile, head, GROUP: gl.constexpr, SINGLE: gl.constexpr):
    """Store the results of a state. `results`: where to, sinks, where the tokens of the launch are, and how many heads."""
    out, lse_ptr, sinks_ptr, tokens, num_q_heads = results
    first_token, first_row, num_rows = tile
    CHANNELS: gl.constexpr = acc.shape[1]
    SUMS: gl.constexpr = acc.type.layout
    row = gl.arange(0, HALF, m.type.layout)
    token = (first_token + (first_row + row) // GROUP).to(gl.int64)
    q_head = head * GROUP + (first_row + row) % GROUP
    mask = row < num_rows
    factor = 1.0 / gl.where(l_sum > 0, l_sum, 1.0)
    lse = m + gl.log2(l_sum)
    LAYOUT: gl.constexpr = _layout_of_results(CHANNELS, SINGLE, SUMS)
    if SINGLE:
        if sinks_ptr is not None:
            weight, lse = _with_sink(lse, gl.load(sinks_ptr + q_head, mask, other=float("-inf")) * _LOG2E)
            factor = factor * weight
        lse = lse * _LN2
    else:
        offset, first, end = tokens
        mask = mask & (token >= first) & (token < end)
        token += offset
    if lse_ptr is not None:
        gl.store(lse_ptr + token * num_q_heads + q_head, lse, mask)
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, SUMS))[:, None]
    x = gl.convert_layout(acc.to(out[0].dtype.element_ty), LAYOUT)
    place = gl.convert_layout(token * out[1] + q_head.to(gl.int64) * out[2], gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(0, LAYOUT))
    gl.store(out[0] + place[:, None] + channel[None, :], x, gl.convert_layout(mask, gl.SliceLayout(1, LAYOUT))[:, None])
