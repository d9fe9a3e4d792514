"""Pages, tails and attention in plain PyTorch. The cache model is that of `docs/method.md`, section 4.

A sequence is [sink | quantized body pages | tail body pages]. Token `p` below `sink_len` is slot `p % page_size` of raw page
`raw_table[b, p // page_size]`. Later ones belong to body page `j = (p - sink_len) // page_size`: quantized in
`pages[block_table[b, j]]` if `j < num_quantized[b]`, else raw in `raw_table[b, num_sink_pages + j % num_tail_slots]`.
"""

from __future__ import annotations

import math

import torch

from ..encoder import DEFAULT, Encoder
from ..layout import PageLayout
from .codec import HALF_MAX, dequantize, encode, hadamard, pack, unpack, working_dtype


def encode_records(k: torch.Tensor, v: torch.Tensor, layout: PageLayout, encoder: Encoder = DEFAULT) -> torch.Tensor:
    """Return the records uint8 [..., page_bytes] of rotated tiles `k` and `v` [..., page_size, head_dim]."""
    records = torch.zeros(*k.shape[:-2], layout.page_bytes, dtype=torch.uint8, device=k.device)
    fields = layout.fields(records)
    for name, tile, bits, per in (("k", k, layout.k_bits, "channel"), ("v", v, layout.v_bits, "token")):
        codes, scale, zero, norm, gain = encode(tile, bits, per=per, encoder=encoder)  # type: ignore[arg-type]
        fields[f"{name}_codes"].copy_(pack(codes, bits, per=per))  # type: ignore[arg-type]
        for field, value in (("scale", scale), ("zero", zero), ("norm", norm), ("gain", gain)):
            fields[f"{name}_{field}"].copy_(value)
    return records


def decode_records(
    records: torch.Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated k and v [..., page_size, head_dim] in `dtype` of records uint8 [..., page_bytes]."""
    fields = {name: field if field.dtype == torch.uint8 else field.to(dtype) for name, field in layout.fields(records).items()}
    k_codes = unpack(fields["k_codes"], layout.k_bits, layout.page_size, layout.head_dim, per="channel")
    v_codes = unpack(fields["v_codes"], layout.v_bits, layout.page_size, layout.head_dim, per="token")
    k = dequantize(k_codes, fields["k_scale"], fields["k_zero"], per="channel") * fields["k_norm"].unsqueeze(-1)
    v = dequantize(v_codes, fields["v_scale"], fields["v_zero"], per="token") * fields["v_norm"].unsqueeze(-2)
    return k * fields["k_gain"].unsqueeze(-1), v * fields["v_gain"].unsqueeze(-1)


def store_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    *,
    token_starts: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize pages straight from activations; see `kvarn_triton.store_pages`."""
    if token_starts is None:
        token_starts = torch.arange(page_ids.shape[0], device=k.device) * layout.page_size
    kept = page_ids >= 0
    tokens = token_starts[kept].long()[:, None] + torch.arange(layout.page_size, device=k.device)
    k_tiles, v_tiles = (hadamard(x[tokens].transpose(1, 2).to(working_dtype(x.dtype))) for x in (k, v))
    pages[page_ids[kept].long()] = encode_records(k_tiles, v_tiles, layout, encoder)


def dequantize_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    *,
    dtype: torch.dtype = torch.float16,
    rotated: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of pages; see `kvarn_triton.dequantize_pages`."""
    kept = page_ids >= 0
    shape = (page_ids.shape[0], layout.page_size, pages.shape[1], layout.head_dim)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=pages.device), torch.empty(shape, dtype=dtype, device=pages.device)
    for result, tile in zip(out, decode_records(pages[page_ids[kept].long()], layout), strict=True):
        result[~kept] = 0
        result[kept] = (tile if rotated else hadamard(tile)).transpose(1, 2).to(result.dtype)
    return out


def raw_slots(positions: torch.Tensor, raw_table: torch.Tensor, *, sink_len: int, page_size: int) -> torch.Tensor:
    """Return where tokens live in the raw pool; see `kvarn_triton.raw_slots`."""
    num_sink_pages = -(-sink_len // page_size)
    num_tail_slots = raw_table.shape[1] - num_sink_pages
    body = positions - sink_len
    in_sink = body < 0
    column = torch.where(
        in_sink, positions // page_size, num_sink_pages + (body.clamp_min(0) // page_size) % max(num_tail_slots, 1)
    )
    column = column.clamp(0, raw_table.shape[1] - 1).long()
    offset = torch.where(in_sink, positions, body) % page_size
    slots = raw_table.gather(1, column).long() * page_size + offset
    return torch.where(positions < 0, -1, slots)


def append_tokens(k: torch.Tensor, v: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Rotate tokens and write them into the raw pool; see `kvarn_triton.append_tokens`."""
    page_size = raw_pages.shape[3]
    kept = slots >= 0
    page, offset = slots[kept].long() // page_size, slots[kept].long() % page_size
    for half, x in enumerate((k, v)):
        rotated = hadamard(x[kept].to(working_dtype(x.dtype)))
        if raw_pages.dtype == torch.float16:
            rotated = rotated.clamp(-HALF_MAX, HALF_MAX)
        raw_pages[page, half, :, offset] = rotated.to(raw_pages.dtype)


def commit_pages(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: PageLayout,
    *,
    sink_len: int = 0,
    keep_pages: int = 0,
    max_new_pages: int = 1,
    advance: bool = True,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize finished pages of the tail; see `kvarn_triton.commit_pages`."""
    num_sink_pages = -(-sink_len // layout.page_size)
    num_tail_slots = raw_table.shape[1] - num_sink_pages
    for b in range(block_table.shape[0]):
        finished = max(int(committed_lens[b]) - sink_len, 0) // layout.page_size - keep_pages
        first = int(num_quantized[b])
        last = min(finished, first + max_new_pages, block_table.shape[1])
        for j in range(first, last):
            page = int(block_table[b, j])
            if page >= 0:
                raw = raw_pages[int(raw_table[b, num_sink_pages + j % num_tail_slots])]
                k, v = raw.to(working_dtype(raw.dtype)).unbind(0)
                pages[page] = encode_records(k, v, layout, encoder)
        if advance:
            num_quantized[b] = max(first, last)


def gather_cache(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: int,
    layout: PageLayout,
    *,
    row: int,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: int | None = None,
    sink_len: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated k and v [num_kv_heads, seq_len, head_dim] in `dtype` that sequence `row` attends to."""
    page_size, num_sink_pages = layout.page_size, -(-sink_len // layout.page_size)
    parts = [pages.new_zeros(2, pages.shape[1], 0, layout.head_dim, dtype=dtype)]

    def raw(column: int, length: int) -> torch.Tensor:
        assert raw_pages is not None and raw_table is not None
        return raw_pages[int(raw_table[row, column]), :, :, :length].to(dtype)

    for start in range(0, min(seq_len, sink_len), page_size):
        parts.append(raw(start // page_size, min(seq_len, sink_len, start + page_size) - start))
    for j in range(-(-max(seq_len - sink_len, 0) // page_size)):
        length = min(page_size, seq_len - sink_len - j * page_size)
        if num_quantized is None or j < num_quantized:
            k, v = decode_records(pages[int(block_table[row, j])], layout, dtype)
            parts.append(torch.stack((k, v))[:, :, :length])
        else:
            assert raw_table is not None
            parts.append(raw(num_sink_pages + j % (raw_table.shape[1] - num_sink_pages), length))
    k, v = torch.cat(parts, dim=2).unbind(0)
    return k, v


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    sm_scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    table: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with one query token per sequence; see `kvarn_triton.decode_attention`. How it is split plays no part here."""
    dtype = working_dtype(q.dtype)
    group = q.shape[1] // pages.shape[1]
    scale = layout.head_dim**-0.5 if sm_scale is None else sm_scale
    result = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    rotated = hadamard(q.to(dtype))
    for b in range(q.shape[0]):
        k, v = gather_cache(
            pages,
            block_table,
            int(seq_lens[b]),
            layout,
            row=b,
            raw_pages=raw_pages,
            raw_table=raw_table,
            num_quantized=None if num_quantized is None else int(num_quantized[b]),
            sink_len=sink_len,
            dtype=dtype,
        )
        scores = torch.einsum("hgd,htd->hgt", rotated[b].unflatten(0, (-1, group)), k) * scale
        row_lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - torch.where(row_lse == -math.inf, 0.0, row_lse)[..., None])
        row_out = hadamard(torch.einsum("hgt,htd->hgd", weights, v))
        result[b] = row_out.flatten(0, 1).to(result.dtype)
        lse[b] = row_lse.flatten().float()
    return (result, lse) if return_lse else result


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two partial attention results; see `kvarn_triton.merge_states`."""
    dtype = working_dtype(out_a.dtype)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(top == -math.inf, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    parts = torch.where(weight_a[..., None] > 0, out_a.to(dtype) * weight_a[..., None], 0.0)
    parts = parts + torch.where(weight_b[..., None] > 0, out_b.to(dtype) * weight_b[..., None], 0.0)
    merged = parts / torch.where(total > 0, total, 1.0)[..., None]
    return merged.to(out_a.dtype), (torch.log(total) + top).float()
