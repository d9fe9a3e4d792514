"""What the gate checks of latent attention: pages and tails bit for bit, attention against float64, small cases."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import ERROR_RATIO
from common import Row
from gate_attention import LSE_ERROR
from gate_checks import Recorder, Subject, check, equal, launches_on, moved

from kvarn_triton import PUBLISHED, MLAConfig, MLALayout, reference
from kvarn_triton.testing import relative_error
from kvarn_triton.testing.latents import latent_attention_in, latent_case

LAYOUT = MLALayout(4, 64)
SOME_CONFIG = MLAConfig(16, 16, 4)
"""Launch parameters that are nobody's own."""


@check("latents: store and dequantize", "mla_store_pages", 3.0)
def _pages(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    tokens, device = subject.draw(67, 576), subject.device
    latents, rope = tokens.split([512, 64], dim=1)
    page_ids, starts = torch.tensor([-1, 1]), torch.tensor([0, 3])
    expected = torch.full((3, LAYOUT.page_bytes), 0xFF, dtype=torch.uint8)
    found, options = expected.to(device, copy=True), {"encoder": PUBLISHED}
    placed = [x.to(device) for x in (latents, rope)]
    kvarn.mla_store_pages(*placed, found, page_ids.to(device), LAYOUT, token_starts=starts.to(device), **options)
    reference.mla_store_pages(latents, rope, expected, page_ids, LAYOUT, token_starts=starts, **options)
    yield equal("mla_store_pages", {"pages": (found, expected)})
    wanted = reference.mla_dequantize_pages(expected, page_ids, LAYOUT, dtype=subject.dtype)
    out = tuple(torch.empty_like(x, device=device) for x in wanted)
    kvarn.mla_dequantize_pages(expected.to(device), page_ids.to(device), LAYOUT, dtype=subject.dtype, out=out)
    read = kvarn.mla_dequantize_pages(expected.to(device), page_ids.to(device), LAYOUT, rotated=True)
    turned = reference.mla_dequantize_pages(expected, page_ids, LAYOUT, rotated=True)
    pairs = {"latents": (out[0], wanted[0]), "rope": (out[1], wanted[1]), "rotated": (read[0], turned[0])}
    yield equal("mla_dequantize_pages", pairs)


@check("latents: append and commit", "mla_commit_pages", 3.0)
def _tails(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    latents, rope = subject.draw(70, 576).split([512, 64], dim=1)
    results = []
    for where, api in ((subject.device, kvarn), ("cpu", reference)):
        call = {
            "raw_pages": torch.zeros(3, 64, 576, dtype=torch.float16),
            "pages": torch.full((2, LAYOUT.page_bytes), 0xFF, dtype=torch.uint8),
            "raw_table": torch.tensor([[0, 2, 1]], dtype=torch.int32),
            "block_table": torch.tensor([[1, 0]], dtype=torch.int32),
            "committed_lens": torch.tensor([134], dtype=torch.int32),
            "num_quantized": torch.zeros(1, dtype=torch.int32),
        }
        call, slots = moved(call, where), torch.arange(128, 198).to(where)
        slots[64:] -= 128  # in another page
        api.mla_append_tokens(latents.to(where), rope.to(where), call["raw_pages"], slots)
        for advance in (False, True):
            api.mla_commit_pages(**call, layout=LAYOUT, sink_len=64, advance=advance, encoder=PUBLISHED)
        results.append({name: call[name] for name in ("raw_pages", "pages", "num_quantized")})
    found, expected = results
    yield equal("mla_append_tokens", {"raw_pages": (found["raw_pages"], expected["raw_pages"])})
    yield equal("mla_commit_pages", {name: (found[name], expected[name]) for name in ("pages", "num_quantized")})


def _decode(kvarn: Recorder, subject: Subject, heads: int, topk: int = 0, **options: int) -> Iterator[Row]:
    """Compare decode attention and its log-sum-exp with float64; `topk`: entries of a list for each query token, if any."""
    call = latent_case(LAYOUT, [150, 0, 64], num_heads=heads, seed=subject.seed, **options)
    if topk:  # a third of them is none or out of sight
        generator = torch.Generator().manual_seed(subject.seed)
        call["indices"] = torch.randint(-25, 175, (*call["q"].shape[:-2], topk), dtype=torch.int32, generator=generator)
    call["q"] = call["q"].to(subject.dtype)
    how = {"out": torch.empty(*call["q"].shape[:-1], 512, dtype=subject.dtype), "num_splits": 2, "config": SOME_CONFIG}
    found = [kvarn.mla_decode_attention(**moved(call | how, subject.device), return_lse=True)]
    found.append(kvarn.mla_decode_attention(**moved(call, subject.device), return_lse=True))
    exact, exact_lse = reference.mla_decode_attention(**call | {"q": call["q"].double()}, return_lse=True)
    allowed, attended = ERROR_RATIO * relative_error(latent_attention_in(subject.dtype, call), exact), exact_lse > -torch.inf
    for out, lse in found:
        error, off = relative_error(out.cpu(), exact), (lse.cpu() - exact_lse).abs()[attended]
        same = torch.equal(attended, lse.cpu() > -torch.inf) and bool((off <= LSE_ERROR[subject.dtype]).all())
        row = {"operation": "mla_decode_attention", "criterion": f"error <= {ERROR_RATIO:g}x plain", "error": error}
        detail = f"{error:.1e} of {allowed:.1e}" + ("" if same else "; lse differs")
        yield row | {"allowed": allowed, "detail": detail, "ok": error <= allowed and same}


@check("latents: decode, sink, pages, tail", "mla_decode_attention", 2.0)
def _decode_served(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    yield from _decode(kvarn, subject, 16, sink_len=64, num_tail_slots=1)


@check("latents: decode, drafts over pages", "mla_decode_attention", 2.0)
def _decode_drafts(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    yield from _decode(kvarn, subject, 8, num_queries=3)


@check("latents: decode, lists of tokens", "mla_decode_attention", 2.0)
def _decode_lists(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    yield from _decode(kvarn, subject, 16, topk=100, sink_len=64, num_tail_slots=1)


@check("latents: decode, lists of drafts", "mla_decode_attention", 2.0)
def _decode_lists_of_drafts(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    yield from _decode(kvarn, subject, 8, topk=40, num_queries=2)


@check("latents: a step", "mla_write_tokens", 4.0)
def _steps(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    tokens, lens = subject.draw(133, 576), torch.tensor([150, 3], dtype=torch.int32)
    q, lists = subject.draw(2, 4, 576), torch.tensor([[149, -1, 20, 130], [0, 1, 2, 3]], dtype=torch.int32)
    ends, tables = torch.tensor([0, 130, 133], dtype=torch.int32), torch.arange(12, dtype=torch.int32).view(2, 6)
    how: dict[str, object] = {"sm_scale": 0.05, "num_splits": 2, "config": SOME_CONFIG, "return_lse": True}
    results = []
    for where, api in ((subject.device, kvarn), ("cpu", reference)):
        pages = torch.zeros(12, LAYOUT.page_bytes, dtype=torch.uint8, device=where)
        raw_pages = torch.zeros(12, 64, 576, dtype=torch.float16, device=where)
        given = (x.to(where) for x in (lens, ends, tables, tables))
        step = api.plan_step(LAYOUT.keys, *given, num_tokens=133, sink_len=64)
        latents, rope = tokens.to(where).split([512, 64], dim=1)
        api.mla_write_tokens(latents, rope, pages, raw_pages, step, LAYOUT, encoder=PUBLISHED)
        out = torch.empty(2, 4, 512, dtype=q.dtype, device=where)
        api.mla_attend(q.to(where), pages, raw_pages, step, LAYOUT, indices=lists.to(where), out=out, **how)
        results.append((pages, raw_pages, out.cpu()))
    (pages, raw_pages, out), (expected, expected_raw, exact) = results
    yield equal("mla_write_tokens", {"pages": (pages, expected), "raw_pages": (raw_pages, expected_raw)})
    allowed = 8 * torch.finfo(subject.dtype).eps
    row = {"operation": "mla_attend", "criterion": "error <= 8 roundings", "error": relative_error(out, exact)}
    yield row | {"allowed": allowed, "detail": f"{row['error']:.1e} of {allowed:.1e}", "ok": row["error"] <= allowed}


@check("latents: warm-up, and nothing compiled after it", "mla_warmup", 2.0)
def _warm(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    device, how = torch.device(subject.device), {"config": SOME_CONFIG}
    call = moved(latent_case(LAYOUT, [70, 90], num_heads=8, sink_len=64, num_tail_slots=1), subject.device)
    call["q"] = call["q"].to(subject.dtype)
    others = {"dtype": subject.dtype, "encoder": PUBLISHED, "max_queries": 2, "indices": True, "dequantize": torch.float32}
    others["steps"] = True
    with launches_on(device) as launches:
        kvarn.mla_warmup(LAYOUT, 8, device, **how, **others)
        before = set(launches)
        with kvarn.no_compilation():
            kvarn.mla_decode_attention(**call, **how)
            step = kvarn.plan_step(LAYOUT.keys, call["seq_lens"], None, call["block_table"], call["raw_table"], sink_len=64)
            new = (torch.zeros(2, d, dtype=subject.dtype, device=device) for d in (512, 64))
            kvarn.mla_write_tokens(*new, call["pages"], call["raw_pages"], step, LAYOUT, encoder=PUBLISHED)
            kvarn.mla_decode_attention(**call, **how, indices=call["block_table"])
            kvarn.mla_dequantize_pages(call["pages"], call["block_table"][0], LAYOUT, dtype=torch.float32)
    new = ", ".join(sorted({name for name, _ in set(launches) - before}))
    yield {"operation": "mla_warmup", "criterion": "nothing is compiled after it", "detail": new or "nothing", "ok": not new}
