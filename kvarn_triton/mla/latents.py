"""From the bytes of a record to latents as operands of products: float16, rounded once, in planes, without their norms."""

from __future__ import annotations

import triton
import triton.language as tl

from ..mla_layout import LATENT_DIM
from ..tile.arithmetic import SPLIT_PTX, split_halves

LATENTS = tl.constexpr(LATENT_DIM)


@triton.constexpr_function
def _less(n):
    """Return two float16 numbers -n, of an integer of up to 11 bits, in one word."""
    exponent = n.bit_length() - 1
    return (0x8000 | (exponent + 15) << 10 | (n << 10 >> exponent) - 1024) * 0x10001


@triton.constexpr_function
def latents_ptx(field, bits):
    """PTX for four bytes and their parameters: codes become float16 numbers 1024 + code * 2**shift, codes, then numbers."""
    shift = field * bits if bits < 8 else 0
    mask = (2**bits - 1) << shift
    codes = "mov.b32 t, $2; " if bits == 8 else f"and.b32 t, $2, {mask * 0x01010101}; "
    if shift:
        factor, offset = (15 - shift) << 10, 0x8000 | (25 - shift) << 10  # 2**-shift and -1024 * 2**-shift
        down = f"mov.b32 c, {factor * 0x10001}; mov.b32 d, {offset * 0x10001}; "
        down += "fma.rn.f16x2 a, a, c, d; fma.rn.f16x2 b, b, c, d; "
    else:
        down = "mov.b32 c, 0x64006400; sub.rn.f16x2 a, a, c; sub.rn.f16x2 b, b, c; "
    return (
        "{ .reg .b32 t, a, b, c, d; " + codes + "prmt.b32 a, t, 0x64646464, 0x4140; prmt.b32 b, t, 0x64646464, 0x4342; " + down
        + "fma.rn.f16x2 $0, a, $3, $5; fma.rn.f16x2 $1, b, $4, $6; }"
    )  # fmt: skip


@triton.constexpr_function
def _code_ptx(target, source, bits, field, less):
    """PTX for a byte of two pairs: two float16 numbers 1024 + code, or 1024 + 16 * code, then the codes, less a number."""
    mask = f"lop3.b32 {target}, {source}, {(2**bits - 1 << field * bits) * 0x10001}, a, 0xea; "
    if field:
        return mask + f"mov.b32 b, {0x2C002C00}; mov.b32 c, {_less(64 + less)}; fma.rn.f16x2 {target}, {target}, b, c; "
    return mask + f"mov.b32 c, {_less(1024 + less)}; add.rn.f16x2 {target}, {target}, c; "


@triton.constexpr_function
def pairs_ptx(bits, byte, middle):
    """PTX for two pairs of bytes: the codes of one byte of each pair, by field, two float16 numbers each.

    With `middle` less the middle code, else times scales and plus zeros, which are the operands after the bytes.
    """
    fields = 8 // bits
    source, less = f"${fields}", 2 ** (bits - 1) if middle else 0
    lines = [f".reg .b32 y, a, b, c; mov.b32 a, {0x64006400}; "]
    if byte:
        lines.append(f"shr.u32 y, {source}, 8; ")
        source = "y"
    for field in range(fields):
        lines.append(_code_ptx(f"${field}", source, bits, field, less))
        if not middle:
            lines.append(f"fma.rn.f16x2 ${field}, ${field}, ${fields + 1 + field}, ${2 * fields + 1 + field}; ")
    return "{ " + "".join(lines) + "}"


@triton.constexpr_function
def field_ptx(bits, field, byte):
    """PTX for two pairs of bytes: the numbers of one field of one byte of each pair, of codes, scales and zeros.

    Fields share no instruction, whose results ptxas would keep from the one to the other.
    """
    apart = {(0, 0): "mov.b32 y, $1; ", (1, 0): "mov.b32 y, $1; ", (0, 1): "shr.u32 y, $1, 8; "}
    source = apart.get((field, byte), "prmt.b32 y, $1, 0, 0x4341; ")
    lines = f".reg .b32 y, a, b, c; mov.b32 a, {0x64006400}; {source}" + _code_ptx("y", "y", bits, field, 0)
    return "{ " + lines + "fma.rn.f16x2 $0, y, $2, $3; }"


@triton.jit
def _decode(packed, scale, zero, FIELD: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Return code * scale + zero, float16, of one field of bytes int8 [tokens, channels]; the others have one or as many rows.

    The PTX is said to have side effects, so that Triton doesn't see that operands of products come from bytes: it would choose
    other operands, which don't share one tile in shared memory.
    """
    if PTX:
        numbers = tl.inline_asm_elementwise(
            latents_ptx(FIELD, BITS), "=&r,=&r,r,r,r,r,r", [packed, scale, zero], tl.float16, is_pure=False,
            pack=4,
        )  # fmt: skip
    else:
        codes = (packed.to(tl.int32) >> (FIELD * BITS)) & (2**BITS - 1)
        numbers = codes.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)
        numbers = numbers.to(tl.float16)
    return numbers


@triton.jit
def _scale_and_zero(words, PTX: tl.constexpr):
    """Return the scales and zeros, float16, of parameters. Written as PTX, pairs of them are made once, not once per token."""
    if PTX:
        scale, zero = tl.inline_asm_elementwise(
            SPLIT_PTX, "=&r,=&r,r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
        )  # fmt: skip
    else:
        scale, zero = split_halves(words)
    return scale, zero


@triton.jit
def load_latents(record_ptr, token, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Return some tokens as planes float16 [tokens, channels], without their norms.

    They are of one record, or each of its own: `record_ptr` is one pointer or [tokens, 1].
    """
    PLANES: tl.constexpr = PLAN.planes
    FIELDS: tl.constexpr = PLAN.fields
    CHANNELS: tl.constexpr = LATENTS // PLANES
    offs_c = tl.arange(0, CHANNELS)
    params_ptr = (record_ptr + LAYOUT.k_params_offset).to(tl.pointer_type(tl.uint32))
    codes_ptr = (record_ptr + LAYOUT.k_codes_offset).to(tl.pointer_type(tl.int8))
    place = token[:, None] * (LATENTS // FIELDS) + offs_c[None, :]
    planes = ()
    for part in tl.static_range(PLANES // FIELDS):
        packed_ptr = codes_ptr + part * CHANNELS + place
        if record_ptr.type.is_block():
            # A thread has as many neighbouring bytes as words, 4, so that the words of a warp are neighbours, too.
            packed_ptr = tl.max_contiguous(packed_ptr, [1, 4])
        packed = tl.load(packed_ptr)
        for field in tl.static_range(FIELDS):
            words_ptr = params_ptr + (field * (PLANES // FIELDS) + part) * CHANNELS
            if record_ptr.type.is_block():
                scale, zero = _scale_and_zero(tl.load(words_ptr + offs_c[None, :]), PLAN.ptx)
            else:
                scale, zero = _scale_and_zero(tl.load(words_ptr + offs_c), PLAN.ptx)
                scale, zero = scale[None, :], zero[None, :]
            planes = planes + (_decode(packed, scale, zero, field, LAYOUT.k_bits, PLAN.ptx),)
    return planes
