"""The sweep `choice`: encoders of keys alone and of values alone on a pretrained model, which is how a default is chosen.

What a default is reported on takes no part: questions come from the set `choice`, unless `--set report` says otherwise. The
other half of the cache stays exact, so that what an encoder loses is not hidden by the other one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import accuracy
import real
import real_model
import real_tasks
import torch
import variants
from common import Options, Row, progress, say, sweep
from real_sweep import PAGE_SIZE, SINK_LEN
from variants import Variant

from kvarn_triton import PageLayout


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured: (tokens, contexts, codes of each, passages of each), and texts of so many tokens."""

    contexts: tuple[tuple[int, int, int, int], ...]
    texts: int
    text_len: int = 1024


LARGE = Size(((1300, 50, 6, 5), (4000, 20, 12, 10)), 12)
SMALL = Size(((1300, 8, 6, 5),), 2)
QUICK = Size(((600, 2, 3, 2),), 1, 512)

_BASE = Variant(iterations=2, divide="roots", tokens_first=True)
_EVEN = "even projection"


def _changed(**options) -> Variant:
    return dataclasses.replace(_BASE, **options)


def _fitted(rounds: int, shrink: float = 1.0, **options) -> Variant:
    return _changed(rounds=rounds, shrink=shrink, rescale=1.0, **options)


KEYS_OF_2_BITS: dict[str, Variant] = {
    "0.8, two fits": _fitted(2, 0.8),
    "0.8, one fit": _fitted(1, 0.8),
    "0.8, four fits": _fitted(4, 0.8),
    "0.9, four fits": _fitted(4, 0.9),
    "0.7, two fits": _fitted(2, 0.7),
    "0.8, one fit, floor -0.6": _fitted(1, 0.8, floor=-0.6),
    "0.8, two fits, floor -0.6": _fitted(2, 0.8, floor=-0.6),
    "0.8, two fits, floor -1": _fitted(2, 0.8, floor=-1.0),
    "0.8, one fit, no floor": _fitted(1, 0.8, floor=-10.0),
    "0.8, one fit, even projections": _fitted(1, 0.8, norm=_EVEN),
    "0.8, two fits, even projections": _fitted(2, 0.8, norm=_EVEN),
}
OTHER_KEYS: dict[str, Variant] = {
    "even projections": _changed(norm=_EVEN),
    "even projections, floor -0.6": _changed(norm=_EVEN, floor=-0.6),
    "even projections, no floor": _changed(norm=_EVEN, floor=-10.0),
    "min and max": _changed(),
    "min and max, no floor": _changed(floor=-10.0),
    "min and max, stretched": _changed(rescale=1.0),
    "one fit": _fitted(1),
}
VALUES_OF_2_BITS: dict[str, Variant] = {
    "0.8, two fits": _fitted(2, 0.8),
    "0.8, one fit": _fitted(1, 0.8),
    "0.8, four fits": _fitted(4, 0.8),
    "0.9, two fits": _fitted(2, 0.9),
    "0.9, four fits": _fitted(4, 0.9),
    "0.7, one fit": _fitted(1, 0.7),
    "0.7, two fits": _fitted(2, 0.7),
    "0.8, one fit, no floor": _fitted(1, 0.8, floor=-10.0),
    "0.8, one fit, even projections": _fitted(1, 0.8, norm=_EVEN),
    "0.8, one fit, feedback 0.1": _fitted(1, 0.8, feedback=0.1),
    "0.8, one fit, feedback 0.3": _fitted(1, 0.8, feedback=0.3),
}
OTHER_VALUES: dict[str, Variant] = {
    "two fits": _fitted(2),
    "min and max": _changed(),
    "one fit": _fitted(1),
    "one fit, no floor": _fitted(1, floor=-10.0),
    "one fit, even projections": _fitted(1, norm=_EVEN),
    "one fit, feedback 0.1": _fitted(1, feedback=0.1),
}


def encoders(side: str, bits: int) -> dict[str, Variant]:
    """Return what is tried for keys (K) or values (V): the method as published, the default, then others.

    All that is fitted is made unbiased in the end.
    """
    tried = {("K", True): KEYS_OF_2_BITS, ("K", False): OTHER_KEYS, ("V", True): VALUES_OF_2_BITS, ("V", False): OTHER_VALUES}
    return {"published": Variant()} | tried[side, bits == 2]


def work(options: Options) -> list[tuple[str, int, str]]:
    """Return side, bits and encoder of each measurement; presets choose the widths of keys and of values."""
    layouts = [PageLayout.from_name(preset) for preset in options.presets]
    widths = {
        "K": sorted({layout.k_bits for layout in layouts}) or [2, 3, 4],
        "V": sorted({layout.v_bits for layout in layouts}) or [2, 3, 4],
    }
    return [(side, bits, name) for side, every in widths.items() for bits in every for name in encoders(side, bits)]


def codec_of(side: str, bits: int, name: str, head_dim: int) -> accuracy.Codec:
    """Return a codec that quantizes keys or values alone."""
    layout = PageLayout.from_name(f"k{bits}v{bits}_g{PAGE_SIZE}", head_dim=head_dim)
    variant = encoders(side, bits)[name]
    return variants.codec(layout, variant if side == "K" else None, variant if side == "V" else None, name)


HEADERS = {
    "side": "side",
    "bits": "bits",
    "method": "encoder",
    "code_nats": "codes: nats a digit",
    "code_more": "more",
    "code_more_error": "+-",
    "passage_nats": "passages: nats a token",
    "passage_more": "more",
    "passage_more_error": "+-",
    "kl": "KL text",
    "kl_relative": "/ published",
}
NOTE = """encoders of keys (K) or values (V) alone on a pretrained model, the other half exact. Nats of the right answer, and
nats more than with the published encoder, paired over questions, with the standard error; all lengths of contexts together,
each in the JSON file. KL in nats to the 16-bit cache on text, errors fed back."""


@sweep("choice", needs="any", headers=HEADERS, note=NOTE)
def choice_sweep(options: Options) -> Iterator[Row]:
    """Compare encoders of keys alone and values alone on a pretrained model, by what is found."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = real_model.load(options.gguf, device=device)
    size = QUICK if options.quick else LARGE if device == "cuda" or options.full else SMALL
    yield from measured(model, size, options)


def measured(model: real_model.RealModel, size: Size, options: Options) -> Iterator[Row]:
    """Yield a row of each encoder."""
    which = options.questions or "choice"
    sources = real_tasks.load_sources(model, which)
    say(f"choice: {model.name} on {model.device}, {which} set, seed {options.seed}; prefilling")
    contexts: dict[int, list[real.Prefilled]] = {}
    for length, count, codes, passages in size.contexts:
        asked = {"codes": codes, "passages": passages, "seed": options.seed}
        drawn = (real_tasks.context(model, sources, i, count, length, **asked) for i in range(count))
        contexts[length] = [real.prefill(model, context) for context in drawn]
    text = accuracy.exact_run(model, real_tasks.texts(sources, size.texts, size.text_len, model.device), sink_len=SINK_LEN)
    run = {"model": model.name, "set": which, "seed": options.seed, "device": str(model.device)}
    published: dict[str, real.Answers] = {}
    published_kl = 0.0
    for side, bits, name in progress("choice", work(options), lambda item: " ".join(map(str, item))):
        codec = codec_of(side, bits, name, model.config.head_dim)
        found = answers(model, codec, contexts)
        kl = accuracy.accumulated_errors(model, codec, text, from_token=SINK_LEN + PAGE_SIZE)["kl"]
        if name == "published":
            published, published_kl = found, kl
        row: Row = {"side": side, "bits": bits, "method": name, "kl": kl, "kl_relative": kl / published_kl}
        for kind, one in found.items():
            row |= {f"{kind}_{key}": value for key, value in one.summary().items()}
            row[f"{kind}_more"], row[f"{kind}_more_error"] = real.paired(one.nats, published[kind].nats, one.context)
        yield run | row


def answers(
    model: real_model.RealModel, codec: accuracy.Codec, contexts: dict[int, list[real.Prefilled]]
) -> dict[str, real.Answers]:
    """Return the answers by kind, of all lengths together and of each."""
    by_length = {n: real.answers(model, codec, every, page_size=PAGE_SIZE, sink_len=SINK_LEN) for n, every in contexts.items()}
    kinds = dict.fromkeys(kind for found in by_length.values() for kind in found)
    joined = {kind: real.joined([found[kind] for found in by_length.values()]) for kind in kinds}
    return joined | {f"{kind}_{n}": one for n, found in by_length.items() for kind, one in found.items()}
