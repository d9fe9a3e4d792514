"""Lengths, ids and strides that no server means to give: what is documented happens, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_bits, draw
from prefill_cases import SMALL, prefill_case

from kvarn_triton import append_tokens, commit_pages, decode_attention, dequantize_pages, prefill_attention, reference
from kvarn_triton.launch import check_pool
from kvarn_triton.testing import cache_case


@pytest.mark.parametrize("length", [-1, -17, -100, -1000, -(2**31)])
@pytest.mark.parametrize("split_size", [None, 1])
def test_negative_lengths_in_decode(length, split_size, device):
    """A length below 0 is one of 0: zeros and -inf. Other rows have the bits that they have beside a row of length 0."""
    case = cache_case(SMALL, [330, 0, 90], group=3, num_kv_heads=2, sink_len=100, num_tail_slots=2, device=device)
    options = {"split_size": split_size, "return_lse": True}
    out, lse = decode_attention(case.q, **case.kwargs, **options)
    case.seq_lens[1] = length
    for api in (decode_attention, reference.decode_attention):
        illegal, illegal_lse = api(case.q, **case.kwargs, **options)
        assert (illegal[1] == 0).all() and (illegal_lse[1] == -torch.inf).all()
        if api is decode_attention:
            assert_same_bits(illegal, out)
            assert_same_bits(illegal_lse, lse)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("scratch", [False, True])
def test_negative_lengths_in_prefill(new, scratch, device):
    """Queries of a sequence whose length is below 0 see nothing of the cache; other rows are what they are."""
    arguments = prefill_case(SMALL, [330, 40, 90], [3, 2, 5], new=new, group=3, sink_len=16, device=device)
    if scratch:
        arguments["scratch"] = torch.zeros(arguments["block_table"].numel(), 2, 1, 64, 64, dtype=torch.float16, device=device)
    expected = prefill_attention(**arguments, split_size=1)
    arguments["seq_lens"][1] = -1000
    out = prefill_attention(**arguments, split_size=1)
    assert_same_bits(out[:3], expected[:3])
    assert_same_bits(out[5:], expected[5:])
    assert out[3:5].isfinite().all() and (new or (out[3:5] == 0).all())


def test_negative_counts(device):
    """A count of quantized pages below 0 is one of 0: the tail has all pages. commit_pages leaves it and the pages alone."""
    case = cache_case(SMALL, [60, 90], group=2, sink_len=0, num_tail_slots=2, device=device)
    expected = decode_attention(case.q, **case.kwargs)
    case.num_quantized[:] = -5
    assert_same_bits(decode_attention(case.q, **case.kwargs), expected)
    before = case.pages.clone()
    tables = case.raw_table, case.block_table, case.seq_lens, case.num_quantized
    for api in (commit_pages, reference.commit_pages):
        api(case.raw_pages, case.pages, *tables, SMALL, max_new_pages=9)
        assert (case.num_quantized == -5).all() and torch.equal(case.pages, before)


def behind(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with memory of NaN before it, which an id below 0 would read."""
    poison = 255 if x.dtype == torch.uint8 else torch.nan
    return torch.cat((torch.full_like(x, poison), x))[len(x) :]


@pytest.mark.parametrize("form", ["decode", "prefill", "prefill few", "scratch", "float32"])
def test_ids_below_zero_are_not_followed(form, device):
    """In attention they stand for page 0, whose numbers are wrong but somebody's own; nothing before the pools is read."""
    dtype = torch.float32 if form == "float32" else torch.float16
    arguments = prefill_case(
        SMALL, [330, 90], [20, 9] if form != "prefill few" else [1, 1], sink_len=16, dtype=dtype, device=device
    )
    arguments |= {name: behind(arguments[name]) for name in ("pages", "raw_pages")}
    if form == "scratch":
        arguments["scratch"] = torch.zeros(arguments["block_table"].numel(), 2, 1, 64, 64, dtype=dtype, device=device)
    call = prefill_attention
    if form == "decode":
        arguments.pop("cu_seqlens_q")
        arguments["q"], call = arguments["q"][:2], decode_attention
    for name, id_below in (("block_table", -1), ("raw_table", -2)):
        given = arguments[name].clone()
        given[0, 1 if name == "block_table" else 0] = id_below
        expected = call(**arguments | {name: given.clamp(min=0)})
        assert_same_bits(call(**arguments | {name: given}), expected)


def test_pages_without_an_id_are_not_counted(device):
    """A due page whose id is below 0 is neither written nor counted, and is written once it has an id."""
    case = cache_case(SMALL, [330, 330, 90], group=1, num_kv_heads=1, sink_len=0, num_tail_slots=6, device=device)
    ids = torch.arange(18, dtype=torch.int32, device=device).view(3, 6)
    holes = ids.clone()
    holes[0, 2] = holes[1, 0] = -1
    whole = torch.full(SMALL.pages_shape(18, 1), 255, dtype=torch.uint8, device=device)
    reference.commit_pages(
        case.raw_pages, whole, case.raw_table, ids, case.seq_lens, torch.zeros_like(case.seq_lens), SMALL, max_new_pages=9
    )
    for api in (commit_pages, reference.commit_pages):
        for csr in (False, True):
            pages, count = torch.full_like(whole, 255), torch.zeros_like(case.seq_lens)
            for step, table in enumerate((holes, ids)):
                form = {"block_table": table}
                if csr:
                    indptr = torch.tensor([0, 6, 12, 18], dtype=torch.int32, device=device)
                    form = {"block_table": None, "kv_indptr": indptr, "kv_indices": table.flatten()}
                api(
                    case.raw_pages, pages, case.raw_table, committed_lens=case.seq_lens, num_quantized=count, layout=SMALL,
                    max_new_pages=9, **form,
                )  # fmt: skip
                assert count.tolist() == ([2, 0, 1] if step == 0 else [5, 5, 1])
                if step == 0:
                    assert (pages[[2, 6]] == 255).all()
            assert_same_bits(pages, whole)


def far_heads(x: torch.Tensor) -> torch.Tensor:
    """Return a view with the values of `x` [tokens, heads, channels] whose heads are 2**27 elements apart."""
    try:
        base = torch.empty(x.shape[1] * 2**27, dtype=x.dtype, device=x.device)
    except RuntimeError:
        pytest.skip("needs more memory")
    return base.as_strided(x.shape, (x.shape[-1], 2**27, 1)).copy_(x)


@pytest.fixture
def plain_empty(monkeypatch):
    """Leave new memory unwritten, so that most of it is never there."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.parametrize("function", ["prefill", "prefill split", "decode", "append"])
def test_heads_far_apart(function, device, plain_empty):
    """Heads times their stride is a number of 64 bits, of queries, results, new keys and values (KF 28)."""
    arguments = prefill_case(SMALL, [100], [4], new=True, group=18, device=device)
    many = prefill_case(SMALL, [100], [4], new=True, group=1, num_kv_heads=18, device=device)
    if function == "append":
        pools = [torch.zeros_like(many["raw_pages"]) for _ in range(2)]
        slots = torch.arange(4, device=device)
        append_tokens(many["k"], many["v"], pools[0], slots)
        append_tokens(far_heads(many["k"]), far_heads(many["v"]), pools[1], slots)
        assert_same_bits(pools[1], pools[0])
        return
    options = {"split_size": 1} if function == "prefill split" else {}
    for case, names in ((arguments, ("q", "out")), (many, ("k", "v"))):
        call = prefill_attention
        if function == "decode":
            call, case = decode_attention, {name: x for name, x in case.items() if name not in ("k", "v", "cu_seqlens_q")}
            case["q"] = case["q"][:1]
            names = ("q", "out")
        expected = call(**case, **options)
        case = case | {"out": torch.zeros_like(expected)}
        for name in names:
            far = case | {name: far_heads(case[name])}
            out = call(**far, **options)
            assert_same_bits(out.contiguous(), expected)
            del far, out


def test_pools_of_far_tokens_are_refused(device):
    """Places within a page are numbers of 32 bits: pools whose pages span more are refused, and those with odd strides."""
    k = draw(3, 1, 64, dtype=torch.float16, device=device)
    base = torch.empty_strided((1, 2, 1, 64, 64), (0, 0, 0, 2**25, 1), dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match=r"raw_pages: expected pages that span less than 2\*\*31 elements, got strides"):
        check_pool("raw_pages", base)
    odd = torch.zeros(2, 2, 1, 64, 72, dtype=torch.float16, device=device)[..., :64]
    with pytest.raises(ValueError, match=r"raw_pages: expected an address in multiples of 16 bytes and outer strides"):
        append_tokens(k, k, odd, torch.arange(3, device=device))
    assert (odd == 0).all()


def test_ids_of_pages_to_read(device):
    """dequantize_pages gives zeros for an id below 0."""
    case = cache_case(SMALL, [330], group=1, num_kv_heads=1, device=device)
    ids = torch.tensor([-1, int(case.block_table[0, 1]), -(2**31)], dtype=torch.int32, device=device)
    k, v = dequantize_pages(behind(case.pages), ids, SMALL)
    assert (k[[0, 2]] == 0).all() and (v[[0, 2]] == 0).all() and k[1].isfinite().all() and (k[1] != 0).any()
