"""Tensors that require gradients: results never require any, pools never join a graph; the same in kernels and reference."""

from __future__ import annotations

import pytest
import torch
from error_cases import WRONG, valid_arguments
from helpers import assert_same_bits
from mla_errors import WRONG_MLA, valid_mla_arguments

import kvarn_triton as kvarn
from kvarn_triton import reference

WRITTEN = ("pages", "raw_pages", "out", "num_quantized", "scratch")


def tensors_of(value: object) -> list[torch.Tensor]:
    """Return the tensors of a result or an argument."""
    return [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("api", [kvarn, reference], ids=["package", "reference"])
@pytest.mark.parametrize("function", [*WRONG, *WRONG_MLA])
def test_no_gradients(function, api, device):
    """Activations, and even pools, that require gradients give the bits of those that don't; what is written stays a leaf."""
    plain, graded = (valid_mla_arguments if function in WRONG_MLA else valid_arguments)(device)[function], {}
    for name, value in plain.items():
        copies = [x.clone().requires_grad_() if x.is_floating_point() else x.clone() for x in tensors_of(value)]
        graded[name] = tuple(copies) if isinstance(value, tuple) else copies[0] if copies else value
    # A tensor in the middle of a graph, as a model's activations are.
    graded |= {name: graded[name] * 1 for name in graded if name not in WRITTEN and len(tensors_of(graded[name])) == 1}
    expected = getattr(api, function)(**plain)
    result = getattr(api, function)(**graded)
    for one, other in zip(tensors_of(result), tensors_of(expected), strict=True):
        assert one.is_leaf or function in ("hadamard", "dequantize_pages", "mla_dequantize_pages")
        assert not one.requires_grad or any(one is x for value in graded.values() for x in tensors_of(value))
        assert_same_bits(one.detach(), other)
    for name in WRITTEN:
        for one, other in zip(tensors_of(graded.get(name)), tensors_of(plain.get(name)), strict=True):
            assert one.is_leaf
            assert_same_bits(one.detach(), other)
