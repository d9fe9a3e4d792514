"""Random requests to the server of `server_model.py`, and what must hold after each: what `test_server.py` runs."""

from __future__ import annotations

from types import ModuleType

import torch
from helpers import assert_same_bits
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from server_model import MAX_PAGES, ROWS, Case, Sequence, Server

GROUP = 2
ERROR = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Rounding of queries and weights, by the dtype of the query; that of the result is relative and comes on top."""

PICKS = st.integers(0, ROWS - 1)
"""Which of the sequences that there are."""
MASKS = st.integers(0, 2**ROWS - 1)
"""Which rows take part in a step; if none of those has a sequence, all do."""
OFFSETS = st.one_of(st.integers(-1, 1), st.sampled_from([-59, -40, 23]))
POINTS = st.tuples(st.integers(-1, MAX_PAGES - 1), OFFSETS)
"""A length: pages and tokens behind the start of the body. Below 0 it is no token."""
STEPS = st.lists(st.tuples(st.integers(0, 2), OFFSETS), min_size=ROWS, max_size=ROWS)
"""Tokens of a step, for each row: pages and tokens behind the end of the page in progress. At least one, at most `max_step`."""


class CacheMachine(RuleBasedStateMachine):
    """Requests to a server, and what must hold after each."""

    def __init__(self, api: ModuleType, case: Case, device: torch.device) -> None:
        super().__init__()
        self.num_requests = 0
        self.case, self.device, self.random = case, device, torch.Generator().manual_seed(0)
        self.server = Server(api, case, device, self.random)
        self.running: dict[int, Sequence] = {}
        self.waiting: list[Sequence] = []

    @initialize(number=st.integers(0, 2**16), points=st.lists(POINTS, min_size=1, max_size=3))
    def begin(self, number: int, points: list[tuple[int, int]]) -> None:
        """Number the run, which draws its tokens, and start some sequences.

        `hypothesis` tries 0 first, and with it the simplest of all requests: those show little and are left out.
        """
        assume(number > 0)
        self.random.manual_seed(number)
        for point in points:
            self.start(point)

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).to(self.case.dtype).to(self.device)

    def _tokens(self, count: int) -> torch.Tensor:
        """Return keys and values of new tokens."""
        return self._draw(2, count, self.case.num_kv_heads, self.case.layout.head_dim)

    def _free_row(self) -> int | None:
        return next((row for row in range(ROWS) if row not in self.running), None)

    def _pick(self, pick: int) -> int:
        """Return the row of a sequence."""
        rows = sorted(self.running)
        return rows[pick % len(rows)]

    def _prompt(self, point: tuple[int, int], num_shared: int = 0) -> int:
        """Return the length of a prompt for which there is room."""
        length = max(self.case.end_of(point[0] - 1) + point[1], 0)
        return min(length, self.server.room(num_shared))

    def _drawn_step(self, mask: int, steps: list[tuple[int, int]]) -> dict[int, int]:
        """Return how many tokens each row takes."""
        counts = {}
        for row in self._rows(mask):
            length, (pages, offset) = len(self.running[row]), steps[row]
            rest = -(length - self.case.sink_len) % self.case.page_size
            counts[row] = min(max(rest + pages * self.case.page_size + offset, 1), self.case.max_step)
        return counts

    def _rows(self, mask: int) -> list[int]:
        return [row for row in self.running if mask >> row & 1] or list(self.running)

    def _prefill(self, row: int, sequence: Sequence, cached: int) -> None:
        """Write what is not cached of a sequence whose row has its tables."""
        self.server.prefill(row, sequence.tokens[:, cached:], cached, len(sequence.pages))
        sequence.quantize(rounded=False)
        self.running[row] = sequence

    def _step(self, tokens: dict[int, torch.Tensor]) -> None:
        """Append and commit tokens; rows that are not named are padding."""
        self.server.append(tokens, {row: len(sequence) for row, sequence in self.running.items()})
        self._commit(tokens, max((new.shape[1] for new in tokens.values()), default=0))

    def _commit(self, tokens: dict[int, torch.Tensor], num_written: int) -> None:
        for row, new in tokens.items():
            self.running[row].extend(new)
        self.server.commit({row: len(self.running[row]) for row in tokens}, num_written)
        for row in tokens:
            self.running[row].quantize(rounded=True)

    def _reserved_tokens(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """Return new tokens of rows, as many of `counts` as there are pages for."""
        tokens = {}
        for row, count in counts.items():
            length = len(self.running[row])
            count = min(count, self.server.room(len(self.server.page_ids[row])) - length)
            if count > 0:
                self.server.reserve(row, length + count)
                tokens[row] = self._tokens(count)
        return tokens

    def _fork(self, donor_row: int, row: int, num_shared: int) -> None:
        """Continue a sequence in another row too. Finished pages are shared, unfinished ones copied."""
        donor, server = self.running[donor_row], self.server
        ids, sink = server.raw_ids[donor_row], None
        if len(donor) >= self.case.sink_len:
            sink = ids[: self.case.num_sink_pages]
        server.admit(row, shared=server.page_ids[donor_row][:num_shared], sink=sink, num_quantized=len(donor.pages))
        server.raw_pages[server.raw_ids[row]] = server.raw_pages[ids]
        server.reserve(row, len(donor))
        self.running[row] = Sequence(self.case, donor.tokens, donor.pages)

    @precondition(lambda self: self._free_row() is not None)
    @rule(point=POINTS)
    def start(self, point: tuple[int, int]) -> None:
        """A prompt, which may be empty: full pages are stored, the rest is appended. Page ids are used again (KF 12)."""
        row, length = self._free_row(), self._prompt(point)
        self.server.admit(row)
        self._prefill(row, Sequence(self.case, self._tokens(length)), 0)

    @precondition(lambda self: self.running and self._free_row() is not None)
    @rule(pick=PICKS, pages=st.integers(0, MAX_PAGES), point=POINTS)
    def start_with_prefix(self, pick: int, pages: int, point: tuple[int, int]) -> None:
        """A prompt that begins as another sequence: sink and quantized pages are shared (KF 10)."""
        donor_row, row = self._pick(pick), self._free_row()
        donor = self.running[donor_row]
        if len(donor) < self.case.sink_len:
            return
        pages = min(pages, len(donor.pages))
        cached = self.case.end_of(pages - 1)
        length = max(self._prompt(point, pages), cached)
        sink = self.server.raw_ids[donor_row][: self.case.num_sink_pages]
        self.server.admit(row, shared=self.server.page_ids[donor_row][:pages], sink=sink)
        tokens = torch.cat((donor.tokens[:, :cached], self._tokens(length - cached)), dim=1)
        self._prefill(row, Sequence(self.case, tokens, donor.pages[:pages]), cached)

    @precondition(lambda self: self.running and self._free_row() is not None)
    @rule(pick=PICKS)
    def fork(self, pick: int) -> None:
        """Two continuations of one sequence, which differ from here on, in the unfinished page."""
        row = self._pick(pick)
        num_pages = len(self.running[row].pages)
        if len(self.running[row]) <= self.server.room(num_pages):
            self._fork(row, self._free_row(), num_pages)

    @precondition(lambda self: self.running and self._free_row() is not None)
    @rule(pick=PICKS)
    def complete_shared_page(self, pick: int) -> None:
        """Two equal sequences complete a page whose id is in both tables, in one step (KF 13)."""
        row, twin = self._pick(pick), self._free_row()
        length, num_shared = len(self.running[row]), len(self.running[row].pages) + 1
        end = self.case.end_of(num_shared - 1 + self.case.keep_pages)
        needed = 2 * (num_shared + self.case.keep_pages) - len(self.server.page_ids[row]) - num_shared
        if (
            0 < end - length <= self.case.max_step
            and end <= self.case.end_of(MAX_PAGES - 1)
            and needed <= len(self.server.pool.free)
        ):
            self.server.reserve(row, end)
            self._fork(row, twin, num_shared)
            self.server.reserve(twin, end)
            tokens = self._tokens(end - length)
            self._step({row: tokens, twin: tokens})

    @precondition(lambda self: self.running)
    @rule(mask=MASKS)
    def decode(self, mask: int) -> None:
        """One token for some sequences, any or all of which may complete a page; the others are padding (KF 15, KF 24)."""
        self._step(self._reserved_tokens(dict.fromkeys(self._rows(mask), 1)))

    @precondition(lambda self: self.running)
    @rule(mask=MASKS, steps=STEPS)
    def step(self, mask: int, steps: list[tuple[int, int]]) -> None:
        """Several tokens for some sequences, more than a page included, so that several pages complete (KF 15)."""
        self._step(self._reserved_tokens(self._drawn_step(mask, steps)))

    @precondition(lambda self: self.running)
    @rule(mask=MASKS, steps=STEPS, accepted=st.lists(st.integers(-2, 3), min_size=ROWS, max_size=ROWS))
    def draft(self, mask: int, steps: list[tuple[int, int]], accepted: list[int]) -> None:
        """Drafts are attended to, and then all but the first few rejected, or the last few: never committed (KF 18, KF 19)."""
        drafts = self._reserved_tokens(self._drawn_step(mask, steps))
        self.server.append(drafts, {row: len(sequence) for row, sequence in self.running.items()})
        self._check_attention({row: self.running[row] for row in drafts}, drafts)
        num_written = max((new.shape[1] for new in drafts.values()), default=0)
        self._commit({row: new[:, : accepted[row]] for row, new in drafts.items()}, num_written)

    @precondition(lambda self: self.running)
    @rule(pick=PICKS)
    def preempt(self, pick: int) -> None:
        """The pages are taken away, the tokens are kept (KF 16)."""
        row = self._pick(pick)
        self.server.release(row)
        self.waiting.append(self.running.pop(row))

    @precondition(lambda self: self.waiting and self._free_row() is not None)
    @rule()
    def resume(self) -> None:
        """The tokens of a preempted sequence are stored again, in another row perhaps (KF 16)."""
        if len(self.waiting[0]) <= self.server.room(0):
            row = self._free_row()
            self.server.admit(row)
            self._prefill(row, Sequence(self.case, self.waiting.pop(0).tokens), 0)

    @precondition(lambda self: self.running)
    @rule(pick=PICKS)
    def finish(self, pick: int) -> None:
        """The pages are given back; those that others share stay as they are (KF 11, KF 14)."""
        row = self._pick(pick)
        self.server.release(row)
        del self.running[row]

    @invariant()
    def requests_are_counted(self) -> None:
        """All of a run, `begin` included."""
        self.num_requests += 1

    @invariant()
    def counts_follow_lengths(self) -> None:
        """Every page that is due, and no other, is counted as quantized."""
        counts = self.server.num_quantized.tolist()
        assert {row: counts[row] for row in self.running} == {row: len(each.pages) for row, each in self.running.items()}

    @invariant()
    def pages_hold_records(self) -> None:
        """The whole pool, byte by byte: records of quantized pages, poison everywhere else (KF 12, KF 14, KF 18)."""
        expected = torch.full_like(self.server.pages, 0xFF)
        for row, sequence in self.running.items():
            for page_id, page in zip(self.server.page_ids[row], sequence.pages, strict=False):
                expected[page_id] = page.records
        assert_same_bits(self.server.pages, expected)

    @invariant()
    def raw_slots_hold_tokens(self) -> None:
        """Sinks and tails hold the rotated tokens; raw pages that are in no table hold poison (KF 10, KF 12)."""
        server = self.server
        assert server.raw_pages[server.raw_pool.free].isnan().all()
        for row, sequence in self.running.items():
            places = [(p, slot) for p in range(len(sequence)) if (slot := sequence.slot_of(p)) is not None]
            if places:
                positions, slots = zip(*places, strict=True)
                ids = [server.raw_ids[row][column] for column, _ in slots]
                held = server.raw_pages[ids, :, :, [offset for _, offset in slots]]
                assert_same_bits(held, sequence.raw(sequence.tokens[:, positions]).transpose(0, 1).contiguous())

    @invariant()
    def attention_sees_history(self) -> None:
        """Every sequence attends to its tokens, and to nothing else."""
        if self.running:
            self._check_attention(self.running, {})

    def _check_attention(self, sequences: dict[int, Sequence], drafts: dict[int, torch.Tensor]) -> None:
        """Compare with the oracle for some rows; the others are padding and give zeros."""
        case, none = self.case, self._tokens(0)
        dtype = torch.bfloat16 if case.dtype == torch.bfloat16 else torch.float16
        q = self._draw(ROWS, GROUP * case.num_kv_heads, case.layout.head_dim).to(dtype)
        seen = {row: len(each) + drafts.get(row, none).shape[1] for row, each in sequences.items()}
        out = self.server.attend(q, seen)
        expected = torch.zeros_like(out, dtype=torch.float64)
        for row, sequence in sequences.items():
            expected[row] = sequence.attend(q[row], drafts.get(row, none))
        torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=ERROR[dtype])
