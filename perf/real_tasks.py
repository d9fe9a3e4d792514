"""What a pretrained model is asked: texts, codes and passages to be found in them, lists to be written once more.

All text is on every machine that runs Python: half of it the language's documentation (`pydoc_data.topics`), half the long
docstrings of the standard library. Each half is cut in two: an encoder is chosen on one set and reported on the other.
"""

from __future__ import annotations

import ast
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from real_model import RealModel

Set = Literal["choice", "report"]

WORDS = """
apple river stone window garden paper mountain bottle engine candle forest bridge camera island mirror pencil rocket
saddle tunnel wagon button castle dragon feather guitar hammer jacket kettle ladder magnet needle orange pillow rabbit
spider table umbrella violin whistle anchor basket circle desert eagle flower goat honey iron jewel lemon market nest
ocean piano queen ring sugar tiger valley winter yard zebra bread cloud door fish gold hill ice king lamp moon night
oil park road salt tree wall wolf bell coin drum farm glass horse lake milk owl pearl rain ship train wheel
""".split()  # noqa: SIM905

LEAST_DOCSTRING = 600
"""Letters of a docstring below which it is left out."""
SINK = 128
"""First tokens of a context; nothing that is asked for stands there."""
TAIL = 128
"""Last tokens of a context; they may be in 16 bits, so nothing that is asked for stands there."""
GIVEN, FOLLOWING = 16, 12
"""Tokens of a passage that are given, and those that must follow."""
NUM_DIGITS = 4


def _docstrings() -> str:
    """Return the long docstrings of the standard library's modules, in the order of their files."""
    folder, found = Path(sysconfig.get_paths()["stdlib"]), []
    for file in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        if file.parts[len(folder.parts)] in ("site-packages", "test", "idlelib", "turtledemo", "lib2to3", "pydoc_data"):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
        found += [text for text in map(ast.get_docstring, nodes) if text and len(text) >= LEAST_DOCSTRING]
    return "\n\n".join(dict.fromkeys(found))


def load_sources(model: RealModel, which: Set) -> list[list[int]]:
    """Return the tokens of both sources of a set: the first half of each to choose on, the second to report."""
    from pydoc_data import topics

    halves = []
    for text in ("\n\n".join(topics.topics.values()), _docstrings()):
        tokens = model.tokens_of(text)
        middle = len(tokens) // 2
        halves.append(tokens[:middle] if which == "choice" else tokens[middle:])
    return halves


def cut(sources: list[list[int]], index: int, count: int, length: int) -> list[int]:
    """Return piece `index` of `count` pieces of `length` tokens, taken from the sources in turn and evenly spaced in each."""
    source = sources[index % len(sources)]
    start = (len(source) - length) * (index // len(sources)) // max((count - 1) // len(sources), 1)
    if start < 0:
        raise ValueError(f"length: expected at most the {len(source):,} tokens of a text, got {length:,}")
    return source[start : start + length]


def texts(sources: list[list[int]], count: int, length: int, device) -> torch.Tensor:
    """Return int64 [count, length] of running text."""
    return torch.tensor([cut(sources, i, count, length) for i in range(count)], device=device)


def chats(model: RealModel, sources: list[list[int]], count: int, length: int, device) -> torch.Tensor:
    """Return prompts int64 [count, length] that ask for a summary of a text, in the model's own chat format if it has one."""
    before, after = "Summarize the following text in your own words.\n\n", "\n"
    if getattr(model.tokenizer, "chat_template", None):
        message = [{"role": "user", "content": before + "@@@@"}]
        whole = model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, after = whole.split("@@@@")
    head, tail = model.tokens_of(before), model.tokens_of(after)
    size = length - len(head) - len(tail)
    return torch.tensor([head + cut(sources, i, count, size) + tail for i in range(count)], device=device)


@dataclass
class Question:
    """What is asked after a context: `answer` follows `prompt`."""

    kind: Literal["code", "passage"]
    prompt: list[int]
    answer: list[int]


@dataclass
class Context:
    """Text with codes in it, and what is asked about it."""

    tokens: list[int]
    questions: list[Question]


def context(
    model: RealModel,
    sources: list[list[int]],
    index: int,
    count: int,
    length: int,
    *,
    codes: int = 6,
    passages: int = 5,
    seed: int = 0,
) -> Context:
    """Return text of `length` tokens into which lines with codes were inserted, and questions for codes and passages.

    A line is "The secret code of the <word> is <4 digits>."; the question begins the same line once more. A passage is given by
    16 tokens, and the next 12 must follow. Nothing asked for stands in the first or last 128 tokens.
    """
    generator = torch.Generator().manual_seed(1000 * seed + index)
    words = [WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:codes].tolist()]
    digits = ["".join(map(str, code)) for code in torch.randint(10, (codes, NUM_DIGITS), generator=generator).tolist()]
    asked = list(zip(words, digits, strict=True))
    lines = [model.tokens_of(f"\n\nThe secret code of the {word} is {code}.\n\n") for word, code in asked]
    text = cut(sources, index, count, length - sum(map(len, lines)))
    places = torch.linspace(SINK, len(text) - TAIL, codes + 1)
    places = (places[:-1] + torch.rand(codes, generator=generator) * places.diff()).long().tolist()
    tokens, runs, last = [], [], 0
    for place, line in zip(places, lines, strict=True):
        runs.append((len(tokens), len(tokens) + place - last))
        tokens += text[last:place] + line
        last = place
    tokens += text[last:]
    questions = []
    for word, code in asked:
        whole = model.tokens_of(f"\n\nThe secret code of the {word} is {code}")
        questions.append(Question("code", whole[:-NUM_DIGITS], whole[-NUM_DIGITS:]))
    newlines = model.tokens_of("\n\n")
    fitting = [(max(start, SINK), end - GIVEN - FOLLOWING) for start, end in runs if end - GIVEN - FOLLOWING > max(start, SINK)]
    for i in range(passages):
        start, end = fitting[(i * len(fitting)) // passages]
        at = int(torch.randint(start, end, (), generator=generator))
        passage = tokens[at : at + GIVEN + FOLLOWING]
        questions.append(Question("passage", newlines + passage[:GIVEN], passage[GIVEN:]))
    return Context(tokens, questions)


def lists(model: RealModel, count: int, items: int, seed: int, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return prompts and answers of numbered lists of words that are to be written once more.

    Returns:
        prompts int64 [count, n], answers int64 [count, m], and which tokens of the answers are words: bool [count, m].
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, answers = [], []
    for _ in range(count):
        words = torch.randint(len(WORDS), (items,), generator=generator).tolist()
        lines = [f"{i + 1}. {WORDS[word]}\n" for i, word in enumerate(words)]
        prompts.append(model.tokens_of("A list:\n\n" + "".join(lines) + "\nThe same list once more:\n\n" + lines[0]))
        answers.append(model.tokens_of("".join(lines[1:])))
    # One token a word in the vocabularies that this was tried with; where not, the longer ones are cut at their ends.
    width, length = min(map(len, prompts)), min(map(len, answers))
    prompts = [prompt[len(prompt) - width :] for prompt in prompts]
    answers = torch.tensor([answer[:length] for answer in answers], device=device)
    first = torch.tensor([model.tokens_of(f"1. {word}")[-1] for word in WORDS], device=device)
    return torch.tensor(prompts, device=device), answers, torch.isin(answers, first)
