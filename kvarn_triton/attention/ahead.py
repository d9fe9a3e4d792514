"""What tiles of query rows attend to before their own kernel: tokens of scratch memory that all rows of a tile see.

Nothing is masked there, so that a kernel for one architecture does it (`hopper`), which knows nothing of sequences: a launch
before it rotates the queries of each tile, and says where its keys begin and how many steps of AHEAD_TOKENS they are. The
kernel of prefill attention goes on from the states that it leaves: masks, raw and new tokens, results.

A state is that of `softmax`. One program of prefill attention is one program of both launches here; those of a tile without a
whole step do nothing, and their states are not read. Scratch memory may hold a part of the pages only: then there are rounds,
each of which goes on from the states of the one before.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import configs, gpu
from ..launch import as_rows, as_tokens, on
from ..masking import Mask, changing, size_of
from ..pages.expand import launch_expand_pages
from ..paging import ALL_PAGES, first_slot, seen_by, sink_of
from ..tile.arithmetic import load_rows
from . import workspace
from .prefill_plan import PrefillPlan
from .query import rotate_rows
from .schedule import Tiles, find_tile
from .softmax import State, advance
from .tiles import shares, tile_of

AHEAD_TOKENS = tl.constexpr(configs.AHEAD_TOKENS)


class Ahead(NamedTuple):
    """What the programs of a launch have before it, n of them, with tiles of block_m rows."""

    q: torch.Tensor  # [n * block_m, head_dim], rotated, of the dtype of scratch memory
    factor: torch.Tensor  # float32 [n], of their scores, base 2
    runs: torch.Tensor  # int32 [n, 3]: the slot of scratch memory where a round begins, its tokens, and those before
    covered: torch.Tensor  # int32 [n], tokens of all rounds
    acc: torch.Tensor  # float32 [n * block_m, v_head_dim]
    m: torch.Tensor  # float32 [n * block_m]
    l: torch.Tensor  # float32 [n * block_m]  # noqa: E741
    ring: int  # pages of a sequence that scratch memory holds at once, as `masking.changing` returns it


def tiles_ahead(num_q_heads: int, scratch: torch.Tensor, mask: Mask, tiles: Tiles) -> Tiles:
    """Return the tiles of a call with `scratch` memory, in rounds whose states are not too large, if they attend ahead."""
    layout, config = tiles.cache.layout, tiles.config
    if not (mask.attends_ahead and configs.attends_ahead(layout, scratch.dtype, scratch.device, config.block_m)):
        return tiles
    row_bytes = tiles.num_splits * tiles.cache.num_kv_heads * (2 * layout.head_dim + 4 * layout.v_head_dim + 8)
    most_tiles = workspace.ROUND_BYTES // (row_bytes * config.block_m)
    group = num_q_heads // tiles.cache.num_kv_heads
    # Each sequence has a tile that is not full, but no more than it has tokens.
    whole = (most_tiles - tiles.cache.batch - 2) * config.block_m // group // config.block_m * config.block_m
    alone = (most_tiles - 2) * config.block_m // (config.block_m + group)
    return dataclasses.replace(tiles, tokens=range(min(max(whole, alone, 1), len(tiles.tokens))), ahead=True)


@triton.jit(
    do_not_specialize=[
        "batch", "num_kv_heads", "num_splits", "sink_len", "num_tail_slots", "split_size", "first_token", "total_tokens",
        "first_page", "ring", "max_pages", "stride_table", "stride_raw_table",
    ],
    do_not_specialize_on_alignment=[
        "cu_seqlens_ptr", "table_ptr", "indptr_ptr", "seq_lens_ptr", "raw_table_ptr", "num_quantized_ptr",
    ],
)  # fmt: skip
def _kvarn_rotate_tiles_kernel(
    ahead,  # Ahead, of which the first four are written
    q,  # Rows [total_tokens, num_q_heads, head_dim]
    raw,  # Tokens, or None: only whether there are any counts
    cu_seqlens_ptr,  # int32 [batch + 1]
    table_ptr,  # not read, like raw_table_ptr
    indptr_ptr,  # int32 [batch + 1], None if not CSR
    seq_lens_ptr,  # int32 [batch]
    raw_table_ptr,  # None without raw pages
    num_quantized_ptr,  # int32 [batch], None without raw pages
    masking,  # Masking
    batch,
    num_kv_heads,
    num_splits,
    first_token,  # of this launch
    total_tokens,  # of this launch
    sink_len,
    num_tail_slots,
    split_size,
    first_page,  # of this round
    ring,  # pages of a sequence that scratch memory holds at once
    max_pages,  # columns of a block table
    stride_table,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % num_kv_heads
    split = program // num_kv_heads % num_splits
    tokens = (first_token, first_token + total_tokens)
    row, number = find_tile(cu_seqlens_ptr, program // num_kv_heads // num_splits, batch, tokens, PLAN.group, PLAN.block_m)
    covered, before, end, slot = 0, 0, 0, 0
    if row < batch:
        tile = tile_of(cu_seqlens_ptr, row, number, head, masking, PLAN)
        seq_len = tl.load(seq_lens_ptr + row)
        sink = sink_of(sink_len, row, row < batch)
        seen = seen_by(
            (tile.first_query, tile.last_query, tile.num_tokens), row, seq_len, num_quantized_ptr, sink, None, LAYOUT.page_size,
            PLAN.apart,
        )  # fmt: skip
        _, _, span = shares(split, num_splits, split_size, seen, sink, masking.windows, raw is not None, LAYOUT)
        first = span[0] * LAYOUT.page_size
        first_position = seq_len - tile.num_tokens - sink + tile.first_query
        last = tl.minimum(span[1] * LAYOUT.page_size, tl.minimum(seen.num_valid, first_position + 1))
        covered = tl.maximum(last - first, 0) // AHEAD_TOKENS * AHEAD_TOKENS
        first_of_round = first_page * LAYOUT.page_size - first
        before = tl.minimum(tl.maximum(first_of_round, 0), covered)
        end = covered
        if ring != ALL_PAGES:
            end = tl.minimum(tl.maximum(first_of_round + ring * LAYOUT.page_size, 0), covered)
        if before < end:
            place = tile.token * q.stride_token + tile.q_head.to(tl.int64) * q.stride_head
            rows = load_rows(q.ptr, place, tile.mask, LAYOUT.head_dim, PLAN.k_channels).to(PLAN.query_operand)
            rotated, factor = rotate_rows(rows, LAYOUT, 1, PLAN.operand, PLAN.k_channels <= 128)
            to = program.to(tl.int64) * PLAN.block_m + tl.arange(0, PLAN.block_m)
            channel = tl.arange(0, PLAN.k_channels)
            tl.store(ahead.q + to[:, None] * PLAN.k_channels + channel[None, :], rotated.to(ahead.q.dtype.element_ty))
            tl.store(ahead.factor + program, factor * masking.scores.scale)
            slot = first_slot(indptr_ptr, row, max_pages, ring).to(tl.int32) + (first + before) // LAYOUT.page_size % ring
    tl.store(ahead.covered + program, covered)
    tl.store(ahead.runs + program * 3, slot)
    tl.store(ahead.runs + program * 3 + 1, end - before)
    tl.store(ahead.runs + program * 3 + 2, before)


@triton.jit
def slots_of(indptr_ptr, row, max_pages, ahead):
    """Return the slot of scratch memory for body page 0 of a row, and how many slots of the row there are."""
    ring = ALL_PAGES
    if ahead is not None:
        ring = size_of(ahead.ring)
    return first_slot(indptr_ptr, row, max_pages, ring), ring


@triton.jit
def state_ahead(ahead, program, covered, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the state that a program's tile has after `covered` tokens; without any, that of rows that attended to nothing."""
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    some = tl.zeros((ROWS,), tl.int32) + covered > 0
    place = row[:, None] * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    acc = tl.load(ahead.acc + place, some[:, None], other=0.0)
    m = tl.load(ahead.m + row, some, other=float("-inf"))
    return State(acc, m, tl.load(ahead.l + row, some, other=0.0))


@triton.jit
def _attend_ahead_interpreted(
    ahead,  # Ahead
    scratch,  # Tokens
    num_kv_heads,
    LAYOUT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The same as `hopper`'s kernel in plain Triton, for its interpreter: tests run what is around it."""
    G: tl.constexpr = LAYOUT.page_size
    program = tl.program_id(0)
    tokens = tl.load(ahead.runs + program * 3 + 1)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, LAYOUT.head_dim)
    if tokens > 0:
        q = tl.load(ahead.q + row[:, None] * LAYOUT.head_dim + channel[None, :]).to(tl.float32)
        factor = tl.load(ahead.factor + program)
        state = state_ahead(ahead, program, tl.load(ahead.runs + program * 3 + 2), ROWS, LAYOUT.v_head_dim)
        for start in range(0, tokens, AHEAD_TOKENS):
            token = start + tl.arange(0, AHEAD_TOKENS)
            slot = tl.load(ahead.runs + program * 3).to(tl.int64) + token // G
            place = slot * scratch.stride_page + program % num_kv_heads * scratch.stride_head + token % G * scratch.stride_token
            keys = tl.load(scratch.ptr + place[None, :] + channel[:, None]).to(tl.float32)
            scores = tl.dot(q, keys, input_precision="ieee") * factor
            weights, alpha, m, l_sum = advance(state, scores, False)
            v_channel = tl.arange(0, LAYOUT.v_head_dim)
            values = tl.load(scratch.ptr + scratch.stride_half + place[:, None] + v_channel[None, :])
            acc = tl.dot(weights.to(values.dtype).to(tl.float32), values.to(tl.float32), input_precision="ieee")
            state = State(state.acc * alpha[:, None] + acc, m, l_sum)
        tl.store(ahead.acc + row[:, None] * LAYOUT.v_head_dim + tl.arange(0, LAYOUT.v_head_dim)[None, :], state.acc)
        tl.store(ahead.m + row, state.m)
        tl.store(ahead.l + row, state.l)


def launch_ahead(q: torch.Tensor, scratch: torch.Tensor, mask: Mask, tiles: Tiles, plan: PrefillPlan, programs: int) -> Ahead:
    """Attend with the tiles of `programs` programs to the tokens of scratch memory that all their rows see.

    `plan` is that of the launch that goes on. Scratch memory that holds a part of the pages is filled here, round by round.
    Nothing is checked.
    """
    cache, block_m, device, ring = tiles.cache, tiles.config.block_m, q.device, tiles.ring
    layout, rows = cache.layout, programs * block_m
    ahead = Ahead(
        torch.empty(rows, layout.head_dim, dtype=scratch.dtype, device=device),
        torch.empty(programs, dtype=torch.float32, device=device),
        torch.empty(programs, 3, dtype=torch.int32, device=device),
        torch.empty(programs, dtype=torch.int32, device=device),
        torch.empty(rows, layout.v_head_dim, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        changing(ring),
    )
    for first_page in range(0, max(cache.max_pages, 1), ring):
        if ring < cache.max_pages:
            launch_expand_pages(scratch, tiles.cu_seqlens_q, cache, mask.windows, plan.apart, first_page, ring)
        on(q, _kvarn_rotate_tiles_kernel)[(programs,)](
            ahead,
            as_rows(q),
            cu_seqlens_ptr=tiles.cu_seqlens_q,
            **cache.tables(),
            **cache.raw_tables(),
            masking=mask.masking(layout.head_dim),
            batch=cache.batch,
            num_kv_heads=cache.num_kv_heads,
            num_splits=tiles.num_splits,
            first_token=tiles.tokens.start,
            total_tokens=len(tiles.tokens),
            split_size=tiles.split_size,
            first_page=first_page,
            ring=ring,
            max_pages=cache.max_pages,
            LAYOUT=layout,
            PLAN=plan,
            num_warps=8,
            enable_fp_fusion=True,
        )
        if gpu.INTERPRETED:
            _attend_ahead_interpreted[(programs,)](ahead, as_tokens(scratch), cache.num_kv_heads, LAYOUT=layout, ROWS=block_m)
        else:
            from .hopper import launch_hopper

            launch_hopper(ahead, scratch, layout)
    return ahead
