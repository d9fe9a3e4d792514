"""Numbers of a quantized page as operands of products of warp groups, in registers: what `hopper_drafts` multiplies.

A page lies in shared memory as it is, in lines of 128 bytes. Keys of 64 tokens, or values of 64 channels, are the rows of a
product; a thread loads pairs of bytes, as words, and makes float16 numbers of the codes of a field of their lower or upper
bytes: `registers` says how, and what a plane is. Scales and zeros are put into the order in which threads need them once for
all warps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..tile.codes import codes_of_words_ptx
from ..tile.gluon import reinterpret, split_pairs
from .registers import headroom

LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
"""Numbers one after the other."""
_ITEMS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[4, 0], [8, 0]], [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]], [[1, 0], [2, 0]], [], [16, 32]
    )
)  # fmt: skip
"""Lines of parameters and norms, as 32-bit words: a thread has one of the key parameters, of the value parameters, of the
norms, and of what follows them."""
_NUMBER = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.constexpr_function
def products_layout(rows):
    """Return the layout of products [64, query rows] of a warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 16])


@gluon.constexpr_function
def operand_layout(rows):
    """Return the layout of their left operand."""
    return gl.DotOperandLayout(0, products_layout(rows), 2)


@gluon.constexpr_function
def _words_layout(words):
    """Return the layout of 64 rows of so many words, in lines of 64 words, that is the operand's if rows are lines."""

    def place(row, word):
        return [*divmod(row * words + word, 64)]

    registers = [place(0, 1), place(8, 0), place(0, 8), *(place(0, 16 << i) for i in range(words.bit_length() - 5))]
    lanes = [place(0, 2), place(0, 4), place(1, 0), place(2, 0), place(4, 0)]
    return gl.DistributedLinearLayout(registers, lanes, [place(16, 0), place(32, 0)], [], [words, 64])


@gluon.constexpr_function
def _params_layout(steps):
    """Return the layout in which a thread has eight scales and zeros of each of some steps of 16 words."""
    registers = [[1], [2], [4], *([32 << i] for i in range(steps.bit_length() - 1))]
    return gl.DistributedLinearLayout(registers, [[8], [16], [0], [0], [0]], [[0], [0]], [], [32 * steps])


@gluon.constexpr_function
def _numbers_ptx(field, upper, bits):
    """PTX for two words, their scales, and their zeros."""
    return "{ .reg .b32 u; " + codes_of_words_ptx(field, upper, bits) + "fma.rn.f16x2 $0, $0, $2, $3; }"


@gluon.jit
def load_items(memory, FIRST: gl.constexpr):
    """Load what follows the codes of a page, from line FIRST on: parameters of keys, of values, and norms, int32 [4, 32]."""
    LINES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    words = reinterpret(memory, gl.int32, [memory.shape[0], 32], LINES).slice(FIRST, 16).load(_ITEMS)
    low, high = gl.split(gl.permute(gl.reshape(words, (2, 2, 4, 32)), (2, 3, 1, 0)))
    keys, values = gl.split(low)
    norms, _ = gl.split(high)
    return keys, values, norms


@gluon.jit
def load_gain(memory, WHICH: gl.constexpr, FIRST: gl.constexpr):
    """Load the gain of keys (0) or of values (1) of a page."""
    GAINS: gl.constexpr = FIRST + 12
    words = reinterpret(memory, gl.float32, [memory.shape[0] * 32], LINE)
    # The accelerator puts the 16 bytes of number i of a line to number i ^ (line % 8).
    return gl.max(words.slice(GAINS * 32 + GAINS % 8 * 4 + WHICH, 1).load(_NUMBER), 0)


@gluon.jit
def store_params(pairs, memory, FIELDS: gl.constexpr, BITS: gl.constexpr):
    """Put 128 scales and zeros into shared memory, float16, in the order of `_load_params`: eight for each thread of four.

    They are of codes where these lie in their words, and times `registers.headroom`.
    """
    LAYOUT: gl.constexpr = pairs.type.layout
    scale, zero = split_pairs(pairs)
    item = gl.arange(0, 4, gl.SliceLayout(1, LAYOUT))[:, None] * 32 + gl.arange(0, 32, gl.SliceLayout(0, LAYOUT))[None, :]
    exponent = 127 + 24 - item // (128 // FIELDS) * BITS
    factor = (exponent << 23).to(gl.float32, bitcast=True) * headroom(BITS)
    scale = (scale.to(gl.float32) * factor).to(gl.float16)
    zero = (zero.to(gl.float32) * headroom(BITS)).to(gl.float16)
    # Of an item: its field, step of 16 words, half of a step, thread, word of a pair, byte; then scale or zero.
    both = gl.reshape(gl.join(scale, zero), (FIELDS, 4 // FIELDS, 2, 4, 2, 2, 2))
    memory.store(gl.reshape(gl.permute(both, (0, 5, 1, 3, 6, 2, 4)), (256,)))


@gluon.jit
def store_norms(norms, factor, memory):
    """Put the norms of keys, then of values, times a factor, into shared memory."""
    low, high = split_pairs(norms)
    memory.store(gl.reshape(gl.join(low, high).to(gl.float32) * factor, (256,)))


@gluon.jit
def load_words(memory, FIRST: gl.constexpr, WORDS: gl.constexpr, ROWS: gl.constexpr):
    """Load 128 rows of words from line FIRST on, as two tiles of 64."""
    OPERAND: gl.constexpr = operand_layout(ROWS)
    tiles = ()
    for half in gl.static_range(2):
        words = memory.slice(FIRST + half * WORDS, WORDS).load(_words_layout(WORDS))
        tiles = tiles + (gl.convert_layout(gl.reshape(words, (64, WORDS)), OPERAND, assert_trivial=True),)
    return tiles


@gluon.jit
def _load_params(memory, PLANE: gl.constexpr, WORDS: gl.constexpr, ROWS: gl.constexpr):
    """Load the scales and zeros of a plane [words], float16."""
    STEPS: gl.constexpr = WORDS // 16
    LAYOUT: gl.constexpr = gl.SliceLayout(0, operand_layout(ROWS))
    found = memory.slice(PLANE * 2 * WORDS, 2 * WORDS).load(_params_layout(STEPS))
    scale, zero = gl.split(gl.permute(gl.reshape(found, (STEPS, 4, 2, 2, 2)), (0, 3, 1, 4, 2)))
    scale = gl.convert_layout(gl.reshape(scale, (WORDS,)), LAYOUT, assert_trivial=True)
    return scale, gl.convert_layout(gl.reshape(zero, (WORDS,)), LAYOUT, assert_trivial=True)


@gluon.jit
def multiply(words, params, operands, none, TURNED: gl.constexpr, BITS: gl.constexpr, WAIT: gl.constexpr):
    """Begin to multiply two tiles of 64 rows of words by planes of an operand: [planes * words, query rows], or TURNED.

    Products of WAIT planes are on their way at once: so many operands are in registers. Parameters of the next plane are loaded
    before one waits.
    """
    FIELDS: gl.constexpr = 8 // BITS
    WORDS: gl.constexpr = words[0].shape[1]
    ROWS: gl.constexpr = none.shape[1]
    COUNT: gl.constexpr = ROWS if TURNED else WORDS
    found = (none, none)
    following = _load_params(params, 0, WORDS, ROWS)
    for plane in gl.static_range(2 * FIELDS):
        scale, zero = following
        if plane + 1 < 2 * FIELDS:
            following = _load_params(params, plane + 1, WORDS, ROWS)
        operand = operands.slice(plane * COUNT, COUNT)
        if TURNED:
            operand = operand.permute((1, 0))
        result = ()
        for half in gl.static_range(2):
            numbers = gl.inline_asm_elementwise(
                _numbers_ptx(plane // 2, plane % 2, BITS), "=&r,r,r,r", [words[half], scale[None, :], zero[None, :]],
                gl.float16, is_pure=True, pack=2,
            )  # fmt: skip
            result = result + (warpgroup_mma(numbers, operand, found[half], use_acc=plane > 0, is_async=True),)
        found = result
        if (plane + 1) % WAIT == 0 and plane + 1 < 2 * FIELDS:
            found = warpgroup_mma_wait(0, found)
    return found
