"""Which raw pages belong to which request of a step.

Model runner V2 says which row of its own table a request has, from its first step to its last: that row is its slot. What the
runner doesn't say is whether a request is new in its row, so a few numbers by row are kept on the device.

Model runner V1 says nothing. There a request is known by the ids of its blocks, which are read on the host: on CPUs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .choice import Choice


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a step, padding included: what slots are found by. Tensors are on the device of the cache."""

    seq_lens: torch.Tensor
    """int32 [rows], tokens of each request, those of the step included; 0: padding."""
    computed: torch.Tensor
    """int32 [rows], tokens before the step."""
    block_table: torch.Tensor
    """int32 [rows, columns], ids of pages from position 0 on."""


class SlotsByRow:
    """Slots of requests whose rows are known.

    A request has a raw sink if it computed its first tokens in this row. A new request that hits the prefix cache where an
    older one of the same row ended, or its last drafts did, is taken for that one if both begin with the same block, which has
    the same tokens then: a block that is written anew from position 0 is forgotten in all rows.

    Args:
        choice: how the cache is laid out.
        device: of the tables.
    """

    def __init__(self, choice: Choice, device: torch.device) -> None:
        self.choice = choice
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        count = choice.max_requests + 1  # the last one is for padding
        self.columns = torch.arange(choice.columns, **ints)
        self.first_block = torch.full((count,), -1, **ints)
        self.length = torch.zeros(count, **ints)
        self.has_sink = torch.zeros(count, dtype=torch.bool, device=device)

    def raw_table(self, rows: Rows, request_rows: torch.Tensor) -> torch.Tensor:
        """Return int32 [rows, columns], ids of raw pages; below 0 in the sink's column where there is no raw sink.

        Args:
            rows: of the step.
            request_rows: int64 [rows], of the runner's table; anything for padding.
        """
        table = (request_rows[:, None] * len(self.columns) + self.columns).to(torch.int32)
        if self.choice.sink_pages and self.choice.prefix_caching:
            without = ~self._sinks(rows, request_rows)
            table[:, : self.choice.sink_pages].masked_fill_(without[:, None], -1)
        return table

    def _sinks(self, rows: Rows, request_rows: torch.Tensor) -> torch.Tensor:
        """Return which rows have a raw sink, bool [rows], and remember them."""
        live = rows.seq_lens > 0
        index = torch.where(live, request_rows, self.choice.max_requests)
        first, fresh = rows.block_table[:, 0], rows.computed == 0
        taken_back = self.length[index] - rows.computed
        same = (self.first_block[index] == first) & (taken_back >= 0) & (taken_back <= self.choice.max_drafts)
        sinks = fresh | (same & self.has_sink[index])
        written = torch.where(live & fresh, first, -2)
        self.first_block.masked_fill_((self.first_block[:, None] == written).any(dim=1), -1)
        self.first_block[index], self.length[index], self.has_sink[index] = first, rows.seq_lens, sinks
        return sinks


class SlotsByBlock:
    """Slots of requests that are known by their blocks, on the host.

    A sink is known by the block of its tokens, so that requests with the same first block share it. A tail is known by the
    block that is being filled, or with drafts by those that the next token may be in, which belong to one request; without a
    prefix cache by the request's first. Requests that ended are not announced: the slot that was not used for longest is taken.

    Args:
        choice: how the cache is laid out.
        device: of the tables.
    """

    def __init__(self, choice: Choice, device: torch.device) -> None:
        self.choice, self.device = choice, device
        self.sinks, self.tails = _Slots(choice.num_slots), _Slots(choice.num_slots)

    def raw_table(self, rows: Rows) -> torch.Tensor:
        """Return int32 [rows, columns], ids of raw pages; below 0 in the sink's column where there is no raw sink.

        Raises:
            RuntimeError: if the slot of a running request went to another one.
        """
        lengths, computed, blocks = rows.seq_lens.tolist(), rows.computed.tolist(), rows.block_table.tolist()
        live = [row for row in range(len(lengths)) if lengths[row] > 0]
        spans = {row: (computed[row], lengths[row], blocks[row]) for row in live}
        tails = self._tails(spans)
        sinks = self._sinks(spans) if self.choice.sink_pages else {}
        base, width = self.choice.num_slots * self.choice.sink_pages, self.choice.tail_slots
        table = []
        for row in range(len(lengths)):
            sink = [sinks.get(row, -1)] * self.choice.sink_pages
            table.append(sink + [base + tails.get(row, 0) * width + column for column in range(width)])
        return torch.tensor(table, dtype=torch.int32, device=self.device).reshape(len(lengths), self.choice.columns)

    def _sinks(self, spans: dict[int, tuple[int, int, list[int]]]) -> dict[int, int]:
        """Return the slots of sinks by row; new ones come first, because another row may have hit them in the same step."""
        slots = {}
        for row, (begin, _, blocks) in sorted(spans.items(), key=lambda item: item[1][0] > 0):
            slot = self.sinks.use(blocks[0], new=begin == 0)
            if slot is None and begin < self.choice.sink_len:
                raise RuntimeError("kvarn_triton: the raw pages of a running request went to another one")
            slots[row] = -1 if slot is None else slot
        return slots

    def _tails(self, spans: dict[int, tuple[int, int, list[int]]]) -> dict[int, int]:
        """Return the slots of tails by row. None is given away before all rows have theirs."""
        size, by_first = self.choice.page_size, not self.choice.prefix_caching
        slots: dict[int, int | None] = {}
        for row, (begin, _, blocks) in spans.items():
            begun = begin > 0 if by_first else begin % size != 0
            slots[row] = self.tails.pop(blocks[0 if by_first else begin // size]) if begun else None
            if begun and slots[row] is None:
                raise RuntimeError("kvarn_triton: the raw pages of a running request went to another one")
        found: dict[int, int] = {}
        done = []
        for row, (begin, length, blocks) in spans.items():
            slot = slots[row]
            found[row] = self.tails.take() if slot is None else slot
            least = max(begin + 1, length - self.choice.max_drafts)  # where the next step begins, at least
            filling = blocks[:1] if by_first else blocks[least // size : -(-length // size)]
            if filling:
                self.tails.put(filling, found[row])
            else:
                done.append(found[row])
        self.tails.free += done
        return found


class _Slots:
    """Slots by blocks, the one used last at the end."""

    def __init__(self, count: int) -> None:
        self.of: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}  # by slot
        self.free = list(range(count))

    def pop(self, block: int) -> int | None:
        """Return the slot of a block and forget whose it is."""
        slot = self.of.get(block)
        if slot is not None:
            for each in self.blocks.pop(slot):
                del self.of[each]
        return slot

    def take(self) -> int:
        """Return a free slot, or the one that was not used for longest."""
        if self.free:
            return self.free.pop(0)
        slot = self.pop(next(iter(self.of)))
        assert slot is not None
        return slot

    def put(self, blocks: list[int], slot: int) -> None:
        """Say whose a slot is. The slot of a request that ended, and had one of these blocks before, is free."""
        for block in blocks:
            stale = self.pop(block)
            if stale is not None:
                self.free.append(stale)
        self.of |= dict.fromkeys(blocks, slot)
        self.blocks[slot] = blocks

    def use(self, block: int, new: bool) -> int | None:
        """Return the slot of a block; None if it has none and isn't new."""
        slot = self.pop(block)
        if slot is None and new:
            slot = self.take()
        if slot is not None:
            self.put([block], slot)
        return slot
