"""Attention over a 16-bit cache, to compare with: inputs of one point, the package's paged twins, and PyTorch's attention.

One piece of memory holds the caches of several sets of inputs. A kernel reads it in the arrangement that it wants (`pool`,
`dense`); what it should have computed is read in the same arrangement (`expected`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence

import prefill_twin
import torch
import twin
from cases import Shape
from timing import Call, measure, num_input_sets
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvarn_triton.testing import relative_error

MAX_ERROR = 2e-3
"""Of float16 results, against float64: twice what attention in float16 has on these inputs."""
PAGE_SIZE = 128
CHECKED_TOKENS = 8
"""Query tokens at the end of the last sequence that are compared with float64."""


class SixteenBit:
    """Queries and 16-bit caches of sequences of one length.

    Args:
        shape: heads.
        batch: sequences.
        context: tokens of each, the query tokens included.
        tokens: query tokens of each.
        seed: of the random numbers.
        device: where.
        sets: sets of inputs; by default more than the L2 cache holds.
    """

    def __init__(
        self, shape: Shape, batch: int, context: int, tokens: int, seed: int, *, device: str = "cuda", sets: int | None = None
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.shape, self.batch, self.context, self.tokens = shape, batch, context, tokens
        self.sets = sets or num_input_sets(4 * shape.head_dim * shape.num_kv_heads * batch * context)
        self.per_row = -(-context // PAGE_SIZE)
        size = (self.sets, batch * self.per_row, 2, shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
        self.memory = torch.empty(size, dtype=torch.float16, device=device).normal_(generator=generator)
        ids = torch.randperm(batch * self.per_row, generator=generator, device=device)
        self.table = ids.int().view(batch, self.per_row)
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        self.ends = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
        q = torch.randn(self.sets, batch * tokens, shape.num_q_heads, shape.head_dim, generator=generator, device=device)
        self.q = [part.clone() for part in q.half()]
        self.out = torch.empty_like(self.q[0])

    def in_eight_bits(self) -> SixteenBit:
        """Return the same in float8_e4m3fn, queries too, twice as many sets; errors are against what the rounded ones give."""
        result = copy.copy(self)
        result.sets = 2 * self.sets  # as many bytes: the L2 cache holds as little of them
        result.q = 2 * [q.to(torch.float8_e4m3fn) for q in self.q]
        result.memory = self.memory.to(torch.float8_e4m3fn).repeat(2, *[1] * (self.memory.dim() - 1))
        return result

    def pool(self, page_size: int = PAGE_SIZE, heads_first: bool = True) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the memory of each set as pages [n, 2, heads, page_size, head_dim], or with heads after tokens, and the table.

        `page_size` divides 128; the ids of smaller pages come in runs.
        """
        per_page = PAGE_SIZE // page_size
        middle = (self.shape.num_kv_heads, page_size) if heads_first else (page_size, self.shape.num_kv_heads)
        pools = [x.view(-1, 2, *middle, self.shape.head_dim) for x in self.memory]
        runs = torch.arange(per_page, dtype=torch.int32, device=self.table.device)
        return pools, (self.table[:, :, None] * per_page + runs).flatten(1).contiguous()

    def dense(self) -> torch.Tensor:
        """Return the memory as keys and values [sets, 2, batch, heads, context, head_dim] without pages."""
        shape = (self.sets, 2, self.batch, self.shape.num_kv_heads, self.per_row * PAGE_SIZE, self.shape.head_dim)
        return self.memory.view(shape)[..., : self.context, :]

    def last_in_pool(self, page_size: int = PAGE_SIZE, heads_first: bool = True) -> torch.Tensor:
        """Return keys and values [2, heads, context, head_dim] of the first set's last sequence, as `pool` arranges them."""
        pools, table = self.pool(page_size, heads_first)
        pages = pools[0][table[-1].long()]
        pages = pages if heads_first else pages.transpose(2, 3)
        return pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.context]

    def error(self, out: torch.Tensor, kv: torch.Tensor) -> float:
        """Return the relative error of the last query tokens of the last sequence; kv is [2, heads, context, head_dim]."""
        count = min(self.tokens, CHECKED_TOKENS)
        k, v = kv.double()
        q = self.q[0][-count:].double().unflatten(1, (len(k), -1))
        scores = torch.einsum("nhgd,htd->nhgt", q, k) * self.shape.head_dim**-0.5
        positions = torch.arange(self.context, device=k.device)
        visible = positions[None] <= positions[-count:, None]
        weights = torch.softmax(scores.where(visible[:, None, None], -torch.inf), dim=-1)
        expected = torch.einsum("nhgt,htd->nhgd", weights, v).flatten(1, 2)
        return relative_error(out.view(-1, *expected.shape[1:])[-count:], expected)

    def twin_variants(self) -> dict[twin.TwinConfig | prefill_twin.PrefillTwinConfig, list[Call]]:
        """Return the calls of the twin for launch configurations: of the decode twin for one query token, else of prefill's."""
        if self.tokens > 1:
            return {config: self._prefill_twin_calls(config) for config in prefill_twin.CONFIGS}
        return {
            twin.TwinConfig(config.block_t, config.num_warps, config.num_stages, waves): self._twin_calls(config, waves)
            for config in twin.CONFIGS
            for waves in twin.WAVES
        }

    def _twin_calls(self, config: twin.TwinConfig, waves: int) -> list[Call]:
        pools, table = self.pool()
        config = twin.TwinConfig(config.block_t, config.num_warps, config.num_stages, waves)
        num_splits = twin.default_num_splits(self.batch * self.shape.num_kv_heads, self.per_row, waves)
        partial = twin.allocate_partial(self.q[0], num_splits)
        return [
            lambda q=q, pages=pages: twin.twin_attention(  # type: ignore[misc]
                q, pages, table, self.seq_lens, self.out, config=config, partial=partial
            )
            for q, pages in zip(self.q, pools, strict=True)
        ]

    def _prefill_twin_calls(self, config: prefill_twin.PrefillTwinConfig) -> list[Call]:
        pools, table = self.pool()
        return [
            lambda q=q, pages=pages: prefill_twin.twin_prefill(q, pages, table, self.seq_lens, self.out, config)  # type: ignore[misc]
            for q, pages in zip(self.q, pools, strict=True)
        ]

    def best_twin(self) -> tuple[str, list[Call], float]:
        """Return the fastest launch configuration of the twin, its calls and its error."""
        variants = self.twin_variants()
        name, error = fastest(variants)
        if name is None:
            raise RuntimeError(f"the 16-bit twin: {error}")
        return str(name), variants[name], self.error(variants[name][0](), self.last_in_pool())  # type: ignore[arg-type]

    def sdpa_calls(self, backend: SDPBackend | None, masked: bool = True) -> list[Call]:
        """Return the calls of PyTorch's attention on dense caches, of one of its backends or of any.

        Not `masked`, query tokens see all tokens, newer ones too, unless there are no others: cuDNN has no other mask for them.
        """
        causal = not masked and self.tokens == self.context
        bias = None
        if self.tokens > 1 and masked:
            from torch.nn.attention.bias import causal_lower_right  # takes seconds: it imports the whole compiler

            bias = causal_lower_right(self.tokens, self.context)

        def call(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            q = q.unflatten(0, (self.batch, self.tokens)).transpose(1, 2)
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=bias, is_causal=causal, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        return [lambda q=q, kv=kv: call(q, kv) for q, kv in zip(self.q, self.dense(), strict=True)]  # type: ignore[misc]


def fastest(variants: dict[object, Sequence[Call]]) -> tuple[object | None, str]:
    """Return the fastest of several ways to do the same, or None and why none of them runs."""
    timings, errors = measure(variants, samples=3, sample_us=200.0)  # type: ignore[arg-type]
    if not timings:
        return None, "; ".join(dict.fromkeys(errors.values())) or "nothing to run"
    return min(timings, key=lambda name: timings[name].us), ""
