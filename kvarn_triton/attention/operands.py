"""What the tensor cores multiply: numbers in two terms, and orders that keep numbers in their threads.

A product has query heads as rows and tokens or channels as columns. Each head takes two rows: a number x of a query or of a
softmax weight is split in two terms, high and low, and the two results of a head meet in one thread. With 8-bit integers
(`OPERAND` int8) x is rounded to an integer of 16 bits and the terms are its bytes; codes are such integers as they are. With
other operands, raw pages or queries of float32, the low term is what rounding to the operand left over.
Few heads are turned over (`columns`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tile.arithmetic import log2

DIGITS_MAX = tl.constexpr(32000.0)
"""Largest magnitude of a number that is split in two bytes; the bytes hold -32640 to 32639."""
OPERAND_RUN = tl.constexpr(8 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else 4)
"""Consecutive numbers of the summed axis that a thread holds of an 8-bit operand of stacked terms. Triton 3.6 takes twice as
many as the tensor cores do, whenever an operand was joined of parts. Only speed depends on it."""
LEAST_PLANE = tl.constexpr(16)
"""Least length of the axis that a product of 16-bit numbers sums over."""
ROUNDING = tl.constexpr(12582912.0 + 128.0)
"""1.5 * 2**23 puts an integer into the low bits of a float32; 128 rounds when the low byte is cut off."""


@triton.jit
def spread_columns(column):
    """Return which item to compute in a column of a product, so that `in_order` leaves each number in its thread.

    A thread of a product holds pairs of neighbouring columns, 8 apart; a thread of an operand holds OPERAND_RUN neighbours.
    """
    return (
        column // (4 * OPERAND_RUN) * (4 * OPERAND_RUN)
        + column % 8 // 2 * OPERAND_RUN
        + column // 8 % (OPERAND_RUN // 2) * 2
        + column % 2
    )


@triton.constexpr_function
def spread_order(columns):
    """Return for each bit of the number of a column the bit of the item that `spread_columns` computes there."""
    run = int(OPERAND_RUN).bit_length() - 1
    return (0, run, run + 1, *range(1, run), *range(run + 2, columns.bit_length() - 1))


@triton.jit
def in_order(product):
    """Reorder columns that were computed in the order of `spread_columns`."""
    ROWS: tl.constexpr = product.shape[0]
    COLS: tl.constexpr = product.shape[1]
    runs = tl.reshape(product, (ROWS, COLS // (4 * OPERAND_RUN), OPERAND_RUN // 2, 4, 2))
    return tl.reshape(tl.permute(runs, (0, 1, 3, 2, 4)), (ROWS, COLS))


@triton.jit
def join_planes(planes):
    """Put a tuple of 2**n tiles [rows, columns] next to each other."""
    for _ in tl.static_range(log2(len(planes))):
        joined = ()
        for j in tl.static_range(len(planes) // 2):
            a = planes[2 * j]
            pair = tl.permute(tl.join(a, planes[2 * j + 1]), (0, 2, 1))
            joined = joined + (tl.reshape(pair, (a.shape[0], 2 * a.shape[1])),)
        planes = joined
    return planes[0]


@triton.jit
def join_rows(tiles):
    """Put a tuple of 2**n tiles [rows, columns] below each other."""
    for _ in tl.static_range(log2(len(tiles))):
        joined = ()
        for j in tl.static_range(len(tiles) // 2):
            a = tiles[2 * j]
            pair = tl.permute(tl.join(a, tiles[2 * j + 1]), (2, 0, 1))
            joined = joined + (tl.reshape(pair, (2 * a.shape[0], a.shape[1])),)
        tiles = joined
    return tiles[0]


@triton.jit
def split_planes(tile, COUNT: tl.constexpr):
    """Cut a tile [rows, columns] into a tuple of COUNT tiles, a power of two."""
    planes = (tile,)
    for _ in tl.static_range(log2(COUNT)):
        halves = ()
        for j in tl.static_range(len(planes)):
            pair = tl.reshape(planes[j], (planes[j].shape[0], 2, planes[j].shape[1] // 2))
            a, b = tl.split(tl.permute(pair, (0, 2, 1)))
            halves = halves + (a, b)
        planes = halves
    return planes


@triton.constexpr_function
def sum_dtype(operand):
    """Return the dtype in which products of an operand are summed."""
    return tl.int32 if operand == tl.int8 else tl.float32


@triton.jit
def high_and_low(x, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Return the two terms of float32 numbers."""
    if sum_dtype(OPERAND) == tl.int32:
        bits = (x + ROUNDING).to(tl.int32, bitcast=True)
        if PTX:
            high, low = tl.inline_asm_elementwise(
                "{ .reg .b32 t, u; prmt.b32 t, $2, $3, 0x5140; prmt.b32 u, $4, $5, 0x5140; "
                "prmt.b32 $0, t, u, 0x7632; prmt.b32 t, t, u, 0x5410; xor.b32 $1, t, 0x80808080; }",
                "=r,=r,r,r,r,r", [bits], (tl.int8, tl.int8), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            high = (bits >> 8).to(tl.int8)
            low = (bits ^ 128).to(tl.int8)
    else:
        high = x.to(OPERAND)
        low = (x - high.to(tl.float32)).to(OPERAND)
    return high, low


@triton.jit
def two_terms(x, OPERAND: tl.constexpr, PTX: tl.constexpr):
    """Split float32 numbers [rows, columns] in two terms: [2 * rows, columns], the high terms first."""
    high, low = high_and_low(x, OPERAND, PTX)
    return tl.reshape(tl.permute(tl.join(high, low), (2, 0, 1)), (2 * x.shape[0], x.shape[1]))


@triton.jit
def sum_of_both(high, low):
    """Return the float32 sum of what products made of high and of low terms."""
    if high.dtype == tl.int32:
        total = (high * 256 + low).to(tl.float32)
    else:
        total = high + low
    return total


@triton.jit
def sum_of_terms(product):
    """Return the float32 results [rows, columns] of a product whose left operand was split in two terms."""
    ROWS: tl.constexpr = product.shape[0] // 2
    high, low = tl.split(tl.permute(tl.reshape(product, (2, ROWS, product.shape[1])), (1, 2, 0)))
    return sum_of_both(high, low)
