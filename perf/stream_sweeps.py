"""The timed sweeps of what streams through memory: storing, dequantizing and rotating. `timed.py` says how bytes count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from cases import SHAPES, Shape, fill_pages
from common import DEFAULT_PRESETS, Options, Row, progress, sweep
from gate import selected_shapes
from timed import DISTINCT_PAGES, RED, TIMED, failed, free_memory, is_red, num_samples, roof, timed_fields
from timing import Call, copy_calls, measure, num_input_sets

import kvarn_triton as kvarn
from kvarn_triton import PageLayout

PAGE_COUNTS = (1, 8, 256, 512)
"""Pages of one call: a page that decoding finished, a prompt of 1K tokens, one of 32K, four of 16K."""
ROW_COUNTS = (1024, 1 << 20)
HEADERS = {"shape": "shape", "preset": "preset", "pages": "pages", "tokens": "tokens", **TIMED, "tb_s": "16-bit TB/s"}


def _shapes(options: Options) -> list[Shape]:
    """Return one shape for each number of channels per token and head_dim, which is all that these operations see."""
    shapes = {(shape.num_kv_heads, shape.head_dim): shape for shape in reversed(selected_shapes(options))}
    chosen = list(reversed(shapes.values()))
    if options.full or options.shapes:
        return chosen
    others = [shape for shape in chosen[1:] if shape.head_dim != chosen[0].head_dim]
    return chosen[:1] if options.quick else [chosen[0], *others]


Make = Callable[[Shape, PageLayout, int, int], tuple[dict[str, Sequence[Call]], int]]
"""Takes shape, layout, number of pages and seed; returns providers and the bytes that ours moves."""


def _run(options: Options, operation: str, make: Make) -> Iterator[Row]:
    """Time an operation on pages."""
    counts = PAGE_COUNTS[1:] if options.quick else PAGE_COUNTS
    presets = options.presets or DEFAULT_PRESETS
    work = [(shape, preset, count) for shape in _shapes(options) for preset in presets for count in counts]
    for shape, preset, count in progress(operation, work, lambda w: f"{w[0].name} {w[1]} {w[2]} pages"):
        yield _row(options, operation, make, shape, preset, count)


def _row(options: Options, operation: str, make: Make, shape: Shape, preset: str, count: int) -> Row:
    """Time an operation on `count` pages of a preset."""
    free_memory()
    layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
    tokens = count * layout.page_size
    row: Row = {"shape": shape.name, "preset": preset, "pages": count, "tokens": tokens}
    row |= {"num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    if is_red(options, (operation,), preset, shape):
        return row | failed(RED)
    try:
        providers, num_bytes = make(shape, layout, count, options.seed)
    except Exception as error:  # one case that can't run leaves the others their times
        return row | failed(error)
    providers["copy"] = copy_calls(num_bytes)
    timings, errors = measure(providers, samples=num_samples(options))
    row |= timed_fields(timings.get("kvarn"), errors.get("kvarn"), num_bytes, roof(options))
    row["bytes_per_token"] = num_bytes / (tokens * shape.num_kv_heads)
    if row["us"] is not None:
        row["tb_s"] = tokens * shape.num_kv_heads * 4 * shape.head_dim / row["us"] / 1e6
        if "16bit" in timings:
            row |= {"us_16bit": timings["16bit"].us, "times_16bit": timings["16bit"].us / row["us"]}
    return row | ({"copy_us": timings["copy"].us} if "copy" in timings else {})


@sweep(
    "store",
    needs="gpu",
    headers=HEADERS,
    note="one store_pages call: 16-bit keys and values in, pages out. 16-bit us: a copy of the same keys and values to a\n"
    "16-bit cache. B/token: bytes moved per token and kv head. 16-bit TB/s: bytes of keys and values alone over the time.",
)
def store(options: Options) -> Iterator[Row]:
    """Time `store_pages`."""
    yield from _run(options, "store_pages", _store_calls)


def store_row(options: Options, shape_name: str, preset: str, count: int) -> Row:
    """Return the row of one number of pages."""
    return _row(options, "store_pages", _store_calls, SHAPES[shape_name], preset, count)


def _store_calls(shape: Shape, layout: PageLayout, count: int, seed: int) -> tuple[dict[str, Sequence[Call]], int]:
    tokens = count * layout.page_size
    num_bytes = shape.num_kv_heads * (tokens * 4 * shape.head_dim + count * layout.page_bytes)
    sets = num_input_sets(num_bytes)
    generator = torch.Generator("cuda").manual_seed(seed)
    kv_shape = (sets, 2, tokens, shape.num_kv_heads, shape.head_dim)
    kv = torch.empty(kv_shape, dtype=torch.float16, device="cuda").normal_(generator=generator)
    pages = torch.zeros(layout.pages_shape(sets * count, shape.num_kv_heads), dtype=torch.uint8, device="cuda")
    ids = [x.clone() for x in torch.randperm(sets * count, generator=generator, device="cuda").view(sets, count)]
    cache = torch.empty_like(kv)
    ours = [lambda i=i: kvarn.store_pages(kv[i, 0], kv[i, 1], pages, ids[i], layout) for i in range(sets)]  # type: ignore[misc]
    plain = [lambda i=i: cache[i].copy_(kv[i]) for i in range(sets)]  # type: ignore[misc]
    return {"kvarn": ours, "16bit": plain}, num_bytes


@sweep(
    "dequantize",
    needs="gpu",
    headers=HEADERS,
    note="one dequantize_pages call: pages in, 16-bit keys and values out. B/token: bytes moved per token and kv head.\n"
    "16-bit TB/s: bytes of keys and values alone over the time.",
)
def dequantize(options: Options) -> Iterator[Row]:
    """Time `dequantize_pages`."""
    yield from _run(options, "dequantize_pages", _dequantize_calls)


def _dequantize_calls(shape: Shape, layout: PageLayout, count: int, seed: int) -> tuple[dict[str, Sequence[Call]], int]:
    tokens = count * layout.page_size
    num_bytes = shape.num_kv_heads * (tokens * 4 * shape.head_dim + count * layout.page_bytes)
    sets = num_input_sets(num_bytes)
    generator = torch.Generator("cuda").manual_seed(seed)
    pages = torch.zeros(layout.pages_shape(sets * count, shape.num_kv_heads), dtype=torch.uint8, device="cuda")
    every = torch.randperm(sets * count, generator=generator, device="cuda")
    fill_pages(pages, every, layout, shape.head_dim, torch.float16, DISTINCT_PAGES, generator)
    ids = [x.clone() for x in every.view(sets, count)]
    out_shape = (sets, 2, count, layout.page_size, shape.num_kv_heads, shape.head_dim)
    out = torch.empty(out_shape, dtype=torch.float16, device="cuda")
    calls = [
        lambda i=i: kvarn.dequantize_pages(pages, ids[i], layout, out=(out[i, 0], out[i, 1]))  # type: ignore[misc]
        for i in range(sets)
    ]
    return {"kvarn": calls}, num_bytes


@sweep(
    "hadamard",
    needs="gpu",
    headers={"head_dim": "head_dim", "rows": "rows", **{key: head for key, head in TIMED.items() if key != "bytes_per_token"}},
    note="one hadamard call on float16 rows: each element read once and written once.",
)
def hadamard(options: Options) -> Iterator[Row]:
    """Time `hadamard`."""
    roof_gb_s = roof(options)
    dims = sorted({shape.head_dim for shape in selected_shapes(options)} | ({256} if options.full else set()))
    work = [(dim, rows) for dim in dims for rows in ROW_COUNTS]
    for dim, num_rows in progress("hadamard", work, lambda w: f"{w[1]} rows of {w[0]}"):
        free_memory()
        row: Row = {"head_dim": dim, "rows": num_rows}
        if any(red[0] == "hadamard" and red[2] == dim for red in options.red):
            yield row | failed(RED)
            continue
        num_bytes = 4 * num_rows * dim
        sets = num_input_sets(num_bytes)
        x = torch.empty(sets, num_rows, dim, dtype=torch.float16, device="cuda").normal_()
        out = torch.empty_like(x)
        calls = [lambda i=i, x=x, out=out: kvarn.hadamard(x[i], out=out[i]) for i in range(sets)]  # type: ignore[misc]
        timings, errors = measure({"kvarn": calls, "copy": copy_calls(num_bytes)}, samples=num_samples(options))
        row |= timed_fields(timings.get("kvarn"), errors.get("kvarn"), num_bytes, roof_gb_s)
        yield row | ({"copy_us": timings["copy"].us} if "copy" in timings else {})
