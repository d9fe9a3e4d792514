"""Cases of caches of latents, and the yardstick of their attention: what `cases` has for keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import reference
from ..mla_layout import LATENT_DIM, ROPE_DIM, TOKEN_DIM, MLALayout
from ..reference.attention import attend


def latent_case(
    layout: MLALayout,
    seq_lens: Sequence[int],
    *,
    num_heads: int = 16,
    num_queries: int | None = None,
    sink_len: int = 0,
    num_tail_slots: int = 0,
    keep: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Return arguments of `mla_decode_attention` over random tokens: page ids in any order, memory that nobody owns NaN.

    Args:
        layout: the page format.
        seq_lens: tokens of each sequence.
        num_heads: query heads.
        num_queries: query tokens of each sequence; None: one, in three dimensions.
        sink_len: raw tokens at the start; a multiple of page_size.
        num_tail_slots: columns of the raw table behind the sink; 0: everything is quantized, the last page too.
        keep: finished pages that are still raw.
        seed: of all random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size, batch, most = layout.page_size, len(seq_lens), max(max(seq_lens), 1)
    padded = -(-most // size) * size
    spread = torch.exp(0.5 * draw(LATENT_DIM))
    latents, rope = draw(batch, padded, LATENT_DIM) * spread + 0.3 * draw(LATENT_DIM), 2 * draw(batch, padded, ROPE_DIM)
    lens = torch.tensor(list(seq_lens), dtype=torch.int32)
    body = (lens - sink_len).clamp_min(0)
    max_pages = max(-(-(padded - sink_len) // size), 1)
    ids = torch.randperm(batch * max_pages + 2, generator=generator)[: batch * max_pages].view(batch, max_pages).int()
    pages = torch.full((batch * max_pages + 2, layout.page_bytes), 255, dtype=torch.uint8)
    raw = num_tail_slots > 0
    done = (body // size - keep).clamp_min(0) if raw else -(-body // size)
    for b in range(batch):
        count = int(done[b])
        starts = sink_len + size * torch.arange(count)
        reference.mla_store_pages(latents[b], rope[b], pages, ids[b, :count], layout, token_starts=starts)
    shape = (batch, num_heads, TOKEN_DIM) if num_queries is None else (batch, num_queries, num_heads, TOKEN_DIM)
    call = {"q": draw(*shape).half(), "pages": pages, "block_table": ids, "seq_lens": lens, "layout": layout}
    call["sm_scale"] = 1.5 * TOKEN_DIM**-0.5
    if not raw:
        return call
    columns = sink_len // size + num_tail_slots
    raw_pages = torch.full((batch * columns + 1, size, TOKEN_DIM), torch.nan, dtype=torch.float16)
    raw_table = (1 + torch.randperm(batch * columns, generator=generator)).view(batch, columns).int()
    for b in range(batch):
        positions = torch.arange(seq_lens[b])
        is_raw = (positions < sink_len) | (positions >= sink_len + size * int(done[b]))
        slots = reference.raw_slots(positions[is_raw][None], raw_table[b : b + 1], sink_len=sink_len, page_size=size)[0]
        reference.mla_append_tokens(latents[b, positions[is_raw]], rope[b, positions[is_raw]], raw_pages, slots)
    return call | {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": done.int(), "sink_len": sink_len}


def latent_attention_in(dtype: torch.dtype, call: dict[str, Any]) -> torch.Tensor:
    """Return plain attention over the dequantized cache with operands and weights rounded to `dtype`, sums in float32.

    This is what a 16-bit kernel computes on the same cache: the yardstick for the error of `mla_decode_attention`, whose
    arguments these are.
    """
    names = ("pages", "block_table", "layout", "raw_pages", "raw_table", "sink_len")
    cache, q = {name: call[name] for name in names if name in call}, call["q"]
    out = q.new_zeros(*q.shape[:-1], LATENT_DIM, dtype=torch.float32)
    for b, length in enumerate(call["seq_lens"].tolist()):
        counts = call.get("num_quantized")
        tokens = reference.mla.gather_latents(
            seq_len=length, row=b, num_quantized=None if counts is None else int(counts[b]), **cache
        )
        queries, rows_of_out = (x[b].float() if q.dim() == 4 else x[b][None].float() for x in (q, out))
        latents, rope = queries.split([LATENT_DIM, ROPE_DIM], dim=-1)
        rotated = torch.cat((reference.hadamard(latents), rope), dim=-1)
        rotated, tokens = (x.to(dtype).float() for x in (rotated, tokens))
        last = torch.arange(length - len(queries), length, device=q.device)
        lists = call["indices"][b].reshape(len(queries), -1) if "indices" in call else None
        for rows, listed in reference.mla.listed_tokens(last, length, lists):
            seen, units = tokens[listed], torch.eye(len(listed), device=q.device)[None]
            weights, _ = attend(rotated[rows], seen[None], units, last[rows], listed, call["sm_scale"])
            weighted = torch.einsum("nht,td->nhd", weights.to(dtype).float(), seen[:, :LATENT_DIM])
            rows_of_out[rows] = reference.hadamard(weighted)
    return out.to(dtype)
