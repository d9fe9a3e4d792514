"""Multi-head latent attention in plain PyTorch: pages of latents, raw pages of them, and attention with absorbed queries.

A token has a latent of 512 channels, which every query head reads as its key and as its value, and 64 rotary channels, which
are the rest of the key. Latents are rotated and encoded as keys are (`codec.encode`, per channel); rotary channels stay as
they are, in float16. The cache model is that of `cache`, with sinks of whole pages.
"""

from __future__ import annotations

import math

import torch

from ..encoder import DEFAULT, Encoder
from ..mla_layout import LATENT_DIM, ROPE_DIM, TOKEN_DIM, MLALayout
from ..step import Step
from .arithmetic import KERNEL_ORDER, Arithmetic, butterflies
from .attention import attend
from .codec import HALF_MAX, dequantize, encode, hadamard, working_dtype
from .packing import pack, unpack


def _to_half(x: torch.Tensor) -> torch.Tensor:
    """Round to float16; saturate at its largest number instead of overflowing."""
    return x.to(working_dtype(x.dtype)).clamp(-HALF_MAX, HALF_MAX).half()


def encode_latents(
    latents: torch.Tensor,
    rope: torch.Tensor,
    layout: MLALayout,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> torch.Tensor:
    """Return the records uint8 [..., page_bytes] of rotated latents [..., page_size, 512] and rotary channels [..., 64]."""
    records = torch.zeros(*latents.shape[:-2], layout.page_bytes, dtype=torch.uint8, device=latents.device)
    fields = layout.fields(records)
    codes, *numbers = encode(latents, layout.bits, per="channel", encoder=encoder, arithmetic=arithmetic)
    fields["codes"].copy_(pack(codes, layout.bits, per="channel"))
    for name, value in zip(("scale", "zero", "norm", "gain"), numbers, strict=True):
        fields[name].copy_(value)
    fields["rope"].copy_(_to_half(rope))
    return records


def decode_latents(
    records: torch.Tensor, layout: MLALayout, dtype: torch.dtype = torch.float32, *, rotated: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents [..., page_size, 512] and rotary channels [..., page_size, 64] in `dtype` of records [..., page_bytes].

    Latents are as stored, or rotated back.
    """
    fields = {name: field if field.dtype == torch.uint8 else field.to(dtype) for name, field in layout.fields(records).items()}
    codes = unpack(fields["codes"], layout.bits, layout.page_size, LATENT_DIM, per="channel")
    latents = dequantize(codes, fields["scale"], fields["zero"], per="channel")
    root = 1.0 if rotated else LATENT_DIM**-0.5
    if not rotated:
        latents = butterflies(latents, LATENT_DIM)
    return latents * (fields["norm"] * root * fields["gain"]).unsqueeze(-1), fields["rope"]


@torch.no_grad()
def mla_store_pages(
    latents: torch.Tensor,
    rope: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: MLALayout,
    *,
    token_starts: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> None:
    """Quantize pages of latents; see `kvarn_triton.mla_store_pages`. `arithmetic` is the order of sums."""
    if token_starts is None:
        token_starts = torch.arange(page_ids.shape[0], device=latents.device) * layout.page_size
    kept = page_ids >= 0
    tokens = token_starts[kept].long()[:, None] + torch.arange(layout.page_size, device=latents.device)
    tiles = hadamard(latents[tokens].to(working_dtype(latents.dtype)), arithmetic=arithmetic)
    pages[page_ids[kept].long()] = encode_latents(tiles, rope[tokens], layout, encoder, arithmetic)


@torch.no_grad()
def mla_dequantize_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: MLALayout,
    *,
    dtype: torch.dtype = torch.float16,
    rotated: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and rotary channels of pages; see `kvarn_triton.mla_dequantize_pages`."""
    kept = page_ids >= 0
    if out is None:
        shape = page_ids.shape[0], layout.page_size
        latents, rope = (torch.empty(*shape, d, dtype=dtype, device=pages.device) for d in (LATENT_DIM, ROPE_DIM))
        out = latents, rope
    tiles = decode_latents(pages[page_ids[kept].long()], layout, rotated=rotated)
    for result, tile in zip(out, tiles, strict=True):
        result[~kept] = 0
        result[kept] = tile.to(result.dtype)
    return out


@torch.no_grad()
def mla_append_tokens(latents: torch.Tensor, rope: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Rotate latents and write tokens into the raw pool; see `kvarn_triton.mla_append_tokens`."""
    kept = slots >= 0
    page, offset = slots[kept].long() // raw_pages.shape[1], slots[kept].long() % raw_pages.shape[1]
    rotated = hadamard(latents[kept].to(working_dtype(latents.dtype)))
    raw_pages[page, offset] = torch.cat((_to_half(rotated), _to_half(rope[kept])), dim=-1)


@torch.no_grad()
def mla_commit_pages(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: MLALayout,
    *,
    sink_len: int = 0,
    advance: bool = True,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> None:
    """Quantize the next page of each tail if it is finished; see `kvarn_triton.mla_commit_pages`."""
    num_sink_pages = sink_len // layout.page_size
    num_tail_slots = raw_table.shape[1] - num_sink_pages
    for b in range(committed_lens.shape[0]):
        j = int(num_quantized[b])
        finished = max(int(committed_lens[b]) - sink_len, 0) // layout.page_size
        if not 0 <= j < min(finished, block_table.shape[1]) or int(block_table[b, j]) < 0:
            continue
        tokens = raw_pages[int(raw_table[b, num_sink_pages + j % num_tail_slots])]
        latents, rope = tokens.to(working_dtype(tokens.dtype)).split([LATENT_DIM, ROPE_DIM], dim=-1)
        pages[int(block_table[b, j])] = encode_latents(latents, rope, layout, encoder, arithmetic)
        if advance:
            num_quantized[b] = j + 1


def gather_latents(
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: int,
    layout: MLALayout,
    *,
    row: int,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: int | None = None,
    sink_len: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the first `seq_len` tokens of a sequence in `dtype` [seq_len, 576]: rotated latents, then rotary channels."""
    num_sink_pages = sink_len // layout.page_size
    parts = [pages.new_zeros(0, TOKEN_DIM, dtype=dtype)]
    for p in range(-(-seq_len // layout.page_size)):
        j = p - num_sink_pages
        if j >= 0 and (num_quantized is None or j < num_quantized):
            page = torch.cat(decode_latents(pages[int(block_table[row, j])], layout, dtype), dim=-1)
        else:
            assert raw_pages is not None and raw_table is not None
            column = p if j < 0 else num_sink_pages + j % (raw_table.shape[1] - num_sink_pages)
            page = raw_pages[int(raw_table[row, column])].to(dtype)
        parts.append(page[: seq_len - p * layout.page_size])
    return torch.cat(parts)


def listed_tokens(last: torch.Tensor, seq_len: int, lists: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
    """Return which rows of a sequence attend to which positions: all rows to all, or with lists [rows, topk] each to its own.

    `last` is the position of each row's token. What a list has below 0 or beyond that is left out.
    """
    if lists is None:
        return [(slice(None), torch.arange(seq_len, device=last.device))]
    return [(slice(i, i + 1), row[(row >= 0) & (row <= last[i])].long()) for i, row in enumerate(lists)]


@torch.no_grad()
def mla_decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: MLALayout,
    *,
    sm_scale: float,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    config: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with absorbed queries; see `kvarn_triton.mla_decode_attention`."""
    dtype = working_dtype(q.dtype)
    result = q.new_zeros(*q.shape[:-1], LATENT_DIM) if out is None else out
    lse = torch.full(q.shape[:-1], -math.inf, dtype=torch.float32, device=q.device)
    for b in range(q.shape[0]):
        queries, out_rows, lse_rows = (x[b] if q.dim() == 4 else x[b][None] for x in (q, result, lse))
        seq_len = int(seq_lens[b])
        tokens = gather_latents(
            pages, block_table, seq_len, layout, row=b, raw_pages=raw_pages, raw_table=raw_table,
            num_quantized=None if num_quantized is None else int(num_quantized[b]), sink_len=sink_len, dtype=dtype,
        )  # fmt: skip
        last = torch.arange(seq_len - len(queries), seq_len, device=q.device)
        latents, rope = queries.to(dtype).split([LATENT_DIM, ROPE_DIM], dim=-1)
        rotated = torch.cat((hadamard(latents), rope), dim=-1)
        lists = None if indices is None else indices[b].reshape(len(queries), indices.shape[-1])
        for rows, listed in listed_tokens(last, seq_len, lists):
            keys = tokens[listed][None]
            part, part_lse = attend(rotated[rows], keys, keys[..., :LATENT_DIM], last[rows], listed, sm_scale)
            out_rows[rows], lse_rows[rows] = hadamard(part).to(result.dtype), part_lse.float()
    return (result, lse) if return_lse else result


@torch.no_grad()
def mla_write_tokens(
    latents: torch.Tensor,
    rope: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    layout: MLALayout,
    *,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> None:
    """Write the tokens of a step; see `kvarn_triton.mla_write_tokens`. `arithmetic` is the order of sums."""
    for page, raw_page, older, token, rounded in step.tasks.t().tolist():
        if page < 0:
            continue
        new = slice(token + older, token + layout.page_size)
        rotated = hadamard(latents[new].to(working_dtype(latents.dtype)), arithmetic=arithmetic)
        rotated = _to_half(rotated).to(rotated.dtype) if rounded else rotated
        old = raw_pages[max(raw_page, 0), :older]
        tile = torch.cat((old[:, :LATENT_DIM].to(rotated.dtype), rotated))
        halves = torch.cat((old[:, LATENT_DIM:], _to_half(rope[new])))
        pages[page] = encode_latents(tile, halves, layout, encoder, arithmetic)
    mla_append_tokens(latents, rope, raw_pages, step.slots)


@torch.no_grad()
def mla_attend(
    q: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    layout: MLALayout,
    *,
    sm_scale: float,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    config: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries of a step; see `kvarn_triton.mla_attend`."""
    assert step.block_table is not None
    return mla_decode_attention(
        q, pages, step.block_table, step.seq_lens, layout, sm_scale=sm_scale, raw_pages=raw_pages, raw_table=step.raw_table,
        num_quantized=step.num_quantized, sink_len=step.sink_len, indices=indices, out=out, return_lse=return_lse,
    )  # fmt: skip
