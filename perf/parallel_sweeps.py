"""What several GPUs are worth: attention to a cache that two of them share, and pages that leave a GPU and come back.

Each rank is a process of its own. A sample is the time of whole replays of a graph that makes CALLS calls, the same number on
all ranks, which begin together; a time is that of the slowest rank.
"""

from __future__ import annotations

import datetime
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cases import Shape, build_cache
from common import MAIN_PRESET, Options, Row, progress, sweep
from gate import selected_shapes
from timed import SINK_LEN, failed, free_memory, num_samples, spread_fields
from timing import measure, percentile
from torch import distributed, multiprocessing

import kvarn_triton as kvarn
from kvarn_triton import PageLayout, parallel
from kvarn_triton.parallel import Shard
from kvarn_triton.testing import cache_case, relative_error

POINTS = ((1, 1 << 20, 1), (1, 1 << 17, 1), (8, 1 << 17, 1), (1, 1 << 17, 2048))
"""Sequences, tokens of each, and how many of those are new: 1 is a decode step."""
SMALL, SMALL_POINTS = Shape("small", 4, 2, 64), ((2, 700, 1), (2, 700, 20))
"""What is compared where there are no two GPUs; nothing is timed."""
CALLS, REPLAYS, SIZE = 10, 3, 2
MAX_ERROR = 2e-3
"""Between one rank and several: each of both has the rounding of queries and weights, and is rounded itself."""
TIMEOUT = datetime.timedelta(seconds=60)


@dataclass(frozen=True)
class Task:
    """What the processes of one point are given."""

    shape: Shape
    preset: str
    batch: int
    context: int
    new: int
    dtype: torch.dtype
    seed: int
    samples: int
    backend: str


class _Rank:
    """The cache on one rank: all of it, and the part that is its own in a pool of its own."""

    def __init__(self, task: Task, shard: Shard, device: torch.device) -> None:
        self.shard, self.device = shard, device
        shape, lengths = task.shape, [task.context - 1] * task.batch  # the tail has all but one token of a page
        self.layout = PageLayout.from_name(task.preset, head_dim=shape.head_dim)
        if device.type == "cuda":
            case = build_cache(
                shape, self.layout, lengths, sink_len=SINK_LEN, distinct_pages=256, dtype=task.dtype, seed=task.seed
            )
        else:
            case = cache_case(
                self.layout, lengths, num_kv_heads=shape.num_kv_heads, group=shape.group, dtype=task.dtype, sink_len=SINK_LEN,
                num_tail_slots=1, seed=task.seed,
            )  # fmt: skip
        self.q, self.pages, self.raw_pages = case.q, case.pages, case.raw_pages
        plan, ends, self.new = {"raw_table": case.raw_table, "sink_len": SINK_LEN}, None, [{}, {}]
        if task.new > 1:
            ends = torch.arange(task.batch + 1, dtype=torch.int32, device=device) * task.new
            plan |= {"num_tokens": task.batch * task.new, "max_query_len": task.new}
            self.q, self.new = self._chunk(task, plan["num_tokens"], case.block_table.shape)
        self.step = kvarn.plan_step(self.layout, case.seq_lens, ends, case.block_table, **plan)
        own = parallel.own_pages(case.block_table, shard)
        ids = own[own >= 0].long()
        place = torch.full((len(case.pages),), -1, dtype=torch.int32, device=device)
        place[ids] = torch.arange(len(ids), dtype=torch.int32, device=device)
        table = torch.where(own >= 0, place[own.long()], -1)
        self.own_pages = case.pages[ids]
        self.local = parallel.local_step(kvarn.plan_step(self.layout, case.seq_lens, ends, table, **plan), shard)
        self.exchange = None
        if device.type == "cuda":
            tokens, heads, _ = self.q.shape
            self.exchange = parallel.Exchange(heads, self.layout.v_head_dim, tokens, dtype=task.dtype, device=device)

    def _chunk(self, task: Task, count: int, table: torch.Size) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """Return queries of new tokens, and their keys and values with scratch memory for all pages and for a rank's."""
        generator = torch.Generator(self.device).manual_seed(task.seed)
        heads, head_dim = task.shape.num_kv_heads, task.shape.head_dim

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(count, heads, head_dim, generator=generator, device=self.device).to(task.dtype)

        new = {"k": draw(heads), "v": draw(heads)}
        slots = [table.numel(), table[0] * -(-table[1] // self.shard.size)]
        page = 2, heads, self.layout.page_size, head_dim
        return draw(heads * task.shape.group), [
            new | {"scratch": torch.empty(n, *page, dtype=task.dtype, device=self.device)} for n in slots
        ]

    def whole(self) -> torch.Tensor:
        """Attend to everything on this rank."""
        return kvarn.attend(self.q, self.pages, self.raw_pages, self.step, **self.new[0])

    def shared(self, exchange: parallel.Exchange | None = None) -> torch.Tensor:
        """Attend to everything on all ranks."""
        return parallel.attend(self.q, self.own_pages, self.raw_pages, self.local, exchange=exchange, **self.new[1])

    def part(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to what this rank attends to."""
        options = dict(self.new[1])
        if options and self.shard.rank:
            options = {"scratch": options["scratch"], "past_only": True}
        return kvarn.attend(self.q, self.own_pages, self.raw_pages, self.local.step, return_lse=True, **options)

    def providers(self) -> dict[str, Callable[[], object]]:
        """Return what is timed, by name."""
        out, lse = self.part()
        return {
            "1 GPU": self.whole,
            f"{self.shard.size} GPUs, collective": self.shared,
            f"{self.shard.size} GPUs, Exchange": lambda: self.shared(self.exchange),
            "its own part": self.part,
            "collective and merge": lambda: parallel.merge_ranks(out, lse),
            "Exchange alone": lambda: parallel.merge_ranks(out, lse, exchange=self.exchange),
        }

    def planned(self) -> parallel.LocalStep:
        """Cut a step for this rank, once for all layers."""
        return parallel.local_step(self.step, self.shard)


def _captured(call: Callable[[], object]) -> tuple[Callable[[], object], bool]:
    """Return what makes CALLS calls, and whether that is a graph."""

    def run() -> None:
        for _ in range(CALLS):
            call()

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def _timed(call: Callable[[], object], samples: int) -> Row:
    """Return the time of a call on the slowest rank, us."""
    run, is_graph = _captured(call)
    times = []
    for _ in range(samples + 1):
        distributed.barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        run()  # ranks leave the barrier apart
        start.record()
        for _ in range(REPLAYS):
            run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / (REPLAYS * CALLS))
    of_ranks: list[list[float]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(of_ranks, times[1:])
    slowest = sorted(max(both) for both in zip(*of_ranks, strict=True))
    row = {f"us_p{percent}": percentile(slowest, percent) for percent in (20, 80)}
    spread = f"{row['us_p20']:.4g}-{row['us_p80']:.4g}"
    return row | {"us": statistics.median(slowest), "spread": spread, "samples": samples, "graph": is_graph}


def run_rank(rank: int, task: Task, folder: str) -> None:
    """Measure on one rank; the first one writes the rows."""
    device, joined = torch.device("cpu"), {"rank": rank, "world_size": SIZE, "timeout": TIMEOUT}
    if task.backend == "nccl":
        device = joined["device_id"] = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    distributed.init_process_group(task.backend, init_method=f"file://{folder}/store", **joined)
    try:
        cache = _Rank(task, Shard(rank, SIZE), device)
        exact = cache.whole()
        error = max(relative_error(cache.shared(exchange), exact) for exchange in {None, cache.exchange})
        errors: list[float] = [0.0] * SIZE
        distributed.all_gather_object(errors, error)
        rows: list[Row] = [{"what": "equality", "error": max(errors)}]
        if not max(errors) <= MAX_ERROR:
            rows[0] |= failed(f"error {max(errors):.1e}")
        elif device.type == "cuda":
            times = {name: _timed(call, task.samples) for name, call in cache.providers().items()}
            times["local_step, once a step"] = _timed(cache.planned, task.samples)
            one = times["1 GPU"]["us"]
            rows += [{"what": name, **row, "times": one / row["us"]} for name, row in times.items()]
        if rank == 0:
            Path(folder, "rows").write_text(json.dumps(rows))
    finally:
        distributed.destroy_process_group()


@sweep(
    "parallel",
    needs="any",
    headers={
        "shape": "shape",
        "preset": "preset",
        "batch": "batch",
        "context": "context",
        "new": "new tokens",
        "what": "what",
        "error": "error",
        "us": "us",
        "spread": "p20-p80",
        "times": "x 1 GPU",
        "graph": "graph",
    },
    note=f"attention of one layer, sink and tail in 16 bits, pages in turn on {SIZE} ranks. error: between both, at most "
    f"{MAX_ERROR:g}.\nTimes need two GPUs. graph: whether it was timed in a captured graph.",
)
def shared_caches(options: Options) -> Iterator[Row]:
    """Compare attention on one GPU and on two that share the cache: decode, and a chunk of a prompt."""
    on_gpus = torch.cuda.device_count() >= SIZE
    points = [(*point, 1) for point in options.points] or (POINTS[:1] if options.quick else POINTS)
    shape, points = (selected_shapes(options)[0], points) if on_gpus else (SMALL, SMALL_POINTS)
    work = [(preset, *point) for preset in options.presets or (MAIN_PRESET,) for point in points]
    for preset, *point in progress("parallel", work):
        row: Row = {"shape": shape.name, "preset": preset} | dict(zip(("batch", "context", "new"), point, strict=True))
        backend, samples = "nccl" if on_gpus else "gloo", num_samples(options)
        task = Task(shape, preset, *point, options.dtype, options.seed, samples, backend)
        with tempfile.TemporaryDirectory() as folder:
            try:
                multiprocessing.spawn(run_rank, (task, folder), nprocs=SIZE)
            except Exception as error:
                yield row | failed(str(error).strip().splitlines()[-1][:200])
                continue
            for found in json.loads(Path(folder, "rows").read_text()):
                yield row | found


OFFLOADED = (16, 256, 4096)
"""Pages that are copied at once."""


def _copies(pages: torch.Tensor, ids: torch.Tensor, host: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return copies of pages of any ids, as in docs/examples/offload.py, and of as many bytes in a row."""
    return {
        "to the host": lambda: host.copy_(pages.index_select(0, ids), non_blocking=True),
        "back": lambda: pages.index_copy_(0, ids, host.to(pages.device, non_blocking=True)),
        "to the host, in a row": lambda: host.copy_(pages[: len(ids)], non_blocking=True),
        "back, in a row": lambda: pages[: len(ids)].copy_(host, non_blocking=True),
    }


@sweep(
    "offload",
    needs="any",
    headers={name: name for name in ("shape", "preset", "pages", "what", "status", "us")}
    | {"spread": "p20-p80", "gb_s": "GB/s"},
    note="copies of the pages of one layer to pinned host memory and back; nothing else runs. Times need a GPU.",
)
def offloads(options: Options) -> Iterator[Row]:
    """Copy pages to pinned host memory and back."""
    shape, device = selected_shapes(options)[0], "cuda" if torch.cuda.is_available() else "cpu"
    counts = OFFLOADED if device == "cuda" else OFFLOADED[:1]
    for preset, count in progress("offload", [(preset, n) for preset in options.presets or (MAIN_PRESET,) for n in counts]):
        free_memory()
        layout, generator = PageLayout.from_name(preset, head_dim=shape.head_dim), torch.Generator().manual_seed(options.seed)
        pages = torch.randint(0, 256, layout.pages_shape(2 * count, shape.num_kv_heads), dtype=torch.uint8, generator=generator)
        order, host = torch.randperm(2 * count, generator=generator), torch.empty_like(pages[:count])
        placed, ids = pages.to(device, copy=True), order[:count].to(device)
        calls = _copies(placed, ids, host.pin_memory() if device == "cuda" else host)
        calls["to the host"]()
        placed[ids] = 0
        calls["back"]()
        row: Row = {"shape": shape.name, "preset": preset, "pages": count}
        same = torch.equal(placed.cpu(), pages)
        yield row | {"what": "bytes", "status": "equal" if same else "FAIL"}
        if device == "cpu":
            continue
        timings, errors = measure({name: [call] for name, call in calls.items()}, samples=num_samples(options))
        num_bytes = count * shape.num_kv_heads * layout.page_bytes
        for what in calls:
            row |= {"what": what, "bytes": num_bytes}
            timing = timings.get(what)
            if timing is None:
                yield row | failed(errors[what])
            else:
                yield row | spread_fields(timing) | {"gb_s": num_bytes / timing.us / 1e3}
