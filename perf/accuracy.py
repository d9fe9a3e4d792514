"""What a codec of the key/value cache does to a language model: error of what is cached, and of what is said.

A cache is quantized the way a server does it: the first `sink_len` tokens and the unfinished page stay in 16 bits, and a page
is quantized when it is complete, before the next token is computed ("pseudo-decode"). So errors act on all that follows and
*accumulate*; *static* errors are those of quantizing the keys and values of the 16-bit run. Tokens of a page see each other
exactly, which makes a page at a time equal to a token at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from kv_codecs import Codec
from lm import LMConfig, TinyLM

QUANTILES = (0.5, 0.9, 0.95, 1.0)
"""Ends of the ranges of squared error over which its share in the length of tokens is reported."""


class CodecCache:
    """Keys and values of a batch of sequences of the same length, quantized page by page.

    Args:
        config: the model's config.
        codec: what completed pages go through; None keeps everything in 16 bits.
        batch, capacity: sequences, and tokens of each.
        page_size: tokens of a page.
        sink_len: first tokens that are never quantized.
        keep_pages: completed pages that stay in 16 bits.
        dtype: of everything that isn't quantized.
    """

    def __init__(
        self,
        config: LMConfig,
        codec: Codec | None,
        *,
        batch: int,
        capacity: int,
        page_size: int = 128,
        sink_len: int = 128,
        keep_pages: int = 0,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cpu",
    ) -> None:
        self.codec, self.page_size, self.sink_len, self.keep_pages = codec, page_size, sink_len, keep_pages
        shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.length = 0
        self.num_quantized = 0
        self.q: dict[int, torch.Tensor] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append tokens and attend causally; shapes as in `lm.Attend`, `length` stays."""
        end = self.length + k.shape[1]
        self.k[layer, :, :, self.length : end] = k.transpose(1, 2)
        self.v[layer, :, :, self.length : end] = v.transpose(1, 2)
        self.q[layer] = q
        return attention(q, self.k[layer, :, :, :end], self.v[layer, :, :, :end])

    def advance(self, num_tokens: int) -> None:
        """Count tokens that every layer has appended, and quantize the pages that they complete."""
        self.length += num_tokens
        complete = max(self.length - self.sink_len, 0) // self.page_size - self.keep_pages
        while self.codec is not None and self.num_quantized < complete:
            start = self.sink_len + self.num_quantized * self.page_size
            for layer in range(len(self.k)):
                page = slice(start, start + self.page_size)
                k, v = quantized(self.codec, self.k[layer, :, :, page], self.v[layer, :, :, page])
                self.k[layer, :, :, page], self.v[layer, :, :, page] = k, v
            self.num_quantized += 1

    def room(self) -> int:
        """Return how many tokens are left until a page completes."""
        if self.length < self.sink_len:
            return self.sink_len - self.length
        return self.page_size - (self.length - self.sink_len) % self.page_size


def quantized(codec: Codec, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages [batch, heads, page_size, head_dim] after a round trip through the codec."""
    read = codec.read_back(k.flatten(0, 1).float(), v.flatten(0, 1).float())
    return read[0].view(k.shape).to(k.dtype), read[1].view(v.shape).to(v.dtype)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return causal attention in float32 of the last tokens q [batch, n, q heads, head_dim] over k, v [batch, heads, m, ..]."""
    n, head_dim = q.shape[1], q.shape[3]
    heads, m = k.shape[1:3]
    grouped = q.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).float()
    scores = (grouped @ k.float().transpose(-1, -2)).unflatten(2, (-1, n)) * head_dim**-0.5
    if n > 1:
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out = scores.softmax(-1).flatten(2, 3) @ v.float()
    return out.unflatten(2, (-1, n)).permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype)


@torch.no_grad()
def feed(model: TinyLM, cache: CodecCache, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Feed tokens int64 [batch, n] page by page; yield the logits float32 [batch, part, vocab_size] of each part."""
    while tokens.shape[1]:
        part, tokens = tokens[:, : cache.room()], tokens[:, cache.room() :]
        positions = torch.arange(cache.length, cache.length + part.shape[1], device=part.device).expand_as(part)
        logits = model(part, positions=positions, attend=cache.attend)
        cache.advance(part.shape[1])
        yield logits.float()


@torch.no_grad()
def generate(
    model: TinyLM, cache: CodecCache, prompts: torch.Tensor, num_tokens: int, *, seed: int | None = None
) -> torch.Tensor:
    """Continue prompts token by token: the most likely one each time, or drawn from the distribution with a seed.

    Returns:
        int64 [batch, num_tokens].
    """
    generator = None if seed is None else torch.Generator(prompts.device).manual_seed(seed)
    logits, tokens = list(feed(model, cache, prompts))[-1][:, -1], []
    for step in range(num_tokens):
        if step:
            logits = next(feed(model, cache, tokens[-1]))[:, -1]
        if generator is None:
            token = logits.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


@dataclass
class Text:
    """Tokens, and what the 16-bit cache makes of them: the yardstick of every codec.

    Args:
        tokens: int64 [batch, n].
        log_p: float32 [batch, n, vocab_size], logarithms of the next tokens' probabilities.
        cache: the 16-bit cache after the last token, with the queries of the last page.
    """

    tokens: torch.Tensor
    log_p: torch.Tensor
    cache: CodecCache


def exact_run(model: TinyLM, tokens: torch.Tensor, **options) -> Text:
    """Run tokens through the 16-bit cache."""
    cache = CodecCache(model.config, None, batch=len(tokens), capacity=tokens.shape[1], device=tokens.device, **options)
    log_p = [logits.log_softmax(-1) for logits in feed(model, cache, tokens)]
    return Text(tokens, torch.cat(log_p, dim=1), cache)


def relative(x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the root of the squared error over that of the squares, for each layer (dimension 0)."""
    error, size = (x.float() - exact.float()).flatten(1), exact.float().flatten(1)
    return error.norm(dim=1) / size.norm(dim=1)


def static_errors(codec: Codec, text: Text) -> dict:
    """Quantize the keys and values of a 16-bit run.

    Returns:
        `k_error`, `v_error` and `attention_error` (of the queries of the last page): relative, mean over layers.
        `length_share`: share of the error in the length of keys, E_M / E_T, with E_T = |x - y|**2 and E_M = (|x| - |y|)**2,
        over the tokens of least error up to each of `QUANTILES`. `length_bins`: histogram of |y| / |x| from 0.7 to 1.3.
    """
    exact = text.cache
    first, size = exact.sink_len, exact.page_size
    # Queries of the last page see all pages before it quantized, and their own as it is.
    last = exact.length - (exact.length - first) % size
    last -= size if last == exact.length else 0
    k, v = exact.k.clone(), exact.v.clone()
    for layer in range(len(k)):
        for start in range(first, last, size):
            page = slice(start, start + size)
            k[layer, :, :, page], v[layer, :, :, page] = quantized(codec, k[layer, :, :, page], v[layer, :, :, page])
    body = slice(first, last)
    outs = [
        torch.stack([attention(q, keys[i], values[i]) for i, q in exact.q.items()])
        for keys, values in ((k, v), (exact.k, exact.v))
    ]
    x, y = exact.k[:, :, :, body].float().flatten(0, 3), k[:, :, :, body].float().flatten(0, 3)
    total, lengths = (x - y).square().sum(-1), (x.norm(dim=-1), y.norm(dim=-1))
    order = total.argsort()
    in_length = (lengths[0] - lengths[1]).square()
    ends = [0, *(int(len(order) * quantile) for quantile in QUANTILES)]
    parts = [order[start:end] for start, end in itertools.pairwise(ends)]
    ratio = lengths[1] / lengths[0].clamp_min(1e-20)
    return {
        "k_error": relative(k[:, :, :, body], exact.k[:, :, :, body]).mean().item(),
        "v_error": relative(v[:, :, :, body], exact.v[:, :, :, body]).mean().item(),
        "attention_error": relative(*outs).mean().item(),
        "length_share": [(in_length[part].sum() / total[part].sum().clamp_min(1e-20)).item() for part in parts],
        "length_error": (ratio - 1).square().mean().sqrt().item(),
        "length_bins": torch.histc(ratio.cpu(), 60, 0.7, 1.3).long().tolist(),
    }


def accumulated_errors(
    model: TinyLM, codec: Codec, text: Text, *, from_token: int = 0, sink_len: int | None = None, keep_pages: int = 0
) -> dict:
    """Feed the text through a cache that is quantized page by page, and compare with the 16-bit run.

    Args:
        sink_len: of the quantized cache; that of the 16-bit run by default.
        keep_pages: completed pages that stay in 16 bits.
        from_token: predictions before it don't count; those of the first sink and page are exact in any case.

    Returns:
        `kl`: KL(16 bits || quantized) in nats, mean; `kl_by_page`: of each page; `agreement`: share of predictions with the
        same most likely token; `k_error_accumulated`: error of the keys in the last quantized cache, `k_error_by_page`.
    """
    exact = text.cache
    sink_len = exact.sink_len if sink_len is None else sink_len
    options = {"page_size": exact.page_size, "sink_len": sink_len, "dtype": exact.k.dtype, "device": exact.k.device}
    options["keep_pages"] = keep_pages
    cache = CodecCache(model.config, codec, batch=len(text.tokens), capacity=text.tokens.shape[1], **options)
    divergence, same, start = [], [], 0
    for logits in feed(model, cache, text.tokens):
        log_q, log_p = logits.log_softmax(-1), text.log_p[:, start : start + logits.shape[1]]
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(log_q.argmax(-1) == log_p.argmax(-1))
        start += logits.shape[1]
    kl = torch.cat(divergence, dim=1)[:, from_token:]
    pages = range(sink_len, sink_len + cache.num_quantized * exact.page_size, exact.page_size)
    by_page = [
        relative(cache.k[:, :, :, page : page + exact.page_size], exact.k[:, :, :, page : page + exact.page_size]).mean().item()
        for page in pages
    ]
    return {
        "kl": kl.mean().item(),
        "kl_by_page": [part.mean().item() for part in divergence],
        "agreement": torch.cat(same, dim=1)[:, from_token:].float().mean().item(),
        "k_error_accumulated": sum(by_page) / max(len(by_page), 1),
        "k_error_by_page": by_page,
    }


def answer_tokens(
    model: TinyLM, codec: Codec | None, prompts: torch.Tensor, answers: torch.Tensor, *, batch: int = 250, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed answers through a cache that is quantized page by page, given the right tokens before each.

    Up to its first error a model that generates says the right tokens, so it gives the answer exactly when all are right, and
    the first that isn't is where it leaves it.

    Returns:
        Which tokens of the answers the model would say, bool [problems, n], and the nats of each, float32 [problems, n].
    """
    right, nats = [], []
    for prompt, answer in zip(prompts.split(batch), answers.split(batch), strict=True):
        tokens = torch.cat((prompt, answer), dim=1)
        cache = CodecCache(
            model.config, codec, batch=len(tokens), capacity=tokens.shape[1], device=tokens.device, **options
        )  # fmt: skip
        start, length, said, lost = 0, prompt.shape[1], [], []
        for logits in feed(model, cache, tokens[:, :-1]):
            # Tokens up to the last one of the prompt predict nothing that counts.
            logits = logits[:, max(length - 1 - start, 0) :]
            begin = max(start, length - 1)
            target = tokens[:, begin + 1 : begin + 1 + logits.shape[1]]
            said.append(logits.argmax(-1) == target)
            lost.append(-logits.log_softmax(-1).gather(-1, target[..., None])[..., 0])
            start = cache.length
        right.append(torch.cat(said, dim=1))
        nats.append(torch.cat(lost, dim=1))
    return torch.cat(right), torch.cat(nats)


def exact_matches(
    model: TinyLM, codec: Codec | None, prompts: torch.Tensor, answers: torch.Tensor, *, batch: int = 250, **options
) -> torch.Tensor:
    """Return which tokens of the answers the model would say, bool [problems, n] (`answer_tokens`)."""
    return answer_tokens(model, codec, prompts, answers, batch=batch, **options)[0]


def answer_lengths(
    model: TinyLM, codec: Codec | None, prompts: torch.Tensor, end: int, longest: int, **options
) -> torch.Tensor:
    """Generate answers greedily; return their tokens up to and with `end`, at most `longest`: int64 [problems]."""
    capacity = prompts.shape[1] + longest
    cache = CodecCache(model.config, codec, batch=len(prompts), capacity=capacity, device=prompts.device, **options)
    ended = generate(model, cache, prompts, longest) == end
    return torch.where(ended.any(1), ended.long().argmax(1) + 1, longest)
