"""What writing the cache costs a decode step: appending tokens, completing pages, and their share of attention's time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from cases import Shape
from common import DEFAULT_PRESETS, Options, Row, progress, sweep
from gate import selected_shapes
from timed import RED, SERVED, decode_calls, decode_sets, failed, free_memory, is_red, num_samples, spread_fields
from timing import Call, Timing, measure

import kvarn_triton as kvarn
from kvarn_triton import PageLayout

BATCHES = (8, 64)
CONTEXT = 32768
APPEND = "append one token"
NONE_DUE = "commit, nothing complete"
ADVANCE = "commit and advance, nothing complete"
ALL_DUE = "commit, a page of each sequence"
ATTENTION = "attention, 32K"
STEP = "append and commit, mean of a page's steps"


@sweep(
    "write",
    needs="gpu",
    headers={
        "shape": "shape",
        "preset": "preset",
        "batch": "batch",
        "what": "what",
        "us": "us",
        "spread": "p20-p80",
        "percent_of_attention": "% of attention",
    },
    note="one layer of one decode step of `batch` sequences. mean of a page's steps: appending, and committing where in one\n"
    f"step of page_size all sequences complete a page. attention: served, {CONTEXT:,} tokens each. Advancing the counts of\n"
    "pages is the last layer's. Times of graph replays, launches included.",
)
def write(options: Options) -> Iterator[Row]:
    """Time the write path of the first shape beside attention."""
    shape = selected_shapes(options)[0]
    presets = options.presets or DEFAULT_PRESETS[1:]
    work = [(preset, batch) for preset in presets for batch in (BATCHES[:1] if options.quick else BATCHES)]
    for preset, batch in progress("write", work, lambda w: f"{shape.name} {w[0]} batch {w[1]}"):
        free_memory()
        row: Row = {"shape": shape.name, "preset": preset, "batch": batch}
        if is_red(options, ("append_tokens", "commit_pages", "decode_attention"), preset, shape):
            yield row | failed(RED)
            continue
        layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
        providers = _write_calls(shape, layout, batch, options.dtype, options.seed)
        providers[ATTENTION] = decode_calls(decode_sets(shape, layout, batch, CONTEXT, SERVED, options.seed, options.dtype))
        timings, errors = measure(providers, samples=num_samples(options))
        yield from _rows(row, providers, timings, errors, layout.page_size)


def _rows(
    row: Row, providers: dict[str, Sequence[Call]], timings: dict[str, Timing], errors: dict[str, str], page_size: int
) -> Iterator[Row]:
    """Yield a row for each provider, and one for the mean step."""
    attention = timings.get(ATTENTION)
    for what in providers:
        timing = timings.get(what)
        if timing is None:
            yield row | {"what": what} | failed(errors[what])
            continue
        share = {"percent_of_attention": 100 * timing.us / attention.us} if attention else {}
        yield row | {"what": what} | spread_fields(timing) | share
    if attention and all(what in timings for what in (APPEND, NONE_DUE, ALL_DUE)):
        commit = ((page_size - 1) * timings[NONE_DUE].us + timings[ALL_DUE].us) / page_size
        us = timings[APPEND].us + commit
        yield row | {"what": STEP, "us": us, "percent_of_attention": 100 * us / attention.us}


def _write_calls(shape: Shape, layout: PageLayout, batch: int, dtype: torch.dtype, seed: int) -> dict[str, Sequence[Call]]:
    """Return the calls on one cache of `batch` sequences, whose pages are complete or not."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads, size, head_dim = shape.num_kv_heads, layout.page_size, shape.head_dim
    raw_shape = (2 * batch, 2, heads, size, head_dim)
    raw_pages = torch.empty(raw_shape, dtype=dtype, device="cuda").normal_(generator=generator)
    pages = torch.zeros(layout.pages_shape(2 * batch, heads), dtype=torch.uint8, device="cuda")
    raw_table, block_table = (
        torch.randperm(2 * batch, generator=generator, device="cuda").int().view(batch, 2) for _ in range(2)
    )
    k, v = (torch.empty(batch, heads, head_dim, dtype=dtype, device="cuda").normal_(generator=generator) for _ in range(2))
    slots = raw_table[:, 0].long() * size + torch.arange(batch, device="cuda") % size

    def commit(length: int, advance: bool) -> Sequence[Call]:
        lens = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        counts = torch.zeros_like(lens)
        tables = raw_table, block_table, lens, counts
        return [lambda: kvarn.commit_pages(raw_pages, pages, *tables, layout, advance=advance)]

    return {
        APPEND: [lambda: kvarn.append_tokens(k, v, raw_pages, slots)],
        NONE_DUE: commit(size - 1, False),
        ADVANCE: commit(size - 1, True),
        ALL_DUE: commit(size, False),
    }
