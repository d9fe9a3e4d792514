"""What the layers of one step of a server share: where each new token goes, which pages complete, what attention reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .checks import check_tensor, require
from .layout import PageLayout

TASK_FIELDS = 5
"""Numbers of a page that a step completes: `Step.tasks`."""


@dataclass(frozen=True, eq=False)
class Step:
    """The plan of a step, which every layer takes: made by `plan_step`, read by `write_tokens`, `attend` and `read_tokens`.

    Everything in it follows from lengths and tables; its tensors are on their device, and no number was read back.
    """

    layout: PageLayout
    seq_lens: torch.Tensor
    """int32 [batch], as given."""
    cu_seqlens_q: torch.Tensor | None
    """int32 [batch + 1], as given; None: one token for each sequence."""
    block_table: torch.Tensor | None
    """int32 [batch, max_pages], the pages of the body of each sequence, as attention takes them; None with `kv_indices`."""
    kv_indptr: torch.Tensor | None
    kv_indices: torch.Tensor | None
    raw_table: torch.Tensor
    """int32 [batch, num_sink_pages + num_tail_slots], as attention takes it."""
    num_quantized: torch.Tensor
    """int32 [batch], pages of the body that are read in quantized form once the step's tokens are written."""
    sink_lens: torch.Tensor | None
    """int32 [batch], tokens of each sequence's sink that are raw: `sink_len` or 0. None: `sink_len` in all of them."""
    slots: torch.Tensor
    """int64 [num_tokens], where tokens live in the raw pool, as `append_tokens` takes it; -1 for those that don't."""
    tasks: torch.Tensor
    """int32 [5, n], a column for each page that completes, in any order: its id (-1: none), the raw page of its older tokens,
    how many of those there are, the number of its first token among the step's (below 0 if it is an older one), and whether its
    tokens are rounded to the dtype of raw pages first."""
    sink_len: int
    """Tokens of a sink, where it is raw."""
    max_query_len: int
    at_once: bool
    """Whether one launch writes pages and raw tokens: no token goes where an older one is read from."""

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.seq_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        """How many new tokens there are, padding included."""
        return self.slots.shape[0]


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What a plan is made from: the arguments of `plan_step`, by their names."""

    layout: PageLayout
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    block_table: torch.Tensor | None
    raw_table: torch.Tensor
    num_tokens: int
    max_query_len: int
    sink_len: int
    sink_columns: bool
    rows: torch.Tensor | None
    pages_per_block: int
    max_drafts: int
    prefix_lens: torch.Tensor | None
    kv_indptr: torch.Tensor | None
    kv_indices: torch.Tensor | None
    early_pages: bool

    @property
    def delay(self) -> int:
        """How many tokens later than its last one a page is quantized."""
        return 0 if self.early_pages else self.max_drafts

    @property
    def least_tail_slots(self) -> int:
        """Tail slots that the ring needs."""
        return slots_for(self.max_drafts + self.delay, self.layout.page_size)

    @property
    def num_sink_pages(self) -> int:
        """Columns of the raw table for sinks."""
        return -(-self.sink_len // self.layout.page_size)

    @property
    def num_tail_slots(self) -> int:
        """Columns of the raw table for tails."""
        return self.raw_table.shape[1] - self.num_sink_pages

    @property
    def ids(self) -> torch.Tensor:
        """The ids of blocks or pages: a table, or those of all sequences."""
        ids = self.kv_indices if self.block_table is None else self.block_table
        assert ids is not None
        return ids

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shapes and dtypes of what a plan is written to, by name; what it takes over as it is isn't there."""
        batch, num_tokens = self.seq_lens.shape[0], self.num_tokens
        num_tasks = num_tokens // self.layout.page_size + min(batch, num_tokens)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "num_quantized": ((batch,), torch.int32),
            "slots": ((num_tokens,), torch.int64),
            "tasks": ((TASK_FIELDS, num_tasks), torch.int32),
        }
        moved = self.rows is not None or self.sink_columns
        if self.sink_columns:
            shapes["sink_lens"] = (batch,), torch.int32
        if moved:
            shapes["raw_table"] = (batch, self.raw_table.shape[1]), torch.int32
        if self.kv_indptr is not None and self.sink_columns:
            shapes["kv_indptr"] = (batch + 1,), torch.int32
        if self.block_table is not None and (moved or self.pages_per_block > 1):
            shapes["block_table"] = (batch, self.block_table.shape[1] * self.pages_per_block), torch.int32
        return shapes

    def step(self, out: Step | None = None) -> Step:
        """Return a step with memory for its plan: its own, or that of `out`."""
        shapes, device = self.shapes(), self.seq_lens.device
        if out is None:
            return self.step_in(
                {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
            )
        require(isinstance(out, Step), "out", "a Step", type(out).__name__)
        for name, (shape, dtype) in shapes.items():
            check_tensor(f"out.{name}", getattr(out, name), shape, dtype, device=device)
        step = self.step_in({name: getattr(out, name) for name in shapes})
        for field in dataclasses.fields(Step):
            want, got = getattr(step, field.name), getattr(out, field.name)
            if isinstance(got, torch.Tensor) and isinstance(want, torch.Tensor):
                same = got.data_ptr() == want.data_ptr() and got.shape == want.shape
                require(same, f"out.{field.name}", "the tensor of this call", "another one")
            else:
                require(got == want, f"out.{field.name}", str(want), got)
        return out

    def step_in(self, memory: dict[str, torch.Tensor]) -> Step:
        """Return a step with this memory for its plan, by name, as `shapes` has it."""
        fields: dict[str, Any] = {
            "layout": self.layout,
            "sink_len": self.sink_len,
            "sink_lens": None,
            "max_query_len": self.max_query_len,
            "at_once": slots_for(self.delay + self.max_query_len, self.layout.page_size) <= self.num_tail_slots,
        }
        for name in ("seq_lens", "cu_seqlens_q", "block_table", "kv_indptr", "kv_indices", "raw_table"):
            fields[name] = getattr(self, name)
        return Step(**fields | memory)


def slots_for(num_tokens: int, page_size: int) -> int:
    """Return how many pages `num_tokens` tokens in a row touch at most; one if there are none."""
    return (max(num_tokens, 1) + page_size - 2) // page_size + 1


def inputs_of(layout: PageLayout, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None, *others: Any) -> StepInputs:
    """Return the arguments of `plan_step`, in its order, as one object; sizes that follow from others are set."""
    block_table, raw_table, num_tokens, max_query_len, *options = others
    if cu_seqlens_q is None:
        for name, value in (("num_tokens", num_tokens), ("max_query_len", max_query_len)):
            require(value is None, name, "None without cu_seqlens_q", value)
        check_tensor("seq_lens", seq_lens, [None], torch.int32)
        num_tokens, max_query_len = seq_lens.shape[0], 1
    elif max_query_len is None:
        max_query_len = num_tokens
    return StepInputs(layout, seq_lens, cu_seqlens_q, block_table, raw_table, num_tokens, max_query_len, *options)
