"""Look on a GPU for what a comparison of results doesn't show: bad accesses, races, streams that disturb each other.

python perf/faults.py                           all parts below; exit code 1 if something was found
python perf/faults.py cases --processes 16      a case of every kernel, right or not; compiles what the tools need
python perf/faults.py memcheck racecheck initcheck synccheck --limit 300
python perf/faults.py streams channels
python perf/faults.py cases memcheck --only write_tokens --only attend

A tool of compute-sanitizer first has to find a planted fault of its kind: a silent tool says nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's package, installed or not

import torch  # noqa: E402
from common import Options, environment, say, title  # noqa: E402
from fault_streams import STEPS, differing_streams  # noqa: E402
from gate import ON_SHAPES, Task, gate_tasks, run_task  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kvarn_triton import PageLayout, decode_attention, reference  # noqa: E402
from kvarn_triton.testing import attention_in, relative_error  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PARTS = ("cases", *TOOLS, "streams", "channels")
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
CASE = "case "
"""What a line begins with that says that a case is over."""
FORMATS = (
    ("k3v3_g64", 1, 80, "bfloat16"),
    ("k8v8_g64", 8, 256, "bfloat16"),
    ("k2v4_g64", 4, 64, "float32"),
    ("k4v2_g64", 2, 512, "float16"),
    ("k5v6_g64", 2, 96, "float16"),
)
"""Beside the small format and the main one: preset, query heads per kv head, head_dim, dtype. Together all bits, all forms of
the loops over pages, and sizes on both sides of those at which kernels change."""
PLANTED = """
extern "C" __global__ void planted(const float* x, float* y, int fault) {
  __shared__ float s[64];
  int i = threadIdx.x;
  if (fault == 0) y[(1 << 20) + i] = 1.0f;
  if (fault == 1) { s[i] = i; y[i] = s[(i + 33) % 64]; }
  if (fault == 2) y[i] = x[i];
  if (fault == 3) { if (i < 16) __syncthreads(); y[i] = 1.0f; __syncthreads(); }
}
"""
"""A store past the end, a race of two warps, a load of what nobody wrote, a barrier that half of a warp doesn't reach."""


def fault_tasks(words: Sequence[str] = ()) -> list[Task]:
    """Return the cases: those of the gate on the small format and on the heads that are timed, then other formats.

    With words: those in whose label one of them is.
    """
    tasks = gate_tasks(Options(quick=True, shapes=("Llama-3.1-8B",)))
    for preset, group, head_dim, dtype in FORMATS:
        tasks += [Task(name, preset, group, head_dim, dtype) for name in ON_SHAPES if name != "hadamard"]
    return [task for task in tasks if not words or any(word in task.label for word in words)]


def unlaunched_kernels() -> list[str]:
    """Return the kernels of the package that this process has not launched, by name."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("kvarn_triton.")]
    kernels = {x.fn.__name__: x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    return sorted(
        name
        for name, kernel in kernels.items()
        if name.startswith("_kvarn_") and not any(cache[0] for cache in kernel.device_caches.values())
    )


def run_cases(part: int, parts: int, words: Sequence[str]) -> int:
    """Run every `parts`-th case in this process; print a line for each, and the kernels that none launched."""
    wrong = 0
    for task in fault_tasks(words)[part::parts]:
        start = time.perf_counter()
        rows, _ = run_task(task, "cuda" if torch.cuda.is_available() else "cpu")
        red = [f"{row['operation']}: {row['detail']}" for row in rows if not row["ok"]]
        wrong += bool(red)
        found, seconds = "; ".join(red) or "right", time.perf_counter() - start
        print(f"{CASE}{task.label}, {task.dtype}: {found} ({seconds:.1f} s)", flush=True)
    print("kernels without a launch:", ", ".join(unlaunched_kernels()) or "none", flush=True)
    return wrong


def run_planted(fault: int) -> int:
    """Launch a kernel that is wrong."""
    kernel = torch.cuda._compile_kernel(PLANTED, "planted")  # type: ignore[attr-defined]
    x, y = torch.empty(64, device="cuda"), torch.zeros(64, device="cuda")
    kernel(grid=(1, 1, 1), block=(64, 1, 1), args=[x, y, fault])
    torch.cuda.synchronize()
    return 0


def output_of(command: Sequence[str], limit: float, **variables: str) -> str:
    """Return what a command printed, until the limit at most."""
    with tempfile.TemporaryFile("w+") as file:
        # A session of its own: the tool's child is stopped with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables}, start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        file.seek(0)
        return file.read()


def side_by_side(calls: Sequence[Callable[[], str]]) -> list[str]:
    """Return the results of several calls made at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


def worker(*arguments: object) -> list[str]:
    """Return the command line of another process of this program."""
    return [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]


def judged_cases(texts: Sequence[str]) -> tuple[int, list[str], list[str]]:
    """Return how many cases ended, those that were wrong, and the kernels that no process launched."""
    lines = [line for text in texts for line in text.splitlines()]
    ended = [line for line in lines if line.startswith(CASE)]
    missing = [set(line.partition(": ")[2].split(", ")) for line in lines if line.startswith("kernels without")]
    never = set.intersection(*missing) - {"none"} if missing else {"no process came to its end"}
    return len(ended), [line for line in ended if ": right (" not in line], sorted(never)


def check_cases(options: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Run the cases without a tool."""
    count, expected = options.processes, len(fault_tasks(options.only))
    calls = [functools.partial(output_of, worker("case", i, count, *options.only), options.limit) for i in range(count)]
    texts = side_by_side(calls)
    ended, wrong, never = judged_cases(texts)
    save(options, "cases", texts)
    yield not wrong and ended == expected, f"{ended} of {expected} cases, {len(wrong)} wrong"
    yield not never or bool(options.only), f"kernels that no case launched: {', '.join(never) or 'none'}"
    yield from ((False, line) for line in wrong)


def check_tool(tool: str, options: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Run a planted fault, then the cases under a tool."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--target-processes", "application-only", "--print-limit", "20"]
    # Each tensor is memory of its own: in PyTorch's pools a store past the end hits what is nobody's, and is not seen.
    run = functools.partial(output_of, limit=options.limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    count = options.processes
    calls = [functools.partial(run, command + worker("planted", TOOLS.index(tool)))]
    calls += [functools.partial(run, command + worker("case", i, count, *options.only)) for i in range(count)]
    planted, *texts = side_by_side(calls)
    save(options, tool, [planted, *texts])
    if "Device not supported" in planted:
        yield False, "refused: the device is not supported"
        return
    found = errors_of(planted)
    yield bool(found), f"planted fault: {'found' if found else 'NOT FOUND: ' + planted.strip()[-300:]}"
    ended, wrong, never = judged_cases(texts)
    errors = [errors_of(text) for text in texts]
    total = sum(x or 0 for x in errors)
    summaries = f"{errors.count(None)} of {count} processes without a summary" if None in errors else "all summaries there"
    # What is wrong without the tool shows in `cases`; a kernel that is slower here has no other result.
    cases = f"{ended} of {len(fault_tasks(options.only))} cases"
    yield not total and not wrong, f"{cases}, {total} errors, {len(wrong)} wrong, {summaries}"
    yield True, f"kernels that no case launched: {', '.join(never) or 'none'}"
    for text in texts:
        if errors_of(text):
            lines = [line for line in text.splitlines() if line.startswith("=========") and line.strip("= ")]
            yield False, "\n".join(lines[:20])


def errors_of(text: str) -> int | None:
    """Return how many errors a tool counted; None where it was stopped before."""
    found = SUMMARY.search(text)
    return int(found[1] or found[2]) if found else None


def check_streams(options: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Run two caches on two streams, eagerly and from graphs."""
    for graphs in (False, True):
        different = differing_streams(graphs)
        how = "captured" if graphs else "eager"
        yield not different, f"two streams, {STEPS} {how} steps of each: {', '.join(different) or 'bits of the serial steps'}"


def channel_errors(ratio: float, bits: int, dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Return the error of decode and of plain attention in `dtype` where rotated key channels are up to `ratio` times apart.

    Rotated queries have the inverse factors, so that every channel takes part in the scores.
    """
    layout, heads, group, tokens = PageLayout(128, 128, bits, bits), 2, 4, 512
    random = torch.Generator().manual_seed(0)
    factors = ratio ** torch.linspace(-0.5, 0.5, 128)[torch.randperm(128, generator=random)]
    keys = reference.hadamard(torch.randn(tokens, heads, 128, generator=random) * factors)
    values = torch.randn(tokens, heads, 128, generator=random)
    q = reference.hadamard(torch.randn(2, heads * group, 128, generator=random) / factors).to(dtype).to(device)
    pages = torch.zeros(layout.pages_shape(4, heads), dtype=torch.uint8)
    reference.store_pages(keys, values, pages, torch.arange(4), layout)
    call = {
        "q": q,
        "pages": pages.to(device),
        "block_table": torch.arange(4, dtype=torch.int32, device=device).expand(2, 4).contiguous(),
        "seq_lens": torch.tensor([tokens, tokens - 100], dtype=torch.int32, device=device),
        "layout": layout,
    }
    exact = reference.decode_attention(**call | {"q": q.double()})
    return relative_error(decode_attention(**call), exact), relative_error(attention_in(dtype, call), exact)


def check_channels(options: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """Report errors of decode with channels far apart; they are facts about the kernel, not faults."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float16, torch.bfloat16):
        for bits in (2, 4, 8):
            for ratio in (1.0, 10.0, 100.0, 1e3, 1e4):
                error, plain = channel_errors(ratio, bits, dtype, device)
                name = str(dtype).removeprefix("torch.")
                yield True, f"{name}, {bits} bits, channels {ratio:g} times apart: {error:.1e}, plain attention {plain:.1e}"


def save(options: argparse.Namespace, name: str, texts: Sequence[str]) -> None:
    """Keep what processes printed, if a folder was named."""
    if options.logs:
        Path(options.logs, f"{name}.log").write_text("\n\n".join(texts))


def main() -> int:
    """Run the parts that are named, or all of them."""
    if sys.argv[1:2] == ["case"]:
        return int(run_cases(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]) > 0)
    if sys.argv[1:2] == ["planted"]:
        return run_planted(int(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--processes", type=int, default=4, help="among which the cases are divided, for each tool")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which a process is stopped")
    parser.add_argument("--logs", metavar="FOLDER", help="where to keep what the tools print")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="only cases whose name has this word; may be repeated"
    )
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        raise SystemExit("faults.py: needs a GPU")
    print(title(environment(())), flush=True)
    checks = {"cases": check_cases, "streams": check_streams, "channels": check_channels}
    checks |= {tool: functools.partial(check_tool, tool) for tool in TOOLS}
    bad = 0
    for part in options.parts or PARTS:
        start = time.perf_counter()
        say(part)
        for ok, text in checks[part](options):
            bad += not ok
            print(f"{part}: {'' if ok else 'FAIL: '}{text}", flush=True)
        say(f"{part}: {time.perf_counter() - start:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
