"""The correctness gate: every public function and option against `kvarn_triton.reference`, before anything is timed.

The checks are in `gate_checks` and `gate_attention`. Several processes run them: on the GPU, where nearly all of the time is
compilation, or in Triton's interpreter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from cases import DEFAULT_SHAPES, SHAPES, Shape
from common import DEFAULT_PRESETS, MAIN_PRESET, Clock, Options, Row, in_processes, num_workers, sweep

import kvarn_triton

ON_SHAPES = (
    "hadamard",
    "pages: store and dequantize",
    "tails: append and commit",
    "decode, sink, pages, tail",
    "decode, pages only",
    "prefill, chunk: sink, pages, tail",
    "prefill, drafts: pages only",
    "prefill, scratch: sink, pages, tail",
)
"""Checks that run on heads and presets that are timed, besides those of all options on a small page format."""
ON_MAIN_SHAPE = (ON_SHAPES[1], ON_SHAPES[3], ON_SHAPES[5])
"""Those of them that a quick run takes where nothing is timed."""
SHAPE_COST = 3.0
"""How much longer a check takes on a page of 128 tokens and channels than on one of 64."""


@dataclass(frozen=True)
class Task:
    """A check on a page format: by names, which another process can look up. Without a preset, the small one."""

    check: str
    preset: str = ""
    group: int = 4
    head_dim: int = 64
    dtype: str = "float16"
    seed: int = 0

    @property
    def label(self) -> str:
        """What runs, for progress lines."""
        return f"gate: {self.check}" + (f", {self.preset}, {self.group} x {self.head_dim}" if self.preset else "")

    @property
    def cost(self) -> float:
        """Seconds in the interpreter."""
        import gate_attention  # noqa: F401
        import gate_mla  # noqa: F401
        import gate_steps  # noqa: F401
        from gate_checks import CHECKS

        return CHECKS[self.check][1] * (SHAPE_COST if self.preset and self.head_dim > 64 else 1.0)


def device_of_gate() -> str:
    """Return where kernels run: the GPU, or the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def selected_shapes(options: Options) -> list[Shape]:
    """Return the shapes that the command line names, or all with --full; a few by default."""
    return [SHAPES[name] for name in options.shapes or (SHAPES if options.full else DEFAULT_SHAPES)]


def gate_tasks(options: Options) -> list[Task]:
    """Return what to check: all options on a small format, then what is timed, shapes of the same heads once."""
    import gate_attention  # noqa: F401
    import gate_mla  # noqa: F401
    import gate_steps  # noqa: F401
    from gate_checks import CHECKS

    interpreted = device_of_gate() == "cpu"
    presets = options.presets or ((MAIN_PRESET,) if options.quick else DEFAULT_PRESETS)
    heads = sorted({(shape.group, shape.head_dim) for shape in selected_shapes(options)})
    if interpreted and not options.full:  # groups share everything but the width of a product
        heads = [(group, dim) for group, dim in heads if (group, dim) in ((4, 128), (8, 64))] or heads[:1]
    heads = heads[:1] if options.quick else heads
    names = ON_MAIN_SHAPE if interpreted and options.quick else ON_SHAPES
    dtypes = ("float16",) if interpreted or options.quick else ("float16", "bfloat16")
    tasks = [Task(name, seed=options.seed) for name in CHECKS]
    for dtype in dtypes:
        tasks += [
            Task(name, preset, group, dim, dtype, options.seed)
            for group, dim in heads
            for preset in presets
            for name in names
            if name != "hadamard" or preset == presets[0]
        ]
    return sorted(tasks, key=lambda task: -task.cost)


def run_task(task: Task, device: str) -> tuple[list[Row], dict[str, set[str]]]:
    """Return the rows of a check and the public functions that it called, with the names of their arguments."""
    import gate_attention  # noqa: F401
    import gate_mla  # noqa: F401
    import gate_steps  # noqa: F401
    from gate_checks import CHECKS, SMALL, Recorder, Subject

    operation, _, run = CHECKS[task.check]
    layout = kvarn_triton.PageLayout.from_name(task.preset, head_dim=task.head_dim) if task.preset else SMALL
    subject = Subject(layout, task.group, getattr(torch, task.dtype), device, task.seed)
    recorder = Recorder()
    try:
        rows = list(run(recorder, subject))
    except Exception as error:  # whatever it is, the operation must not be timed
        detail = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        rows = [{"operation": operation, "criterion": "runs", "detail": detail, "ok": False}]
    where = {"check": task.check, "preset": task.preset, "group": task.group, "head_dim": task.head_dim, "dtype": task.dtype}
    heads = {"heads": f"{task.group} x {task.head_dim}"}
    rows = [where | heads | row | {"status": "ok" if row["ok"] else "FAIL"} for row in rows]
    return rows, dict(recorder.calls)


def public_functions() -> dict[str, set[str]]:
    """Return the functions of `kvarn_triton.__all__` with the names of their arguments."""
    functions = {name: getattr(kvarn_triton, name) for name in kvarn_triton.__all__}
    return {name: set(inspect.signature(f).parameters) for name, f in functions.items() if inspect.isfunction(f)}


def coverage(calls: Sequence[dict[str, set[str]]]) -> Row:
    """Return the row that says whether every public function was called, with each of its arguments."""
    called: dict[str, set[str]] = {}
    for part in calls:
        for name, arguments in part.items():
            called[name] = called.get(name, set()) | arguments
    public, missing = public_functions(), []
    for name, arguments in public.items():
        if name not in called:
            missing.append(name)
        elif arguments - called[name]:
            missing.append(f"{name}({', '.join(sorted(arguments - called[name]))})")
    counts = {"functions": len(public), "arguments": sum(map(len, public.values()))}
    detail = "; ".join(missing) or f"{counts['functions']} functions, {counts['arguments']} arguments"
    row: Row = {"operation": "coverage", "check": "every public function and argument", "criterion": "is called", **counts}
    return row | {"detail": detail, "ok": not missing, "status": "FAIL" if missing else "ok"}


def run_gate(options: Options, tasks: Sequence[Task], clock: Clock) -> Iterator[Row]:
    """Run checks and yield their rows as they end; the last one is that of `coverage`."""
    device, calls = device_of_gate(), []
    for i, (rows, called) in in_processes(run_task, [(task, device) for task in tasks], interpret=device == "cpu"):
        calls.append(called)
        red = [row for row in rows if not row["ok"]]
        options.red |= {(row["operation"], row["preset"], row["head_dim"], row["group"]) for row in red}
        clock.done(tasks[i].label + (": FAIL" if red else ""), tasks[i].cost)
        yield from rows
    yield coverage(calls)


@sweep(
    "gate",
    needs="any",
    headers={
        "check": "check",
        "operation": "operation",
        "heads": "heads",
        "preset": "preset",
        "dtype": "dtype",
        "criterion": "criterion",
        "detail": "found",
        "status": "status",
    },
    note="Correctness against the reference. heads: query heads per kv head x head_dim.",
)
def gate(options: Options) -> Iterator[Row]:
    """Check every public function and option, and every operation on the heads and presets that are timed."""
    tasks = gate_tasks(options)
    total = sum(task.cost for task in tasks)
    yield from run_gate(options, tasks, Clock(total / num_workers() + 5, total))
