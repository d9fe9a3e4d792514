"""The default run: the gate and a few measurements in at most three minutes, and a last screen that says what came of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from common import DEFAULT_PRESETS, MAIN_PRESET, Clock, Options, Row, in_processes, num_workers, say
from gate import gate_tasks, run_gate

SHAPE = "Llama-3.1-8B"
DECODE_POINTS = tuple(
    (SHAPE, cache, *point)
    for cache, point in (
        ("pages only", (1, 1024)),
        ("pages only", (1, 32768)),
        ("pages only", (128, 4096)),
        ("pages only", (8, 32768)),
        ("served", (8, 32768)),
    )
)
PREFILL_POINTS = (("verify", 8, 32768, 4), ("chunk, scratch", 1, 32768, 2048))
STORED_PAGES = 512
START_SECONDS, ERROR_SECONDS, POINT_SECONDS, GATE_GPU_SECONDS = 5.0, 2.0, 6.0, 60.0
"""Of starting processes; of a preset and encoder of `error`; of a timed point; of the gate's compilation on 16 cores."""
RESULTS = Path(__file__).resolve().parent / "results"
SIXTEEN_BITS = "FlashInfer", "FA3", "SDPA", "vLLM Triton", "16-bit twin"
RECORDED = (8, 32768), (1, 32768), (1, 1024)
WIDTH, MOST_RED = 10, 5


def without_gpu(options: Options) -> Iterator[tuple[str, Row]]:
    """Yield (sweep, row) of the default run without a GPU: the gate, errors of quantization, counts of the compiler."""
    from compile_sweep import MAIN_CALLS, compile_all, cost_of
    from offline_sweeps import capacity, quantization_errors

    presets = options.presets or DEFAULT_PRESETS
    errors = [(preset, encoder, options.seed) for preset in presets for encoder in ("published", "default")]
    compiled = [(target, MAIN_PRESET, name) for target, names in MAIN_CALLS.items() for name in names]
    tasks = gate_tasks(options)
    total = sum(task.cost for task in tasks) + ERROR_SECONDS * len(errors) + sum(cost_of(*task) for task in compiled)
    clock = started(total, 2 * START_SECONDS, f"{len(tasks)} checks in Triton's interpreter, errors, compilation")
    yield from (("gate", row) for row in run_gate(options, tasks, clock))
    yield from (("capacity", row) for row in capacity(replace(options, presets=presets)) if row["head_dim"] == 128)
    yield from (("compile", row) for row in compile_all(compiled, clock))
    for i, rows in in_processes(quantization_errors, errors, interpret=False):
        clock.done(f"error: {errors[i][0]}, {errors[i][1]} encoder", ERROR_SECONDS)
        yield from (("error", row) for row in rows)


def with_gpu(options: Options) -> Iterator[tuple[str, Row]]:
    """Yield (sweep, row) of the default run on a GPU: the gate, then times at a few points, everything beside 16 bits."""
    from decode_sweeps import decode_point
    from prefill_sweeps import prefill_point
    from stream_sweeps import store_row

    tasks = gate_tasks(options)
    checking = sum(task.cost for task in tasks)
    points: list[tuple[str, Callable[[], list[Row]]]] = []
    for point in DECODE_POINTS:
        presets = DEFAULT_PRESETS if point[1:] == ("pages only", 8, 32768) else (MAIN_PRESET,)
        points.append(("decode", lambda point=point, presets=presets: decode_point(options, point, presets)))
    for point in PREFILL_POINTS:
        points.append(("prefill", lambda point=point: [prefill_point(options, SHAPE, (MAIN_PRESET, *point))]))
    points.append(("store", lambda: [store_row(options, SHAPE, MAIN_PRESET, STORED_PAGES)]))
    # What the checks cost in the interpreter says no more than how they compare with each other.
    per_point = POINT_SECONDS * checking / GATE_GPU_SECONDS
    clock = Clock(GATE_GPU_SECONDS + POINT_SECONDS * len(points), checking + per_point * len(points))
    say(f"{len(tasks)} checks, {len(points)} timed points: about {clock.expected_s:.0f} s, less with kernels in Triton's cache")
    yield from (("gate", row) for row in run_gate(options, tasks, clock))
    for name, run in points:
        for row in run():
            yield name, row
        clock.done(name, per_point)


def started(total: float, extra: float, what: str) -> Clock:
    """Say how long the whole run will take, and return its clock."""
    workers = num_workers()
    clock = Clock(total / workers + extra, total)
    say(f"{what}: about {clock.expected_s:.0f} s on {workers} idle cores")
    return clock


def screen(results: dict[str, list[Row]]) -> list[str]:
    """Return the last screen: what was checked, what was measured, what it means, where it loses, and what shows more."""
    timed = any(row.get("us") or "fail" in row for row in results.get("decode", []))
    measured, means, loses = timed_texts(results) if timed else counted_texts(results)
    more = [
        "sweep.py decode, prefill, store, write, steps, ragged, peers (GPU); gate, error, compile, real (with or without)",
        "sweep.py --help lists all; sweep.py --all runs them; --json FILE keeps the numbers",
    ]
    texts = {"checked": checked_texts(results.get("gate", [])), "measured": measured}
    texts |= {"means": means, "loses": loses, "more": more}
    return [f"{name if i == 0 else '':{WIDTH}}{text}" for name, lines in texts.items() for i, text in enumerate(lines)]


def checked_texts(rows: Sequence[Row]) -> list[str]:
    """Return how much was checked, the largest error beside its tolerance, and what failed."""
    where = "on the GPU" if torch.cuda.is_available() else "in Triton's interpreter"
    covered = next((row for row in rows if row["operation"] == "coverage"), {})
    exact = sum(row["criterion"] == "bit-equal" for row in rows)
    inexact = [row for row in rows if row.get("allowed")]
    red = [row for row in rows if row["status"] == "FAIL"]
    verdict = f"FAIL: {len(red)} of {len(rows)} results" if red else "all agree with the reference"
    texts = [
        f"{covered.get('functions', 0)} public functions with all {covered.get('arguments', 0)} arguments {where}: {verdict}"
    ]
    if inexact:
        worst = max(inexact, key=lambda row: row["error"] / row["allowed"])
        largest = f"{worst['error']:.1e} where {worst['allowed']:.1e} is allowed ({worst['check']})"
        texts.append(f"{exact} results bit for bit, {len(inexact)} of attention against float64: the worst {largest}")
    texts += [f"FAIL {row['check']}: {row['operation']}: {row['detail']}"[:120] for row in red[:MOST_RED]]
    return texts + ([f"... and {len(red) - MOST_RED} more"] if len(red) > MOST_RED else [])


def counted_texts(results: dict[str, list[Row]]) -> tuple[list[str], list[str], list[str]]:
    """Return what was measured without a GPU, and what recorded times say it means."""
    measured = []
    if sizes := results.get("capacity", []):
        texts = (f"{short(row)} {row['bytes_per_token']:.0f} ({row['times_smaller']:.1f}x less)" for row in sizes)
        measured.append(f"bytes per token and kv head of 128 channels: bf16 512, {', '.join(texts)}")
    if errors := results.get("error", []):
        measured.append("relative error of keys, values, attention: default encoder (as published), mean of 5 distributions")
        presets = dict.fromkeys(row["preset"] for row in errors)
        measured.append("; ".join(error_text(errors, preset) for preset in presets))
    compiled = results.get("compile", [])
    measured += [f"FAIL {row['target']} {row['call']}: {row['status']}" for row in compiled if row["status"] != "ok"]
    for target in dict.fromkeys(row["target"] for row in compiled):
        ok = [row for row in compiled if row["target"] == target and row["status"] == "ok" and "merge" not in row["kernel"]]
        loops = "".join(f"decode {row['loop_per_page']:,} instructions a page; " for row in ok if row.get("loop_per_page"))
        used = ", ".join(f"{row['kernel'].split('_')[0]} {row['registers']} ({row['stack']})" for row in ok)
        measured.append(f"compiler, {target}: {loops}registers (stack): {used}")
    large, long, small = (served_beside(point) for point in RECORDED)
    chunk, first = recorded_chunk(32768, 2048), recorded_chunk(0, 4096)
    two, four = (recorded_quality(bits, "kl_generated") for bits in ("k2v2", "k4v2"))
    faster = f"{large[1] / large[0]:.1f}x the best 16-bit kernel, {large[2] / large[0]:.1f}x FA3 with fp8"
    means = [
        f"k4v2 at 8 x 32K tokens, sink and tail in 16 bits: {large[0]:.0f} us a decode step on an H200,",
        f"{faster} (perf/results/peers_decode_h200.json)",
    ]
    return measured, means, [
        f"2-bit keys: KL to the 16-bit cache {two:.3f}, {four:.4f} with 4 bits (135M model): 4 levels lose what is to be found",
        f"single short sequences: 1 x 1K {small[0]:.1f} us, 16 bits {small[1]:.1f}; 1 x 32K only {long[1] / long[0]:.1f}x:"
        " latency, not memory",
        f"prompts: the first 4,096 tokens {first['us']:.0f} us, FA3 {first['FA3']:.0f}; 2,048 over 32K"
        f" {chunk['us'] / 1000:.2f} ms, FA3 {chunk['FA3'] / 1000:.2f} (the kernel for it is sm90 only)",
    ]  # fmt: skip


def error_text(rows: Sequence[Row], preset: str) -> str:
    """Return the errors of the default encoder, those of the published one in brackets: means over distributions."""

    def mean(encoder: str, key: str) -> float:
        return statistics.fmean(row[key] for row in rows if (row["preset"], row["encoder"]) == (preset, encoder))

    keys = ("k_error", "v_error", "attention_error")
    texts = (f"{mean('default', key):.2f} ({mean('published', key):.2f})" for key in keys)
    return f"{short({'preset': preset})} {' '.join(texts)}"


def timed_texts(results: dict[str, list[Row]]) -> tuple[list[str], list[str], list[str]]:
    """Return what was timed, what it means, and where 16 bits are faster."""
    decode = [row for row in results["decode"] if row.get("us")]
    measured = []
    for cache in dict.fromkeys(row["cache"] for row in decode):
        texts = [decode_text(row) for row in decode if row["cache"] == cache]
        measured += [f"decode, {cache}: " + "; ".join(texts[i : i + 2]) for i in range(0, len(texts), 2)]
    for row in results.get("prefill", []):
        beside = f"{row['times_decode']:.1f} decode steps" if "times_decode" in row else ""
        beside = f"{row['percent_of_16bit']:.0f} % of 16 bits' speed" if "percent_of_16bit" in row else beside
        where = f"{row['tokens']} tokens over {point_text(row)}"
        measured += [f"{row['what']}, {where}: {row['us']:.0f} us, {beside}"] if row.get("us") else []
    for row in results.get("store", []):
        text = f"store_pages, {row['pages']} pages of 8 heads: {row.get('us') or 0:.0f} us"
        measured += [f"{text}, a copy of the same bytes {row['copy_us']:.0f}"] if row.get("us") else []
    measured += [f"FAIL {name}: {row['fail']}"[:120] for name, rows in results.items() for row in rows if "fail" in row]
    compared = [row for row in decode if "times_16bit" in row]
    best = max(compared, key=lambda row: row["times_16bit"], default=None)
    means = [f"at best {best['times_16bit']:.1f}x as fast as 16 bits ({short(best)}, {point_text(best)})"] if best else []
    lost = [row for row in compared if row["times_16bit"] < 1]
    slow = "; ".join(f"{point_text(row)} {row['us']:.1f} us, 16 bits {row['us_16bit']:.1f}" for row in lost)
    return measured, means, [
        f"single short sequences: {slow or 'not in this run'}: latency, not memory",
        "2-bit keys cost quality (docs/accuracy.md); prompts without scratch memory cost unpacking (sweep.py prefill)",
    ]  # fmt: skip


def decode_text(row: Row) -> str:
    """Return one time of decode beside 16 bits and a copy."""
    beside = f"{row['times_16bit']:.1f}x 16 bits, " if "times_16bit" in row else ""
    return f"{point_text(row)} {short(row)} {row['us']:.1f} us ({beside}{row['percent_of_copy']:.0f} % of copy)"


def point_text(row: Row) -> str:
    """Return batch and context."""
    return f"{row['batch']} x {row['context'] // 1024}K"


def short(row: Row) -> str:
    """Return the widths of a row's preset."""
    return row["preset"].split("_")[0]


def recorded_chunk(context: int, tokens: int) -> Row:
    """Return recorded times of a chunk of `tokens` over `context` cached ones, with the heads of Llama-3.1-8B, beside FA3."""
    found = json.loads((RESULTS / "chunks_h200.json").read_text())["beside FA3"]
    rows = (dict(zip(found["columns"], row, strict=True)) for row in found["rows"])
    return next(row for row in rows if (row["batch"], row["cached"], row["new of each"]) == (1, context, tokens))


def served_beside(point: tuple[int, int]) -> tuple[float, float, float]:
    """Return recorded times at a batch and context: the main layout as served, the best 16-bit kernel, FA3 with fp8."""
    found = json.loads((RESULTS / "peers_decode_h200.json").read_text())["decode"]
    rows = (dict(zip(found["columns"], row, strict=True)) for row in found["rows"])
    times = next(row for row in rows if (row["batch"], row["context"]) == point)
    return times["served"], min(times[name] for name in SIXTEEN_BITS if name in times), times["FA3 fp8"]


def recorded_quality(bits: str, column: str) -> float:
    """Return a recorded measure of the default encoder on a pretrained model."""
    found = json.loads((RESULTS / "real_h200.json").read_text())
    rows = (dict(zip(found["columns"], row, strict=False)) for row in found["real"])
    return next(row[column] for row in rows if (row["bits"], row["method"]) == (bits, "default"))
