"""Trees of drafts: from parents to words of bits, which attention takes as `tree_mask`."""

from __future__ import annotations

import torch

from .. import reference
from ..checks import INDICES, check_tensor, require


def build_tree_mask(parents: torch.Tensor, cu_seqlens_q: torch.Tensor) -> torch.Tensor:
    """Return which new tokens each new token of a tree sees: itself and its ancestors, computed on the device.

    Args:
        parents: int32 or int64 [total_tokens]; of each new token the number of its parent among the new tokens of its sequence.
            Below 0 for a root, which follows the tokens before the new ones. A parent may stand before or behind.
        cu_seqlens_q: int32 [batch + 1], as in `prefill_attention`.

    Returns:
        int64 [total_tokens], what `prefill_attention` takes as `tree_mask`. 0, which means causal, for tokens of a sequence
        with more than 64 new ones, and of no sequence.

    Raises:
        ValueError: for a wrong shape, dtype or device.
    """
    check_tensor("parents", parents, [None], INDICES, contiguous_dims=0)
    check_tensor("cu_seqlens_q", cu_seqlens_q, [None], torch.int32, device=parents.device, contiguous_dims=0)
    require(cu_seqlens_q.shape[0] >= 1, "cu_seqlens_q", "at least 1 element", cu_seqlens_q.shape[0])
    return reference.build_tree_mask(parents, cu_seqlens_q)
