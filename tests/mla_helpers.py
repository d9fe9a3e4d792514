"""What tests of latent attention share: tokens, cases, lists, the comparison with float64."""

from __future__ import annotations

import torch
from helpers import LSE_ERROR, draw, uneven

import kvarn_triton as kvarn
from kvarn_triton import MLALayout, reference
from kvarn_triton.mla_layout import MLA_BITS
from kvarn_triton.testing import relative_error
from kvarn_triton.testing.latents import latent_attention_in

LAYOUTS = [MLALayout(bits, page_size) for bits in MLA_BITS for page_size in (64, 128)]


def layout_id(value: object) -> str | None:
    """Return the test id of a layout."""
    return f"{value.bits}-g{value.page_size}" if isinstance(value, MLALayout) else None


def moved(call: dict, device: torch.device) -> dict:
    """Return a call with its tensors on a device."""
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


def tokens_of(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and rotary channels as views of tokens of 576 channels, whose strides are odd for one dtype or other."""
    tokens = torch.cat((uneven(count, 512, seed=seed), 3 * draw(count, 72, seed=seed + 1)), dim=1).to(dtype)
    return tokens[:, :512], tokens[:, 512:576]


def check_decode(call: dict, device: torch.device, **options) -> torch.Tensor:
    """Compare a call with float64, the log-sum-exp included: twice the error of plain 16-bit attention is allowed."""
    out, lse = kvarn.mla_decode_attention(**moved(call, device), return_lse=True, **options)
    out, lse = out.cpu(), lse.cpu()
    exact, exact_lse = reference.mla_decode_attention(**call | {"q": call["q"].double()}, return_lse=True)
    assert out.dtype == call["q"].dtype and out.shape == exact.shape and not out.isnan().any()
    attended = exact_lse > -torch.inf
    assert torch.equal(attended, lse > -torch.inf) and (out[~attended] == 0).all()
    if attended.any():
        allowed = 2 * relative_error(latent_attention_in(call["q"].dtype, call), exact)
        assert relative_error(out, exact) <= allowed
    assert ((lse - exact_lse).abs()[attended] <= LSE_ERROR[call["q"].dtype]).all()
    return out


CASES = {
    "pages": {},
    "one head": {"num_heads": 1},
    "20 heads": {"num_heads": 20},
    "sink and tail": {"sink_len": 128, "num_tail_slots": 2},
    "tail that keeps a page": {"num_tail_slots": 3, "keep": 1},
    "drafts": {"num_queries": 3, "num_heads": 5},
    "drafts with a tail": {"num_queries": 70, "num_heads": 1, "sink_len": 128, "num_tail_slots": 1},
}


def lists_of(call: dict, topk: int, seed: int = 0) -> torch.Tensor:
    """Return a list for each query token: tokens that it sees in any order, in some places none, and ones out of sight."""
    generator = torch.Generator().manual_seed(seed)
    q, lens = call["q"], call["seq_lens"].tolist()
    lists = torch.full((*q.shape[:-2], topk), -1, dtype=torch.int32)
    num_queries = q.shape[1] if q.dim() == 4 else 1
    for b, row in enumerate(lists.view(len(q), num_queries, topk)):
        for i, entries in enumerate(row):
            seen = lens[b] - num_queries + i + 1
            entries[:] = torch.randperm(max(seen, 0) + topk, generator=generator)[:topk].int()  # the end is out of sight
            entries[torch.rand(topk, generator=generator) < 0.2] = -1
            if seen > 4 and topk > 8:
                entries[:5] = torch.tensor([seen - 1, seen - 1, 0, seen, 2**31 - 1])  # twice; behind the query token
    return lists


def call_of_magnitude(magnitude: float) -> dict:
    """Return a call over three pages, of which the second has latents so many times as large."""
    layout, (latents, rope) = MLALayout(4, 64), tokens_of(192, torch.float32)
    latents = latents.clone()
    latents[64:128] *= magnitude
    pages, ids = torch.zeros(3, layout.page_bytes, dtype=torch.uint8), torch.arange(3, dtype=torch.int32)
    reference.mla_store_pages(latents, rope / 8, pages, ids, layout)
    q = draw(1, 16, 576).half() / max(magnitude, 1)
    call = {"q": q, "pages": pages, "block_table": ids[None], "seq_lens": torch.tensor([180], dtype=torch.int32)}
    return call | {"layout": layout, "sm_scale": 0.02}
