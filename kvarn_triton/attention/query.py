"""The query of an attention kernel: rotated as keys are, scaled, and in planes of channels as the fields of key bytes are.

Plane f of a query holds the channels of field f of the bytes of a key, byte by byte and padded to BLOCK_K. A Hadamard matrix
of a block of channels is the product of one over the fields of a byte and one over the bytes of a field; the second is the
product of one over 4 * OPERAND_RUN neighbouring bytes, which the tensor cores multiply with, and one over groups of so many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile.arithmetic import hadamard, log2
from ..tile.codes import field_factor, item_of_field
from .operands import DIGITS_MAX, LEAST_PLANE, OPERAND_RUN, join_planes, spread_columns, two_terms

LEAST_QUERY = tl.constexpr(1e-30)
"""Rotated queries whose largest number is below this, zero ones too, are not scaled up further: float32 would overflow."""
QUERY_MAX = tl.constexpr(4096.0)
"""Largest magnitude of a query in 16 bits: what is a millionth of it is still a normal float16."""


@triton.jit
def plane_channels(FIELD: tl.constexpr, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, byte):
    """Return the channels of a field of the bytes of a key, and whether there are such bytes."""
    return item_of_field(byte, FIELD, LAYOUT.block_size, FIELDS), byte < LAYOUT.head_dim // FIELDS


@triton.jit
def channel_in_order(index, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr, FIELDS: tl.constexpr):
    """Return the channels in the order of query and key operands, field by field, and which are not padding.

    They are those of `item_of_field`, written so that the compiler sees neighbours that lie side by side.
    """
    NEIGHBOURS: tl.constexpr = LAYOUT.block_size // FIELDS
    channel = (
        index // NEIGHBOURS % (BLOCK_K // NEIGHBOURS) * LAYOUT.block_size + index // BLOCK_K * NEIGHBOURS + index % NEIGHBOURS
    )
    return channel, index % BLOCK_K < LAYOUT.head_dim // FIELDS


@triton.jit
def _hadamard_matrix(row, column, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Return entries of the unnormalized Hadamard matrix, block-diagonal in BLOCK channels.

    An entry is negative where the number of bits that row and column have in common is odd. 0x6996 has the parity of four bits
    at their place; BLOCK is at most 256, so that the bits are two times four. The parity of five bits, counted from the left,
    is in 0x69969669: shifted, it is the sign of a float32.
    """
    common = row & column & (BLOCK - 1)
    if BLOCK <= 32 and row.shape[0] == BLOCK and column.shape[1] == BLOCK:
        sign = (tl.full((), 0x69969669, tl.uint32) << common.to(tl.uint32)) & 0x80000000
        return (sign | 0x3F800000).to(tl.float32, bitcast=True).to(dtype)
    odd = (0x6996 >> ((common ^ (common >> 4)) & 15)) & 1
    return tl.where(row // BLOCK == column // BLOCK, tl.where(odd == 1, -1.0, 1.0), 0.0).to(dtype)


@triton.jit
def butterfly(x, WIDTH: tl.constexpr):
    """Replace neighbouring runs a, b of WIDTH columns by a + b, a - b."""
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, (ROWS, COLS // (2 * WIDTH), 2, WIDTH))
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, COLS))


@triton.jit
def _load_plane(q_ptr, stride_q_head, num_heads, FIELD: tl.constexpr, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Load a plane as [groups of bytes * rows, 4 * OPERAND_RUN]; rows are heads, each of them PLAN.copies times."""
    row = tl.arange(0, PLAN.block_k // (4 * OPERAND_RUN) * PLAN.block_n)[:, None]
    byte = row // PLAN.block_n * (4 * OPERAND_RUN) + tl.arange(0, 4 * OPERAND_RUN)[None, :]
    channel, mask = plane_channels(FIELD, LAYOUT, PLAN.k_fields, byte)
    head = row % PLAN.block_n // PLAN.copies
    return tl.load(q_ptr + head.to(tl.int64) * stride_q_head + channel, mask & (head < num_heads), other=0.0)


@triton.jit
def load_query(q_ptr, stride_q_head, num_heads, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Load the planes of `num_heads` queries of one kv head, for `rotate_query`."""
    FIELDS: tl.constexpr = PLAN.k_fields
    loaded = ()
    for f in tl.static_range(FIELDS):
        loaded = loaded + (_load_plane(q_ptr, stride_q_head, num_heads, f, LAYOUT, PLAN),)
    return loaded


@triton.jit
def rotation_matrix(late, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return the matrix of `rotate_query`, which is made where this stands: not before `late`, some integer, is known."""
    SIZE: tl.constexpr = LAYOUT.block_size // PLAN.k_fields
    byte = tl.arange(0, 4 * OPERAND_RUN)
    if PLAN.ptx:
        byte += tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [late], tl.int32, is_pure=True, pack=1)
    return _hadamard_matrix(byte[:, None], spread_columns(byte)[None, :], min(SIZE, 4 * OPERAND_RUN), PLAN.query_operand)


@triton.jit
def rotate_query(loaded, matrix, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Rotate what `load_query` loaded.

    Returns planes float32 [block_n, block_k] and a factor of their scores [block_n]. Each head is scaled so that its largest
    number times the largest `scale` of keys stays within DIGITS_MAX, and plane f is divided by `field_factor`.
    """
    FIELDS: tl.constexpr = PLAN.k_fields
    BLOCK_N: tl.constexpr = PLAN.block_n
    BLOCK_K: tl.constexpr = PLAN.block_k
    OPERAND: tl.constexpr = PLAN.query_operand
    SIZE: tl.constexpr = LAYOUT.block_size // FIELDS
    GROUPS: tl.constexpr = BLOCK_K // (4 * OPERAND_RUN)
    LEVELS: tl.constexpr = 2**LAYOUT.k_bits - 1
    planes = ()
    for f in tl.static_range(FIELDS):
        product = tl.dot(loaded[f].to(OPERAND), matrix, input_precision="ieee")
        product = tl.permute(tl.reshape(product, (GROUPS, BLOCK_N, OPERAND_RUN // 2, 4, 2)), (1, 0, 3, 2, 4))
        plane = tl.reshape(product, (BLOCK_N, BLOCK_K))
        for i in tl.static_range(log2(max(SIZE // (4 * OPERAND_RUN), 1))):
            plane = butterfly(plane, (4 * OPERAND_RUN) << i)
        planes = planes + (plane,)
    planes = _sums_of_planes(planes)
    top = tl.zeros((BLOCK_N,), tl.float32)
    for f in tl.static_range(FIELDS):
        top = tl.maximum(top, tl.max(tl.abs(planes[f]), axis=1))
    top = tl.maximum(top, LEAST_QUERY)
    factor = DIGITS_MAX * LEVELS * 0.5 / top
    scaled = ()
    for f in tl.static_range(FIELDS):
        scaled = scaled + (planes[f] * (factor * (1.0 / field_factor(f, LAYOUT.k_bits)))[:, None],)
    return scaled, LAYOUT.block_size**-0.5 / factor


@triton.constexpr_function
def raw_unit(bits):
    """Return what the planes of `rotate_query` are divided by for products with raw keys, in 16 bits."""
    return 32768.0 * 2**bits


@triton.jit
def raw_query(planes, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr):
    """Return the planes of `rotate_query` in two terms for products with raw keys, and what to multiply the scores by."""
    UNIT: tl.constexpr = raw_unit(LAYOUT.k_bits)
    terms = ()
    for f in tl.static_range(FIELDS):
        terms = terms + (two_terms(planes[f] * (field_factor(f, LAYOUT.k_bits) / UNIT), OPERAND, False),)
    return terms, UNIT


@triton.jit
def _hadamard_of_blocks(SIZE: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Return the unnormalized Hadamard matrix of SIZE channels, block-diagonal in BLOCK of them."""
    channel = tl.arange(0, SIZE)
    return _hadamard_matrix(channel[:, None], channel[None, :], BLOCK, dtype)


@triton.jit
def _finite_size(x):
    """Return magnitudes, 0 where a number is not finite: a bad row must not take the scale that it shares from the others."""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def rotate_rows(q, LAYOUT: tl.constexpr, FIELDS: tl.constexpr, OPERAND: tl.constexpr, PRODUCT: tl.constexpr):
    """Rotate query rows [rows, channels] of many tokens, in OPERAND, channels field by field (`channel_in_order`).

    Returns them and one factor of their scores: they are scaled so that the largest finite number of all rows is QUERY_MAX.
    PRODUCT: the tensor cores rotate, and leave rows in the registers from which they meet keys. That is a single product: of
    two with one matrix ptxas 12.8 loses the descriptor of the second (sm90).
    """
    ROWS: tl.constexpr = q.shape[0]
    COLS: tl.constexpr = q.shape[1]
    BLOCK: tl.constexpr = LAYOUT.block_size
    if PRODUCT:
        rotated = tl.dot(q, _hadamard_of_blocks(COLS, BLOCK, q.dtype), input_precision="ieee") * (BLOCK**-0.5)
    else:
        rotated = hadamard(q.to(tl.float32), BLOCK)
    factor = QUERY_MAX / tl.maximum(tl.max(_finite_size(rotated)), LEAST_QUERY)
    scaled = (rotated * factor).to(OPERAND)
    if FIELDS > 1:
        scaled = tl.permute(tl.reshape(scaled, (ROWS, COLS // BLOCK, FIELDS, BLOCK // FIELDS)), (0, 2, 1, 3))
        scaled = tl.reshape(scaled, (ROWS, COLS))
    return scaled, 1.0 / factor


@triton.jit
def rotate_planes(
    q_ptr,
    place,
    mask,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    QUERY_OPERAND: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Load and rotate query rows at places [rows]: their planes, and one factor of their scores as in `rotate_rows`.

    A plane [rows, words] has a channel of each word of a key, two bytes: that of a field of the lower or of the upper bytes,
    field by field, the lower first. Those channels have a Hadamard matrix of their own, which is multiplied with; what is left
    adds and subtracts planes.
    """
    WORDS: tl.constexpr = LAYOUT.head_dim // FIELDS // 2
    BLOCK_K: tl.constexpr = max(triton.next_power_of_2(WORDS), LEAST_PLANE)
    byte = tl.arange(0, 2 * BLOCK_K)
    some = mask[:, None] & (byte < 2 * WORDS)[None, :]
    matrix = _hadamard_of_blocks(BLOCK_K, LAYOUT.block_size // FIELDS // 2, QUERY_OPERAND)
    planes = ()
    for f in tl.static_range(FIELDS):
        channel = item_of_field(byte, f, LAYOUT.block_size, FIELDS)
        field = tl.load(q_ptr + place[:, None] + channel[None, :], some, other=0.0).to(QUERY_OPERAND)
        lower, upper = tl.split(tl.reshape(field, (place.shape[0], BLOCK_K, 2)))
        planes = planes + (tl.dot(lower, matrix, input_precision="ieee"),)
        planes = planes + (tl.dot(upper, matrix, input_precision="ieee"),)
    planes = _sums_of_planes(planes)
    largest = _finite_size(planes[0])
    for p in tl.static_range(1, 2 * FIELDS):
        largest = tl.maximum(largest, _finite_size(planes[p]))
    factor = QUERY_MAX / tl.maximum(tl.max(largest) * (LAYOUT.block_size**-0.5), LEAST_QUERY)
    scaled = ()
    for p in tl.static_range(2 * FIELDS):
        scaled = scaled + ((planes[p] * (factor * (LAYOUT.block_size**-0.5))).to(OPERAND),)
    return scaled, 1.0 / factor


@triton.jit
def _sums_of_planes(planes):
    """Add and subtract 2**n planes as a Hadamard matrix does."""
    for i in tl.static_range(log2(len(planes))):
        sums = ()
        for p in tl.static_range(len(planes)):
            if p & (1 << i):
                sums = sums + (planes[p ^ (1 << i)] - planes[p],)
            else:
                sums = sums + (planes[p] + planes[p ^ (1 << i)],)
        planes = sums
    return planes


@triton.jit
def rows_of_planes(planes):
    """Return the rows [rows, channels] that `rotate_planes` cut, channels field by field."""
    fields = ()
    for f in tl.static_range(len(planes) // 2):
        pairs = tl.join(planes[2 * f], planes[2 * f + 1])
        fields = fields + (tl.reshape(pairs, (pairs.shape[0], 2 * pairs.shape[1])),)
    return join_planes(fields)
