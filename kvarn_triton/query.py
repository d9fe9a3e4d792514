"""The query of an attention kernel: rotated, scaled, and in the order of the channels of a key.

The channels of a key are in *key order*, that of its codes: [field, word], padded to BLOCK_K. It is the plain order if
head_dim is a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import exponent_of, field_exponent, item_of_field, join_planes, log2, power_of_two

QUERY_EXPONENT = tl.constexpr(2)
"""Rotated queries are scaled to a largest magnitude in [2, 4): times the largest stored scale they stay inside float16."""


@triton.jit
def key_channels(LAYOUT: tl.constexpr, FIELDS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the channel of each key-order place [BLOCK_K], and whether there is one."""
    place = tl.arange(0, BLOCK_K)
    if LAYOUT.block_size == BLOCK_K:
        channel = place
        mask = place >= 0
    else:
        PLANE: tl.constexpr = BLOCK_K // FIELDS
        channel = item_of_field(place % PLANE, place // PLANE, LAYOUT.block_size, FIELDS)
        mask = place % PLANE < LAYOUT.head_dim // FIELDS
    return channel, mask


@triton.jit
def _hadamard_block(rows, columns, SIZE: tl.constexpr, dtype: tl.constexpr):
    """Return entries [rows, columns] of a block-diagonal matrix of unnormalized Hadamard matrices of SIZE channels."""
    odd = rows[:, None] & columns[None, :] & (SIZE - 1)
    odd = odd ^ (odd >> 4)
    odd = (0x6996 >> (odd & 15)) & 1
    entry = tl.where(odd == 1, -1.0, 1.0)
    return tl.where(rows[:, None] // SIZE == columns[None, :] // SIZE, entry, 0.0).to(dtype)


@triton.jit
def _load_query_plane(
    q_ptr,
    stride_q_head,
    words,
    offs_n,
    FIELD: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
):
    """Load the channels [words, heads] of a query that share a field of key words."""
    channel = item_of_field(words, FIELD, LAYOUT.block_size, FIELDS)[:, None]
    mask = (words < LAYOUT.head_dim // FIELDS)[:, None] & (offs_n < GROUP)[None, :]
    return tl.load(q_ptr + offs_n[None, :] * stride_q_head + channel, mask, other=0.0)


@triton.jit
def load_query(
    q_ptr,
    stride_q_head,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    OPERAND: tl.constexpr,
    QUERY_OPERAND: tl.constexpr,
):
    """Rotate the queries of one kv head; returns them in key order [BLOCK_K, heads], and a factor of their scores [heads].

    The Hadamard matrix of a block is the product of one over fields and one over the words of a field: the second is a
    product of the tensor cores with exact operands, the first a handful of sums. The rows of field f carry the factor
    2**-field_exponent(f) that the codes of the field have in excess.
    """
    PLANE: tl.constexpr = BLOCK_K // FIELDS
    SIZE: tl.constexpr = LAYOUT.block_size // FIELDS
    WIDTH: tl.constexpr = 2 if LAYOUT.k_bits == 3 else LAYOUT.k_bits
    offs_n = tl.arange(0, BLOCK_N)
    words = tl.arange(0, PLANE)
    planes = ()
    if PLANE <= 64:
        loaded = ()
        for f in tl.static_range(FIELDS):  # all loads before the first use
            loaded = loaded + (_load_query_plane(q_ptr, stride_q_head, words, offs_n, f, GROUP, LAYOUT, FIELDS),)
        matrix = _hadamard_block(words, words, SIZE, QUERY_OPERAND)
        for f in tl.static_range(FIELDS):
            planes = planes + (tl.dot(matrix, loaded[f].to(QUERY_OPERAND), input_precision="ieee"),)
    else:
        for f in tl.static_range(FIELDS):
            plane = tl.zeros((PLANE, BLOCK_N), tl.float32)
            for start in range(0, PLANE, 32):  # the whole matrix would need more registers than there are
                some = start + tl.arange(0, 32)
                q = _load_query_plane(q_ptr, stride_q_head, some, offs_n, f, GROUP, LAYOUT, FIELDS).to(QUERY_OPERAND)
                plane = tl.dot(_hadamard_block(words, some, SIZE, QUERY_OPERAND), q, plane, input_precision="ieee")
            planes = planes + (plane,)
    for i in tl.static_range(log2(FIELDS)):
        rotated = ()
        for f in tl.static_range(FIELDS):
            if f & (1 << i):
                rotated = rotated + (planes[f ^ (1 << i)] - planes[f],)
            else:
                rotated = rotated + (planes[f] + planes[f ^ (1 << i)],)
        planes = rotated
    top = tl.zeros((BLOCK_N,), tl.float32)
    for f in tl.static_range(FIELDS):
        top = tl.maximum(top, tl.max(tl.abs(planes[f]), axis=0))
    exponent = tl.maximum(exponent_of(top), -100) - QUERY_EXPONENT
    scaled = ()
    for f in tl.static_range(FIELDS):
        factor = power_of_two(-exponent) * 0.5 ** field_exponent(f, WIDTH)
        scaled = scaled + (tl.trans((planes[f] * factor[None, :]).to(OPERAND)),)
    return tl.trans(join_planes(scaled)), power_of_two(exponent) * LAYOUT.block_size**-0.5


@triton.jit
def unscaled_query(q, FIELDS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr):
    """Return the queries of `load_query` without the factors of fields, for products with raw keys."""
    PLANE: tl.constexpr = q.shape[0] // FIELDS
    exponent = tl.arange(0, q.shape[0]) // PLANE * WIDTH % 8
    return (q.to(tl.float32) * power_of_two(exponent)[:, None]).to(OPERAND)
