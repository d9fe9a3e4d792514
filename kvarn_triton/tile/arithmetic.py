"""Pure device helpers: registers in, registers out. No pointers, no launchers.

Operations and their order are those of `reference.codec`, which makes the results equal bit for bit when the kernel is
compiled with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..gpu import INTERPRETED
from ..reference import arithmetic, codec

STD_MIN = tl.constexpr(codec.STD_MIN)
STD_MAX = tl.constexpr(codec.STD_MAX)
SCALE_MIN = tl.constexpr(codec.SCALE_MIN)
SCALE_MAX = tl.constexpr(codec.SCALE_MAX)
SPLIT_PTX = tl.constexpr("prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;")
"""PTX for two words: their lower and their upper halves, as two words."""
IMBALANCE_EPS = tl.constexpr(codec.IMBALANCE_EPS)
RANGE_EPS = tl.constexpr(codec.RANGE_EPS)
TILE_SCALE_MAX = tl.constexpr(codec.TILE_SCALE_MAX)
EXPONENT_MAX = tl.constexpr(codec.EXPONENT_MAX)
HALF_MAX = tl.constexpr(codec.HALF_MAX)
_CONSTANTS = {name: x for name, x in (vars(arithmetic) | vars(codec)).items() if name.isupper()}
CODEC = tl.constexpr(repr(sorted((name, x) for name, x in _CONSTANTS.items() if isinstance(x, (int, float, tuple, dict)))))
"""All constants of the encoder. Triton's cache on disk knows a kernel by its source and the constexprs that it names, not by
what a `constexpr_function` reads elsewhere: kernels that encode name this one."""
LOG2E = tl.constexpr(math.log2(math.e))
"""Scores are kept times this, because exp2 is what the hardware has."""
ROUND_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a small float32 to the nearest integer, ties to even."""


if INTERPRETED:
    from .interpreted import fma
else:

    @triton.jit
    def fma(x, y, z):
        """Return `x * y + z` of float32, rounded once."""
        return tl.fma(x, y, z)


@triton.constexpr_function
def log2(n):
    """Return the exponent of a power of two."""
    return n.bit_length() - 1


@triton.jit
def hadamard(x, BLOCK: tl.constexpr):
    """Rotate [rows, channels] by the orthonormal Hadamard matrix in blocks of BLOCK channels.

    Each step adds and subtracts the halves of a block and interleaves the results, so that all steps have one shape.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLS: tl.constexpr = x.shape[1]
    y = tl.reshape(x, (ROWS * COLS // BLOCK, BLOCK))
    for _ in tl.static_range(log2(BLOCK)):
        halves = tl.permute(tl.reshape(y, (ROWS * COLS // BLOCK, 2, BLOCK // 2)), (0, 2, 1))
        a, b = tl.split(halves)
        y = tl.reshape(tl.join(a + b, a - b), (ROWS * COLS // BLOCK, BLOCK))
    return tl.reshape(y * (BLOCK**-0.5), (ROWS, COLS))


@triton.jit
def scaled(x, factor):
    """Return float32 x [rows, channels] times factor [rows], a product that is rounded before anything is added to it.

    A plain one may be fused with sums that follow, those of a rotation, and is in some kernels and not in others: bits would
    depend on what else a kernel does.
    """
    return fma(x, tl.broadcast_to(factor[:, None], x.shape), tl.zeros_like(x))


@triton.jit
def power_of_two(exponent):
    """Return 2**exponent as float32 for an int32 exponent of a normal number."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """Return e with x = m * 2**e and m in [0.5, 1), for x a normal float32 >= 0; less than -100 for 0 and subnormal x."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 126


@triton.jit
def bounded_exponent(x):
    """Return `exponent_of(x)` within +-EXPONENT_MAX."""
    return tl.minimum(tl.maximum(exponent_of(x), -EXPONENT_MAX), EXPONENT_MAX)


@triton.jit
def to_half(x):
    """Round to float16; saturate at its largest number instead of overflowing."""
    return tl.minimum(tl.maximum(x, -HALF_MAX), HALF_MAX).to(tl.float16)


@triton.jit
def join_halves(low, high):
    """Put two float16 numbers into one 32-bit word."""
    return low.to(tl.uint16, bitcast=True).to(tl.uint32) | (high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def split_halves(words):
    """Return the two float16 numbers of 32-bit words, low half first."""
    low = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return low, (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def load_rows(x_ptr, place, mask, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Load rows [rows, CHANNELS] of D numbers from places [rows]; what is padding is 0."""
    offs_d = tl.arange(0, CHANNELS)
    return tl.load(x_ptr + place[:, None] + offs_d[None, :], mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(out_ptr, place, values, mask, D: tl.constexpr):
    """Store D numbers of rows [rows, channels] at places [rows]."""
    offs_d = tl.arange(0, values.shape[1])
    values = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] + offs_d[None, :], values, mask[:, None] & (offs_d < D)[None, :])
