"""Measure nano-vllm over pages beside nano-vllm over 16 bits: decode of a Qwen3 of 8B with random weights, in CUDA graphs.

python perf/nano.py --json nano.json            tokens per second at batch 1 and at the largest batch that fits
python perf/nano.py --layers 4 --context 4096    sooner: fewer layers, one context
python perf/nano.py --tiny                       the same on a CPU with a tiny model, eager: whether it runs

Nothing is computed for prompts: caches are filled with random tokens, and sequences begin as if they had been read. 16 bits is
nano-vllm's own attention where flash_attn is installed; else the paged twin of `twin.py` takes its place (PyTorch's attention
on a CPU). The largest batch is one that there are blocks for, 512 at most, as nano-vllm captures no larger graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout's package, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))  # the adapter

import nano_cpu
import nano_vllm
import torch
from common import Row, environment, say, title
from nano_sixteen import SixteenBitAttention
from report import write_json
from transformers import Qwen3Config

from kvarn_triton import store_pages

QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "vocab_size": 256,
}  # fmt: skip
SIXTEEN = "16 bits"
CONTEXTS = (4096, 16384, 65536)
BLOCK, MOST_ROWS, UTILIZATION = 256, 512, 0.85
WARM, TIMED, REPEATS = 8, 64, 3
TEMPLATE = 128
"""Pages that are encoded; all others are copies of them."""


def graph_size(batch: int) -> int:
    """Return the size of the graph that nano-vllm replays for a batch."""
    return next(size for size in (1, 2, 4, 8, batch + -batch % 16) if size >= batch)


def largest_batch(runner: Any, blocks_each: int) -> int:
    """Return how many sequences there are blocks for."""
    return min((runner.config.num_kvcache_blocks - 1) // blocks_each, runner.config.max_num_seqs)


def expected_batch(options: argparse.Namespace, config: Any, blocks_each: int) -> int:
    """Return how many sequences will fit beside the weights: memory of slots depends on it, so it is needed first."""
    if options.tiny:
        return 3
    total = torch.cuda.get_device_properties(0).total_memory
    heads, size, q_size = config.num_key_value_heads, config.hidden_size, config.num_attention_heads * config.head_dim
    layer = size * (2 * q_size + 2 * heads * config.head_dim + 3 * config.intermediate_size)
    weights = 2 * (config.num_hidden_layers * layer + 2 * config.vocab_size * size)
    each = blocks_each * BLOCK * 2 * heads * config.head_dim * 2
    if options.cache != SIXTEEN:
        layout = nano_vllm.PageLayout.from_name(options.cache, head_dim=config.head_dim)
        each = blocks_each * BLOCK // layout.page_size * heads * layout.page_bytes
        each += 2 * 2 * heads * layout.page_size * layout.raw_head_dim * 2  # sink and tail, keys and values, 2 bytes
    return max(min(int(total * UTILIZATION - weights) // (each * config.num_hidden_layers), MOST_ROWS), 1)


def randomize(model: torch.nn.Module, path: str) -> None:
    """Fill weights with random numbers, in place of reading them."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.02)


def make_engine(options: argparse.Namespace, blocks_each: int) -> Any:
    """Return an engine whose model has random weights."""
    sizes, dtype = (TINY, "float16") if options.tiny else (QWEN3_8B, "bfloat16")
    config = Qwen3Config(
        **sizes, num_hidden_layers=options.layers, max_position_embeddings=2**17, tie_word_embeddings=False, dtype=dtype
    )
    qwen3, model_runner, _ = nano_vllm.import_engine()
    model_runner.load_model = randomize
    if options.cache != SIXTEEN:
        nano_vllm.install(options.cache)
    else:
        nano_vllm.take_rope_parameters(qwen3)
        if importlib.util.find_spec("flash_attn") is None or options.tiny:
            qwen3.Attention = SixteenBitAttention
    from nanovllm import LLM

    length, slots = blocks_each * BLOCK, graph_size(expected_batch(options, config, blocks_each))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config.save_pretrained(folder)
        return LLM(
            folder, tokenizer=argparse.Namespace(eos_token_id=-1), max_num_seqs=slots, max_model_len=length,
            max_num_batched_tokens=length, gpu_memory_utilization=UTILIZATION, enforce_eager=options.tiny,
        )  # fmt: skip


def fill(runner: Any, cache: str) -> None:
    """Fill all caches with random tokens."""
    if cache == SIXTEEN:
        runner.kv_cache.normal_()
        return
    for layer in nano_vllm.CACHE.layers:
        size = (TEMPLATE * layer.layout.page_size, layer.num_kv_heads, layer.layout.head_dim)
        k, v = (torch.randn(size, dtype=layer.raw_pages.dtype, device=layer.pages.device) for _ in range(2))
        template = layer.pages.new_zeros(TEMPLATE, *layer.pages.shape[1:])
        store_pages(k, v, template, torch.arange(TEMPLATE, dtype=torch.int32, device=k.device), layer.layout)
        for part in layer.pages.split(TEMPLATE):
            part.copy_(template[: len(part)])
        layer.raw_pages.normal_()


def begin(engine: Any, context: int) -> None:
    """Begin a sequence as if its prompt had been computed."""
    from nanovllm import SamplingParams
    from nanovllm.engine.sequence import Sequence as Request
    from nanovllm.engine.sequence import SequenceStatus

    request = Request(torch.randint(2, 250, (context,)).tolist(), SamplingParams(max_tokens=2**30, ignore_eos=True))
    assert engine.scheduler.block_manager.can_allocate(request)
    engine.scheduler.block_manager.allocate(request)
    request.status = SequenceStatus.RUNNING
    request.append_token(2)
    engine.scheduler.running.append(request)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speed(engine: Any, cache: str, batch: int, context: int, tiny: bool) -> Row:
    """Return tokens per second of the engine's steps (median, least and most of `REPEATS`), and milliseconds of its model."""
    for _ in range(batch):
        begin(engine, context)
    runner, times, rates = engine.model_runner, [], []
    run_model = type(runner).run_model.__get__(runner)

    def timed_model(*arguments: Any) -> torch.Tensor:
        synchronize()
        start = time.perf_counter()
        result = run_model(*arguments)
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        return result

    for _ in range(WARM):
        engine.step()
    steps = 4 if tiny else TIMED
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        rates.append(batch * steps / (time.perf_counter() - start))
    runner.run_model = timed_model
    for _ in range(WARM):
        engine.step()
    del runner.run_model
    row = {"cache": cache, "batch": batch, "context": context, "tokens_per_s": statistics.median(rates)}
    row |= {"slowest": min(rates), "fastest": max(rates), "model_ms": statistics.median(times)}
    engine.reset()
    return row


def measure(options: argparse.Namespace, context: int) -> list[Row]:
    """Return the rows of one cache and context, of an engine of its own."""
    blocks_each = -(-(context + 2 * WARM + REPEATS * TIMED + 1) // BLOCK)
    engine = make_engine(options, blocks_each)
    fill(engine.model_runner, options.cache)
    largest = largest_batch(engine.model_runner, blocks_each)
    attention = engine.model_runner.model.model.layers[0].self_attn.attn
    facts = {"attention": type(attention).__module__, "blocks": engine.model_runner.config.num_kvcache_blocks}
    if torch.cuda.is_available():
        facts["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return [speed(engine, options.cache, batch, context, options.tiny) | facts for batch in sorted({1, largest}) if batch]


def in_process(argv: Sequence[str], cache: str, context: int) -> list[Row]:
    """Return the rows of one cache and context, or why there are none: each has a process, and so a GPU, of its own."""
    command = [sys.executable, __file__, *argv, "--one", "--cache", cache, "--context", str(context)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return [{"cache": cache, "context": context, "failed": f"exit code {done.returncode}"}]
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="nano.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--layers", type=int, help="layers of the model; 36 by default, 2 if it is tiny")
    add("--context", action="append", type=int, metavar="N", help="tokens of each sequence; may be repeated")
    add("--layout", action="append", metavar="NAME", help="layouts of ours; k4v2_g128 by default; may be repeated")
    add("--tiny", action="store_true", help="a tiny model on the CPU")
    add("--one", action="store_true", help=argparse.SUPPRESS)
    add("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.layers = options.layers or (2 if options.tiny else 36)
    if options.tiny:
        nano_cpu.install()
    if options.one:
        print(json.dumps(measure(options, options.context[-1])))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("nano.py: times need a GPU; --tiny runs a tiny model on the CPU")
    info = environment(argv)
    info["command"] = info["command"].replace("sweep.py", "nano.py")
    info |= {"nano-vllm-fork": importlib.metadata.version("nano-vllm-fork"), "layers": options.layers}
    print(title(info), f"nano-vllm-fork {info['nano-vllm-fork']}, {options.layers} layers", sep="\n", flush=True)
    rows: list[Row] = []
    caches = [*(options.layout or ["k4v2_g128"]), SIXTEEN]
    work = [(cache, context) for context in options.context or CONTEXTS for cache in caches]
    try:
        for i, (cache, context) in enumerate(work):
            say(f"{i + 1}/{len(work)}: {cache}, {context} tokens")
            for row in in_process(argv, cache, context):
                rows.append(row)
                texts = {name: f"{value:,.1f}" if isinstance(value, float) else str(value) for name, value in row.items()}
                print("  ".join(f"{name} {text}" for name, text in texts.items()), flush=True)
    except KeyboardInterrupt:
        say("interrupted: writing what is there")
    finally:
        if options.json:
            write_json(options.json, info, {"nano-vllm": rows}, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
