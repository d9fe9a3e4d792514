"""How a warp of `hopper` copies the tokens of a program's segments into shared memory, step by step."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..tile.gluon import copy_tile
from . import records

SEGMENTS = gl.constexpr(records.SEGMENTS.value)
HEADER = gl.constexpr(records.HEADER.value)
ROOM = gl.constexpr(records.ROOM.value)
START = gl.constexpr(records.START.value)
LEAD = gl.constexpr(records.LEAD.value)
WHOLE = gl.constexpr(records.WHOLE.value)
MASKED = gl.constexpr(records.MASKED.value)


@gluon.jit
def number_of(record_ptr, FIELD: gl.constexpr, segment):
    """Load a number of a segment."""
    return gl.load(record_ptr + HEADER + FIELD * ROOM + segment)


@gluon.jit
def step_of(i, record_ptr):
    """Return the segment of step i of a program, and its number in the segment: those with a mask come first."""
    segment = i * 0
    step = i
    before = 0
    for s in gl.static_range(SEGMENTS):
        masked = number_of(record_ptr, MASKED, s)
        if (i >= before) & (i < before + masked):
            segment = i * 0 + s
            step = i - before
            if step >= number_of(record_ptr, LEAD, s):
                step += number_of(record_ptr, WHOLE, s)
        before += masked
    if i >= before:
        for s in gl.static_range(SEGMENTS):
            whole = number_of(record_ptr, WHOLE, s)
            if (i >= before) & (i < before + whole):
                segment = i * 0 + s
                step = number_of(record_ptr, LEAD, s) + i - before
            before += whole
    return segment, step


@gluon.jit
def _copy_step(descs, smem, full, segment, place, half: gl.constexpr):
    """Copy the keys (half 0) or the values (1) of a step: of new tokens, of pages, or of raw tokens."""
    page, head, token, row = place
    mbarrier.expect(full, descs[1].block_type.nbytes)
    if (segment == 0) | (segment == SEGMENTS - 1):
        copy_tile(descs[0], [0, 0, head, row, 0], full, smem.reshape(descs[0].block_type.shape))
    elif segment == 1:
        copy_tile(descs[1], [page, half, head, token, 0], full, smem)
    else:
        copy_tile(descs[2], [page, half, head, token, 0], full, smem)


@gluon.jit
def copy_tokens(k_descs, v_descs, smem, bars, record_ptr, head, G: gl.constexpr):
    """Copy keys and values step by step, each into the stage that both warp groups have left."""
    _, k, v = smem
    k_full, k_free, v_full, v_free = bars
    STAGES: gl.constexpr = k.shape[0]
    T: gl.constexpr = k.shape[1] * k.shape[4]
    for i in range(gl.load(record_ptr + 5)):
        stage = i % STAGES
        phase = i // STAGES & 1
        segment, step = step_of(i, record_ptr)
        start = number_of(record_ptr, START, segment)
        place = (start + step * T // G, head, step * T % G, start + step * T)
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        _copy_step(k_descs, k.index(stage), k_full.index(stage), segment, place, 0)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        _copy_step(v_descs, v.index(stage), v_full.index(stage), segment, place, 1)
