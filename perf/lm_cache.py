"""Key/value caches for `TinyLM`, and generation with them.

`DenseCache` is the 16-bit baseline: plain tensors and PyTorch's attention. `PagedCache` reads and writes quantized
pages through `kvarn_triton` alone, the way a server does. Both offer what `KVCache` lists, and the model doesn't know
which one it has:

    prefill        the prompts in one pass with ordinary causal attention on their exact keys and values, as in a
                   server's first chunk; every layer's keys and values are then written to the cache
    decode_step    one token per sequence; every layer appends its key and value, then attends to the cache alone
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from lm import LMConfig, TinyLM, causal_attention
from torch.nn import functional

import kvarn_triton as kvarn
from kvarn_triton import Encoder, PageLayout


class KVCache(Protocol):
    """Keys and values of all layers for a batch of sequences of up to `capacity` tokens.

    `seq_lens`, int32 [batch], counts the cached tokens.
    """

    capacity: int
    seq_lens: torch.Tensor

    def write_prompt(self, layer: int, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> None:
        """Write the first lengths[b] tokens of k, v [batch, n, num_kv_heads, head_dim]; `seq_lens` stays."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write one token per sequence at position `seq_lens`, then attend to all tokens up to it; `seq_lens` stays.

        q [batch, 1, num_q_heads, head_dim]; k, v [batch, 1, num_kv_heads, head_dim]; returns the shape of q.
        """


class DenseCache:
    """A cache that keeps every key and value in `dtype`, unrotated.

    Args:
        config: the model's config.
        batch: sequences.
        capacity: tokens of the longest sequence.
        dtype: what keys, values and queries are rounded to; the attention itself is computed in float32.
    """

    def __init__(
        self,
        config: LMConfig,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cpu",
    ) -> None:
        shape = (2, config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.capacity = capacity
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)

    def write_prompt(self, layer: int, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> None:
        """Write the prompts. What lies past a sequence's length is masked until a later token overwrites it."""
        self.k[layer, :, : k.shape[1]] = k
        self.v[layer, :, : v.shape[1]] = v

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append one token per sequence and attend; see `KVCache`."""
        sequences = torch.arange(q.shape[0], device=q.device)
        self.k[layer, sequences, self.seq_lens] = k[:, 0].to(self.k.dtype)
        self.v[layer, sequences, self.seq_lens] = v[:, 0].to(self.v.dtype)
        mask = torch.arange(self.capacity, device=q.device) <= self.seq_lens[:, None]
        heads = (x.transpose(1, 2).float() for x in (q.to(self.k.dtype), self.k[layer], self.v[layer]))
        out = functional.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None], enable_gqa=True)
        return out.transpose(1, 2).to(q.dtype)


class PagedCache:
    """A cache of quantized pages, with the sink and the unfinished pages in a pool of 16-bit pages.

    All layers share the tables and have their own memory. Page ids are shuffled, and memory starts as NaN in both
    pools, so that a read of the wrong page or of an unwritten token shows.

    Args:
        config: the model's config.
        layout: format of the quantized pages.
        batch, capacity: as for `DenseCache`.
        sink_len: first tokens that stay at 16 bits; one page by default.
        keep_pages: finished pages that stay at 16 bits.
        encoder: options of the encoder.
        dtype: of the 16-bit pages.
        seed: of the page ids.
    """

    def __init__(
        self,
        config: LMConfig,
        layout: PageLayout,
        *,
        batch: int,
        capacity: int,
        sink_len: int | None = None,
        keep_pages: int = 0,
        encoder: Encoder | None = None,
        dtype: torch.dtype = torch.float16,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        self.layout = layout
        self.capacity = capacity
        self.sink_len = layout.page_size if sink_len is None else sink_len
        self.keep_pages = keep_pages
        self.encoder = Encoder() if encoder is None else encoder
        num_pages = max(1, -(-(capacity - self.sink_len) // layout.page_size))
        num_raw_pages = -(-self.sink_len // layout.page_size) + keep_pages + 1
        generator = torch.Generator().manual_seed(seed)
        self.block_table = _shuffled_ids(batch, num_pages, generator).to(device)
        self.raw_table = _shuffled_ids(batch, num_raw_pages, generator).to(device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.num_quantized = torch.zeros(config.num_layers, batch, dtype=torch.int32, device=device)
        pages_shape = (config.num_layers, *layout.pages_shape(batch * num_pages, config.num_kv_heads))
        self.pages = torch.full(pages_shape, 0xFF, dtype=torch.uint8, device=device)
        raw_page_shape = (2, config.num_kv_heads, layout.page_size, layout.head_dim)
        raw_shape = (config.num_layers, batch * num_raw_pages, *raw_page_shape)
        self.raw_pages = torch.full(raw_shape, float("nan"), dtype=dtype, device=device)

    def write_prompt(self, layer: int, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> None:
        """Quantize the prompts' full pages straight from k and v, and append what is left: the sink and the tail."""
        batch, n = k.shape[:2]
        page_size, device = self.layout.page_size, k.device
        k, v = (x.flatten(0, 1).to(self.raw_pages.dtype) for x in (k, v))
        num_quantized = ((lengths - self.sink_len) // page_size - self.keep_pages).clamp(min=0)
        self.num_quantized[layer] = num_quantized

        first_rows = torch.arange(batch, device=device)[:, None] * n
        body_pages = torch.arange(self.block_table.shape[1], device=device)
        full = body_pages < num_quantized[:, None]
        page_ids = torch.where(full, self.block_table, -1)
        token_starts = torch.where(full, first_rows + self.sink_len + body_pages * page_size, 0)
        kvarn.store_pages(
            k,
            v,
            self.pages[layer],
            page_ids.flatten(),
            self.layout,
            token_starts=token_starts.flatten(),
            encoder=self.encoder,
        )

        positions = torch.arange(n, device=device).expand(batch, n)
        body_end = self.sink_len + num_quantized[:, None] * page_size
        quantized = (positions >= self.sink_len) & (positions < body_end)
        slots = self._raw_slots(positions).masked_fill(quantized | (positions >= lengths[:, None]), -1)
        kvarn.append_tokens(k, v, self.raw_pages[layer], slots.flatten())

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append one token per sequence, quantize the page that it finishes, and attend; see `KVCache`."""
        dtype = self.raw_pages.dtype
        raw_pages, pages, num_quantized = self.raw_pages[layer], self.pages[layer], self.num_quantized[layer]
        slots = self._raw_slots(self.seq_lens[:, None])
        kvarn.append_tokens(k[:, 0].to(dtype), v[:, 0].to(dtype), raw_pages, slots.flatten())
        lens = self.seq_lens + 1
        kvarn.commit_pages(
            raw_pages,
            pages,
            self.raw_table,
            self.block_table,
            lens,
            num_quantized,
            self.layout,
            sink_len=self.sink_len,
            keep_pages=self.keep_pages,
            encoder=self.encoder,
        )
        out = kvarn.decode_attention(
            q[:, 0].to(dtype),
            pages,
            self.block_table,
            lens,
            self.layout,
            raw_pages=raw_pages,
            raw_table=self.raw_table,
            num_quantized=num_quantized,
            sink_len=self.sink_len,
        )
        return out[:, None].to(q.dtype)

    def _raw_slots(self, positions: torch.Tensor) -> torch.Tensor:
        return kvarn.raw_slots(positions, self.raw_table, sink_len=self.sink_len, page_size=self.layout.page_size)


def _shuffled_ids(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Return the numbers below rows * columns in random order, int32 [rows, columns]."""
    return torch.randperm(rows * columns, generator=generator, dtype=torch.int32).view(rows, columns)


def prefill(model: TinyLM, cache: KVCache, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run the prompts, int64 [length] each, through the model and into an empty cache; return their next-token logits.

    Returns:
        logits [len(prompts), 256] of the token after each prompt.
    """
    device = cache.seq_lens.device
    tokens = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache.write_prompt(layer, k, v, lengths)
        return causal_attention(layer, q, k, v)

    logits = model(tokens, attend=attend)
    cache.seq_lens.copy_(lengths)
    return logits[torch.arange(len(prompts), device=device), lengths.long() - 1]


def decode_step(model: TinyLM, cache: KVCache, tokens: torch.Tensor) -> torch.Tensor:
    """Feed one token per sequence, int64 [batch]; return the logits [batch, 256] of the next ones."""
    logits = model(tokens[:, None], positions=cache.seq_lens[:, None], attend=cache.attend)
    cache.seq_lens += 1
    return logits[:, 0]


@torch.no_grad()
def run(
    model: TinyLM,
    cache: KVCache,
    prompts: Sequence[torch.Tensor],
    num_tokens: int,
    *,
    continuation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue the prompts by `num_tokens` tokens.

    Args:
        cache: an empty cache for `len(prompts)` sequences.
        prompts: int64 [length] each.
        continuation: int64 [batch, num_tokens], the tokens to feed; by default each step's most likely token.

    Returns:
        tokens int64 [batch, num_tokens], those fed, and logits float32 [batch, num_tokens, 256]; `logits[:, i]` come
        after `tokens[:, i]`, so that all of them were computed from the cache.
    """
    longest = max(map(len, prompts)) + num_tokens
    if longest > cache.capacity:
        raise ValueError(f"cache: expected a capacity of at least {longest} tokens, got {cache.capacity}")
    logits = prefill(model, cache, prompts)
    fed, seen = [], []
    for step in range(num_tokens):
        tokens = logits.argmax(-1) if continuation is None else continuation[:, step].to(logits.device)
        logits = decode_step(model, cache, tokens)
        fed.append(tokens)
        seen.append(logits.float())
    return torch.stack(fed, 1), torch.stack(seen, 1)
