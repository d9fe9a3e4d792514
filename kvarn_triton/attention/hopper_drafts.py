"""The kernel of `drafts` for compute capability 9.0: tiles of 16 or 32 query rows.

One warp group attends with a tile to a share of what its rows see: new and raw tokens (`hopper_tokens`), then quantized pages.
Tokens are the rows of the products with queries, channels those of the products with weights, and query rows are columns, of
which 16 are enough: products of warps (`registers`) take four times as many instructions. Numbers of pages are made in
registers (`hopper_numbers`). The accelerator copies a page ahead; three or four programs of a multiprocessor hide what one
waits for.

It is written in Gluon, because Triton does not keep such operands in registers, nor weights in an order of planes. Grid:
(program,), those of a tile next to each other. Bytes moved: each page and token once for each tile; partial results.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

from ..configs import padded
from ..launch import Rows, as_rows, on
from ..layout import PageLayout
from ..masking import Mask
from ..tile.gluon import barrier, reinterpret
from .hopper import barriers
from .hopper_numbers import LINE, products_layout
from .hopper_pages import attend_pages, copy_first
from .hopper_planes import find_tile, store_queries
from .hopper_tokens import UNIT, attend_tokens, num_blocks
from .hopper_weights import in_threads
from .prefill_plan import PrefillPlan
from .registers import headroom
from .schedule import Tiles


@gluon.jit
def _lengths(lengths, row, tile, sink_len, APART: gl.constexpr, GROUP: gl.constexpr, ROWS: gl.constexpr):
    """Return what a tile sees, how many quantized pages it sees and how many without a mask, and its last query.

    The first: new tokens, the length of the sink, tokens of it, the position of the first query in the body, where the tail
    begins there, and where the cache ends.
    """
    seq_lens_ptr, num_quantized_ptr = lengths
    _, first_row, num_rows, num_tokens = tile
    if sink_len.dtype.is_ptr():
        sink_len = gl.load(sink_len + row)
    seq_len = gl.load(seq_lens_ptr + row)
    shift = seq_len - num_tokens - sink_len
    cached = seq_len
    if APART:
        cached = gl.maximum(seq_len - num_tokens, 0)
    last_query = (first_row + gl.minimum(num_rows, ROWS) - 1) // GROUP
    end = gl.minimum(cached - sink_len, shift + last_query + 1)
    pages = (gl.maximum(end, 0) + 127) // 128
    if num_quantized_ptr is not None:
        pages = gl.minimum(pages, gl.maximum(gl.load(num_quantized_ptr + row), 0))
    whole = gl.minimum(gl.maximum(gl.minimum(end, shift + first_row // GROUP + 1), 0) // 128, pages)
    return (num_tokens, sink_len, gl.minimum(end + sink_len, sink_len), shift, pages * 128, end), (pages, whole), last_query


@gluon.jit
def _share(units, pages, split, num_splits):
    """Return the share of program `split` of a tile: (first, last) unit of tokens, and (first, last) page.

    A unit of tokens, which come first, counts as UNIT pages. It belongs to the program that its beginning falls to. Shares
    differ by one page at most.
    """
    size = units * UNIT + pages
    first, last = split * size // num_splits, (split + 1) * size // num_splits
    tokens = (gl.minimum((first + UNIT - 1) // UNIT, units), gl.minimum((last + UNIT - 1) // UNIT, units))
    first, last = gl.maximum(first - units * UNIT, 0), gl.maximum(last - units * UNIT, 0)
    return tokens, (gl.minimum(first, pages), gl.minimum(last, pages))


@gluon.jit
def _store(out, lse_ptr, tile, head, num_q_heads, place, found, GROUP: gl.constexpr):
    """Store the partial results of a tile, rotated as they are. `place`: of the first query token."""
    acc, m, totals = found
    first_token, first_row, num_rows, _ = tile
    ROWS: gl.constexpr = m.shape[0]
    COLUMNS: gl.constexpr = m.type.layout
    l_sum = gl.convert_layout(gl.sum(gl.sum(totals, 1), 0), COLUMNS)
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


@gluon.jit
def _store_nothing(lse_ptr, tile, head, num_q_heads, place, GROUP: gl.constexpr, ROWS: gl.constexpr):
    """Store that a program has attended to nothing."""
    first_token, first_row, num_rows, _ = tile
    NUMBERS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, ROWS, NUMBERS)
    token = place + first_token + (first_row + row) // GROUP
    nothing = gl.full((ROWS,), float("-inf"), gl.float32, NUMBERS)
    gl.store(lse_ptr + token * num_q_heads + head * GROUP + (first_row + row) % GROUP, nothing, row < num_rows)


@gluon.jit
def _attend(shares, sources, q, tile, head, sizes, LAYOUT: gl.constexpr, PLAN: gl.constexpr):
    """Return the state of a tile after a share of tokens, then of pages, each of which may be none."""
    tokens, span = shares
    blocks, new, raw, ids_ptr, descs = sources
    lengths, whole, scale = sizes
    ROWS: gl.constexpr = PLAN.block_m
    KF: gl.constexpr = PLAN.k_fields
    SLOTS: gl.constexpr = PLAN.num_stages
    PRODUCTS: gl.constexpr = products_layout(ROWS)
    PLANES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128 // KF, element_bitwidth=16, rank=2)
    RAW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * ROWS, element_bitwidth=16, rank=2)
    memory = (gl.allocate_shared_memory(gl.int16, [SLOTS] + descs[0].block_type.shape, descs[0].layout),)
    if descs[1] is not None:
        memory = memory + (gl.allocate_shared_memory(gl.int16, [SLOTS] + descs[1].block_type.shape, descs[1].layout),)
    planes = gl.allocate_shared_memory(gl.float16, [2 * KF * ROWS, 64 // KF], PLANES)
    weights = gl.allocate_shared_memory(gl.float16, [128, ROWS], WEIGHTS)
    maxima, flags = gl.allocate_shared_memory(gl.float32, [4 * ROWS], LINE), gl.allocate_shared_memory(gl.int32, [4], LINE)
    k_params, v_params = gl.allocate_shared_memory(gl.float16, [256], LINE), gl.allocate_shared_memory(gl.float16, [256], LINE)
    k_norms, v_norms = gl.allocate_shared_memory(gl.float32, [256], LINE), gl.allocate_shared_memory(gl.float32, [256], LINE)
    full = barriers(SLOTS, 1)
    fence_async_shared()
    count = span[1] - span[0]
    some = tokens[0] < tokens[1]
    if not some:
        copy_first(ids_ptr, span, head, descs, memory, full)
    raw_queries = ()
    if len(new) + len(raw) > 0:
        if SLOTS > 2:
            raw_queries = (reinterpret(memory[0].index(1), q[0].dtype.element_ty, [ROWS, 128], RAW),)
        else:
            raw_queries = (gl.allocate_shared_memory(q[0].dtype.element_ty, [ROWS, 128], RAW),)
    # The last slot is free until the loop; the others, too, if tokens come first.
    slot = memory[0].index(SLOTS - 1)
    factor = store_queries(q, (tile[0], tile[1], tile[2]), head, slot, (planes, raw_queries, some), KF, PLAN.group) * scale
    fence_async_shared()
    query = (tile[1] + gl.arange(0, ROWS, gl.SliceLayout(0, PRODUCTS))) // PLAN.group
    none = gl.zeros((64, ROWS), gl.float32, PRODUCTS)
    m = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(0, PRODUCTS))
    found = ((none, none), m, gl.sum(in_threads(none), 1))
    if len(new) + len(raw) > 0:  # noqa: SIM102 - known to the compiler
        if some:
            own = (memory[0].index(0), slot, maxima, weights) + raw_queries
            found = attend_tokens((tokens, blocks), (new, raw), (query, lengths), found, own, factor)
            fence_async_shared()
            barrier()
            copy_first(ids_ptr, span, head, descs, memory, full)
    if count > 0:
        ends = gl.minimum(query + 1 + lengths[3], lengths[5])
        share, pages = (ids_ptr, span, head, whole, ends), (descs, memory, full)
        vectors = (k_params, v_params, k_norms, v_norms, maxima, flags, weights)
        queries = (planes, factor * (1.0 / headroom(LAYOUT.k_bits)))
        found = attend_pages(share, pages, queries, found, vectors, LAYOUT, ROWS)
    return found


@gluon.jit(
    do_not_specialize=[
        "batch", "num_kv_heads", "num_splits", "sink_len", "num_tail_slots", "num_tokens", "stride_table", "stride_raw_table",
    ],
    do_not_specialize_on_alignment=[
        "cu_seqlens_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "raw_table_ptr", "num_quantized_ptr",
    ],
)  # fmt: skip
def _kvarn_attend_drafts_kernel(
    out,  # Rows of partial results [num_splits * num_tokens, num_q_heads, 128], float32
    lse_ptr,  # float32 [num_splits * num_tokens, num_q_heads], base 2
    q,  # Rows [num_tokens, num_q_heads, 128]
    new,  # Rows of the new keys and values [num_tokens, num_kv_heads, 128], or None
    lines_desc,  # of pages as lines of 128 bytes; of those with parameters, or None if they are among the first ones
    params_desc,
    raw,  # Tokens, or None
    cu_seqlens_ptr,  # int32 [batch + 1], None if each sequence has one token
    table_ptr,  # int32 [batch, max_pages], or with CSR [ids]
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots], None without raw pages
    num_quantized_ptr,  # int32 [batch], None without raw pages
    scale,  # of scores, base 2
    batch,
    num_kv_heads,
    num_splits,
    sink_len,
    num_tail_slots,
    num_tokens,
    stride_table,
    stride_raw_table,
    LAYOUT: gl.constexpr,
    PLAN: gl.constexpr,
):
    gdc_launch_dependents()
    ROWS: gl.constexpr = PLAN.block_m
    GROUP: gl.constexpr = PLAN.group
    split = gl.program_id(0) % num_splits
    head = gl.program_id(0) // num_splits % num_kv_heads
    index = gl.program_id(0) // num_splits // num_kv_heads
    row, number, some = find_tile(cu_seqlens_ptr, index, batch, GROUP, ROWS)
    if some:
        first_token = row
        own_tokens = row * 0 + 1
        if cu_seqlens_ptr is not None:
            first_token = gl.load(cu_seqlens_ptr + row)
            own_tokens = gl.load(cu_seqlens_ptr + row + 1) - first_token
        tile = (first_token, number * ROWS, own_tokens * GROUP - number * ROWS, own_tokens)
        lengths, pages, last_query = _lengths((seq_lens_ptr, num_quantized_ptr), row, tile, sink_len, PLAN.apart, GROUP, ROWS)
        blocks = num_blocks((last_query, lengths[2], lengths[5] - lengths[4]), new is not None, raw is not None)
        tokens, span = _share(blocks[0] + blocks[1] + blocks[2], pages[0], split, num_splits)
        place, num_q_heads = split.to(gl.int64) * num_tokens, num_kv_heads * GROUP
        if (tokens[0] < tokens[1]) | (span[0] < span[1]):
            ids_ptr = table_ptr + row.to(gl.int64) * stride_table
            if indptr_ptr is not None:
                ids_ptr = table_ptr + gl.load(indptr_ptr + row)
            ours = ()
            if new is not None:
                k_ptr = new[0][0] + first_token.to(gl.int64) * new[0][1] + head.to(gl.int64) * new[0][2]
                v_ptr = new[1][0] + first_token.to(gl.int64) * new[1][1] + head.to(gl.int64) * new[1][2]
                ours = (k_ptr, v_ptr, new[0][1], new[1][1])
            others = ()
            if raw is not None:
                sinks_ptr = raw_table_ptr + row.to(gl.int64) * stride_raw_table
                keys_ptr = raw[0] + head.to(gl.int64) * raw[3]
                tail_ptr = sinks_ptr + (lengths[1] + 127) // 128
                others = (keys_ptr, raw[1], raw[2], raw[4], sinks_ptr, tail_ptr, num_tail_slots)
            sources = (blocks, ours, others, ids_ptr, (lines_desc, params_desc))
            found = _attend((tokens, span), sources, q, tile, head, (lengths, pages[1], scale), LAYOUT, PLAN)
            _store(out, lse_ptr, tile, head, num_q_heads, place, found, GROUP)
        else:
            _store_nothing(lse_ptr, tile, head, num_q_heads, place, GROUP, ROWS)


_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
"""Layout of lines of pages in shared memory."""


def _described(pages: torch.Tensor, layout: PageLayout) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Describe pages as lines of 128 bytes: a power of two that has all codes, and those after it with anything, or None."""
    first, lines = layout.k_params_offset // 128, layout.page_bytes // 128
    num_pages, num_heads = pages.shape[:2]
    # Of a dimension with one item PyTorch says anything.
    stride_page = pages.stride(0) // 2 if num_pages > 1 else 64 * lines * num_heads
    strides = [stride_page, pages.stride(1) // 2 if num_heads > 1 else 64 * lines, 64, 1]
    # At least as many as 64 raw tokens take in the same memory.
    halves, block = pages.view(torch.int16), max(padded(first), 128)
    codes = TensorDescriptor(halves, [num_pages, num_heads, lines, 64], strides, [1, 1, block, 64], _SHARED)
    if lines <= block:
        return codes, None
    shape = [num_pages, num_heads, lines - first, 64]
    return codes, TensorDescriptor(halves[..., first * 64 :], shape, strides, [1, 1, 16, 64], _SHARED)


def launch_hopper_drafts(
    out: Rows,
    lse: torch.Tensor,
    q: torch.Tensor,
    new: tuple[Rows, Rows] | None,
    mask: Mask,
    tiles: Tiles,
    plan: PrefillPlan,
) -> None:
    """Attend with all tiles, `tiles.num_splits` programs each; nothing is checked."""
    cache = tiles.cache
    count = cache.batch * -(-plan.group // plan.block_m)
    if tiles.cu_seqlens_q is not None:  # each sequence may have a tile that is not full
        count = -(-len(tiles.tokens) * plan.group // plan.block_m) + min(cache.batch, len(tiles.tokens))
    # No memory has no descriptor; nothing is read of a pool of no pages. Nor has memory that repeats.
    pages = cache.pages if len(cache.pages) else cache.pages.new_empty(1, *cache.pages.shape[1:])
    if 0 in pages.stride() and any(size > 1 and not stride for size, stride in zip(pages.shape, pages.stride(), strict=True)):
        pages = pages.contiguous()
    on(q, _kvarn_attend_drafts_kernel)[(count * cache.num_kv_heads * tiles.num_splits,)](
        out,
        lse,
        as_rows(q),
        new,
        *_described(pages, cache.layout),
        cu_seqlens_ptr=tiles.cu_seqlens_q,
        **cache.tables(),
        **cache.raw_tables(),
        scale=mask.masking(cache.layout.head_dim).scores.scale,
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
