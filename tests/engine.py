"""A small engine with a prefix cache, and an oracle: what `test_serving.py` drives through `plan_step`, `write_tokens`,
`attend`.

The engine does what others do: it permutes its batch at every step, gives rows and slots of finished requests away in the step
in which they end, and enters the blocks of a prompt into its prefix cache when it schedules them, so that a prompt of the same
step may read what this step writes. The oracle keeps all tokens, and knows of pages only which tokens they hold.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import ModuleType

import torch

import kvarn_triton
from kvarn_triton import Encoder, PageLayout, Step, check_step, reference
from kvarn_triton.reference.cache import decode_records, encode_records

ENCODER = Encoder(iterations=1)
GROUP = 2
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


class Engine:
    """Requests, tables, a prefix cache; `check` compares everything with the oracle after every step."""

    def __init__(self, api: ModuleType, case: Case, device: torch.device, seed: int) -> None:
        self.api, self.case, self.device = api, case, device
        self.random = random.Random(f"{case}{seed}")
        self.generator = torch.Generator().manual_seed(seed)
        layout, heads = case.layout, case.num_kv_heads
        pages = torch.full(layout.pages_shape(case.num_blocks * case.pages_per_block, heads), 0xFF, dtype=torch.uint8)
        num_raw = case.max_requests * case.columns
        raw = torch.full((num_raw, 2, heads, case.size, layout.raw_head_dim), torch.nan, dtype=case.raw_dtype)
        self.pages, self.raw_pages = pages.to(device), raw.to(device)
        self.expected = pages.clone()
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

    def step(self) -> None:
        """Plan, write, attend and read once, and compare with the oracle."""
        chosen = self.schedule()
        if not chosen:
            return
        batch = Batch(self, chosen)
        step = batch.plan()
        self.api.write_tokens(*batch.activations, self.pages, self.raw_pages, step, encoder=ENCODER)
        for request, new in chosen:
            self.expect_pages(request, new)
        assert torch.equal(self.pages.cpu(), self.expected), (self.pages.cpu() != self.expected).any(-1).nonzero().tolist()
        check_step(self.pages, self.raw_pages, step)
        self.check_attention(batch, step)
        for request, new in chosen:
            kept = new.shape[1]
            if request.tokens.shape[1] + kept > request.prompt_len and request.redo is None:
                taken = self.random.randint(0, min(self.case.max_drafts, kept - 1))
                self.rejected += taken
                kept -= taken
            request.tokens = torch.cat((request.tokens, new[:, :kept]), dim=1)
            if request.redo is not None and request.tokens.shape[1] >= request.redo.shape[1]:
                request.redo = None

    def expect_pages(self, request: Request, new: torch.Tensor) -> None:
        """Write the pages that a request completes to the expected pool: from all of its tokens."""
        case, done = self.case, request.tokens.shape[1]
        tokens = torch.cat((request.tokens, new), dim=1)
        length = tokens.shape[1]
        for page in range((length - case.origin) // case.size):
            first = case.origin + page * case.size
            end = first + case.size
            if end <= request.hit or end > length - case.delay or end <= done - case.delay:
                continue
            rounded = first < done or end > length - case.max_drafts - case.delay
            tiles = [self.rotated(half[first:end], rounded).transpose(0, 1) for half in tokens]
            records = encode_records(tiles[0], tiles[1], case.layout, ENCODER)
            block = request.blocks[page // case.pages_per_block]
            self.expected[block * case.pages_per_block + page % case.pages_per_block] = records

    def rotated(self, tokens: torch.Tensor, rounded: bool) -> torch.Tensor:
        """Return tokens as they are stored: rotated, in float32 or as raw pages have them."""
        x = reference.hadamard(tokens.float())
        return x.to(self.case.raw_dtype).float() if rounded else x

    def stored(self, request: Request, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens [2, n, heads, channels] of a request as the cache has them, not rotated."""
        case, length, parts = self.case, tokens.shape[1], []
        sink = 0 if request.hit else case.sink_len
        raw = torch.stack([reference.hadamard(self.rotated(half, True)) for half in tokens])
        parts.append(raw[:, :sink])
        for page in range((length - case.origin) // case.size + 1):
            first = case.origin + page * case.size
            if first < sink or first >= length:
                continue
            final = request.tokens.shape[1] if case.early_pages else request.hit
            if first + case.size <= max(length - case.max_drafts, final):
                block = request.blocks[page // case.pages_per_block]
                record = self.expected[block * case.pages_per_block + page % case.pages_per_block]
                fields = decode_records(record, case.layout, rotated=False)
                parts.append(torch.stack([x.transpose(0, 1) for x in fields]))
            else:
                parts.append(raw[:, first : first + case.size])
        return torch.cat(parts, dim=1)

    def check_attention(self, batch: Batch, step: Step) -> None:
        """Compare attention and what is read back with the oracle, padding included."""
        case = self.case
        q = self.draw(batch.num_tokens, GROUP * case.num_kv_heads, case.layout.head_dim)
        k, v = batch.activations if self.random.random() < 0.7 else (None, None)
        options = {"k": k, "v": v}
        if self.api is kvarn_triton and step.cu_seqlens_q is None and self.random.random() < 0.5:
            options["schedule"] = kvarn_triton.schedule_step(step, q.shape[1], case.num_kv_heads)
        out = self.api.attend(q.to(self.device), self.pages, self.raw_pages, step, **options).cpu().float()
        room = self.random.choice((case.capacity + 5, max(int(step.seq_lens.max()) - self.random.randint(0, 9), 6)))
        shape = step.batch, case.num_kv_heads, room, case.layout.head_dim
        read = [torch.full(shape, 7.0).to(self.device) for _ in range(2)]
        starts = [self.random.randint(0, 5) for _ in range(step.batch)]
        given = {"starts": torch.tensor(starts, dtype=torch.int32).to(self.device)} if any(starts) else {}
        self.api.read_tokens(self.pages, self.raw_pages, step, *read, **given)
        expected = torch.zeros(out.shape)
        for (request, new), b, span in zip(batch.chosen, batch.order, batch.spans, strict=True):
            tokens = torch.cat((request.tokens, new), dim=1)
            stored = self.stored(request, tokens)
            for got, half in zip(read, stored, strict=True):
                place = slice(starts[b], min(starts[b] + half.shape[0], room))
                wanted = half.transpose(0, 1)[:, : place.stop - place.start]
                torch.testing.assert_close(got[b].cpu()[:, place], wanted, rtol=2e-3, atol=4e-3)
                assert (got[b, :, : place.start] == 7).all() and (got[b, :, place.stop :] == 7).all()
            if k is not None and not batch.single:
                stored[:, request.tokens.shape[1] :] = new.float()
            positions = torch.arange(tokens.shape[1])
            row, _ = reference.attention.attend(
                q[span].float(), stored[0].transpose(0, 1), stored[1].transpose(0, 1), positions[-new.shape[1] :], positions,
                case.layout.head_dim**-0.5,
            )  # fmt: skip
            expected[span] = row
        torch.testing.assert_close(out, expected, rtol=5e-3, atol=8e-3)


class Batch:
    """A step as an engine hands it over: tokens of all sequences, padding before, between and behind them."""

    def __init__(self, engine: Engine, chosen: list[tuple[Request, torch.Tensor]]) -> None:
        self.engine, self.chosen, rand, case = engine, chosen, engine.random, engine.case
        self.single = all(new.shape[1] == 1 for _, new in chosen) and rand.random() < 0.7
        padding = rand.randint(0, 2)
        self.order = sorted(rand.sample(range(len(chosen) + padding), len(chosen)))
        before, behind = (0, 0) if self.single else (rand.randint(0, 2), rand.randint(0, 3))
        lens, ends, rows, at, self.spans = [], [before], [], before, []
        parts = [engine.draw(2, before, case.num_kv_heads, case.layout.head_dim)]
        for b in range(len(chosen) + padding):
            if b in self.order:
                request, new = chosen[self.order.index(b)]
                lens.append(request.tokens.shape[1] + new.shape[1])
                rows.append(request.row)
            else:
                new = engine.draw(2, int(self.single), case.num_kv_heads, case.layout.head_dim)
                lens.append(0)
                rows.append(rand.choice((-1, 0)))
            if b in self.order:
                self.spans.append(slice(at, at + new.shape[1]))
            at += new.shape[1]
            ends.append(at)
            parts.append(new)
        parts.append(engine.draw(2, behind, case.num_kv_heads, case.layout.head_dim))
        self.num_tokens = at + behind
        tokens = torch.cat(parts, dim=1).to(engine.device)
        self.activations = tokens[0], tokens[1]
        self.seq_lens, self.rows, self.ends = (torch.tensor(x, dtype=torch.int32) for x in (lens, rows, ends))
        self.longest = max(new.shape[1] for _, new in chosen)

    def plan(self) -> Step:
        """Plan the step through the api."""
        engine, case = self.engine, self.engine.case
        device = engine.device
        options = {"sink_len": case.sink_len, "sink_columns": case.sink_columns, "max_drafts": case.max_drafts}
        options["early_pages"] = case.early_pages
        prefix_lens, block_table = engine.prefix_lens, engine.block_table
        raw_table, rows = engine.raw_table, self.rows
        if engine.random.random() < 0.3:  # tables in the order of the batch
            kept = rows.clamp_min(0).long()
            prefix_lens, block_table, raw_table, rows = prefix_lens[kept], block_table[kept], raw_table[kept], None
        if case.csr:
            ids = [block_table[row if rows is None else max(int(rows[row]), 0)] for row in range(len(self.seq_lens))]
            counts = [int((each >= 0).sum()) for each in ids]
            indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
            indices = torch.cat([each[:n] for each, n in zip(ids, counts, strict=True)])
            block_table, tables = None, {"kv_indptr": indptr.to(device), "kv_indices": indices.to(device)}
        else:
            block_table, tables = block_table.to(device), {"pages_per_block": case.pages_per_block}
        sizes = {} if self.single else {"num_tokens": self.num_tokens, "max_query_len": self.longest}
        return engine.api.plan_step(
            case.layout, self.seq_lens.to(device), None if self.single else self.ends.to(device), block_table,
            raw_table.to(device), rows=None if rows is None else rows.to(device),
            prefix_lens=None if case.early_pages else prefix_lens.to(device),
            **options, **tables, **sizes,
        )  # fmt: skip
