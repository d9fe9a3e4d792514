"""Search launch parameters of decode: measured on the GPU at hand, or derived from the compiler for one that isn't.

`python perf/sweep.py tune --table FILE` times every candidate that fits the GPU, checks each against float64 first, and writes
the fastest to FILE, which `kvarn_triton.load_table` reads. With `--target ARCH` nothing is run: candidates are compiled for
that architecture and ranked by a model of two numbers, the instructions of a page and how many programs a multiprocessor
holds. Entries say which of the two they are.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Iterator
from unittest import mock

import torch
from cases import DecodeCase, Shape, build_cache, decode_errors
from common import Options, Row, environment, progress, sweep
from gate import ERROR_RATIO

import kvarn_triton as kvarn
from kvarn_triton import DecodeConfig, DecodeTable, PageLayout, configs, inspection
from kvarn_triton.tables import Entry

SIZES = tuple((head_dim, block_n) for head_dim in (64, 128, 256, 512) for block_n in (8, 16))
PRESET = "k4v2_g128"
WARPS = (1, 2, 4)
REGISTERS = (None, 168, 128)
CYCLES_PER_INSTRUCTION = {1: 4.6, 2: 6.0, 4: 8.6}
"""Cycles between two instructions of one warp by warps per program, as an H200 took them: barriers cost more with more."""
EARLY_MERGE = ("sm90", "sm100", "sm120")
LOOP_SPILLS = 8
"""Loads and stores of spilled registers in the loop over pages above which a candidate isn't derived: on an H200 a candidate
with fewer registers and 40 of them took a third longer."""
STACK = 256
"""Bytes of stack of a thread, likewise."""
FINALISTS = 3
"""Fastest candidates at LARGE that are timed at SMALL too; the least product of both times wins."""
LARGE, SMALL = (8, 32768), (1, 32768)


def candidates(arch: str) -> list[DecodeConfig]:
    """Return the launch parameters to try, without the programs of a multiprocessor."""
    nvidia = arch.startswith("sm")
    return [
        DecodeConfig(num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg, early_merge=arch in EARLY_MERGE)
        for num_warps in WARPS
        for num_stages in (2, 3)
        for maxnreg in (REGISTERS if nvidia else (None,))
    ]


def call_for(head_dim: int, block_n: int, table: DecodeTable) -> None:
    """Call decode_attention over a served cache on the CPU, where `compile_for` compiles it."""
    shape = Shape("tune", 2 * block_n, 2, head_dim)
    layout = PageLayout.from_name(PRESET, head_dim=head_dim)
    raw = torch.zeros(2, 2, 2, layout.page_size, head_dim, dtype=torch.float16)
    table_of_pages, lens = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kvarn.decode_attention(
        torch.zeros(1, shape.num_q_heads, head_dim, dtype=torch.float16),
        torch.zeros(layout.pages_shape(2, 2), dtype=torch.uint8),
        table_of_pages,
        lens,
        layout,
        raw_pages=raw,
        raw_table=table_of_pages,
        num_quantized=lens,
        table=table,
    )


@dataclasses.dataclass
class Estimate:
    """What the compiler says of a candidate: programs of a multiprocessor, instructions of a page, spills, estimated cycles."""

    config: DecodeConfig
    programs: int
    instructions: int
    stack: int
    loop_spills: int
    cycles: float


def estimate(arch: str, head_dim: int, block_n: int, config: DecodeConfig) -> Estimate | None:
    """Compile a candidate and estimate the cycles that a multiprocessor needs for a page; None if it doesn't compile."""
    table = DecodeTable(arch, (Entry(head_dim, block_n, config, "candidate"),))
    try:
        with inspection.compile_for(arch) as kernels:
            call_for(head_dim, block_n, table)
    except Exception:  # a compiler that gives up on a candidate leaves the others
        return None
    used = inspection.resources(kernels[0])
    programs = inspection.programs_per_multiprocessor(used, arch)
    if programs < 1:
        return None
    layout = PageLayout.from_name(PRESET, head_dim=head_dim)
    with mock.patch.object(configs, "arch_of", lambda device: arch):
        chosen = configs.decode_config(layout, block_n, torch.float16, torch.device("cpu"), table)
    steps = layout.page_size // chosen.block_t
    instructions = (used.product_loop.total() or used.instructions) * steps
    warps = config.num_warps
    cycles = max(instructions * warps / 4, instructions * CYCLES_PER_INSTRUCTION[warps] / programs)
    spills = used.product_loop["LDL"] + used.product_loop["STL"] if used.loops else used.stack // 4
    return Estimate(config, programs, instructions * warps, used.stack, spills, cycles)


def derived(arch: str, head_dim: int, block_n: int) -> tuple[Entry, Estimate] | None:
    """Return the entry that the compiler's counts suggest."""
    found = [estimate(arch, head_dim, block_n, config) for config in candidates(arch) if config.num_stages == 2]
    compiled = [e for e in found if e is not None]
    dry = [e for e in compiled if e.loop_spills <= LOOP_SPILLS and e.stack <= STACK] or compiled
    ranked = sorted(dry, key=lambda e: e.cycles)
    if not ranked:
        return None
    best = ranked[0]
    config = dataclasses.replace(best.config, programs_per_sm=best.programs, few_programs_per_sm=max(2 * best.programs // 3, 1))
    return Entry(head_dim, block_n, config, "derived"), best


@functools.lru_cache(maxsize=2)
def timed_case(head_dim: int, block_n: int, point: tuple[int, int], seed: int) -> tuple[DecodeCase, ...]:
    """Return the caches of a timed point."""
    from gpu_sweeps import decode_sets

    layout = PageLayout.from_name(PRESET, head_dim=head_dim)
    return tuple(decode_sets(Shape("tune", 8 * block_n, 8, head_dim), layout, *point, "served", seed))


def error_ratio(head_dim: int, block_n: int, table: DecodeTable, seed: int) -> float:
    """Return the error of a candidate over that of the plain formula, at worst; compiles the candidate."""
    shape = Shape("tune", 2 * block_n, 2, head_dim)
    layout = PageLayout.from_name(PRESET, head_dim=head_dim)
    case = build_cache(shape, layout, [1000, 3], sink_len=100, tail_pages=1, device="cuda", seed=seed)
    out = kvarn.decode_attention(*case.arguments, **case.options, table=table)
    return max(found / plain for found, plain in (decode_errors(case, out, row) for row in range(2)))


def measured(
    pool: concurrent.futures.Executor, arch: str, head_dim: int, block_n: int, seed: int, source: str
) -> tuple[Entry, float, int] | None:
    """Return the best entry on this GPU, its time at LARGE in us, and how many candidates were timed."""
    from gpu_sweeps import decode_calls
    from timing import measure

    def table_of(config: DecodeConfig) -> DecodeTable:
        return DecodeTable(arch, (Entry(head_dim, block_n, config, source),))

    calls = [pool.submit(estimate, arch, head_dim, block_n, config) for config in candidates(arch)]
    known = [call.result() for call in calls]
    fitting = [dataclasses.replace(e.config, programs_per_sm=e.programs, few_programs_per_sm=e.programs) for e in known if e]
    checks = {config: pool.submit(error_ratio, head_dim, block_n, table_of(config), seed) for config in fitting}
    right = [config for config, check in checks.items() if check.exception() is None and check.result() <= ERROR_RATIO]

    def times(options: list[DecodeConfig], point: tuple[int, int]) -> dict[DecodeConfig, float]:
        cases = timed_case(head_dim, block_n, point, seed)
        timings, _ = measure({config: decode_calls(cases, table_of(config)) for config in options}, samples=5, sample_us=300.0)  # type: ignore[misc]
        return {config: timing.us for config, timing in timings.items()}  # type: ignore[misc]

    if not right:
        return None
    large = times(right, LARGE)
    finalists = sorted(large, key=large.__getitem__)[:FINALISTS]
    few = {dataclasses.replace(c, few_programs_per_sm=n): c for c in finalists for n in range(1, c.programs_per_sm + 1)}
    small = times(list(few), SMALL)
    best = min(small, key=lambda config: small[config] * large[few[config]])
    return Entry(head_dim, block_n, best, source), large[few[best]], len(right)


@sweep(
    "tune",
    needs="compiler",
    headers={
        "arch": "arch",
        "head_dim": "head_dim",
        "block_n": "heads",
        "num_warps": "warps",
        "num_stages": "stages",
        "maxnreg": "registers",
        "programs_per_sm": "programs",
        "few_programs_per_sm": "few",
        "us": "us",
        "loop_per_page": "instructions/page",
        "stack": "stack",
        "source": "source",
    },
    note="launch parameters of decode, k4v2_g128. heads: query heads per kv head, padded. us: served, batch 8, context 32K.\n"
    "measured on the GPU, or derived from the compiler's counts for an architecture that was asked for with --target.",
)
def tune(options: Options) -> Iterator[Row]:
    """Search every size; with --table, write the entries."""
    here = configs.arch_of(torch.device("cuda")) if torch.cuda.is_available() else None
    archs = options.targets or ((here,) if here else tuple(inspection.TARGETS))
    sizes = SIZES[:4] if options.quick else SIZES
    work = [(arch, *size) for arch in archs for size in sizes]
    entries: dict[str, list[Entry]] = {}
    pool = concurrent.futures.ProcessPoolExecutor(
        max((os.cpu_count() or 2) // 2, 1), mp_context=multiprocessing.get_context("spawn")
    )
    for arch, head_dim, block_n in progress("tune", work, lambda w: f"{w[0]} head_dim {w[1]}, {w[2]} heads"):
        row: Row = {"arch": arch, "head_dim": head_dim, "block_n": block_n}
        if arch == here and not options.targets:
            info = environment(())
            found = measured(
                pool, arch, head_dim, block_n, options.seed, f"measured: {info['device']}, Triton {info['triton']}"
            )
            row |= {} if found is None else {"us": found[1], "candidates": found[2]}
            timed_case.cache_clear()
        else:
            found = derived(arch, head_dim, block_n)
            row |= {} if found is None else {"loop_per_page": found[1].instructions, "stack": found[1].stack}
        if found is None:
            yield row | {"us": None, "fail": "no candidate compiles, fits and is exact"}
            continue
        entries.setdefault(arch, []).append(found[0])
        yield row | dataclasses.asdict(found[0].config) | {"source": found[0].source}
        if options.table:
            kvarn.save_table(options.table, DecodeTable(arch, tuple(entries[arch])))
