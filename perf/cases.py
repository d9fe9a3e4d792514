"""Caches to measure and check with, the bytes they hold, and the error of what was computed from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kvarn_triton as kvarn
from kvarn_triton import PageLayout, reference
from kvarn_triton.testing import relative_error

ERROR_RATIO = 2.0
"""How many times the error of the plain formula in the dtype of the query attention may have."""


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
    def call(self) -> dict[str, Any]:
        """The arguments of `decode_attention` by name."""
        names = ["q", "pages", "block_table", "seq_lens", "layout"]
        names += [] if self.raw_pages is None else ["raw_pages", "raw_table", "num_quantized", "sink_len"]
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

    def schedule(self, **how: Any) -> kvarn.DecodeSchedule:
        """Return the schedule of the call, as a server makes it once a step; `how` are `table` and `split_size`."""
        raw = {} if self.raw_pages is None else {name: self.call[name] for name in ("raw_table", "num_quantized", "sink_len")}
        heads = self.q.shape[1], self.pages.shape[1]
        return kvarn.schedule_decode(self.layout, self.seq_lens, self.block_table, *heads, dtype=self.q.dtype, **raw, **how)

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


def build_cache(
    shape: Shape,
    layout: PageLayout,
    seq_lens: Sequence[int],
    *,
    sink_len: int = 0,
    tail_pages: int = 0,
    dtype: torch.dtype = torch.float16,
    distinct_pages: int | None = None,
    seed: int = 0,
) -> DecodeCase:
    """Build a decode call over random keys and values in shuffled pages on the GPU.

    Args:
        seq_lens: tokens of each sequence.
        sink_len: first tokens that stay raw.
        tail_pages: finished body pages that stay raw, beside the unfinished one. With 0 and no sink there is no raw pool
            and an unfinished last page is quantized too.
        dtype: of q and of the raw pages.
        distinct_pages: how many different pages are quantized and then repeated; by default each page is its own.
    """
    size, has_raw, device = layout.page_size, bool(sink_len or tail_pages), "cuda"
    generator = torch.Generator(device).manual_seed(seed)
    body_lens = [max(length - sink_len, 0) for length in seq_lens]
    num_body = [-(-length // size) for length in body_lens]
    quantized = [max(n // size - tail_pages, 0) for n in body_lens] if has_raw else num_body
    batch, max_pages = len(seq_lens), max(max(num_body, default=0), 1)
    num_pages = batch * max_pages + 1
    pages = torch.full(layout.pages_shape(num_pages, shape.num_kv_heads), 0xFF, dtype=torch.uint8, device=device)
    ids = torch.randperm(num_pages, generator=generator, device=device)[: batch * max_pages].view(batch, max_pages)
    used = torch.arange(max_pages, device=device) < torch.tensor(quantized, device=device)[:, None]
    fill_pages(pages, ids[used], layout, shape.head_dim, dtype, distinct_pages, generator)
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
        columns = -(-sink_len // size) + tail_pages + 1
        count = batch * columns + 1
        raw_ids = torch.randperm(count, generator=generator, device=device)[: batch * columns]
        case.raw_table = raw_ids.view(batch, columns).int()
        case.raw_pages = torch.empty(count, 2, shape.num_kv_heads, size, shape.head_dim, dtype=dtype, device=device)
        case.raw_pages.normal_(generator=generator)
    return case


def fill_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    head_dim: int,
    dtype: torch.dtype,
    distinct_pages: int | None,
    generator: torch.Generator,
) -> None:
    """Write random keys and values to `pages[page_ids]`; after `distinct_pages` of them the same ones come again."""
    count = len(page_ids)
    distinct = min(count, distinct_pages or count)
    if count == 0:
        return
    shape = (distinct * layout.page_size, pages.shape[1], head_dim)
    k, v = (torch.randn(shape, generator=generator, device=pages.device).to(dtype) for _ in range(2))
    records = pages.new_empty(distinct, *pages.shape[1:])
    kvarn.store_pages(k, v, records, torch.arange(distinct, device=pages.device), layout)
    for chunk in torch.arange(count, device=pages.device).split(1024):
        pages[page_ids[chunk].long()] = records[chunk % distinct]


def attention_of_row(call: Mapping[str, Any], row: int, dtype: torch.dtype, last: int | None = None) -> torch.Tensor:
    """Return what the queries of one sequence see, by the plain formula on the dequantized cache.

    Rotated queries, keys, values and weights are rounded to `dtype`, sums are in float32, as in a 16-bit kernel: the yardstick
    for errors. With float64 nothing is rounded: what is right.

    Args:
        call: arguments of `decode_attention` or `prefill_attention` by name; no window beside a tree mask or spans.
        row: the sequence.
        dtype: of operands.
        last: only so many query tokens at the end.

    Returns:
        [query tokens, num_q_heads, v_head_dim]
    """
    q, layout = call["q"], call["layout"]
    first, end = (row, row + 1) if "cu_seqlens_q" not in call else call["cu_seqlens_q"][row : row + 2].tolist()
    length, count = int(call["seq_lens"][row]), end - first
    if length == 0 or count == 0:
        return q.new_zeros(count, q.shape[1], layout.v_head_dim, dtype=dtype)
    sums, new = torch.float64 if dtype == torch.float64 else torch.float32, call.get("k") is not None
    past_only = call.get("past_only", False)
    raw = {name: call[name] for name in ("raw_pages", "raw_table", "sink_len") if name in call}
    raw |= {name: call[name] for name in ("kv_indptr", "kv_indices") if name in call}
    counts = call.get("num_quantized")
    k, v = reference.gather_cache(
        call["pages"], call["block_table"], length - count if new or past_only else length, layout, row=row, dtype=sums,
        num_quantized=None if counts is None else int(counts[row]), **raw,
    )  # fmt: skip
    if new:
        more = (reference.hadamard(call[name][first:end].to(sums)).transpose(0, 1) for name in ("k", "v"))
        k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), more, strict=True))
    first = end - min(last or count, count)
    positions = torch.arange(length, device=q.device)
    distance = positions[length - (end - first) :, None] - positions
    num_kept = call.get("sink_len", 0) if call.get("keep_sink") else 0
    visible = (distance >= 0) & ((distance < (call.get("window") or length)) | (positions < num_kept))
    own = torch.arange(count, device=q.device)
    if (spans := call.get("span_ends")) is not None:
        visible[:, length - count :] |= own < spans[first:end, None]
    if (words := call.get("tree_mask")) is not None and count <= 64:
        bits = (words[first:end, None] >> own) & 1 == 1
        visible[:, length - count :] = torch.where(bits.any(1, keepdim=True), bits, visible[:, length - count :])
    visible = visible[:, : k.shape[1]]
    q, k, v = (x.to(dtype).to(sums) for x in (reference.hadamard(q[first:end].to(sums)), k, v))
    scores = torch.einsum("nhgd,htd->nhgt", q.unflatten(1, (k.shape[0], -1)), k)
    scores = scores * (call.get("sm_scale") or layout.head_dim**-0.5)
    if cap := call.get("soft_cap"):
        scores = cap * torch.tanh(scores / cap)
    scores = torch.where(visible[:, None, None], scores, -torch.inf)
    if (sinks := call.get("sinks")) is not None:
        logits = sinks.to(sums).view(1, *scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, logits), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]].to(dtype).to(sums)
    return reference.hadamard(torch.einsum("nhgt,htd->nhgd", weights, v)).flatten(1, 2).to(dtype)


def attention_errors(call: Mapping[str, Any], out: torch.Tensor, row: int, last: int | None = None) -> tuple[float, float]:
    """Return the errors of one sequence against float64: of `out`, and of the same formula in the dtype of q."""
    exact = attention_of_row(call, row, torch.float64, last)
    end = row + 1 if "cu_seqlens_q" not in call else int(call["cu_seqlens_q"][row + 1])
    plain = attention_of_row(call, row, call["q"].dtype, last)
    return relative_error(out[end - len(exact) : end], exact), relative_error(plain, exact)


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
