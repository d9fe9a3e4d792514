"""Rotation, balancing, rounding, packing, storing and gathering: every kernel gives the bits of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    ALL_LAYOUTS,
    DTYPES,
    ON_GPU,
    assert_rounded_alike,
    assert_same_bits,
    draw,
    hard_sums,
    layout_id,
    strided,
    uneven,
)

from kvarn_triton import (
    PUBLISHED,
    Encoder,
    PageLayout,
    configs,
    dequantize,
    dequantize_pages,
    hadamard,
    pack,
    quantize,
    reference,
    store_pages,
    unpack,
    variance_normalize,
)
from kvarn_triton.device import fma
from kvarn_triton.layout import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES
from kvarn_triton.testing import relative_error

SHAPES = list(itertools.product(SUPPORTED_PAGE_SIZES, SUPPORTED_HEAD_DIMS))
# Each shape with one number of bits and one `per`; on a GPU with all of them.
TILES = [
    (page_size, head_dim, bits, per)
    for i, (page_size, head_dim) in enumerate(SHAPES)
    for j, (bits, per) in enumerate(itertools.product(SUPPORTED_BITS, ("channel", "token")))
    if ON_GPU or (i + i // 8 + j) % 8 == 0
]


def encoder_id(encoder: Encoder) -> str:
    """Return a short name of an encoder for test ids."""
    words = [f"i{encoder.iterations}", f"f{encoder.fits}", encoder.norm]
    return "-".join(words + [name for name in ("equivariant", "clip") if getattr(encoder, name)])


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
    assert_same_bits(out, reference.codec.fma(x, y, z))


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
    rows[3], rows[8] = 1e-11 * draw(64, seed=1, device=device), -2.5
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


def store_case(layout: PageLayout, num_pages: int, num_kv_heads: int, dtype: torch.dtype, device: torch.device, seed: int = 0):
    """Return k and v as parts of one tensor, as a fused projection gives them, and pages of 0xFF."""
    tokens = num_pages * layout.page_size + 3
    fused = uneven(tokens, 3 * num_kv_heads, layout.raw_head_dim, seed=seed).to(dtype).to(device)
    k = strided(fused[:, num_kv_heads : 2 * num_kv_heads, : layout.head_dim])
    v = fused[:, 2 * num_kv_heads :, : layout.v_head_dim]
    pages = torch.full(layout.pages_shape(num_pages + 2, num_kv_heads), 255, dtype=torch.uint8, device=device)
    return k, v, pages


@pytest.mark.parametrize("index", range(len(ALL_LAYOUTS)), ids=[layout_id(layout) for layout in ALL_LAYOUTS])
def test_store_and_dequantize_pages(index, device):
    """Records and what is read back, for every pair of bits and every shape (KF 1, KF 7, KF 8, KF 9).

    Both tensors of pages are compared whole, so that neighbours of written pages are known to be untouched.
    """
    layout, dtype = ALL_LAYOUTS[index], DTYPES[index % 3]
    heads = 2 if ON_GPU or layout.raw_head_dim * layout.page_size <= 8192 else 1
    k, v, pages = store_case(layout, 2, heads, dtype, device, seed=index)
    expected = pages.clone()
    page_ids = torch.tensor([3, -1, 1 if heads == 2 else -9], dtype=(torch.int32, torch.int64)[index % 2], device=device)
    token_starts = torch.tensor([layout.page_size + 3, 0, 1], dtype=(torch.int64, torch.int32)[index // 2 % 2], device=device)
    store_pages(k, v, pages, page_ids, layout, token_starts=token_starts)
    reference.store_pages(k, v, expected, page_ids, layout, token_starts=token_starts)
    assert_same_bits(pages, expected)
    assert (pages[[0, 2]] == 255).all()

    for rotated, out_dtype in ((True, torch.float32), (False, DTYPES[(index + 1) % 3])):
        results = dequantize_pages(pages, page_ids, layout, dtype=out_dtype, rotated=rotated)
        wanted = reference.dequantize_pages(pages, page_ids, layout, dtype=out_dtype, rotated=rotated)
        for result, tile in zip(results, wanted, strict=True):
            assert_rounded_alike(result, tile)
            assert (result[1] == 0).all()


def test_dequantize_pages_into_views(device):
    """`out=` may be strided and decides the dtype; what lies between its rows is untouched."""
    layout = PageLayout(80, 64, 3, 8)
    k, v, pages = store_case(layout, 1, 2, torch.float16, device)
    page_ids = torch.tensor([2], device=device)
    store_pages(k, v, pages, page_ids, layout)
    memory = torch.full((1, 64, 5, 96), -7.0, device=device)
    out = memory[:, :, 0:2, 8:88], memory[:, :, 3:5, 8:88]
    results = dequantize_pages(pages, page_ids, layout, out=out)
    assert results[0] is out[0] and results[1] is out[1]
    for result, expected in zip(results, reference.dequantize_pages(pages, page_ids, layout, dtype=torch.float32), strict=True):
        assert_same_bits(result, expected)
    assert (memory[:, :, 2] == -7).all() and (memory[..., :8] == -7).all() and (memory[..., 88:] == -7).all()


def random_pages(layout: PageLayout, num_pages: int, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """Return pages of random codes whose parameters and norms are float16 numbers of all magnitudes below 1."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randint(0, 256, layout.pages_shape(num_pages, num_kv_heads), generator=generator).to(torch.uint8)
    for name, field in layout.fields(pages).items():
        if field.dtype == torch.float16:
            numbers = torch.randint(0, 0x3C00, field.shape, generator=generator).to(torch.int16).view(torch.float16)
            field.copy_(-numbers if name.endswith("zero") else numbers)
        elif field.dtype == torch.float32:
            field.fill_(1.0)
    return pages.to(device)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    "layout",
    [PageLayout(80, 64, 3, 4), PageLayout(128, 64, 8, 3), PageLayout(192, 64, 2, 2), PageLayout(128, 64, 3, 2, v_head_dim=96)],
    ids=layout_id,
)
def test_dequantize_any_page(layout, rotated, device):
    """Scales and zeros next to each other that no encoder writes, and skipped ids between others, into strided memory."""
    pages = random_pages(layout, 3, 2, device)
    page_ids = torch.tensor([-1, 2, -7, 0], dtype=torch.int32, device=device)
    memory = torch.full((2, 4, layout.page_size + 1, 3, layout.raw_head_dim + 16), -7.0, device=device)
    dims = layout.head_dim, layout.v_head_dim
    views = tuple(half[:, :-1, :2, 8 : 8 + dim] for half, dim in zip(memory, dims, strict=True))
    dequantize_pages(pages, page_ids, layout, rotated=rotated, out=views)
    expected = reference.dequantize_pages(pages, page_ids, layout, dtype=torch.float32, rotated=rotated)
    for result, tile in zip(views, expected, strict=True):
        assert_same_bits(result, tile)
        result.fill_(-7.0)
    assert (memory == -7).all()


@pytest.mark.parametrize("parts", [1, 3, 16])
def test_dequantize_in_parts(parts, monkeypatch, device):
    """Any number of programs may share a page, more than there are chunks too."""
    layout = PageLayout(64, 128, 4, 2)
    pages, page_ids = random_pages(layout, 1, 1, device), torch.tensor([0, -1], device=device)
    monkeypatch.setattr(configs, "gather_parts", lambda programs, device: parts)
    results = dequantize_pages(pages, page_ids, layout)
    for result, tile in zip(results, reference.dequantize_pages(pages, page_ids, layout), strict=True):
        assert_same_bits(result, tile)


@pytest.mark.parametrize("gain", [2.0**-126, 2.0**-100, 2.0**88])
def test_extreme_gains(gain, device):
    """The whole range of gains that the encoder writes, subnormal results included."""
    layout = PageLayout(64, 64, 4, 2)
    pages = random_pages(layout, 1, 1, device)
    for name in ("k_gain", "v_gain"):
        layout.fields(pages)[name].fill_(gain)
    page_ids = torch.tensor([0], device=device)
    for rotated in (False, True):
        results = dequantize_pages(pages, page_ids, layout, dtype=torch.float32, rotated=rotated)
        expected = reference.dequantize_pages(pages, page_ids, layout, dtype=torch.float32, rotated=rotated)
        for result, tile in zip(results, expected, strict=True):
            assert torch.isfinite(tile).all() and (tile != 0).any()
            assert_same_bits(result, tile)


@pytest.mark.parametrize(
    "encoder",
    [
        PUBLISHED,
        Encoder(0, fits=0),
        Encoder(1, clip=False, fits=3),
        Encoder(16, equivariant=False, fits=2),
        Encoder(1, clip=False, fits=0),
        Encoder(1, norm="balance"),
    ],
    ids=encoder_id,
)
def test_encoder_options(encoder, device):
    """Every encoder of the store kernel, default starts, and pages one at a time instead of at once (KF 2)."""
    layout = PageLayout(64, 64, 2, 4)
    k, v, pages = store_case(layout, 2, 1, torch.float32, device)
    expected, single = pages.clone(), pages.clone()
    page_ids = torch.tensor([2, 0], device=device)
    store_pages(k, v, pages, page_ids, layout, encoder=encoder)
    reference.store_pages(k, v, expected, page_ids, layout, encoder=encoder)
    assert_same_bits(pages, expected)
    for i in range(2):
        tokens = slice(64 * i, 64 * i + 64)
        store_pages(k[tokens], v[tokens], single, page_ids[i : i + 1], layout, encoder=encoder)
    assert_same_bits(single, expected)


@pytest.mark.parametrize("magnitude", [1e5, 1.0, 1e-6])
def test_degenerate_activations(magnitude, device):
    """Zero heads, constant tokens, zero tokens and one huge one, in magnitudes that float16 can't hold (KF 4, KF 5)."""
    layout = PageLayout(64, 64, 2, 3)
    k, v, pages = store_case(layout, 1, 4, torch.bfloat16, device)
    k[:, 0], v[:, 0] = 0.0, 0.0
    k[:, 1], v[:, 1] = 1.0, -1.0
    k[7, 2], v[7, 2] = 0.0, 0.0
    k[7, 3] *= 1000
    v[7, 3] *= 1000
    k, v = k * magnitude, v * magnitude
    expected, page_ids = pages.clone(), torch.tensor([1], device=device)
    store_pages(k, v, pages, page_ids, layout)
    reference.store_pages(k, v, expected, page_ids, layout)
    assert_same_bits(pages, expected)
    for field in layout.fields(pages[1]).values():
        assert torch.isfinite(field.float()).all()
    for result, exact in zip(dequantize_pages(pages, page_ids, layout, dtype=torch.float32), (k, v), strict=True):
        assert torch.isfinite(result).all()
        assert (result[0, :, 0] == 0).all()
        # One code per rotated number suffices: what is left is that scale, zero and norm round to float16.
        assert relative_error(result[0, :, 1], exact[:64, 1]) < 2**-8


@pytest.mark.parametrize("encoder", [Encoder(), PUBLISHED], ids=encoder_id)
def test_saturated_fields(encoder, device):
    """Activations that no float16 field can hold saturate alike in both codes, to finite numbers (KF 5)."""
    layout = PageLayout(64, 64, 2, 4)
    k, v, pages = store_case(layout, 1, 1, torch.float32, device)
    expected, page_ids = pages.clone(), torch.tensor([1], device=device)
    store_pages(k * 1e9, v * 1e9, pages, page_ids, layout, encoder=encoder)
    reference.store_pages(k * 1e9, v * 1e9, expected, page_ids, layout, encoder=encoder)
    assert_same_bits(pages, expected)
    for field in layout.fields(pages[1]).values():
        assert torch.isfinite(field.float()).all()


def test_recycled_page(device):
    """A page id that is used again holds nothing of its former content (KF 12)."""
    layout = PageLayout(96, 64, 3, 3)
    k, v, fresh = store_case(layout, 1, 1, torch.float16, device)
    page_ids = torch.tensor([1], device=device)
    store_pages(k, v, fresh, page_ids, layout)
    recycled = torch.randint(0, 256, fresh.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8).to(device)
    store_pages(k, v, recycled, page_ids, layout)
    assert_same_bits(recycled[1], fresh[1])


def test_nothing_to_do(device):
    """No pages: no launch, no change."""
    layout = PageLayout(64, 64, 4, 2)
    k, v, pages = store_case(layout, 0, 2, torch.float16, device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    store_pages(k, v, pages, none, layout)
    store_pages(k, v, pages, none - 1, layout, token_starts=none)
    assert (pages == 255).all()
    k, v = dequantize_pages(pages, none, layout)
    assert k.shape == v.shape == (0, 64, 2, 64)


@pytest.mark.skipif(not ON_GPU, reason="needs 2.5 GB of pages")
def test_byte_offsets_above_2_to_31(device):
    """Pages whose bytes start beyond 2**31 are written and read where they are (KF 28)."""
    layout = PageLayout(128, 128, 4, 2)
    num_pages = 2**31 // layout.page_bytes + 1000
    k, v, small = store_case(layout, 2, 1, torch.float16, device)
    store_pages(k, v, small, torch.tensor([0, 1], device=device), layout)
    pages = torch.zeros(layout.pages_shape(num_pages, 1), dtype=torch.uint8, device=device)
    page_ids = torch.tensor([num_pages - 1, 5], dtype=torch.int32, device=device)
    store_pages(k, v, pages, page_ids, layout)
    assert_same_bits(pages[page_ids.long()], small[:2])
    assert int((pages.sum(-1, dtype=torch.int64) > 0).sum()) == 2
    for far, near in zip(
        dequantize_pages(pages, page_ids, layout),
        dequantize_pages(small, torch.tensor([0, 1], device=device), layout),
        strict=True,
    ):
        assert_same_bits(far, near)


@pytest.mark.skipif(not ON_GPU, reason="needs 9 GB of activations")
def test_token_offsets_above_2_to_31(device):
    """The tokens of one page may lie further apart than 32 bits can say (KF 28)."""
    layout, stride = PageLayout(128, 128, 4, 2), 2**25
    memory = torch.zeros(127 * stride + 128, dtype=torch.float16, device=device)
    far = memory.as_strided((128, 1, 128), (stride, 128, 1))
    near = draw(128, 1, 128, dtype=torch.float16, device=device)
    far.copy_(near)
    pages = torch.zeros(layout.pages_shape(2, 1), dtype=torch.uint8, device=device)
    store_pages(far, near, pages, torch.tensor([0], device=device), layout)
    store_pages(near, near, pages, torch.tensor([1], device=device), layout)
    assert_same_bits(pages[0], pages[1])
