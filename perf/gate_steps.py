"""What the gate checks of a step in two calls: plans, what is written, attended to and read, against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from common import Row
from gate_checks import SOME_CONFIG, Recorder, Subject, check, equal, moved, some_table

from kvarn_triton import PUBLISHED, reference
from kvarn_triton.testing import relative_error

LENGTHS, NEW = (200, 150, 66), (70, 1, 66)
"""Of three sequences: all tokens, and new ones."""


def _tables(subject: Subject, csr: bool) -> dict[str, Any]:
    """Return arguments of plan_step: blocks of two pages of permuted requests with drafts, or a list of page ids."""
    size = subject.layout.page_size
    ends = torch.tensor([0, *NEW]).cumsum(0).int()
    call = {"seq_lens": torch.tensor(LENGTHS).int() * size // 64, "cu_seqlens_q": ends * size // 64, "sink_len": size}
    call |= {"num_tokens": int(call["cu_seqlens_q"][-1]) + 1, "sink_columns": True}
    raw_table = torch.tensor([[0, 1, 2], [3, 4, 5], [-1, 6, 7]], dtype=torch.int32)
    if csr:
        starts = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
        ids = torch.tensor([3, 0, 7, 9, 1, 4, 10, 2, 5, 8, 11, 6], dtype=torch.int32)
        return call | {"block_table": None, "kv_indptr": starts, "kv_indices": ids, "raw_table": raw_table}
    call |= {"max_query_len": max(NEW) * size // 64, "max_drafts": 3, "pages_per_block": 2, "raw_table": raw_table}
    call["rows"] = torch.tensor([2, 0, 1], dtype=torch.int32)
    call["prefix_lens"] = torch.tensor([0, 0, size], dtype=torch.int32)
    call["early_pages"] = subject.layout.k_bits != subject.layout.v_bits
    return call | {"block_table": torch.tensor([[1, 4], [0, 5], [3, 2]], dtype=torch.int32)}


def _step(kvarn: Recorder, subject: Subject, csr: bool, attention: dict[str, Any]) -> Iterator[Row]:
    """Plan, write, attend and read a step on the device, and the same with the reference on the CPU."""
    layout, device = subject.layout, subject.device
    call = _tables(subject, csr)
    count = call["num_tokens"]
    activations = [subject.draw(count, 2, d, shift=i) for i, d in enumerate((layout.head_dim, layout.v_head_dim))]
    q = subject.draw(count, 2 * subject.group, layout.head_dim, shift=2)
    records = torch.zeros(layout.pages_shape(12, 2), dtype=torch.uint8)
    filled = [subject.draw(12 * layout.page_size, 2, x.shape[2], shift=3) for x in activations]
    order = {"arithmetic": reference.ANY_ORDER}
    reference.store_pages(filled[0], filled[1], records, torch.arange(12), layout, **order)
    raw = subject.draw(8, 2, 2, layout.page_size, layout.raw_head_dim, shift=4)
    results: list[dict[str, torch.Tensor]] = []
    for where, api in ((device, kvarn), ("cpu", reference)):
        given = moved(call, where)
        pages, raw_pages = records.to(where, copy=True), raw.to(where, copy=True)
        step = api.plan_step(layout, **given)
        step = api.plan_step(layout, **given, out=step)
        k, v = (x.to(where) for x in activations)
        api.write_tokens(k, v, pages, raw_pages, step, encoder=PUBLISHED)
        read = [torch.zeros(3, 2, int(call["seq_lens"].max()) + 3, x.shape[2]).to(where) for x in activations]
        starts = torch.tensor([0, 3, 1], dtype=torch.int32).to(where)
        if api is kvarn:
            kvarn.check_step(pages, raw_pages, step, window=100, keep_sink=False)
        api.read_tokens(pages, raw_pages, step, *read, starts=starts)
        seen = {name: x for name, x in attention.items() if name in ("window", "sinks", "tree_mask", "span_ends")}
        options = moved(attention if api is kvarn else seen, where)
        out, lse = api.attend(q.to(where), pages, raw_pages, step, k=k, v=v, return_lse=True, **options)
        before = {name: x for name, x in options.items() if name not in ("tree_mask", "span_ends")}
        past = api.attend(q.to(where), pages, raw_pages, step, past_only=True, **before)
        ids = torch.tensor([0, 3], dtype=torch.int32).to(where)
        api.copy_raw_pages(raw_pages, ids, ids + 1)
        api.cut_tokens(pages, raw_pages, step, given["seq_lens"] // 2 + 9)
        plan = {x.name: getattr(step, x.name) for x in dataclasses.fields(step)}
        plan = {name: x for name, x in plan.items() if isinstance(x, torch.Tensor)}
        plan["tasks"] = torch.where(plan["tasks"][:1] >= 0, plan["tasks"], -1)
        results.append(
            {"pages": pages, "raw": raw_pages, "k": read[0], "v": read[1], "out": out, "lse": lse, "past": past, **plan}
        )
    found, expected = results
    yield equal("plan_step", {name: (found[name], expected[name]) for name in plan})
    yield equal("write_tokens", {name: (found[name], expected[name]) for name in ("pages", "raw")})
    pairs = {name: (found[name].cpu().double(), expected[name].double()) for name in ("k", "v", "out", "past")}
    allowed = 4 * torch.finfo(subject.dtype).eps
    for operation, name in (("read_tokens", "k"), ("read_tokens", "v"), ("attend", "out"), ("attend", "past")):
        error = relative_error(*pairs[name])
        row = {"operation": operation, "criterion": "error <= 4 roundings", "error": error, "allowed": allowed}
        yield row | {"detail": f"{name}: {error:.1e}", "ok": error <= allowed}


@check("step: permuted requests, blocks, drafts", "write_tokens", 8.0)
def _blocks(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    layout = subject.layout
    size = kvarn.prefill_workspace_size(300, 3, 2 * subject.group, 2, layout, 4, torch.device(subject.device), split_size=2)
    memory = {"workspace": torch.full((size,), 0xFF, dtype=torch.uint8)}
    memory["scratch"] = torch.full((12, 2, 2, layout.page_size, layout.raw_head_dim), torch.nan, dtype=subject.dtype)
    sinks = torch.linspace(-2, 4, 2 * subject.group)
    yield from _step(kvarn, subject, False, {"window": 90, "sinks": sinks, "split_size": 2, "config": SOME_CONFIG, **memory})


@check("step: page ids in one list, sinks in pages", "write_tokens", 8.0)
def _lists(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    count = _tables(subject, True)["num_tokens"]  # words of one sequence alone: the others have too many tokens
    random = torch.Generator().manual_seed(subject.seed)
    masks = {"tree_mask": torch.randint(2**62, (count,), generator=random)}
    masks["span_ends"] = torch.randint(100, (count,), generator=random).int()
    yield from _step(kvarn, subject, True, masks)


@check("step of decodes", "attend", 3.0)
def _decodes(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    layout, device = subject.layout, subject.device
    call = {name: x for name, x in _tables(subject, False).items() if name in ("seq_lens", "block_table", "raw_table")}
    call["raw_table"][2, 0] = 8
    options = {"sink_len": layout.page_size, "pages_per_block": 2}
    q, k = subject.draw(3, 2 * subject.group, layout.head_dim), subject.draw(3, 2, layout.head_dim, shift=1)
    v = subject.draw(3, 2, layout.v_head_dim, shift=2)
    records = torch.zeros(layout.pages_shape(12, 2), dtype=torch.uint8)
    filled = [subject.draw(12 * layout.page_size, 2, x.shape[2], shift=3) for x in (k, v)]
    order = {"arithmetic": reference.ANY_ORDER}
    reference.store_pages(filled[0], filled[1], records, torch.arange(12), layout, **order)
    raw = subject.draw(9, 2, 2, layout.page_size, layout.raw_head_dim, shift=4)
    outs = []
    for where, api in ((device, kvarn), ("cpu", reference)):
        step = api.plan_step(layout, cu_seqlens_q=None, **moved(call, where), **options)
        pages, raw_pages = records.to(where, copy=True), raw.to(where, copy=True)
        api.write_tokens(k.to(where), v.to(where), pages, raw_pages, step)
        some: dict[str, Any] = {"sm_scale": 0.1, "soft_cap": 3.0, "window": 130, "keep_sink": True}
        out = torch.empty(3, 2 * subject.group, layout.v_head_dim, dtype=subject.dtype, device=where)
        table: dict[str, Any] = {}
        if api is kvarn:
            table = {"table": some_table(kvarn, torch.device(device)), "split_size": 2}
            given = {name: some[name] for name in ("window", "keep_sink")} | table | {"dtype": subject.dtype}
            for out_of in (None, "schedule"):
                table["schedule"] = kvarn.schedule_step(step, q.shape[1], 2, **given, out=out_of and table["schedule"])
        api.attend(q.to(where), pages, raw_pages, step, out=out, **some, **table)
        outs.append(out.cpu().double())
    error, allowed = relative_error(*outs), 4 * torch.finfo(subject.dtype).eps
    row = {"operation": "attend", "criterion": "error <= 4 roundings", "error": error, "allowed": allowed}
    yield row | {"detail": f"{error:.1e}", "ok": error <= allowed}
