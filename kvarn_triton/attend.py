"""Attention over pages, in pieces: what one program does with one step of tokens. Shared by the attention kernels.

Nothing is dequantized. The scale of a key channel is folded into the query, its zero is one number per head, the norm of a
token multiplies a score; the scale of a value token is folded into its weight, its zero is one number per head, the norm of
a channel multiplies the sum of a page. The tensor cores multiply integer codes (`device.field_as_half`). M are tokens in the
product with keys and channels in the product with values; N are query heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    channel_of_field,
    exponent_of,
    field_as_half,
    field_exponent,
    hadamard,
    online_softmax,
    power_of_two,
    split_fields,
    split_halves,
)

QUERY_EXPONENT = tl.constexpr(2)
"""Rotated queries are scaled to a largest magnitude in [2, 4): times the largest stored scale they stay inside float16."""


@triton.jit
def load_query(
    q_ptr,
    stride_q_head,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Rotate the queries of one kv head and cut them into planes [words, heads], one per field of a key word.

    Plane f carries the factor 2**-field_exponent(f). Returns the planes and what their product with keys must be
    multiplied by [heads].
    """
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_n < GROUP) & (offs_d < LAYOUT.head_dim)
    q = tl.load(q_ptr + offs_n * stride_q_head + offs_d, mask, other=0.0).to(tl.float32)
    q = hadamard(q, LAYOUT.block_size)
    exponent = tl.maximum(exponent_of(tl.max(tl.abs(q), axis=1)), -100) - QUERY_EXPONENT
    q = q * power_of_two(-exponent)[:, None]
    planes = ()
    parts = split_fields(q, LAYOUT.block_size, FIELDS)
    WIDTH: tl.constexpr = 2 if LAYOUT.k_bits == 3 else LAYOUT.k_bits
    for f in tl.static_range(FIELDS):
        planes = planes + (tl.trans(parts[f] * 0.5 ** field_exponent(f, WIDTH)).to(OPERAND),)
    return planes, power_of_two(exponent)


@triton.jit
def quantized_scores(
    record_ptr, offs_t, q_planes, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr, PTX: tl.constexpr
):
    """Return the scores [tokens, heads] of tokens `offs_t` of a record, before the factors of `load_query`."""
    BITS: tl.constexpr = LAYOUT.k_bits
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_W: tl.constexpr = q_planes[0].shape[0]
    BLOCK_N: tl.constexpr = q_planes[0].shape[1]
    offs_w = tl.arange(0, BLOCK_W)
    place = offs_t[:, None] * WORDS + offs_w[None, :]
    mask_w = offs_w < WORDS
    word_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.uint16))
    words = tl.load(word_ptr + place, mask_w[None, :], other=0)
    if BITS == 3:
        byte_ptr = record_ptr + LAYOUT.k_codes_offset + LAYOUT.page_size * WORDS * 2
        top = tl.load(byte_ptr + place, mask_w[None, :], other=0).to(tl.uint16)
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    product = tl.zeros((offs_t.shape[0], BLOCK_N), tl.float32)
    offset = tl.zeros((BLOCK_W, BLOCK_N), tl.float32)
    for f in tl.static_range(FIELDS):
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, FIELDS)
        scale, zero = split_halves(tl.load(params_ptr + channel, mask_w, other=0))
        offset += q_planes[f].to(tl.float32) * (zero.to(tl.float32) * 2.0 ** field_exponent(f, WIDTH))[:, None]
        folded = q_planes[f] * scale.to(OPERAND)[:, None]
        codes = field_as_half(words, f, WIDTH, PTX).to(OPERAND)
        product = tl.dot(codes, folded, product, input_precision="ieee")
        if BITS == 3:
            codes = field_as_half(top, f, 1, PTX).to(OPERAND)
            folded = (folded * (4.0 * 2.0 ** (field_exponent(f, WIDTH) - f))).to(OPERAND)
            product = tl.dot(codes, folded, product, input_precision="ieee")
    norm_ptr = (record_ptr + LAYOUT.k_norm_offset).to(tl.pointer_type(tl.float16))
    norm = tl.load(norm_ptr + offs_t).to(tl.float32)
    return (product * 16777216.0 + tl.sum(offset, axis=0)[None, :]) * norm[:, None]


@triton.jit
def add_quantized_values(
    accs,
    weights,
    alpha,
    record_ptr,
    offs_t,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return accs * alpha + values of tokens `offs_t` of a record times their weights [tokens, heads].

    Accumulator f [words, heads] belongs to the channels of field f of the value words.
    """
    BITS: tl.constexpr = LAYOUT.v_bits
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_W: tl.constexpr = accs[0].shape[0]
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < WORDS
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    scale, zero = split_halves(tl.load(params_ptr + offs_t))
    offset = tl.sum(weights * zero.to(tl.float32)[:, None], axis=0)
    folded = (weights * scale.to(tl.float32)[:, None]).to(OPERAND)
    place = offs_w[:, None] * LAYOUT.page_size + offs_t[None, :]
    word_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.uint16))
    words = tl.load(word_ptr + place, mask_w[:, None], other=0)
    if BITS == 3:
        byte_ptr = record_ptr + LAYOUT.v_codes_offset + LAYOUT.page_size * WORDS * 2
        top = tl.load(byte_ptr + place, mask_w[:, None], other=0).to(tl.uint16)
    norms_ptr = (record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.uint32))
    new = ()
    for f in tl.static_range(FIELDS):
        codes = field_as_half(words, f, WIDTH, PTX).to(OPERAND)
        product = tl.dot(codes, folded, input_precision="ieee") * (16777216.0 / 2.0 ** field_exponent(f, WIDTH))
        if BITS == 3:
            codes = field_as_half(top, f, 1, PTX).to(OPERAND)
            product += tl.dot(codes, folded, input_precision="ieee") * (16777216.0 * 4.0 / 2.0**f)
        if f % 2 == 0:
            norms = split_halves(tl.load(norms_ptr + f // 2 * WORDS + offs_w, mask_w, other=0))
        norm = norms[f % 2].to(tl.float32)
        new = new + (accs[f] * alpha[None, :] + (product + offset[None, :]) * norm[:, None],)
    return new


@triton.jit
def raw_scores(k_ptr, stride_token, offs_t, valid, q_planes, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr):
    """Return the scores [tokens, heads] of raw keys, before the factors of `load_query`."""
    WIDTH: tl.constexpr = 2 if LAYOUT.k_bits == 3 else LAYOUT.k_bits
    offs_w = tl.arange(0, q_planes[0].shape[0])
    mask = valid[:, None] & (offs_w < LAYOUT.head_dim // FIELDS)[None, :]
    scores = tl.zeros((offs_t.shape[0], q_planes[0].shape[1]), tl.float32)
    for f in tl.static_range(FIELDS):
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, FIELDS)
        keys = tl.load(k_ptr + offs_t[:, None] * stride_token + channel[None, :], mask, other=0.0)
        plane = (q_planes[f].to(tl.float32) * 2.0 ** field_exponent(f, WIDTH)).to(OPERAND)
        scores = tl.dot(keys.to(OPERAND), plane, scores, input_precision="ieee")
    return scores


@triton.jit
def add_raw_values(
    accs, weights, alpha, v_ptr, stride_token, offs_t, valid, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr
):
    """Return accs * alpha + raw values times their weights [tokens, heads]."""
    offs_w = tl.arange(0, accs[0].shape[0])
    mask = valid[None, :] & (offs_w < LAYOUT.head_dim // FIELDS)[:, None]
    new = ()
    for f in tl.static_range(FIELDS):
        channel = channel_of_field(offs_w, f, LAYOUT.block_size, FIELDS)
        values = tl.load(v_ptr + offs_t[None, :] * stride_token + channel[:, None], mask, other=0.0)
        new = new + (tl.dot(values.to(OPERAND), weights.to(OPERAND), accs[f] * alpha[None, :], input_precision="ieee"),)
    return new


@triton.jit
def attend_quantized(
    accs,
    m_i,
    l_i,
    q_planes,
    q_factor,
    pages_ptr,
    table_ptr,
    stride_page,
    first_page,
    last_page,
    num_valid,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Advance (accs, m_i, l_i) by body pages first_page to last_page of one kv head, of which num_valid tokens count."""
    STEPS: tl.constexpr = LAYOUT.page_size // BLOCK_T
    for i in tl.range(first_page * STEPS, last_page * STEPS, num_stages=NUM_STAGES):
        page = tl.load(table_ptr + i // STEPS).to(tl.int64)
        record_ptr = pages_ptr + page * stride_page
        offs_t = i % STEPS * BLOCK_T + tl.arange(0, BLOCK_T)
        scores = quantized_scores(record_ptr, offs_t, q_planes, LAYOUT, K_FIELDS, OPERAND, PTX) * q_factor[None, :]
        valid = i // STEPS * LAYOUT.page_size + offs_t < num_valid
        weights, alpha, m_i, l_i = online_softmax(tl.where(valid[:, None], scores, float("-inf")), m_i, l_i)
        accs = add_quantized_values(accs, weights, alpha, record_ptr, offs_t, LAYOUT, V_FIELDS, OPERAND, PTX)
    return accs, m_i, l_i


@triton.jit
def attend_raw(
    accs,
    m_i,
    l_i,
    q_planes,
    q_factor,
    raw_pages_ptr,
    table_ptr,
    stride_page,
    stride_half,
    stride_token,
    first_sink,
    num_sinks,
    first_tail,
    num_tails,
    num_sink_pages,
    num_tail_slots,
    sink_valid,
    tail_valid,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Advance (accs, m_i, l_i) by raw pages of one kv head: num_sinks sink pages, then num_tails body pages of the tail.

    The first is sink page first_sink and body page first_tail; sink_valid and tail_valid say how many tokens of the sink and
    of the body count.
    """
    STEPS: tl.constexpr = LAYOUT.page_size // BLOCK_T
    for i in tl.range(0, (num_sinks + num_tails) * STEPS, num_stages=1):
        in_sink = i // STEPS < num_sinks
        page_index = i // STEPS + tl.where(in_sink, first_sink, first_tail - num_sinks)
        column = tl.where(in_sink, page_index, num_sink_pages + page_index % tl.maximum(num_tail_slots, 1))
        page = tl.load(table_ptr + column).to(tl.int64)
        k_ptr = raw_pages_ptr + page * stride_page
        offs_t = i % STEPS * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = page_index * LAYOUT.page_size + offs_t < tl.where(in_sink, sink_valid, tail_valid)
        scores = raw_scores(k_ptr, stride_token, offs_t, valid, q_planes, LAYOUT, K_FIELDS, OPERAND)
        scores = tl.where(valid[:, None], scores * q_factor[None, :], float("-inf"))
        weights, alpha, m_i, l_i = online_softmax(scores, m_i, l_i)
        v_ptr = k_ptr + stride_half
        accs = add_raw_values(accs, weights, alpha, v_ptr, stride_token, offs_t, valid, LAYOUT, V_FIELDS, OPERAND)
    return accs, m_i, l_i
