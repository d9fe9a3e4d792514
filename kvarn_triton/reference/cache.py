"""Pages and tails in plain PyTorch. The cache model is that of `docs/method.md`, section 4.

A sequence is [sink | quantized body pages | tail body pages]. Token `p` below `sink_len` is slot `p % page_size` of raw page
`raw_table[b, p // page_size]`. Later ones belong to body page `j = (p - sink_len) // page_size`: quantized in
`pages[block_table[b, j]]` if `j < num_quantized[b]`, else raw in `raw_table[b, num_sink_pages + j % num_tail_slots]`.
"""

from __future__ import annotations

import torch

from ..encoder import DEFAULT, Encoder
from ..layout import PageLayout
from .arithmetic import KERNEL_ORDER, Arithmetic, butterflies
from .codec import HALF_MAX, dequantize, encode, hadamard, working_dtype
from .packing import pack, unpack


def encode_records(
    k: torch.Tensor,
    v: torch.Tensor,
    layout: PageLayout,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> torch.Tensor:
    """Return the records uint8 [..., page_bytes] of rotated tiles `k` [..., page_size, head_dim] and `v` [..., v_head_dim]."""
    records = torch.zeros(*k.shape[:-2], layout.page_bytes, dtype=torch.uint8, device=k.device)
    fields = layout.fields(records)
    for name, tile, bits, per in (("k", k, layout.k_bits, "channel"), ("v", v, layout.v_bits, "token")):
        codes, scale, zero, norm, gain = encode(tile, bits, per=per, encoder=encoder, arithmetic=arithmetic)  # type: ignore[arg-type]
        fields[f"{name}_codes"].copy_(pack(codes, bits, per=per))  # type: ignore[arg-type]
        for field, value in (("scale", scale), ("zero", zero), ("norm", norm), ("gain", gain)):
            fields[f"{name}_{field}"].copy_(value)
    return records


def decode_records(
    records: torch.Tensor, layout: PageLayout, dtype: torch.dtype = torch.float32, *, rotated: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return k [..., page_size, head_dim] and v [..., page_size, v_head_dim] in `dtype` of records uint8 [..., page_bytes].

    They are as stored, or rotated back. Norm, gain and what makes the rotation orthonormal are one factor, which a key, where
    it is the same for the whole token, gets after the rotation.
    """
    fields = {name: field if field.dtype == torch.uint8 else field.to(dtype) for name, field in layout.fields(records).items()}
    k_codes = unpack(fields["k_codes"], layout.k_bits, layout.page_size, layout.head_dim, per="channel")
    v_codes = unpack(fields["v_codes"], layout.v_bits, layout.page_size, layout.v_head_dim, per="token")
    k_root, v_root = (1.0, 1.0) if rotated else (layout.block_size**-0.5, layout.v_block_size**-0.5)
    k_factor = fields["k_norm"] * k_root * fields["k_gain"]
    v_factor = fields["v_norm"] * v_root * fields["v_gain"]
    k = dequantize(k_codes, fields["k_scale"], fields["k_zero"], per="channel")
    v = dequantize(v_codes, fields["v_scale"], fields["v_zero"], per="token") * v_factor.unsqueeze(-2)
    if not rotated:
        k, v = butterflies(k, layout.block_size), butterflies(v, layout.v_block_size)
    return k * k_factor.unsqueeze(-1), v


def body_page_ids(
    block_table: torch.Tensor | None, kv_indptr: torch.Tensor | None, kv_indices: torch.Tensor | None, row: int
) -> torch.Tensor:
    """Return the ids of the body pages of a sequence: its row of a block table, or its run of `kv_indices`."""
    if block_table is not None:
        return block_table[row]
    assert kv_indptr is not None and kv_indices is not None
    return kv_indices[int(kv_indptr[row]) : int(kv_indptr[row + 1])]


@torch.no_grad()
def store_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    *,
    token_starts: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> None:
    """Quantize pages straight from activations; see `kvarn_triton.store_pages`. `arithmetic` is the order of sums."""
    if token_starts is None:
        token_starts = torch.arange(page_ids.shape[0], device=k.device) * layout.page_size
    kept = page_ids >= 0
    tokens = token_starts[kept].long()[:, None] + torch.arange(layout.page_size, device=k.device)
    tiles = (x[tokens].transpose(1, 2).to(working_dtype(x.dtype)) for x in (k, v))
    k_tiles, v_tiles = (hadamard(tile, arithmetic=arithmetic) for tile in tiles)
    pages[page_ids[kept].long()] = encode_records(k_tiles, v_tiles, layout, encoder, arithmetic)


@torch.no_grad()
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
    if out is None:
        shape = (page_ids.shape[0], layout.page_size, pages.shape[1])
        k, v = (torch.empty(*shape, d, dtype=dtype, device=pages.device) for d in (layout.head_dim, layout.v_head_dim))
        out = k, v
    tiles = decode_records(pages[page_ids[kept].long()], layout, rotated=rotated)
    for result, tile in zip(out, tiles, strict=True):
        result[~kept] = 0
        result[kept] = tile.transpose(1, 2).to(result.dtype)
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


@torch.no_grad()
def append_tokens(k: torch.Tensor, v: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Rotate tokens and write them into the raw pool; see `kvarn_triton.append_tokens`."""
    page_size = raw_pages.shape[3]
    kept = slots >= 0
    page, offset = slots[kept].long() // page_size, slots[kept].long() % page_size
    for half, x in enumerate((k, v)):
        rotated = hadamard(x[kept].to(working_dtype(x.dtype)))
        if raw_pages.dtype == torch.float16:
            rotated = rotated.clamp(-HALF_MAX, HALF_MAX)
        raw_pages[page, half, :, offset, : x.shape[-1]] = rotated.to(raw_pages.dtype)


@torch.no_grad()
def commit_pages(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor | None,
    committed_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: PageLayout,
    *,
    sink_len: int = 0,
    keep_pages: int = 0,
    max_new_pages: int = 1,
    advance: bool = True,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> None:
    """Quantize finished pages of the tail; see `kvarn_triton.commit_pages`. `arithmetic` is the order of sums."""
    num_sink_pages = -(-sink_len // layout.page_size)
    num_tail_slots = raw_table.shape[1] - num_sink_pages
    for b in range(committed_lens.shape[0]):
        page_ids = body_page_ids(block_table, kv_indptr, kv_indices, b)
        finished = max(int(committed_lens[b]) - sink_len, 0) // layout.page_size - keep_pages
        first = count = int(num_quantized[b])
        last = min(finished, first + max_new_pages, page_ids.shape[0]) if first >= 0 else first
        for j in range(first, last):
            page = int(page_ids[j])
            if page >= 0:
                count += count == j  # up to the first page without an id
                raw = raw_pages[int(raw_table[b, num_sink_pages + j % num_tail_slots])]
                k, v = raw.to(working_dtype(raw.dtype)).unbind(0)
                pages[page] = encode_records(
                    k[..., : layout.head_dim], v[..., : layout.v_head_dim], layout, encoder, arithmetic
                )
        if advance:
            num_quantized[b] = count


def lower_counts(num_quantized: torch.Tensor, new_lens: torch.Tensor, layout: PageLayout, sink_len: int) -> None:
    """Count no quantized page that is not whole in `new_lens` tokens; a page that was cut is raw."""
    whole = (new_lens - sink_len).clamp_min(0) // layout.page_size
    num_quantized.copy_(torch.minimum(num_quantized, whole.to(num_quantized.dtype)))


@torch.no_grad()
def cut_back(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor | None,
    new_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: PageLayout,
    *,
    sink_len: int = 0,
    advance: bool = True,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """Cut sequences back, into quantized pages too; see `kvarn_triton.cut_back`."""
    num_sink_pages = -(-sink_len // layout.page_size)
    num_tail_slots = raw_table.shape[1] - num_sink_pages
    for b in range(new_lens.shape[0]):
        j, rest = divmod(max(int(new_lens[b]) - sink_len, 0), layout.page_size)
        if j < int(num_quantized[b]) and rest:
            page = int(body_page_ids(block_table, kv_indptr, kv_indices, b)[j])
            raw_page = int(raw_table[b, num_sink_pages + j % num_tail_slots])
            if page >= 0 and raw_page >= 0:
                for half, tile in enumerate(decode_records(pages[page], layout)):
                    raw_pages[raw_page, half, :, :, : tile.shape[-1]] = tile.to(raw_pages.dtype)
    if advance:
        lower_counts(num_quantized, new_lens, layout, sink_len)
