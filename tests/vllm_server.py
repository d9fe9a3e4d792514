"""A small server that hands over steps as vLLM's model runners do: what `test_vllm_steps.py` drives the plug-in's planner with.

Requests have prompts from few documents, so that some hit the prefix cache, in the same step too. They are preempted, take
drafts back, end, and give rows and blocks away in the step in which they end. Attention is compared with the formula.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvarn_triton import attend, reference, write_tokens
from kvarn_triton.integrations.vllm.choice import Choice
from kvarn_triton.integrations.vllm.plans import Heads, Planner, Plans

HEAD_DIM, GROUP, VOCABULARY, BLOCKS, COLUMNS, LONGEST = 64, 2, 50, 9, 8, 420
NOWHERE = -1
"""Slot of a token that is written nowhere."""


@dataclass(eq=False)
class Request:
    """A request that runs or waits."""

    tokens: list[int]
    end: int  # tokens at which it ends
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int = -1


class Server:
    """Requests, blocks and rows; one layer.

    Args:
        choice: how the cache is laid out.
        seed: of what happens.
        device: of the cache.
        fixed: whether plans of decodes stay where they are, and steps of decodes alone have rows of padding.
    """

    def __init__(self, choice: Choice, seed: int, device: torch.device, fixed: bool = False) -> None:
        self.choice, self.random, self.device, self.fixed = choice, random.Random(seed), device, fixed
        self.layout = choice.layout(HEAD_DIM)
        self.planner = Planner(choice, self.layout, device, fixed, Heads(frozenset({GROUP, 2 * GROUP}), 1, torch.float32))
        self.size = choice.page_size
        make = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(2, VOCABULARY, HEAD_DIM, generator=make)
        self.position = torch.randn(2, LONGEST + 64, HEAD_DIM, generator=make)
        self.pages = self.layout.empty_pages(BLOCKS, 1, device)
        shape = choice.num_raw_pages, 2, 1, self.size, self.layout.raw_head_dim
        self.raw_pages = torch.full(shape, float("nan"), device=device)
        self.free_blocks, self.free_rows = list(range(1, BLOCKS)), list(range(choice.max_requests))
        self.cached: dict[tuple[int, ...], int] = {}  # blocks by all tokens up to their end
        self.owners = [0] * BLOCKS  # requests that have a block
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.ended: list[list[int]] = []  # tokens that others continue
        self.documents = [[self.random.randrange(VOCABULARY) for _ in range(LONGEST)] for _ in range(3)]
        self.worst = 0.0
        self.seen: dict[str, int] = dict.fromkeys(
            ("hits", "same step", "preempted", "taken back", "decodes", "mixed", "ended"), 0
        )

    def arrive(self) -> None:
        """Put a request into the queue: pages of a document, or what another one ended with; tokens of its own, or none."""
        rand = self.random
        shared = rand.choice((0, 0, self.size, self.size + 3, 2 * self.size, 2 * self.size + 10))
        own = rand.choice((0, 1, 5, self.size - 1, self.size, rand.randint(1, 2 * self.size)))
        tokens = rand.choice(self.documents)[:shared] + [rand.randrange(VOCABULARY) for _ in range(own)]
        if self.ended and rand.random() < 0.4:
            tokens = self.ended.pop() + tokens[: rand.randint(1, 20)]
        if tokens and len(tokens) < LONGEST:
            self.waiting.append(Request(tokens, min(len(tokens) + rand.choice((1, 2, 30, 90)), LONGEST)))
            if self.choice.max_drafts and self.choice.prefix_caching and rand.random() < 0.5:
                end = -(-(len(tokens) + 1) // self.size) * self.size + rand.choice((1, 1, 2))  # right after a page is full
                self.waiting[-1].end = min(end, LONGEST)

    def take_block(self) -> int | None:
        """Return a block that nobody has, and forget what it held."""
        if not self.free_blocks:
            return None
        block = self.free_blocks.pop(0)
        self.cached = {key: value for key, value in self.cached.items() if value != block}
        return block

    def release(self, request: Request) -> None:
        """Take row and blocks of a request away; what blocks hold may still be hit."""
        for block in reversed(request.blocks):
            self.owners[block] -= 1
            if not self.owners[block]:
                self.free_blocks.append(block)
        self.free_rows.append(request.row)
        self.running.remove(request)
        request.blocks, request.computed, request.row = [], 0, -1

    def admit(self, request: Request) -> None:
        """Give a waiting request a row, and the blocks that it hits, at most up to its last token."""
        self.waiting.remove(request)
        self.running.append(request)
        request.row = self.free_rows.pop()
        while self.choice.prefix_caching and request.computed + self.size < len(request.tokens):
            block = self.cached.get(tuple(request.tokens[: request.computed + self.size]))
            if block is None:
                break
            if not self.owners[block]:
                self.free_blocks.remove(block)
            self.owners[block] += 1
            request.blocks.append(block)
            request.computed += self.size
        self.seen["hits"] += bool(request.computed)

    def grow(self, request: Request, length: int) -> bool:
        """Give a request the blocks for a length; False if there are none left."""
        while len(request.blocks) * self.size < length:
            block = self.take_block()
            if block is None:
                return False
            self.owners[block] += 1
            request.blocks.append(block)
        return True

    def schedule(self) -> list[tuple[Request, int, int]]:
        """Choose requests of a step, how many tokens each gets, and how many of those are drafts."""
        rand, chosen = self.random, []
        decodes_only = rand.random() < 0.4
        while self.waiting and self.free_rows and not decodes_only and rand.random() < 0.6:
            before = len(chosen)
            self.admit(self.waiting[0])
            request = self.running[-1]
            begun = [other for other, _, _ in chosen if other.blocks[:1] == request.blocks[:1] and request.computed]
            self.seen["same step"] += bool(begun)
            self.choose(request, chosen)
            if len(chosen) == before:
                break
        for request in list(self.running):
            pending = len(request.tokens) - request.computed
            if request.row < 0 or any(request is other for other, _, _ in chosen) or (decodes_only and pending > 1):
                continue
            if rand.random() < 0.8:
                self.choose(request, chosen)
        return [each for each in chosen if each[0].row >= 0]

    def choose(self, request: Request, chosen: list[tuple[Request, int, int]]) -> None:
        """Add a request to a step; without blocks another one is preempted, or itself."""
        rand, pending = self.random, len(request.tokens) - request.computed
        drafts = rand.randint(0, self.choice.max_drafts) if pending == 1 else 0
        count = pending + drafts if rand.random() < 0.6 else rand.randint(1, pending)
        drafts = max(count - pending, 0)
        while not self.grow(request, request.computed + count):
            others = [other for other in self.running if all(other is not each for each, _, _ in chosen)]
            victim = rand.choice(others or [request])
            self.seen["preempted"] += 1
            self.release(victim)
            self.waiting.append(victim)
            if victim is request:
                return
        if self.choice.prefix_caching:
            for page in range(min(request.computed + count, len(request.tokens)) // self.size):
                self.cached.setdefault(tuple(request.tokens[: (page + 1) * self.size]), request.blocks[page])
        chosen.append((request, count, drafts))

    def step(self) -> bool:
        """Run one step; False if nothing could run."""
        if self.random.random() < 0.2:
            self.dummy()
        chosen = self.schedule()
        self.random.shuffle(chosen)
        chosen.sort(key=lambda each: each[1] > 1)  # decodes first
        if not chosen:
            return False
        num_decodes = sum(count == 1 for _, count, _ in chosen)
        self.seen["decodes" if num_decodes == len(chosen) else "mixed"] += 1
        sequences = []
        for request, count, _drafts in chosen:
            new = request.tokens[request.computed : request.computed + count]
            new += [self.random.randrange(VOCABULARY) for _ in range(count - len(new))]
            sequences.append(request.tokens[: request.computed] + new)
        self.run([request for request, _, _ in chosen], [count for _, count, _ in chosen], sequences)
        for (request, count, drafts), sequence in zip(chosen, sequences, strict=True):
            accepted = self.random.randint(0, drafts)
            self.seen["taken back"] += accepted < drafts
            request.computed += count - (drafts - accepted)
            if request.computed >= len(request.tokens):
                request.tokens = [*sequence[: request.computed], self.random.randrange(VOCABULARY)]
            if len(request.tokens) >= request.end:
                self.seen["ended"] += 1
                if self.choice.max_drafts and self.choice.prefix_caching:
                    self.ended.append(request.tokens)
                self.release(request)
        return True

    def common(self, counts: list[int], lengths: list[int], blocks: list[list[int]], rows: list[int], padding: int) -> Any:
        """Return a step as vLLM has it: `CommonAttentionMetadata`, with rows of padding behind the others."""
        ends = np.cumsum([0, *counts]).tolist() + [sum(counts)] * padding
        places = [
            row[position // self.size] * self.size + position % self.size if row else NOWHERE
            for row, count, length in zip(blocks, counts, lengths, strict=True)
            for position in range(length - count, length)
        ] + [NOWHERE] * padding
        table = [row + [self.random.randrange(BLOCKS)] * (COLUMNS - len(row)) for row in blocks] + [[0] * COLUMNS] * padding
        ints = {"dtype": torch.int32}
        return SimpleNamespace(
            query_start_loc=torch.tensor(ends, **ints).to(self.device), query_start_loc_cpu=torch.tensor(ends, **ints),
            seq_lens=torch.tensor(lengths + [0] * padding, **ints).to(self.device), num_reqs=len(counts) + padding,
            num_actual_tokens=sum(counts) + padding, max_query_len=max(counts),
            block_table_tensor=torch.tensor(table, **ints).to(self.device), slot_mapping=torch.tensor(places).to(self.device),
            req_idx=np.array(rows, dtype=np.intp) if self.choice.known_rows else None,
        )  # fmt: skip

    def padding(self, count: int) -> int:
        """Return how many rows of padding a step of decodes gets."""
        return self.random.randint(0, 2)

    def plan(self, common: Any) -> Plans:
        """Plan a step, with the split that vLLM computes."""
        starts = common.query_start_loc_cpu
        lens = (starts[1:] - starts[:-1]).tolist()
        if common.max_query_len == 1:
            return self.planner.plan(common, common.num_reqs, common.num_actual_tokens)
        num_decodes = next(i for i, count in enumerate(lens) if count > 1)
        return self.planner.plan(common, num_decodes, num_decodes)

    def forward(self, plans: Plans, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Run the layer as the plug-in does."""
        out = torch.zeros_like(q)
        for step, span in plans.parts():
            write_tokens(kv[0, span], kv[1, span], self.pages, self.raw_pages, step)
        for step, span in plans.parts():
            schedule = plans.schedule(step, GROUP)
            assert (schedule is None) == (step is plans.prefills)
            attend(q[span], self.pages, self.raw_pages, step, k=kv[0, span], v=kv[1, span], out=out[span], schedule=schedule)
        return out

    def run(self, requests: list[Request], counts: list[int], sequences: list[list[int]]) -> None:
        """Run the layer for chosen requests and compare it with the formula."""
        padding = self.padding(len(counts)) if max(counts) == 1 and self.fixed else 0
        lengths = [len(sequence) for sequence in sequences]
        common = self.common(counts, lengths, [each.blocks for each in requests], [each.row for each in requests], padding)
        plans = self.plan(common)
        full = [self.embedding[:, sequence] + self.position[:, : len(sequence)] for sequence in sequences]
        new = [each[:, -count:] for each, count in zip(full, counts, strict=True)]
        kv = torch.cat([*new, torch.zeros(2, padding, HEAD_DIM)], dim=1)[:, :, None].to(self.device)
        q = torch.randn(kv.shape[1], GROUP, HEAD_DIM, generator=torch.Generator().manual_seed(self.random.randrange(2**31)))
        out = self.forward(plans, q.to(self.device), kv).cpu()
        at = 0
        for each, count in zip(full, counts, strict=True):
            positions = torch.arange(each.shape[1])
            want, _ = reference.attention.attend(
                q[at : at + count], each[0][None], each[1][None], positions[-count:], positions, HEAD_DIM**-0.5
            )
            error = (out[at : at + count] - want).norm() / want.norm()
            self.worst = max(self.worst, float(error.nan_to_num(nan=float("inf"))))  # Python's max leaves NaN out
            at += count
        assert not out[at:].any()

    def dummy(self) -> None:
        """Run a step that vLLM makes up: lengths, rows from 0 on and any blocks, but no place for any token."""
        count, each = self.random.randint(1, self.choice.max_requests), self.random.choice((1, 1, 3))
        common = self.common([each] * count, [each] * count, [[] for _ in range(count)], list(range(count)), 0)
        before = self.pages.clone(), self.raw_pages.clone()
        q = torch.ones(count * each, GROUP, HEAD_DIM, device=self.device)
        self.forward(self.plan(common), q, torch.ones(2, count * each, 1, HEAD_DIM, device=self.device))
        assert torch.equal(before[0], self.pages) and torch.equal(before[1].nan_to_num(7), self.raw_pages.nan_to_num(7))
