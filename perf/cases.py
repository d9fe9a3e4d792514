"""Caches to measure and check with, the bytes they hold, and the error of what was computed from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kvarn_triton as kvarn
from kvarn_triton import PageLayout, reference


@dataclass(frozen=True)
class Shape:
    """The attention heads of a model."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.num_q_heads // self.num_kv_heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("Llama-3.1-8B", 32, 8, 128),
        Shape("Qwen3-32B", 64, 8, 128),
        Shape("Qwen3-30B-A3B", 32, 4, 128),
        Shape("Gemma-3-27B", 32, 16, 128),
        Shape("gpt-oss-120b", 64, 8, 64),
        Shape("Llama-2-7B", 32, 32, 128),
        Shape("Qwen3-235B-A22B", 64, 4, 128),
        Shape("Gemma-2-9B", 16, 8, 256),
    )
}


DEFAULT_SHAPES = ("Llama-3.1-8B", "Qwen3-32B", "gpt-oss-120b", "Gemma-2-9B")
"""What a sweep takes that isn't asked for shapes, or for everything (`--full`)."""


@dataclass
class DecodeCase:
    """The arguments of one `decode_attention` call; shapes as documented there."""

    layout: PageLayout
    q: torch.Tensor
    pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    raw_pages: torch.Tensor | None = None
    raw_table: torch.Tensor | None = None
    num_quantized: torch.Tensor | None = None
    sink_len: int = 0

    @property
    def arguments(self) -> tuple:
        """The positional arguments."""
        return self.q, self.pages, self.block_table, self.seq_lens, self.layout

    @property
    def options(self) -> dict:
        """The keyword arguments that describe the raw part of the cache."""
        if self.raw_pages is None:
            return {}
        names = ("raw_pages", "raw_table", "num_quantized", "sink_len")
        return {name: getattr(self, name) for name in names}

    def workspace_size(self, **how: Any) -> int:
        """Return the bytes of workspace of the call; `how` are `table` and `split_size`."""
        raw = 0 if self.raw_table is None else self.raw_table.shape[1]
        batch, num_q_heads, _ = self.q.shape
        return kvarn.decode_workspace_size(
            batch,
            num_q_heads,
            self.pages.shape[1],
            self.layout,
            self.block_table.shape[1],
            self.q.device,
            max_raw_pages=raw,
            dtype=self.q.dtype,
            **how,
        )

    def rows(self, first: int, last: int) -> DecodeCase:
        """Return the case of sequences `first` to `last - 1`, with tables of their own, on the same pages."""
        raw = self.raw_table is not None
        return dataclasses.replace(
            self,
            q=self.q[first:last].clone(),
            block_table=self.block_table[first:last].clone(),
            seq_lens=self.seq_lens[first:last].clone(),
            raw_table=self.raw_table[first:last].clone() if raw else None,
            num_quantized=self.num_quantized[first:last].clone() if raw else None,
        )

    def to(self, device: str | torch.device) -> DecodeCase:
        """Return the case with every tensor on `device`."""
        moved = {
            name: value.to(device)
            for name, value in ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def build_cache(
    shape: Shape,
    layout: PageLayout,
    seq_lens: Sequence[int],
    *,
    sink_len: int = 0,
    tail_pages: int = 0,
    dtype: torch.dtype = torch.float16,
    device: str | torch.device = "cpu",
    distinct_pages: int | None = None,
    seed: int = 0,
    by_reference: bool = False,
    poison: bool = True,
) -> DecodeCase:
    """Build a decode call over random keys and values in shuffled pages.

    Args:
        seq_lens: tokens of each sequence.
        sink_len: first tokens that stay raw.
        tail_pages: finished body pages that stay raw, beside the unfinished one. With 0 and no sink there is no raw pool
            and an unfinished last page is quantized too.
        dtype: of q and of the raw pages.
        distinct_pages: how many different pages are quantized and then repeated; by default each page is its own.
        by_reference: quantize with `kvarn_triton.reference` instead of the kernel.
        poison: fill what must not be read with NaN: unused pages, raw tokens past the end of a sequence.
    """
    size, has_raw = layout.page_size, bool(sink_len or tail_pages)
    generator = torch.Generator(device).manual_seed(seed)
    body_lens = [max(length - sink_len, 0) for length in seq_lens]
    num_body = [-(-length // size) for length in body_lens]
    quantized = [max(n // size - tail_pages, 0) for n in body_lens] if has_raw else num_body
    batch, max_pages = len(seq_lens), max(max(num_body, default=0), 1)
    num_pages = batch * max_pages + 1
    pages = torch.full(layout.pages_shape(num_pages, shape.num_kv_heads), 0xFF, dtype=torch.uint8, device=device)
    ids = torch.randperm(num_pages, generator=generator, device=device)[: batch * max_pages].view(batch, max_pages)
    used = torch.arange(max_pages, device=device) < torch.tensor(quantized, device=device)[:, None]
    fill_pages(pages, ids[used], layout, shape.head_dim, dtype, distinct_pages, generator, by_reference)
    case = DecodeCase(
        layout=layout,
        q=torch.randn(batch, shape.num_q_heads, shape.head_dim, generator=generator, device=device).to(dtype),
        pages=pages,
        block_table=ids.to(torch.int32),
        seq_lens=torch.tensor(list(seq_lens), dtype=torch.int32, device=device),
    )
    if has_raw:
        case.sink_len = sink_len
        case.num_quantized = torch.tensor(quantized, dtype=torch.int32, device=device)
        _add_raw_pages(case, shape, tail_pages + 1, dtype, generator, poison)
    return case


def fill_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    head_dim: int,
    dtype: torch.dtype,
    distinct_pages: int | None,
    generator: torch.Generator,
    by_reference: bool = False,
) -> None:
    """Write random keys and values to `pages[page_ids]`; after `distinct_pages` of them the same ones come again."""
    count = len(page_ids)
    distinct = min(count, distinct_pages or count)
    if count == 0:
        return
    shape = (distinct * layout.page_size, pages.shape[1], head_dim)
    k, v = (torch.randn(shape, generator=generator, device=pages.device).to(dtype) for _ in range(2))
    records = pages.new_empty(distinct, *pages.shape[1:])
    store = reference.store_pages if by_reference else kvarn.store_pages
    store(k, v, records, torch.arange(distinct, device=pages.device), layout)
    for chunk in torch.arange(count, device=pages.device).split(1024):
        pages[page_ids[chunk].long()] = records[chunk % distinct]


def _add_raw_pages(
    case: DecodeCase, shape: Shape, num_tail_slots: int, dtype: torch.dtype, generator: torch.Generator, poison: bool
) -> None:
    """Give `case` a raw pool with random rotated keys and values for its sinks and tails."""
    size, device, batch = case.layout.page_size, case.pages.device, len(case.seq_lens)
    columns = -(-case.sink_len // size) + num_tail_slots
    count = batch * columns + 1
    case.raw_table = torch.randperm(count, generator=generator, device=device)[: batch * columns].view(batch, columns).int()
    case.raw_pages = torch.empty(count, 2, shape.num_kv_heads, size, shape.head_dim, dtype=dtype, device=device)
    case.raw_pages.normal_(generator=generator)
    if not poison:
        return
    clean = case.raw_pages.clone()
    case.raw_pages.fill_(float("nan"))
    for row, seq_len in enumerate(case.seq_lens.tolist()):
        first = case.sink_len + int(case.num_quantized[row]) * size
        positions = [*range(min(seq_len, case.sink_len)), *range(first, seq_len)]
        if positions:
            slots = reference.raw_slots(
                torch.tensor([positions], device=device), case.raw_table[row : row + 1], sink_len=case.sink_len, page_size=size
            )[0]
            case.raw_pages[slots // size, :, :, slots % size] = clean[slots // size, :, :, slots % size]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||out - expected|| / ||expected|| in float64; infinity where `out` isn't finite."""
    out, expected = out.double(), expected.double().to(out.device)
    if not torch.isfinite(out).all():
        return float("inf")
    norm = expected.norm().item()
    return (out - expected).norm().item() / norm if norm else out.norm().item()


def decode_errors(case: DecodeCase, out: torch.Tensor, row: int) -> tuple[float, float]:
    """Return the errors of one sequence against float64: of `out`, and of the same formula in the dtype of q.

    The formula is plain attention on the dequantized cache: rotated query, keys, values and weights rounded to the dtype of
    q, sums in float32, which is what a 16-bit kernel computes.
    """
    seq_len, dtype = int(case.seq_lens[row]), case.q.dtype
    if seq_len == 0:
        return out[row].double().norm().item(), 0.0
    options = case.options
    if options:
        options["num_quantized"] = int(options["num_quantized"][row])
    k, v = reference.gather_cache(case.pages, case.block_table, seq_len, case.layout, row=row, dtype=torch.float64, **options)
    q = case.q[row].unflatten(0, (k.shape[0], -1))
    scale = case.layout.head_dim**-0.5
    exact = _attend(reference.hadamard(q.double()), k, v, scale, torch.float64)
    q, k, v = (x.to(dtype).float() for x in (reference.hadamard(q.float()), k, v))
    plain = _attend(q, k, v, scale, dtype).to(dtype)
    return relative_error(out[row].view_as(exact), exact), relative_error(plain, exact)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Attend with rotated q [num_kv_heads, group, head_dim] to k, v [num_kv_heads, seq_len, head_dim]; rotate back."""
    weights = torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1)
    return reference.hadamard(weights.to(dtype).to(v.dtype) @ v)


def cache_bytes(case: DecodeCase) -> int:
    """Return how many bytes of pages and raw tokens a decode call must read."""
    heads, layout = case.pages.shape[1], case.layout
    raw_token = 0 if case.raw_pages is None else 2 * layout.head_dim * case.raw_pages.element_size()
    total = 0
    for row, seq_len in enumerate(case.seq_lens.tolist()):
        num_body = -(-max(seq_len - case.sink_len, 0) // layout.page_size)
        quantized = num_body if case.num_quantized is None else int(case.num_quantized[row])
        raw_tokens = max(seq_len - quantized * layout.page_size, 0)
        total += heads * (quantized * layout.page_bytes + raw_tokens * raw_token)
    return total


DISTRIBUTIONS = ("gaussian", "channel outliers", "token outliers", "small scale 1e-2", "mean offset")


def draw_tiles(distribution: str, shape: Sequence[int], *, seed: int = 0) -> torch.Tensor:
    """Return float32 tiles [..., tokens, channels] whose outliers and means are those that `distribution` names."""
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.randn(*shape, generator=generator)
    channels = torch.randperm(shape[-1], generator=generator)[:4]
    tokens = torch.randperm(shape[-2], generator=generator)[: max(shape[-2] // 32, 1)]
    if distribution == "channel outliers":
        tiles[..., channels] *= 10
    elif distribution == "token outliers":
        tiles[..., tokens, :] *= 10
    elif distribution == "small scale 1e-2":
        tiles *= 1e-2
    elif distribution == "mean offset":
        tiles += 3 * torch.randn(*shape[:-2], 1, shape[-1], generator=generator)
    elif distribution != "gaussian":
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    return tiles
