"""Decode over sequences of very different lengths, and what the batch-invariant mode costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cases import build_cache, cache_bytes
from common import DEFAULT_PRESETS, Options, Row, progress, sweep
from gate import selected_shapes
from gpu_sweeps import DISTINCT_PAGES, check_timed_case, decode_calls, failed, free_memory, is_red, roof
from timing import Call, measure, num_input_sets

from kvarn_triton import PageLayout

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
    roof_gb_s = roof(options)
    presets = options.presets or (DEFAULT_PRESETS[1],)
    work = [(shape, preset) for shape in selected_shapes(options)[:1] for preset in presets]
    for shape, preset in progress("ragged", work, lambda w: f"{w[0].name} {w[1]}"):
        if is_red(options, "decode_attention", preset, shape):
            yield failed("the correctness gate is red", shape=shape.name, preset=preset)
            continue
        layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
        rows: list[Row] = []
        for name, lens in BATCHES.items():
            free_memory()
            case = build_cache(
                shape, layout, lens, device="cuda", distinct_pages=DISTINCT_PAGES, seed=options.seed, poison=False
            )
            num_bytes = cache_bytes(case)
            cases = [case]
            for i in range(1, num_input_sets(num_bytes)):
                cases.append(
                    build_cache(shape, layout, lens, device="cuda", distinct_pages=64, seed=options.seed + i, poison=False)
                )
            providers: dict[int | None, Sequence[Call]] = {None: decode_calls(cases)}
            providers |= {size: decode_calls(cases, split_size=size) for size in SPLIT_SIZES}
            timings, errors = measure(providers, samples=9 if options.quick else 21)  # type: ignore[arg-type]
            for size in providers:
                row: Row = {"shape": shape.name, "preset": preset, "batch": name, "split_size": size, "bytes": num_bytes}
                row |= check_timed_case(case, split_size=size)
                timing = timings.get(size)  # type: ignore[call-overload]
                if timing is None or "fail" in row:
                    rows.append(row | failed(row.get("fail") or errors[size]))  # type: ignore[index]
                    continue
                gb_s = num_bytes / timing.us / 1e3
                row |= timing.fields() | {"spread": f"{timing.us_p20:.4g}-{timing.us_p80:.4g}", "gb_s": gb_s}
                rows.append(row | {"percent_of_copy": 100 * gb_s / roof_gb_s})
        uniform = next(
            (row["gb_s"] for row in rows if row["batch"] == UNIFORM and row["split_size"] is None and "gb_s" in row), None
        )
        for row in rows:
            yield row | ({"times_uniform": uniform / row["gb_s"]} if uniform and "gb_s" in row else {})
