"""Attention of 16 or 32 query rows to a quantized page that is dequantized in registers: what few rows of prefill attention do.

Query rows are rows of the products, as in `dequantized`. Their right operands, keys and values, never leave the threads that
load their codes: a product of so few rows takes its operands from registers. No number of a page is stored to shared memory.
Warps share them, each making those of a part of the tokens and then of the channels: what goes through shared memory is queries
and weights.

Codes are loaded as words of 16 bits, two bytes, because a register of the tensor cores holds two neighbouring numbers of 16
bits. A field of the lower or of the upper bytes of all words is a *plane*, and has a product of its own. A code stays where it
lies in its byte: the bits of `code << place` are the float16 number code * 2**(place - 24), below the normal range, which one
multiply-add turns into `(code * scale + zero) * unit`, rounded once. The unit keeps the factors, 2**(24 - place) times as large
as scales, within float16.

Planes of values are tokens of a page: columns of scores are in the order of the planes (`token_in_order`), so that weights are
operands as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile.arithmetic import split_halves
from ..tile.codes import codes_of_words_ptx, item_of_field, load_words, place_in_word, unsigned_codes
from ..tile.high_bits import order_of
from .operands import LEAST_PLANE, join_planes, split_planes
from .softmax import State, advance


@triton.jit
def token_in_order(column, LAYOUT: tl.constexpr, FIELDS: tl.constexpr):
    """Return the token of a page whose score is in a column."""
    WORDS: tl.constexpr = LAYOUT.page_size // FIELDS // 2
    plane = column // WORDS
    return plane // 2 * (2 * WORDS) + column % WORDS * 2 + plane % 2


@triton.constexpr_function
def _order_of_planes(columns, page_size, fields):
    """Return for each bit of the number of a column the bit of the token that `token_in_order` says."""
    word_bits = (page_size // fields // 2).bit_length() - 1
    order = (*range(1, word_bits + 1), 0, *range(word_bits + 1, page_size.bit_length() - 1))
    return order[: columns.bit_length() - 1]


@triton.constexpr_function
def _first_token(column, page_size, fields):
    """Return what `token_in_order` says of a column."""
    words = page_size // fields // 2
    plane = column // words
    return plane // 2 * (2 * words) + column % words * 2 + plane % 2


@triton.jit
def _padded(plane):
    """Pad a plane [rows, words] with zeros to LEAST_PLANE words."""
    if plane.shape[1] < LEAST_PLANE:
        plane = join_planes((plane, tl.zeros_like(plane)))
    return plane


@triton.constexpr_function
def headroom(bits):
    """Return what dequantized numbers are multiplied by: `scale * (2**bits - 1)` is at most 2, and 2**16 too large."""
    return 2.0 ** (bits - 10)


@triton.constexpr_function
def _params_ptx(field, bits):
    """PTX of `_plane_params` for two channels or tokens. The factor is too large for float16, hence two of them."""
    exponent = 24 - place_in_word(field, bits) + bits - 10
    first, second, unit = (((15 + e) << 10) * 0x00010001 for e in (exponent // 2, exponent - exponent // 2, bits - 10))
    return (
        "{ .reg .b32 m; prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632; "
        f"mov.b32 m, {first}; mul.rn.f16x2 $0, $0, m; mov.b32 m, {second}; mul.rn.f16x2 $0, $0, m; "
        f"mov.b32 m, {unit}; mul.rn.f16x2 $1, $1, m; }}"
    )


@triton.jit
def _load_params(params_ptr, pair, FIELD: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Return (scale, zero) of the lower plane of a field and of the upper one.

    `pair` [words] are the pairs of channels or tokens whose codes are in the field of a word.
    """
    BLOCK: tl.constexpr = pair.shape[0]
    pairs_ptr = params_ptr.to(tl.pointer_type(tl.uint64)) + pair
    if WORDS == BLOCK:
        pairs = tl.load(pairs_ptr)
    else:
        pairs = tl.load(pairs_ptr, tl.arange(0, BLOCK) < WORDS, other=0)
    lower = _plane_params((pairs & 0xFFFFFFFF).to(tl.uint32), FIELD, BITS, PTX)
    return lower, _plane_params((pairs >> 32).to(tl.uint32), FIELD, BITS, PTX)


@triton.jit
def _plane_params(params, FIELD: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Return float16 factors and offsets of the codes of a plane, from pairs of a scale and a zero."""
    if PTX:
        scale, zero = tl.inline_asm_elementwise(
            _params_ptx(FIELD, BITS), "=&r,=&r,r,r", [params], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        scale, zero = split_halves(params)
        scale = (scale.to(tl.float32) * (headroom(BITS) * 2.0 ** (24 - place_in_word(FIELD, BITS)))).to(tl.float16)
        zero = (zero.to(tl.float32) * headroom(BITS)).to(tl.float16)
    return scale, zero


@triton.constexpr_function
def _numbers_ptx(field, upper, bits):
    """PTX of `_numbers` for two words."""
    return "{ .reg .b32 u; " + codes_of_words_ptx(field, upper, bits) + "fma.rn.f16x2 $0, $0, $3, $4; }"


@triton.jit
def _numbers(
    words, high, scale, zero, FIELD: tl.constexpr, UPPER: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """Return the float16 numbers [words, columns] of one plane of int16 words. `high` as `codes.load_words` returns them."""
    scale = tl.broadcast_to(scale[:, None], words.shape)
    zero = tl.broadcast_to(zero[:, None], words.shape)
    if PTX:
        numbers = tl.inline_asm_elementwise(
            _numbers_ptx(FIELD, UPPER, BITS), "=&r,r,r,r,r", [words, high, scale, zero], tl.float16, is_pure=True, pack=2
        )  # fmt: skip
    else:
        codes = unsigned_codes(words >> (8 * UPPER), high >> (8 * UPPER), FIELD, BITS)
        codes = codes.to(tl.float32) * 2.0 ** (place_in_word(FIELD, BITS) - 24)
        numbers = (codes * scale.to(tl.float32) + zero.to(tl.float32)).to(tl.float16)
    return numbers


@triton.jit
def _norms_in_order(norm_ptr, LAYOUT: tl.constexpr, FIELDS: tl.constexpr):
    """Return the float16 norms of the tokens of a page in the order of `token_in_order`."""
    WORDS: tl.constexpr = LAYOUT.page_size // FIELDS // 2
    pairs = tl.load(norm_ptr.to(tl.pointer_type(tl.uint32)) + tl.arange(0, FIELDS * WORDS))
    lower, upper = split_halves(pairs)
    planes = tl.permute(tl.reshape(tl.join(lower, upper), (FIELDS, WORDS, 2)), (0, 2, 1))
    return tl.reshape(planes, (LAYOUT.page_size,))


@triton.jit
def register_scores(record_ptr, planes, q_factor, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the scores [rows, page_size] of a record, tokens in the order of `token_in_order`, PLAN.block_t to a product.

    `planes` are those of `query.rotate_planes`.
    """
    BITS: tl.constexpr = LAYOUT.k_bits
    FIELDS: tl.constexpr = PLAN.k_fields
    PTX: tl.constexpr = PLAN.ptx
    G: tl.constexpr = LAYOUT.page_size
    BLOCK_T: tl.constexpr = PLAN.block_t
    WORDS: tl.constexpr = LAYOUT.head_dim // FIELDS // 2
    BLOCK_K: tl.constexpr = planes[0].shape[1]
    codes_ptr = record_ptr + LAYOUT.k_codes_offset
    params_ptr = record_ptr + LAYOUT.k_params_offset
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)))
    factor = q_factor * gain * (1.0 / headroom(BITS))
    word = tl.arange(0, BLOCK_K)
    params = ()
    for f in tl.static_range(FIELDS):
        pair = item_of_field(word, f, LAYOUT.block_size // 2, FIELDS)
        params = params + _load_params(params_ptr, pair, f, WORDS, BITS, PTX)
    ORDER: tl.constexpr = _order_of_planes(BLOCK_T, G, PLAN.v_fields)
    products = ()
    for part in tl.static_range(G // BLOCK_T):
        token = token_in_order(part * BLOCK_T + tl.arange(0, BLOCK_T), LAYOUT, PLAN.v_fields)
        words, high = load_words(
            codes_ptr, token, _first_token(part * BLOCK_T, G, PLAN.v_fields), ORDER, WORDS, BLOCK_K, G, BITS, PTX
        )
        product = tl.zeros((planes[0].shape[0], BLOCK_T), tl.float32)
        for plane in tl.static_range(2 * FIELDS):
            numbers = _numbers(words, high, params[plane][0], params[plane][1], plane // 2, plane % 2, BITS, PTX)
            product = tl.dot(planes[plane], numbers, product, input_precision="ieee")
        products = products + (product,)
    norm = _norms_in_order(record_ptr + LAYOUT.k_norm_offset, LAYOUT, PLAN.v_fields).to(tl.float32) * factor
    return join_planes(products) * norm[None, :]


@triton.jit
def add_register_values(state, scores, record_ptr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the state advanced by the values of a record with the scores of `register_scores`, PLAN.block_d channels at once.

    Nothing has to be done about gains: sums are multiplied by those of a page in float32.
    """
    BITS: tl.constexpr = LAYOUT.v_bits
    FIELDS: tl.constexpr = PLAN.v_fields
    PTX: tl.constexpr = PLAN.ptx
    D: tl.constexpr = LAYOUT.v_head_dim
    WORDS: tl.constexpr = LAYOUT.page_size // FIELDS // 2
    BLOCK_W: tl.constexpr = max(WORDS, LEAST_PLANE)
    BLOCK_D: tl.constexpr = PLAN.block_d
    CHANNELS: tl.constexpr = state.acc.shape[1]
    gain = tl.load((record_ptr + LAYOUT.gains_offset).to(tl.pointer_type(tl.float32)) + 1)
    weights, alpha, m, l_sum = advance(state, scores, False)
    operands = split_planes(weights.to(tl.float16), 2 * FIELDS)
    acc = state.acc * alpha[:, None]

    codes_ptr = record_ptr + LAYOUT.v_codes_offset
    params_ptr = record_ptr + LAYOUT.v_params_offset
    word = tl.arange(0, BLOCK_W)
    params = ()
    for f in tl.static_range(FIELDS):
        params = params + _load_params(params_ptr, f * WORDS + word, f, WORDS, BITS, PTX)
    products = ()
    for part in tl.static_range(CHANNELS // BLOCK_D):
        row = part * BLOCK_D + tl.arange(0, BLOCK_D)
        words, high = load_words(codes_ptr, row, part * BLOCK_D, order_of(BLOCK_D), WORDS, BLOCK_W, D, BITS, PTX)
        product = tl.zeros((acc.shape[0], BLOCK_D), tl.float32)
        for plane in tl.static_range(2 * FIELDS):
            numbers = _numbers(words, high, params[plane][0], params[plane][1], plane // 2, plane % 2, BITS, PTX)
            product = tl.dot(_padded(operands[plane]), numbers, product, input_precision="ieee")
        products = products + (product,)
    channel = tl.arange(0, CHANNELS)
    norm = tl.load((record_ptr + LAYOUT.v_norm_offset).to(tl.pointer_type(tl.float16)) + channel, channel < D, other=0.0)
    norm = norm.to(tl.float32) * (gain * (1.0 / headroom(BITS)))
    return State(acc + join_planes(products) * norm[None, :], m, l_sum)
