"""What the plug-in for vLLM reads, beside what it should: `watch()` keeps keys and values by vLLM's own slots, uncompressed.

After each step of each layer, in this process, pages that rows complete or begin with are compared with the encoding of those
keys and values, and attention with the formula over them. It takes several times as long, and knows no drafts.
"""

from __future__ import annotations

from typing import Any

import torch

from kvarn_triton import dequantize_pages, reference, store_pages


class Oracle:
    """Keys and values by layer and slot, and what was compared."""

    def __init__(self) -> None:
        self.dense: dict[int, torch.Tensor] = {}
        self.common: Any = None
        self.hits = self.pages = self.rows = 0
        self.least_equal, self.page_error, self.error = 1.0, 0.0, 0.0

    def after(self, layer: Any, query: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor], kv_cache: Any, out: Any) -> None:
        """Compare a step of one layer."""
        pages, size, common = kv_cache.squeeze(2), layer.layout.page_size, self.common
        if id(layer) not in self.dense:
            self.dense[id(layer)] = torch.zeros(2, len(pages) * size, *new[0].shape[1:])
        dense, count = self.dense[id(layer)], common.num_actual_tokens
        live = common.slot_mapping[:count] >= 0  # dummy steps have no slots
        dense[:, common.slot_mapping[:count][live]] = torch.stack([each[:count][live].float() for each in new])
        starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
        ids: set[int] = set()
        for row, length in enumerate(lengths):
            begin, end = starts[row], starts[row + 1]
            if begin == end or not live[begin]:
                continue
            computed = length - (end - begin)
            table = common.block_table_tensor[row, : -(-length // size)].long()
            if end - begin > 1:
                self.hits += computed > 0
                ids.update(table[: length // size].tolist())
            elif length % size == 0:
                ids.add(int(table[-1]))
            places = (table[:, None] * size + torch.arange(size)).flatten()[:length]
            k, v = (half[places].transpose(0, 1) for half in dense)
            positions = torch.arange(length)
            q = query[begin:end].float()
            want, _ = reference.attention.attend(q, k, v, positions[computed:], positions, layer.scale)
            self.error = max(self.error, worst((out[begin:end].float() - want).norm() / want.norm()))
            self.rows += 1
        if ids:
            self.compare(layer.layout, pages, dense, torch.tensor(sorted(ids)))

    def compare(self, layout: Any, pages: torch.Tensor, dense: torch.Tensor, ids: torch.Tensor) -> None:
        """Compare pages with the encoding of the keys and values of their tokens."""
        want = layout.empty_pages(len(ids), pages.shape[1], pages.device)
        store_pages(dense[0], dense[1], want, torch.arange(len(ids)), layout, token_starts=ids * layout.page_size)
        for mine, other in zip(pages[ids], want, strict=True):
            self.least_equal = min(self.least_equal, float((mine == other).float().mean()))
        tokens = dense[:, ids[:, None] * layout.page_size + torch.arange(layout.page_size)]
        for mine, other in zip(dequantize_pages(pages, ids.int(), layout, dtype=torch.float32), tokens, strict=True):
            errors = (mine - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
            self.page_error = max(self.page_error, worst(errors))
        self.pages += len(ids)

    def __str__(self) -> str:
        return (
            f"{self.pages} pages: {100 * self.least_equal:.2f} % of the bytes or more as encoded, values within "
            f"{self.page_error:.1e}; attention of {self.rows} rows within {self.error:.1e}, {self.hits} of them chunks that "
            "begin behind other tokens, hit or their own"
        )


def worst(errors: torch.Tensor) -> float:
    """Return the largest error; a NaN, which Python's max leaves out, is one without bound."""
    return float(errors.nan_to_num(nan=float("inf")).max())


def watch() -> Oracle:
    """Compare from now on; vLLM and the plug-in are imported here."""
    from kvarn_triton.integrations.vllm.backend import KVarNBuilder, KVarNImpl

    oracle, build, forward = Oracle(), KVarNBuilder.build, KVarNImpl.forward

    def building(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        oracle.common = common_attn_metadata
        return build(self, common_prefix_len, common_attn_metadata, fast_build)

    def forwarding(self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, plans: Any, **options: Any) -> Any:
        result = forward(self, layer, query, key, value, kv_cache, plans, **options)
        if plans is not None:
            oracle.after(self, query, (key, value), kv_cache, options["output"])
        return result

    KVarNBuilder.build, KVarNImpl.forward = building, forwarding  # type: ignore[method-assign]
    return oracle
