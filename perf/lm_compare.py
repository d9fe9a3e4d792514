"""What a quantized key/value cache changes in what `TinyLM` predicts: agreement, KL divergence, first divergence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from common import say
from lm import TinyLM
from lm_cache import DenseCache, PagedCache, run

from kvarn_triton import Encoder, PageLayout

NEAR_TIE = 0.1
"""Gap of two logits, in nats, below which either token is as good as the other."""


def compare(
    model: TinyLM,
    prompts: Sequence[torch.Tensor],
    layouts: Sequence[PageLayout],
    num_tokens: int,
    *,
    encoder: Encoder | None = None,
    seed: int = 0,
) -> list[dict]:
    """Measure what each layout changes in the model's predictions, against the 16-bit cache.

    Both caches are fed the same tokens step by step, so that what quantization does to a key or value stays in the
    cache and acts on every later token.

    Args:
        prompts: int64 [length] each.
        layouts: layouts of `PagedCache`; `encoder` and `seed` are its other options.
        num_tokens: tokens that follow each prompt: those that the model generates with the 16-bit cache, taking the most
            likely one each time.

    Returns:
        One row per layout: its name, bytes and options, then what `prediction_changes` and `generation_changes` return.
    """
    device = next(model.parameters()).device
    sizes = {"batch": len(prompts), "capacity": max(map(len, prompts)) + num_tokens, "device": device}
    greedy, logits_16 = run(model, DenseCache(model.config, **sizes), prompts, num_tokens)
    rows = []
    for layout in layouts:
        say(f"compare: {layout.name}, {len(prompts)} prompts, {num_tokens} tokens")
        cache = PagedCache(model.config, layout, **sizes, encoder=encoder, seed=seed)
        logits = run(model, cache, prompts, num_tokens, continuation=greedy)[1]
        row = {"layout": layout.name, "bytes_per_token": layout.bytes_per_token, "sink_len": cache.sink_len}
        row |= {"keep_pages": cache.keep_pages, "encoder_options": dataclasses.asdict(cache.encoder)}
        rows.append(row | prediction_changes(logits_16, logits) | generation_changes(logits_16, logits))
    return rows


def prediction_changes(logits_16: torch.Tensor, logits: torch.Tensor) -> dict:
    """Compare two caches that were fed the same tokens.

    Args:
        logits_16, logits: float32 [batch, n, 256], with the 16-bit and with the quantized cache.

    Returns:
        `predictions`: how many distributions were compared; `top1_agreement`: share of them with the same most likely
        token; `mean_kl`: mean of KL(16 bits || quantized) in nats.
    """
    log_p, log_q = logits_16.double().log_softmax(-1), logits.double().log_softmax(-1)
    return {
        "predictions": log_p[..., 0].numel(),
        "top1_agreement": (logits.argmax(-1) == logits_16.argmax(-1)).double().mean().item(),
        "mean_kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
    }


def generation_changes(logits_16: torch.Tensor, logits: torch.Tensor) -> dict:
    """Find where greedy generation with a quantized cache leaves that with the 16-bit cache.

    Args:
        logits_16: float32 [batch, n, 256], the 16-bit cache fed its own most likely tokens.
        logits: float32 [batch, n, 256], the quantized cache fed the same tokens. Up to the first one that it wouldn't
            have chosen, these are what it generates by itself.

    Returns:
        `same_tokens`: for each sequence, how many generated tokens are equal before the first that differs, None if all
        are; `gaps`: by how much, in nats, the 16-bit cache preferred its token there over the second best, None if all
        are equal; `diverged` and `near_ties`: how many sequences differ, and how many of these by a gap below
        `NEAR_TIE`, where a difference is no loss.
    """
    best, second = logits_16.topk(2, dim=-1).values.unbind(-1)
    gap_rows = (best - second).tolist()
    differs = (logits_16.argmax(-1) != logits.argmax(-1)).tolist()
    steps = [row.index(True) if True in row else None for row in differs]
    gaps = [None if step is None else row[step] for step, row in zip(steps, gap_rows, strict=True)]
    found = [gap for gap in gaps if gap is not None]
    return {
        "same_tokens": [None if step is None else step + 1 for step in steps],
        "gaps": gaps,
        "diverged": len(found),
        "near_ties": sum(gap < NEAR_TIE for gap in found),
    }
