"""The sweeps that need no GPU: bytes of every page format, errors of quantization, a small model."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator

import torch
from cases import DISTRIBUTIONS, draw_tiles
from common import DEFAULT_PRESETS, Options, Row, progress, say, sweep

from kvarn_triton import DEFAULT, PRESETS, PUBLISHED, PageLayout, reference
from kvarn_triton.testing import relative_error

HEAD_DIMS = (64, 128, 256)


@sweep(
    "capacity",
    needs="any",
    headers={
        "preset": "preset",
        "head_dim": "head_dim",
        "page_bytes": "page bytes",
        "bytes_per_token": "B/token",
        "bytes_per_token_bf16": "bf16 B/token",
        "times_smaller": "x smaller",
        "bits_per_element": "bits/element",
    },
    note="bytes of keys and values per token and kv head, scales included, against bf16. Sinks and tails stay at 16 bits.",
)
def capacity(options: Options) -> Iterator[Row]:
    """Count the bytes of every preset."""
    for head_dim in HEAD_DIMS:
        for preset in options.presets or PRESETS:
            layout = PageLayout.from_name(preset, head_dim=head_dim)
            yield {
                "preset": preset,
                "head_dim": head_dim,
                "page_bytes": layout.page_bytes,
                "bytes_per_token": layout.bytes_per_token,
                "bytes_per_token_bf16": 4 * head_dim,
                "times_smaller": 4 * head_dim / layout.bytes_per_token,
                "bits_per_element": layout.bits_per_element,
            }


ENCODERS = {"unbalanced": dataclasses.replace(PUBLISHED, iterations=0), "published": PUBLISHED, "default": DEFAULT}
SHORT_NAMES = {"unbalanced": "plain", "published": "publ.", "default": "default"}
ERROR_PAGES, ERROR_HEADS, ERROR_QUERIES = 3, 4, 16
LOGIT_STD = 2.0
"""Queries are scaled so that the scores of one query spread this much: neither uniform weights nor a single one."""


def _error_table(rows: list[Row]) -> list[Row]:
    """Put the encoders of one distribution and preset side by side: keys / values / attention."""
    table: dict[tuple[str, str], Row] = {}
    for row in rows:
        line = table.setdefault((row["distribution"], row["preset"]), {k: row[k] for k in ("distribution", "preset")})
        for key, short in (("k_error", "K"), ("v_error", "V"), ("attention_error", "out")):
            line[f"{short} {SHORT_NAMES[row['encoder']]}"] = row[key]
    names = [f"{short} {name}" for short in ("K", "V", "out") for name in SHORT_NAMES.values()]
    return [{k: line[k] for k in ("distribution", "preset", *names)} for line in table.values()]


@sweep(
    "error",
    needs="any",
    headers={"distribution": "distribution", "preset": "preset"},
    note="relative error (Frobenius norm, rotated back) of keys K, values V and attention output of the reference on\n"
    "synthetic tiles. plain: not balanced; publ.: as published (arXiv 2606.03458); default: this package's.",
    tabulate=_error_table,
)
def error(options: Options) -> Iterator[Row]:
    """Quantize synthetic tiles with every preset and encoder."""
    presets = options.presets or (DEFAULT_PRESETS if options.quick else PRESETS if options.full else PRESETS[:7])
    work = [(distribution, preset) for distribution in DISTRIBUTIONS for preset in presets]
    for distribution, preset in progress("error", work, " ".join):
        for name in ENCODERS:
            yield quantization_error(distribution, preset, name, options.seed)


def quantization_errors(preset: str, name: str, seed: int) -> list[Row]:
    """Return the errors of one encoder on every distribution."""
    return [quantization_error(distribution, preset, name, seed) for distribution in DISTRIBUTIONS]


def quantization_error(distribution: str, preset: str, name: str, seed: int, head_dim: int = 128) -> Row:
    """Return the errors of keys, values and attention output that one encoder of `ENCODERS` makes."""
    layout = PageLayout.from_name(preset, head_dim=head_dim)
    tokens = ERROR_PAGES * 128
    shape = (ERROR_HEADS, tokens, head_dim)
    k, v = (draw_tiles(distribution, shape, seed=seed + i).transpose(0, 1).contiguous() for i in range(2))
    num_pages = tokens // layout.page_size
    pages = torch.zeros(layout.pages_shape(num_pages, ERROR_HEADS), dtype=torch.uint8)
    ids = torch.arange(num_pages)
    reference.store_pages(k, v, pages, ids, layout, encoder=ENCODERS[name])
    found = reference.dequantize_pages(pages, ids, layout, dtype=torch.float32)
    k_found, v_found = (x.flatten(0, 1) for x in found)
    generator = torch.Generator().manual_seed(seed + 2)
    q = torch.randn(ERROR_HEADS, ERROR_QUERIES, head_dim, generator=generator)
    spread = torch.einsum("hqd,thd->hqt", q, k).std(dim=-1, keepdim=True)
    q = q * (LOGIT_STD / spread)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hqt,thd->hqd", torch.softmax(torch.einsum("hqd,thd->hqt", q, k), -1), v)

    return {
        "distribution": distribution,
        "preset": preset,
        "encoder": name,
        "head_dim": head_dim,
        "k_bits": layout.k_bits,
        "v_bits": layout.v_bits,
        "bits_per_element": layout.bits_per_element,
        "k_error": relative_error(k_found, k),
        "v_error": relative_error(v_found, v),
        "attention_error": relative_error(attend(k_found, v_found), attend(k, v)),
    }


MODEL_PRESETS = ("k8v8_g64", "k4v4_g64", "k4v2_g64", "k2v2_g64")


@sweep(
    "model",
    needs="any",
    headers={
        "preset": "preset",
        "encoder": "encoder",
        "bytes_per_token": "B/token",
        "mean_kl": "mean KL",
        "top1_agreement": "agreement",
        "first_divergence": "first divergence",
        "diverged": "diverged",
        "near_ties": "near ties",
        "sequences": "of",
    },
    note="a small trained byte-level language model with the quantized cache against the 16-bit cache, fed the same tokens.\n"
    "KL in nats; agreement: same most likely byte; first divergence: median number of greedy bytes before one differs,\n"
    "where one does; near ties: divergences where the 16-bit model itself hardly preferred its byte.",
)
def model(options: Options) -> Iterator[Row]:
    """Generate with the 16-bit cache and with quantized ones; trains the model at the first call."""
    import lm
    import lm_text
    from lm_compare import compare

    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = not options.quick and (device == "cuda" or options.full)
    config = lm.CONFIGS["default" if large else "tiny"]
    say("model: loading it, or training it now, once, for a minute or more")
    network = lm.load_or_train(config, options.seed, device=device)
    count, num_tokens = (2, 32) if options.quick else (8, 96) if large else (4, 64)
    lengths = [config.seq_len - num_tokens - 8 * (i + 1) for i in range(count)]
    prompts, _ = lm_text.heldout_prompts(lengths, num_tokens, seed=options.seed)
    layouts = [PageLayout.from_name(name, head_dim=config.head_dim) for name in options.presets or MODEL_PRESETS]
    for name, encoder in (("published", PUBLISHED), ("default", DEFAULT)):
        say(f"model: {name} encoder")
        for row in compare(network, prompts, layouts, num_tokens, encoder=encoder, seed=options.seed):
            steps = [step for step in row["same_tokens"] if step is not None]
            median = statistics.median(steps) if steps else None
            row |= {"preset": row["layout"], "encoder": name, "first_divergence": median, "sequences": count}
            row |= {"config": "default" if large else "tiny", "device": device}
            yield row | {"num_tokens": num_tokens, "prompt_lengths": lengths}
