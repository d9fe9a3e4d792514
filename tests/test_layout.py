"""The byte format: offsets, presets, refusals, and golden bytes that pin version 3 of the format."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import pickle
import zlib

import pytest
import torch
from helpers import layout_id, uneven

from kvarn_triton import FORMAT_VERSION, PRESETS, PUBLISHED, PageLayout, page_header, read_page_header, reference, store_pages
from kvarn_triton.layout import SUPPORTED_BITS, SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES

ALL_LAYOUTS = [
    PageLayout(*sizes) for sizes in itertools.product(SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES, SUPPORTED_BITS, SUPPORTED_BITS)
]
UNEQUAL_LAYOUTS = [
    PageLayout(head_dim, SUPPORTED_PAGE_SIZES[i % 2], SUPPORTED_BITS[i % 6], SUPPORTED_BITS[i // 6 % 6], v_head_dim)
    for i, (head_dim, v_head_dim) in enumerate(itertools.permutations(SUPPORTED_HEAD_DIMS, 2))
]
OFFSETS = ("k_codes", "v_codes", "k_params", "v_params", "k_norm", "v_norm", "gains")


def test_fields_fill_the_record():
    """Every field starts at a multiple of 16 bytes, none overlaps another, and nothing is left but the end of the last line."""
    for layout in ALL_LAYOUTS + UNEQUAL_LAYOUTS:
        for name in OFFSETS:
            assert getattr(layout, f"{name}_offset") % 16 == 0, (layout, name)
        assert layout.page_bytes % 128 == 0
        written = torch.zeros(layout.page_bytes, dtype=torch.int32)
        for name in layout.fields(torch.zeros(layout.page_bytes, dtype=torch.uint8)):
            record = torch.zeros(layout.page_bytes, dtype=torch.uint8)
            field = layout.fields(record)[name]
            field.copy_(torch.full((field.numel() * field.element_size(),), 255, dtype=torch.uint8).view(field.dtype))
            written += record != 0
        end = layout.gains_offset + 8
        assert (written[:end] == 1).all(), layout
        assert (written[end:] == 0).all() and layout.page_bytes - end < 128, layout


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 64), (80, 80), (128, 128), (192, 128), (64, 112)])
@pytest.mark.parametrize("v_bits", SUPPORTED_BITS)
def test_fields_of_a_record(head_dim, v_head_dim, v_bits):
    """Scales, zeros and norms stand where `docs/page_format.md` says, read number by number."""
    layout = PageLayout(head_dim, 64, 4, v_bits, v_head_dim)
    halves = torch.randn(layout.page_bytes // 2, generator=torch.Generator().manual_seed(0)).half()
    fields = layout.fields(halves.view(torch.uint8))
    numbers = halves.tolist()

    def read(offset: int, index: int) -> float:
        return numbers[offset // 2 + index]

    for c in range(head_dim):
        assert fields["k_scale"][c] == read(layout.k_params_offset, 2 * c)
        assert fields["k_zero"][c] == read(layout.k_params_offset, 2 * c + 1)
    for t in range(64):
        assert fields["v_scale"][t] == read(layout.v_params_offset, 2 * t)
        assert fields["v_zero"][t] == read(layout.v_params_offset, 2 * t + 1)
    for name, count in (("k_norm", 64), ("v_norm", v_head_dim)):
        assert fields[name].shape == (count,)
        for row in range(count):
            assert fields[name][row] == read(getattr(layout, f"{name}_offset"), row)
    gains = halves[layout.gains_offset // 2 :][:4].view(torch.float32)
    assert fields["k_gain"].item() == gains[0].item()
    assert fields["v_gain"].item() == gains[1].item()


@pytest.mark.parametrize(
    ("name", "page_bytes"),
    [
        ("k8v8_g128", 34_432),
        ("k4v4_g128", 18_048),
        ("k4v3_g128", 16_000),
        ("k4v2_g128", 13_952),
        ("k3v3_g128", 13_952),
        ("k3v2_g128", 11_904),
        ("k2v2_g128", 9_856),
        ("k8v8_g64", 17_664),
        ("k4v2_g64", 7_424),
        ("k2v2_g64", 5_376),
        ("k6v6_g128", 26_240),
        ("k5v4_g128", 20_096),
        ("k6v6_g64", 13_568),
        ("k5v5_g64", 11_520),
    ],
)
def test_page_bytes(name, page_bytes):
    """Sizes of the presets at head_dim 128, counted by hand: codes, six rows of float16 scales, and a line of 128 bytes."""
    layout = PageLayout.from_name(name)
    assert layout.page_bytes == page_bytes
    assert layout.bytes_per_token == page_bytes / layout.page_size
    assert layout.bits_per_element == pytest.approx(8 * page_bytes / (2 * 128 * layout.page_size))
    assert layout.pages_shape(5, 3) == (5, 3, page_bytes)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "offsets", "page_bytes"),
    [
        (192, 128, (0, 12_288, 16_384, 17_152, 17_664, 17_920, 18_176), 18_304),
        (64, 128, (0, 4_096, 8_192, 8_448, 8_960, 9_216, 9_472), 9_600),
    ],
)
def test_offsets_of_different_head_dims(head_dim, v_head_dim, offsets, page_bytes):
    """Offsets of k4v2_g128 records counted by hand: codes and `v_norm` follow the channels of their own half."""
    layout = PageLayout.from_name("k4v2_g128", head_dim, v_head_dim)
    assert tuple(getattr(layout, f"{name}_offset") for name in OFFSETS) == offsets
    assert layout.page_bytes == page_bytes
    assert layout.bytes_per_token == page_bytes / 128
    assert layout.bits_per_element == 8 * page_bytes / (128 * (head_dim + v_head_dim))
    assert (layout.block_size, layout.v_block_size) == (64, 128)
    assert layout.raw_head_dim == max(head_dim, v_head_dim)


@pytest.mark.parametrize("layout", UNEQUAL_LAYOUTS[::5], ids=layout_id)
def test_halves_of_a_record(layout):
    """Keys have the bytes that a layout of their head_dim gives them, and values those that one of theirs does."""
    k, v = (uneven(layout.page_size, head_dim, seed=head_dim) for head_dim in (layout.head_dim, layout.v_head_dim))
    fields = layout.fields(reference.cache.encode_records(k, v, layout))
    decoded = reference.cache.decode_records(reference.cache.encode_records(k, v, layout), layout, rotated=False)
    for half, x in enumerate((k, v)):
        alone = PageLayout(x.shape[1], layout.page_size, layout.k_bits, layout.v_bits)
        record = reference.cache.encode_records(x, x, alone)
        for name, field in alone.fields(record).items():
            if name.startswith("kv"[half]):
                assert torch.equal(fields[name], field), name
        assert torch.equal(decoded[half], reference.cache.decode_records(record, alone, rotated=False)[half])


def test_v_head_dim():
    """None is head_dim; an equal layout, with the same hash and text, is one that was given the number."""
    layout = PageLayout(192, 128, 4, 2)
    assert layout.v_head_dim == 192
    for same in (
        PageLayout(192, 128, 4, 2, 192),
        PageLayout(192, 128, 4, 2, None),
        PageLayout.from_name("k4v2_g128", 192, 192),
    ):
        assert same == layout and hash(same) == hash(layout) and repr(same) == repr(layout)
        assert same.pages_shape(2, 3) == layout.pages_shape(2, 3)
    other = PageLayout(192, 128, 4, 2, v_head_dim=128)
    assert other != layout and other != PageLayout(128, 128, 4, 2) and other.name == layout.name
    assert PageLayout.from_name("k4v2_g128", head_dim=192, v_head_dim=128) == other
    assert len({layout, other, *UNEQUAL_LAYOUTS}) == 58
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other)), dataclasses.replace(other)):
        assert copied == other and hash(copied) == hash(other)


def test_replaced_sizes():
    """`dataclasses.replace` keeps the number that v_head_dim is, until it is given another one or None."""
    layout = PageLayout(128, 64, 4, 2)
    assert dataclasses.replace(layout, k_bits=3) == PageLayout(128, 64, 3, 2)
    assert dataclasses.replace(layout, head_dim=192) == PageLayout(192, 64, 4, 2, v_head_dim=128)
    assert dataclasses.replace(layout, head_dim=192, v_head_dim=None) == PageLayout(192, 64, 4, 2)


def test_names_and_identity():
    """Presets round-trip through their names; equal layouts hash alike and serve as keys."""
    for name in PRESETS:
        assert PageLayout.from_name(name, head_dim=64).name == name
    assert PageLayout.from_name("k2v8_g64", head_dim=96) == PageLayout(96, 64, 2, 8)
    assert PageLayout.from_name("k6v5_g64", head_dim=96) == PageLayout(96, 64, 6, 5)
    assert len(set(ALL_LAYOUTS)) == len(ALL_LAYOUTS)
    assert {PageLayout(): 1}[PageLayout(128, 128, 4, 2)] == 1
    assert PageLayout() != PageLayout(k_bits=3)
    with pytest.raises(AttributeError):
        PageLayout().head_dim = 64  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 100}, "head_dim: expected one of 64, 80, 96, 112, 128, 192, 256, 512, got 100"),
        ({"head_dim": 128.0}, "head_dim: .*got 128.0"),
        ({"page_size": 32}, "page_size: expected one of 64, 128, got 32"),
        ({"k_bits": 7}, "k_bits: expected one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"v_bits": 1}, "v_bits: expected one of 2, 3, 4, 5, 6, 8, got 1"),
        ({"v_head_dim": 100}, "v_head_dim: expected one of 64, 80, 96, 112, 128, 192, 256, 512, got 100"),
        ({"v_head_dim": "64"}, "v_head_dim: .*got '64'"),
        ({"head_dim": 100, "v_head_dim": 64}, "^head_dim: .*got 100"),
    ],
)
def test_unsupported_sizes(arguments, message):
    """A layout that no kernel supports is refused when it is made (KF 9)."""
    with pytest.raises(ValueError, match=message):
        PageLayout(**arguments)


@pytest.mark.parametrize("name", ["k4v2", "k7v2_g128", "k4v2_g32", "k4v2_g128 ", "K4V2_G128", "", None, 4])
def test_unknown_names(name):
    """A name that isn't one is refused, whatever its type."""
    sizes = r"\(bits 2, 3, 4, 5, 6, 8, page_size 64, 128\)"
    with pytest.raises(ValueError, match=rf"name: expected k<bits>v<bits>_g<page_size>.*{sizes}"):
        PageLayout.from_name(name)


GOLDEN_SHA256 = "3325f6e041d8916c6694ebc9468d6196b8d80fcbc335f9946e7ad478152dd28f"
GOLDEN_FIELDS = {
    "k_codes": (0x0000, "71bef8f1b0e07e1c"),
    "v_codes": (0x0600, "4956e557aaeaa565"),
    "k_params": (0x0A00, "ca2d1bb7ff3244b8"),
    "v_params": (0x0B00, "99332cb71935cab8"),
    "k_norm": (0x0C00, "e7302a358a372c39"),
    "v_norm": (0x0C80, "9f35b73a6738433a"),
    "gains": (0x0D00, "0000804200000042"),
}
"""Offset and first 8 bytes of every part of the golden record."""


def golden_activations() -> tuple[torch.Tensor, torch.Tensor]:
    """Return k and v float32 [64, 1, 64] made by a formula in exact arithmetic, with uneven tokens and channels."""
    token, channel = torch.arange(64)[:, None], torch.arange(64)[None, :]
    k = ((token * 37 + channel * 101 + token * channel * 7) % 257 - 128) * (1 + token % 5) / 64
    v = ((token * 53 + channel * 29 + token * channel * 3) % 251 - 125) * (1 + channel % 7) / 128
    return k[:, None].float(), v[:, None].float()


@pytest.mark.parametrize("store", [reference.store_pages, store_pages], ids=["reference", "kernel"])
def test_golden_record(store, device):
    """The bytes of one k3v2 record of the published encoder.

    Fields that move or mean something else need a new FORMAT_VERSION. If only last places differ, the encoder rounds in
    another order: old pages stay readable, but equal prefixes no longer give equal bytes across versions.
    """
    assert FORMAT_VERSION == 3
    layout = PageLayout(head_dim=64, page_size=64, k_bits=3, v_bits=2)
    k, v = golden_activations()
    pages = torch.empty(layout.pages_shape(1, 1), dtype=torch.uint8, device=device)
    store(k.to(device), v.to(device), pages, torch.zeros(1, dtype=torch.int32, device=device), layout, encoder=PUBLISHED)
    record = pages[0, 0].cpu().numpy().tobytes()
    for name, (offset, first) in GOLDEN_FIELDS.items():
        assert getattr(layout, f"{name}_offset") == offset
        assert record[offset : offset + 8].hex() == first, name
    assert hashlib.sha256(record).hexdigest() == GOLDEN_SHA256


GOLDEN_SHARING = {
    (5, 6): (0x0A00, "043ead38b8150d8c", "db7ad95108bf5bf40a95db23d6ef556eabc6ea89f01af999444c13e20d296ff9"),
    (6, 5): (0x0C00, "0a975eab54020e46", "64bfeb94e96b15d53b1b88d3e546ff3810dc0e3a0edfa67756ede188c49c9671"),
}
"""Of golden records with other bits: offset and first 8 bytes of the value codes, and the hash."""


@pytest.mark.parametrize("bits", GOLDEN_SHARING)
@pytest.mark.parametrize("store", [reference.store_pages, store_pages], ids=["reference", "kernel"])
def test_golden_records_of_5_and_6_bits(store, bits, device):
    """The bytes of the same record with codes whose high bits distant rows share."""
    layout = PageLayout(64, 64, *bits)
    k, v = golden_activations()
    pages = torch.empty(layout.pages_shape(1, 1), dtype=torch.uint8, device=device)
    store(k.to(device), v.to(device), pages, torch.zeros(1, dtype=torch.int32, device=device), layout, encoder=PUBLISHED)
    record, (offset, first, expected) = pages[0, 0].cpu().numpy().tobytes(), GOLDEN_SHARING[bits]
    assert layout.v_codes_offset == offset and record[offset : offset + 8].hex() == first
    assert hashlib.sha256(record).hexdigest() == expected


GOLDEN_HEADER = (
    "4b5641524e504753" "03000000" "80000000" "6b3476325f6731323800000000000000"
    "c0000000" "80000000" "80000000" "04000000" "02000000" "80470000" "08000000" "00000000" "0500000000000000"
)  # fmt: skip
"""Magic, version, bytes, name; head_dim, v_head_dim, page_size, bits, page_bytes, heads, reserved; pages."""


def with_checksum(fields: bytes) -> bytes:
    """Return a header with these fields."""
    return fields[:124] + zlib.crc32(fields[:124]).to_bytes(4, "little")


def test_golden_header():
    """The bytes of one header, as `docs/page_format.md` has them; what follows a header is not looked at."""
    layout = PageLayout.from_name("k4v2_g128", 192, 128)
    header = page_header(layout, 8, 5)
    assert len(header) == 128 and header == with_checksum(bytes.fromhex(GOLDEN_HEADER) + bytes(52))
    for given in (header, bytearray(header) + b"pages", memoryview(header)):
        read = read_page_header(given)
        assert read == (layout, 8, 5)
    assert read.num_bytes == 5 * 8 * layout.page_bytes == 5 * 8 * 18_304


@pytest.mark.parametrize("layout", UNEQUAL_LAYOUTS[::5] + ALL_LAYOUTS[::17], ids=layout_id)
def test_headers_of_layouts(layout):
    """Every layout comes back from its header."""
    assert read_page_header(page_header(layout, 3, 0)) == (layout, 3, 0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"KVARNPGX", r"header.magic: expected b'KVARNPGS', got b'KVARNPGX'"),
        (8, b"\x04", "header.format_version: expected 3, got 4"),
        (12, b"\x00", "header.header_bytes: expected 128, got 0"),
        (16, b"k4v3", r"header.name: expected k4v2_g128, got b'k4v3_g128"),
        (32, b"\x64", "head_dim: expected one of 64, 80, 96, 112, 128, 192, 256, 512, got 100"),
        (40, b"\x20", "page_size: expected one of 64, 128, got 32"),
        (44, b"\x07", "k_bits: expected one of 2, 3, 4, 5, 6, 8, got 7"),
        (52, b"\x81", "header.page_bytes: expected 18304, got 18305"),
        (56, b"\x00", "header.num_kv_heads: expected at least 1, got 0"),
        (60, b"\x01", "header.reserved: expected 0, got 1"),
    ],
)
def test_refused_headers(place, value, message):
    """What a version can't read is refused by name, and so is a header of which a byte has changed."""
    header = bytearray(page_header(PageLayout.from_name("k4v2_g128", 192, 128), 8, 5))
    header[place : place + len(value)] = value
    with pytest.raises(ValueError, match=f"^{message}"):
        read_page_header(with_checksum(header))
    if place > 8:
        with pytest.raises(ValueError, match=r"^header.checksum: expected 0x[0-9a-f]{8}, got "):
            read_page_header(header)


def test_what_is_no_header():
    """Too few bytes, other types, numbers that are none."""
    header = page_header(PageLayout(), 8, 5)
    for wrong, message in (
        (header[:-1], "header: expected at least 128 bytes, got 127"),
        ("x" * 128, "header: expected bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            read_page_header(wrong)
    for arguments, message in (
        ((None, 8, 5), "layout: expected a PageLayout, got 'NoneType'"),
        ((PageLayout(), 0, 5), "num_kv_heads: expected an integer of at least 1, got 0"),
        ((PageLayout(), 8, -1), "num_pages: expected an integer of at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            page_header(*arguments)
