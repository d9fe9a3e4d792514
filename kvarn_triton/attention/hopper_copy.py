"""How a warp of `hopper` copies the tokens of a program's segments into shared memory, step by step."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from . import records

_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name until Triton 3.6
SEGMENTS = gl.constexpr(records.SEGMENTS.value)
HEADER = gl.constexpr(records.HEADER.value)
FIELDS = gl.constexpr(records.FIELDS.value)


@gluon.jit
def _field(record_ptr, FIELD: gl.constexpr):
    """Load a number of each of the four segments."""
    first_ptr = record_ptr + HEADER + FIELD
    return (
        gl.load(first_ptr), gl.load(first_ptr + FIELDS), gl.load(first_ptr + 2 * FIELDS), gl.load(first_ptr + 3 * FIELDS)
    )  # fmt: skip


@gluon.jit
def counts_of(record_ptr):
    """Return of each segment how many steps every row sees whole, and how many need a mask."""
    return _field(record_ptr, 1), _field(record_ptr, 2)


@gluon.jit
def sum_of(numbers):
    """Return the sum of a number of each segment."""
    return numbers[0] + numbers[1] + numbers[2] + numbers[3]


@gluon.jit
def step_of(i, counts):
    """Return the segment of step i of a program, and its number in the segment."""
    whole, masked = counts
    segment = i * 0
    step = i
    before = 0
    for s in gl.static_range(SEGMENTS):
        if (i >= before) & (i < before + masked[s]):
            segment = i * 0 + s
            step = whole[s] + i - before
        before += masked[s]
    for s in gl.static_range(SEGMENTS):
        if (i >= before) & (i < before + whole[s]):
            segment = i * 0 + s
            step = i - before
        before += whole[s]
    return segment, step


@gluon.jit
def _copy_step(descs, smem, full, segment, place, half: gl.constexpr):
    """Copy the keys (half 0) or the values (1) of a step: of new tokens, of pages, or of raw tokens."""
    page, head, token, row = place
    mbarrier.expect(full, descs[1].block_type.nbytes)
    if segment == 0:
        _copy_tile(descs[0], [0, 0, head, row, 0], full, smem.reshape(descs[0].block_type.shape))
    elif segment == 1:
        _copy_tile(descs[1], [page, half, head, token, 0], full, smem)
    else:
        _copy_tile(descs[2], [page, half, head, token, 0], full, smem)


@gluon.jit
def copy_tokens(k_descs, v_descs, smem, bars, record_ptr, head, G: gl.constexpr):
    """Copy keys and values step by step, each into the stage that both warp groups have left."""
    _, k, v = smem
    k_full, k_free, v_full, v_free = bars
    STAGES: gl.constexpr = k.shape[0]
    T: gl.constexpr = k.shape[1] * k.shape[4]
    counts = counts_of(record_ptr)
    starts = _field(record_ptr, 0)
    for i in range(sum_of(counts[0]) + sum_of(counts[1])):
        stage = i % STAGES
        phase = i // STAGES & 1
        segment, step = step_of(i, counts)
        start = starts[0]
        for s in gl.static_range(1, SEGMENTS):
            if segment == s:
                start = starts[s]
        place = (start + step * T // G, head, step * T % G, start + step * T)
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        _copy_step(k_descs, k.index(stage), k_full.index(stage), segment, place, 0)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        _copy_step(v_descs, v.index(stage), v_full.index(stage), segment, place, 1)
