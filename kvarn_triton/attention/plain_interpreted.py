"""The kernel of `hopper` in plain Triton, for Triton's interpreter: tests run what is around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .. import configs
from ..launch import as_tokens
from ..masking import reach_of
from .prefill_plan import PrefillPlan
from .records import COUNT, HEADER, LEAD, MASKED, RECORD, ROOM, SEGMENTS, SHIFT, START, WHOLE, WINDOW
from .schedule import Tiles
from .softmax import State, advance
from .tiles import Tile, store_results

if TYPE_CHECKING:
    from .plain import PlainWork


@triton.jit
def _load_tokens(tokens, half: tl.constexpr, start, token, head, mask, CHANNELS: tl.constexpr, G: tl.constexpr):
    """Load tokens of a segment of pages [tokens, channels]."""
    place = (start + token // G).to(tl.int64) * tokens.stride_page + half * tokens.stride_half
    place += head.to(tl.int64) * tokens.stride_head + token % G * tokens.stride_token
    return tl.load(tokens.ptr + place[:, None] + tl.arange(0, CHANNELS)[None, :], mask[:, None], other=0.0)


@triton.jit
def _load_new(rows, start, token, head, mask, CHANNELS: tl.constexpr):
    """Load new tokens [tokens, channels]."""
    place = (start + token).to(tl.int64) * rows.stride_token + head.to(tl.int64) * rows.stride_head
    return tl.load(rows.ptr + place[:, None] + tl.arange(0, CHANNELS)[None, :], mask[:, None], other=0.0)


@triton.jit
def _attend_interpreted(
    results, q, new, scratch, raw, records_ptr, states_ptr, masking, sizes, tokens, rounds,
    LAYOUT: tl.constexpr, PLAN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    out, lse_ptr, sinks_ptr = results
    num_kv_heads, num_splits = sizes
    head = program % num_kv_heads
    record_ptr = records_ptr + program * RECORD
    num_rows = tl.load(record_ptr + 2)
    if num_rows > 0:
        row_start = tl.load(record_ptr)
        row = tl.load(record_ptr + 1) + tl.arange(0, PLAN.block_m)
        mask = tl.arange(0, PLAN.block_m) < num_rows
        query, q_head = row // PLAN.group, head * PLAN.group + row % PLAN.group
        tile = Tile(row_start, tl.load(record_ptr + 3), 0, 0, query, (row_start + query).to(tl.int64), q_head, mask)
        reach = query + 1
        if masking.among.span_ends is not None:
            reach = reach_of(masking.among, query, tile.token, mask, tile.num_tokens)[1]
        place = tile.token * q.stride_token + q_head.to(tl.int64) * q.stride_head
        rows = tl.load(q.ptr + place[:, None] + tl.arange(0, LAYOUT.head_dim)[None, :], mask[:, None], other=0.0)
        state_row = program.to(tl.int64) * PLAN.block_m + tl.arange(0, PLAN.block_m)
        state_rows = tl.num_programs(0) * PLAN.block_m
        acc_ptr = states_ptr + state_row[:, None] * LAYOUT.v_head_dim + tl.arange(0, LAYOUT.v_head_dim)[None, :]
        m_ptr = states_ptr + state_rows * LAYOUT.v_head_dim + state_row
        before = state_row * 0 + rounds[0] == 0
        state = State(
            tl.load(acc_ptr, before[:, None], other=0.0),
            tl.load(m_ptr, before, other=float("-inf")),
            tl.load(m_ptr + state_rows, before, other=0.0),
        )
        for segment in tl.static_range(SEGMENTS):
            numbers_ptr = record_ptr + HEADER + segment
            start, count = tl.load(numbers_ptr + START * ROOM), tl.load(numbers_ptr + COUNT * ROOM)
            shift = tl.load(numbers_ptr + SHIFT * ROOM)
            end, first = tl.minimum(count, reach + shift), query + 1 - tl.load(numbers_ptr + WINDOW * ROOM) + shift
            lead, whole = tl.load(numbers_ptr + LEAD * ROOM), tl.load(numbers_ptr + WHOLE * ROOM)
            for step in range(whole + tl.load(numbers_ptr + MASKED * ROOM)):
                token = step * T + tl.arange(0, T)
                if segment == 0 or segment == SEGMENTS - 1:
                    keys = _load_new(new[0], start, token, head, token < count, LAYOUT.head_dim)
                    values = _load_new(new[1], start, token, head, token < count, LAYOUT.v_head_dim)
                else:
                    memory = scratch if segment == 1 else raw
                    keys = _load_tokens(memory, 0, start, token, head, token < count, LAYOUT.head_dim, LAYOUT.page_size)
                    values = _load_tokens(memory, 1, start, token, head, token < count, LAYOUT.v_head_dim, LAYOUT.page_size)
                scores = tl.dot(rows.to(tl.float32), tl.trans(keys.to(tl.float32)), input_precision="ieee")
                seen = (token[None, :] < end[:, None]) & (token[None, :] >= first[:, None])
                # As the other kernel, which has no mask there.
                seen = seen | ((step >= lead) & (step < lead + whole))
                scores = tl.where(seen, scores * masking.scores.scale, float("-inf"))
                weights, alpha, m, l_sum = advance(state, scores, False)
                acc = tl.dot(weights.to(values.dtype).to(tl.float32), values.to(tl.float32), input_precision="ieee")
                state = State(state.acc * alpha[:, None] + acc, m, l_sum)
        if rounds[1] != 0:
            split = program // num_kv_heads % num_splits
            store_results(out, lse_ptr, sinks_ptr, state, tile, tokens, split, num_kv_heads * PLAN.group, 1, PLAN)
        else:
            tl.store(acc_ptr, state.acc)
            tl.store(m_ptr, state.m)
            tl.store(m_ptr + state_rows, state.l)


def launch_interpreted(work: PlainWork, tiles: Tiles, plan: PrefillPlan, rounds: tuple[bool, bool]) -> None:
    """Attend as records say, as `hopper.launch_hopper` does. `rounds`: whether it is the first and the last of its rounds."""
    _attend_interpreted[(len(work.records),)](
        (work.out, work.lse, work.sinks),
        work.q,
        work.new,
        as_tokens(work.scratch),
        as_tokens(work.raw),
        work.records,
        work.states,
        work.masking,
        (tiles.cache.num_kv_heads, tiles.num_splits),
        (tiles.tokens.start, tiles.tokens.stop),
        tuple(map(int, rounds)),
        LAYOUT=tiles.cache.layout,
        PLAN=plan,
        T=configs.plain_steps(tiles.cache.layout)[0],
    )
