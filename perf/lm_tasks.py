"""Problems whose answers take hundreds of exact steps, for language models: a chain of states, and retrieval of lines.

Tokens below 256 are bytes; those from 256 on are numbers of lines and the marks of a problem. In both problems every line of
the prompt is random, so that nothing but the cache says what it was.
"""

from __future__ import annotations

import torch

NUM_LABELS = 240
START, ANSWER, END = (256 + NUM_LABELS + i for i in range(3))
VOCAB_SIZE = 512
IGNORED = -100
"""Target of a token that nothing is to be learnt from, such as the random lines of a prompt."""

NUM_REGISTERS = 16
CHAIN_LINE, CHAIN_STEP = 3, 5
"""Tokens of a line of the prompt, and of a step of the answer."""
KEY, VALUE = 3, 4
"""Tokens of a key and of a value of `retrieval`."""

TASK_SHARE = {"chain": 0.4, "retrieval": 0.25}
"""Share of the training rows that are problems of each kind; the rest is text."""


def chain(num_problems: int, num_steps: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw problems that are solved step by step, each step from the state that an earlier one left.

    16 registers start at 0. A line of the prompt is a number, a register and a digit; lines are shuffled. A step of the answer
    says the number, the register, the digit, the register's state and its new state, (state + digit) mod 10, in the order of
    the numbers. To take a step a model has to find a line in the prompt and the last step of the same register.

    Args:
        num_problems: rows.
        num_steps: lines of the prompt, at most `NUM_LABELS`.

    Returns:
        prompts int64 [num_problems, 3 * num_steps + 2] and answers int64 [num_problems, 5 * num_steps + 1].
    """
    registers = torch.randint(NUM_REGISTERS, (num_problems, num_steps), generator=generator)
    digits = torch.randint(10, (num_problems, num_steps), generator=generator)
    # States before each step: what the register's earlier digits add up to.
    added = torch.nn.functional.one_hot(registers, NUM_REGISTERS) * digits[..., None]
    old = (added.cumsum(1) - added).gather(2, registers[..., None])[..., 0] % 10
    labels = 256 + torch.arange(num_steps).expand(num_problems, -1)
    lines = torch.stack((labels, registers + ord("a"), digits + ord("0")), dim=-1)
    steps = torch.cat((lines, torch.stack((old, (old + digits) % 10), dim=-1) + ord("0")), dim=-1)
    order = torch.rand(num_problems, num_steps, generator=generator).argsort(dim=1)
    shuffled = lines.gather(1, order[..., None].expand_as(lines))
    return _with_ends(shuffled, START, ANSWER), _with_ends(steps, None, END)


def retrieval(
    num_problems: int, num_lines: int, num_queries: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw problems that ask for lines of the prompt.

    A line is a key of three letters and a value of four digits; the answer repeats lines in random order.

    Returns:
        prompts int64 [num_problems, 7 * num_lines + 2] and answers int64 [num_problems, 7 * num_queries + 1].
    """
    keys = torch.stack([torch.randperm(26**KEY, generator=generator)[:num_lines] for _ in range(num_problems)])
    letters = torch.stack([keys // 26**i % 26 for i in range(KEY)], dim=-1) + ord("A")
    values = torch.randint(10, (num_problems, num_lines, VALUE), generator=generator) + ord("0")
    lines = torch.cat((letters, values), dim=-1)
    asked = torch.randint(num_lines, (num_problems, num_queries), generator=generator)
    answers = lines.gather(1, asked[..., None].expand(-1, -1, KEY + VALUE))
    return _with_ends(lines, START, ANSWER), _with_ends(answers, None, END)


def _with_ends(lines: torch.Tensor, first: int | None, last: int) -> torch.Tensor:
    """Return lines [n, lines, tokens] as rows between two marks."""
    mark = lines.new_ones(len(lines), 1)
    parts = [lines.flatten(1), mark * last]
    return torch.cat(parts if first is None else [mark * first, *parts], dim=1)


def write_problems(tokens: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> None:
    """Write problems over the start of some rows of text, those of a kind of one size; prompts are not to be learnt.

    Args:
        tokens, targets: int64 [rows, n], written in place; the first rows get problems, `TASK_SHARE` of them.
        generator: of the problems and their sizes.
    """
    num_rows, length = tokens.shape
    row = 0
    for name, share in TASK_SHARE.items():
        size = 0.15 + 0.85 * torch.rand((), generator=generator).item()
        count = round(share * num_rows)
        if name == "chain":
            num_steps = min(int(size * (length - 3) / (CHAIN_LINE + CHAIN_STEP)), NUM_LABELS)
            prompt, answer = chain(count, num_steps, generator)
            learnt = answer
        else:
            num_lines = int(size * (length - 3) / (KEY + VALUE) * 0.7)
            prompt, answer = retrieval(count, num_lines, max(1, num_lines // 3), generator)
            learnt = answer.clone()
            learnt[:, :-1].view(count, -1, KEY + VALUE)[..., :KEY] = IGNORED
        problem, rows = torch.cat((prompt, answer), dim=1), slice(row, row + count)
        tokens[rows, : problem.shape[1]] = problem
        targets[rows, : problem.shape[1] - 1] = torch.cat((torch.full_like(prompt, IGNORED), learnt), dim=1)[:, 1:]
        row += count
