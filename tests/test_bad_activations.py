"""A key or value that is not finite, in pages: what is read back is never finite and wrong."""

from __future__ import annotations

import pytest
import torch
from helpers import ON_GPU, SLOW, draw

from kvarn_triton import DEFAULT, PUBLISHED, PageLayout, dequantize_pages, reference, store_pages


@pytest.mark.parametrize(
    ("encoder", "bits"),
    [(DEFAULT, 2), pytest.param(DEFAULT, 4, marks=SLOW), pytest.param(PUBLISHED, 2, marks=SLOW), (PUBLISHED, 4)]
    + ([(encoder, bits) for encoder in (DEFAULT, PUBLISHED) for bits in (3, 8)] if ON_GPU else []),
)
@pytest.mark.parametrize("number", [torch.inf, torch.nan] + ([-torch.inf] if ON_GPU else []))
@pytest.mark.parametrize("half", [0, 1], ids=["key", "value"])
def test_what_is_read_back(half, number, encoder, bits, device):
    """The token of that number is not finite; what is finite is right; kernel and reference agree on which numbers are.

    The other half of the page and the other head are not touched.
    """
    layout = PageLayout(64, 64, bits, bits)
    good = [draw(64, 2, 64, seed=seed, device=device) for seed in (0, 1)]
    bad = [x.clone() for x in good]
    bad[half][5, 0, 3] = number
    ids = torch.zeros(1, dtype=torch.int32, device=device)
    read = []
    for tensors, module in ((good, None), (bad, None), (bad, reference)):
        pages = torch.zeros(layout.pages_shape(1, 2), dtype=torch.uint8, device=device)
        (module.store_pages if module else store_pages)(*tensors, pages, ids, layout, encoder=encoder)
        for rotated in (False, True):
            read.append([x[0] for x in dequantize_pages(pages, ids, layout, dtype=torch.float32, rotated=rotated)])
    for expected, kernel, specified in zip(read[:2], read[2:4], read[4:], strict=True):
        assert torch.equal(kernel[1 - half], expected[1 - half])
        assert torch.equal(kernel[half][:, 1], expected[half][:, 1])
        finite = kernel[half].isfinite()
        assert torch.equal(finite, specified[half].isfinite())
        assert not finite[5, 0].any()
        error = (kernel[half] - expected[half])[finite & expected[half].isfinite()]
        assert error.numel() == 0 or error.norm() <= 0.2 * expected[half].norm()
