"""What tests and benchmarks share: a cache built from random activations, error metrics, counted bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import reference
from ..encoder import DEFAULT, Encoder
from ..layout import PageLayout


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
    case: CacheCase,
    sm_scale: float | None = None,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return plain attention over the dequantized cache with operands and weights rounded to `dtype`, sums in float32.

    This is what a 16-bit attention kernel computes on the same cache: the yardstick for the error of `decode_attention`.
    """
    scale = case.layout.head_dim**-0.5 if sm_scale is None else sm_scale
    out = case.q.new_zeros(*case.q.shape[:2], case.layout.v_head_dim, dtype=torch.float32)
    rotated = reference.hadamard(case.q.float()).to(dtype).float()
    for b, length in enumerate(case.seq_lens.tolist()):
        if length == 0:
            continue
        k, v = gathered(case, b, torch.float32, start=0 if window is None else max(length - window, 0))
        k, v = k.to(dtype).float(), v.to(dtype).float()
        q = rotated[b].unflatten(0, (k.shape[0], -1))
        scores = torch.einsum("hgd,htd->hgt", q, k) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(*q.shape[:2], 1)), dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]]
        out[b] = reference.hadamard(torch.einsum("hgt,htd->hgd", weights.to(dtype).float(), v)).flatten(0, 1)
    return out.to(dtype)


def gathered(case: CacheCase, row: int, dtype: torch.dtype, *, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated keys and values of one sequence of a case; see `reference.gather_cache`."""
    return reference.gather_cache(
        case.pages,
        case.block_table,
        int(case.seq_lens[row]),
        case.layout,
        row=row,
        start=start,
        raw_pages=case.raw_pages,
        raw_table=case.raw_table,
        num_quantized=int(case.num_quantized[row]),
        sink_len=case.sink_len,
        dtype=dtype,
    )


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected, in float64."""
    expected = expected.double()
    return float((result.double() - expected).norm() / expected.norm())


def decode_bytes(layout: PageLayout, seq_lens: Sequence[int], num_q_heads: int, num_kv_heads: int) -> int:
    """Return the least bytes that decode attention over quantized pages moves: records in, queries in, outputs out."""
    records = sum(-(-length // layout.page_size) for length in seq_lens) * num_kv_heads * layout.page_bytes
    return records + len(seq_lens) * num_q_heads * (layout.head_dim + layout.v_head_dim) * 2
