"""Rotation, balancing, rounding and packing: every kernel gives the bits of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    DTYPES,
    ON_GPU,
    assert_rounded_alike,
    assert_same_bits,
    draw,
    encoder_id,
    hard_sums,
    strided,
    uneven,
)

from kvarn_triton import (
    PUBLISHED,
    Encoder,
    dequantize,
    hadamard,
    pack,
    quantize,
    reference,
    unpack,
    variance_normalize,
)
from kvarn_triton.layout import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES
from kvarn_triton.tile.arithmetic import fma

SHAPES = list(itertools.product(SUPPORTED_PAGE_SIZES, SUPPORTED_HEAD_DIMS))
# Each shape with one number of bits and one `per`; on a GPU with all of them.
TILES = [
    (page_size, head_dim, bits, per)
    for i, (page_size, head_dim) in enumerate(SHAPES)
    for j, (bits, per) in enumerate(itertools.product(SUPPORTED_BITS, ("channel", "token")))
    if ON_GPU or (i + i // 8 + j) % 8 == 0
]


def test_empty_memory_is_poisoned(device):
    """What the other tests rely on: memory that a kernel should have written starts as NaN, or as 255."""
    assert torch.empty(4, device=device).isnan().all()
    assert (torch.empty(4, dtype=torch.uint8, device=device) == 255).all()


@triton.jit
def _fma_kernel(out_ptr, x_ptr, y_ptr, z_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    x, y, z = (tl.load(x_ptr + place, mask), tl.load(y_ptr + place, mask), tl.load(z_ptr + place, mask))
    tl.store(out_ptr + place, fma(x, y, z), mask)


def test_fused_multiply_add(device):
    """What sums rest on: one rounding, where rounding twice gives other bits (`hard_sums`)."""
    x, y, z = (t.to(device) for t in hard_sums())
    out = torch.empty_like(x)
    _fma_kernel[(triton.cdiv(len(x), 256),)](out, x, y, z, len(x), BLOCK=256)
    assert_same_bits(out, reference.arithmetic.fma(x, y, z))


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard(head_dim, dtype, device):
    """Any leading shape, views, `out=` and smaller blocks; head_dim need not be a power of two (KF 9)."""
    x = draw(3, 7, head_dim, dtype=dtype, device=device)
    assert_rounded_alike(hadamard(x), reference.hadamard(x))
    assert_rounded_alike(hadamard(strided(x)), reference.hadamard(x))
    assert_rounded_alike(hadamard(x.transpose(0, 1)), reference.hadamard(x.transpose(0, 1)))
    assert_rounded_alike(hadamard(x[0, 0], block_size=2), reference.hadamard(x[0, 0], block_size=2))
    out = torch.empty_like(x)
    assert hadamard(x, block_size=16, out=out) is out
    assert_rounded_alike(out, reference.hadamard(x, block_size=16))
    expected = reference.hadamard(x)
    assert_rounded_alike(hadamard(x, out=x), expected)
    assert hadamard(x[:0]).shape == (0, 7, head_dim)


@pytest.mark.parametrize(("page_size", "head_dim"), SHAPES)
def test_variance_normalize(page_size, head_dim, device):
    """Balanced tiles and both scales, for keys and values; head_dim and page_size differ (KF 7)."""
    for per, dtype in (("channel", torch.float32), ("token", torch.bfloat16)):
        tiles = uneven(2, page_size, head_dim).to(dtype).to(device)
        for result, expected in zip(
            variance_normalize(tiles, per=per), reference.variance_normalize(tiles, per=per), strict=True
        ):
            assert_same_bits(result, expected)


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize(
    "encoder", [Encoder(0), Encoder(1), Encoder(16), PUBLISHED, Encoder(3, equivariant=False)], ids=encoder_id
)
def test_variance_normalize_options(encoder, per, device):
    """Iterations and the published mode; a batch gives the bits of its tiles one at a time (KF 2)."""
    tiles = torch.stack([uneven(64, 80, seed=seed) * 10.0 ** (1 - seed) for seed in range(3)]).to(device)
    results = variance_normalize(tiles, per=per, encoder=encoder)
    for result, expected in zip(results, reference.variance_normalize(tiles, per=per, encoder=encoder), strict=True):
        assert_same_bits(result, expected)
    for i in range(3):
        for one, result in zip(variance_normalize(tiles[i], per=per, encoder=encoder), results, strict=True):
            assert_same_bits(one, result[i])


@pytest.mark.parametrize("per", ["channel", "token"])
def test_variance_normalize_large_mean(per, device):
    """Mean 100, deviation 0.1: the deviations are summed after the mean is subtracted (KF 6)."""
    tiles = (100 + 0.1 * uneven(64, 128)).to(device)
    for encoder in (Encoder(1, equivariant=False), Encoder()):
        results = variance_normalize(tiles, per=per, encoder=encoder)
        for result, expected in zip(results, reference.variance_normalize(tiles, per=per, encoder=encoder), strict=True):
            assert_same_bits(result, expected)


@pytest.mark.parametrize(("page_size", "head_dim", "bits", "per"), TILES)
def test_quantize_and_dequantize(page_size, head_dim, bits, per, device):
    """Codes, scale and zero; and back, from float32 and float16 scales."""
    tiles = draw(2, 1, page_size, head_dim, dtype=DTYPES[bits % 3], device=device)
    tiles[0, 0, 3], tiles[0, 0, :, 5] = 1.5, -0.25  # a constant token, a constant channel
    for encoder in (PUBLISHED, Encoder(fits=2)):
        codes, scale, zero = quantize(tiles, bits, per=per, encoder=encoder)
        expected = reference.quantize(tiles, bits, per=per, encoder=encoder)
        for result, exact in zip((codes, scale, zero), expected, strict=True):
            assert_same_bits(result, exact)
    assert_same_bits(dequantize(codes, scale, zero, per=per), reference.dequantize(codes, scale, zero, per=per))
    half = scale.half(), zero.half()
    assert_same_bits(dequantize(codes, *half, per=per), reference.dequantize(codes, *half, per=per))


@pytest.mark.parametrize("per", ["channel", "token"])
def test_rows_of_one_code(per, device):
    """Rows of less range than the least scale have one code: a fit leaves their zero where it is."""
    tile = draw(64, 64, device=device)
    rows = tile.T if per == "channel" else tile
    rows[3], rows[8] = 5e-12 * draw(64, seed=1, device=device), -2.5
    codes, scale, zero = quantize(tile, 2, per=per, encoder=Encoder(fits=2))
    for result, expected in zip(
        (codes, scale, zero), reference.quantize(tile, 2, per=per, encoder=Encoder(fits=2)), strict=True
    ):
        assert_same_bits(result, expected)
    assert torch.equal(zero[[3, 8]], quantize(tile, 2, per=per, encoder=Encoder(fits=0))[2][[3, 8]])
    assert (codes.T if per == "channel" else codes)[[3, 8]].max() == 0


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_rounding_ties(bits, device):
    """Halfway between two codes the even one is taken, at every code."""
    top = 2**bits - 1
    halves = torch.arange(0, 2 * top + 1) / 2
    tile = halves.repeat(64, 8 * 64 // len(halves) + 1)[:, :512].contiguous()
    tile[:, 0], tile[:, 1] = 0.0, float(top)
    codes, scale, zero = quantize(tile.to(device), bits, per="token", encoder=PUBLISHED)
    assert (scale == 1).all() and (zero == 0).all()
    assert_same_bits(codes.cpu(), torch.round(tile).to(torch.uint8))  # torch.round takes the even neighbour


@pytest.mark.parametrize(("page_size", "head_dim", "bits", "per"), TILES)
def test_pack_and_unpack(page_size, head_dim, bits, per, device):
    """Packed bytes are the reference's, which are those of a slow loop; unpack reads them back (KF 8)."""
    codes = torch.randint(0, 2**bits, (3, page_size, head_dim), generator=torch.Generator().manual_seed(0))
    codes = codes.to(torch.uint8).to(device)
    packed = pack(codes, bits, per=per)
    assert_same_bits(packed, reference.pack(codes, bits, per=per))
    assert_same_bits(unpack(packed, bits, page_size, head_dim, per=per), codes)
    assert_same_bits(unpack(packed[1], bits, page_size, head_dim, per=per), codes[1])
