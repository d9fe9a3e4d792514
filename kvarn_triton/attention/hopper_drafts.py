"""The kernel of `drafts` for compute capability 9.0: tiles of 16 or 32 query rows over whole quantized pages.

One warp group attends with a tile to a share of the pages that all its rows see. Tokens are the rows of the products with
queries, channels those of the products with weights, and query rows are columns, of which 16 are enough: products of warps
(`registers`) take four times as many instructions. Their left operands, numbers of keys and values, are made in registers
(`hopper_numbers`). The accelerator copies a page ahead, four programs of a multiprocessor hide what one waits for.

It is written in Gluon, because Triton does not keep such operands in registers, nor weights in an order of planes. Grid:
(program,), those of a tile next to each other. Bytes moved: each page once for each tile; partial results.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from ..launch import Rows, as_rows, on
from ..layout import PageLayout
from .hopper import barriers
from .hopper_numbers import (
    LINE,
    load_gain,
    load_items,
    load_words,
    multiply,
    products_layout,
    store_norms,
    store_params,
)
from .hopper_planes import find_tile, store_planes
from .hopper_weights import in_threads, weigh
from .prefill_plan import PrefillPlan
from .registers import headroom
from .schedule import Tiles

_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name until Triton 3.6
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # likewise
EARLY_ROWS = gl.constexpr(16)
"""Rows of tiles that copy a page before the products with keys; larger ones after them, which takes fewer registers."""


@gluon.jit
def _share(lengths, row, split, num_splits, sink_len, APART: gl.constexpr):
    """Return the first and last page of a share of the pages that all query tokens of a sequence see (`paging.whole_pages`)."""
    seq_lens_ptr, cu_seqlens_ptr, num_quantized_ptr = lengths
    if sink_len.dtype.is_ptr():
        sink_len = gl.load(sink_len + row)
    num_tokens = gl.load(cu_seqlens_ptr + row + 1) - gl.load(cu_seqlens_ptr + row)
    visible = gl.load(seq_lens_ptr + row) - num_tokens - sink_len
    if not APART:
        visible += 1
    pages = gl.maximum(visible, 0) // 128
    if num_quantized_ptr is not None:
        pages = gl.minimum(pages, gl.maximum(gl.load(num_quantized_ptr + row), 0))
    size = (pages + num_splits - 1) // num_splits
    first = gl.minimum(split * size, pages)
    return first, gl.minimum(first + size, pages)


@gluon.jit
def _load_id(ids_ptr, i, span):
    """Load the id of page i of a share, or of its last one. An id below 0 becomes 0: that of a page which exists."""
    return gl.maximum(gl.load(ids_ptr + gl.minimum(span[0] + i, span[1] - 1)), 0)


@gluon.jit
def _expect(i, count, descs, full):
    """Say that page i of a share will come."""
    BYTES: gl.constexpr = descs[0].block_type.nbytes + (0 if descs[1] is None else descs[1].block_type.nbytes)
    mbarrier.expect(full.index(i % full.shape[0]), BYTES, pred=i < count)


@gluon.jit
def _copy(i, count, page, head, descs, memory, full):
    """Begin to copy page i of a share into its slot."""
    slot = i % full.shape[0]
    _copy_tile(descs[0], [page, head, 0, 0], full.index(slot), memory[0].index(slot), pred=i < count)
    if descs[1] is not None:
        _copy_tile(descs[1], [page, head, 0, 0], full.index(slot), memory[1].index(slot), pred=i < count)


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
def _prepare_keys(items, q_factor, params, norms, LAYOUT: gl.constexpr, FIRST: gl.constexpr):
    """Put the parameters of a page's keys, and their norms times all that is a factor of scores, into shared memory."""
    keys, _, found = load_items(items, FIRST)
    store_params(keys, params, 8 // LAYOUT.k_bits, LAYOUT.k_bits)
    store_norms(found, load_gain(items, 0, FIRST) * q_factor, norms)


@gluon.jit
def _attend(share, pages, queries, q_factor, vectors, LAYOUT: gl.constexpr, ROWS: gl.constexpr):
    """Return the sums [2 * 64 channels, rows] of a share of pages, m, and the sums of weights of each thread."""
    ids_ptr, span, head = share
    descs, memory, full = pages
    KF: gl.constexpr = 8 // LAYOUT.k_bits
    VF: gl.constexpr = 8 // LAYOUT.v_bits
    VALUES: gl.constexpr = LAYOUT.v_codes_offset // 128
    FIRST: gl.constexpr = 0 if len(memory) > 1 else LAYOUT.k_params_offset // 128
    PRODUCTS: gl.constexpr = products_layout(ROWS)
    TOKENS: gl.constexpr = gl.SliceLayout(1, PRODUCTS)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROWS, element_bitwidth=16, rank=2)
    AHEAD: gl.constexpr = memory[0].shape[0] - 1
    k_params, v_params, k_norms, v_norms, maxima = vectors
    weights = gl.allocate_shared_memory(gl.float16, [128, ROWS], WEIGHTS)
    none = gl.zeros((64, ROWS), gl.float32, PRODUCTS)
    acc = (none, none)
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(0, PRODUCTS))
    state = gl.sum(in_threads(none), 1)
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
            _barrier()  # all are past the page before
            _copy(i + AHEAD, count, next_id, head, descs, memory, full)
        products = multiply(words, k_params, queries, none, True, LAYOUT.k_bits, 1)
        norms = (k_norms.slice(0, 64).load(TOKENS), k_norms.slice(64, 64).load(TOKENS))
        products = warpgroup_mma_wait(0, products)
        if ROWS > EARLY_ROWS:
            _, v_items, v_norm = load_items(items, FIRST)
            v_gain = load_gain(items, 1, FIRST) * (1.0 / headroom(LAYOUT.v_bits))
            _expect(i + AHEAD, count, descs, full)
        scores = (products[0] * norms[0][:, None], products[1] * norms[1][:, None])
        alpha, m, state = weigh(scores, m, state, maxima, weights, VF)
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
        acc = (acc[0] * alpha[None, :], acc[1] * alpha[None, :])
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
    return acc, m, state


@gluon.jit
def _store(out, lse_ptr, tile, head, num_q_heads, place, found, GROUP: gl.constexpr):
    """Store the partial results of a tile, rotated as they are, or of no page. `place`: of the first query token."""
    acc, m, state = found
    first_token, first_row, num_rows = tile
    ROWS: gl.constexpr = m.shape[0]
    COLUMNS: gl.constexpr = m.type.layout
    l_sum = gl.convert_layout(gl.sum(gl.sum(state, 1), 0), COLUMNS)
    row = gl.arange(0, ROWS, COLUMNS)
    token = place + first_token + (first_row + row) // GROUP
    q_head = head * GROUP + (first_row + row) % GROUP
    gl.store(lse_ptr + token * num_q_heads + q_head, m + gl.log2(l_sum), row < num_rows)
    inverse = 1.0 / gl.where(l_sum > 0, l_sum, 1.0)
    first = token * out[1] + q_head * out[2]
    channel = gl.arange(0, 64, gl.SliceLayout(1, products_layout(ROWS)))
    for half in gl.static_range(2):
        ptr = out[0] + first[None, :] + (half * 64 + channel)[:, None]
        gl.store(ptr, acc[half] * inverse[None, :], (row < num_rows)[None, :])


@gluon.jit(
    do_not_specialize=["batch", "num_kv_heads", "num_splits", "sink_len", "num_tokens", "stride_table"],
    do_not_specialize_on_alignment=["cu_seqlens_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "num_quantized_ptr"],
)
def _kvarn_attend_drafts_kernel(
    out,  # Rows of partial results [num_splits * num_tokens, num_q_heads, 128], float32
    lse_ptr,  # float32 [num_splits * num_tokens, num_q_heads], base 2
    q,  # Rows [num_tokens, num_q_heads, 128]
    lines_desc,  # of pages as lines of 128 bytes; of those with parameters, or None if they are among the first ones
    params_desc,
    cu_seqlens_ptr,  # int32 [batch + 1]
    table_ptr,  # int32 [batch, max_pages], or with CSR [ids]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    num_quantized_ptr,  # int32 [batch], None without raw pages
    scale,  # of scores, base 2
    batch,
    num_kv_heads,
    num_splits,
    sink_len,
    num_tokens,
    stride_table,
    LAYOUT: gl.constexpr,
    PLAN: gl.constexpr,
):
    gdc_launch_dependents()  # what attends to the rest
    ROWS: gl.constexpr = PLAN.block_m
    GROUP: gl.constexpr = PLAN.group
    KF: gl.constexpr = PLAN.k_fields
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128 // KF, element_bitwidth=16, rank=2)
    split = gl.program_id(0) % num_splits
    head = gl.program_id(0) // num_splits % num_kv_heads
    row, number, some = find_tile(cu_seqlens_ptr, gl.program_id(0) // num_splits // num_kv_heads, batch, GROUP, ROWS)
    if some:
        span = _share((seq_lens_ptr, cu_seqlens_ptr, num_quantized_ptr), row, split, num_splits, sink_len, PLAN.apart)
        first_token = gl.load(cu_seqlens_ptr + row)
        num_rows = (gl.load(cu_seqlens_ptr + row + 1) - first_token) * GROUP - number * ROWS
        tile = (first_token, number * ROWS, num_rows)
        place = split.to(gl.int64) * num_tokens
        count = span[1] - span[0]
        if count > 0:
            ids_ptr = table_ptr + row.to(gl.int64) * stride_table
            if indptr_ptr is not None:
                ids_ptr = table_ptr + gl.load(indptr_ptr + row)
            SLOTS: gl.constexpr = PLAN.num_stages
            memory = (gl.allocate_shared_memory(gl.int16, [SLOTS] + lines_desc.block_type.shape, lines_desc.layout),)
            if params_desc is not None:
                params = gl.allocate_shared_memory(gl.int16, [SLOTS] + params_desc.block_type.shape, params_desc.layout)
                memory = memory + (params,)
            queries = gl.allocate_shared_memory(gl.float16, [2 * KF * ROWS, 64 // KF], LINES)
            k_params = gl.allocate_shared_memory(gl.float16, [256], LINE)
            v_params = gl.allocate_shared_memory(gl.float16, [256], LINE)
            k_norms = gl.allocate_shared_memory(gl.float32, [256], LINE)
            v_norms = gl.allocate_shared_memory(gl.float32, [256], LINE)
            maxima = gl.allocate_shared_memory(gl.float32, [4 * ROWS], LINE)
            full = barriers(SLOTS, 1)
            fence_async_shared()
            descs = (lines_desc, params_desc)
            for i in gl.static_range(SLOTS - 1):
                _expect(i, count, descs, full)
                _copy(i, count, _load_id(ids_ptr, i, span), head, descs, memory, full)
            # The last slot is free until the loop.
            ON_THE_WAY: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
            rows = memory[0].index(SLOTS - 1)._reinterpret(gl.float32, [ROWS, 128], ON_THE_WAY)
            q_factor = store_planes(q, tile, head, rows, queries, KF, GROUP) * (scale / headroom(LAYOUT.k_bits))
            fence_async_shared()
            share, pages = (ids_ptr, span, head), (descs, memory, full)
            vectors = (k_params, v_params, k_norms, v_norms, maxima)
            found = _attend(share, pages, queries, q_factor, vectors, LAYOUT, ROWS)
            _store(out, lse_ptr, tile, head, num_kv_heads * GROUP, place, found, GROUP)
        else:
            NUMBERS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            each = gl.arange(0, ROWS, NUMBERS)
            token = place + first_token + (number * ROWS + each) // GROUP
            q_head = head * GROUP + (number * ROWS + each) % GROUP
            nothing = gl.full((ROWS,), float("-inf"), gl.float32, NUMBERS)
            gl.store(lse_ptr + token * (num_kv_heads * GROUP) + q_head, nothing, each < num_rows)


def _described(pages: torch.Tensor, layout: PageLayout) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Describe pages as lines of 128 bytes: a power of two that has all codes, and those after it with anything, or None."""
    first, lines = layout.k_params_offset // 128, layout.page_bytes // 128
    shape, strides = [*pages.shape[:2], lines, 64], [stride // 2 for stride in pages.stride()[:2]]
    for i, least in ((1, 64 * lines), (0, 64 * lines * pages.shape[1])):
        strides[i] = strides[i] or least  # 0 where there is one
    shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    halves, block = pages.view(torch.int16), triton.next_power_of_2(first)
    codes = TensorDescriptor(halves, shape, [*strides, 64, 1], [1, 1, block, 64], shared)
    if lines <= block:
        return codes, None
    params = halves[..., first * 64 :]
    return codes, TensorDescriptor(params, [*shape[:2], lines - first, 64], [*strides, 64, 1], [1, 1, 16, 64], shared)


def launch_hopper_drafts(
    out: Rows, lse: torch.Tensor, q: torch.Tensor, scale: float, tiles: Tiles, plan: PrefillPlan, count: int
) -> None:
    """Attend with `count` tiles, or fewer, to whole pages, `tiles.num_splits` shares of each; nothing is checked."""
    cache = tiles.cache
    # No memory has no descriptor; nothing is read of a pool of no pages.
    pages = cache.pages if len(cache.pages) else cache.pages.new_empty(1, *cache.pages.shape[1:])
    on(q, _kvarn_attend_drafts_kernel)[(count * cache.num_kv_heads * tiles.num_splits,)](
        out,
        lse,
        as_rows(q),
        *_described(pages, cache.layout),
        tiles.cu_seqlens_q,
        **cache.tables(),
        scale=scale,
        batch=cache.batch,
        num_kv_heads=cache.num_kv_heads,
        num_splits=tiles.num_splits,
        num_tokens=len(tiles.tokens),
        LAYOUT=cache.layout,
        PLAN=plan,
        num_warps=4,
        enable_fp_fusion=True,
        **tiles.config.options(),
    )
