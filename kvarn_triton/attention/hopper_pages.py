"""Quantized pages of `hopper_drafts`: a ring of slots in shared memory that the accelerator fills, and the loop over them.

The four warps meet three or four times for each page. Parameters of the next page's keys are prepared while products with the
values of this one run.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from ..tile.gluon import barrier, copy_tile
from .hopper_numbers import (
    load_gain,
    load_items,
    load_words,
    multiply,
    products_layout,
    store_norms,
    store_params,
)
from .hopper_weights import weigh_page
from .registers import headroom

EARLY_ROWS = gl.constexpr(16)
"""Rows of tiles that copy a page before the products with keys; larger ones after them, which takes fewer registers."""


@gluon.jit
def _load_id(ids_ptr, i, span):
    """Load the id of page i of a share, or of its last one. An id below 0 becomes 0: that of a page which exists."""
    return gl.maximum(gl.load(ids_ptr + gl.minimum(span[0] + i, span[1] - 1), span[0] < span[1], other=0), 0)


@gluon.jit
def _expect(i, count, descs, full):
    """Say that page i of a share will come."""
    BYTES: gl.constexpr = descs[0].block_type.nbytes + (0 if descs[1] is None else descs[1].block_type.nbytes)
    mbarrier.expect(full.index(i % full.shape[0]), BYTES, pred=i < count)


@gluon.jit
def _copy(i, count, page, head, descs, memory, full):
    """Begin to copy page i of a share into its slot."""
    slot = i % full.shape[0]
    copy_tile(descs[0], [page, head, 0, 0], full.index(slot), memory[0].index(slot), pred=i < count)
    if descs[1] is not None:
        copy_tile(descs[1], [page, head, 0, 0], full.index(slot), memory[1].index(slot), pred=i < count)


@gluon.jit
def copy_first(ids_ptr, span, head, descs, memory, full):
    """Begin to copy the first pages of a share, into all slots but the last."""
    for i in gl.static_range(full.shape[0] - 1):
        _expect(i, span[1] - span[0], descs, full)
        _copy(i, span[1] - span[0], _load_id(ids_ptr, i, span), head, descs, memory, full)


@gluon.jit
def _lines(memory, i):
    """Return a page as lines of 64 words, and what its parameters are in, which may be the same."""
    slot = i % memory[0].shape[0]
    lines = memory[0].index(slot).reshape((memory[0].shape[3], 64))
    items = lines
    if len(memory) > 1:
        items = memory[1].index(slot).reshape((16, 64))
    return lines, items


@gluon.jit
def _masked(scores, end):
    """Return the scores of a page, -inf where a row does not see a token: those before `end` [rows]."""
    token = gl.arange(0, 64, gl.SliceLayout(1, scores[0].type.layout))[:, None]
    low = gl.where(token < end[None, :], scores[0], float("-inf"))
    return low, gl.where(token + 64 < end[None, :], scores[1], float("-inf"))


@gluon.jit
def _prepare_keys(items, q_factor, params, norms, LAYOUT: gl.constexpr, FIRST: gl.constexpr):
    """Put the parameters of a page's keys, and their norms times all that is a factor of scores, into shared memory."""
    keys, _, found = load_items(items, FIRST)
    store_params(keys, params, 8 // LAYOUT.k_bits, LAYOUT.k_bits)
    store_norms(found, load_gain(items, 0, FIRST) * q_factor, norms)


@gluon.jit
def attend_pages(share, pages, queries, found, vectors, LAYOUT: gl.constexpr, ROWS: gl.constexpr):
    """Advance the state of a tile by a share of pages: sums of 64 channels each, m, and totals of weights of each thread."""
    ids_ptr, span, head, whole, ends = share
    descs, memory, full = pages
    queries, q_factor = queries
    acc, m, totals = found
    KF: gl.constexpr = 8 // LAYOUT.k_bits
    VF: gl.constexpr = 8 // LAYOUT.v_bits
    VALUES: gl.constexpr = LAYOUT.v_codes_offset // 128
    FIRST: gl.constexpr = 0 if len(memory) > 1 else LAYOUT.k_params_offset // 128
    PRODUCTS: gl.constexpr = products_layout(ROWS)
    TOKENS: gl.constexpr = gl.SliceLayout(1, PRODUCTS)
    AHEAD: gl.constexpr = memory[0].shape[0] - 1
    k_params, v_params, k_norms, v_norms, maxima, flags, weights = vectors
    none = gl.zeros((64, ROWS), gl.float32, PRODUCTS)
    count = span[1] - span[0]
    next_id = _load_id(ids_ptr, AHEAD, span)
    mbarrier.wait(full.index(0), 0)
    _prepare_keys(_lines(memory, 0)[1], q_factor, k_params, k_norms, LAYOUT, FIRST)
    if ROWS == EARLY_ROWS:
        _expect(AHEAD, count, descs, full)
    for i in range(count):
        lines, items = _lines(memory, i)
        words = load_words(lines, 0, 64 // KF, ROWS)
        if ROWS == EARLY_ROWS:
            barrier()  # all are past the page before
            _copy(i + AHEAD, count, next_id, head, descs, memory, full)
        products = multiply(words, k_params, queries, none, True, LAYOUT.k_bits, 1)
        norms = (k_norms.slice(0, 64).load(TOKENS), k_norms.slice(64, 64).load(TOKENS))
        products = warpgroup_mma_wait(0, products)
        if ROWS > EARLY_ROWS:
            _, v_items, v_norm = load_items(items, FIRST)
            v_gain = load_gain(items, 1, FIRST) * (1.0 / headroom(LAYOUT.v_bits))
            _expect(i + AHEAD, count, descs, full)
        scores = (products[0] * norms[0][:, None], products[1] * norms[1][:, None])
        if span[0] + i >= whole:
            scores = _masked(scores, ends - (span[0] + i) * 128)
        acc, m, totals = weigh_page(scores, (acc, m, totals), (maxima, flags, weights), VF)
        if ROWS > EARLY_ROWS:
            _copy(i + AHEAD, count, next_id, head, descs, memory, full)
        else:
            _, v_items, v_norm = load_items(items, FIRST)
            v_gain = load_gain(items, 1, FIRST) * (1.0 / headroom(LAYOUT.v_bits))
        store_params(v_items, v_params, VF, LAYOUT.v_bits)
        store_norms(v_norm, v_gain, v_norms)
        fence_async_shared()
        words = load_words(lines, VALUES, 64 // VF, ROWS)
        sums = multiply(words, v_params, weights, none, False, LAYOUT.v_bits, 2)
        norms = (v_norms.slice(128, 64).load(TOKENS), v_norms.slice(192, 64).load(TOKENS))
        next_id = _load_id(ids_ptr, i + 1 + AHEAD, span)
        if i + 1 < count:
            mbarrier.wait(full.index((i + 1) % (AHEAD + 1)), (i + 1) // (AHEAD + 1) & 1)
        _prepare_keys(_lines(memory, i + 1)[1], q_factor, k_params, k_norms, LAYOUT, FIRST)
        if ROWS == EARLY_ROWS:
            _expect(i + 1 + AHEAD, count, descs, full)
        sums = warpgroup_mma_wait(0, sums)
        acc = (
            gl.fma(sums[0], norms[0][:, None] + gl.zeros_like(none), acc[0]),
            gl.fma(sums[1], norms[1][:, None] + gl.zeros_like(none), acc[1]),
        )
    return acc, m, totals
