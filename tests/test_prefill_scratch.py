"""Scratch memory of prefill_attention: what is written to it, what is read, and in which dtypes.

That results are right, `test_prefill.py` tests: there scratch memory is one of the forms of every test.
"""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, ON_GPU, SLOW, assert_same_bits, bits_of, check, layout_id
from prefill_cases import SMALL, in_form, new_scratch, prefill_case

import kvarn_triton
from kvarn_triton import PageLayout, configs, dequantize_pages, prefill_attention, prefill_workspace_size, reference
from kvarn_triton.testing import attention_in, relative_error

UNEQUAL = PageLayout(80, 64, 3, 8, v_head_dim=128)


def expected_slots(arguments: dict, seen: list[set[int]], dtype: torch.dtype, rotated: bool) -> torch.Tensor:
    """Return scratch memory with the pages `seen` of each sequence of a block table, NaN elsewhere."""
    layout, table = arguments["layout"], arguments["block_table"]
    scratch = new_scratch(arguments, dtype)
    for row, columns in enumerate(seen):
        for column in columns:
            ids = table[row, column : column + 1]
            k, v = dequantize_pages(arguments["pages"], ids, layout, dtype=dtype, rotated=rotated)
            slot = scratch[row * table.shape[1] + column]
            slot[0, ..., : layout.head_dim], slot[1, ..., : layout.v_head_dim] = k[0].transpose(0, 1), v[0].transpose(0, 1)
    return scratch


@pytest.mark.parametrize(
    ("window", "queries", "seen", "dtype", "layout"),
    [
        pytest.param(*case, layout, marks=[SLOW] if layout == other else [], id=f"{case[0]}-{layout_id(layout)}")
        for case, other in (
            ((None, [6, 0, 3], [{0, 1, 2}, set(), {0}], torch.bfloat16), SMALL),
            ((150, [6, 0, 3], [{2}, set(), {0}], torch.float32), UNEQUAL),
            ((70, [70, 2, 1], [{2}, {0}, set()], torch.float16), UNEQUAL),
            ((1, [1, 1, 1], [set(), set(), set()], torch.float16), SMALL),
        )
        for layout in (SMALL, UNEQUAL)
    ],
)
def test_slots(window, queries, seen, layout, dtype, device):
    """What some query sees is written to its slot, as dequantize_pages rounds it; nothing else is written or looked at.

    It is rotated, unless tiles attend to plain tokens.
    Ids of other pages may be anything, in a block table as well as in CSR form.
    """
    arguments = prefill_case(
        layout, [330, 150, 200], queries, num_kv_heads=2, sink_len=16, num_tail_slots=2, dtype=dtype, device=device
    )
    assert arguments["num_quantized"].tolist() == [3, 1, 1]
    options = {"window": window, "split_size": 2}  # otherwise the width of a table decides how pages are shared
    scratch = new_scratch(arguments, dtype)
    out = prefill_attention(**arguments, **options, scratch=scratch)
    plain = configs.has_plain_kernel(layout, dtype, device, 128)
    expected = expected_slots(arguments, seen, dtype, rotated=not plain)
    written = ~expected.isnan()
    assert torch.equal(~scratch.isnan(), written)
    assert_same_bits(scratch[written], expected[written])

    garbage = torch.full_like(arguments["block_table"], -(2**31))
    garbage[:, 1::2] = 2**31 - 1
    for row, columns in enumerate(seen):
        columns = sorted(columns)
        garbage[row, columns] = arguments["block_table"][row, columns]
    again = new_scratch(arguments, dtype)
    assert_same_bits(prefill_attention(**arguments | {"block_table": garbage}, **options, scratch=again), out)
    assert torch.equal(bits_of(again), bits_of(scratch))
    csr = arguments | {"block_table": None, "kv_indices": garbage.flatten()}
    csr["kv_indptr"] = torch.arange(0, garbage.numel() + 1, garbage.shape[1], dtype=torch.int32, device=device)
    again = new_scratch(csr, dtype)
    assert_same_bits(prefill_attention(**csr, **options, scratch=again), out)
    assert torch.equal(bits_of(again), bits_of(scratch))


@pytest.mark.parametrize(("dtype", "raw_dtype"), list(zip(DTYPES[:2] * 2, DTYPES, strict=False)))
def test_dtypes(dtype, raw_dtype, device):
    """Queries of 16 bits, bfloat16 scratch memory, raw pages of any dtype; the yardstick is attention in bfloat16.

    In the interpreter casts to bfloat16 truncate, which errs twice as much.
    """
    arguments = prefill_case(SMALL, [200, 90], [40, 7], dtype=dtype, raw_dtype=raw_dtype, sink_len=16, device=device)
    out = prefill_attention(**arguments, scratch=new_scratch(arguments, torch.bfloat16))
    exact = reference.prefill_attention(**arguments | {"q": arguments["q"].double()})
    allowed = (2 if ON_GPU else 4) * relative_error(attention_in(torch.bfloat16, arguments), exact)
    assert relative_error(out, exact) <= allowed


def test_more_pages_than_programs_per_row(device, monkeypatch):
    """A program writes several pages of a row where tables are long."""
    monkeypatch.setattr(kvarn_triton.configs, "expand_columns", lambda programs, max_pages, device: 2)
    arguments = prefill_case(SMALL, [330, 70], [6, 9], new=True, num_tail_slots=1, device=device)
    check(arguments, scratch=new_scratch(arguments))


def test_workspace_size(device):
    """The size of the workspace is that of the launch with scratch memory; more slots than entries may be given."""
    arguments = prefill_case(SMALL, [330, 70], [6, 9], new=True, num_kv_heads=2, device=device)
    pages = arguments["block_table"].shape[1]
    size = prefill_workspace_size(15, 2, 4, 2, SMALL, pages, device, split_size=2, scratch=True)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    scratch = new_scratch(arguments)
    more = torch.cat((scratch, scratch))
    out = prefill_attention(**arguments, split_size=2, scratch=more, workspace=workspace)
    assert_same_bits(out, prefill_attention(**arguments, split_size=2, scratch=scratch))
    with pytest.raises(ValueError, match="scratch: expected a slot for each of the 12 entries of block_table, got 11"):
        prefill_attention(**arguments, scratch=scratch[1:])


def test_long_chunks_take_memory_by_themselves(device, monkeypatch):
    """From so many tokens and up to so many bytes results are those with scratch memory; not if the caller chose the launch."""
    monkeypatch.setattr(kvarn_triton.configs, "SCRATCH_TOKENS", 20)
    arguments = prefill_case(SMALL, [330, 70], [31, 9], new=True, num_tail_slots=1, device=device)
    given = {"scratch": new_scratch(arguments)}
    in_tiles = in_form("dequantized", arguments)
    with_memory, without = (bits_of(prefill_attention(**arguments, **options)) for options in (given, in_tiles))
    assert not torch.equal(with_memory, without)
    assert torch.equal(bits_of(prefill_attention(**arguments)), with_memory)
    split = [prefill_attention(**arguments, split_size=2, **options) for options in ({}, given)]
    assert not torch.equal(*map(bits_of, split))
    size = arguments["block_table"].numel() * 2 * 64 * 64 * 2
    for name, value in (("SCRATCH_BYTES", size - 1), ("SCRATCH_TOKENS", 21)):
        with monkeypatch.context() as patch:
            patch.setattr(kvarn_triton.configs, name, value)
            assert not torch.equal(bits_of(prefill_attention(**arguments)), with_memory)
    monkeypatch.setattr(kvarn_triton.configs, "SCRATCH_BYTES", size)
    assert torch.equal(bits_of(prefill_attention(**arguments)), with_memory)
    need = prefill_workspace_size(40, 2, 2, 1, SMALL, arguments["block_table"].shape[1], device)
    workspace = torch.empty(need, dtype=torch.uint8, device=device)
    assert torch.equal(bits_of(prefill_attention(**arguments, workspace=workspace)), with_memory)
