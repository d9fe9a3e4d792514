"""A small engine with a prefix cache, and an oracle: what `test_serving.py` drives through `plan_step`, `write_tokens`,
`attend`.

Who takes part in a step is up to `engine_scheduler.py`. The oracle keeps all tokens, and knows of pages only which tokens they
hold.
"""

from __future__ import annotations

from types import ModuleType

import torch
from engine_scheduler import Case, Request, Scheduler

import kvarn_triton
from kvarn_triton import Encoder, Step, check_step, reference
from kvarn_triton.reference.cache import decode_records, encode_records

ENCODER = Encoder(iterations=1)
GROUP = 2


class Engine(Scheduler):
    """Steps through an api; pages, attention and what is read back are compared with the oracle in each."""

    def __init__(self, api: ModuleType, case: Case, device: torch.device, seed: int) -> None:
        super().__init__(case, device, seed)
        self.api = api

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
