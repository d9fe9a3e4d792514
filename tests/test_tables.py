"""Tables of launch parameters: what is found for whom, files of them, and errors."""

from __future__ import annotations

import json

import pytest
import torch
import triton

from kvarn_triton import (
    DecodeConfig,
    DecodeTable,
    PageLayout,
    configs,
    decode_attention,
    gpu,
    load_table,
    reference,
    save_table,
)
from kvarn_triton.layout import split_bits
from kvarn_triton.tables import Entry, builtin_table
from kvarn_triton.testing import cache_case, relative_error
from kvarn_triton.testing.compiler import TARGETS


def table(arch: str = "sm90") -> DecodeTable:
    """Return a table whose entries can be told apart by their warps."""
    entries = tuple(Entry(head_dim, DecodeConfig(num_warps=warps), "test") for head_dim, warps in ((64, 1), (256, 2)))
    return DecodeTable(arch, entries)


@pytest.mark.parametrize(("head_dim", "warps"), [(64, 1), (80, 2), (256, 2), (512, 2)])
def test_find(head_dim, warps):
    """The nearest head_dim that isn't smaller, else the largest."""
    assert table().find(head_dim).num_warps == warps


@pytest.mark.parametrize("name", ["k4v2", "k8v8", "k3v2", "k4v5", "k5v5", "k2v6", "k6v5"])
@pytest.mark.parametrize(("head_dim", "nearest"), [(64, 64), (96, 128), (128, 128), (192, 256)])
def test_find_for_split_codes(name, head_dim, nearest):
    """Codes with high bits elsewhere have entries of their own, by the larger such width, at the head_dim that is found."""
    sizes = [(64, 0), (128, 0), (128, 6), (128, 5), (256, 0)]
    known = DecodeTable("sm90", tuple(Entry(d, DecodeConfig(num_warps=i), "test", bits) for i, (d, bits) in enumerate(sizes)))
    bits = {"k3v2": 5, "k4v5": 5, "k5v5": 5, "k2v6": 6, "k6v5": 6}.get(name, 0) if nearest == 128 else 0
    layout = PageLayout.from_name(f"{name}_g128", head_dim=head_dim)
    assert known.find(head_dim, split_bits(layout)).num_warps == sizes.index((nearest, bits))
    config = configs.decode_config(layout, torch.float16, torch.device("cpu"), known)
    assert config.num_warps == sizes.index((nearest, bits))


def test_find_in_an_empty_table():
    """A table without entries gives the defaults."""
    assert DecodeTable("sm90", ()).find(128) == DecodeConfig()
    split = DecodeTable("sm90", (Entry(128, DecodeConfig(num_warps=4), "test", 6),))
    assert split.find(128) == split.find(128, 5) == DecodeConfig()


def test_file_round_trip(tmp_path):
    """A file holds tables of several architectures; writing one leaves the others."""
    path = tmp_path / "tables.json"
    save_table(path, table("sm90"))
    save_table(path, table("sm80"))
    split = DecodeTable("sm90", (table().entries[0], Entry(64, DecodeConfig(num_warps=4), "test", 5)))
    save_table(path, split)
    assert load_table(path, "sm80") == table("sm80")
    assert load_table(path, "sm90") == split
    with pytest.raises(ValueError, match="arch: expected one of sm80, sm90, got None"):
        load_table(path)
    with pytest.raises(ValueError, match="arch: expected one of sm80, sm90, got 'sm75'"):
        load_table(path, "sm75")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "path: expected JSON"),
        ("{}", "path: expected a table of launch parameters"),
        ('{"version": 99, "tables": {}}', "path: expected a table of launch parameters, version 2"),
        ('{"version": 2, "tables": {"sm90": [{"head_dim": 64}]}}', "path: expected entries of DecodeConfig"),
        (
            '{"version": 2, "tables": {"sm90": [{"head_dim": 64, "source": "", "config": {"warps": 1}}]}}',
            "path: expected entries of DecodeConfig",
        ),
    ],
)
def test_bad_files(text, message, tmp_path):
    """A file that is no table is refused with what was expected."""
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_table(path)


@pytest.mark.parametrize("arch", TARGETS)
def test_builtin_tables(arch):
    """Every architecture that the tests compile for has entries with a source for every size."""
    entries = builtin_table(arch).entries
    assert {entry.head_dim for entry in entries} >= {64, 128, 256, 512}
    assert all(entry.source.startswith(("measured: ", "derived")) for entry in entries)
    assert builtin_table(arch).arch == arch


@pytest.mark.parametrize(("arch", "known"), [("sm103", "sm100"), ("sm75", "sm80"), ("sm121", "sm120"), ("gfx90a", "gfx950")])
def test_unknown_architectures(arch, known):
    """A GPU that has no table gets that of the nearest older one."""
    assert builtin_table(arch) == builtin_table(known)


@pytest.mark.parametrize(
    ("arch", "name", "head_dim", "num_stages", "programs"),
    [
        ("sm90", "k4v2_g128", 128, 3, 8),
        ("sm90", "k4v4_g128", 128, 2, 8),  # two pages of 18 KB eight times are too much
        ("sm90", "k8v8_g128", 128, 2, 6),
        ("sm90", "k8v8_g128", 256, 1, 4),  # a page of 67 KB goes through shared memory tile by tile
        ("sm90", "k3v3_g128", 128, 2, 8),  # high bits are loaded twice
        ("sm90", "k6v6_g128", 128, 2, 6 if triton.__version__.startswith("3.6.") else 8),  # measured
        ("sm90", "k5v5_g128", 128, 2, 8),  # those that distant rows share once
        ("sm90", "k5v4_g128", 64, 3, 8),
        ("sm80", "k6v6_g128", 128, 2, 6),
        ("sm86", "k4v2_g128", 128, 2, 6),
        ("sm80", "k2v2_g64", 128, 3, 8),
        ("sm80", "k4v2_g128", 128, 2, 8),
        ("gfx942", "k4v4_g128", 128, 2, 3),
    ],
)
def test_pages_in_shared_memory(arch, name, head_dim, num_stages, programs, monkeypatch):
    """As many pages as fit for all programs of a multiprocessor, then as many programs as fit with one."""
    monkeypatch.setattr(gpu, "arch_of", lambda device: arch)
    layout = PageLayout.from_name(name, head_dim=head_dim)
    config = configs.decode_config(layout, torch.float16, torch.device("cpu"))
    assert (config.num_stages, config.programs_per_sm) == (num_stages, programs)
    assert config.few_programs_per_sm <= programs


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(64, 256), (256, 64), (192, 128), (128, 192)])
def test_parameters_of_different_head_dims(head_dim, v_head_dim, monkeypatch):
    """The larger head_dim chooses them; what shared memory holds is counted from both."""
    layout, device = PageLayout(head_dim, 128, 8, 8, v_head_dim), torch.device("cpu")
    larger = PageLayout(max(head_dim, v_head_dim), 128, 8, 8)
    assert configs.decode_config(layout, torch.float16, device, table()).num_warps == 2
    for tokens in (4, 4096):
        arguments = torch.float16, device, tokens, 1, 4, None
        assert configs.prefill_config(layout, *arguments) == configs.prefill_config(larger, *arguments)
    monkeypatch.setattr(gpu, "arch_of", lambda device: "sm90")
    config = configs.decode_config(layout, torch.float16, device)
    assert config.programs_per_sm >= configs.decode_config(larger, torch.float16, device).programs_per_sm
    # One of 256 channels and one of 64 make a page of 41 KB, those of 192 are padded: 49 KB. Two of 256 are too much.
    assert config.num_stages == 2 and configs.decode_config(larger, torch.float16, device).num_stages == 1


def test_decode_takes_a_table(device, tmp_path):
    """decode_attention runs with the parameters of a table that was saved and loaded."""
    case = cache_case(PageLayout(64, 64, 4, 2), [200, 70], group=2, sink_len=16, device=device)
    own = DecodeTable("sm90", (Entry(64, DecodeConfig(num_warps=1, programs_per_sm=3, few_programs_per_sm=1), "test"),))
    save_table(tmp_path / "own.json", own)
    out = decode_attention(case.q, **case.kwargs, table=load_table(tmp_path / "own.json"))
    assert relative_error(out, reference.decode_attention(case.q.double(), **case.kwargs)) < 1e-3
    assert json.loads((tmp_path / "own.json").read_text())["version"] == 2
    assert torch.isfinite(out).all()
