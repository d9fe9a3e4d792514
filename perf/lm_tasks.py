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
NUM_DIGITS = 6
"""Digits of a line of `retrieval`, which follow its number."""

SHARES = {"chain": 0.4, "retrieval": 0.25, "text": 0.35}
"""Share of the training rows, and of the loss, that each kind of row has."""
FIRST_LENGTH = 128
"""Tokens of a row at the start of a training: what to look for is found among few lines first, then among twice as many."""
LEARNT = 0.1
"""Loss of both kinds of problems, in nats per token, below which rows become longer."""


def chain(num_problems: int, num_steps: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw problems that are solved step by step, each step from the state that an earlier one left.

    16 registers start at 0. A line of the prompt is a number, a register and a digit; lines are shuffled, and the number to
    begin with follows them. A step of the answer says the number, the register, the digit, the register's state and its new
    state, (state + digit) mod 10, and the numbers count down to 0. To take a step a model has to find a line in the prompt and
    the last step of the same register.

    Args:
        num_problems: rows.
        num_steps: lines of the prompt, at most `NUM_LABELS`.

    Returns:
        prompts int64 [num_problems, 3 * num_steps + 3] and answers int64 [num_problems, 5 * num_steps].
    """
    registers = torch.randint(NUM_REGISTERS, (num_problems, num_steps), generator=generator)
    digits = torch.randint(10, (num_problems, num_steps), generator=generator)
    # States before each step: what the register's earlier digits add up to.
    added = torch.nn.functional.one_hot(registers, NUM_REGISTERS) * digits[..., None]
    old = (added.cumsum(1) - added).gather(2, registers[..., None])[..., 0] % 10
    labels = 256 + torch.arange(num_steps - 1, -1, -1).expand(num_problems, -1)
    lines = torch.stack((labels, registers + ord("a"), digits + ord("0")), dim=-1)
    steps = torch.cat((lines, torch.stack((old, (old + digits) % 10), dim=-1) + ord("0")), dim=-1)
    order = torch.rand(num_problems, num_steps, generator=generator).argsort(dim=1)
    shuffled = lines.gather(1, order[..., None].expand_as(lines))
    prompts, answers = _with_ends(shuffled, START, ANSWER), _with_ends(steps, None, END)
    return torch.cat((prompts, answers[:, :1]), dim=1), answers[:, 1:]


def retrieval(
    num_problems: int, num_lines: int, num_queries: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw problems that ask for lines of the prompt.

    A line is a number and six random digits; the answer repeats lines in random order.

    Args:
        num_problems: rows.
        num_lines: lines of the prompt, at most `NUM_LABELS`.
        num_queries: lines of the answer.

    Returns:
        prompts int64 [num_problems, 7 * num_lines + 2] and answers int64 [num_problems, 7 * num_queries + 1].
    """
    labels = 256 + torch.rand(num_problems, NUM_LABELS, generator=generator).argsort(dim=1)[:, :num_lines, None]
    digits = torch.randint(10, (num_problems, num_lines, NUM_DIGITS), generator=generator) + ord("0")
    lines = torch.cat((labels, digits), dim=-1)
    asked = torch.randint(num_lines, (num_problems, num_queries), generator=generator)
    answers = lines.gather(1, asked[..., None].expand(-1, -1, 1 + NUM_DIGITS))
    return _with_ends(lines, START, ANSWER), _with_ends(answers, None, END)


def _with_ends(lines: torch.Tensor, first: int | None, last: int) -> torch.Tensor:
    """Return lines [n, lines, tokens] as rows between two marks."""
    mark = lines.new_ones(len(lines), 1)
    parts = [lines.flatten(1), mark * last]
    return torch.cat(parts if first is None else [mark * first, *parts], dim=1)


def write_problems(tokens: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> dict[str, slice]:
    """Write problems over the first rows of text. Neither their prompts nor what is left of their rows is to be learnt.

    Args:
        tokens, targets: int64 [rows, n], written in place.
        generator: of the problems and of their size, a fifth to all of a row and the same for all of a kind.

    Returns:
        The rows of each kind of `SHARES`.
    """
    num_rows, length = tokens.shape
    rows, row = {}, 0
    for name in ("chain", "retrieval"):
        size = 0.2 + 0.8 * torch.rand((), generator=generator).item()
        count = round(SHARES[name] * num_rows)
        if name == "chain":
            num_steps = max(1, min(int(size * (length - 2) / (CHAIN_LINE + CHAIN_STEP)), NUM_LABELS))
            prompt, answer = chain(count, num_steps, generator)
            learnt = answer
        else:
            num_lines = max(1, min(int(size * (length - 3) / (1 + NUM_DIGITS) * 0.7), NUM_LABELS))
            prompt, answer = retrieval(count, num_lines, max(1, num_lines // 3), generator)
            learnt = answer.clone()
            learnt[:, :-1].view(count, -1, 1 + NUM_DIGITS)[..., 0] = IGNORED
        problem = torch.cat((prompt, answer), dim=1)
        end = problem.shape[1] - 1
        rows[name] = slice(row, row + count)
        tokens[rows[name], : end + 1] = problem
        targets[rows[name]] = IGNORED
        targets[rows[name], prompt.shape[1] - 1 : end] = learnt
        row += count
    return rows | {"text": slice(row, num_rows)}
