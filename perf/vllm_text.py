"""Greedy tokens of vLLM with pages of kvarn_triton beside those with its own cache: python perf/vllm_text.py --model FOLDER

Each run is a process of its own with 8 requests over 4 slots in chunks of 128 tokens. It needs vLLM and a model; with k8v8_g64
all but near ties of logits should agree. `--random FOLDER` writes a small random Llama first, which needs no download.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LENGTHS = 20, 150, 63, 64, 65, 129, 190, 7
CASES = {
    "plain": {"enable_prefix_caching": False},
    "no sink": {"enable_prefix_caching": False, "sink_pages": 0},
    "preemption": {"enable_prefix_caching": False, "num_gpu_blocks_override": 7},
    "prefix caching": {"shared": 130, "twice": True},
    "prefix caching, no sink": {"shared": 130, "twice": True, "sink_pages": 0},
    "prefix caching, preemption": {"shared": 130, "num_gpu_blocks_override": 6},
    "blocks of two pages": {"enable_prefix_caching": False, "block_size": 128},
    "drafts": {"enable_prefix_caching": False, "drafts": 5, "repeat": 24},
    "drafts, preemption": {"enable_prefix_caching": False, "drafts": 5, "repeat": 24, "num_gpu_blocks_override": 7},
    "processes": {"enable_prefix_caching": False, "multiprocessing": True},
}
"""What each run changes; `own` runs take the same but for the cache."""


def random_llama(folder: Path) -> None:
    """Write a small Llama with random weights, head_dim 64, and no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, head_dim=64, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


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


def generate(case: dict, model: str, layout: str | None, new_tokens: int) -> dict:
    """Run one server; return the tokens of each request and what vLLM counted."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(case.get("multiprocessing", False)))
    from vllm import LLM, SamplingParams

    options = {name: value for name, value in case.items() if name in ("enable_prefix_caching", "block_size")}
    blocks = case.get("num_gpu_blocks_override")
    if blocks is not None:
        options["num_gpu_blocks_override"] = blocks
    if case.get("drafts"):
        drafts = {"method": "ngram", "num_speculative_tokens": case["drafts"], "prompt_lookup_max": 3, "prompt_lookup_min": 1}
        options["speculative_config"] = drafts
    if layout is not None:
        options["attention_backend"] = "CUSTOM"
        options["additional_config"] = {"kvarn_sink_pages": case.get("sink_pages", 1)}
        if layout.startswith("kvarn_"):
            options["kv_cache_dtype"] = layout
        else:
            options["additional_config"]["kvarn_layout"] = layout
    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128,
        kv_cache_memory_bytes=1 << 28, disable_log_stats=False, skip_tokenizer_init=True, **({"block_size": 64} | options),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    prompts = prompts_of(case, llm.model_config.get_vocab_size())
    begin = time.time()
    results = [llm.generate(prompts, sampling, use_tqdm=False) for _ in range(1 + bool(case.get("twice")))]
    counted = {each.name: getattr(each, "value", None) for each in llm.get_metrics()}
    wanted = ("num_preemptions", "prefix_cache_hits", "num_accepted_tokens", "num_draft_tokens")
    return {
        "tokens": [list(each.outputs[0].token_ids) for result in results for each in result],
        "seconds": round(time.time() - begin, 1),
        "counted": {name: value for name, value in counted.items() if name.endswith(wanted) and value},
    }


def run(name: str, args: argparse.Namespace, layout: str | None) -> dict:
    """Run a case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.json"
        command = [sys.executable, __file__, "--model", args.model, "--case", name, "--write", str(path)]
        command += ["--new-tokens", str(args.new_tokens)] + (["--layout", layout] if layout else ["--own"])
        done = subprocess.run(command, capture_output=True, text=True)
        if args.log or done.returncode:
            log = done.stdout + done.stderr
            print(log[-4000:] if done.returncode else "\n".join(line for line in log.splitlines() if "kvarn" in line))
        return json.loads(path.read_text()) if path.exists() else {"tokens": [], "counted": {}, "seconds": 0}


def main() -> int:
    """Compare all cases, or run one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder in Hugging Face's format")
    parser.add_argument("--random", help="write a small random model to this folder and take it")
    parser.add_argument("--layout", default="k8v8_g64", help="or a name of a cache dtype, where vLLM takes one: kvarn_k8v8_g64")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names of cases")
    parser.add_argument("--log", action="store_true", help="show what the plug-in logs")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        result = generate(CASES[args.case], args.model, None if args.own else args.layout, args.new_tokens)
        Path(args.write).write_text(json.dumps(result))
        return 0
    if args.random:
        random_llama(Path(args.random))
        args.model = args.random
    failed = 0
    for name in args.only:
        own, ours = run(name, args, None), run(name, args, args.layout)
        same = [a == b for a, b in zip(own["tokens"], ours["tokens"], strict=False)]
        total = sum(map(len, own["tokens"]))
        equal = sum(x == y for a, b in zip(own["tokens"], ours["tokens"], strict=False) for x, y in zip(a, b, strict=True))
        failed += not same
        print(
            f"{name}: {sum(same)} of {len(own['tokens'])} requests and {equal} of {total} tokens are equal; "
            f"{ours['counted']} (own: {own['counted']}), {ours['seconds']} s (own: {own['seconds']} s)",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
