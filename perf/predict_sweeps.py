"""The sweep `predicts`: whether models that are trained here rank encoders of keys as the pretrained model does.

Keys are quantized to 2 bits, values stay exact, because that is where encoders differ most. What a model finds is measured the
way `real.py` does it: a context is computed exactly, its pages are quantized, then answers are asked for. The pretrained
model's rows come from `perf/results/real_choice_h200.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import accuracy
import lm
import lm_tasks
import lm_text
import real
import torch
import variants
from common import Options, Row, progress, say, sweep
from variants import Variant

from kvarn_triton import PageLayout

REAL = Path(__file__).parent / "results" / "real_choice_h200.json"
BITS = 2
_BASE = Variant(iterations=2, divide="rms")


def _changed(**options) -> Variant:
    return dataclasses.replace(_BASE, **options)


ENCODERS: dict[str, tuple[str, Variant]] = {
    "published": ("second", Variant()),
    "default": ("first", variants.LENGTHS[BITS]),
    "noclip": ("first", _changed(rounds=1, norm="length")),
    "fit": ("first", _changed(rounds=1)),
    "fit .5": ("first", _changed(rounds=1, slope=0.5)),
    "fit keep": ("first", _changed(rounds=1, keep=True)),
    "fit .5 keep": ("first", _changed(rounds=1, slope=0.5, keep=True)),
    "eproj": ("first", _changed(norm="even projection")),
    "elen": ("first", _changed(norm="even length")),
    "nobal": ("first", _changed(iterations=0)),
    "normal": ("first", _changed(normal=True)),
    "s.9": ("first", _changed(shrink=0.9)),
    "s.7 fit proj": ("first", _changed(shrink=0.7, rounds=1, norm="projection")),
    "s0.8 r1 ep": ("second", _changed(shrink=0.8, rounds=1, norm="even projection")),
    "s0.8 r1 re1": ("second", _changed(shrink=0.8, rounds=1, rescale=1.0)),
    "s0.8 r1 re.5": ("second", _changed(shrink=0.8, rounds=1, rescale=0.5)),
    "s0.95 r1 re1": ("second", _changed(shrink=0.95, rounds=1, rescale=1.0)),
    "s0.95 r1 re.5": ("second", _changed(shrink=0.95, rounds=1, rescale=0.5)),
    "s0.85 r0 re1": ("second", _changed(shrink=0.85, rescale=1.0)),
    "s0.9 r4 ep": ("second", _changed(shrink=0.9, rounds=4, norm="even projection")),
    "s0.9 r4 re1": ("second", _changed(shrink=0.9, rounds=4, rescale=1.0)),
}
"""Encoders of keys by their name in the pretrained model's results, with the part that they are in."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured: lists, their lines and those asked for; texts, their bytes and passages; pages."""

    problems: int = 250
    lines: int = 180
    queries: int = 40
    texts: int = 64
    text_len: int = 1408
    passages: int = 8
    page_size: int = 128


LARGE, SMALL = Size(), Size(problems=4, lines=30, queries=4, texts=2, text_len=400, passages=2, page_size=64)
GIVEN, FOLLOWING = 24, 32
"""Bytes of a passage."""


def real_rows() -> dict[str, Row]:
    """Return what the pretrained model loses with each of `ENCODERS`: nats more than published, and KL over published."""
    results = json.loads(REAL.read_text())
    columns = results["columns"]
    rows = {}
    for name, (part, _) in ENCODERS.items():
        found = (dict(zip(columns, row, strict=False)) for row in results[part])
        rows[name] = next(row for row in found if (row["bits"], row["side"], row["name"]) == (BITS, "K", name))
    return rows


@dataclasses.dataclass
class Asked:
    """Contexts that are computed, and what is asked behind each.

    Args:
        cache: the 16-bit cache behind the contexts, with room for one question.
        questions: int64 [questions, contexts, n], each asked alone.
        counted: bool [n - 1], which of the tokens after the first are to be found.
        answer_len: tokens of one answer; a question may have several.
    """

    cache: accuracy.CodecCache
    questions: torch.Tensor
    counted: torch.Tensor
    answer_len: int


@torch.no_grad()
def computed(model: lm.TinyLM, contexts: torch.Tensor, room: int, options: Row) -> accuracy.CodecCache:
    """Return the 16-bit cache behind contexts int64 [contexts, n], with room for as many tokens more."""
    capacity = contexts.shape[1] + room
    cache = accuracy.CodecCache(model.config, None, batch=len(contexts), capacity=capacity, **options)
    for _ in accuracy.feed(model, cache, contexts):
        pass
    return cache


def ask_lines(model: lm.TinyLM, size: Size, seed: int, options: Row) -> Asked:
    """Draw lists of numbered lines, some of which are asked for."""
    generator = torch.Generator().manual_seed(seed + 3000)
    problems = lm_tasks.retrieval(size.problems, size.lines, size.queries, generator)
    prompts, answers = (part.to(options["device"]) for part in problems)
    questions = torch.cat((prompts[:, -1:], answers), dim=1)[None]
    place = torch.arange(answers.shape[1])
    counted = (place % (1 + lm_tasks.NUM_DIGITS) > 0) & (place < answers.shape[1] - 1)
    cache = computed(model, prompts[:, :-1], questions.shape[2], options)
    return Asked(cache, questions, counted, lm_tasks.NUM_DIGITS)


def ask_passages(model: lm.TinyLM, size: Size, seed: int, options: Row) -> Asked:
    """Draw texts, and passages of them that begin once more: `GIVEN` bytes are given, `FOLLOWING` have to follow."""
    texts, _ = lm_text.heldout_prompts([size.text_len] * size.texts, 1, seed=seed + 4000)
    contexts, span = torch.stack(texts).to(options["device"]), GIVEN + FOLLOWING
    generator = torch.Generator().manual_seed(seed + 4000)
    last = size.text_len - size.page_size - span
    starts = torch.randint(size.page_size, last, (size.passages, size.texts, 1), generator=generator)
    places = (starts + torch.arange(span)).to(contexts.device)
    questions = contexts.expand(size.passages, -1, -1).gather(2, places)
    counted = torch.arange(span - 1) >= GIVEN - 1
    return Asked(computed(model, contexts, span, options), questions, counted, FOLLOWING)


@torch.no_grad()
def found(model: lm.TinyLM, asked: Asked, codec: accuracy.Codec | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask with the context's pages quantized.

    Returns:
        Nats a token of the right answers float64 [questions * contexts], and whether answers are right bool [the same,
        answers]; on the CPU.
    """
    exact = asked.cache
    k, v = exact.k.clone(), exact.v.clone()
    last = exact.length - (exact.length - exact.sink_len) % exact.page_size
    for start in range(exact.sink_len, last, exact.page_size):
        page = slice(start, start + exact.page_size)
        for layer in range(len(k) if codec is not None else 0):
            quantized = accuracy.quantized(codec, k[layer, :, :, page], v[layer, :, :, page])
            k[layer, :, :, page], v[layer, :, :, page] = quantized
    length = exact.length

    def attend(layer: int, q: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor) -> torch.Tensor:
        end = length + own_k.shape[1]
        k[layer, :, :, length:end], v[layer, :, :, length:end] = own_k.transpose(1, 2), own_v.transpose(1, 2)
        return accuracy.attention(q, k[layer, :, :, :end], v[layer, :, :, :end])

    nats, right = [], []
    for question in asked.questions:
        tokens, targets = question[:, :-1], question[:, 1:]
        positions = torch.arange(length, length + tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = model(tokens, positions=positions, attend=attend).float()
        lost = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        nats.append(lost.cpu()[:, asked.counted])
        right.append((logits.argmax(-1) == targets).cpu()[:, asked.counted])
    return torch.cat(nats).double().mean(1), torch.cat(right).unflatten(1, (-1, asked.answer_len)).all(-1)


def channel_means(cache: accuracy.CodecCache) -> float:
    """Return the largest mean of a key channel over its standard deviation, in the median head of the first context."""
    k = cache.k[:, 0, :, cache.sink_len : cache.length].float().flatten(0, 1)
    return (k.mean(1).abs() / k.std(1)).amax(-1).median().item()


def ranks(values: list[float]) -> torch.Tensor:
    """Return the place of each value in their order."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Return Spearman's rank correlation of values without ties."""
    return torch.corrcoef(torch.stack((ranks(x), ranks(y))))[0, 1].item()


AGAINST = {
    "lines_codes": ("lines_more", "code_more"),
    "passages_codes": ("passages_more", "code_more"),
    "passages_passages": ("passages_more", "passage_more"),
    "kl_codes": ("kl_relative", "code_more"),
    "kl_kl": ("kl_relative", "kl_relative"),
}
"""Rank correlations by name: the measure here, and that of the pretrained model."""


def tabulated(rows: list[Row]) -> list[Row]:
    """Return a row a model: how its ranks of encoders agree with those of the pretrained model."""
    table = []
    for model in dict.fromkeys((row["model"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["model"], row["seed"]) == model and row["method"] in ENCODERS]
        exact = next(row for row in rows if (row["model"], row["seed"]) == model and row["method"] == "16 bits")
        shown: Row = {key: exact[key] for key in ("model", "seed", "channel_means", "lines_nats", "passages_nats")}
        others = [row for row in own if row["method"] != "published"]
        for name, (here, there) in AGAINST.items():
            shown[name] = rank_correlation([row[here] for row in others], [row["real"][there] for row in others])
        for kind in ("lines", "passages"):
            agreed = [(row[f"{kind}_more"] > 0) == (row["real"]["code_more"] > 0) for row in others if resolved(row["real"])]
            shown[f"{kind}_signs"] = f"{sum(agreed)} of {len(agreed)}"
        table.append(shown)
    return table


def resolved(row: Row) -> bool:
    """Whether the pretrained model's codes differ from those of the published encoder by two standard errors."""
    return abs(row["code_more"]) > 2 * row["code_more_error"]


HEADERS = {
    "model": "model",
    "seed": "seed",
    "channel_means": "channel means",
    "lines_nats": "lines, 16 bits",
    "passages_nats": "passages, 16 bits",
    "lines_codes": "lines: codes",
    "passages_codes": "passages: codes",
    "passages_passages": "passages: passages",
    "kl_codes": "KL: codes",
    "kl_kl": "KL: KL",
    "lines_signs": "signs, lines",
    "passages_signs": "signs, passages",
}
NOTE = """whether models trained here rank encoders of 2-bit keys as the pretrained model does (values exact). Channel means:
largest mean of a key channel over its standard deviation, median head. 16 bits: nats a digit of lines, nats a byte of passages.
Then Spearman's rank correlation of what is lost here with what is lost there, "here: there". Signs: encoders whose codes differ
from those of the published one by two standard errors there, and are better or worse here as there."""


@sweep("predicts", needs="any", headers=HEADERS, note=NOTE, tabulate=tabulated)
def predicts_sweep(options: Options) -> Iterator[Row]:
    """Compare how models trained here and a pretrained one rank encoders of keys."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    references = real_rows()
    for name in options.models or ("lab128", "lab128b", "lab64b"):
        config = lm.CONFIGS[name]
        if not config.tasks:
            raise ValueError(f"model: expected one that learns problems, got {name}")
        for seed in range(options.seed, options.seed + (2 if options.full else 1)):
            say(f"predicts: loading {name}, seed {seed}, or training it now, once")
            model = lm.load_or_train(config, seed, device=device)
            yield from measured(model, {"model": name, "seed": seed, "device": device}, references, options.quick)


def measured(model: lm.TinyLM, run: Row, references: dict[str, Row], quick: bool) -> Iterator[Row]:
    """Yield a row of the 16-bit cache of a model, and one of each encoder."""
    size, device, config = SMALL if quick else LARGE, run["device"], model.config
    dtype = torch.float16 if device == "cuda" else torch.float32
    options = {"page_size": size.page_size, "sink_len": size.page_size, "dtype": dtype, "device": device}
    asked = {"lines": ask_lines(model, size, run["seed"], options), "passages": ask_passages(model, size, run["seed"], options)}
    texts, _ = lm_text.heldout_prompts([config.seq_len] * (size.texts // 4 or 1), 1, seed=run["seed"] + 1)
    options.pop("device")
    text = accuracy.exact_run(model, torch.stack(texts).to(device), **options)
    exact = {f"{kind}_nats": found(model, what, None)[0].mean().item() for kind, what in asked.items()}
    yield run | {"method": "16 bits", "channel_means": channel_means(asked["lines"].cache)} | exact
    layout = PageLayout.from_name(f"k{BITS}v4_g{size.page_size}", head_dim=config.head_dim)
    published: Row = {}
    for name in progress(f"predicts {run['model']} {run['seed']}", list(ENCODERS)):
        codec = variants.codec(layout, ENCODERS[name][1], None, name)
        kl = accuracy.accumulated_errors(model, codec, text, from_token=2 * size.page_size)["kl"]
        published.setdefault("kl", kl)
        row: Row = {"kl": kl, "kl_relative": kl / published["kl"], "real": references[name]}
        for kind, what in asked.items():
            nats, right = found(model, what, codec)
            more, error = real.paired(nats, published.setdefault(kind, nats))
            row |= {f"{kind}_nats": nats.mean().item(), f"{kind}_right": right.float().mean().item()}
            row |= {f"{kind}_more": more, f"{kind}_more_error": error}
        yield run | {"method": name} | row
