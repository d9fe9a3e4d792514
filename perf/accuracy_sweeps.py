"""The accuracy sweep: codecs against the 16-bit cache on models trained here. `docs/accuracy.md` describes the method."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import accuracy
import kv_codecs
import lm
import lm_tasks
import lm_text
import torch
import variants
from common import Options, Row, progress, say, sweep
from kv_codecs import Codec

from kvarn_triton import PUBLISHED, Encoder, PageLayout

BITS = ("k2v2", "k3v2", "k4v2", "k3v3", "k4v3", "k4v4")


@dataclass(frozen=True)
class Size:
    """How much is measured: tokens, problems and pages."""

    page_size: int = 128
    sink_len: int = 128
    texts: int = 32
    generated: int = 64
    prompt_len: int = 256
    problems: int = 1000
    said_problems: int = 100
    steps: int = 200
    lines: int = 180
    queries: int = 40


LARGE = Size()
SMALL = Size(page_size=64, sink_len=64, texts=8, generated=4, prompt_len=192)


def methods(bits: str, page_size: int, head_dim: int) -> list[Codec]:
    """Return all methods at the given bits of codes."""
    layout = PageLayout.from_name(f"{bits}_g{page_size}", head_dim=head_dim)
    k, v = layout.k_bits, layout.v_bits
    return [
        kv_codecs.round_to_nearest(k, v, head_dim, 128),
        kv_codecs.kivi(k, v, head_dim, page_size),
        kv_codecs.kivi(k, v, head_dim, 32),
        kv_codecs.quarot(k, v, head_dim, 128),
        kv_codecs.quarot(k, v, head_dim, 32),
        kv_codecs.turboquant(k, v, head_dim),
        kv_codecs.unrotated(layout, PUBLISHED, "KVarN without rotation"),
        kv_codecs.kvarn(layout, PUBLISHED, "KVarN as published"),
        kv_codecs.kvarn(layout, Encoder(), "default"),
        variants.codec(layout, variants.LENGTHS[k], variants.LENGTHS[v], "least error, lengths kept"),
    ]


@dataclass
class Material:
    """What codecs are measured on with one model: held-out text, text that the model generated, problems."""

    model: lm.TinyLM
    size: Size
    text: accuracy.Text
    generated: accuracy.Text
    problems: dict[str, tuple[torch.Tensor, torch.Tensor]]


def prepare(model: lm.TinyLM, size: Size, seed: int, device: str) -> Material:
    """Draw the material of a model."""
    config = model.config
    dtype = torch.float16 if device == "cuda" else torch.float32
    options = {"page_size": size.page_size, "sink_len": size.sink_len, "dtype": dtype}
    texts, _ = lm_text.heldout_prompts([config.seq_len] * size.texts, 1, seed=seed)
    starts, _ = lm_text.heldout_prompts([size.prompt_len] * size.generated, 1, seed=seed + 1000)
    prompts = torch.stack(starts).to(device)
    cache = accuracy.CodecCache(config, None, batch=len(prompts), capacity=config.seq_len, device=device, **options)
    said = accuracy.generate(model, cache, prompts, config.seq_len - size.prompt_len, seed=seed)
    problems = {}
    if config.tasks:
        generator = torch.Generator().manual_seed(seed + 2000)
        problems["chain"] = lm_tasks.chain(size.problems, size.steps, generator)
        problems["retrieval"] = lm_tasks.retrieval(size.problems // 4, size.lines, size.queries, generator)
    return Material(
        model,
        size,
        accuracy.exact_run(model, torch.stack(texts).to(device), **options),
        accuracy.exact_run(model, torch.cat((prompts, said), dim=1), **options),
        {name: (prompt.to(device), answer.to(device)) for name, (prompt, answer) in problems.items()},
    )


def measure(codec: Codec | None, material: Material, problems: bool) -> Row:
    """Return everything that the sweep says of a codec; None is the 16-bit cache, of which only answers are measured."""
    model, size = material.model, material.size
    row: Row = {}
    if codec is not None:
        first = size.sink_len + size.page_size
        row |= accuracy.static_errors(codec, material.text)
        text = accuracy.accumulated_errors(model, codec, material.text, from_token=first)
        row |= text | {"kl_text": text.pop("kl")}
        said = accuracy.accumulated_errors(model, codec, material.generated, from_token=first)
        row |= {"kl_generated": said["kl"], "kl_generated_by_page": said["kl_by_page"]}
    return row | (answers(codec, material) | lengths(codec, material) if problems else {})


def _cache_options(material: Material, **changes: int) -> Row:
    size = material.size
    return {"page_size": size.page_size, "sink_len": size.sink_len, "dtype": material.text.cache.k.dtype} | changes


def answers(codec: Codec | None, material: Material, **changes: int) -> Row:
    """Return what is right in the answers to the material's problems; `changes` are those of the cache's options."""
    row: Row = {}
    for name, problems in material.problems.items():
        right = accuracy.exact_matches(material.model, codec, *problems, **_cache_options(material, **changes))
        row |= answer_fields(name, right)
    return row


def lengths(codec: Codec | None, material: Material) -> Row:
    """Return how long generated chains are beside the right ones, and the share of those of the right length."""
    if "chain" not in material.problems:
        return {}
    prompts, right = material.problems["chain"]
    longest = min(right.shape[1] * 5 // 4, material.model.config.seq_len - prompts.shape[1])
    prompts, options = prompts[: material.size.said_problems], _cache_options(material)
    length = accuracy.answer_lengths(material.model, codec, prompts, lm_tasks.END, longest, **options).float() / right.shape[1]
    return {"chain_length": length.mean().item(), "chain_length_right": (length == 1).float().mean().item()}


def answer_fields(name: str, right: torch.Tensor) -> Row:
    """Return what is reported of answers: right as a whole, and tokens before the first error."""
    if name == "retrieval":
        values = right[:, :-1].unflatten(1, (-1, 1 + lm_tasks.NUM_DIGITS))[..., 1:].all(-1)
        return {"retrieval_exact": values.float().mean().item(), "retrieval_values": values.numel()}
    length = right.long().cumprod(1).sum(1).float()
    return {"chain_exact": right.all(1).float().mean().item(), "chain_right_tokens": length.mean().item()} | {
        "chain_problems": len(right)
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return one row per model, bits and method: the mean over seeds, and the range of the KL."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["bits"], row["method"]].append(row)
    result = []
    for (model, bits, method), group in groups.items():
        mean: Row = {"model": model, "bits": bits, "method": method, "runs": len(group)}
        for key, value in group[0].items():
            if key in HEADERS and isinstance(value, float) and all(isinstance(row.get(key), float) for row in group):
                mean[key] = statistics.fmean(row[key] for row in group)
        if "kl_generated" in mean:
            every = [row["kl_generated"] for row in group]
            mean["kl_generated"] = math.exp(statistics.fmean(map(math.log, every)))
            mean["kl_range"] = f"{min(every):.2g}-{max(every):.2g}"
        result.append(mean)
    return result


HEADERS = {
    "model": "model",
    "bits": "codes",
    "method": "method",
    "bits_per_number": "bits",
    "k_error": "K",
    "v_error": "V",
    "attention_error": "attention",
    "k_error_accumulated": "K accumulated",
    "length_error": "K length",
    "kl_text": "KL text",
    "kl_generated": "KL generated",
    "kl_range": "range",
    "chain_exact": "chains right",
    "chain_length": "length of answers",
    "retrieval_exact": "lines right",
    "runs": "runs",
}
NOTE = """language models trained here, their cache quantized page by page. K, V, attention: relative errors of one pass over
exact keys and values. K accumulated: of a cache whose errors act on later tokens. K length: relative error of the length of
keys. KL in nats to the 16-bit cache, on held-out text and on text that the model generated (geometric mean over seeds). Of
presets only the widths count: pages have 128 tokens, or 64 where the model's context is short."""


def runs(options: Options) -> Iterator[tuple[Row, Material]]:
    """Yield the models of a command line with their material: two shapes on a GPU, a tiny one without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = options.models or (("lab64", "lab128") if device == "cuda" or options.full else ("tiny",))
    for name in names:
        config = lm.CONFIGS[name]
        size = LARGE if config.seq_len >= 2048 else SMALL
        for seed in range(options.seed, options.seed + (3 if options.full else 1)):
            say(f"accuracy: loading {name}, seed {seed}, or training it now, once")
            material = prepare(lm.load_or_train(config, seed, device=device), size, seed, device)
            run = {"model": name, "seed": seed, "head_dim": config.head_dim, "qk_norm": config.qk_norm, "device": device}
            yield run, material


def chosen_bits(options: Options, every: Sequence[str]) -> Sequence[str]:
    """Return the pairs of widths that the command line names, or all on a GPU, or two of them."""
    named = tuple(dict.fromkeys(preset.split("_")[0] for preset in options.presets))
    return named or (every if torch.cuda.is_available() and not options.quick else ("k2v2", "k4v2"))


def measured(run: Row, material: Material, work: Sequence[tuple[str, Codec]], problems: bool) -> Iterator[Row]:
    """Yield a row for each pair of widths and codec."""
    title = f"accuracy {run['model']} {run['seed']}"
    for label, codec in progress(title, work, lambda item: f"{item[0]} {item[1].name}"):
        row = run | {"bits": label, "method": codec.name, "bits_per_number": codec.bits}
        yield row | {"k_bits": codec.k_bits, "v_bits": codec.v_bits} | measure(codec, material, problems)


@sweep("accuracy", needs="any", headers=HEADERS, note=NOTE, tabulate=summary)
def accuracy_sweep(options: Options) -> Iterator[Row]:
    """Compare the published baselines, KVarN as published and the default encoder."""
    for run, material in runs(options):
        size, head_dim = material.size, run["head_dim"]
        if material.problems:
            yield run | {"bits": "16", "method": "16 bits", "bits_per_number": 16.0} | measure(None, material, True)
        work = [(bits, codec) for bits in chosen_bits(options, BITS) for codec in methods(bits, size.page_size, head_dim)]
        yield from measured(run, material, work, True)


@sweep("encoders", needs="any", headers=HEADERS, note=NOTE, tabulate=summary)
def encoders_sweep(options: Options) -> Iterator[Row]:
    """Compare options of the encoder, those that the package does not offer included."""
    for run, material in runs(options):
        work = []
        for bits in chosen_bits(options, ("k2v2", "k4v2", "k4v4")):
            layout = PageLayout.from_name(f"{bits}_g{material.size.page_size}", head_dim=run["head_dim"])
            work += [(bits, variants.codec(layout, k, v, name)) for name, (k, v) in variants.TRIED.items()]
        yield from measured(run, material, work, False)


@sweep(
    "raw_tokens",
    needs="any",
    headers={"model": "model", "bits": "codes", "sink_len": "sink", "keep_pages": "tail pages", "bits_per_number": "bits"}
    | {"kl_text": "KL text", "kl_generated": "KL generated", "k_error_accumulated": "K accumulated"}
    | {"chain_exact": "chains right", "retrieval_exact": "lines right"},
    note="the default encoder with other sinks and tails: tokens that stay in 16 bits, counted in the bits at the full length\n"
    "of the model's context. The predictions compared are the same for all. K accumulated: on generated text.",
)
def raw_tokens_sweep(options: Options) -> Iterator[Row]:
    """Measure what tokens that stay in 16 bits are worth."""
    for run, material in runs(options):
        size, total = material.size, material.model.config.seq_len
        pairs = [(sink, keep) for sink in (0, size.page_size // 2, size.page_size) for keep in (0, 1, 2)]
        work = [(bits, *pair) for bits in chosen_bits(options, ("k2v2", "k4v2")) for pair in pairs]
        for bits, sink_len, keep_pages in progress(f"raw_tokens {run['model']} {run['seed']}", work):
            layout = PageLayout.from_name(f"{bits}_g{size.page_size}", head_dim=run["head_dim"])
            codec = kv_codecs.kvarn(layout, Encoder(), "default")
            row = run | {"bits": bits, "method": codec.name, "sink_len": sink_len, "keep_pages": keep_pages}
            raw_tokens = {"sink_len": sink_len, "keep_pages": keep_pages}
            for name, text in (("text", material.text), ("generated", material.generated)):
                first = size.sink_len + 3 * size.page_size
                changes = accuracy.accumulated_errors(material.model, codec, text, from_token=first, **raw_tokens)
                row |= {f"kl_{name}": changes["kl"], "k_error_accumulated": changes["k_error_accumulated"]}
            row |= answers(codec, material, **raw_tokens)
            # On average half of the last page is not complete.
            raw = min(sink_len + (keep_pages + 0.5) * size.page_size, total)
            yield row | {"bits_per_number": (raw * 16 + (total - raw) * codec.bits) / total}
