"""Time functions on a GPU: interleaved, in CUDA graphs, over inputs that the L2 cache can't hold.

A provider is a list of calls that do the same work on different inputs. All its calls are captured in one graph, so that
launches cost nothing that a server wouldn't pay, and one sample is the time of whole graph replays divided by their calls.
Samples of different providers alternate: what the clock or a neighbour does to the device, it does to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], object]

SAMPLE_US = 1000.0
"""Least duration of one sample. Two replays are a few microseconds apart; this makes that below one percent."""
MIN_CALLS = 20
"""Calls of one graph, if the provider has fewer and they are short."""
LONG_CALL_US = 500.0
L2_FACTOR = 3
MAX_SETS = 256


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 20th and 80th percentile of `samples` samples of `calls` calls each."""

    us: float
    us_p20: float
    us_p80: float
    samples: int
    calls: int
    input_sets: int
    graph: bool

    def fields(self, prefix: str = "") -> dict[str, Any]:
        """Return the numbers as fields of a row."""
        return {prefix + name: value for name, value in asdict(self).items()}


def _capture(call: Call) -> Call:
    """Capture `call` in a graph; return what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _event() -> torch.cuda.Event:
    """Record an event on the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Return the time between two events."""
    end.synchronize()
    return 1000.0 * start.elapsed_time(end)


@dataclass
class _Program:
    """A provider made ready: one replay makes `calls` calls, one sample `replays` replays."""

    replay: Call
    calls: int
    input_sets: int
    graph: bool
    replays: int = 1


def _prepare(calls: Sequence[Call], sample_us: float) -> _Program:
    for call in calls:  # compiles, and loads every specialization before the capture
        call()
    torch.cuda.synchronize()
    start = _event()
    calls[0]()
    single_us = _elapsed_us(start, _event())
    unroll = 1 if single_us > LONG_CALL_US else math.ceil(MIN_CALLS / len(calls))

    def run() -> None:
        for _ in range(unroll):
            for call in calls:
                call()

    try:
        program = _Program(_capture(run), unroll * len(calls), len(calls), True)
    except RuntimeError:
        torch.cuda.synchronize()
        program = _Program(run, unroll * len(calls), len(calls), False)
    program.replay()
    torch.cuda.synchronize()
    start = _event()
    program.replay()
    replay_us = _elapsed_us(start, _event())
    program.replays = max(math.ceil(sample_us / max(replay_us, 1e-3)), 1)
    return program


def measure(
    providers: dict[str, Sequence[Call]],
    *,
    samples: int = 21,
    sample_us: float = SAMPLE_US,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time providers against each other.

    Args:
        providers: by name, the calls of a provider, one per set of inputs.
        samples: timed samples of each.
        sample_us: least duration of one sample.

    Returns:
        timings by name, and messages by name of those that raised an error instead.
    """
    programs: dict[str, _Program] = {}
    errors: dict[str, str] = {}
    for name, calls in providers.items():
        try:
            programs[name] = _prepare(calls, sample_us)
        except Exception as error:  # one provider that can't run leaves the others their times
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in programs}
    for sample in range(samples + 1):
        for name, program in programs.items():
            start = _event()
            for _ in range(program.replays):
                program.replay()
            if sample:  # the first round warms clocks and caches
                events[name].append((start, _event()))
    timings = {}
    for name, program in programs.items():
        per_sample = program.calls * program.replays
        times = sorted(_elapsed_us(start, end) / per_sample for start, end in events[name])
        timings[name] = Timing(
            us=percentile(times, 50),
            us_p20=percentile(times, 20),
            us_p80=percentile(times, 80),
            samples=len(times),
            calls=per_sample,
            input_sets=program.input_sets,
            graph=program.graph,
        )
    return timings, errors


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return a percentile of sorted numbers, between neighbours in proportion."""
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def num_input_sets(num_bytes: int) -> int:
    """Return how many sets of inputs of `num_bytes` are needed to hold three times the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 << 20
    return max(min(-(-L2_FACTOR * cache // max(num_bytes, 1)), MAX_SETS), 1)


def copy_calls(num_bytes: int, *, seed: int = 0) -> list[Call]:
    """Return calls that each move `num_bytes` through memory with a copy: half of them read, half of them written."""
    half = max(num_bytes // 2, 16)
    sets = num_input_sets(num_bytes)
    generator = torch.Generator("cuda").manual_seed(seed)
    source = torch.randint(0, 256, (sets, half), dtype=torch.uint8, device="cuda", generator=generator)
    target = torch.empty_like(source)
    return [lambda i=i: target[i].copy_(source[i]) for i in range(sets)]  # type: ignore[misc]


def copy_bandwidth(sizes: Sequence[int] = (1 << 28, 1 << 29, 1 << 32)) -> dict[str, Any]:
    """Measure the roof: the fastest of device-to-device copies that move `sizes` bytes, counting reads and writes.

    The largest copy need not be the fastest: one H200 moved 4.2 TB/s with copies of 0.25 to 0.5 GB and 2.8 TB/s with 4 GB.
    """
    free = torch.cuda.mem_get_info()[0]
    best: dict[str, Any] = {"copy_gb_s": 0.0}
    for num_bytes in (min(size, free // 4) for size in sizes):
        timings, errors = measure({"copy": copy_calls(num_bytes)}, samples=15)
        if errors:
            raise RuntimeError(f"the device-to-device copy failed: {errors['copy']}")
        gb_s = num_bytes / timings["copy"].us / 1e3
        if gb_s > best["copy_gb_s"]:
            best = {"copy_gb_s": gb_s, "copy_bytes": num_bytes, **timings["copy"].fields("copy_")}
    return best
