"""The plan of a step of vLLM: decodes first, then prompts, chunks and drafts, each planned once for all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...attention.decode_schedule import schedule_step
from ...attention.parts import DecodeSchedule
from ...layout import PageLayout
from ...serving import plan
from ...step import TASK_FIELDS, Step, StepInputs, inputs_of
from .choice import Choice
from .slots import Rows, SlotsByBlock, SlotsByRow


@dataclass(frozen=True, eq=False)
class Plans:
    """What the layers of a step share."""

    decodes: Step | None
    """Of the first rows, which have one token each."""
    prefills: Step | None
    """Of the other rows."""
    num_decodes: int
    num_tokens: int
    """Tokens of all rows, padding included."""
    schedules: dict[int, DecodeSchedule] = field(default_factory=dict)
    """What attention of the first rows begins with, by query heads of a layer."""

    def parts(self) -> list[tuple[Step, slice]]:
        """Return the steps, each with its tokens."""
        ends = slice(0, self.num_decodes), slice(self.num_decodes, self.num_tokens)
        return [(step, span) for step, span in zip((self.decodes, self.prefills), ends, strict=True) if step is not None]

    def schedule(self, step: Step, num_q_heads: int) -> DecodeSchedule | None:
        """Return the schedule of one of the steps, for a layer with so many query heads, if there is one."""
        return self.schedules.get(num_q_heads) if step is self.decodes else None


@dataclass(frozen=True)
class Heads:
    """What schedules depend on beside a step: the heads of the layers that share it."""

    num_q_heads: frozenset[int]
    """All that a layer has: one number, if layers are alike."""
    num_kv_heads: int
    dtype: torch.dtype
    """Of queries."""


def rows_of(common: Any) -> Rows:
    """Return the rows of vLLM's `CommonAttentionMetadata`.

    A dummy run, for a capture or beside another rank, has lengths and any blocks, but no place to write its tokens to: its rows
    become padding, so that nothing that lives is written.
    """
    starts = common.query_start_loc
    places = common.slot_mapping
    seq_lens = common.seq_lens
    if len(places):
        live = places[starts[:-1].long().clamp_max(len(places) - 1)] >= 0
        seq_lens = torch.where(live, seq_lens, 0)
    computed = (seq_lens - (starts[1:] - starts[:-1])).clamp_min(0)
    return Rows(seq_lens.to(torch.int32), computed, common.block_table_tensor[: common.num_reqs])


class Planner:
    """Plans steps. Those of decodes alone are written to the same memory every time, for captured graphs.

    Args:
        choice: how the cache is laid out.
        layout: the page format of the layers.
        device: of the cache.
        fixed: whether plans of decodes stay at the same addresses.
        heads: of the layers.
    """

    def __init__(self, choice: Choice, layout: PageLayout, device: torch.device, fixed: bool, heads: Heads) -> None:
        self.choice, self.layout, self.device, self.fixed, self.heads = choice, layout, device, fixed, heads
        self.by_row = SlotsByRow(choice, device) if choice.known_rows else None
        self.by_block = None if choice.known_rows else SlotsByBlock(choice, device)
        self.memory: dict[str, torch.Tensor] = {}
        self.steps: dict[tuple[int, int], Step] = {}
        self.schedules: dict[tuple[int, int, int], DecodeSchedule] = {}

    def plan(self, common: Any, num_decodes: int, num_decode_tokens: int) -> Plans:
        """Plan a step.

        Args:
            common: `CommonAttentionMetadata`, whose first rows have one token each.
            num_decodes: how many those are, padding behind them included if there are no others.
            num_decode_tokens: their tokens, padding included.
        """
        rows = rows_of(common)
        raw_table = self._raw_table(common, rows)
        decodes = prefills = None
        schedules: dict[int, DecodeSchedule] = {}
        if num_decodes:
            span = slice(0, num_decodes)
            inputs = self._inputs(rows.seq_lens[span], None, rows.block_table[span], raw_table[span])
            fixed = self.fixed and num_decodes == common.num_reqs
            decodes = self._fixed(inputs) if fixed else plan.plan_from(inputs, None)
            schedules = self._schedules(decodes, (num_decodes, inputs.ids.shape[1]) if fixed else None)
        if num_decodes < common.num_reqs:
            span = slice(num_decodes, common.num_reqs)
            ends = (common.query_start_loc[num_decodes : common.num_reqs + 1] - num_decode_tokens).to(torch.int32)
            sizes = common.num_actual_tokens - num_decode_tokens, common.max_query_len
            tables = rows.block_table[span], raw_table[span]
            prefills = plan.plan_from(self._inputs(rows.seq_lens[span], ends, *tables, *sizes), None)
        return Plans(decodes, prefills, num_decode_tokens, common.num_actual_tokens, schedules)

    def _schedules(self, decodes: Step, key: tuple[int, int] | None) -> dict[int, DecodeSchedule]:
        """Return the schedules of a step, in the memory that all of them share if it is at fixed addresses: if it has a key."""
        heads, made = self.heads, {}
        for count in heads.num_q_heads:
            known = None if key is None else self.schedules.get((*key, count))
            made[count] = schedule_step(decodes, count, heads.num_kv_heads, dtype=heads.dtype, out=known)
            if key is not None and known is None:
                own = made[count].records
                shared = self._part(f"schedule, {count} heads", own.shape, own.dtype, key)
                self.schedules[(*key, count)] = made[count] = replace(made[count], records=shared.copy_(own))
        return made

    def _raw_table(self, common: Any, rows: Rows) -> torch.Tensor:
        """Return the ids of the raw pages of all rows."""
        if self.by_block is not None:
            return self.by_block.raw_table(rows)
        assert self.by_row is not None
        if common.req_idx is None:
            raise RuntimeError("kvarn_triton: model runner V2 gave no req_idx, by which requests are known")
        known = torch.from_numpy(common.req_idx).to(torch.int64)
        if self.device.type == "cuda":
            known = known.pin_memory().to(self.device, non_blocking=True)
        missing = common.num_reqs - len(known)  # rows of padding in a captured graph
        return self.by_row.raw_table(rows, torch.nn.functional.pad(known, (0, max(missing, 0)))[: common.num_reqs])

    def _inputs(self, seq_lens: torch.Tensor, ends: torch.Tensor | None, *others: Any) -> StepInputs:
        """Return what a step is planned from: lengths, ends, the tables and, beside ends, both sizes."""
        block_table, raw_table, *sizes = others
        options = self.choice.sink_len, True, None, 1, self.choice.max_drafts, None, None, None, True
        return inputs_of(self.layout, seq_lens, ends, block_table, raw_table, *(sizes or (None, None)), *options)

    def _fixed(self, inputs: StepInputs) -> Step:
        """Plan decodes in the memory that all of them share; steps run one after the other."""
        batch, width = inputs.ids.shape
        key = batch, width
        step = self.steps.get(key)
        seq_lens = self._part("seq_lens", (batch,), torch.int32, key) if step is None else step.seq_lens
        seq_lens.copy_(inputs.seq_lens)
        inputs = self._inputs(seq_lens, None, inputs.block_table, inputs.raw_table)
        if step is None:
            memory = {name: self._part(name, *shape, key) for name, shape in inputs.shapes().items()}
            step = self.steps[key] = inputs.step_in(memory)
        return plan.plan_from(inputs, step)

    def _part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, key: tuple[int, int]) -> torch.Tensor:
        """Return the first numbers of a tensor's memory. A batch of more than the largest, with padding, gets a larger one:
        steps that are planned keep theirs."""
        count = math.prod(shape)
        if name not in self.memory or self.memory[name].numel() < count:
            most = max(self.choice.max_requests, key[0]) * max(key[1], self.choice.columns, TASK_FIELDS)
            self.memory[name] = torch.zeros(max(most, count), dtype=dtype, device=self.device)
        return self.memory[name][:count].view(shape)
