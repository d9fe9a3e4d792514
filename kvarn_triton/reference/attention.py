"""Attention over a cache in plain PyTorch: which token a query sees, and what it makes of them.

`prefill_attention` is the definition; decode attention is its case of one query token per sequence. How a call is split
among programs plays no part here.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..layout import PageLayout
from .cache import body_page_ids, decode_records
from .codec import hadamard, working_dtype

MOST_DRAFTS = 64
"""New tokens of a sequence that a word of a tree mask has bits for."""


def gather_cache(
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_len: int,
    layout: PageLayout,
    *,
    row: int,
    start: int = 0,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: int | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated k and v in `dtype` of tokens `start` to `seq_len`.

    k is [num_kv_heads, seq_len - start, head_dim], v the same with v_head_dim. Pages without such a token are not read.
    """
    page_size, num_sink_pages = layout.page_size, -(-sink_len // layout.page_size)
    page_ids = body_page_ids(block_table, kv_indptr, kv_indices, row)
    head_dims = layout.head_dim, layout.v_head_dim
    parts = [tuple(pages.new_zeros(pages.shape[1], 0, d, dtype=dtype) for d in head_dims)]

    def add(k_and_v: tuple[torch.Tensor, ...], first: int, end: int) -> None:
        """Add what is needed of a page that holds tokens `first` to `end`."""
        parts.append(tuple(x[:, max(start - first, 0) : end - first].to(dtype) for x in k_and_v))

    def raw_page(column: int) -> tuple[torch.Tensor, ...]:
        assert raw_pages is not None and raw_table is not None
        page = raw_pages[int(raw_table[row, column])]
        return tuple(x[..., :d] for x, d in zip(page, head_dims, strict=True))

    for first in range(0, min(seq_len, sink_len), page_size):
        end = min(seq_len, sink_len, first + page_size)
        if end > start:
            add(raw_page(first // page_size), first, end)
    for j in range(-(-max(seq_len - sink_len, 0) // page_size)):
        first = sink_len + j * page_size
        end = min(seq_len, first + page_size)
        if end <= start:
            continue
        if num_quantized is None or j < num_quantized:
            add(decode_records(pages[int(page_ids[j])], layout, dtype), first, end)
        else:
            assert raw_table is not None
            add(raw_page(num_sink_pages + j % (raw_table.shape[1] - num_sink_pages)), first, end)
    k, v = (torch.cat(halves, dim=1) for halves in zip(*parts, strict=True))
    return k, v


def build_tree_mask(parents: torch.Tensor, cu_seqlens_q: torch.Tensor) -> torch.Tensor:
    """Return which new tokens each new token of a tree sees; see `kvarn_triton.build_tree_mask`."""
    token, ends = torch.arange(parents.shape[0], device=parents.device), cu_seqlens_q.long()
    row = torch.bucketize(token, ends[1:], right=True)
    first, end = ends[row], torch.cat((ends[1:], ends[:1]))[row]  # of no sequence, behind the last one: nothing is between
    known = (token >= first) & (token < end) & (end - first <= MOST_DRAFTS)
    up = torch.where(known & (parents >= 0) & (parents < end - first), first + parents, token)
    words = torch.where(known, 1 << (token - first).clamp(0, MOST_DRAFTS - 1), 0)
    for _ in range(6):  # each time ancestors of twice as many generations are known
        words, up = words | words[up], up[up]
    return words


def seen_among(
    first: int,
    last: int,
    tree_mask: torch.Tensor | None,
    span_ends: torch.Tensor | None,
    *,
    window: int | None = None,
    num_kept: int = 0,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which of n new tokens of a sequence, `first` to `last` of a call, see which, bool [n, n], and their places [n].

    A token sees the new tokens up to its own and those before the end of its span. With a window it sees the last of those, and
    the first `num_kept`. A word of a tree mask says instead, whatever the window, which new tokens are seen. The place of a
    token, from which a window over older tokens counts, is its number, or one less than the new tokens that its word shows.
    """
    place = torch.arange(last - first, device=device)
    ends = place + 1 if span_ends is None else torch.maximum(place + 1, span_ends[first:last])
    seen = place[None, :] < ends[:, None]
    if window is not None:
        seen &= (place[:, None] - place[None, :] < window) | (place[None, :] < num_kept)
    if tree_mask is not None and last - first <= MOST_DRAFTS:
        bits = (tree_mask[first:last, None] >> place) & 1
        said = bits.sum(1)
        seen, place = torch.where(said[:, None] > 0, bits > 0, seen), torch.where(said > 0, said - 1, place)
    return seen, place


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    sm_scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    num_kept: int = 0,
    among: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention of q [n, num_q_heads, head_dim] to k, v [num_kv_heads, tokens, head_dim], and lse [n, num_q_heads].

    Values, and with them the result, may have another head_dim than q and k. A query sees the keys at its own position and
    before it; with a window only the last `window` of those, and the first `num_kept` of the sequence. `among` says instead
    which of the last n keys, those of the queries' own tokens, are seen (`seen_among`).
    """
    group = q.shape[1] // k.shape[0]
    scores = torch.einsum("nhgd,htd->nhgt", q.unflatten(1, (-1, group)), k).flatten(1, 2) * sm_scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    if window is not None:
        visible &= (distance < window) | (key_positions < num_kept)
    if among is not None:
        visible[:, len(key_positions) - len(among) :] = among
    scores = torch.where(visible[:, None], scores, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype))
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    # What a query doesn't see has no weight, whatever it is: infinity times zero is not a number.
    bad = ~v.isfinite()
    out = torch.einsum("nhgt,htd->nhgd", weights.unflatten(1, (-1, group)), torch.where(bad, 0.0, v))
    touched = torch.einsum("nt,htd->nhd", visible.to(v.dtype), bad.to(v.dtype)) > 0
    return torch.where(touched[:, :, None], math.nan, out).flatten(1, 2), lse


@torch.no_grad()
def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    layout: PageLayout,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    keep_sink: bool = False,
    config: object = None,
    tree_mask: torch.Tensor | None = None,
    span_ends: torch.Tensor | None = None,
    past_only: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with several query tokens per sequence; see `kvarn_triton.prefill_attention`."""
    dtype = working_dtype(q.dtype)
    sm_scale = layout.head_dim**-0.5 if sm_scale is None else sm_scale
    result = q.new_zeros(*q.shape[:2], layout.v_head_dim) if out is None else out
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float32, device=q.device)
    for b in range(seq_lens.shape[0]):
        seq_len, first, last = int(seq_lens[b]), int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1])
        if first == last:
            continue
        before = seq_len - (last - first)
        positions = torch.arange(before, seq_len, device=q.device)
        start = 0 if window is None else max(before - window + 1, 0)
        cached = seq_len if k is None and not past_only else max(before, 0)
        num_kept = sink_len if keep_sink else 0
        query_positions, among = positions, None
        if tree_mask is not None or span_ends is not None:
            among, places = seen_among(
                first, last, tree_mask, span_ends, window=window, num_kept=num_kept - before, device=q.device
            )  # fmt: skip
            query_positions = before + places
        # What no query sees isn't read: it may belong to somebody else by now.
        spans = [(0, max(min(num_kept, start, cached), 0)), (min(start, cached), cached)]
        tables: dict[str, Any] = {
            "raw_pages": raw_pages, "raw_table": raw_table, "kv_indptr": kv_indptr, "kv_indices": kv_indices,
            "num_quantized": None if num_quantized is None else int(num_quantized[b]), "sink_len": sink_len,
        }  # fmt: skip
        parts = [
            gather_cache(pages, block_table, end, layout, row=b, start=begin, dtype=dtype, **tables) for begin, end in spans
        ]
        keys, values = (torch.cat(halves, dim=1) for halves in zip(*parts, strict=True))
        key_positions = torch.cat([torch.arange(begin, end, device=q.device) for begin, end in spans])
        if k is not None and v is not None:
            new_keys, new_values = (hadamard(x[first:last].to(dtype)).transpose(0, 1) for x in (k, v))
            keys, values = torch.cat((keys, new_keys), dim=1), torch.cat((values, new_values), dim=1)
            key_positions = torch.cat((key_positions, positions))
        rotated, row_lse = attend(
            hadamard(q[first:last].to(dtype)), keys, values, query_positions, key_positions, sm_scale,
            window=window, soft_cap=soft_cap, sinks=sinks, num_kept=num_kept, among=among,
        )  # fmt: skip
        result[first:last] = hadamard(rotated).to(result.dtype)
        lse[first:last] = row_lse.float()
    return (result, lse) if return_lse else result


@torch.no_grad()
def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    table: object = None,
    keep_sink: bool = False,
    schedule: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with one query token per sequence; see `kvarn_triton.decode_attention`."""
    one_each = torch.arange(q.shape[0] + 1, device=q.device)
    return prefill_attention(
        q, pages, block_table, seq_lens, one_each, layout, raw_pages=raw_pages, raw_table=raw_table,
        num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices, sm_scale=sm_scale,
        window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse, keep_sink=keep_sink,
    )  # fmt: skip


@torch.no_grad()
def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor | None = None, lse_b: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial attention results, two or a stack of them; see `kvarn_triton.merge_states`."""
    dtype = working_dtype(out_a.dtype)
    if out_b is not None and lse_b is not None:
        out_a, lse_a = torch.stack((out_a, out_b)), torch.stack((lse_a, lse_b))
    outs, lses = out_a.to(dtype), lse_a.to(dtype)
    top = lses.amax(dim=0)
    some = top > -math.inf
    # Equal numbers are compared because both may be infinite.
    weights = torch.where((lses == top) & some, 1.0, torch.exp(lses - torch.where(some, top, 0.0)))
    total = weights.sum(dim=0)
    merged = torch.where(weights[..., None] > 0, outs * weights[..., None], 0.0).sum(dim=0)
    merged = merged / torch.where(total == 0, 1.0, total)[..., None]
    return merged.to(out_a.dtype), (torch.log(total) + top).float()
