"""What every sweep shares: the registry, the options of the command line, progress lines and who measured what."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import triton

Row = dict[str, Any]
T = TypeVar("T")

DEFAULT_PRESETS = ("k4v4_g128", "k4v2_g128", "k2v2_g128")
MAIN_PRESET = "k4v2_g128"


@dataclass
class Options:
    """What the command line asks for. Empty tuples stand for the sweep's own choice.

    `red` collects (operation, preset, head_dim, group) of every check that failed; timed sweeps look there.
    """

    presets: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    points: tuple[tuple[int, int], ...] = ()
    targets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    quick: bool = False
    full: bool = False
    seed: int = 0
    table: str | None = None
    gguf: str | None = None
    questions: Literal["choice", "report"] | None = None
    dtype: torch.dtype = torch.float16
    sections: dict[str, Row] = field(default_factory=dict)
    red: set[tuple[str, str, int, int]] = field(default_factory=set)


@dataclass(frozen=True)
class Sweep:
    """One sweep: a function that yields rows, and how its table looks.

    Args:
        name: the subcommand.
        run: takes the options, yields rows.
        needs: "gpu"; "compiler" (anything but Triton's interpreter); or "any".
        headers: row key -> column header, in the table's order.
        note: what the numbers mean, printed above the table.
        tabulate: turns all rows into those of the table, if that is more than picking the columns.
    """

    name: str
    run: Callable[[Options], Iterator[Row]]
    needs: str
    headers: dict[str, str]
    note: str
    tabulate: Callable[[list[Row]], list[Row]] | None = None


SWEEPS: dict[str, Sweep] = {}


def sweep(name: str, **fields: Any) -> Callable[[Callable[[Options], Iterator[Row]]], Callable[[Options], Iterator[Row]]]:
    """Register a generator of rows as a sweep; `fields` are those of `Sweep`."""

    def register(run: Callable[[Options], Iterator[Row]]) -> Callable[[Options], Iterator[Row]]:
        SWEEPS[name] = Sweep(name=name, run=run, **fields)
        return run

    return register


def say(text: str) -> None:
    """Print a line about what is going on, to stderr: stdout holds results only."""
    print(text, file=sys.stderr, flush=True)


def progress(title: str, items: Sequence[T], label: Callable[[T], str] = str) -> Iterator[T]:
    """Iterate over `items`; say before each which one is next, and about how long it and those after it will take."""
    start = time.perf_counter()
    for i, item in enumerate(items):
        elapsed = time.perf_counter() - start
        left = f", about {elapsed / i * (len(items) - i):.0f} s left" if i else ""
        say(f"{title} {i + 1}/{len(items)}: {label(item)} ({elapsed:.0f} s{left})")
        yield item


class Clock:
    """Progress of work whose costs are known beforehand, in any unit.

    Args:
        expected_s: seconds that all of it will take.
        total: costs of all of it.
    """

    def __init__(self, expected_s: float, total: float) -> None:
        self.expected_s, self.total, self.cost, self.start = expected_s, total, 0.0, time.perf_counter()

    def done(self, label: str, cost: float) -> None:
        """Count what was done; say so, and how long the rest will take if it goes on at the speed so far."""
        self.cost += cost
        elapsed, part = time.perf_counter() - self.start, min(self.cost / self.total, 1.0)
        # At first the guess made beforehand says more than what little was seen.
        whole = (1 - part) * self.expected_s + part * elapsed / part if part else self.expected_s
        say(f"{elapsed:4.0f} s, about {max(whole * (1 - part), 0):.0f} s left: {label}")


MOST_WORKERS = 8
"""Each has a context of its own on the GPU, which takes memory."""


def num_workers() -> int:
    """Return how many processes run side by side: one for each core that this process may use, up to a limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def _start_worker() -> None:
    torch.set_num_threads(1)
    # The interpreter's numpy: log2 of 0 is meant to be -inf, and masked-out lanes compute anything.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="numpy|triton")


@contextlib.contextmanager
def _interpreting(interpret: bool) -> Iterator[None]:
    """Have the processes that start meanwhile interpret kernels or compile them: each decides when it imports Triton."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def in_processes(run: Callable[..., T], calls: Sequence[tuple], *, interpret: bool) -> Iterator[tuple[int, T]]:
    """Run `run(*call)` for all calls, several at a time; yield the index and the result of each as it ends.

    Args:
        run: a function at the top level of a module.
        calls: arguments of each call. Long ones come first, or the last process ends late.
        interpret: whether the processes interpret kernels.
    """
    pool = ProcessPoolExecutor(
        max(min(num_workers(), len(calls)), 1), mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    with pool:
        with _interpreting(interpret):
            waiting = {pool.submit(run, *call): i for i, call in enumerate(calls)}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield waiting.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _output_of(command: Sequence[str]) -> str | None:
    try:
        folder = Path(__file__).resolve().parent
        text = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return text.splitlines()[0].strip() if text else None


def _commit() -> str | None:
    commit = _output_of(["git", "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    changed = _output_of(["git", "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _driver() -> str | None:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return _output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def environment(argv: Iterable[str]) -> Row:
    """Return what identifies a run: device, driver, versions, commit, date and the command line without folders."""
    has_gpu = torch.cuda.is_available()
    arguments = " ".join(shlex.quote(Path(arg).name if arg.startswith("/") else arg) for arg in argv)
    info: Row = {
        "device": torch.cuda.get_device_name() if has_gpu else None,
        "driver": _driver() if has_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python perf/sweep.py {arguments}".strip(),
    }
    if has_gpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        info["multiprocessors"] = properties.multi_processor_count
        info["l2_bytes"] = getattr(properties, "L2_cache_size", None)
        info["memory_bytes"] = properties.total_memory
    return info


def title(info: Row) -> str:
    """Return the title line: GPU, driver, torch, Triton, commit, date."""
    gpu = info["device"] or "no GPU: counts and errors, no times"
    parts = [gpu]
    if info["driver"]:
        parts.append(f"driver {info['driver']}")
    parts += [f"torch {info['torch']}", f"Triton {info['triton']}", f"commit {info['commit'] or 'unknown'}", info["date"]]
    return " | ".join(parts)
