"""The reference, which is the specification: against the published formulas, explicit matrices and slow loops.

Everything else is tested against the reference, so nothing here shares code with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import pytest
import torch
from helpers import draw, hard_sums, tile_error, uneven

from kvarn_triton import PUBLISHED, Encoder, PageLayout, reference
from kvarn_triton.layout import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS
from kvarn_triton.testing import relative_error


def published_scales(tile: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return exp(log_col) [columns] and exp(log_row) [rows] of the published algorithm, in log space with divisions."""

    def imbalance(c: torch.Tensor) -> torch.Tensor:
        col, row = c.std(dim=0), c.std(dim=1)
        return col.max() / col.min().clamp(min=1e-8) + row.max() / row.min().clamp(min=1e-8)

    log_col = torch.zeros(tile.shape[1], dtype=tile.dtype)
    log_row = torch.zeros(tile.shape[0], dtype=tile.dtype)
    current = tile
    best, best_col, best_row = imbalance(tile), log_col, log_row
    for _ in range(iterations):
        log_col = (log_col + current.std(dim=0).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        current = tile / log_col.exp() / log_row.exp()[:, None]
        log_row = (log_row + current.std(dim=1).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        current = tile / log_col.exp() / log_row.exp()[:, None]
        if imbalance(current) <= best:
            best, best_col, best_row = imbalance(current), log_col, log_row
    return best_col.exp(), best_row.exp()


def published_encode(rows: torch.Tensor, bits: int, iterations: int) -> tuple[torch.Tensor, ...]:
    """Return codes, scale and zero per row, and norm per column, of a tile whose rows are quantized."""
    col, row = published_scales(rows, iterations)
    balanced = rows / col / row[:, None]
    zero = balanced.min(dim=1).values
    scale = (balanced.max(dim=1).values - zero) / (2**bits - 1)
    codes = ((balanced - zero[:, None]) / scale[:, None]).round()
    return codes, scale * row, zero * row, col


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("iterations", [0, 1, 8, 16])
@pytest.mark.parametrize(("page_size", "head_dim", "bits"), [(64, 128, 2), (128, 80, 3), (128, 128, 4), (64, 64, 8)])
def test_published_algorithm(per, iterations, page_size, head_dim, bits):
    """In float64 the published mode gives the codes of the formulas in log space, and their scales up to rounding.

    Keys are a tile of channels x tokens, values one of tokens x channels; rows are quantized, columns are scaled first.
    """
    for seed in range(3):
        tile = uneven(page_size, head_dim, seed=seed).double() * 2.0**seed
        rows = tile.T if per == "channel" else tile
        codes, scale, zero, norm = published_encode(rows, bits, iterations)
        got_codes, got_scale, got_zero, got_norm, gain = reference.encode(
            tile, bits, per=per, encoder=dataclasses.replace(PUBLISHED, iterations=iterations)
        )
        assert torch.equal(got_codes.double(), codes.T if per == "channel" else codes)
        gauge = 2.0 ** torch.round(torch.log2(scale[0] / got_scale[0]))  # a power of two that the record moves to the gain
        assert torch.frexp(gain).mantissa.item() == 0.5
        torch.testing.assert_close(got_norm * gain / gauge, norm, rtol=1e-10, atol=0)
        torch.testing.assert_close(got_scale * gauge, scale, rtol=1e-10, atol=0)
        torch.testing.assert_close(got_zero * gauge, zero, rtol=1e-10, atol=0)

        col, row = published_scales(rows, iterations)
        balanced, token_scale, channel_scale = reference.variance_normalize(
            tile, per=per, encoder=dataclasses.replace(PUBLISHED, iterations=iterations)
        )
        by_token, by_channel = (col, row) if per == "channel" else (row, col)
        torch.testing.assert_close(token_scale, by_token, rtol=1e-10, atol=0)
        torch.testing.assert_close(channel_scale, by_channel, rtol=1e-10, atol=0)
        torch.testing.assert_close(balanced * token_scale[:, None] * channel_scale, tile, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("per", ["channel", "token"])
def test_ties_keep_the_newer_scales(per):
    """A checkerboard is as balanced before as after: the published rule takes the state after."""
    tile = torch.ones(64, 64, dtype=torch.float64)
    tile[::2, 1::2], tile[1::2, ::2] = -1, -1
    tile *= 4
    col, row = published_scales(tile, 1)
    token_scale, channel_scale = reference.variance_normalize(tile, per=per, encoder=Encoder(1, equivariant=False))[1:]
    by_token, by_channel = (col, row) if per == "channel" else (row, col)
    torch.testing.assert_close(token_scale, by_token, rtol=1e-10, atol=0)
    torch.testing.assert_close(channel_scale, by_channel, rtol=1e-10, atol=0)
    assert (token_scale * channel_scale).min() > 3


FACTORS = [1e-3, 2.0**-6, 1e-2, 0.1, 0.5, 3.0, 2.0**7, 1e3]


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("factor", FACTORS)
def test_scale_equivariance(per, factor):
    """Encoding a * tile gives the codes of the tile, exactly for powers of two, and the same relative error (KF 3)."""
    tile = uneven(128, 128)
    for bits in (2, 4):
        codes = reference.encode(tile, bits, per=per)[0]
        scaled = reference.encode(tile * factor, bits, per=per)[0]
        if math.log2(factor).is_integer():
            assert torch.equal(scaled, codes)
        else:
            assert (scaled != codes).float().mean() < 1e-3
        assert tile_error(tile * factor, bits, per) == pytest.approx(tile_error(tile, bits, per), rel=0.01)


def record_of(tile: torch.Tensor, layout: PageLayout) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Store one tile as keys and as values without rotating it; return the fields, and both decoded."""
    record = reference.cache.encode_records(tile, tile, layout)
    return layout.fields(record), *reference.cache.decode_records(record, layout)


def degenerate_tiles() -> dict[str, torch.Tensor]:
    """Return tiles [64, 64] that divide by zero, or overflow, in a careless encoder."""
    base = draw(64, 64, seed=3)
    tiles = {name: base.clone() for name in ("zero_token", "zero_channel", "huge_token", "huge_channel", "one_element")}
    tiles["zero_token"][5] = 0
    tiles["zero_channel"][:, 5] = 0
    tiles["huge_token"][5] *= 1e4
    tiles["huge_channel"][:, 5] *= 1e4
    tiles["one_element"] = torch.zeros(64, 64)
    tiles["one_element"][5, 7] = 3.0
    tiles["zero"] = torch.zeros(64, 64)
    tiles["constant"] = torch.full((64, 64), -2.5)
    tiles["constant_per_token"] = base[:, :1].expand(64, 64).clone()
    tiles["constant_per_channel"] = base[:1].expand(64, 64).clone()
    return tiles


@pytest.mark.parametrize("name", degenerate_tiles())
@pytest.mark.parametrize("bits", [2, 4])
def test_degenerate_tiles(name, bits):
    """No field and no decoded number is NaN or infinite, and what one code can hold is held (KF 4)."""
    layout = PageLayout(64, 64, bits, bits)
    tile = degenerate_tiles()[name]
    fields, k, v = record_of(tile, layout)
    for field in fields.values():
        assert torch.isfinite(field.float()).all()
    exact = {"constant": "kv", "constant_per_channel": "k", "constant_per_token": "v"}.get(name, "")
    for half, decoded in (("k", k), ("v", v)):
        assert torch.isfinite(decoded).all()
        if name == "zero":
            assert torch.equal(decoded, tile)
        elif half in exact:
            # Both a zero per row and a norm per column round to float16.
            torch.testing.assert_close(decoded, tile, rtol=2**-10, atol=1e-6)
        else:
            assert relative_error(decoded, tile) < 0.9
    if name == "zero_channel":
        assert k[:, 5].abs().max() == 0
    if name == "zero_token":
        assert v[5].abs().max() == 0


@pytest.mark.parametrize("magnitude", [1e5, 1e12, 1e-6, 1e-12])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_magnitudes_beyond_float16(magnitude, bits):
    """bfloat16 activations above 65504, or far below 6e-5, have finite fields and the error of ordinary ones (KF 5)."""
    layout = PageLayout(64, 64, bits, bits)
    tile = uneven(64, 64)
    _, *usual = record_of(tile, layout)
    fields, *decoded = record_of((tile * magnitude).bfloat16(), layout)
    for field in fields.values():
        assert torch.isfinite(field.float()).all()
    for expected, got in zip(usual, decoded, strict=True):
        assert relative_error(got / magnitude, tile) < 1.03 * relative_error(expected, tile) + 2**-9


def test_fused_multiply_add():
    """The reference's float32 multiply-add rounds once: no float32 is nearer to the exact result."""
    x, y, z = hard_sums()
    got = reference.arithmetic.fma(x, y, z)
    infinity = torch.full_like(got, math.inf)
    around = torch.nextafter(got, -infinity), got, torch.nextafter(got, infinity)
    for values in zip(*(t.tolist() for t in (x, y, z, *around)), strict=True):
        a, b, c, below, result, above = map(Fraction, values)
        exact = a * b + c
        assert abs(exact - result) <= min(abs(exact - below), abs(exact - above))
    assert not torch.equal(got, x * y + z)


@pytest.mark.parametrize("per", ["channel", "token"])
def test_large_mean(per):
    """Float32 finds the deviations of numbers a thousand times their deviation, as float64 does (KF 6)."""
    tile = 1000 + uneven(128, 128)
    for dim in (-1, -2):
        std = reference.codec.std(tile, torch.ones(()), dim)
        torch.testing.assert_close(std.double(), tile.double().std(dim, keepdim=True), rtol=1e-5, atol=0)
    # One round: later ones amplify the difference of the inputs, whose mean float32 rounds.
    encoder = Encoder(iterations=1, equivariant=False)
    exact = reference.variance_normalize(tile.double(), per=per, encoder=encoder)
    for got, expected in zip(reference.variance_normalize(tile, per=per, encoder=encoder), exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def sylvester(size: int) -> torch.Tensor:
    """Return Sylvester's matrix of ones and minus ones, by its recursion."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_hadamard_matrix(head_dim):
    """The rotation is Sylvester's matrix on blocks of the largest power of two, orthonormal and its own inverse (KF 9)."""
    largest = math.gcd(head_dim, 512)
    identity = torch.eye(head_dim, dtype=torch.float64)
    for block_size in {largest, 16, 2}:
        expected = torch.block_diag(*[sylvester(block_size) / block_size**0.5] * (head_dim // block_size))
        matrix = reference.hadamard(identity, block_size=block_size)
        torch.testing.assert_close(matrix, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-14)
    x = draw(3, 5, head_dim).double()
    torch.testing.assert_close(reference.hadamard(reference.hadamard(x)), x, rtol=0, atol=1e-13)


def slow_pack(codes: list[list[int]], bits: int, per: str) -> bytes:
    """Pack codes [tokens][channels] as the format's description says it, one code at a time."""
    tokens, head_dim = len(codes), len(codes[0])
    width = {3: 2, 5: 4, 6: 4}.get(bits, bits)
    fields, more = 8 // width, bits - width
    rows, items = (tokens, head_dim) if per == "channel" else (head_dim, tokens)
    block = head_dim & -head_dim if per == "channel" else tokens
    size = items // fields
    low, high = [0] * (rows * size), [0] * (rows * size * more // width)
    sharers = width // more if more else 1
    row_block = rows & -rows
    distance = row_block // sharers
    for r, n, f in itertools.product(range(rows), range(size), range(fields)):
        item = n // (block // fields) * block + f * (block // fields) + n % (block // fields)
        code = codes[r][item] if per == "channel" else codes[item][r]
        low[r * size + n] |= (code % 2**width) << (f * width)
        if bits == 3:
            high[r * (size // 2) + n % (size // 2)] |= (code >> 2) << (f + 4 * (n // (size // 2)))
        elif more:
            shared_row = r // row_block * distance + r % distance
            high[shared_row * size + n] |= (code >> 4) << (more * f + 8 // sharers * (r % row_block // distance))
    return bytes(low) + bytes(high)


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 64), (64, 80), (64, 112), (128, 96)])
def test_pack_bit_by_bit(page_size, head_dim, bits, per):
    """Packed bytes are those of a loop over `docs/page_format.md`, and unpack reads them back (KF 8)."""
    codes = torch.randint(0, 2**bits, (2, page_size, head_dim), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = reference.pack(codes, bits, per=per)
    for i in range(2):
        assert packed[i].numpy().tobytes() == slow_pack(codes[i].tolist(), bits, per)
    assert torch.equal(reference.unpack(packed, bits, page_size, head_dim, per=per), codes)


def test_rounding_ties():
    """Halfway between two codes the even one is taken; a constant row has code 0."""
    tile = torch.zeros(64, 64)
    tile[0] = torch.tensor([0.0, 3.0, 0.5, 1.5, 2.5, 1.0, 2.0, 0.25]).repeat(8)
    codes, scale, zero = reference.quantize(tile, 2, per="token", encoder=PUBLISHED)
    assert codes[0, :8].tolist() == [0, 3, 0, 2, 2, 1, 2, 0]
    assert (scale[0], zero[0]) == (1.0, 0.0)
    assert codes[1:].max() == 0
