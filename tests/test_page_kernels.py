"""Pages from activations, and back to plain keys and values: kernels give the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    ALL_LAYOUTS,
    DTYPES,
    ON_GPU,
    assert_rounded_alike,
    assert_same_bits,
    draw,
    encoder_id,
    layout_id,
    strided,
    uneven,
)

from kvarn_triton import (
    PUBLISHED,
    Encoder,
    PageLayout,
    configs,
    dequantize_pages,
    reference,
    store_pages,
)
from kvarn_triton.testing import relative_error


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
