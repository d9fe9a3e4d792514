"""What a step of a server costs in two calls: its plan, writing and attending, beside the calls that each of them stands
for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from cases import Shape
from common import DEFAULT_PRESETS, Options, Row, progress, sweep
from gate import selected_shapes
from timed import RED, failed, free_memory, is_red, num_samples, spread_fields
from timing import Call, measure

import kvarn_triton as kvarn
from kvarn_triton import PageLayout

SINK_LEN = 128
DECODES = ((64, 8192), (8, 32768))
CHUNKS = ((1, 2048, 32768), (8, 2048, 8192))
"""Sequences, new tokens of each, and their lengths with them."""
MAX_BLOCKS = 1024
"""Columns of tables, most of which are of no use: as wide as the longest sequence of a server."""


class _Step:
    """A batch of sequences with tables from position 0, one row for each request, in another order."""

    def __init__(self, shape: Shape, layout: PageLayout, batch: int, new: int, length: int, options: Options) -> None:
        generator = torch.Generator("cuda").manual_seed(options.seed)
        size, heads = layout.page_size, shape.num_kv_heads
        ints = {"dtype": torch.int32, "device": "cuda"}
        self.layout, self.batch, self.new, self.length = layout, batch, new, length
        num_pages = batch * -(-length // size)
        table = torch.randperm(num_pages, generator=generator, device="cuda").int().view(batch, -1)
        self.block_table = torch.zeros(batch, max(MAX_BLOCKS, table.shape[1]), **ints)
        self.block_table[:, : table.shape[1]] = table
        self.rows = torch.randperm(batch, generator=generator, device="cuda").int()
        self.raw_table = torch.arange(2 * batch, **ints).view(batch, 2)
        self.pages = torch.zeros(layout.pages_shape(num_pages, heads), dtype=torch.uint8, device="cuda")
        raw_shape = 2 * batch, 2, heads, size, layout.raw_head_dim
        self.raw_pages = torch.empty(raw_shape, dtype=options.dtype, device="cuda").normal_(generator=generator)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.empty(sizes, dtype=options.dtype, device="cuda").normal_(generator=generator)

        self.k, self.v = draw(batch * new, heads, shape.head_dim), draw(batch * new, heads, shape.head_dim)
        self.q = draw(batch * new, heads * shape.group, shape.head_dim)
        filled = [draw(num_pages * size, heads, shape.head_dim) for _ in range(2)]
        kvarn.store_pages(*filled, self.pages, torch.arange(num_pages, **ints), layout)
        self.ends = torch.arange(batch + 1, **ints) * new

    def plan(self, length: int, *, plain: bool = False) -> kvarn.Step:
        """Plan the step that ends at a length; `plain`: with a table of the body, in the order of the step."""
        lens = torch.full((self.batch,), length, dtype=torch.int32, device="cuda")
        sizes = {} if self.new == 1 else {"num_tokens": self.batch * self.new, "max_query_len": self.new}
        ends = None if self.new == 1 else self.ends
        if plain:
            body = self.block_table[:, SINK_LEN // self.layout.page_size :]
            return kvarn.plan_step(self.layout, lens, ends, body, self.raw_table, sink_len=SINK_LEN, **sizes)
        options = {"sink_len": SINK_LEN, "sink_columns": True, "rows": self.rows}
        return kvarn.plan_step(self.layout, lens, ends, self.block_table, self.raw_table, **options, **sizes)


def _decode_calls(step: _Step) -> dict[str, Sequence[Call]]:
    """Return the calls of a step of decodes, none of which completes a page, or all of them."""
    size, length = step.layout.page_size, step.length - step.length % step.layout.page_size
    pools = step.pages, step.raw_pages
    calls: dict[str, Sequence[Call]] = {
        "plan": [lambda: step.plan(length + 5)],
        "plan, body tables": [lambda: step.plan(length + 5, plain=True)],
    }
    for name, now in (("nothing completes", length - size // 2), ("every sequence completes a page", length)):
        planned, body = step.plan(now), step.plan(now, plain=True)
        counts = body.num_quantized - int(now == length)
        tables = step.raw_table, body.block_table, body.seq_lens, counts
        options = {"sink_len": SINK_LEN, "advance": False}

        def building_blocks(body: kvarn.Step = body, tables: tuple = tables, options: dict = options) -> None:
            kvarn.append_tokens(step.k, step.v, step.raw_pages, body.slots)
            kvarn.commit_pages(step.raw_pages, step.pages, *tables, step.layout, **options)

        calls[f"write_tokens, {name}"] = [lambda planned=planned: kvarn.write_tokens(step.k, step.v, *pools, planned)]
        calls[f"append_tokens and commit_pages, {name}"] = [building_blocks]
    body = step.plan(length - 5, plain=True)
    cache = {
        "raw_pages": step.raw_pages,
        "raw_table": body.raw_table,
        "num_quantized": body.num_quantized,
        "sink_len": SINK_LEN,
    }

    def direct() -> None:
        kvarn.decode_attention(step.q, step.pages, body.block_table, body.seq_lens, step.layout, **cache)

    # The direct call twice: what a place in the order of calls is worth.
    calls["decode_attention"] = [direct]
    for name, planned in (("attend", step.plan(length - 5)), ("attend, body tables", body)):
        calls[name] = [lambda planned=planned: kvarn.attend(step.q, *pools, planned)]
    calls["decode_attention, again"] = [direct]
    shape = step.batch, step.pages.shape[1], length, step.layout.head_dim
    k, v = (torch.empty(shape, dtype=step.k.dtype, device="cuda") for _ in range(2))
    calls["read_tokens"] = [lambda: kvarn.read_tokens(*pools, body, k, v)]
    flat = body.block_table[:, : length // step.layout.page_size - 1].reshape(-1)
    calls["dequantize_pages of the same pages"] = [lambda: kvarn.dequantize_pages(step.pages, flat, step.layout)]
    return calls


def _chunk_calls(step: _Step) -> dict[str, Sequence[Call]]:
    """Return the calls of a step of chunks: of whole pages, or such that a page has older tokens and a tail is left."""
    size, length, pools = step.layout.page_size, step.length, (step.pages, step.raw_pages)
    calls: dict[str, Sequence[Call]] = {"plan": [lambda: step.plan(length)]}
    for name, now in (("whole pages", length), ("between pages", length - size // 2)):
        planned = step.plan(now)
        calls[f"write_tokens, {name}"] = [lambda planned=planned: kvarn.write_tokens(step.k, step.v, *pools, planned)]
    ids = step.block_table[:, : step.new // size].reshape(-1)
    calls["store_pages of as many tokens"] = [lambda: kvarn.store_pages(step.k, step.v, step.pages, ids, step.layout)]
    planned, body = step.plan(length), step.plan(length, plain=True)
    new = {"k": step.k, "v": step.v}
    calls["attend"] = [lambda: kvarn.attend(step.q, *pools, planned, **new)]
    before = ((body.seq_lens - step.new - SINK_LEN).clamp_min(0) // size).int()
    cache = {"raw_pages": step.raw_pages, "raw_table": body.raw_table, "num_quantized": before, "sink_len": SINK_LEN}
    tables = body.block_table, body.seq_lens, step.ends
    calls["prefill_attention"] = [lambda: kvarn.prefill_attention(step.q, step.pages, *tables, step.layout, **new, **cache)]
    return calls


@sweep(
    "steps",
    needs="gpu",
    headers={
        "shape": "shape",
        "preset": "preset",
        "batch": "batch",
        "new": "new tokens",
        "context": "context",
        "what": "what",
        "us": "us",
        "spread": "p20-p80",
    },
    note=f"one layer. Tables: a row for each request, {MAX_BLOCKS:,} columns from position 0, in another order than the step;\n"
    "body tables: in its order, without columns of the sink. Times of graph replays, launches included.",
)
def steps(options: Options) -> Iterator[Row]:
    """Time the plan, writing and attending of steps, beside the building blocks."""
    shape = selected_shapes(options)[0]
    kinds = [(batch, 1, length) for batch, length in DECODES] + list(CHUNKS)
    work = [(preset, *kind) for preset in (options.presets or DEFAULT_PRESETS[1:2]) for kind in kinds]
    for preset, batch, new, context in progress("steps", work, lambda w: f"{shape.name} {w[0]} {w[1]} x {w[2]} of {w[3]}"):
        free_memory()
        row: Row = {"shape": shape.name, "preset": preset, "batch": batch, "new": new, "context": context}
        if is_red(options, ("write_tokens", "plan_step", "attend"), preset, shape):
            yield row | failed(RED)
            continue
        step = _Step(shape, PageLayout.from_name(preset, head_dim=shape.head_dim), batch, new, context, options)
        providers = _decode_calls(step) if new == 1 else _chunk_calls(step)
        timings, errors = measure(providers, samples=num_samples(options))
        for what in providers:
            timing = timings.get(what)
            yield row | {"what": what} | (failed(errors[what]) if timing is None else spread_fields(timing))
