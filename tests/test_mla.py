"""Latent attention: pages of latents bit for bit, attention against float64, the tail, refusals of a layout, golden bytes."""

from __future__ import annotations

import hashlib
import math

import numpy
import pytest
import torch
from helpers import DTYPES, LSE_ERROR, ON_GPU, assert_rounded_alike, assert_same_bits, draw, uneven

import kvarn_triton as kvarn
from kvarn_triton import PUBLISHED, Encoder, MLAConfig, MLALayout, PageLayout, gpu, reference
from kvarn_triton.mla.config import mla_config
from kvarn_triton.mla.latents import field_ptx, latents_ptx, pairs_ptx
from kvarn_triton.mla_layout import MLA_BITS
from kvarn_triton.testing import relative_error
from kvarn_triton.testing.latents import latent_attention_in, latent_case

LAYOUTS = [MLALayout(bits, page_size) for bits in MLA_BITS for page_size in (64, 128)]


def layout_id(value: object) -> str | None:
    """Return the test id of a layout."""
    return f"{value.bits}-g{value.page_size}" if isinstance(value, MLALayout) else None


def moved(call: dict, device: torch.device) -> dict:
    """Return a call with its tensors on a device."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def tokens_of(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and rotary channels as views of tokens of 576 channels, whose strides are odd for one dtype or other."""
    tokens = torch.cat((uneven(count, 512, seed=seed), 3 * draw(count, 72, seed=seed + 1)), dim=1).to(dtype)
    return tokens[:, :512], tokens[:, 512:576]


# The format.


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


# Pages.


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


# Attention.


def sylvester(size: int) -> torch.Tensor:
    """Return the orthonormal Hadamard matrix in float64, by its recursion."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix * size**-0.5


def test_reference_is_attention():
    """The reference is softmax attention to latents that are read number by number and rotated by an explicit matrix."""
    layout = MLALayout(4, 64)
    call = latent_case(layout, [70, 150], num_heads=3, num_queries=2, sink_len=64, num_tail_slots=1)
    q = call["q"].double()
    out, lse = reference.mla_decode_attention(**call | {"q": q}, return_lse=True)
    matrix = sylvester(512)
    for b, length in enumerate((70, 150)):
        rows = []
        for p in range(length):
            j = (p - 64) // 64
            if p < 64 or j >= int(call["num_quantized"][b]):
                column = 0 if p < 64 else 1
                row = call["raw_pages"][call["raw_table"][b, column], p % 64].double()
                rows.append(torch.cat((row[:512] @ matrix, row[512:])))
                continue
            fields = layout.fields(call["pages"][call["block_table"][b, j]])
            codes = fields["codes"].view(64, 256)[p % 64].long()
            codes = torch.cat((codes & 15, codes >> 4)).double()
            numbers = codes * fields["scale"].double() + fields["zero"].double()
            numbers = numbers * fields["norm"][p % 64].double() * fields["gain"].double()
            rows.append(torch.cat((numbers @ matrix, fields["rope"][p % 64].double())))
        tokens = torch.stack(rows)
        for i in range(2):
            seen = tokens[: length - 1 + i]
            scores = call["sm_scale"] * q[b, i] @ seen.T
            torch.testing.assert_close(out[b, i], torch.softmax(scores, dim=-1) @ seen[:, :512], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(lse[b, i].double(), torch.logsumexp(scores, dim=-1), rtol=1e-6, atol=1e-6)


def check_decode(call: dict, device: torch.device, **options) -> torch.Tensor:
    """Compare a call with float64, the log-sum-exp included: twice the error of plain 16-bit attention is allowed."""
    out, lse = kvarn.mla_decode_attention(**moved(call, device), return_lse=True, **options)
    out, lse = out.cpu(), lse.cpu()
    exact, exact_lse = reference.mla_decode_attention(**call | {"q": call["q"].double()}, return_lse=True)
    assert out.dtype == call["q"].dtype and out.shape == exact.shape and not out.isnan().any()
    attended = exact_lse > -torch.inf
    assert torch.equal(attended, lse > -torch.inf) and (out[~attended] == 0).all()
    if attended.any():
        allowed = 2 * relative_error(latent_attention_in(call["q"].dtype, call), exact)
        assert relative_error(out, exact) <= allowed
    assert ((lse - exact_lse).abs()[attended] <= LSE_ERROR[call["q"].dtype]).all()
    return out


CASES = {
    "pages": {},
    "one head": {"num_heads": 1},
    "20 heads": {"num_heads": 20},
    "sink and tail": {"sink_len": 128, "num_tail_slots": 2},
    "tail that keeps a page": {"num_tail_slots": 3, "keep": 1},
    "drafts": {"num_queries": 3, "num_heads": 5},
    "drafts with a tail": {"num_queries": 70, "num_heads": 1, "sink_len": 128, "num_tail_slots": 1},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=layout_id)
def test_decode(name, layout, device):
    """Lengths that end within a block, at a page, before the first query token, and 0, in every form of cache."""
    call = latent_case(layout, [300, 0, 128, 33, 1], **CASES[name])
    check_decode(call | {"q": call["q"].bfloat16()} if name == "20 heads" else call, device)


@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
def test_decode_heads(num_heads, device):
    """As many heads as models have, with the launch parameters of each."""
    check_decode(latent_case(LAYOUTS[0], [70, 200], num_heads=num_heads, sink_len=64, num_tail_slots=1), device)


@pytest.mark.parametrize("config", [MLAConfig(16, 16, 4), MLAConfig(32, 64, 4), MLAConfig(64, 32, 8)])
def test_decode_configs(config, device):
    """Other tiles than the default; on a GPU all of them have to fit."""
    check_decode(latent_case(LAYOUTS[2], [130, 77], num_heads=33, sink_len=64, num_tail_slots=1), device, config=config)


@pytest.mark.parametrize(("rows", "heads"), [(16, 40), (16, 8), (64, 40), (64, 8)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_warp_groups(layout, rows, heads, device):
    """The kernel of warp groups is a configuration where there are such groups, the default there, and refused elsewhere."""
    config = MLAConfig(rows, 64, 4, warp_groups=True)
    call = latent_case(layout, [700, 64, 129], num_heads=heads, sink_len=128, num_tail_slots=1, num_queries=2)
    known = gpu.gpu_of(device)
    if known is not None and known.warp_groups:
        out = check_decode(call, device, config=config)
        assert_same_bits(check_decode(call, device, config=config), out)
        if mla_config(layout, 2 * heads, device) == config:
            assert_same_bits(kvarn.mla_decode_attention(**moved(call, device)).cpu(), out)
        check_decode(call | {"sm_scale": -call["sm_scale"]}, device, config=config)
        check_decode(latent_case(layout, [1000, 3], num_heads=heads), device, config=config)
        call["indices"] = torch.zeros(3, 2, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"config.warp_groups: expected False but for sm90, without indices, got True"):
        kvarn.mla_decode_attention(**moved(call, device), config=config)


@pytest.mark.parametrize(("bits", "rows", "block_m"), [(4, 16, 16), (4, 17, 64), (4, 256, 64), (8, 1, 16), (8, 128, 64)])
def test_default_of_warp_groups(bits, rows, block_m, monkeypatch):
    """Columns are the default of few rows, where a GPU has warp groups; lists have another kernel."""
    monkeypatch.setattr(gpu, "arch_of", lambda device: "sm90")
    layout, device = MLALayout(bits), torch.device("cpu")
    assert mla_config(layout, rows, device) == MLAConfig(block_m, 64, 4, warp_groups=True)
    assert not mla_config(layout, rows, device, sparse=True).warp_groups
    monkeypatch.setattr(gpu, "arch_of", lambda device: "sm100")
    assert not mla_config(layout, rows, device).warp_groups


def test_num_splits(device):
    """Any number of splits gives the same result up to rounding, and a row the same bits whatever else is in the batch."""
    call = moved(latent_case(LAYOUTS[0], [200, 64, 3], sink_len=64, num_tail_slots=1), device)
    results = {n: kvarn.mla_decode_attention(**call, num_splits=n) for n in (1, 2, 3, 40)}
    for result in results.values():
        assert relative_error(result, results[1]) < 2**-9
    names = ("q", "block_table", "seq_lens", "raw_table", "num_quantized")
    for row in range(3):
        alone = call | {name: call[name][row : row + 1] for name in names}
        assert_same_bits(kvarn.mla_decode_attention(**alone, num_splits=3)[0], results[3][row])


def test_decode_views(device):
    """Queries, pages and raw pages may be views of something larger; `out` is written and returned."""
    call = moved(latent_case(LAYOUTS[0], [100, 64], num_heads=4, num_tail_slots=1), device)
    expected = kvarn.mla_decode_attention(**call)
    q = torch.full((2, 6, 640), torch.nan, dtype=torch.float16, device=device)
    q[:, 1:5, 8:584] = call["q"]
    pages = torch.full((len(call["pages"]), layout_bytes(call) + 128), 255, dtype=torch.uint8, device=device)
    pages[:, : layout_bytes(call)] = call["pages"]
    out = torch.empty_like(expected)
    raw_pages = torch.full((len(call["raw_pages"]), 65, 608), torch.nan, dtype=torch.float16, device=device)
    raw_pages[:, 1:, 16:592] = call["raw_pages"]
    views = {"q": q[:, 1:5, 8:584], "pages": pages[:, : layout_bytes(call)], "raw_pages": raw_pages[:, 1:, 16:592]}
    assert kvarn.mla_decode_attention(**call | views, out=out) is out
    assert_same_bits(out, expected)
    drafts = torch.stack((q, q), dim=1)[:, :, 1:5, 8:584]  # rows of sequences that no single stride describes
    several = kvarn.mla_decode_attention(**call | {"q": drafts})
    assert_same_bits(several, kvarn.mla_decode_attention(**call | {"q": drafts.contiguous()}))
    assert relative_error(several[:, 1], expected) < 2**-9


def layout_bytes(call: dict) -> int:
    """Return the bytes of a page of a call."""
    return call["layout"].page_bytes


@pytest.mark.parametrize("magnitude", [2.0**-12, 2.0**10])
def test_magnitudes(magnitude, device):
    """Latents far from 1, in every other page: neither scores nor weights leave the range of float16."""
    layout, (latents, rope) = MLALayout(4, 64), tokens_of(192, torch.float32)
    latents = latents.clone()
    latents[64:128] *= magnitude
    pages, ids = torch.zeros(3, layout.page_bytes, dtype=torch.uint8), torch.arange(3, dtype=torch.int32)
    reference.mla_store_pages(latents, rope / 8, pages, ids, layout)
    q = draw(1, 16, 576).half() / max(magnitude, 1)
    call = {"q": q, "pages": pages, "block_table": ids[None], "seq_lens": torch.tensor([180], dtype=torch.int32)}
    check_decode(call | {"layout": layout, "sm_scale": 0.02}, device)


def test_zero_and_bad_tokens(device):
    """Pages of zeros count in the sum of weights, those of zero bytes too; a page with a NaN gives NaN to those who see it."""
    layout = MLALayout(4, 64)
    latents, rope = torch.zeros(192, 512), torch.zeros(192, 64)
    latents[64:128] = 1.0
    latents[130, 5] = torch.nan
    pages, ids = torch.zeros(4, layout.page_bytes, dtype=torch.uint8), torch.arange(3, dtype=torch.int32)
    reference.mla_store_pages(latents, rope, pages, ids, layout)
    table = torch.tensor([[0, 1, 2], [0, 1, 2], [3, 1, 2]], dtype=torch.int32)
    call = {"q": torch.zeros(3, 2, 576).half(), "pages": pages, "block_table": table, "sm_scale": 1.0}
    lens = torch.tensor([128, 129, 128], dtype=torch.int32)
    out, lse = kvarn.mla_decode_attention(
        **moved(call | {"seq_lens": lens}, device), layout=layout, return_lse=True, num_splits=1
    )
    for row in (0, 2):
        torch.testing.assert_close(out[row].cpu().float(), torch.full((2, 512), 0.5), atol=2e-3, rtol=0)
        torch.testing.assert_close(lse[row].cpu(), torch.full((2,), math.log(128.0)))
    assert out[1].isnan().all()


# Lists of tokens.


def lists_of(call: dict, topk: int, seed: int = 0) -> torch.Tensor:
    """Return a list for each query token: tokens that it sees in any order, in some places none, and ones out of sight."""
    generator = torch.Generator().manual_seed(seed)
    q, lens = call["q"], call["seq_lens"].tolist()
    lists = torch.full((*q.shape[:-2], topk), -1, dtype=torch.int32)
    num_queries = q.shape[1] if q.dim() == 4 else 1
    for b, row in enumerate(lists.view(len(q), num_queries, topk)):
        for i, entries in enumerate(row):
            seen = lens[b] - num_queries + i + 1
            entries[:] = torch.randperm(max(seen, 0) + topk, generator=generator)[:topk].int()  # the end is out of sight
            entries[torch.rand(topk, generator=generator) < 0.2] = -1
            if seen > 4 and topk > 8:
                entries[:5] = torch.tensor([seen - 1, seen - 1, 0, seen, 2**31 - 1])  # twice; behind the query token
    return lists


LISTED = CASES | {"drafts with a tail": {"num_queries": 6, "num_heads": 1, "sink_len": 128, "num_tail_slots": 1}}


@pytest.mark.parametrize("name", LISTED)
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=layout_id)
def test_lists(name, layout, device):
    """Each query token attends to the tokens of its list, in pages, sink and tail, as often as they are there."""
    call = latent_case(layout, [300, 0, 128, 33, 1], **LISTED[name])
    if name == "20 heads":
        call["q"] = call["q"].bfloat16()
    check_decode(call | {"indices": lists_of(call, 75)}, device)


@pytest.mark.parametrize("num_heads", [16, 32, 64, 128])
def test_lists_heads(num_heads, device):
    """As many heads as models have, with the launch parameters of each."""
    call = latent_case(LAYOUTS[0], [70, 200], num_heads=num_heads, sink_len=64, num_tail_slots=1)
    check_decode(call | {"indices": lists_of(call, 64)}, device)


@pytest.mark.parametrize("config", [MLAConfig(16, 16, 4, 1), MLAConfig(32, 64, 4, 1), MLAConfig(64, 32, 8)])
def test_lists_configs(config, device):
    """Other tiles than the default; on a GPU all of them have to fit."""
    call = latent_case(LAYOUTS[2], [130, 77], num_heads=33, sink_len=64, num_tail_slots=1)
    check_decode(call | {"indices": lists_of(call, 100)}, device, config=config)


def test_list_of_all_tokens(device):
    """A list of all tokens, in any order and longer than what is looked up at once, is attention to all of them."""
    call = moved(latent_case(LAYOUTS[0], [300, 64, 0], sink_len=64, num_tail_slots=2, num_queries=2), device)
    order = torch.randperm(2100, generator=torch.Generator().manual_seed(1)).int().to(device)
    everything, lse = kvarn.mla_decode_attention(**call, return_lse=True)
    for indices in (order, order.sort().values):
        out, list_lse = kvarn.mla_decode_attention(**call, indices=indices.expand(3, 2, 2100), return_lse=True)
        assert relative_error(out, everything) < 2**-9
        torch.testing.assert_close(list_lse, lse, rtol=0, atol=1e-4)


def test_what_is_not_listed_is_not_read(device):
    """Pages without a listed token, and raw tokens that are not listed, may hold anything; so may the table of such pages."""
    call = latent_case(LAYOUTS[0], [400], sink_len=64, num_tail_slots=1)
    listed = torch.tensor([[3, 70, 100, 64, 390, 399, -1, 127]], dtype=torch.int32)
    expected = kvarn.mla_decode_attention(**moved(call, device), indices=listed.to(device))
    pages, raw_pages, table = (call[name].clone() for name in ("pages", "raw_pages", "block_table"))
    kept = torch.zeros(raw_pages.shape[:2], dtype=torch.bool)
    for position in (3, 390, 399):
        kept[call["raw_table"][0, 0 if position < 64 else 1], position % 64] = True
    raw_pages[~kept] = torch.nan
    pages[torch.arange(len(pages)) != table[0, 0]] = 255
    table[0, 1:] = -5
    spoiled = call | {"pages": pages, "raw_pages": raw_pages, "block_table": table}
    assert_same_bits(kvarn.mla_decode_attention(**moved(spoiled, device), indices=listed.to(device)), expected)


def test_splits_of_lists(device):
    """Any number of splits gives the same result up to rounding, and a row the same bits whatever else is in the batch."""
    call = latent_case(LAYOUTS[0], [200, 64, 3], sink_len=64, num_tail_slots=1, num_queries=2)
    call = moved(call | {"indices": lists_of(call, 150)}, device)
    results = {n: kvarn.mla_decode_attention(**call, num_splits=n) for n in (1, 2, 3, 40)}
    for result in results.values():
        assert relative_error(result, results[1]) < 2**-9
    names = ("q", "block_table", "seq_lens", "raw_table", "num_quantized", "indices")
    for row in range(3):
        alone = call | {name: call[name][row : row + 1] for name in names}
        assert_same_bits(kvarn.mla_decode_attention(**alone, num_splits=3)[0], results[3][row])


def test_query_tokens_as_sequences(device):
    """Query tokens that are sequences of their own, with the tables of their sequence, get what they do together."""
    call = latent_case(LAYOUTS[0], [150, 70], num_heads=3, sink_len=64, num_tail_slots=1, num_queries=3)
    call = moved(call | {"indices": lists_of(call, 40)}, device)
    apart = call | {name: call[name].flatten(0, 1) for name in ("q", "indices")}
    apart |= {name: call[name].repeat_interleave(3, 0) for name in ("block_table", "raw_table", "num_quantized")}
    apart["seq_lens"] = (call["seq_lens"][:, None] + torch.arange(-2, 1, device=device)).flatten().int()
    results = [kvarn.mla_decode_attention(**x, num_splits=2).flatten() for x in (call, apart)]
    assert_same_bits(*results)


def test_views_of_lists(device):
    """Lists may be views of something larger, and empty."""
    call = latent_case(LAYOUTS[0], [100, 64], num_heads=4, num_tail_slots=1, num_queries=2)
    lists = lists_of(call, 40)
    memory = torch.full((2, 3, 50), 1, dtype=torch.int32)
    memory[:, 1:, 3:43] = lists
    call, memory = moved(call, device), memory.to(device)
    expected = kvarn.mla_decode_attention(**call, indices=lists.to(device))
    assert_same_bits(kvarn.mla_decode_attention(**call, indices=memory[:, 1:, 3:43]), expected)
    pages = torch.full((len(call["pages"]), layout_bytes(call) + 128), 255, dtype=torch.uint8, device=device)
    pages[:, : layout_bytes(call)] = call["pages"]
    raw_pages = torch.full((len(call["raw_pages"]), 65, 608), torch.nan, dtype=torch.float16, device=device)
    raw_pages[:, 1:, 16:592] = call["raw_pages"]
    views = {"pages": pages[:, : layout_bytes(call)], "raw_pages": raw_pages[:, 1:, 16:592]}
    assert_same_bits(kvarn.mla_decode_attention(**call | views, indices=lists.to(device)), expected)
    out, lse = kvarn.mla_decode_attention(**call, indices=memory[:, 1:, :0], return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("magnitude", [2.0**-12, 2.0**10])
def test_magnitudes_of_lists(magnitude, device):
    """A block of tokens from pages of very different gains."""
    layout, (latents, rope) = MLALayout(4, 64), tokens_of(192, torch.float32)
    latents = latents.clone()
    latents[64:128] *= magnitude
    pages, ids = torch.zeros(3, layout.page_bytes, dtype=torch.uint8), torch.arange(3, dtype=torch.int32)
    reference.mla_store_pages(latents, rope / 8, pages, ids, layout)
    q = draw(1, 16, 576).half() / max(magnitude, 1)
    call = {"q": q, "pages": pages, "block_table": ids[None], "seq_lens": torch.tensor([180], dtype=torch.int32)}
    call["indices"] = torch.randperm(180, generator=torch.Generator().manual_seed(2))[None, :170].int()
    check_decode(call | {"layout": layout, "sm_scale": 0.02}, device)


# The tail.


def test_append_tokens(device):
    """Tokens land in their slots, rotated, with the bits of the reference; others are untouched."""
    latents, rope = (x.to(device) for x in tokens_of(5, torch.bfloat16))
    memory = torch.full((3, 66, 576), -7.0, dtype=torch.float16, device=device)
    raw_pages, expected = memory[:, :64], memory[:, :64].clone()
    slots = torch.tensor([3, -1, 64, 191, 0], device=device)
    kvarn.mla_append_tokens(latents, rope, raw_pages, slots)
    reference.mla_append_tokens(latents, rope, expected, slots)
    assert_same_bits(raw_pages, expected)
    assert int((memory != -7).any(dim=-1).sum()) == 4


@pytest.mark.parametrize("advance", [True, False])
def test_commit_pages(advance, device):
    """Pages that are due are quantized, once and in order; sequences that are not due, or without an id, are left alone."""
    layout = MLALayout(4, 64)
    raw_pages = torch.full((9, 64, 576), torch.nan, dtype=torch.float16)
    latents, rope = tokens_of(128, torch.float32)
    reference.mla_append_tokens(latents, rope, raw_pages, torch.arange(64, 192))
    call = {
        "raw_pages": raw_pages,
        "pages": torch.full((4, layout.page_bytes), 255, dtype=torch.uint8),
        "raw_table": torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]], dtype=torch.int32),
        "block_table": torch.tensor([[2], [3], [-1], [0]], dtype=torch.int32),
        "committed_lens": torch.tensor([128, 127, 500, 500], dtype=torch.int32),
        "num_quantized": torch.tensor([0, 0, 0, 1], dtype=torch.int32),
    }
    given, wanted = moved(call, device), {name: x.clone() for name, x in call.items()}
    kvarn.mla_commit_pages(**given, layout=layout, sink_len=64, advance=advance)
    reference.mla_commit_pages(**wanted, layout=layout, sink_len=64, advance=advance)
    assert_same_bits(given["pages"].cpu(), wanted["pages"])
    assert torch.equal(given["num_quantized"].cpu(), wanted["num_quantized"])
    assert wanted["num_quantized"].tolist() == ([1, 0, 0, 1] if advance else [0, 0, 0, 1])
    assert (wanted["pages"][2] != 255).any() and (wanted["pages"][[0, 1, 3]] == 255).all()


def test_a_server(device, without_kernels):
    """Token by token: append, commit, attend; what is attended to is what was appended, quantized page by page."""
    layout, steps = MLALayout(8, 64), 140
    latents, rope = (x.to(device) for x in tokens_of(steps, torch.float32))
    ints = {"dtype": torch.int32, "device": device}
    pages = torch.full((2, layout.page_bytes), 255, dtype=torch.uint8, device=device)
    raw_pages = torch.full((3, 64, 576), torch.nan, dtype=torch.float16, device=device)
    raw_table, block_table = torch.tensor([[2]], **ints), torch.tensor([[1, 0]], **ints)
    num_quantized = torch.zeros(1, **ints)
    for length in range(1, steps + 1):
        new = slice(length - 1, length)
        slots = kvarn.raw_slots(torch.tensor([[length - 1]], **ints), raw_table, sink_len=0, page_size=64)
        kvarn.mla_append_tokens(latents[new], rope[new], raw_pages, slots[0])
        lens = torch.tensor([length], **ints)
        kvarn.mla_commit_pages(raw_pages, pages, raw_table, block_table, lens, num_quantized, layout)
        assert int(num_quantized) == length // 64
        if length in (1, 63, 64, 65, 128, 140):
            q = draw(1, 4, 576, seed=length).half().to(device)
            tables = {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": num_quantized}
            out = kvarn.mla_decode_attention(q, pages, block_table, lens, layout, sm_scale=0.05, **tables)
            tokens = torch.cat((latents[:length], rope[:length]), dim=1)
            weights = torch.softmax(0.05 * q[0].float() @ tokens.T, dim=-1)
            assert relative_error(out[0], weights @ tokens[:, :512]) < 0.02


CHUNKS = (
    ((150, 63, 0), (150, 63, 0)),
    ((200, 67, 1), (50, 4, 1)),
    ((201, 65, 2), (1, 1, 1)),  # three drafts are taken back
    ((256, 130, 3), (55, 65, 1)),
)
"""Lengths of three sequences after a step, and how many tokens of each are new."""
STEPS = {
    "decodes": {},
    "sink": {"sink_len": 64},
    "drafts": {"max_drafts": 3},
    "one slot": {"num_tail_slots": 1},
}
"""Options of the plan; with one slot new tokens go where a page that completes has its older ones."""


@pytest.mark.parametrize("name", STEPS)
def test_steps(name, device):
    """Prompts in chunks, decodes, drafts that are taken back: pools and plans as the reference has them, attention to them."""
    layout, options = LAYOUTS[0], STEPS[name].copy()
    latents, rope = tokens_of(400, torch.bfloat16)
    columns = options.get("sink_len", 0) // 64 + options.pop("num_tail_slots", 4)
    raw_table = torch.arange(3 * columns, dtype=torch.int32).flip(0).view(3, columns)
    block_table = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int().view(3, 4)
    sides = []
    for where, api in ((device, kvarn), (torch.device("cpu"), reference)):
        pages = torch.full((12, layout.page_bytes), 255, dtype=torch.uint8, device=where)
        raw_pages = torch.full((3 * columns, 64, 576), -7.0, dtype=torch.float16, device=where)
        for lens, new in CHUNKS:
            ends = torch.tensor([0, *new]).cumsum(0).int()
            tables = torch.tensor(lens, dtype=torch.int32), ends, block_table, raw_table
            step = api.plan_step(layout.keys, *(x.to(where) for x in tables), num_tokens=sum(new), **options)
            spans = zip(range(3), lens, new, strict=True)
            rows = torch.cat([torch.arange(length - n, length) + 20 * b for b, length, n in spans])
            given = (x[rows].to(where) for x in (latents, rope))
            api.mla_write_tokens(*given, pages, raw_pages, step, layout)
        sides.append((pages, raw_pages, step))
    found, expected = sides
    for result, wanted in zip(found[:2], expected[:2], strict=True):
        assert_same_bits(result.cpu(), wanted)
    q = draw(3, 2, 5, 576, seed=1).half()
    lists = torch.randint(-20, 256, (3, 2, 90), generator=torch.Generator().manual_seed(2)).int()
    for indices in (None, lists):
        given = None if indices is None else indices.to(device)
        out = kvarn.mla_attend(q.to(device), *found, layout, sm_scale=0.05, indices=given)
        exact = reference.mla_attend(q.double(), *expected, layout, sm_scale=0.05, indices=indices)
        assert relative_error(out.cpu(), exact) < 2**-9
    tokens = torch.cat((latents, rope), dim=1)[:256].double()
    weights = torch.softmax(0.05 * q[0, 1].double() @ tokens.T, dim=-1)
    dense = reference.mla_attend(q.double(), *expected, layout, sm_scale=0.05)
    assert relative_error(dense[0, 1], weights @ tokens[:, :512]) < 0.2


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA graphs")
def test_replayed_graph(device):
    """A captured step appends, completes a page and attends as eager steps do, without a wait for the GPU."""
    call = moved(latent_case(LAYOUTS[0], [120, 60], num_heads=16, num_tail_slots=1), device)
    latents, rope = (x.to(device) for x in tokens_of(2 * 12, torch.float16))
    fed = {"latents": latents.reshape(12, 2, 512), "rope": rope.reshape(12, 2, 64)}
    graphed, eager = ({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()} for _ in range(2))
    new = {name: x[0].clone() for name, x in fed.items()}

    def step(x: dict) -> torch.Tensor:
        x["seq_lens"] += 1
        slots = kvarn.raw_slots(x["seq_lens"][:, None] - 1, x["raw_table"], sink_len=0, page_size=64).flatten()
        kvarn.mla_append_tokens(new["latents"], new["rope"], x["raw_pages"], slots)
        tables = (x[name] for name in ("raw_table", "block_table", "seq_lens", "num_quantized"))
        kvarn.mla_commit_pages(x["raw_pages"], x["pages"], *tables, x["layout"])
        return kvarn.mla_decode_attention(**x)

    spare = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    step(spare)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(graphed)
    for i in range(12):
        for name, x in fed.items():
            new[name].copy_(x[i])
        graph.replay()
        assert_same_bits(out, step(eager))
    assert graphed["num_quantized"].tolist() == [2, 1]


@pytest.mark.skipif(not ON_GPU, reason="needs 3 GB of pages")
def test_byte_offsets_above_2_to_31(device):
    """Pages whose bytes start beyond 2**31 are written and read where they are."""
    layout = MLALayout(4, 64)
    count = 2**31 // layout.page_bytes + 1000
    latents, rope = (x.to(device) for x in tokens_of(64, torch.float16))
    pages = torch.zeros(count, layout.page_bytes, dtype=torch.uint8, device=device)
    ids = torch.tensor([count - 1], dtype=torch.int32, device=device)
    kvarn.mla_store_pages(latents, rope, pages, ids, layout)
    small = pages[-1:].clone()
    call = {"q": draw(1, 16, 576).half().to(device), "seq_lens": torch.tensor([64], dtype=torch.int32, device=device)}
    far = kvarn.mla_decode_attention(pages=pages, block_table=ids[None], layout=layout, sm_scale=0.1, **call)
    near = kvarn.mla_decode_attention(pages=small, block_table=ids[None] * 0, layout=layout, sm_scale=0.1, **call)
    assert_same_bits(far, near)
    for x, y in zip(
        kvarn.mla_dequantize_pages(pages, ids, layout), kvarn.mla_dequantize_pages(small, ids * 0, layout), strict=True
    ):
        assert_same_bits(x, y)


# Operators.


def test_operators(device):
    """A step in one compiled graph gives what the functions do, and the operators are as PyTorch wants them."""
    from kvarn_triton.mla import operators

    layout, config = LAYOUTS[0], MLAConfig(16, 16, 4, maxnreg=248)
    call = moved(latent_case(layout, [127, 100], num_heads=2, sink_len=64, num_tail_slots=1), device)
    call["seq_lens"] = call["seq_lens"] + 1
    latents, rope = (x.to(device) for x in tokens_of(2, torch.float16))
    prompt, prompt_rope = (x.to(device) for x in tokens_of(67, torch.float16, seed=5))
    slots = kvarn.raw_slots(call["seq_lens"][:, None] - 1, call["raw_table"], sink_len=64, page_size=64).flatten()
    ids, starts = (torch.tensor([i], dtype=torch.int32, device=device) for i in (int(call["block_table"][1, 0]), 3))
    plan = kvarn.plan_step(layout.keys, call["seq_lens"], None, call["block_table"], call["raw_table"], sink_len=64)
    lists = lists_of(moved(call, torch.device("cpu")), 20).to(device)

    def step(api, x: dict) -> tuple[torch.Tensor, ...]:
        api.mla_append_tokens(latents, rope, x["raw_pages"], slots)
        api.mla_store_pages(prompt, prompt_rope, x["pages"], ids, layout, token_starts=starts)
        tables = (x[name] for name in ("raw_table", "block_table", "seq_lens", "num_quantized"))
        api.mla_commit_pages(x["raw_pages"], x["pages"], *tables, layout, sink_len=64)
        api.mla_write_tokens(latents, rope, x["pages"], x["raw_pages"], plan, layout)
        pools = x["q"], x["pages"], x["raw_pages"]
        attended = api.mla_attend(*pools, plan, layout, sm_scale=0.1, indices=lists, return_lse=True, num_splits=1)
        read = api.mla_dequantize_pages(x["pages"], ids, layout, dtype=torch.bfloat16, rotated=True)
        listed = api.mla_decode_attention(**x, indices=lists, return_lse=True)
        return *api.mla_decode_attention(**x, return_lse=True, num_splits=2, config=config), *listed, *read, *attended

    plain, traced = ({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()} for _ in range(2))
    expected = step(kvarn, plain)
    results = torch.compile(lambda x: step(operators, x), backend="aot_eager", fullgraph=True)(traced)
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)
    for name in ("raw_pages", "pages", "num_quantized"):
        assert_same_bits(traced[name], plain[name])
    assert plain["num_quantized"].tolist() == [1, 0]
    tensors = [traced[name] for name in ("q", "pages", "block_table", "seq_lens")]
    raw = [traced[name] for name in ("raw_pages", "raw_table", "num_quantized")]
    torch.library.opcheck(torch.ops.kvarn_triton.mla_decode_attention, (*tensors, 4, 64, 0.1, *raw, 64, 2, None, lists))
