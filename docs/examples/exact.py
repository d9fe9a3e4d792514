"""What the examples compare with: plain attention over the exact keys and values."""

from __future__ import annotations

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return float32 attention of q [query heads, head_dim] to all of k and v [tokens, kv heads, head_dim]."""
    grouped = q.float().unflatten(0, (k.shape[1], -1))
    weights = torch.softmax(torch.einsum("hgd,thd->hgt", grouped, k.float()) * q.shape[-1] ** -0.5, dim=-1)
    return torch.einsum("hgt,thd->hgd", weights, v.float()).flatten(0, 1)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a result, in the Frobenius norm."""
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()
