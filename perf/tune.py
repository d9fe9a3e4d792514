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
from collections.abc import Iterator, Sequence

import torch
from cases import ERROR_RATIO, DecodeCase, Shape, attention_errors
from common import MAIN_PRESET, Options, Row, environment, num_workers, progress, sweep

import kvarn_triton as kvarn
from kvarn_triton import DecodeConfig, DecodeTable, PageLayout, gpu
from kvarn_triton.tables import Entry
from kvarn_triton.testing import cache_case, compiler

HEAD_DIMS = (64, 128, 256, 512)
ROW_HEADS, COLUMN_HEADS = 8, 4
"""Query heads per kv head: as many as a program attends with, as rows of its products and as columns."""
MOST_COLUMN_CHANNELS = 256
"""Largest head_dim for which heads are columns: more spill."""
WARPS = (1, 2, 4)
BLOCKS = ((128, 128), (64, 64))
"""Tokens of a product with keys, and channels of one with values: smaller ones need fewer registers."""
CYCLES_PER_INSTRUCTION = {1: 3.7, 2: 4.7, 4: 5.5}
"""Cycles between two instructions of one warp by warps per program, as an H200 took them."""
EARLY_MERGE = ("sm90", "sm100", "sm120")
SPILL_COST = 24
"""Instructions that a load or store of a spilled register in the loop over pages costs: what makes the model agree with the
times of one and two warps at head_dim 256 on an H200 (`328ece2:decode_int8_h200.json`)."""
FINALISTS = 3
"""Fastest candidates at LARGE that are timed at SMALL too; the least product of both times wins."""
LARGE, SMALL = (8, 32768), (1, 32768)


@dataclasses.dataclass(frozen=True)
class Size:
    """What an entry of a table is for."""

    head_dim: int
    heads: int  # query heads per kv head

    @property
    def columns(self) -> bool:
        """Whether heads are columns of products."""
        return self.heads <= COLUMN_HEADS

    def entry(self, config: DecodeConfig, source: str) -> Entry:
        """Return an entry of this size."""
        return Entry(self.head_dim, config, source, max_heads=self.heads if self.columns else 0)


def sizes(arch: str, head_dims: Sequence[int]) -> list[Size]:
    """Return the sizes that an architecture has entries for."""
    columns = [d for d in head_dims if arch.startswith("sm") and d <= MOST_COLUMN_CHANNELS]
    return [Size(d, ROW_HEADS) for d in head_dims] + [Size(d, COLUMN_HEADS) for d in columns]


def candidates(arch: str, size: Size) -> list[DecodeConfig]:
    """Return the launch parameters to try, without the programs of a multiprocessor."""
    return [
        DecodeConfig(num_warps, num_stages, block_t, block_d, early_merge=arch in EARLY_MERGE, columns=size.columns)
        for num_warps in (WARPS[:1] if size.columns else WARPS)
        for num_stages in (2, 3)
        for block_t, block_d in BLOCKS
    ]


def call_for(size: Size, table: DecodeTable) -> None:
    """Call decode_attention over a served cache on the CPU, where `compile_for` compiles it."""
    case = cache_case(PageLayout.from_name(MAIN_PRESET, head_dim=size.head_dim), [1], group=size.heads)
    kvarn.decode_attention(case.q, **case.kwargs, table=table)


@dataclasses.dataclass
class Estimate:
    """What the compiler says of a candidate: programs of a multiprocessor, instructions of a page, spills, estimated cycles."""

    config: DecodeConfig
    programs: int
    instructions: int
    stack: int
    loop_spills: int
    cycles: float


def estimate(arch: str, size: Size, config: DecodeConfig) -> Estimate | None:
    """Compile a candidate and estimate the cycles that a multiprocessor needs for a page; None if it doesn't compile."""
    table = DecodeTable(arch, (size.entry(config, "candidate"),))
    try:
        with compiler.compile_for(arch) as kernels:
            call_for(size, table)
    except Exception:  # a compiler that gives up on a candidate leaves the others
        return None
    used = compiler.resources(kernels[0])
    programs = compiler.programs_per_multiprocessor(used, arch)
    if programs < 1:
        return None
    loop = used.product_loop
    instructions = loop.total() or used.instructions
    warps = config.num_warps
    spills = loop["LDL"] + loop["STL"] if used.loops else used.stack // 4
    issued = instructions + SPILL_COST * spills
    cycles = max(issued * warps / 4, issued * CYCLES_PER_INSTRUCTION[warps] / programs)
    return Estimate(config, programs, instructions * warps, used.stack, spills, cycles)


def derived(arch: str, size: Size) -> tuple[Entry, Estimate] | None:
    """Return the entry that the compiler's counts suggest."""
    found = [estimate(arch, size, config) for config in candidates(arch, size) if config.num_stages == 3]
    ranked = sorted((e for e in found if e is not None), key=lambda e: e.cycles)
    if not ranked:
        return None
    best = ranked[0]
    config = dataclasses.replace(best.config, programs_per_sm=best.programs, few_programs_per_sm=best.programs)
    return size.entry(config, "derived"), best


@functools.lru_cache(maxsize=2)
def timed_case(size: Size, point: tuple[int, int], seed: int) -> tuple[DecodeCase, ...]:
    """Return the caches of a timed point."""
    from timed import decode_sets

    layout = PageLayout.from_name(MAIN_PRESET, head_dim=size.head_dim)
    return tuple(decode_sets(Shape("tune", 8 * size.heads, 8, size.head_dim), layout, *point, "served", seed))


def error_ratio(size: Size, table: DecodeTable, seed: int) -> float:
    """Return the error of a candidate over that of the plain formula, at worst; compiles the candidate."""
    layout = PageLayout.from_name(MAIN_PRESET, head_dim=size.head_dim)
    case = cache_case(layout, [1000, 3], group=size.heads, sink_len=100, device="cuda", seed=seed)
    call = case.kwargs | {"q": case.q}
    out = kvarn.decode_attention(**call, table=table)
    pairs = [attention_errors(call, out, row) for row in range(2)]
    return max(found / plain for found, plain in pairs)


def measured(
    pool: concurrent.futures.Executor, arch: str, size: Size, seed: int, source: str
) -> tuple[Entry, float, int] | None:
    """Return the best entry on this GPU, its time at LARGE in us, and how many candidates were timed."""
    from timed import decode_calls
    from timing import measure

    def table_of(config: DecodeConfig) -> DecodeTable:
        return DecodeTable(arch, (size.entry(config, source),))

    calls = [pool.submit(estimate, arch, size, config) for config in candidates(arch, size)]
    known = [call.result() for call in calls]
    fitting = [dataclasses.replace(e.config, programs_per_sm=e.programs, few_programs_per_sm=e.programs) for e in known if e]
    checks = {config: pool.submit(error_ratio, size, table_of(config), seed) for config in fitting}
    right = [config for config, check in checks.items() if check.exception() is None and check.result() <= ERROR_RATIO]

    def times(options: list[DecodeConfig], point: tuple[int, int]) -> dict[DecodeConfig, float]:
        cases = timed_case(size, point, seed)
        timings, _ = measure({config: decode_calls(cases, table_of(config)) for config in options}, samples=5, sample_us=300.0)  # type: ignore[misc]
        return {config: timing.us for config, timing in timings.items()}  # type: ignore[misc]

    if not right:
        return None
    large = times(right, LARGE)
    finalists = sorted(large, key=large.__getitem__)[:FINALISTS]
    few = {dataclasses.replace(c, few_programs_per_sm=n): c for c in finalists for n in range(1, c.programs_per_sm + 1)}
    small = times(list(few), SMALL)
    best = min(small, key=lambda config: small[config] * large[few[config]])
    return size.entry(best, source), large[few[best]], len(right)


@sweep(
    "tune",
    needs="compiler",
    headers={
        "arch": "arch",
        "head_dim": "head_dim",
        "heads": "heads",
        "num_warps": "warps",
        "num_stages": "stages",
        "block_t": "tokens",
        "block_d": "channels",
        "programs_per_sm": "programs",
        "few_programs_per_sm": "few",
        "us": "us",
        "loop_per_page": "instructions/page",
        "stack": "stack",
        "source": "source",
    },
    note="launch parameters of decode, k4v2_g128. heads: query heads per kv head; entries of 4 are for up to 4.\n"
    "us: served, batch 8, context 32K.\n"
    "measured on the GPU, or derived from the compiler's counts for an architecture that was asked for with --target.",
)
def tune(options: Options) -> Iterator[Row]:
    """Search every size; with --table, write the entries."""
    here = gpu.arch_of(torch.device("cuda")) if torch.cuda.is_available() else None
    archs = options.targets or ((here,) if here else tuple(compiler.TARGETS))
    work = [(arch, size) for arch in archs for size in sizes(arch, HEAD_DIMS[:2] if options.quick else HEAD_DIMS)]
    entries: dict[str, list[Entry]] = {}
    pool = concurrent.futures.ProcessPoolExecutor(max(num_workers() // 2, 1), mp_context=multiprocessing.get_context("spawn"))
    for arch, size in progress("tune", work, lambda w: f"{w[0]} head_dim {w[1].head_dim}, {w[1].heads} heads"):
        row: Row = {"arch": arch, "head_dim": size.head_dim, "heads": size.heads}
        if arch == here and not options.targets:
            info = environment(())
            found = measured(pool, arch, size, options.seed, f"measured: {info['device']}, Triton {info['triton']}")
            row |= {} if found is None else {"us": found[1], "candidates": found[2]}
            timed_case.cache_clear()
        else:
            found = derived(arch, size)
            row |= {} if found is None else {"loop_per_page": found[1].instructions, "stack": found[1].stack}
        if found is None:
            yield row | {"us": None, "fail": "no candidate compiles, fits and is exact"}
            continue
        entries.setdefault(arch, []).append(found[0])
        yield row | dataclasses.asdict(found[0].config) | {"source": found[0].source}
        if options.table:
            kvarn.save_table(options.table, DecodeTable(arch, tuple(entries[arch])))
