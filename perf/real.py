"""What a codec of the cache does to a pretrained model: what it finds in a context, question by question.

A context is prefilled with exact keys and values, as a server does with a prompt, and then everything but the first tokens and
the unfinished page is quantized. Each question is asked alone after it; its own tokens are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kv_codecs import Codec
from lm import causal_attention
from real_model import RealModel
from real_tasks import Context


@dataclass
class Prefilled:
    """A context in the cache.

    Args:
        k, v: float16 [layers, kv heads, tokens, head_dim], exact.
        context: its tokens and questions.
    """

    k: torch.Tensor
    v: torch.Tensor
    context: Context


@torch.no_grad()
def prefill(model: RealModel, context: Context, dtype: torch.dtype = torch.float16) -> Prefilled:
    """Run a context through the model and keep its keys and values."""
    keys, values = [], []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys.append(k[0].transpose(0, 1).to(dtype))
        values.append(v[0].transpose(0, 1).to(dtype))
        return causal_attention(layer, q, k, v)

    model.hidden(torch.tensor([context.tokens], device=model.device), attend=attend)
    return Prefilled(torch.stack(keys), torch.stack(values), context)


def quantize(codec: Codec | None, exact: Prefilled, page_size: int, sink_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the context's keys and values as the cache gives them back; None keeps everything in 16 bits."""
    if codec is None:
        return exact.k, exact.v
    k, v = exact.k.clone(), exact.v.clone()
    num_pages = max(k.shape[2] - sink_len, 0) // page_size
    body = slice(sink_len, sink_len + num_pages * page_size)
    pages = (x[:, :, body].unflatten(2, (num_pages, page_size)).flatten(0, 2).float() for x in (k, v))
    for x, read in zip((k, v), codec.read_back(*pages), strict=True):
        x[:, :, body] = read.view(x[:, :, body].shape).to(x.dtype)
    return k, v


@torch.no_grad()
def ask(model: RealModel, exact: Prefilled, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask each question of a context whose cache is k, v.

    Returns:
        Nats per token of the right answer, and whether the model would say it: both [questions], on the CPU.
    """
    questions, device = exact.context.questions, model.device
    length, width = k.shape[2], max(len(q.prompt) + len(q.answer) for q in questions) - 1
    rows = torch.zeros(len(questions), width, dtype=torch.int64)
    targets = torch.full_like(rows, -100)
    for row, target, question in zip(rows, targets, questions, strict=True):
        whole = question.prompt + question.answer
        row[: len(whole) - 1] = torch.tensor(whole[:-1])
        target[len(question.prompt) - 1 : len(whole) - 1] = torch.tensor(question.answer)
    rows, targets = rows.to(device), targets.to(device)

    def attend(layer: int, q: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor) -> torch.Tensor:
        return _attend_after(q, k[layer], v[layer], own_k, own_v)

    positions = (length + torch.arange(width, device=device)).expand_as(rows)
    hidden = model.hidden(rows, positions=positions, attend=attend)
    counted = targets != -100
    log_p = model.model.lm_head(hidden[counted]).float().log_softmax(-1)
    answer = targets[counted]
    zeros = torch.zeros(targets.shape, device=device)
    nats = zeros.masked_scatter(counted, -log_p.gather(1, answer[:, None])[:, 0])
    wrong = zeros.masked_scatter(counted, (log_p.argmax(-1) != answer).float())
    return (nats.sum(1) / counted.sum(1)).cpu(), (wrong.sum(1) == 0).cpu()


def _attend_after(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own_k: torch.Tensor, own_v: torch.Tensor) -> torch.Tensor:
    """Return attention of rows q [rows, n, q heads, head_dim] to a context k, v [kv heads, m, head_dim] and to themselves."""
    rows, n, q_heads, head_dim = q.shape
    heads, m = k.shape[:2]
    grouped = q.unflatten(2, (heads, -1)).permute(2, 0, 3, 1, 4).float()  # heads, rows, group, n, head_dim
    flat = grouped.flatten(1, 3)
    scale = head_dim**-0.5
    before = (flat @ k.float().transpose(-1, -2)).view(*grouped.shape[:-1], m) * scale
    own_k, own_v = (x.permute(2, 0, 1, 3)[:, :, None].float() for x in (own_k, own_v))  # heads, rows, 1, n, head_dim
    among = (grouped @ own_k.transpose(-1, -2)) * scale
    among = among.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -math.inf)
    weights = torch.cat((before, among), dim=-1).softmax(-1)
    out = (weights[..., :m].flatten(1, 3) @ v.float()).view(grouped.shape) + weights[..., m:] @ own_v
    return out.permute(1, 3, 0, 2, 4).reshape(rows, n, q_heads, head_dim).to(q.dtype)


@dataclass
class Answers:
    """Nats per token and whether the answer is right of each question, with the context each belongs to."""

    nats: torch.Tensor
    right: torch.Tensor
    context: torch.Tensor

    def summary(self) -> dict:
        """Return the mean nats and the share of right answers."""
        return {"nats": self.nats.mean().item(), "right": self.right.float().mean().item(), "questions": len(self.nats)}


def answers(
    model: RealModel, codec: Codec | None, contexts: Sequence[Prefilled], *, page_size: int = 128, sink_len: int = 128
) -> dict[str, Answers]:
    """Ask all questions of all contexts; return the answers of each kind of question."""
    nats, right, kinds, owners = [], [], [], []
    for index, exact in enumerate(contexts):
        k, v = quantize(codec, exact, page_size, sink_len)
        for found, part in zip((nats, right), ask(model, exact, k, v), strict=True):
            found.append(part)
        kinds += [question.kind for question in exact.context.questions]
        owners += [index] * len(exact.context.questions)
    nats, right, owners = torch.cat(nats), torch.cat(right), torch.tensor(owners)
    masks = {kind: torch.tensor([k == kind for k in kinds]) for kind in dict.fromkeys(kinds)}
    return {kind: Answers(nats[mask], right[mask], owners[mask]) for kind, mask in masks.items()}


def paired(x: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None = None) -> tuple[float, float]:
    """Return the mean of x - y over questions and its standard error.

    Questions of one `context` share its keys and values, so that their errors go together: the standard error is that of sums
    over contexts. Without `context` each question is on its own. Of one context alone there is no standard error: NaN.
    """
    difference = (x - y).double()
    if context is None:
        context = torch.arange(len(difference))
    of_context = torch.unique(context, return_inverse=True)[1].to(difference.device)
    count = int(of_context.max()) + 1
    sums = torch.zeros(count, dtype=difference.dtype, device=difference.device)
    sums = sums.index_add(0, of_context, difference - difference.mean())
    error = (sums.square().sum() * count / (count - 1)).sqrt() / len(difference) if count > 1 else sums.new_tensor(float("nan"))
    return difference.mean().item(), error.item()


def joined(parts: Sequence[Answers]) -> Answers:
    """Return the answers to several sets of contexts as one."""
    first, owners = 0, []
    for part in parts:
        owners.append(part.context + first)
        first = int(owners[-1].max()) + 1
    return Answers(torch.cat([part.nats for part in parts]), torch.cat([part.right for part in parts]), torch.cat(owners))


LARGE_TOKENS = (1.0, 30.0, 100.0)
"""Factors of one token of a page by which `page_errors` makes it larger."""


def page_errors(codec: Codec, contexts: dict[int, list[Prefilled]], page_size: int, sink_len: int, *, count: int = 4) -> dict:
    """Return relative errors of single pages of keys and of values, of the first `count` contexts of each length.

    Returns:
        For "k" and "v": `_page_mean` and `_page_worst` over the pages of all layers and heads; and `_beside`, the mean error of
        the other tokens of a page if its middle token is as many times as large as `LARGE_TOKENS` says.
    """
    tiles: dict[str, list[torch.Tensor]] = {"k": [], "v": []}
    for prefilled in contexts.values():
        for exact in prefilled[:count]:
            num_pages = (exact.k.shape[2] - sink_len) // page_size
            body = slice(sink_len, sink_len + num_pages * page_size)
            for name, x in (("k", exact.k), ("v", exact.v)):
                tiles[name].append(x[:, :, body].unflatten(2, (num_pages, page_size)).flatten(0, 2).float())
    k, v = (torch.cat(tiles[name]) for name in "kv")
    others, row = torch.arange(page_size, device=k.device) != page_size // 2, {}
    beside: dict[str, list[float]] = {"k": [], "v": []}
    for factor in LARGE_TOKENS:
        scale = torch.where(others, 1.0, factor)[:, None]
        for name, exact, read in zip("kv", (k * scale, v * scale), codec.read_back(k * scale, v * scale), strict=True):
            errors = [(read - exact)[:, tokens].flatten(1).norm(dim=1) for tokens in (slice(None), others)]
            sizes = [exact[:, tokens].flatten(1).norm(dim=1) for tokens in (slice(None), others)]
            if factor == 1:
                whole = errors[0] / sizes[0]
                row |= {f"{name}_page_mean": whole.mean().item(), f"{name}_page_worst": whole.max().item()}
            beside[name].append((errors[1] / sizes[1]).mean().item())
    return row | {f"{name}_beside": values for name, values in beside.items()}
