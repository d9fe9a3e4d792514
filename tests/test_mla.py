"""Pages of latents: refusals of a layout, golden bytes, bits of the reference, how kernels take codes from words."""

from __future__ import annotations

import hashlib

import numpy
import pytest
import torch
from helpers import DTYPES, assert_rounded_alike, assert_same_bits, draw, uneven
from mla_helpers import LAYOUTS, layout_id, tokens_of

import kvarn_triton as kvarn
from kvarn_triton import PUBLISHED, Encoder, MLAConfig, MLALayout, PageLayout, reference
from kvarn_triton.mla.latents import field_ptx, latents_ptx, pairs_ptx
from kvarn_triton.testing import relative_error


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_fields_fill_the_record(layout):
    """Every field starts at a multiple of 16 bytes, none overlaps another, and nothing is left but the end of the last line."""
    assert layout.page_bytes % 128 == 0
    written = torch.zeros(layout.page_bytes, dtype=torch.int32)
    for name in layout.fields(torch.zeros(layout.page_bytes, dtype=torch.uint8)):
        record = torch.zeros(layout.page_bytes, dtype=torch.uint8)
        field = layout.fields(record)[name]
        ones = torch.full((field.numel() * field.element_size(),), 255, dtype=torch.uint8)
        field.copy_(ones.view(field.dtype).view(field.shape))
        written += record != 0
    end = layout.gains_offset + 4
    assert (written[:end] == 1).all() and (written[end:] == 0).all() and layout.page_bytes - end < 128
    for name in ("k_codes", "rope", "k_params", "k_norm", "gains"):
        assert getattr(layout, f"{name}_offset") % 16 == 0


def test_page_bytes():
    """Sizes counted by hand: codes, rotary channels, scales and zeros, norms, a gain."""
    for layout, size in zip(LAYOUTS, (26_880, 51_584, 43_264, 84_352), strict=True):
        size_of_fields = layout.page_size * (64 * layout.bits + 128 + 2) + 2048 + 4
        assert layout.page_bytes == size == -(-size_of_fields // 128) * 128
        assert layout.bytes_per_token == size / layout.page_size
        pages = layout.empty_pages(3)
        assert pages.shape == (3, size) and pages.kvarn_layout == layout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 64, 4), "block_m: expected a power of two from 16 to 128, got 8"),
        ((16, 128, 4), "block_t: expected a power of two from 16 to 64, got 128"),
        ((16, 64, 3), "num_warps: expected a power of two from 1 to 16, got 3"),
        ((16, 64, 4, 0), "num_stages: expected an integer of at least 1, got 0"),
        ((16, 64, 4, 2, 0), "programs_per_sm: expected an integer of at least 1, got 0"),
        ((16, 64, 4, 2, 1, 8), "maxnreg: expected an integer of at least 24, got 8"),
        ((32, 64, 4, 2, 1, None, True), "block_m: expected 16 or 64 with warp_groups, got 32"),
    ],
)
def test_unsupported_parameters(arguments, message):
    """Launch parameters that nothing can be compiled for are refused when they are made."""
    with pytest.raises(ValueError, match=message):
        MLAConfig(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits: expected one of 4, 8, got 5"),
        ({"bits": 4.0}, "bits: expected one of 4, 8, got 4.0"),
        ({"page_size": 32}, "page_size: expected one of 64, 128, got 32"),
    ],
)
def test_unsupported_sizes(arguments, message):
    """A layout that no kernel supports is refused when it is made."""
    with pytest.raises(ValueError, match=message):
        MLALayout(**arguments)


def test_latents_are_keys():
    """Codes, scales, zeros, norms and gain are those of a record of keys and values with 512 channels."""
    layout, keys = MLALayout(4, 64), PageLayout(512, 64, 4, 4)
    tile, rope = uneven(64, 512), draw(64, 64)
    fields = layout.fields(reference.mla.encode_latents(tile, rope, layout))
    record = keys.fields(reference.cache.encode_records(tile, tile, keys))
    for name in ("codes", "scale", "zero", "norm", "gain"):
        assert_same_bits(fields[name].contiguous(), record[f"k_{name}"].contiguous())
    assert torch.equal(fields["rope"], rope.half())


GOLDEN_SHA256 = "37b2e14cb48086be93a3296d5d37bd8607789783587703ce2db58c4a72125499"
GOLDEN_FIELDS = {
    "k_codes": (0x0000, "5e1ac443a53596c6"),
    "rope": (0x4000, "d0c300c230c0c0bc"),
    "k_params": (0x6000, "9319c6a81e0f299a"),
    "k_norm": (0x6800, "282f8132aa342f35"),
    "gains": (0x6880, "0000004400000000"),
}
"""Offset and first 8 bytes of every part of the golden record."""


@pytest.mark.parametrize("store", [reference.mla_store_pages, kvarn.mla_store_pages], ids=["reference", "kernel"])
def test_golden_record(store, device):
    """The bytes of one record of the published encoder, of tokens made by a formula in exact arithmetic."""
    assert kvarn.FORMAT_VERSION == 3
    layout, token, channel = MLALayout(4, 64), torch.arange(64)[:, None], torch.arange(512)[None, :]
    latents = ((token * 37 + channel * 101 + token * channel * 7) % 257 - 128) * (1 + token % 5) / 64
    rope = ((token * 53 + channel[:, :64] * 29) % 251 - 125) / 32
    pages = torch.empty(1, layout.page_bytes, dtype=torch.uint8, device=device)
    ids = torch.zeros(1, dtype=torch.int32, device=device)
    store(latents.float().to(device), rope.float().to(device), pages, ids, layout, encoder=PUBLISHED)
    record = pages[0].cpu().numpy().tobytes()
    for name, (offset, first) in GOLDEN_FIELDS.items():
        assert getattr(layout, f"{name}_offset") == offset
        assert record[offset : offset + 8].hex() == first, name
    assert hashlib.sha256(record).hexdigest() == GOLDEN_SHA256


@pytest.mark.parametrize(("bits", "most"), [(4, 0.1), (8, 0.0065)])
def test_errors_of_latents(bits, most):
    """Relative error of random latents of uneven channels, and of rotary channels: recorded bounds."""
    layout, (latents, rope) = MLALayout(bits, 128), tokens_of(256, torch.float32)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    reference.mla_store_pages(latents, rope, pages, torch.arange(2), layout)
    read = reference.mla_dequantize_pages(pages, torch.arange(2), layout, dtype=torch.float32)
    error = relative_error(read[0].flatten(0, 1), latents)
    assert most / 2 < error < most
    assert torch.equal(read[1].flatten(0, 1), rope.half().float())


@pytest.mark.parametrize("index", range(4), ids=[layout_id(layout) for layout in LAYOUTS])
def test_store_and_dequantize_pages(index, device):
    """Records and what is read back; both tensors of pages are compared whole, so that neighbours are known to be untouched."""
    layout, dtype = LAYOUTS[index], DTYPES[index % 3]
    latents, rope = (x.to(device) for x in tokens_of(layout.page_size + 3, dtype, seed=index))
    pages = torch.full((4, layout.page_bytes), 255, dtype=torch.uint8, device=device)
    expected = pages.clone()
    page_ids = torch.tensor([-1, 2], dtype=(torch.int32, torch.int64)[index % 2], device=device)
    starts = torch.tensor([0, 3], dtype=(torch.int64, torch.int32)[index // 2], device=device)
    kvarn.mla_store_pages(latents, rope, pages, page_ids, layout, token_starts=starts)
    reference.mla_store_pages(latents, rope, expected, page_ids, layout, token_starts=starts)
    assert_same_bits(pages, expected)
    for rotated, out_dtype in ((True, torch.float32), (False, DTYPES[(index + 1) % 3])):
        results = kvarn.mla_dequantize_pages(pages, page_ids, layout, dtype=out_dtype, rotated=rotated)
        wanted = reference.mla_dequantize_pages(pages, page_ids, layout, dtype=out_dtype, rotated=rotated)
        for result, tile in zip(results, wanted, strict=True):
            assert_rounded_alike(result, tile)
            assert (result[0] == 0).all()


def test_dequantize_into_tokens(device):
    """`out=` may be the two parts of tokens of 576 channels; what lies behind them is untouched."""
    layout, (latents, rope) = MLALayout(8, 64), tokens_of(64, torch.float16)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    ids = torch.zeros(1, dtype=torch.int32)
    reference.mla_store_pages(latents, rope, pages, ids, layout)
    memory = torch.full((1, 64, 592), -7.0, device=device)
    out = memory[..., :512], memory[..., 512:576]
    results = kvarn.mla_dequantize_pages(pages.to(device), ids.to(device), layout, out=out)
    assert results[0] is out[0] and results[1] is out[1]
    for result, expected in zip(results, reference.mla_dequantize_pages(pages, ids, layout, dtype=torch.float32), strict=True):
        assert_same_bits(result.cpu(), expected)
    assert (memory[..., 576:] == -7).all()


@pytest.mark.parametrize("encoder", [PUBLISHED, Encoder(1, fits=2, norm="length")], ids=["published", "length"])
def test_encoders(encoder, device):
    """Other encoders than the default give the bits of the reference, too."""
    layout, (latents, rope) = MLALayout(4, 64), tokens_of(64, torch.bfloat16)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8, device=device)
    expected, ids = pages.clone(), torch.zeros(1, dtype=torch.int32, device=device)
    kvarn.mla_store_pages(latents.to(device), rope.to(device), pages, ids, layout, encoder=encoder)
    reference.mla_store_pages(latents.to(device), rope.to(device), expected, ids, layout, encoder=encoder)
    assert_same_bits(pages, expected)


def run_ptx(asm: str, registers: dict[str, int]) -> dict[str, int]:
    """Return the registers of 32 bits after the instructions of `mla.latents`, which the interpreter does not run."""

    def halves(x: int) -> numpy.ndarray:
        return numpy.array([x], dtype=numpy.uint32).view(numpy.float16).astype(numpy.float64)

    def word(x: numpy.ndarray) -> int:
        return int(x.astype(numpy.float16).view(numpy.uint32)[0])

    for instruction in filter(None, (text.strip() for text in asm.strip("{} ").split(";"))):
        name, _, operands = instruction.partition(" ")
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[x] if x in registers else int(x, 0) for x in sources] if name != ".reg" else []
        if name == "mov.b32":
            registers[target] = values[0]
        elif name == "and.b32":
            registers[target] = values[0] & values[1]
        elif name == "shr.u32":
            registers[target] = values[0] >> values[1]
        elif name == "lop3.b32":
            assert values[3] == 0xEA  # a & b | c
            registers[target] = values[0] & values[1] | values[2]
        elif name == "add.rn.f16x2":
            registers[target] = word(halves(values[0]) + halves(values[1]))
        elif name == "prmt.b32":
            found = [x >> 8 * i & 255 for x in values[:2] for i in range(4)]
            registers[target] = sum(found[values[2] >> 4 * i & 7] << 8 * i for i in range(4))
        elif name == "sub.rn.f16x2":
            registers[target] = word(halves(values[0]) - halves(values[1]))
        elif name == "fma.rn.f16x2":
            registers[target] = word(halves(values[0]) * halves(values[1]) + halves(values[2]))
        else:
            assert name == ".reg", name
    return registers


@pytest.mark.parametrize(("bits", "field"), [(4, 0), (4, 1), (8, 0)])
def test_ptx_of_codes(bits, field):
    """Four bytes become code * scale + zero, rounded once, for every byte."""
    ptx = getattr(latents_ptx, "fn", latents_ptx)(field, bits)
    scale, zero = (draw(256, seed=seed).half().numpy() / (16, 1)[seed] for seed in (0, 1))
    scale, zero = scale.astype(numpy.float16), zero.astype(numpy.float16)
    for first in range(0, 256, 4):
        pairs = [x[first : first + 4].view(numpy.uint32).tolist() for x in (scale, zero)]
        given = dict(zip(("$3", "$4", "$5", "$6"), pairs[0] + pairs[1], strict=True))
        given["$2"] = int.from_bytes(range(first, first + 4), "little")
        after = run_ptx(ptx, given)
        found = numpy.array([after["$0"], after["$1"]], dtype=numpy.uint32).view(numpy.float16)
        codes = numpy.arange(first, first + 4) >> field * bits & 2**bits - 1
        exact = codes * scale[first : first + 4].astype(numpy.float64) + zero[first : first + 4]
        assert (found == exact.astype(numpy.float16)).all(), first


@pytest.mark.parametrize("middle", [False, True])
@pytest.mark.parametrize("byte", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_ptx_of_pairs(bits, byte, middle):
    """Two pairs of bytes become the codes of one byte of each, less the middle code, or code * scale + zero, rounded once."""
    ptx, fields = getattr(pairs_ptx, "fn", pairs_ptx)(bits, byte, middle), 8 // bits
    scale, zero = (draw(2 * fields, seed=seed).half().numpy() for seed in (0, 1))
    words = [x.view(numpy.uint32).tolist() for x in (scale, zero)]
    for first in range(256):
        pairs = (first, 255 - first, first * 7 % 256, first * 13 % 256)
        given = {f"${fields}": int.from_bytes(pairs, "little")}
        given |= {f"${fields + 1 + i}": word for i, word in enumerate(words[0] + words[1])} if not middle else {}
        after = run_ptx(ptx, given)
        for field in range(fields):
            found = numpy.array([after[f"${field}"]], dtype=numpy.uint32).view(numpy.float16)
            codes = numpy.array([pairs[byte], pairs[2 + byte]]) >> field * bits & 2**bits - 1
            own = slice(2 * field, 2 * field + 2)
            exact = codes - 2 ** (bits - 1) if middle else codes * scale[own].astype(numpy.float64) + zero[own]
            assert (found == exact.astype(numpy.float16)).all(), (first, field)


@pytest.mark.parametrize("byte", [0, 1])
@pytest.mark.parametrize(("bits", "field"), [(4, 0), (4, 1), (8, 0)])
def test_ptx_of_a_field(bits, field, byte):
    """The same of one field, whose PTX begins with another instruction than that of the other one."""
    ptx = getattr(field_ptx, "fn", field_ptx)(bits, field, byte)
    scale, zero = (draw(2, seed=seed).half().numpy() for seed in (0, 1))
    words = {name: x.view(numpy.uint32).item() for name, x in (("$2", scale), ("$3", zero))}
    for first in range(256):
        pairs = (first, 255 - first, first * 7 % 256, first * 13 % 256)
        after = run_ptx(ptx, {"$1": int.from_bytes(pairs, "little")} | words)
        found = numpy.array([after["$0"]], dtype=numpy.uint32).view(numpy.float16)
        codes = numpy.array([pairs[byte], pairs[2 + byte]]) >> field * bits & 2**bits - 1
        assert (found == (codes * scale.astype(numpy.float64) + zero).astype(numpy.float16)).all(), first
