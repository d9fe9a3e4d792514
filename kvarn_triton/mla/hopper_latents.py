"""How `hopper` brings latents into shared memory: records by the tensor memory accelerator, operands of products by some warps.

Codes, parameters and operands are words of 32 bits here, of four codes or two numbers. A record is rows of 128 bytes, of which
a block of 64 tokens takes those of its codes, of its rotary channels, and of all parameters.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout
from .latents import latents_ptx

_copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name until Triton 3.6
OLD_NAME = gl.constexpr(hasattr(gl.shared_memory_descriptor, "_reinterpret"))  # until Triton 3.6
STEP = gl.constexpr(64)
"""Tokens of a block: the rows of a product of a warp group."""
LATENT_WORDS = gl.constexpr(LATENT_DIM // 2)
ROPE_WORDS = gl.constexpr(ROPE_DIM // 2)
PLANE = gl.constexpr(LATENT_DIM // 2)
"""Channels of a plane: those of one field of the bytes of a token, or of half of the bytes."""
LOWEST = gl.constexpr(-100)
"""Least exponent of a gain, as in `rows`."""
WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
"""Operands in shared memory, as words."""


def describe(pages: torch.Tensor, layout: MLALayout) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """Describe pages, of which the codes, the parameters, and the rotary channels of a block are copied at once."""
    rows = layout.page_bytes // 128

    def part(dtype: torch.dtype, count: int) -> TensorDescriptor:
        memory, width = pages.view(dtype), 128 // dtype.itemsize
        shared = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=3)
        return TensorDescriptor(
            memory, [len(pages), rows, width], [memory.stride(0), width, 1], [1, count, width], shared
        )  # fmt: skip

    codes = STEP.value * LATENT_DIM * layout.bits // 8 // 128
    return part(torch.int32, codes), part(torch.int32, 4 * LATENT_DIM // 128), part(torch.float16, STEP.value)


@gluon.constexpr_function
def _codes_layout(warps):
    """Return the layout of words [64 tokens, 64] of codes: a thread has a word of some tokens, a warp half of a token's."""
    tokens, bases = [[32, 0], [16, 0]], [[0, 32]]
    while 1 << len(bases) < warps:
        bases.append(tokens.pop())
    registers = [[1, 0], [2, 0], [4, 0], [8, 0], *reversed(tokens)]
    return gl.DistributedLinearLayout(registers, [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]], bases, [], [64, 64])


@gluon.constexpr_function
def _rows_of_codes(warps, parts):
    """Return the same for rows of a record [128 or 256, 32 words], which the words of a token take 2 or 4 of."""
    size = 2 * parts
    tokens, bases = [[32 * size, 0], [16 * size, 0]], [[1, 0]]
    while 1 << len(bases) < warps:
        bases.append(tokens.pop())
    registers = [[size, 0], [2 * size, 0], [4 * size, 0], [8 * size, 0], *reversed(tokens)] + [[2, 0]] * (parts - 1)
    lanes = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]
    return gl.DistributedLinearLayout(registers, lanes, bases, [], [64 * size, 32])


@gluon.constexpr_function
def _rows_of_params(warps):
    """Return the layout of the rows [16, 32 words] of the parameters: a thread has those of its channels, of both planes."""
    bases = [[4, 0], [0, 0], [0, 0]][: warps.bit_length() - 1]
    lanes = [[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, bases, [], [16, 32])


@gluon.jit
def _pairs(words, CODES: gl.constexpr):
    """Return the scales and zeros [1, 64] of four channels each, in two words, of parameters [256]."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, CODES)
    even, odd = gl.split(gl.reshape(words, (PLANE // 2, 2)))
    scale, zero = gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;", "=&r,=&r,r,r", [even, odd], (gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    scales = gl.split(gl.reshape(scale, (PLANE // 4, 2)))
    zeros = gl.split(gl.reshape(zero, (PLANE // 4, 2)))
    first_scale = gl.convert_layout(scales[0], COLUMNS, assert_trivial=True)
    second_scale = gl.convert_layout(scales[1], COLUMNS, assert_trivial=True)
    first_zero = gl.convert_layout(zeros[0], COLUMNS, assert_trivial=True)
    second_zero = gl.convert_layout(zeros[1], COLUMNS, assert_trivial=True)
    return first_scale[None, :], second_scale[None, :], first_zero[None, :], second_zero[None, :]


@gluon.jit
def _find_block(i, paged, LAYOUT: gl.constexpr):
    """Return the page of the i-th block of a program's quantized ones, or of the last one, and which of the page it is."""
    ids_ptr, first_block, num_paged, first_body, num_ids = paged
    BLOCKS: gl.constexpr = LAYOUT.page_size // STEP
    block = first_block + gl.minimum(i, num_paged - 1) - first_body
    return gl.maximum(gl.load(ids_ptr + gl.minimum(block // BLOCKS, num_ids - 1)), 0), block % BLOCKS


@gluon.jit
def copy_blocks(descs, memory, bars, paged, LAYOUT: gl.constexpr):
    """Copy block by block of a program's quantized ones: codes and parameters, then rotary channels, which are operands."""
    codes_desc, params_desc, rope_desc = descs
    _, ropes, codes, params = memory
    full, free, rope_full, rope_free = bars
    RING: gl.constexpr = codes.shape[0]
    ROPES: gl.constexpr = ropes.shape[0]
    CODE_ROWS: gl.constexpr = codes_desc.block_type.shape[1]
    for i in range(paged[2]):
        page, part = _find_block(i, paged, LAYOUT)
        slot = i % RING
        mbarrier.wait(free.index(slot), (i // RING & 1) ^ 1)
        mbarrier.expect(full.index(slot), codes_desc.block_type.nbytes + params_desc.block_type.nbytes)
        _copy(codes_desc, [page, part * CODE_ROWS, 0], full.index(slot), codes.index(slot))
        _copy(params_desc, [page, LAYOUT.k_params_offset // 128, 0], full.index(slot), params.index(slot))
        slot = i % ROPES
        mbarrier.wait(rope_free.index(slot), (i // ROPES & 1) ^ 1)
        mbarrier.expect(rope_full.index(slot), rope_desc.block_type.nbytes)
        _copy(rope_desc, [page, LAYOUT.rope_offset // 128 + part * STEP, 0], rope_full.index(slot), ropes.index(slot))


@gluon.jit
def _store_sizes(vectors, slot, norm, gain, full):
    """Store the norms of a block, times the gain too, and the exponent of the gain."""
    sizes, norms, exponents = vectors
    exponent = gl.maximum((gain.to(gl.int32, bitcast=True) >> 23 & 255) - 127, LOWEST).to(gl.float32)
    sizes.index(slot).store(norm * gain)
    norms.index(slot).store(norm)
    exponents.index(slot).store(gl.zeros_like(norm) + exponent)
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _load_sizes(i, pages, paged, LAYOUT: gl.constexpr):
    """Load the norms of a block and the gain of its page, by one warp."""
    page, part = _find_block(i, paged, LAYOUT)
    record_ptr = pages[0] + page.to(gl.int64) * pages[1]
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(gl.pointer_type(gl.float16), bitcast=True) + part * STEP
    norm = gl.load(norm_ptr + gl.arange(0, STEP, gl.BlockedLayout([2], [32], [1], [0])))
    return norm, gl.load((record_ptr + LAYOUT.gains_offset).to(gl.pointer_type(gl.float32), bitcast=True))


@gluon.jit
def copy_sizes(vectors, full, free, pages, paged, LAYOUT: gl.constexpr):
    """Copy what belongs to the tokens of a program's quantized blocks, and to their pages."""
    SLOTS: gl.constexpr = vectors[0].shape[0]
    if paged[2] > 0:
        norm, gain = _load_sizes(0, pages, paged, LAYOUT)
        for i in range(paged[2]):
            next_norm, next_gain = _load_sizes(i + 1, pages, paged, LAYOUT)
            slot = i % SLOTS
            mbarrier.wait(free.index(slot), (i // SLOTS & 1) ^ 1)
            _store_sizes(vectors, slot, norm.to(gl.float32), gain, full)
            norm, gain = next_norm, next_gain


@gluon.jit
def _load_block(codes, params, LAYOUT: gl.constexpr, WARPS: gl.constexpr):
    """Load the codes, a tensor of words [64, 64] for each part of a token's bytes, and the parameters [256] of both planes."""
    PARTS: gl.constexpr = LAYOUT.bits // 4
    rows = codes.reshape((STEP * 2 * PARTS, 32)).load(_rows_of_codes(WARPS, PARTS))
    if PARTS == 1:
        words = (gl.reshape(rows, (STEP, 64)),)
    else:
        words = gl.split(gl.permute(gl.reshape(rows, (STEP, 2, 64)), (0, 2, 1)))
    rows = params.reshape((16, 32)).load(_rows_of_params(WARPS))
    return words, gl.split(gl.permute(gl.reshape(rows, (2, PLANE)), (1, 0)))


@gluon.jit
def _dequantized(block, LAYOUT: gl.constexpr, WARPS: gl.constexpr):
    """Return the latents of a block, without their norms: words [64 tokens, 256], of two numbers each."""
    words, params = block
    PARTS: gl.constexpr = LAYOUT.bits // 4
    FIELDS: gl.constexpr = 8 // LAYOUT.bits
    CODES: gl.constexpr = _codes_layout(WARPS)
    planes = ()
    for part in gl.static_range(PARTS):
        codes = gl.convert_layout(words[part], CODES, assert_trivial=True)
        for field in gl.static_range(FIELDS):
            scale, next_scale, zero, next_zero = _pairs(params[part * FIELDS + field], CODES)
            first, second = gl.inline_asm_elementwise(
                latents_ptx(field, LAYOUT.bits), "=&r,=&r,r,r,r,r,r", [codes, scale, next_scale, zero, next_zero],
                (gl.int32, gl.int32), is_pure=True, pack=1,
            )  # fmt: skip
            planes = planes + (gl.reshape(gl.join(first, second), (STEP, PLANE // 2)),)
    # As one tensor: between two stores to a stage all warps would wait.
    return gl.reshape(gl.permute(gl.join(planes[0], planes[1]), (0, 2, 1)), (STEP, LATENT_WORDS))  # type: ignore[misc]


@gluon.jit
def _as_words(operands, COUNT: gl.constexpr):
    """Return memory of operands [64, 2 * COUNT] as words [64, COUNT]."""
    if OLD_NAME:
        words = operands._reinterpret(gl.int32, [STEP, COUNT], WORDS)
    else:
        words = operands.reinterpret(gl.int32, [STEP, COUNT], WORDS)
    return words


@gluon.jit
def _store_words(latents, words):
    """Put words of numbers into a stage."""
    _as_words(latents, LATENT_WORDS).store(words)


@gluon.jit
def _copy_raw(latents, ropes, place, WARPS: gl.constexpr):
    """Put a block of a raw page into a stage: `place` is its words, those of a token, its first token, and where tokens end.

    Tokens from there on are 0.
    """
    words_ptr, stride_token, first, num_valid = place
    CODES: gl.constexpr = _codes_layout(WARPS)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    token = first + gl.arange(0, STEP, gl.SliceLayout(1, CODES))
    at = (token * stride_token)[:, None] + gl.arange(0, 64, gl.SliceLayout(0, CODES))[None, :]
    tile = _as_words(latents, LATENT_WORDS)
    for part in gl.static_range(LATENT_WORDS // 64):
        tile.slice(part * 64, 64, dim=1).store(gl.load(words_ptr + part * 64 + at, (token < num_valid)[:, None], other=0))
    token = first + gl.arange(0, STEP, gl.SliceLayout(1, ROWS))
    at = (token * stride_token)[:, None] + gl.arange(0, ROPE_WORDS, gl.SliceLayout(0, ROWS))[None, :]
    rope = gl.load(words_ptr + LATENT_WORDS + at, (token < num_valid)[:, None], other=0)
    _as_words(ropes.reshape((STEP, ROPE_WORDS * 2)), ROPE_WORDS).store(rope)


@gluon.jit
def _next_codes(codes, params, full, i, num_paged, LAYOUT: gl.constexpr, PLAN: gl.constexpr):
    """Load the codes and parameters of the i-th block once they are there; behind the last block, whatever is there."""
    RING: gl.constexpr = codes.shape[0]
    mbarrier.wait(full.index(i % RING), i // RING & 1, pred=i < num_paged)
    return _load_block(codes.index(i % RING), params.index(i % RING), LAYOUT, PLAN.producers)


@gluon.jit
def produce(memory, vectors, bars, codes_bars, raw, work, LAYOUT: gl.constexpr, PLAN: gl.constexpr):
    """Put block by block into shared memory as operands, each into the stage that a group has left."""
    latents, ropes, codes, params = memory
    full, free, rope_full, rope_free, sizes_full = bars
    codes_full, codes_free = codes_bars
    _, num_paged, first, in_sink, first_tail, count = work
    STAGES: gl.constexpr = latents.shape[0]
    ROPES: gl.constexpr = ropes.shape[0]
    RING: gl.constexpr = codes.shape[0]
    if num_paged > 0:
        block = _next_codes(codes, params, codes_full, gl.to_tensor(0), num_paged, LAYOUT, PLAN)
        words = _dequantized(block, LAYOUT, PLAN.producers)
        mbarrier.arrive(codes_free.index(0), count=1)
        for i in range(num_paged):
            stage = i % STAGES
            if RING > 1:  # the codes of the next block are on their way while this one is stored
                block = _next_codes(codes, params, codes_full, i + 1, num_paged, LAYOUT, PLAN)
            mbarrier.wait(free.index(stage), (i // STAGES & 1) ^ 1)
            _store_words(latents.index(stage), words)
            fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)
            if RING == 1:
                block = _next_codes(codes, params, codes_full, i + 1, num_paged, LAYOUT, PLAN)
            words = _dequantized(block, LAYOUT, PLAN.producers)
            # Not before codes have become numbers: loads on their way would see what the next copy writes.
            mbarrier.arrive(codes_free.index((i + 1) % RING), count=1, pred=i + 1 < num_paged)
    if len(raw) > 0:
        BLOCKS: gl.constexpr = LAYOUT.page_size // STEP
        raw_ptr, stride_page, stride_token, table_ptr, num_sink_pages, num_tail_slots, seq_len = raw
        one = gl.full((STEP,), 1.0, gl.float32, gl.BlockedLayout([1], [32], [PLAN.producers], [0]))
        for i in range(num_paged, count):
            j = i - num_paged
            stage = i % STAGES
            slot = i % ROPES
            block = gl.where(j < in_sink, first + j, first_tail + j - in_sink)
            index = block // BLOCKS
            column = gl.where(j < in_sink, index, num_sink_pages + (index - num_sink_pages) % num_tail_slots)
            page = gl.maximum(gl.load(table_ptr + column), 0)
            words_ptr = (raw_ptr + page.to(gl.int64) * stride_page).to(gl.pointer_type(gl.int32), bitcast=True)
            mbarrier.wait(free.index(stage), (i // STAGES & 1) ^ 1)
            mbarrier.wait(rope_free.index(slot), (i // ROPES & 1) ^ 1)
            place = (words_ptr, stride_token // 2, block % BLOCKS * STEP, seq_len - index * LAYOUT.page_size)
            _copy_raw(latents.index(stage), ropes.index(slot), place, PLAN.producers)
            fence_async_shared()
            mbarrier.arrive(full.index(stage), count=1)
            mbarrier.arrive(rope_full.index(slot), count=1)
            _store_sizes(vectors, slot, one, gl.to_tensor(1.0), sizes_full)
