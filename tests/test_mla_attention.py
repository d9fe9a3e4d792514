"""Latent attention against float64 and against an explicit matrix."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same_bits
from mla_helpers import CASES, LAYOUTS, call_of_magnitude, check_decode, layout_id, moved

import kvarn_triton as kvarn
from kvarn_triton import MLAConfig, MLALayout, gpu, reference
from kvarn_triton.mla.config import mla_config
from kvarn_triton.testing import relative_error
from kvarn_triton.testing.latents import latent_case


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
    pages = torch.full((len(call["pages"]), call["layout"].page_bytes + 128), 255, dtype=torch.uint8, device=device)
    pages[:, : call["layout"].page_bytes] = call["pages"]
    out = torch.empty_like(expected)
    raw_pages = torch.full((len(call["raw_pages"]), 65, 608), torch.nan, dtype=torch.float16, device=device)
    raw_pages[:, 1:, 16:592] = call["raw_pages"]
    views = {"q": q[:, 1:5, 8:584], "pages": pages[:, : call["layout"].page_bytes], "raw_pages": raw_pages[:, 1:, 16:592]}
    assert kvarn.mla_decode_attention(**call | views, out=out) is out
    assert_same_bits(out, expected)
    drafts = torch.stack((q, q), dim=1)[:, :, 1:5, 8:584]  # rows of sequences that no single stride describes
    several = kvarn.mla_decode_attention(**call | {"q": drafts})
    assert_same_bits(several, kvarn.mla_decode_attention(**call | {"q": drafts.contiguous()}))
    assert relative_error(several[:, 1], expected) < 2**-9


@pytest.mark.parametrize("magnitude", [2.0**-12, 2.0**10])
def test_magnitudes(magnitude, device):
    """Latents far from 1, in every other page: neither scores nor weights leave the range of float16."""
    check_decode(call_of_magnitude(magnitude), device)


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
