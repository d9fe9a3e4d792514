"""What tests and benchmarks share: a cache built from random activations, error metrics, counted bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import reference
from ..encoder import DEFAULT, Encoder
from ..layout import PageLayout
from ..reference.attention import attend, seen_among


@dataclass
class CacheCase:
    """A random cache and queries for it, as keyword arguments of `decode_attention` and `commit_pages`."""

    q: torch.Tensor
    pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    layout: PageLayout
    raw_pages: torch.Tensor
    raw_table: torch.Tensor
    num_quantized: torch.Tensor
    sink_len: int

    @property
    def kwargs(self) -> dict:
        """Everything but the query."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "q"}


def cache_case(
    layout: PageLayout,
    seq_lens: Sequence[int],
    *,
    num_kv_heads: int = 2,
    group: int = 4,
    dtype: torch.dtype = torch.float16,
    raw_dtype: torch.dtype | None = None,
    sink_len: int = 0,
    num_tail_slots: int = 2,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    encoder: Encoder = DEFAULT,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> CacheCase:
    """Build a cache of random tokens with shuffled page ids and poisoned spare memory.

    Every finished body page is quantized but for the last `num_tail_slots - 1`. Memory that no sequence owns is NaN (0xFF
    bytes decode to NaN), so that reading it shows.

    Args:
        layout: the page format.
        seq_lens: tokens of each sequence.
        num_kv_heads: key/value heads.
        group: query heads per kv head.
        dtype: dtype of queries and activations.
        raw_dtype: dtype of the raw pool; by default `dtype`.
        sink_len: tokens at the start of every sequence that stay raw.
        num_tail_slots: slots of the tail ring.
        k_scale: factor of the keys.
        v_scale: factor of the values.
        encoder: options of the encoder.
        device: where the tensors live.
        seed: of the random numbers, which are drawn on the CPU.
    """
    random = torch.Generator().manual_seed(seed)
    page_size, batch = layout.page_size, len(seq_lens)
    num_sink_pages = -(-sink_len // page_size)
    body = [max(length - sink_len, 0) for length in seq_lens]
    max_pages = max(max((-(-length // page_size) for length in body), default=0), 1)
    num_quantized = [max(length // page_size - (num_tail_slots - 1), 0) for length in body]
    num_pages, num_raw = batch * max_pages + 2, batch * (num_sink_pages + num_tail_slots) + 1

    pages = torch.full(layout.pages_shape(num_pages, num_kv_heads), 255, dtype=torch.uint8)
    block_table = torch.randperm(num_pages, generator=random)[: batch * max_pages].view(batch, max_pages).int()
    raw_shape = (num_raw, 2, num_kv_heads, page_size, layout.raw_head_dim)
    raw_pages = torch.full(raw_shape, float("nan"), dtype=raw_dtype or dtype)
    raw_table = torch.randperm(num_raw, generator=random)[: num_raw - 1].view(batch, -1).int()

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    for b, length in enumerate(seq_lens):
        k = (draw(length, num_kv_heads, layout.head_dim) * k_scale).to(dtype)
        v = (draw(length, num_kv_heads, layout.v_head_dim) * v_scale).to(dtype)
        count = num_quantized[b]
        starts = sink_len + page_size * torch.arange(count)
        reference.store_pages(k, v, pages, block_table[b, :count], layout, token_starts=starts, encoder=encoder)
        positions = torch.arange(length)[None]
        slots = reference.raw_slots(positions, raw_table[b : b + 1], sink_len=sink_len, page_size=page_size)[0]
        slots[sink_len : sink_len + count * page_size] = -1
        reference.append_tokens(k, v, raw_pages, slots)
    q = draw(batch, num_kv_heads * group, layout.head_dim).to(dtype)
    lens = torch.tensor(list(seq_lens), dtype=torch.int32)
    quantized = torch.tensor(num_quantized, dtype=torch.int32)
    return CacheCase(
        q.to(device),
        pages.to(device),
        block_table.to(device),
        lens.to(device),
        layout,
        raw_pages.to(device),
        raw_table.to(device),
        quantized.to(device),
        sink_len,
    )


def attention_in(
    dtype: torch.dtype,
    arguments: dict[str, Any],
    *,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    span_ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return plain attention over the dequantized cache with operands and weights rounded to `dtype`, sums in float32.

    This is what a 16-bit attention kernel computes on the same cache: the yardstick for the error of `decode_attention` and
    `prefill_attention`, whose arguments these are, with a block table. Weights are attention to unit vectors as values.
    """
    q, layout, pages = arguments["q"], arguments["layout"], arguments["pages"]
    scale = layout.head_dim**-0.5 if sm_scale is None else sm_scale
    raw = {name: arguments[name] for name in ("raw_pages", "raw_table", "sink_len") if name in arguments}
    quantized = arguments.get("num_quantized")
    ends = arguments["cu_seqlens_q"].tolist() if "cu_seqlens_q" in arguments else range(len(q) + 1)
    out = q.new_zeros(*q.shape[:2], layout.v_head_dim, dtype=torch.float32)
    for row, length in enumerate(arguments["seq_lens"].tolist()):
        first, last = ends[row], ends[row + 1]
        if first == last or length == 0:
            continue
        new = last - first if arguments.get("k") is not None else 0
        cached = length - new
        start = 0 if window is None else min(max(length - (last - first) - window + 1, 0), cached)
        k, v = reference.gather_cache(
            pages, arguments["block_table"], cached, layout, row=row, start=start,
            num_quantized=None if quantized is None else int(quantized[row]), **raw,
        )  # fmt: skip
        if new:
            given = (reference.hadamard(arguments[name][first:last].float()).transpose(0, 1) for name in ("k", "v"))
            k, v = (torch.cat(both, dim=1) for both in zip((k, v), given, strict=True))
        rotated, k, v = (x.to(dtype).float() for x in (reference.hadamard(q[first:last].float()), k, v))
        positions = torch.arange(start, length, device=q.device)
        among, places = seen_among(first, last, tree_mask, span_ends, window=window, device=q.device)
        units = torch.eye(len(positions), device=q.device).expand(k.shape[0], -1, -1)
        weights, _ = attend(
            rotated, k, units, length - (last - first) + places, positions, scale,
            window=window, soft_cap=soft_cap, sinks=sinks, among=among,
        )  # fmt: skip
        weights = weights.to(dtype).float().unflatten(1, (k.shape[0], -1))
        out[first:last] = reference.hadamard(torch.einsum("nhgt,htd->nhgd", weights, v)).flatten(1, 2)
    return out.to(dtype)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected, in float64."""
    expected = expected.double()
    return float((result.double() - expected).norm() / expected.norm())


def decode_bytes(layout: PageLayout, seq_lens: Sequence[int], num_q_heads: int, num_kv_heads: int) -> int:
    """Return the least bytes that decode attention over quantized pages moves: records in, queries in, outputs out."""
    records = sum(-(-length // layout.page_size) for length in seq_lens) * num_kv_heads * layout.page_bytes
    return records + len(seq_lens) * num_q_heads * (layout.head_dim + layout.v_head_dim) * 2
