"""Decode attention against a 16-bit twin and a copy, on sequences of one length; and on sequences of very different lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from cases import SHAPES, Shape, build_cache, cache_bytes
from common import DEFAULT_PRESETS, MAIN_PRESET, Options, Row, progress, sweep
from gate import selected_shapes
from sixteen_bit import MAX_ERROR, SixteenBit
from timed import (
    DISTINCT_PAGES,
    PAGES_ONLY,
    RED,
    SERVED,
    TIMED,
    check_timed_case,
    decode_calls,
    decode_sets,
    failed,
    free_memory,
    is_red,
    num_samples,
    roof,
    timed_fields,
)
from timing import Call, Timing, copy_calls, measure, num_input_sets
from torch.nn.attention import SDPBackend

from kvarn_triton import PageLayout

POINTS = ((1, 1024), (1, 4096), (1, 32768), (8, 4096), (8, 32768), (128, 4096))
FEWER_POINTS = ((1, 32768), (8, 32768), (128, 4096))
QUICK_POINTS = ((1, 4096), (8, 32768))
Point = tuple[str, str, int, int]
"""Name of a shape, cache, sequences, tokens of each."""


@sweep(
    "decode",
    needs="gpu",
    headers={"shape": "shape", "preset": "preset", "batch": "batch", "context": "context", "cache": "cache", **TIMED},
    note="one decode_attention call. served: a sink of 128 tokens and the last page at 16 bits; pages only: all quantized.\n"
    "x 16-bit: time of the tuned 16-bit paged twin over ours, below 1 where 16 bits win. B/token: cache bytes read per token\n"
    "and kv head. % of copy: of the large copy's bandwidth; copy us: a copy that moves the same bytes.",
)
def decode(options: Options) -> Iterator[Row]:
    """Time decode attention at every point of every shape; the presets of one point run against each other."""
    presets = options.presets or DEFAULT_PRESETS
    work = [(shape.name, cache, *point) for shape, cache, points in _decode_grid(options) for point in points]
    for point in progress("decode", work, lambda w: f"{w[0]} {w[1]} batch {w[2]} context {w[3]}"):
        yield from decode_point(options, point, presets)


def _decode_grid(options: Options) -> list[tuple[Shape, str, Sequence[tuple[int, int]]]]:
    """Return (shape, cache, points): all points for the first shape, fewer for the others unless asked for all."""
    shapes = selected_shapes(options)
    if options.quick:
        return [(shape, SERVED, options.points or QUICK_POINTS) for shape in shapes[:2]]
    grid: list[tuple[Shape, str, Sequence[tuple[int, int]]]] = []
    for i, shape in enumerate(shapes):
        everything = options.full or i == 0
        points = options.points or (POINTS if everything else FEWER_POINTS)
        grid += [(shape, cache, points) for cache in ((SERVED, PAGES_ONLY) if everything else (SERVED,))]
    return grid


def decode_point(options: Options, point: Point, presets: Sequence[str]) -> list[Row]:
    """Return a row of each preset at one point."""
    name, cache, batch, context = point
    fields: Row = {"shape": name, "batch": batch, "context": context, "cache": cache}
    free_memory()
    try:
        return _decode_rows(options, SHAPES[name], fields, presets)
    except torch.cuda.OutOfMemoryError:
        skipped = {"us": None, "spread": "skipped", "skipped": "not enough memory"}
        return [fields | {"preset": preset} | skipped for preset in presets]


def _decode_rows(options: Options, shape: Shape, fields: Row, presets: Sequence[str]) -> list[Row]:
    batch, context = fields["batch"], fields["context"]
    in_and_out = 4 * batch * shape.num_q_heads * shape.head_dim
    providers: dict[str, Sequence[Call]] = {}
    dense = SixteenBit(shape, batch, context, 1, options.seed)
    config, calls, twin_error = dense.best_twin()
    if twin_error <= MAX_ERROR:
        providers |= {"16bit": calls, "sdpa": dense.sdpa_calls(SDPBackend.FLASH_ATTENTION)}
    sixteen = {"bytes_16bit": 4 * shape.head_dim * shape.num_kv_heads * batch * context + in_and_out}
    sixteen |= {"config_16bit": config, "error_16bit": twin_error}
    rows: dict[str, Row] = {}
    for preset in presets:
        layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
        row = fields | {"preset": preset, "dtype": str(options.dtype).removeprefix("torch.")}
        rows[preset] = row | {"num_q_heads": shape.num_q_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        if is_red(options, ("decode_attention", "store_pages"), preset, shape):
            rows[preset] |= failed(RED)
            continue
        try:
            cases = decode_sets(shape, layout, batch, context, fields["cache"], options.seed, options.dtype)
            rows[preset] |= check_timed_case(cases[0])
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a broken preset leaves the others their times
            rows[preset] |= failed(error)
            continue
        if "fail" not in rows[preset]:
            num_bytes = cache_bytes(cases[0])
            rows[preset] |= {"cache_bytes": num_bytes, "bytes_per_token": num_bytes / (batch * context * shape.num_kv_heads)}
            rows[preset]["bytes"] = num_bytes + in_and_out
            providers |= {preset: decode_calls(cases), f"copy {preset}": copy_calls(num_bytes + in_and_out)}
    timings, errors = measure(providers, samples=num_samples(options))
    return [_decode_row(row, timings, errors, roof(options), sixteen) for row in rows.values()]


def _decode_row(row: Row, timings: dict[str, Timing], errors: dict[str, str], roof_gb_s: float, sixteen: Row) -> Row:
    preset = row["preset"]
    if "fail" not in row:
        row |= timed_fields(timings.get(preset), errors.get(preset), row["bytes"], roof_gb_s)
    if row["us"] is None:
        return row
    for name, provider in (("copy", f"copy {preset}"), ("16bit", "16bit"), ("sdpa", "sdpa")):
        if timing := timings.get(provider):
            us = {"us": timing.us, "us_p20": timing.us_p20, "us_p80": timing.us_p80}
            row |= {(f"copy_{key}" if name == "copy" else key.replace("us", f"us_{name}")): us[key] for key in us}
        else:
            row[f"note_{name}"] = errors.get(provider, f"not run; the twin's error is {sixteen['error_16bit']:.1e}")
    if "us_16bit" in row:
        row |= {"times_16bit": row["us_16bit"] / row["us"], **sixteen}
        row["percent_of_copy_16bit"] = 100 * sixteen["bytes_16bit"] / row["us_16bit"] / 1e3 / roof_gb_s
    return row


BATCHES: dict[str, Sequence[int]] = {
    "64 x 1K": [1024] * 64,
    "64 x 3K": [3072] * 64,
    "1 x 128K + 63 x 1K": [131072] + [1024] * 63,
    "1 x 128K + 63 x 4K": [131072] + [4096] * 63,
    "8 x 32K": [32768] * 8,
    "1 x 32K": [32768],
}
"""Lengths by name; 64 x 3K holds about the bytes of the ragged batch of 128K and 1K."""
UNIFORM = "64 x 3K"
SPLIT_SIZES = (4, 8, 16, 32)


@sweep(
    "ragged",
    needs="gpu",
    headers={
        "shape": "shape",
        "preset": "preset",
        "batch": "sequences",
        "split_size": "split size",
        "us": "us",
        "spread": "p20-p80",
        "gb_s": "GB/s",
        "percent_of_copy": "% of copy",
        "times_uniform": "x bytes' time",
    },
    note="decode_attention, pages only. split size: pages of a run in the batch-invariant mode; none: the balanced mode.\n"
    f"x bytes' time: time over what the row's bytes take at the bandwidth of {UNIFORM}, balanced.",
)
def ragged(options: Options) -> Iterator[Row]:
    """Time ragged and uniform batches of the first shape."""
    shape = selected_shapes(options)[0]
    for preset in progress("ragged", options.presets or (MAIN_PRESET,)):
        if is_red(options, ("decode_attention",), preset, shape):
            yield failed(RED, shape=shape.name, preset=preset)
            continue
        rows = [row for name in BATCHES for row in _ragged_rows(options, shape, preset, name)]
        gb_s = {row["batch"]: row["gb_s"] for row in rows if row["split_size"] is None and "gb_s" in row}
        for row in rows:
            known = UNIFORM in gb_s and "gb_s" in row
            yield row | ({"times_uniform": gb_s[UNIFORM] / row["gb_s"]} if known else {})


def _ragged_rows(options: Options, shape: Shape, preset: str, name: str) -> Iterator[Row]:
    """Yield a row for each way to split one batch."""
    free_memory()
    layout, lens = PageLayout.from_name(preset, head_dim=shape.head_dim), BATCHES[name]
    case = build_cache(shape, layout, lens, distinct_pages=DISTINCT_PAGES, seed=options.seed)
    num_bytes = cache_bytes(case)
    seeds = range(options.seed + 1, options.seed + num_input_sets(num_bytes))
    cases = [case, *(build_cache(shape, layout, lens, distinct_pages=64, seed=seed) for seed in seeds)]
    sizes = (None, *SPLIT_SIZES)
    providers = {str(size): decode_calls(cases, split_size=size) for size in sizes}
    timings, errors = measure(providers, samples=num_samples(options))
    for size in sizes:
        row: Row = {"shape": shape.name, "preset": preset, "batch": name, "split_size": size, "bytes": num_bytes}
        row |= check_timed_case(case, split_size=size)
        if str(size) in timings and "fail" not in row:
            yield row | timed_fields(timings[str(size)], None, num_bytes, roof(options))
        else:
            yield row | failed(row.get("fail") or errors[str(size)])
