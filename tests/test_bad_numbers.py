"""One bad number stays where it is: huge, infinite and not-a-number tokens, queries and logits (`docs/numerics.md`)."""

from __future__ import annotations

import pytest
import torch
from helpers import draw

from kvarn_triton import PageLayout, decode_attention, reference
from kvarn_triton.testing import relative_error

LAYOUT = PageLayout(64, 64, 4, 4)


def page_with(device, k=None, v=None, layout=LAYOUT) -> dict:
    """Return arguments of decode_attention over one page of 64 random tokens; `k` and `v` change them before they are stored."""
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
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
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
