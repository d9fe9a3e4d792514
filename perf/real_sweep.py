"""The sweep `real`: codecs of the cache on a pretrained language model. `docs/accuracy.md` describes the method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import accuracy
import kv_codecs
import real
import real_model
import real_tasks
import torch
import variants
from common import Options, Row, progress, say, sweep
from kv_codecs import Codec

from kvarn_triton import PUBLISHED, Encoder, PageLayout

BITS = ("k2v2", "k3v2", "k3v3", "k4v2", "k4v4")
PAGE_SIZE = SINK_LEN = 128


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Args:
        contexts: (tokens, contexts, codes of each, passages of each).
        texts, text_len: running text.
        generated, prompt_len, said: prompts, and tokens that the model says after each.
        lists, items: lists that are written once more.
    """

    contexts: tuple[tuple[int, int, int, int], ...]
    texts: int
    text_len: int
    generated: int
    prompt_len: int
    said: int
    lists: int
    items: int


LARGE = Size(((1300, 50, 6, 5), (4000, 10, 12, 10), (7800, 6, 12, 10)), 16, 1024, 16, 512, 512, 16, 200)
SMALL = Size(((1300, 10, 6, 5),), 3, 1024, 3, 512, 256, 2, 100)
QUICK = Size(((600, 2, 3, 2),), 1, 512, 1, 256, 128, 1, 40)


@dataclass
class Material:
    """What codecs are measured on."""

    model: real_model.RealModel
    contexts: dict[int, list[real.Prefilled]]
    text: accuracy.Text
    generated: accuracy.Text
    lists: tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prepare(model: real_model.RealModel, size: Size, which: real_tasks.Set, seed: int) -> Material:
    """Draw the material, and run it through the 16-bit cache."""
    device = model.device
    sources = real_tasks.load_sources(model, which)
    contexts = {}
    for length, count, codes, passages in size.contexts:
        options = {"codes": codes, "passages": passages, "seed": seed}
        drawn = (real_tasks.context(model, sources, i, count, length, **options) for i in range(count))
        contexts[length] = [real.prefill(model, context) for context in drawn]
    text = real_tasks.texts(sources, size.texts, size.text_len, device)
    prompts = real_tasks.chats(model, sources, size.generated, size.prompt_len, device)
    cache = accuracy.CodecCache(
        model.config, None, batch=len(prompts), capacity=size.prompt_len + size.said, sink_len=SINK_LEN, device=device
    )
    say(f"real: generating {size.said} tokens after each of {len(prompts)} prompts")
    said = accuracy.generate(model, cache, prompts, size.said)
    return Material(
        model,
        contexts,
        accuracy.exact_run(model, text, sink_len=SINK_LEN),
        accuracy.exact_run(model, torch.cat((prompts, said), dim=1), sink_len=SINK_LEN),
        real_tasks.lists(model, size.lists, size.items, seed, device),
    )


def methods(bits: str, head_dim: int) -> list[Codec]:
    """Return the methods that are compared at the given bits of codes, KVarN as published first."""
    layout = PageLayout.from_name(f"{bits}_g{PAGE_SIZE}", head_dim=head_dim)
    k, v = layout.k_bits, layout.v_bits
    own = [kv_codecs.kvarn(layout, PUBLISHED, "KVarN as published"), kv_codecs.kvarn(layout, Encoder(), "default")]
    own.append(variants.codec(layout, variants.LENGTHS[k], variants.LENGTHS[v], "least error, lengths kept"))
    if bits not in ("k2v2", "k4v2", "k4v4"):
        return own
    return own + [
        kv_codecs.turboquant(k, v, head_dim),
        kv_codecs.kivi(k, v, head_dim, 64),
        kv_codecs.quarot(k, v, head_dim, 64),
        kv_codecs.round_to_nearest(k, v, head_dim, 64),
    ]


def measure(codec: Codec | None, material: Material) -> tuple[Row, dict[str, real.Answers]]:
    """Return what the sweep says of a codec, and the answers to single questions by kind and length of the context."""
    model, row, answers = material.model, {}, {}
    every: dict[str, list[real.Answers]] = defaultdict(list)
    for length, contexts in material.contexts.items():
        for kind, found in real.answers(model, codec, contexts, page_size=PAGE_SIZE, sink_len=SINK_LEN).items():
            answers[f"{kind}_{length}"] = found
            every[kind].append(found)
    answers |= {kind: real.joined(found) for kind, found in every.items()}
    for name, found in answers.items():
        row |= {f"{name}_{key}": value for key, value in found.summary().items()}
    if codec is not None:
        for name, text in (("text", material.text), ("generated", material.generated)):
            changes = accuracy.accumulated_errors(model, codec, text, from_token=SINK_LEN + PAGE_SIZE)
            row |= {
                f"kl_{name}": changes["kl"],
                f"top1_{name}": changes["agreement"],
                f"kl_{name}_by_page": changes["kl_by_page"],
            }
        row |= real.page_errors(codec, material.contexts, PAGE_SIZE, SINK_LEN)
    prompts, lists, words = material.lists
    right, nats = accuracy.answer_tokens(model, codec, prompts, lists, batch=8, page_size=PAGE_SIZE, sink_len=SINK_LEN)
    answers["list"] = real.Answers(
        (nats * words).sum(1).cpu() / words.sum(1).cpu(), right.all(1).cpu(), torch.arange(len(lists))
    )
    row |= {
        "list_nats": answers["list"].nats.mean().item(),
        "list_right": (right & words).sum().item() / words.sum().item(),
        "list_first_error": right.long().cumprod(1).sum(1).float().mean().item(),
        "list_quarters": [part.float().mean().item() for part in right.tensor_split(4, dim=1)],
    }
    return row, answers


def against(answers: dict[str, real.Answers], published: dict[str, real.Answers]) -> Row:
    """Return nats of every kind of question less those of the published method, with the standard error of the difference."""
    row: Row = {}
    for name, found in answers.items():
        row[f"{name}_more"], row[f"{name}_more_error"] = real.paired(found.nats, published[name].nats, found.context)
    return row


HEADERS = {
    "bits": "codes",
    "method": "method",
    "bits_per_number": "bits",
    "code": "codes: nats a digit",
    "code_right": "right",
    "code_more_text": "more than published",
    "passage": "passages: nats a token",
    "passage_more_text": "more than published",
    "list_right": "list items right",
    "kl_text": "KL text",
    "kl_text_relative": "/ published",
    "top1_text": "top-1",
    "kl_generated": "KL generated",
    "kl_generated_relative": "/ published",
}
NOTE = """a pretrained model. Codes and passages are to be found in a context that is quantized but for its first 128 tokens and
its unfinished page; list items are those of lists written once more, errors of earlier pages fed back. Nats of the right
answer, less is better; differences are paired over questions, with their standard error. KL in nats to the 16-bit cache, errors
fed back, on text and on text that the model said. Bits count scales, zeros, norms and padding."""


def tabulated(rows: list[Row]) -> list[Row]:
    """Return the rows of the table: what `HEADERS` names, with differences as text."""

    def shown(row: Row, kind: str) -> Row:
        if f"{kind}_more" not in row:
            return {kind: row[f"{kind}_nats"]}
        return {
            kind: row[f"{kind}_nats"],
            f"{kind}_more_text": f"{row[f'{kind}_more']:+.3f} +- {row[f'{kind}_more_error']:.3f}",
        }

    full = [row | shown(row, "code") | shown(row, "passage") for row in rows]
    return [{key: row[key] for key in HEADERS if key in row} for row in full]


def measured(codecs: Sequence[tuple[str, Codec]], material: Material) -> Iterator[Row]:
    """Yield a row for each codec; those of the same widths follow KVarN as published, and are compared with it."""
    published: tuple[Row, dict[str, real.Answers]] | None = None
    for bits, codec in progress("real", codecs, lambda item: f"{item[0]} {item[1].name}"):
        row, answers = measure(codec, material)
        if codec.name == "KVarN as published":
            published = row, answers
        row = {"bits": bits, "method": codec.name, "bits_per_number": codec.bits} | row
        if published is not None:
            row |= against(answers, published[1])
            row |= {f"{key}_relative": row[key] / published[0][key] for key in ("kl_text", "kl_generated")}
        yield row


@sweep("real", needs="any", headers=HEADERS, note=NOTE, tabulate=tabulated)
def real_sweep(options: Options) -> Iterator[Row]:
    """Compare baselines, KVarN as published and the default encoder on a pretrained model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = real_model.load(options.gguf, device=device)
    size = QUICK if options.quick else LARGE if device == "cuda" or options.full else SMALL
    which = options.questions or "report"
    say(f"real: {model.name} on {device}, {which} set; prefilling {sum(n for _, n, _, _ in size.contexts)} contexts")
    material = prepare(model, size, which, options.seed)
    run = {"model": model.name, "set": which, "device": device}
    row, _ = measure(None, material)
    yield run | {"bits": "16", "method": "16 bits", "bits_per_number": 16.0} | row
    widths = tuple(dict.fromkeys(preset.split("_")[0] for preset in options.presets))
    widths = widths or (BITS if size is LARGE else ("k2v2", "k4v2"))
    codecs = [(bits, codec) for bits in widths for codec in methods(bits, model.config.head_dim)]
    for row in measured([("fp8", kv_codecs.fp8()), *codecs], material):
        yield run | row
