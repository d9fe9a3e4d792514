"""What `server_machine.py` drives: a small paged server, and an oracle that keeps every token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from helpers import ON_GPU

from kvarn_triton import Encoder, PageLayout, check_cache, reference

ROWS, MAX_PAGES, NUM_PAGES = 4, 4, 12
"""Batch rows, body pages of the longest sequence, and pages: too few for four such sequences."""
ENCODER = Encoder(iterations=1)
"""Encoding is what takes time in the interpreter; what more iterations do is tested elsewhere."""


@dataclass(frozen=True)
class Case:
    """How a server is set up."""

    layout: PageLayout
    num_kv_heads: int = 1
    sink_len: int = 0
    keep_pages: int = 0
    step_pages: int = 1
    dtype: torch.dtype = torch.float16

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.layout.page_size

    @property
    def max_step(self) -> int:
        """Most tokens that a step writes to a sequence: the most that the ring has slots for."""
        return self.step_pages * self.page_size + 1

    @property
    def num_sink_pages(self) -> int:
        """Raw pages of a sink."""
        return -(-self.sink_len // self.page_size)

    @property
    def num_tail_slots(self) -> int:
        """Slots of the ring: no more than `docs/method.md` asks for."""
        return self.keep_pages + 1 + self.step_pages

    def end_of(self, page: int) -> int:
        """Return the number of tokens up to the end of a body page."""
        return self.sink_len + (page + 1) * self.page_size


CASES = {
    "sink-16": Case(PageLayout(64, 64, 4, 2), sink_len=16, step_pages=2),
    "sink-64-keep-1": Case(PageLayout(64, 64, 3, 2), sink_len=64, keep_pages=1),
    "no-sink-2-heads": Case(PageLayout(64, 64, 4, 2), num_kv_heads=2),
    "sink-128": Case(PageLayout(64, 64, 3, 2), sink_len=128, step_pages=2),
    "sink-100-keep-1-float32": Case(PageLayout(64, 64, 4, 2), sink_len=100, keep_pages=1, dtype=torch.float32),
}
LARGE_CASES = {
    "large": Case(PageLayout(128, 128, 4, 2), num_kv_heads=8, sink_len=128),
    "large-keep-1-bfloat16": Case(
        PageLayout(128, 128, 3, 2), num_kv_heads=8, sink_len=16, keep_pages=1, step_pages=2, dtype=torch.bfloat16
    ),
}
KERNEL_CASES = {**CASES, **LARGE_CASES} if ON_GPU else dict(list(CASES.items())[:4])
"""The interpreter has no time for the last."""


class Pool:
    """Page ids, with the number of tables that each is in. What was freed last is handed out first."""

    def __init__(self, size: int, random: torch.Generator) -> None:
        self.free = torch.randperm(size, generator=random).tolist()
        self.users: Counter[int] = Counter()

    def take(self, count: int) -> list[int]:
        """Return ids that nobody uses."""
        return self.share([self.free.pop() for _ in range(count)])

    def share(self, ids: list[int]) -> list[int]:
        """Return `ids`, for one more table."""
        self.users.update(ids)
        return list(ids)

    def release(self, ids: list[int]) -> list[int]:
        """Take ids out of a table, and return those that are in no table any more."""
        self.users.subtract(ids)
        unused = [page for page in ids if self.users[page] == 0]
        self.free += unused
        return unused


class Server:
    """Tables of a fixed size, and the calls of a server. It knows lengths and ids of pages, but no token.

    Memory that is in no table is poisoned, and so is what a table does not need: rows without a sequence have ids of -1, and
    keep the `num_quantized` of the last one.
    """

    def __init__(self, api: ModuleType, case: Case, device: torch.device, random: torch.Generator) -> None:
        self.api, self.case, self.device = api, case, device
        layout, columns = case.layout, case.num_sink_pages + case.num_tail_slots
        num_raw_pages = ROWS * columns + 1
        self.pool, self.raw_pool = Pool(NUM_PAGES, random), Pool(num_raw_pages, random)
        self.page_ids: dict[int, list[int]] = {}
        self.raw_ids: dict[int, list[int]] = {}
        pages_shape = layout.pages_shape(NUM_PAGES, case.num_kv_heads)
        raw_shape = (num_raw_pages, 2, case.num_kv_heads, layout.page_size, layout.head_dim)
        self.pages = torch.full(pages_shape, 0xFF, dtype=torch.uint8, device=device)
        self.raw_pages = torch.full(raw_shape, float("nan"), dtype=case.dtype, device=device)
        self.block_table = torch.full((ROWS, MAX_PAGES), -1, dtype=torch.int32, device=device)
        self.raw_table = torch.full((ROWS, columns), -1, dtype=torch.int32, device=device)
        self.num_quantized = torch.zeros(ROWS, dtype=torch.int32, device=device)

    def admit(
        self, row: int, *, shared: list[int] | None = None, sink: list[int] | None = None, num_quantized: int = 0
    ) -> None:
        """Give a row its raw pages, and the pages and the sink that it shares with others."""
        case = self.case
        sink = self.raw_pool.take(case.num_sink_pages) if sink is None else self.raw_pool.share(sink)
        self.raw_ids[row] = sink + self.raw_pool.take(case.num_tail_slots)
        self.page_ids[row] = self.pool.share(shared or [])
        self.raw_table[row] = torch.tensor(self.raw_ids[row])
        self.num_quantized[row] = num_quantized
        self.reserve(row, 0)

    def release(self, row: int) -> None:
        """Take a sequence's pages back; poison those that nobody else uses."""
        self.pages[self.pool.release(self.page_ids.pop(row))] = 0xFF
        self.raw_pages[self.raw_pool.release(self.raw_ids.pop(row))] = float("nan")
        self.block_table[row] = -1
        self.raw_table[row] = -1

    def room(self, num_pages: int) -> int:
        """Return how long a sequence can become that has so many pages."""
        return self.case.end_of(min(num_pages + len(self.pool.free), MAX_PAGES) - 1)

    def reserve(self, row: int, length: int) -> None:
        """Give a row the pages that it needs before they complete."""
        ids = self.page_ids[row]
        while self.case.end_of(len(ids) - 1) < length:
            ids += self.pool.take(1)
        self.block_table[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)

    def prefill(self, row: int, tokens: torch.Tensor, cached: int, num_shared: int) -> None:
        """Write tokens [2, n, heads, head_dim] of a prompt whose first `cached` tokens are there, the sink and whole pages."""
        case, length = self.case, cached + tokens.shape[1]
        self.reserve(row, length)
        finished = max(length - case.sink_len, 0) // case.page_size - case.keep_pages
        body = range(num_shared, max(num_shared, finished))
        ids = torch.tensor([self.page_ids[row][j] for j in body], dtype=torch.int32, device=self.device)
        starts = torch.tensor([case.end_of(j - 1) - cached for j in body], dtype=torch.int64, device=self.device)
        self.api.store_pages(*tokens, self.pages, ids, case.layout, token_starts=starts, encoder=ENCODER)
        self.num_quantized[row] = body.stop
        positions = torch.arange(cached, length, device=self.device)
        stored = (positions >= case.end_of(body.start - 1)) & (positions < case.end_of(body.stop - 1))
        self._append(*tokens, torch.where(stored, -1, positions)[None], self.raw_table[row : row + 1])

    def append(self, tokens: dict[int, torch.Tensor], lengths: dict[int, int]) -> None:
        """Write tokens [2, n, heads, head_dim] of some rows behind their lengths; padding is NaN."""
        width = max((new.shape[1] for new in tokens.values()), default=1)
        sizes = (ROWS, width, self.case.num_kv_heads, self.case.layout.head_dim)
        padded = torch.full((2, *sizes), float("nan"), dtype=self.case.dtype, device=self.device)
        positions = torch.full((ROWS, width), -1)
        for row, new in tokens.items():
            padded[:, row, : new.shape[1]] = new
            positions[row, : new.shape[1]] = lengths[row] + torch.arange(new.shape[1])
        self._append(*padded.flatten(1, 2), positions.to(self.device), self.raw_table)

    def _append(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
        slots = self.api.raw_slots(positions, table, sink_len=self.case.sink_len, page_size=self.case.page_size)
        self.api.append_tokens(k, v, self.raw_pages, slots.flatten())

    def _lens(self, lengths: dict[int, int]) -> torch.Tensor:
        """Return the lengths of all rows: 0 for padding."""
        return torch.tensor([lengths.get(row, 0) for row in range(ROWS)], dtype=torch.int32, device=self.device)

    def commit(self, lengths: dict[int, int], num_written: int) -> None:
        """Commit the tokens of some rows after a step that wrote up to `num_written`."""
        tables = self.raw_table, self.block_table, self._lens(lengths), self.num_quantized
        self.api.commit_pages(
            self.raw_pages,
            self.pages,
            *tables,
            self.case.layout,
            sink_len=self.case.sink_len,
            keep_pages=self.case.keep_pages,
            max_new_pages=max(-(-num_written // self.case.page_size), 1),
            encoder=ENCODER,
        )

    def attend(self, q: torch.Tensor, lengths: dict[int, int]) -> torch.Tensor:
        """Attend with q [ROWS, query heads, head_dim], after a look at what is attended to."""
        cache = {
            "pages": self.pages,
            "block_table": self.block_table,
            "seq_lens": self._lens(lengths),
            "layout": self.case.layout,
            "raw_pages": self.raw_pages,
            "raw_table": self.raw_table,
            "num_quantized": self.num_quantized,
            "sink_len": self.case.sink_len,
        }
        check_cache(**cache)
        return self.api.decode_attention(q, **cache)


class Page(NamedTuple):
    """A quantized page as the oracle knows it: its records, and what they decode to."""

    records: torch.Tensor  # uint8 [heads, page_bytes]
    decoded: torch.Tensor  # float64 [2, heads, page_size, head_dim], rotated


class Sequence:
    """The oracle's half of a sequence: its tokens [2, n, heads, head_dim] as a model gives them, and its quantized pages."""

    def __init__(self, case: Case, tokens: torch.Tensor, pages: list[Page] | None = None) -> None:
        self.case, self.tokens, self.pages = case, tokens, list(pages or [])

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def extend(self, tokens: torch.Tensor) -> None:
        """Add committed tokens."""
        self.tokens = torch.cat((self.tokens, tokens), dim=1)

    def quantize(self, *, rounded: bool) -> None:
        """Add the pages that are due; `commit_pages` reads tokens rounded to the raw dtype, `store_pages` doesn't."""
        case = self.case
        while case.end_of(len(self.pages) + case.keep_pages) <= len(self):
            tokens = self.tokens[:, case.end_of(len(self.pages) - 1) : case.end_of(len(self.pages))]
            tile = (self.raw(tokens) if rounded else reference.hadamard(tokens.float())).float().transpose(1, 2)
            records = reference.cache.encode_records(*tile, case.layout, ENCODER)
            decoded = torch.stack(reference.cache.decode_records(records, case.layout, torch.float64))
            self.pages.append(Page(records, decoded))

    def raw(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens as the raw pool holds them."""
        return reference.hadamard(tokens.float()).to(self.case.dtype)

    def attend(self, q: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        """Return plain attention in float64 of q [query heads, head_dim] to everything that is cached."""
        k, v = cached = self.raw(torch.cat((self.tokens, drafts), dim=1)).double().transpose(1, 2)
        for j, page in enumerate(self.pages):
            cached[:, :, self.case.end_of(j - 1) : self.case.end_of(j)] = page.decoded
        rotated = reference.hadamard(q.double()).unflatten(0, (k.shape[0], -1))
        weights = torch.softmax(torch.einsum("hgd,htd->hgt", rotated, k) * q.shape[-1] ** -0.5, dim=-1)
        return reference.hadamard(torch.einsum("hgt,htd->hgd", weights, v)).flatten(0, 1)

    def slot_of(self, position: int) -> tuple[int, int] | None:
        """Return the column of the raw table and the offset of a token; None for one in a quantized page."""
        body, offset = divmod(position - self.case.sink_len, self.case.page_size)
        if position < self.case.sink_len:
            return divmod(position, self.case.page_size)
        if body < len(self.pages):
            return None
        return self.case.num_sink_pages + body % self.case.num_tail_slots, offset
