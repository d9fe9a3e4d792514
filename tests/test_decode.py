"""decode_attention against float64 attention over the same cache.

How large the error may be is said in `helpers.check`.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import triton
import triton.language as tl
from helpers import ALL_LAYOUTS, DTYPES, ON_GPU, assert_same_bits, check, layout_id, quantized_case, strided

from kvarn_triton import (
    DecodeConfig,
    DecodeTable,
    PageLayout,
    decode_attention,
    decode_workspace_size,
    dequantize_pages,
    gpu,
    reference,
)
from kvarn_triton.layout import SUPPORTED_PAGE_SIZES
from kvarn_triton.paging import load_page_id
from kvarn_triton.tables import Entry
from kvarn_triton.testing import cache_case, relative_error

GROUPS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
"""More than 8 are attended to in tiles of equal sizes."""


@pytest.mark.parametrize("index", range(len(ALL_LAYOUTS)), ids=[layout_id(layout) for layout in ALL_LAYOUTS])
def test_layouts(index, device):
    """Every pair of bits, every shape, every group from 1 to 16, every dtype (KF 1, KF 7, KF 9)."""
    layout = ALL_LAYOUTS[index]
    dtype, sink_len = DTYPES[index % 3], (0, 16, layout.page_size)[index // 2 % 3]
    lengths = [sink_len + 2 * layout.page_size + 9, layout.page_size - 3]
    options = {"group": GROUPS[index % 16], "num_kv_heads": 1, "num_tail_slots": 1, "dtype": dtype, "sink_len": sink_len}
    case = cache_case(layout, lengths, device=device, **options)
    assert case.num_quantized.tolist() == [2, 0]
    check(case)


@pytest.mark.parametrize(
    ("group", "layout"), [(1, PageLayout(64, 64, 4, 2)), (3, PageLayout(128, 128, 3, 5)), (4, ALL_LAYOUTS[5])]
)
def test_few_heads_as_rows(group, layout, device):
    """Up to 4 query heads as rows of products, as GPUs of AMD and tables without `columns` have them."""
    config = DecodeConfig(programs_per_sm=2, few_programs_per_sm=1)
    case = cache_case(layout, [16 + 2 * layout.page_size + 9, 5], group=group, num_kv_heads=1, sink_len=16, device=device)
    check(case, table=DecodeTable("rows", (Entry(512, config, "test"),)))
    check(case, table=DecodeTable("columns", (Entry(512, dataclasses.replace(config, columns=True), "test"),)))


@pytest.mark.skipif(not ON_GPU, reason="slow in the interpreter, where test_layouts has each group and dtype once")
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(dtype, device):
    """Every group with every dtype."""
    for group in GROUPS:
        check(cache_case(PageLayout(), [1000, 129], group=group, dtype=dtype, sink_len=128, device=device))


@pytest.mark.parametrize(("group", "num_kv_heads"), [(17, 2), (24, 1), (40, 1)])
def test_many_query_heads(group, num_kv_heads, device):
    """Groups of more than 16 take three tiles and more, the last of which may have fewer heads."""
    options = {"group": group, "num_kv_heads": num_kv_heads, "sink_len": 16}
    check(cache_case(PageLayout(64, 64, 4, 2), [150, 70], device=device, **options))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_sharp_attention(bits, head_dim, device):
    """Scores with a standard deviation of about 4: most weights are far below the largest of their page."""
    case = cache_case(PageLayout(head_dim, 64, bits, bits), [300], group=3, num_kv_heads=1, num_tail_slots=1, device=device)
    out = decode_attention(case.q, **case.kwargs, sm_scale=4 * head_dim**-0.5)
    exact = reference.decode_attention(case.q.double(), **case.kwargs, sm_scale=4 * head_dim**-0.5)
    # In the interpreter at most 1.3e-3, where plain attention in float16 has 4.2e-4 to 1.3e-3.
    assert relative_error(out, exact) < 2.5e-3


@pytest.mark.parametrize("page_size", SUPPORTED_PAGE_SIZES)
@pytest.mark.parametrize("sink_len", [0, 64, 70])
def test_lengths(page_size, sink_len, device):
    """No token, one token, around the ends of sink and page, several pages; a row of padding among them (KF 24)."""
    body = [0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 2]
    lengths = body + ([1, sink_len - 1] + [sink_len + length for length in body] if sink_len else [])
    check(cache_case(PageLayout(64, page_size, 4, 2), lengths, group=2, num_kv_heads=1, sink_len=sink_len, device=device))


def test_all_rows_empty(device):
    """A batch of length 0 gives zeros and lse = -inf."""
    check(cache_case(PageLayout(64, 64, 2, 2), [0, 0], device=device))


@triton.jit(do_not_specialize=["last"])
def _page_id_kernel(out_ptr, table_ptr, last, PTX: tl.constexpr):
    column = tl.program_id(0)
    tl.store(out_ptr + column, load_page_id(table_ptr, column, last, PTX))


@pytest.mark.parametrize("last", [-3, 0, 1, 4])
def test_page_ids_of_the_table_only(last, device):
    """A loop loads an id ahead, and one even if it has no step: never from outside of the table."""
    memory = torch.tensor([-7, -7, -7, -7, 10, 11, 12, 13, -7, -7, -7, -7], dtype=torch.int32, device=device)
    out = torch.empty(6, dtype=torch.int32, device=device)
    _page_id_kernel[(6,)](out, memory[4:], last, PTX=gpu.uses_ptx())
    assert out.tolist() == ([10 + min(column, last - 1) for column in range(6)] if last > 0 else [0] * 6)


@pytest.mark.parametrize("raw_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_dtypes(dtype, raw_dtype, device):
    """Raw pages may have another dtype than the queries; the coarser one sets the error."""
    case = cache_case(PageLayout(64, 64, 3, 4), [150], group=2, dtype=dtype, raw_dtype=raw_dtype, sink_len=32, device=device)
    check(case, working=torch.bfloat16 if torch.bfloat16 in (dtype, raw_dtype) else dtype)


def test_raw_tokens_in_two_terms(device):
    """What rounding a query or a weight to float16 leaves over is not lost: the result is the exact one, rounded."""
    case = cache_case(PageLayout(64, 64, 4, 2), [100], group=3, num_kv_heads=1, sink_len=128, device=device)
    exact = reference.decode_attention(case.q.double(), **case.kwargs)
    rounding = relative_error(exact.half(), exact)
    assert relative_error(decode_attention(case.q, **case.kwargs), exact) < 1.1 * rounding


@pytest.mark.parametrize("sm_scale", [0.05, 0.3, -0.1])
def test_sm_scale(sm_scale, device):
    """Any factor of the scores, negative ones too."""
    case = cache_case(PageLayout(80, 64, 4, 4), [140], group=2, num_kv_heads=1, sink_len=0, device=device)
    check(case, sm_scale=sm_scale, working=torch.bfloat16)  # scores of 3 times the usual size round coarser


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k_scale", "v_scale"), [(1e4, 1.0), (1e-4, 1.0), (1.0, 1e4), (1.0, 1e-4), (1e-4, 1e4)])
def test_magnitudes(k_scale, v_scale, dtype, device):
    """Keys and values at both ends of float16: the folded query neither overflows nor vanishes (KF 5).

    sm_scale undoes the scale of the keys, so that the scores are ordinary ones.
    """
    layout = PageLayout(64, 64, 4, 2)
    case = cache_case(
        layout, [150, 64], group=2, num_kv_heads=1, dtype=dtype, k_scale=k_scale, v_scale=v_scale, sink_len=16, device=device
    )
    check(case, sm_scale=layout.head_dim**-0.5 / k_scale)


@pytest.mark.parametrize("k_scale", [1e6, 1e9, 1e-9])
def test_keys_beyond_float16(k_scale, device):
    """Keys far beyond float16: the gain of a record takes their magnitude, a query times the largest scale fits (KF 5)."""
    arguments = quantized_case(device, dtype=torch.bfloat16, k_scale=k_scale)
    arguments |= {"sm_scale": 0.125 / k_scale}
    out = decode_attention(**arguments)
    assert relative_error(out, reference.decode_attention(**arguments | {"q": arguments["q"].double()})) < 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_query_magnitudes(dtype, device):
    """Queries of any magnitude, far beyond float16 and zero ones too."""
    case = cache_case(PageLayout(64, 64, 4, 2), [150] * 4, group=2, num_kv_heads=1, dtype=dtype, device=device)
    case.q[0] *= 1e6
    case.q[1] *= 1e-12
    case.q[2] = 0
    case.q[3] *= 1e-36
    out = decode_attention(case.q, **case.kwargs, sm_scale=1e-7)
    exact = reference.decode_attention(case.q.double(), **case.kwargs, sm_scale=1e-7)
    for row in range(4):
        assert relative_error(out[row], exact[row]) < (2**-6 if dtype == torch.bfloat16 else 1e-5)


def test_out_views_and_strided_arguments(device):
    """q and out are views; pages, tables and raw pages have outer strides; the bits are those of contiguous tensors."""
    case = cache_case(PageLayout(80, 64, 3, 3), [150, 70], group=3, sink_len=16, device=device)
    expected = decode_attention(case.q, **case.kwargs, split_size=2)
    pages = torch.full((2, *case.pages.shape), 255, dtype=torch.uint8, device=device).transpose(0, 1)
    pages[:, 0] = case.pages
    raw_pages = torch.full((3, *case.raw_pages.shape), float("nan"), dtype=case.q.dtype, device=device).movedim(0, 2)
    raw_pages[:, :, 1] = case.raw_pages
    wide = torch.full((2, 9), -1, dtype=torch.int32, device=device)
    wide[:, :3] = case.block_table[:, :3]
    memory = torch.full((3, 8, 96), float("nan"), dtype=case.q.dtype, device=device)
    out = memory[1:, 1:7, 8:88]
    arguments = case.kwargs | {"pages": pages[:, 0], "raw_pages": raw_pages[:, :, 1], "block_table": wide[:, :3]}
    assert decode_attention(strided(case.q), **arguments, out=out, split_size=2) is out
    assert_same_bits(out, expected)
    assert memory[0].isnan().all() and memory[:, 0].isnan().all() and memory[..., :8].isnan().all()


def test_workspace(device):
    """A workspace of the size asked for holds the call, whatever its bytes were; less than it needs is refused (KF 26).

    The size is a bound over all smaller calls, so that a call may need less.
    """
    case = cache_case(PageLayout(64, 64, 4, 2), [200, 10], group=3, sink_len=16, device=device)
    columns = {"max_pages": case.block_table.shape[1], "max_raw_pages": case.raw_table.shape[1]}
    for split_size in (None, 3):
        size = decode_workspace_size(2, 6, 2, case.layout, device=device, split_size=split_size, **columns)
        workspace = torch.full((size + 64,), 255, dtype=torch.uint8, device=device)
        out = decode_attention(case.q, **case.kwargs, split_size=split_size, workspace=workspace[:size])
        assert_same_bits(out, decode_attention(case.q, **case.kwargs, split_size=split_size))
        assert (workspace[size:] == 255).all()
        with pytest.raises(ValueError, match="workspace: expected at least") as error:
            decode_attention(case.q, **case.kwargs, split_size=split_size, workspace=workspace[:0])
        needed = int(re.search(r"at least (\d+) bytes", str(error.value)).group(1))
        assert 0 < needed <= size
        assert_same_bits(decode_attention(case.q, **case.kwargs, split_size=split_size, workspace=workspace[:needed]), out)
        with pytest.raises(ValueError, match=f"workspace: expected at least {needed} bytes, got {needed - 1}"):
            decode_attention(case.q, **case.kwargs, split_size=split_size, workspace=workspace[: needed - 1])


def test_without_raw_pages(device):
    """Everything quantized; the last page may be cut short by a smaller length."""
    arguments = quantized_case(device)
    arguments["seq_lens"] -= torch.tensor([0, 37], dtype=torch.int32, device=device)
    out = decode_attention(**arguments)
    exact = reference.decode_attention(**arguments | {"q": arguments["q"].double()})
    assert relative_error(out, exact) < 1e-3  # float16 rounding: 2**-11 of q, weights and out each


def test_reads_what_dequantize_pages_returns(device):
    """Attention over the tensors of dequantize_pages is attention over the pages (KF 1)."""
    arguments = quantized_case(device, dtype=torch.float32)
    out = decode_attention(**arguments)
    for row, length in enumerate([256, 192]):
        ids = arguments["block_table"][row, : length // 64].contiguous()
        k, v = (
            x.flatten(0, 1).double()
            for x in dequantize_pages(arguments["pages"], ids, arguments["layout"], dtype=torch.float32)
        )
        q = arguments["q"][row].unflatten(0, (2, 2)).double()
        weights = torch.softmax(torch.einsum("hgd,thd->hgt", q, k) / 8, dim=-1)
        assert relative_error(out[row], torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1)) < 1e-5


def test_batch_invariance(device):
    """With fixed splits a row's bits depend neither on its place, nor on page ids, nor on other rows; twice is the same."""
    case = cache_case(PageLayout(64, 64, 4, 2), [200, 70, 0, 130], group=4, num_kv_heads=1, sink_len=16, device=device)
    out, lse = decode_attention(case.q, **case.kwargs, split_size=3, return_lse=True)
    again = decode_attention(case.q, **case.kwargs, split_size=3)
    assert_same_bits(again, out)
    order = torch.tensor([3, 1, 0], device=device)
    rows = {name: getattr(case, name)[order].contiguous() for name in ("block_table", "seq_lens", "raw_table", "num_quantized")}
    shuffle = torch.randperm(len(case.pages), generator=torch.Generator().manual_seed(7)).to(device)
    pages = torch.empty_like(case.pages)
    pages[shuffle] = case.pages
    rows["block_table"] = shuffle[rows["block_table"].long()].int()
    arguments = case.kwargs | rows | {"pages": pages}
    permuted, permuted_lse = decode_attention(case.q[order], **arguments, split_size=3, return_lse=True)
    assert_same_bits(permuted, out[order])
    assert_same_bits(permuted_lse, lse[order])


def test_stale_memory_is_not_read(device):
    """What lies past a sequence's end, in its own last page too, doesn't change a bit (KF 12)."""
    case = cache_case(PageLayout(64, 64, 4, 2), [150, 20], group=2, num_kv_heads=1, sink_len=32, device=device)
    out = decode_attention(case.q, **case.kwargs)
    stale = case.raw_pages.isnan()
    assert stale.any()
    case.raw_pages[stale] = 6e4
    case.pages[(case.pages == 255).all(dim=-1)] = 0x7B
    assert_same_bits(decode_attention(case.q, **case.kwargs), out)


@pytest.mark.skipif(not ON_GPU, reason="needs 7 GB of pages")
def test_byte_offsets_above_2_to_31(device):
    """Quantized and raw pages beyond 2**31 bytes are read where they are (KF 28)."""
    case = cache_case(PageLayout(), [700, 300], group=8, num_kv_heads=1, sink_len=128, device=device)
    expected = decode_attention(case.q, **case.kwargs)
    far_page, far_raw = 2**31 // case.layout.page_bytes + 1, 2**31 // case.raw_pages[0].numel() + 1
    pages = torch.full(case.layout.pages_shape(far_page + len(case.pages), 1), 255, dtype=torch.uint8, device=device)
    pages[far_page:] = case.pages
    raw_pages = torch.full(
        (far_raw + len(case.raw_pages), *case.raw_pages.shape[1:]), torch.nan, dtype=case.q.dtype, device=device
    )
    raw_pages[far_raw:] = case.raw_pages
    far = {"block_table": case.block_table + far_page, "raw_table": case.raw_table + far_raw}
    assert_same_bits(decode_attention(case.q, **case.kwargs | far | {"pages": pages, "raw_pages": raw_pages}), expected)
