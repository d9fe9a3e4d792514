"""One bad number stays where it is: huge, infinite and not-a-number tokens, queries and logits (`docs/numerics.md`)."""

from __future__ import annotations

import pytest
import torch
from helpers import ON_GPU, draw
from prefill_cases import in_form, prefill_case

from kvarn_triton import PageLayout, decode_attention, merge_states, prefill_attention, reference
from kvarn_triton.testing import attention_in, relative_error

LAYOUT = PageLayout(64, 64, 4, 4)


def page_with(device, k=None, v=None, layout=LAYOUT) -> dict:
    """Return arguments of decode_attention over one page of 64 random tokens; `k` and `v` change them before."""
    q, keys, values = (draw(n, 1, 64, seed=n + i) for i, n in enumerate((1, 64, 64)))
    for change, x in ((k, keys), (v, values)):
        if change is not None:
            change(x, q)
    pages = torch.zeros(layout.pages_shape(1, 1), dtype=torch.uint8)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    reference.store_pages(keys, values, pages, torch.tensor([0]), layout)
    lens = torch.tensor([64], dtype=torch.int32, device=device)
    return {"pages": pages.to(device), "block_table": table, "seq_lens": lens, "layout": layout, "q": q.half().to(device)}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4] if ON_GPU else [1e3])
def test_a_large_value_of_little_weight(ratio, bits, device):
    """A value token of weight e**-64 takes no bits from the others of its page, however large it is."""

    def hide(keys, q):
        keys[5] = -8 * q[0]

    def enlarge(values, q):
        values[5] *= ratio

    arguments = page_with(device, hide, enlarge, PageLayout(64, 64, bits, bits))
    exact = reference.decode_attention(**arguments | {"q": arguments["q"].double()})
    assert relative_error(decode_attention(**arguments), exact) < 1e-3  # without such a token 4e-4


@pytest.mark.parametrize("number", [1e4, torch.inf, torch.nan])
def test_values_that_are_not_seen(number, device):
    """Past the end and before the window, in a page whose parameters of those tokens are made bad by hand."""
    arguments = page_with(device)
    for options, unseen in (({}, slice(60, 64)), ({"window": 50}, slice(0, 10))):
        arguments["seq_lens"].fill_(60)
        expected = decode_attention(**arguments, **options)
        pages = arguments["pages"].clone()
        fields = LAYOUT.fields(pages)
        fields["v_scale"][..., unseen] = number
        fields["v_zero"][..., unseen] = -number
        fields["k_norm"][..., unseen] = number
        assert torch.equal(decode_attention(**arguments | {"pages": pages}, **options), expected)
        exact = reference.decode_attention(**arguments | {"pages": pages}, **options)
        assert relative_error(expected, exact) < 1e-3


@pytest.mark.parametrize(("ratio", "most"), [(1, 2.0), (10, 2.0), (100, 20.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16])
def test_channels_far_apart(dtype, ratio, most, device):
    """Decode rounds products of queries and key scales relative to the largest of each: errors as `docs/numerics.md` says."""
    layout, tokens = PageLayout(128, 64, 4, 4), 256
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    factors = float(ratio) ** torch.linspace(-0.5, 0.5, 128)[order]
    keys, values = reference.hadamard(draw(tokens, 1, 128) * factors), draw(tokens, 1, 128, seed=1)
    pages = torch.zeros(layout.pages_shape(4, 1), dtype=torch.uint8)
    reference.store_pages(keys, values, pages, torch.arange(4), layout)
    arguments = {"q": reference.hadamard(draw(1, 8, 128, seed=2) / factors).to(dtype).to(device), "layout": layout}
    arguments |= {"pages": pages.to(device), "block_table": torch.arange(4, dtype=torch.int32, device=device)[None]}
    arguments["seq_lens"] = torch.tensor([tokens], dtype=torch.int32, device=device)
    exact = reference.decode_attention(**arguments | {"q": arguments["q"].double()})
    plain = relative_error(attention_in(dtype, arguments), exact)
    assert relative_error(decode_attention(**arguments), exact) <= most * plain


CALLS = ("decode", "dequantized", "registers", "folded", "scratch", "new")


def called(form: str, arguments: dict, call=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return result and log-sum-exp of a case of `cases`; with `call` of that function, a reference."""
    arguments = arguments | {"return_lse": True}
    if form == "decode":
        return (call or decode_attention)(**arguments)
    if call is None:
        arguments |= in_form("registers" if form == "new" else form, arguments, arguments.get("split_size"))
    return (call or prefill_attention)(**arguments)


def case_of(form: str, device) -> dict:
    """Return a call with a sink, quantized pages and a tail; of prefill with three query tokens of two sequences each."""
    queries = [1, 1] if form == "decode" else [3, 3]
    arguments = prefill_case(
        PageLayout(64, 64, 4, 2), [100, 30], queries, new=form == "new", sink_len=16, num_tail_slots=1, device=device
    )
    if form == "decode":
        del arguments["cu_seqlens_q"]
    return arguments


def agree(form: str, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare a call with the reference: which rows are finite, the log-sum-exp if it isn't, numbers where both are."""
    out, lse = called(form, arguments)
    name = "decode_attention" if form == "decode" else "prefill_attention"
    exact, exact_lse = called(form, arguments, getattr(reference, name))
    finite = out.isfinite().all(-1)
    assert torch.equal(finite, exact.isfinite().all(-1))
    assert torch.equal(lse.nan_to_num(7e7, 8e7, 9e7) > 6e7, exact_lse.nan_to_num(7e7, 8e7, 9e7) > 6e7)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-3, atol=5e-3, equal_nan=True)
    torch.testing.assert_close(out[finite].float(), exact[finite].float(), rtol=0, atol=5e-3)
    return finite, out


@pytest.mark.parametrize("number", [-torch.inf, torch.nan])
@pytest.mark.parametrize("form", CALLS)
def test_bad_queries(form, number, device):
    """One number of one query head and token: that row is not finite, all others have their bits."""
    arguments = case_of(form, device)
    _, expected = agree(form, arguments)
    arguments["q"][0, 1, 5] = number
    finite, out = agree(form, arguments)
    assert int((~finite).sum()) == 1 and not finite[0, 1]
    assert torch.equal(out[finite], expected[finite])


@pytest.mark.parametrize("form", CALLS)
def test_bad_sinks(form, device):
    """A logit of infinity takes all weight, of -infinity none, one that is not a number is its own head's only."""
    for numbers in ((torch.inf, 0.5), (-torch.inf, torch.inf), (0.5, torch.nan)):
        arguments = case_of(form, device) | {"sinks": torch.tensor(numbers, device=device)}
        finite, out = agree(form, arguments | {"split_size": 1} if numbers[1] == torch.inf else arguments)
        for head, number in enumerate(numbers):
            assert bool(finite[:, head].all()) == (number == number) and (number != torch.inf or not out[:, head].any())


@pytest.mark.parametrize("number", [torch.inf, torch.nan] if ON_GPU else [torch.nan])
@pytest.mark.parametrize("form", CALLS)
def test_bad_tokens(form, number, device):
    """A raw or new key is not finite for those that see it; one before the window, key or value, is seen by nobody."""
    arguments = case_of(form, device)
    _, expected = agree(form, arguments | {"window": 20})
    page = int(arguments["raw_table"][0, 0])
    arguments["raw_pages"][page, :, :, 3] = number  # of the sink, outside of the window
    _, out = agree(form, arguments | {"window": 20})
    assert torch.equal(out, expected)
    finite, _ = agree(form, arguments)
    first = 1 if form == "decode" else 3
    assert not finite[:first].any() and finite[first:].all()
    if form == "new" and number != number:
        # An infinite new key is not rotated: where its score is -infinity it has no weight, in kernels alone.
        arguments = case_of(form, device)
        arguments["k"][1, :, 5] = number
        finite, _ = agree(form, arguments)
        assert finite.all(-1).tolist() == [True, False, False, True, True, True]


def test_bad_states(device):
    """Infinite log-sum-exps of two results: one takes all weight, two share it, and what is not a number stays so."""
    lse = torch.tensor([-torch.inf, 0.0, torch.inf, torch.nan], device=device)
    lse_a, lse_b = lse[:, None].expand(4, 4).contiguous(), lse[None].expand(4, 4).contiguous()
    out_a, out_b = (draw(4, 4, 64, seed=seed, device=device) for seed in (0, 1))
    for call in (merge_states, reference.merge_states):
        out, merged = call(out_a, lse_a, out_b, lse_b)
        assert (out[0, 0] == 0).all() and merged[0, 0] == -torch.inf
        assert torch.equal(out[2, 1], out_a[2, 1]) and torch.equal(out[1, 2], out_b[1, 2])
        assert (merged[:3, 2] == torch.inf).all() and (merged[2, :3] == torch.inf).all()
        torch.testing.assert_close(out[2, 2], (out_a + out_b)[2, 2] / 2)
        assert out[3].isnan().all() and out[:, 3].isnan().all() and merged[3].isnan().all() and merged[:, 3].isnan().all()
        again = call(torch.stack((out_a, out_b)), torch.stack((lse_a, lse_b)))
        for found, expected in zip(again, (out, merged), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
