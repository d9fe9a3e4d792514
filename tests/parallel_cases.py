"""Caches of which each rank has a part: what a step is on one rank that has everything, and on one of several."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from helpers import draw

import kvarn_triton
from kvarn_triton import PageLayout, Step, plan_step
from kvarn_triton.parallel import LocalStep, Shard, local_step, own_pages
from kvarn_triton.testing import cache_case

LAYOUT = PageLayout(64, 64, 4, 2)
SINK_LEN = 64
LENGTHS = (708, 0, 40, 64 + 64, 64 + 3 * 64 + 5, 64 + 63, 330)
"""Of sequences: of many pages, of no token, with no more than a part of a sink, of one page and no tail, and so on."""
NEW = (9, 0, 40, 70, 1, 3, 66)
"""New tokens of them in a step of chunks: some complete a page with older tokens, two sequences begin."""


class Case(NamedTuple):
    """A step of a cache, before anything of it is written, and what every rank gets."""

    q: torch.Tensor
    new: dict[str, torch.Tensor]
    pages: torch.Tensor
    raw_pages: torch.Tensor
    plan: dict[str, Any]  # arguments of plan_step
    num_quantized: torch.Tensor | None  # other counts than those of the plan

    def whole(self) -> tuple[torch.Tensor, torch.Tensor, Step]:
        """Return the pools and the step of a rank that has everything, written."""
        pages, raw_pages, step = self.pages.clone(), self.raw_pages.clone(), self.planned(self.plan["block_table"])
        if self.new:
            kvarn_triton.write_tokens(**self.new, pages=pages, raw_pages=raw_pages, step=step)
        return pages, raw_pages, step

    def part(self, shard: Shard) -> tuple[torch.Tensor, torch.Tensor, LocalStep]:
        """Return the pools and the step of one rank: what is another's is NaN, or not in the table."""
        table = own_pages(self.plan["block_table"], shard)
        pages, raw_pages = torch.full_like(self.pages, 255), self.raw_pages.clone()
        own = table[table >= 0].long()
        pages[own] = self.pages[own]
        step = self.planned(table)
        if self.new:
            kvarn_triton.write_tokens(**self.new, pages=pages, raw_pages=raw_pages, step=step)
        return pages, raw_pages, local_step(step, shard)

    def planned(self, block_table: torch.Tensor) -> Step:
        """Return the plan of a rank."""
        step = plan_step(**self.plan | {"block_table": block_table})
        return step if self.num_quantized is None else dataclasses.replace(step, num_quantized=self.num_quantized)


def case_of(
    kind: str, device: torch.device, dtype: torch.dtype = torch.float16, layout: PageLayout = LAYOUT, heads: int = 2
) -> Case:
    """Return a step of decodes or of chunks.

    Args:
        kind: "decode"; "long tail" of up to three pages in the ring; "chunk"; "columns": chunks over tables that have columns
            of sinks, where one sequence has no raw sink.
    """
    chunk, columns = kind in ("chunk", "columns"), kind == "columns"
    cached = [length - new if chunk else length for length, new in zip(LENGTHS, NEW, strict=True)]
    slots = 3 if kind == "long tail" else 1
    case = cache_case(
        layout, cached, num_kv_heads=heads, group=2, dtype=dtype, sink_len=0 if columns else SINK_LEN, num_tail_slots=slots,
        device=device, seed=3,
    )  # fmt: skip
    lens = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    plan: dict[str, Any] = {"layout": layout, "seq_lens": lens, "raw_table": case.raw_table, "sink_len": SINK_LEN}
    width = max(LENGTHS) // layout.page_size + 1
    # Ids of pages that a chunk completes.
    missing = width - case.block_table.shape[1]
    more = torch.arange(len(lens) * missing, dtype=torch.int32, device=device).view(len(lens), -1) + len(case.pages)
    plan["block_table"] = torch.cat((case.block_table, more), dim=1)
    spare = torch.full((more.numel(), *case.pages.shape[1:]), 255, dtype=torch.uint8, device=device)
    pages, raw_pages = torch.cat((case.pages, spare)), case.raw_pages
    plan["cu_seqlens_q"], new, count = None, {}, len(lens)
    if columns:
        # All pages are quantized, those of the sink too; the second column of raw ids is the tail's.
        ids = torch.arange(len(lens), dtype=torch.int32, device=device)[:, None] + len(raw_pages)
        raw_pages = torch.cat((raw_pages, draw(len(lens), *raw_pages.shape[1:], seed=9, dtype=dtype, device=device)))
        ids[-1] = -1
        plan |= {"raw_table": torch.cat((ids, case.raw_table), dim=1), "sink_columns": True}
    if chunk:
        plan["cu_seqlens_q"] = torch.tensor([0, *NEW], device=device).cumsum(0).int()
        count = plan["num_tokens"] = sum(NEW) + 2  # two of padding
        new = {name: draw(count, heads, 64, seed=i, dtype=dtype, device=device) for i, name in enumerate(("k", "v"))}
    q = draw(count, 2 * heads, layout.head_dim, seed=5, dtype=dtype, device=device)
    return Case(q, new, pages, raw_pages, plan, case.num_quantized if kind == "long tail" else None)
