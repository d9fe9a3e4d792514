"""How `hopper_tile` brings tokens into shared memory: one warp group makes numbers of 64 tokens at a time, rounded once.

A latent lies in shared memory as four planes of 128 channels: plane 2 * half + byte has the channels 256 * half + 2 * i + byte.
In 4 bits a half is a field of all bytes, in 8 bits half of the bytes. Each half is handed over by itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..tile.gluon import copy_tile, split_pairs
from .hopper_blocks import LATENTS, NUMBERS, ROPE, STEP, find_raw, load_id, part_of, store_sizes
from .latents import field_ptx

PAIRS = gl.constexpr(LATENTS.value // 4)
"""Pairs of channels of a half, which are the channels of a plane."""
HALVES = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
"""Pairs of a half [64, 128] of a warp group: a thread has 16 neighbouring bytes of a row."""
ROPES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""Rotary channels [64, 64]."""


@gluon.jit
def load_pairs(x_ptr, place, mask):
    """Load pairs of channels [64, 128] of rows of 16-bit numbers, some places [64] apart, as int32."""
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, HALVES))
    ptr = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    return gl.load(ptr + (gl.multiple_of(place, 4)[:, None] + pair[None, :]), mask[:, None], other=0)


@gluon.jit
def load_queries(half: gl.constexpr, q_ptr, factor_ptr, place, num_rows, queries):
    """Put half of the channels of a tile of queries into shared memory, their signs turned where factors are negative."""
    row = gl.arange(0, queries.shape[1], gl.SliceLayout(1, HALVES))
    first_ptr = q_ptr + place * (LATENTS + ROPE) + half * (LATENTS // 2)
    words = load_pairs(first_ptr, row * ((LATENTS + ROPE) // 2), row < num_rows)
    factor = gl.load(factor_ptr + place + row, row < num_rows, other=0.0)
    planes = split_pairs(words)
    for byte in gl.static_range(2):
        queries.index(half * 2 + byte).store(gl.where((factor < 0)[:, None], -planes[byte], planes[byte]))


@gluon.jit
def load_rope(q_ptr, factor_ptr, place, num_rows, rope_queries):
    """Put the rotary channels of a tile of queries into shared memory, likewise."""
    row = gl.arange(0, rope_queries.shape[1], gl.SliceLayout(1, ROPES))
    ptr = q_ptr + place * (LATENTS + ROPE) + LATENTS
    place_of = (row * (LATENTS + ROPE))[:, None] + gl.arange(0, ROPE, gl.SliceLayout(0, ROPES))[None, :]
    rope = gl.load(ptr + place_of, (row < num_rows)[:, None], other=0.0)
    factor = gl.load(factor_ptr + place + row, row < num_rows, other=0.0)
    rope_queries.index(0).store(gl.where((factor < 0)[:, None], -rope, rope))


@gluon.constexpr_function
def _params_layout():
    """Return the layout of the parameters [8, 32] of a half in which a thread has those of its pairs."""
    registers, lanes = [[0, 1], [0, 2], [0, 4], [0, 8]], [[0, 16], [1, 0], [2, 0], [4, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [8, 32])


@gluon.jit
def _load_params(params, half: gl.constexpr):
    """Load the scales and zeros of the two planes of a half, float16 [128]."""
    words = params.reshape((16, 32)).slice(half * 8, 8).load(_params_layout())
    even, odd = gl.split(gl.reshape(words, (PAIRS, 2)))
    PAIR: gl.constexpr = gl.SliceLayout(0, HALVES)
    even, odd = gl.convert_layout(even, PAIR, assert_trivial=True), gl.convert_layout(odd, PAIR, assert_trivial=True)
    return split_pairs(even), split_pairs(odd)


@gluon.jit
def _load_codes(record_ptr, part, half: gl.constexpr, LAYOUT: gl.constexpr):
    """Load pairs of bytes [64, 128] of a block: in 8 bits those of a half."""
    ptr = record_ptr.to(gl.pointer_type(gl.int16), bitcast=True)
    token = part * STEP + gl.arange(0, STEP, gl.SliceLayout(1, HALVES))
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, HALVES))
    return gl.load(ptr + ((token * (PAIRS * LAYOUT.bits // 4))[:, None] + (half * PAIRS + pair)[None, :]))


@gluon.jit
def _load_block(record_ptr, part, LAYOUT: gl.constexpr):
    """Load what the first half of a block takes: codes, norms, gain."""
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(gl.pointer_type(gl.float16), bitcast=True) + part * STEP
    norm = gl.load(norm_ptr + gl.arange(0, STEP, NUMBERS))
    gain = gl.load((record_ptr + LAYOUT.gains_offset).to(gl.pointer_type(gl.float32), bitcast=True))
    return _load_codes(record_ptr, part, 0, LAYOUT), norm, gain


@gluon.jit
def _store_half(codes, params, latents, slot, half: gl.constexpr, BITS: gl.constexpr):
    """Make the numbers of a half of a block, in the planes of a slot."""
    for byte in gl.static_range(2):
        scale, zero = params[byte]
        numbers = gl.inline_asm_elementwise(
            field_ptx(BITS, half if BITS == 4 else 0, byte), "=&r,r,r,r", [codes, scale[None, :], zero[None, :]], gl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip
        latents.index(slot * 4 + half * 2 + byte).store(numbers)


@gluon.jit
def _store_sizes(vectors, slot, norm, gain):
    """Store what belongs to the tokens of a block. A norm that is not finite is 0 for weights: its token's score is NaN."""
    store_sizes(vectors, slot, norm, gain, gl.where(gl.abs(norm) < float("inf"), norm, 0.0))


@gluon.jit
def _record_of(page_id, pages):
    """Return a page's record."""
    return pages[0] + gl.multiple_of(gl.maximum(page_id, 0).to(gl.int64) * pages[1], 16)


@gluon.jit
def _prefetch(ptr, BYTES: gl.constexpr):
    """Bring a number of bytes into the L2 cache."""
    gl.inline_asm_elementwise(
        prefetch_ptx(BYTES), "=r,l", [ptr.to(gl.int64, bitcast=True)], gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.constexpr_function
def prefetch_ptx(num_bytes):
    """PTX by which the first lane of a warp asks for so many bytes."""
    return (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %laneid; setp.eq.u32 p, t, 0; "
        f"@p cp.async.bulk.prefetch.L2.global [$1], {num_bytes}; mov.u32 $0, t; }}"
    )


@gluon.jit
def _copy_params(desc, params, page, i):
    """Copy the parameters of block i, which is on a page, as soon as there is room."""
    memory, full, free = params
    slot = i % 2
    mbarrier.wait(free.index(slot), (i // 2 & 1) ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    copy_tile(desc, [page, 0, 0], full.index(slot), memory.index(slot))


@gluon.jit
def copy_params(descs, ropes, params, bars, pages, paged, LAYOUT: gl.constexpr):
    """Copy rotary channels and parameters of a program's quantized blocks, by one warp, and ask for codes ahead."""
    CODES: gl.constexpr = STEP * PAIRS * LAYOUT.bits // 2
    params_desc, rope_desc = descs
    rope_full, scored = bars
    page = gl.to_tensor(0)
    if paged[2] > 0:
        page = gl.maximum(load_id(0, paged, LAYOUT), 0)
        _copy_params(params_desc, params, page, 0)
    for i in range(paged[2]):
        part = part_of(i, paged, LAYOUT)
        next_page = gl.maximum(load_id(i + 1, paged, LAYOUT), 0)
        codes_ptr = _record_of(next_page, pages) + part_of(i + 1, paged, LAYOUT) * CODES
        _prefetch(codes_ptr, CODES)
        if i + 1 < paged[2]:
            _copy_params(params_desc, params, next_page, i + 1)
        mbarrier.wait(scored, (i - 1) & 1)
        mbarrier.expect(rope_full, rope_desc.block_type.nbytes)
        copy_tile(rope_desc, [page, part * STEP, 0], rope_full, ropes.index(0))
        page = next_page


@gluon.jit
def _fill_pages(memory, params, bars, pages, paged, LAYOUT: gl.constexpr):
    """Fill slots with the quantized blocks of a program; what `copy_params` has brought into the L2 cache is loaded late."""
    latents, _, vectors = memory
    full, free = bars[0], bars[1]
    params, params_full, params_free = params
    record_ptr, part = _record_of(load_id(0, paged, LAYOUT), pages), part_of(0, paged, LAYOUT)
    codes, norm, gain = _load_block(record_ptr, part, LAYOUT)
    next_id = load_id(1, paged, LAYOUT)
    for i in range(paged[2]):
        slot = i % 2
        phase = (i // 2 & 1) ^ 1
        mbarrier.wait(params_full.index(slot), i // 2 & 1)
        found = _load_params(params.index(slot), 0)
        mbarrier.wait(free.index(slot * 2), phase)
        _store_half(codes, found, latents, slot, 0, LAYOUT.bits)
        _store_sizes(vectors, slot, norm.to(gl.float32), gain)
        if LAYOUT.bits == 8:
            codes = _load_codes(record_ptr, part, 1, LAYOUT)
        found = _load_params(params.index(slot), 1)
        fence_async_shared()
        mbarrier.arrive(full.index(slot * 2), count=1)
        record_ptr, part = _record_of(next_id, pages), part_of(i + 1, paged, LAYOUT)
        next_id = load_id(i + 2, paged, LAYOUT)
        mbarrier.wait(free.index(slot * 2 + 1), phase)
        _store_half(codes, found, latents, slot, 1, LAYOUT.bits)
        fence_async_shared()
        mbarrier.arrive(full.index(slot * 2 + 1), count=1)
        mbarrier.arrive(params_free.index(slot), count=1)
        codes, norm, gain = _load_block(record_ptr, part, LAYOUT)


@gluon.jit
def _fill_raw(i, memory, bars, raw, work, LAYOUT: gl.constexpr):
    """Fill a slot with block i of a program, of raw tokens: their norms are 1."""
    latents, ropes, vectors = memory
    full, free, scored, rope_full = bars
    page, index, part = find_raw(i - work[1], raw, work, LAYOUT)
    page_ptr, stride_token, first_token = raw[0] + page * raw[1], raw[2], part * STEP
    num_valid = raw[6] - index * LAYOUT.page_size
    slot = i % 2
    phase = (i // 2 & 1) ^ 1
    PART: gl.constexpr = STEP // 2  # tokens at a time, which registers have room for
    for half in gl.static_range(2):
        if half == 1:
            rope_token = first_token + gl.arange(0, STEP, gl.SliceLayout(1, ROPES))
            place = (rope_token * stride_token)[:, None] + gl.arange(0, ROPE, gl.SliceLayout(0, ROPES))[None, :]
            rope = gl.load(page_ptr + LATENTS + place, (rope_token < num_valid)[:, None], other=0.0)
            mbarrier.wait(scored, (i - 1) & 1)
            ropes.index(0).reshape((STEP, ROPE)).store(rope)
            fence_async_shared()
            mbarrier.arrive(rope_full, count=1)
        mbarrier.wait(free.index(slot * 2 + half), phase)
        if half == 0:
            _store_sizes(vectors, slot, gl.full((STEP,), 1.0, gl.float32, NUMBERS), gl.to_tensor(1.0))
        for start in gl.static_range(0, STEP, PART):
            token = first_token + start + gl.arange(0, PART, gl.SliceLayout(1, HALVES))
            words = load_pairs(page_ptr + half * (LATENTS // 2), token * (stride_token // 2), token < num_valid)
            planes = split_pairs(words)
            for byte in gl.static_range(2):
                latents.index(slot * 4 + half * 2 + byte).slice(start, PART).store(planes[byte])
        fence_async_shared()
        mbarrier.arrive(full.index(slot * 2 + half), count=1)


@gluon.jit
def fill(memory, params, bars, sources, work, LAYOUT: gl.constexpr):
    """Fill slots with all blocks of a program, quantized ones first."""
    pages, paged, raw = sources
    if paged[2] > 0:
        _fill_pages(memory, params, bars, pages, paged, LAYOUT)
    if len(raw) > 0:
        for i in range(work[1], work[5]):
            _fill_raw(i, memory, bars, raw, work, LAYOUT)
