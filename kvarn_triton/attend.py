"""Attention over pages, in pieces: what one program does with one step of tokens. Shared by the attention kernels.

Nothing is dequantized. The scale of a key channel is folded into the query, its zero is one number per head, the norm of a
token multiplies a score; the scale of a value token is folded into its weight, its zero is one number per head, the norm of
a channel multiplies the sum of a page. The tensor cores multiply integer codes (`device.fields_as_half`). M are tokens in the
product with keys and channels in the product with values; N are query heads.

Keys and queries are in the *key order* of `query`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import field_exponent, fields_as_half, load_norms, power_of_two, split_halves
from .query import key_channels, unscaled_query

CODE_UNIT = tl.constexpr(16777216.0)
"""2**24: what the float16 number of code 1 must be multiplied by."""


@triton.constexpr_function
def largest_field_exponent(fields, width):
    """Return the largest exponent of the fields of a word (`device.field_exponent`)."""
    return max(field_exponent(f, width) for f in range(fields))


@triton.jit
def quantized_scores(
    record_ptr,
    first,
    q,
    q_factor,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return the scores [BLOCK_T, heads] of the tokens of a record from `first` on."""
    BITS: tl.constexpr = LAYOUT.k_bits
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = LAYOUT.head_dim // FIELDS
    BLOCK_K: tl.constexpr = q.shape[0]
    BLOCK_W: tl.constexpr = BLOCK_K // FIELDS
    offs_w = tl.arange(0, BLOCK_W)[None, :]
    mask_w = offs_w < WORDS
    place = (first + tl.arange(0, BLOCK_T))[:, None] * WORDS + offs_w
    word_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.uint16)) + place
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    channel, mask_k = key_channels(LAYOUT, FIELDS, BLOCK_K)
    if BLOCK_W == WORDS:
        words = tl.load(word_ptr)
        scale, zero = split_halves(tl.load(params_ptr + channel))
    else:
        words = tl.load(word_ptr, mask_w, other=0)
        scale, zero = split_halves(tl.load(params_ptr + channel, mask_k, other=0))
    unit = power_of_two(tl.arange(0, BLOCK_K) // BLOCK_W * WIDTH % 8)
    offset = tl.sum(q.to(tl.float32) * (zero.to(tl.float32) * unit)[:, None], axis=0) * q_factor
    folded = q * scale.to(OPERAND)[:, None]
    codes = fields_as_half(words, BLOCK_W, FIELDS, WIDTH, PTX).to(OPERAND)
    product = tl.dot(codes, folded, input_precision="ieee")
    if BITS == 3:
        byte_ptr = record_ptr + LAYOUT.k_codes_offset + LAYOUT.page_size * WORDS * 2 + place
        top = tl.load(byte_ptr, mask_w, other=0).to(tl.uint16)
        field = tl.arange(0, BLOCK_K) // BLOCK_W
        folded = (folded.to(tl.float32) * power_of_two(2 + field * WIDTH % 8 - field)[:, None]).to(OPERAND)
        codes = fields_as_half(top, BLOCK_W, FIELDS, 1, PTX).to(OPERAND)
        product = tl.dot(codes, folded, product, input_precision="ieee")
    norm = load_norms(record_ptr + LAYOUT.k_norm_offset + 2 * first, BLOCK_T, BLOCK_T)
    return (product * (q_factor * CODE_UNIT)[None, :] + offset[None, :]) * norm[:, None]


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _softmax_step(scores, m_i):
    """Return weights [tokens, heads], the factor of older sums, and the new maximum; one score of each head is finite."""
    m_new = tl.maximum(m_i, tl.max(scores, axis=0))
    return tl.exp2(scores - m_new[None, :]), tl.exp2(m_i - m_new), m_new


@triton.jit
def add_quantized_values(
    acc,
    l_i,
    weights,
    alpha,
    record_ptr,
    first,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    PTX: tl.constexpr,
):
    """Return acc [channels, heads] and l_i advanced by the values of a record's tokens from `first` on, times weights."""
    BITS: tl.constexpr = LAYOUT.v_bits
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.head_dim
    BLOCK: tl.constexpr = LAYOUT.v_block_size
    BLOCK_T: tl.constexpr = weights.shape[0]
    BLOCK_D: tl.constexpr = acc.shape[0]
    BLOCK_WORDS: tl.constexpr = BLOCK // FIELDS
    # A step of fewer tokens than a block reads all words of the block and takes some of their fields.
    USED: tl.constexpr = min(FIELDS, BLOCK_T // BLOCK_WORDS)
    STEP_WORDS: tl.constexpr = BLOCK_T // USED
    TOP: tl.constexpr = largest_field_exponent(FIELDS, WIDTH)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    token = tl.arange(0, BLOCK_T)
    field = (first + token) % BLOCK // BLOCK_WORDS
    params_ptr = (record_ptr + LAYOUT.v_params_offset).to(tl.pointer_type(tl.uint32))
    scale, zero = split_halves(tl.load(params_ptr + first + token))
    total, offset = tl.reduce((weights, weights * zero.to(tl.float32)[:, None]), 0, _add_pairs)
    place = offs_d[:, None] * (G // FIELDS) + first // BLOCK * BLOCK_WORDS + tl.arange(0, STEP_WORDS)[None, :]
    words_ptr = (record_ptr + LAYOUT.v_codes_offset).to(tl.pointer_type(tl.uint16)) + place
    if BLOCK_D == D:
        words = tl.load(words_ptr)
    else:
        words = tl.load(words_ptr, mask_d[:, None], other=0)
    if USED < FIELDS:
        first_field = first % BLOCK // BLOCK_WORDS
        words = (words >> (first_field * WIDTH).to(tl.uint16)).to(tl.uint16)
        field = field - first_field
    factor = scale.to(tl.float32) * power_of_two(TOP - field * WIDTH % 8)
    codes = fields_as_half(words, BLOCK_WORDS, USED, WIDTH, PTX).to(OPERAND)
    product = tl.dot(codes, (weights * factor[:, None]).to(OPERAND), input_precision="ieee")
    if BITS == 3:
        bytes_ptr = record_ptr + LAYOUT.v_codes_offset + 2 * D * (G // FIELDS) + place
        top = tl.load(bytes_ptr, mask_d[:, None], other=0).to(tl.uint16)
        if USED < FIELDS:
            top = (top >> first_field.to(tl.uint16)).to(tl.uint16)
        factor = scale.to(tl.float32) * power_of_two(7 - field)
        codes = fields_as_half(top, BLOCK_WORDS, USED, 1, PTX).to(OPERAND)
        high = tl.dot(codes, (weights * factor[:, None]).to(OPERAND), input_precision="ieee")
        product += high * (4.0 * 2.0 ** (TOP - 7))
    norm = load_norms(record_ptr + LAYOUT.v_norm_offset, D, BLOCK_D)
    acc = acc * alpha[None, :] + (product * (CODE_UNIT * 0.5**TOP) + offset[None, :]) * norm[:, None]
    return acc, l_i * alpha + total


@triton.jit
def load_page_id(table_ptr, column, mask):
    """Load a page id as two halves, so that Triton doesn't make an asynchronous copy of it.

    The loops over pages load an id one step before the copies that need it. Were it a copy itself, the pipeliner would wait
    for each copy as soon as it is issued.
    """
    half_ptr = (table_ptr + column).to(tl.pointer_type(tl.uint16))
    low = tl.load(half_ptr, mask, other=0).to(tl.int32)
    high = tl.load(half_ptr + 1, mask, other=0).to(tl.int32)
    return (low | (high << 16)).to(tl.int64)


@triton.jit
def prefetch_record(record_ptr, BYTES: tl.constexpr, PTX: tl.constexpr):
    """Start bringing a record into the L2 cache, so that it is near when the query is ready."""
    if PTX:
        LINES: tl.constexpr = triton.cdiv(BYTES, 128)
        line = tl.minimum(tl.arange(0, triton.next_power_of_2(LINES)), LINES - 1)
        address = record_ptr.to(tl.int64) + line * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def attend_quantized(
    acc,
    m_i,
    l_i,
    q,
    q_factor,
    pages_ptr,
    table_ptr,
    stride_page,
    page,
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
    """Advance (acc, m_i, l_i) by body pages first_page to last_page of one kv head, of which num_valid tokens count.

    `page` is the id of the first of them.
    """
    G: tl.constexpr = LAYOUT.page_size
    STEPS: tl.constexpr = G // BLOCK_T
    last_step = tl.minimum(last_page * STEPS, tl.cdiv(num_valid, BLOCK_T))
    for i in tl.range(first_page * STEPS, last_step, num_stages=NUM_STAGES):
        next_page = load_page_id(table_ptr, (i + 1) // STEPS, i + 1 < last_step)
        record_ptr = pages_ptr + page * stride_page
        first = i % STEPS * BLOCK_T
        scores = quantized_scores(record_ptr, first, q, q_factor, LAYOUT, BLOCK_T, K_FIELDS, OPERAND, PTX)
        if (i + 1) * BLOCK_T > num_valid:
            valid = i * BLOCK_T + tl.arange(0, BLOCK_T) < num_valid
            scores = tl.where(valid[:, None], scores, float("-inf"))
        weights, alpha, m_i = _softmax_step(scores, m_i)
        acc, l_i = add_quantized_values(acc, l_i, weights, alpha, record_ptr, first, LAYOUT, V_FIELDS, OPERAND, PTX)
        page = next_page
    return acc, m_i, l_i


@triton.jit
def _raw_run(
    i,
    first_sink,
    num_sinks,
    first_tail,
    tail_token,
    num_sink_pages,
    num_tail_slots,
    G: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the first token of run i, in the sink or in the body, and its page's column in the raw table."""
    in_sink = i < num_sinks
    start = tl.where(in_sink, (first_sink + i) * BLOCK_R, tail_token + (first_tail + i - num_sinks) * BLOCK_R)
    return start, tl.where(in_sink, start // G, num_sink_pages + start // G % tl.maximum(num_tail_slots, 1))


@triton.jit
def attend_raw(
    acc,
    m_i,
    l_i,
    q,
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
    tail_token,
    num_sink_pages,
    num_tail_slots,
    sink_valid,
    tail_valid,
    LAYOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    K_FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Advance (acc, m_i, l_i) by runs of BLOCK_R raw tokens of one kv head: num_sinks of the sink, then num_tails of the tail.

    The first are runs first_sink of the sink and first_tail of the tail, which starts at token tail_token of the body;
    sink_valid and tail_valid say how many tokens of the sink and of the body count.
    """
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.head_dim
    WIDTH: tl.constexpr = 2 if LAYOUT.k_bits == 3 else LAYOUT.k_bits
    q = unscaled_query(q, K_FIELDS, WIDTH, OPERAND)
    channel, mask_k = key_channels(LAYOUT, K_FIELDS, q.shape[0])
    offs_d = tl.arange(0, acc.shape[0])
    count = num_sinks + num_tails
    start, column = _raw_run(
        0, first_sink, num_sinks, first_tail, tail_token, num_sink_pages, num_tail_slots, G, BLOCK_R
    )  # fmt: skip
    page = load_page_id(table_ptr, column, count > 0)
    for i in tl.range(0, count, num_stages=NUM_STAGES):
        in_sink = i < num_sinks
        next_start, column = _raw_run(
            i + 1, first_sink, num_sinks, first_tail, tail_token, num_sink_pages, num_tail_slots, G, BLOCK_R
        )  # fmt: skip
        next_page = load_page_id(table_ptr, column, i + 1 < count)
        offs_t = tl.arange(0, BLOCK_R)
        valid = start + offs_t < tl.where(in_sink, sink_valid, tail_valid)
        token_ptr = raw_pages_ptr + page * stride_page + (start % G + offs_t)[:, None] * stride_token
        keys = tl.load(token_ptr + channel[None, :], valid[:, None] & mask_k[None, :], other=0.0)
        scores = tl.dot(keys.to(OPERAND), q, input_precision="ieee") * q_factor[None, :]
        weights, alpha, m_i = _softmax_step(tl.where(valid[:, None], scores, float("-inf")), m_i)
        l_i = l_i * alpha + tl.sum(weights, axis=0)
        values = tl.load(token_ptr + stride_half + offs_d[None, :], valid[:, None] & (offs_d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(values.to(OPERAND)), weights.to(OPERAND), acc * alpha[None, :], input_precision="ieee")
        start = next_start
        page = next_page
    return acc, m_i, l_i
