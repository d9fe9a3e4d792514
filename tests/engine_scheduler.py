"""Requests of a small engine, their tables and a prefix cache: who takes part in a step, and with which tokens.

What happens is what happens in other engines: the batch is permuted at every step; rows and slots of finished requests are
given away in the step in which they end; blocks of a prompt are in the prefix cache as soon as they are scheduled, so that a
prompt of the same step may read what this step writes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from kvarn_triton import PageLayout

PROMPT = 5
"""Pages of the longest prompt."""


@dataclass(frozen=True)
class Case:
    """How an engine is set up."""

    layout: PageLayout
    sink_len: int = 0
    sink_columns: bool = False
    pages_per_block: int = 1
    max_drafts: int = 0
    early_pages: bool = False
    num_tail_slots: int = 1
    csr: bool = False
    num_kv_heads: int = 1
    dtype: torch.dtype = torch.float16
    raw_dtype: torch.dtype = torch.float16
    max_requests: int = 4
    max_blocks: int = 8
    num_blocks: int = 20

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.layout.page_size

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.size * self.pages_per_block

    @property
    def delay(self) -> int:
        """Tokens that come before a page is quantized."""
        return 0 if self.early_pages else self.max_drafts

    @property
    def origin(self) -> int:
        """Position of the first token of a block table."""
        return 0 if self.sink_columns else self.sink_len

    @property
    def num_sink_pages(self) -> int:
        """Raw pages of a sink."""
        return -(-self.sink_len // self.size)

    @property
    def columns(self) -> int:
        """Columns of a raw table."""
        return self.num_sink_pages + self.num_tail_slots

    @property
    def capacity(self) -> int:
        """Tokens of the longest sequence."""
        return self.origin + self.max_blocks * self.block_size


@dataclass(eq=False)
class Request:
    """A request that runs, or waits after it was preempted."""

    document: int  # what the prompt begins as; -1: none
    prompt_len: int
    tokens: torch.Tensor  # [2, tokens, heads, channels], those that are computed
    redo: torch.Tensor | None = None  # those that were, before it was preempted
    row: int = -1
    blocks: list[int] = field(default_factory=list)
    raw_ids: list[int] = field(default_factory=list)
    hit: int = 0  # tokens that came from the prefix cache


class Scheduler:
    """Requests that run or wait, what they have of pools, and the prefix cache. Memory that changes hands is poisoned."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        self.random = random.Random(f"{case}{seed}")
        self.generator = torch.Generator().manual_seed(seed)
        layout, heads = case.layout, case.num_kv_heads
        pages = torch.full(layout.pages_shape(case.num_blocks * case.pages_per_block, heads), 0xFF, dtype=torch.uint8)
        num_raw = case.max_requests * case.columns
        raw = torch.full((num_raw, 2, heads, case.size, layout.raw_head_dim), torch.nan, dtype=case.raw_dtype)
        self.pages, self.raw_pages = pages.to(device), raw.to(device)
        self.expected = pages.clone()  # what an oracle writes: all that pages may hold
        self.free_blocks, self.users = list(range(case.num_blocks)), [0] * case.num_blocks
        self.free_raw, self.free_rows = list(range(num_raw)), list(range(case.max_requests))
        self.cache: dict[tuple[int, int], int] = {}  # (document, block of it) -> block
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.block_table = torch.full((case.max_requests, case.max_blocks), -1, dtype=torch.int32)
        self.raw_table = torch.full((case.max_requests, case.columns), -1, dtype=torch.int32)
        self.prefix_lens = torch.zeros(case.max_requests, dtype=torch.int32)
        self.hits = self.same_step_hits = self.rejected = self.preempted = 0

    def draw(self, *shape: int) -> torch.Tensor:
        """Return random numbers in the dtype of activations."""
        return torch.randn(*shape, generator=self.generator).to(self.case.dtype)

    def document(self, number: int, length: int) -> torch.Tensor:
        """Return the keys and values of the first tokens of a document."""
        generator = torch.Generator().manual_seed(number)
        shape = 2, self.case.capacity, self.case.num_kv_heads, self.case.layout.head_dim
        return torch.randn(*shape, generator=generator).to(self.case.dtype)[:, :length]

    def admit(self, request: Request) -> None:
        """Give a request a row, raw pages, and what the prefix cache has of its prompt."""
        case = self.case
        request.row = self.free_rows.pop(self.random.randrange(len(self.free_rows)))
        if case.sink_columns and request.tokens.shape[1] == 0:
            most = (request.prompt_len - 1) // case.block_size
            for i in range(most):
                block = self.cache.get((request.document, i))
                if block is None:
                    break
                request.blocks.append(block)
                self.users[block] += 1
                if block in self.free_blocks:
                    self.free_blocks.remove(block)
            request.hit = len(request.blocks) * case.block_size
            self.hits += request.hit > 0
            self.same_step_hits += any(block in self.new_blocks for block in request.blocks)
            request.tokens = self.document(request.document, request.hit)
        num_sink = 0 if request.hit else case.num_sink_pages
        ids = [self.free_raw.pop(0) for _ in range(num_sink + case.num_tail_slots)]
        request.raw_ids = [-1] * (case.num_sink_pages - num_sink) + ids
        self.raw_table[request.row] = torch.tensor(request.raw_ids)
        self.prefix_lens[request.row] = request.hit
        self.running.append(request)

    def release(self, request: Request) -> None:
        """Take everything back from a request; its full blocks stay in the prefix cache until somebody needs them."""
        for block in request.blocks:
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free_blocks.append(block)
        for page in (page for page in request.raw_ids if page >= 0):
            self.raw_pages[page] = torch.nan
            self.free_raw.insert(0, page)
        self.free_rows.append(request.row)
        self.block_table[request.row] = -1
        self.running.remove(request)

    def grow(self, request: Request, length: int) -> bool:
        """Give a request blocks for a length; return whether there are enough."""
        case = self.case
        need = -(-max(length - case.origin, 0) // case.block_size) - len(request.blocks)
        if need > len(self.free_blocks) or length > case.capacity:
            return False
        for _ in range(need):
            block = self.free_blocks.pop(0)
            self.users[block] = 1
            self.cache = {key: value for key, value in self.cache.items() if value != block}
            first = block * case.pages_per_block
            self.pages[first : first + case.pages_per_block] = 0xFF
            self.expected[first : first + case.pages_per_block] = 0xFF
            request.blocks.append(block)
            self.new_blocks.add(block)
        self.block_table[request.row] = -1
        self.block_table[request.row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
        return True

    def schedule(self) -> list[tuple[Request, torch.Tensor]]:
        """Return the requests of a step and their new tokens, in any order; some end, begin or go on in it."""
        rand, case = self.random, self.case
        self.new_blocks: set[int] = set()
        for request in list(self.running):
            if rand.random() < 0.08:
                self.release(request)
            elif rand.random() < 0.05:
                self.release(request)
                self.preempted += 1
                self.waiting.append(Request(-1, 0, request.tokens[:, :0], request.tokens))
        chosen = []

        def add(request: Request, new: torch.Tensor) -> None:
            if new.shape[1] and self.grow(request, request.tokens.shape[1] + new.shape[1]):
                chosen.append((request, new))
                self.register(request, request.tokens.shape[1] + new.shape[1])

        for request in list(self.running):
            if rand.random() < 0.85:
                add(request, self.next_tokens(request))
        while self.free_rows and rand.random() < 0.6:
            if self.waiting:
                request = self.waiting.pop(0)
            else:
                length = rand.randint(1, PROMPT * case.size)
                request = Request(rand.randint(1, 2), length, self.draw(2, 0, case.num_kv_heads, case.layout.head_dim))
            self.admit(request)
            add(request, self.next_tokens(request))
        rand.shuffle(chosen)
        return chosen

    def next_tokens(self, request: Request) -> torch.Tensor:
        """Return the next tokens of a request: a chunk of its prompt, or one token and some drafts."""
        rand, done = self.random, request.tokens.shape[1]
        rest = request.redo
        if rest is None and done < request.prompt_len:
            rest = self.document(request.document, request.prompt_len)
        if rest is not None and done < rest.shape[1]:
            count = rest.shape[1] - done if rand.random() < 0.5 else rand.randint(1, rest.shape[1] - done)
            return rest[:, done : done + count]
        count = 1 + rand.randint(0, self.case.max_drafts)
        return self.draw(2, min(count, self.case.capacity - done), self.case.num_kv_heads, self.case.layout.head_dim)

    def register(self, request: Request, length: int) -> None:
        """Enter the full blocks of a prompt into the prefix cache: before they are written."""
        if self.case.sink_columns and request.document > 0:
            for i in range(min(length - self.case.delay, request.prompt_len) // self.case.block_size):
                self.cache.setdefault((request.document, i), request.blocks[i])
