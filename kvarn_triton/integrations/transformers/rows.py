"""What the layers of a cache share on one device: lengths, tables, the plan of a step, and how rows of a batch move.

Quantized page j of row b has the id j * batch + b until rows move. Rows that go on as one row share its quantized pages by
their ids; raw pages are never shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...encoder import Encoder
from ...layout import PageLayout
from ...serving.plan import plan_step
from ...step import Step, slots_for

SPARE_PAGES = 16
"""A table that grows gets one more page for so many that it needs, so that pools are copied seldom."""
LEAST_SPARE_PAGES = 4


@dataclass(frozen=True)
class Settings:
    """The options of a cache, by the names of the arguments of `KVarNCache`."""

    layout: str
    sink_len: int
    rollback: int
    max_len: int | None
    encoder: Encoder


class Rows:
    """The rows of a batch: how many tokens each has and where they are, the same for every layer with this object."""

    def __init__(self, layout: PageLayout, batch: int, device: torch.device, settings: Settings) -> None:
        self.layout, self.batch, self.device, self.settings = layout, batch, device, settings
        page_size = layout.page_size
        self.columns = -(-settings.sink_len // page_size) + slots_for(2 * settings.rollback, page_size)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.step_lens = torch.zeros_like(self.lens)
        raw_ids = torch.arange(batch * self.columns, dtype=torch.int32, device=device)
        self.raw_table = raw_ids.view(batch, self.columns)
        self.block_table = raw_ids.new_empty(batch, 0)
        self.kept = torch.ones(batch, settings.rollback, dtype=torch.bool, device=device)
        """Which of the last positions are tokens and no padding."""
        self.length: int | torch.Tensor = 0
        """Positions that a row has, padding included: a tensor if a captured graph counts them."""
        self.high = 0
        self.fresh, self.padded, self.epoch, self.num_layers, self.count = True, False, 0, 0, 0
        self.order: tuple[torch.Tensor, torch.Tensor] | None = None
        self.step: Step | None = None
        self.single_steps: dict[bool, Step] = {}
        if settings.max_len is not None:
            self.length = torch.zeros((), dtype=torch.int64, device=device)
            self._widen(self._pages_of(settings.max_len))
            for masked in (False, True):  # before graphs are captured, so that their plans have memory of their own
                self.single_steps[masked] = self._plan_single(masked)

    @property
    def num_pages(self) -> int:
        """Quantized pages that a pool needs."""
        return self.block_table.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of tables and lengths."""
        return self.raw_table.nbytes + self.block_table.nbytes + self.lens.nbytes + self.step_lens.nbytes + self.kept.nbytes

    def begin(self, count: int, mask: torch.Tensor | None) -> None:
        """Plan a step of `count` new positions for each row; a bool mask [batch, count] has which of them are no padding."""
        max_len = self.settings.max_len
        self.fresh = self.epoch == 0
        self.epoch, self.count, self.padded = self.epoch + 1, count, self.padded or mask is not None
        if max_len is None:
            assert isinstance(self.length, int)
            self.length += count
            self._reserve(self.length)
        else:
            assert isinstance(self.length, torch.Tensor)
            self.length.add_(count)
            # On a GPU nobody waits for this: a longer sequence ends the process instead of overwriting its own tokens.
            torch._assert_async(self.length <= max_len, f"max_len: expected room for every token, got {max_len}")
        if self.settings.rollback:
            new = self.kept.new_ones(self.batch, count) if mask is None else mask
            self.kept.copy_(torch.cat((self.kept, new), dim=1)[:, -self.settings.rollback :])
        self.order = None
        if count == 1:
            if mask is None:
                self.lens.add_(1)
            else:  # a row that gets no token is left out of the step
                token = mask[:, 0].int()
                self.lens.add_(token)
                torch.mul(self.lens, token, out=self.step_lens)
            self.step = self.single_steps[mask is not None] = self._plan_single(mask is not None)
            return
        if mask is None:
            ends = torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * count
            self.lens.add_(count)
        else:
            counts = mask.sum(dim=1, dtype=torch.int32)
            ends = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
            self.lens.add_(counts)
            # Tokens first, in their order; the plan takes what comes after them for padding. So nobody waits to count them.
            places = (~mask).flatten().int().argsort(stable=True)
            self.order = places // count, places % count
        self.step = plan_step(
            self.layout, self.lens, ends, self.block_table, self.raw_table, num_tokens=self.batch * count, max_query_len=count,
            sink_len=self.settings.sink_len, max_drafts=self.settings.rollback,
        )  # fmt: skip

    def _plan_single(self, masked: bool) -> Step:
        """Plan a step of one position for each row, in the memory of the last one."""
        return plan_step(
            self.layout, self.step_lens if masked else self.lens, None, self.block_table, self.raw_table,
            sink_len=self.settings.sink_len, max_drafts=self.settings.rollback, out=self.single_steps.get(masked),
        )  # fmt: skip

    def _pages_of(self, length: int) -> int:
        """Return how many quantized pages a row of a length can have."""
        return max(length - self.settings.sink_len, 0) // self.layout.page_size

    def _reserve(self, length: int) -> None:
        """Have ids of pages for a length."""
        need = self._pages_of(length)
        if need > self.block_table.shape[1]:
            self._widen(need + max(need // SPARE_PAGES, LEAST_SPARE_PAGES))

    def _widen(self, width: int) -> None:
        """Give tables ids for `width` pages of each row; ids that were given stay."""
        have = self.block_table.shape[1]
        ids = torch.arange(have * self.batch, width * self.batch, dtype=torch.int32, device=self.device)
        self.block_table = torch.cat((self.block_table, ids.view(width - have, self.batch).t()), dim=1).contiguous()
        self.single_steps.clear()

    def crop(self, count: int) -> None:
        """Take the last positions of every row back."""
        length, rollback = int(self.length), self.settings.rollback
        self.high = max(self.high, length)
        count = min(count, length)
        most = rollback - (self.high - length)
        if count > most and count:
            raise ValueError(
                f"rollback: expected at least {self.high - length + count} to take {count} tokens back, got {rollback}; "
                "say KVarNCache(..., rollback=N)"
            )
        if count == 0:
            return
        self.lens.sub_(self.kept[:, rollback - count :].sum(dim=1, dtype=torch.int32))
        self.kept.copy_(torch.cat((torch.ones_like(self.kept[:, :count]), self.kept[:, : rollback - count]), dim=1))
        if isinstance(self.length, torch.Tensor):
            self.length.sub_(count)
        else:
            self.length -= count

    def reset(self) -> None:
        """Forget all tokens; memory stays where it is."""
        self.lens.zero_()
        self.kept.fill_(True)
        self.epoch, self.high, self.padded, self.step = 0, 0, False, None
        if isinstance(self.length, torch.Tensor):
            self.length.zero_()
        else:
            self.length = 0

    def reorder(self, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Let row i go on as row order[i], with as many rows as before, and wait for nothing.

        Returns:
            Ids of raw pages that are to be copied and where to, as `copy_raw_pages` takes them. A row that is there for the
            first time keeps its raw pages; one that is there again gets those of a row that is not there any more.
        """
        again = (order[:, None] == order).tril(-1).any(dim=1)
        taken = (order[:, None] == torch.arange(self.batch, device=self.device)).any(dim=0)
        unused = taken.int().argsort(stable=True)
        place = torch.where(again, unused[(again.cumsum(0) - 1).clamp_min(0)], order)
        sources = torch.where(again[:, None], self.raw_table[order], -1)
        self.raw_table.copy_(self.raw_table[place])
        self.lens.copy_(self.lens[order])
        self.kept.copy_(self.kept[order])
        self.block_table.copy_(self._ids_of(self.block_table[order]))
        return sources.flatten(), self.raw_table.flatten()

    def _ids_of(self, table: torch.Tensor) -> torch.Tensor:
        """Return a table whose quantized pages are those given, and whose other ids are in no other row."""
        filled = (self.lens - self.settings.rollback - self.settings.sink_len).clamp_min(0) // self.layout.page_size
        column = torch.arange(table.shape[1], device=self.device)
        quantized = column < filled[:, None]
        # Each column has as many ids as there are rows: rows that have no page there yet get those that are left.
        number = table.long() - column * self.batch
        taken = torch.zeros_like(number).scatter_add_(0, number, quantized.long())
        left = (taken > 0).int().argsort(dim=0, stable=True)
        free = left.gather(0, ((~quantized).cumsum(0) - 1).clamp_min(0))
        return (torch.where(quantized, number, free) + column * self.batch).int()

    def select(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Become a batch of these rows, any number of them; return the ids of pages and raw pages that pools consist of."""
        if self.settings.max_len is not None:
            raise ValueError(f"max_len: expected None to change the batch from {self.batch} to {len(rows)} rows")
        width = self.block_table.shape[1]
        page_ids, raw_ids = self.block_table[rows].t().flatten(), self.raw_table[rows].flatten()
        self.batch = len(rows)
        self.lens, self.kept, self.step_lens = self.lens[rows], self.kept[rows], self.step_lens[rows]
        self.raw_table = torch.arange(raw_ids.numel(), dtype=torch.int32, device=self.device).view(self.batch, self.columns)
        ids = torch.arange(page_ids.numel(), dtype=torch.int32, device=self.device)
        self.block_table = ids.view(width, self.batch).t().contiguous()
        self.step = None
        self.single_steps.clear()
        return page_ids, raw_ids
