"""Measure the cache for Hugging Face transformers beside its own caches: a Llama of 8B with random weights.

python perf/hf.py --json hf.json                          decode speed, memory, and the largest batch that fits
python perf/hf.py --layers 4 --point 8x32K --no-capacity   minutes: speed and memory of one point, with fewer layers
python perf/hf.py --tiny                                  the same on a CPU with a tiny model: whether it runs

Caches are filled with random keys and values, in chunks: what is timed and what takes memory does not depend on them. Then
`generate` runs: once to warm up and compile, then it is timed. With `--prompt` a real prompt is computed and timed, too.
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout's package, installed or not

import torch
import transformers
from common import Row, environment, say, title
from report import write_json
from sweep import parse_point

from kvarn_triton.integrations.transformers import KVarNCache, register_attention

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0,
}  # fmt: skip
TINY = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256}
POINTS = ((1, 8192), (16, 8192), (1, 32768), (4, 32768), (1, 131072))
CONTEXTS = (8192, 32768, 131072)
WARM, TIMED, REPEATS, CHUNK = 8, 64, 3, 2048
KEY = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
"""What `generate` calls a cache in this version of transformers."""
MOST_ROWS = 4096


@dataclass(frozen=True)
class Kind:
    """A kind of cache.

    Args:
        name: in tables.
        make: takes the configuration and the most positions of a row.
        attention: attention implementation that goes with it.
    """

    name: str
    make: Callable[[Any, int], Any]
    attention: str


def kvarn(config: Any, length: int, layout: str, static: bool) -> KVarNCache:
    """Return our cache."""
    return KVarNCache(config, layout, max_len=length if static else None)


def quantized(config: Any, length: int, backend: str, nbits: int) -> Any:
    """Return a quantized cache of transformers; ImportError if this version or machine has no such backend."""
    options = {} if backend == "fp8" else {"nbits": nbits}
    try:
        return transformers.QuantizedCache(backend=backend, config=config, **options)
    except ValueError as error:
        raise ImportError(str(error)) from error


def kinds(layouts: Sequence[str]) -> list[Kind]:
    """Return the caches that are compared."""
    ours = []
    for layout in layouts:
        ours.append(Kind(f"KVarNCache {layout}", functools.partial(kvarn, layout=layout, static=False), "kvarn"))
        ours.append(Kind(f"KVarNCache {layout}, max_len", functools.partial(kvarn, layout=layout, static=True), "kvarn"))
    return [
        *ours,
        Kind("DynamicCache", lambda config, length: transformers.DynamicCache(config=config), "sdpa"),
        Kind("StaticCache", lambda config, length: transformers.StaticCache(config=config, max_cache_len=length), "sdpa"),
        Kind("QuantizedCache fp8", functools.partial(quantized, backend="fp8", nbits=8), "sdpa"),
        Kind("QuantizedCache quanto 4 bits", functools.partial(quantized, backend="quanto", nbits=4), "sdpa"),
        Kind("QuantizedCache hqq 4 bits", functools.partial(quantized, backend="hqq", nbits=4), "sdpa"),
    ]


def make_model(layers: int, tiny: bool) -> Any:
    """Return a model with random weights, bfloat16 on a GPU."""
    sizes = TINY if tiny else LLAMA_8B
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=layers, max_position_embeddings=2**20, pad_token_id=0, bos_token_id=1, eos_token_id=None
    )
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32 if tiny else torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def fill(cache: Any, model: Any, batch: int, length: int) -> None:
    """Fill a cache with random tokens, a chunk at a time."""
    config = model.config
    heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for first in range(0, length, CHUNK):
        count = min(CHUNK, length - first)
        k = torch.randn(batch, heads, count, head_dim, device=model.device, dtype=model.dtype)
        for i, layer in enumerate(cache.layers):
            if isinstance(cache, KVarNCache):
                layer.fill(k, k)
            else:
                cache.update(k, k, i)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(reset: bool = False) -> int:
    """Return the most bytes that were allocated since the last reset."""
    if not torch.cuda.is_available():
        return 0
    most = torch.cuda.max_memory_allocated()
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return most


def clean() -> None:
    """Free what nobody holds."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bytes_of(cache: Any) -> int:
    """Return the bytes of a cache, of the tensors that its layers hold."""
    if isinstance(cache, KVarNCache):
        return cache.nbytes
    found: list[Any] = [value for layer in cache.layers for value in vars(layer).values()]
    found += [each for value in found if isinstance(value, tuple) for each in value]
    return sum(value.nbytes for value in found if isinstance(value, torch.Tensor))


@torch.inference_mode()
def speed(model: Any, kind: Kind, batch: int, context: int, prompt: bool) -> Row:
    """Return tokens per second of `generate` behind a context (median, least and most of `REPEATS`), and memory."""
    clean()
    peak(reset=True)
    model.set_attn_implementation(kind.attention)
    cache = kind.make(model.config, context + WARM + REPEATS * TIMED + 8)
    ids = torch.randint(2, model.config.vocab_size, (batch, context + 1), device=model.device)
    row: Row = {"cache": kind.name, "batch": batch, "context": context}
    synchronize()
    start = time.perf_counter()
    if prompt:
        options = {"max_new_tokens": 1, "do_sample": False, "prefill_chunk_size": CHUNK, "disable_compile": True}
        model.generate(ids[:, :context], **{KEY: cache}, **options)
        synchronize()
        row["prompt_s"] = time.perf_counter() - start
    else:
        fill(cache, model, batch, context)
    options = {"do_sample": False}
    start = time.perf_counter()
    ids = model.generate(ids, max_new_tokens=WARM, **{KEY: cache}, **options)
    synchronize()
    row["warm_s"] = time.perf_counter() - start
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        ids = model.generate(ids, max_new_tokens=TIMED, **{KEY: cache}, **options)
        synchronize()
        rates.append(batch * TIMED / (time.perf_counter() - start))
    row |= {"tokens_per_s": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}
    row |= {"cache_mb": bytes_of(cache) / 1e6, "peak_mb": peak() / 1e6}
    return row


@torch.inference_mode()
def fits(model: Any, kind: Kind, batch: int, context: int) -> bool:
    """Return whether a batch fits: its cache, and some decode steps that are not compiled."""
    clean()
    try:
        cache = kind.make(model.config, context + WARM)
        fill(cache, model, batch, context)
        ids = torch.full((batch, context + 1), 2, device=model.device)
        model.generate(ids, **{KEY: cache}, max_new_tokens=WARM - 1, do_sample=False, disable_compile=True)
        synchronize()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def capacity(model: Any, kind: Kind, context: int) -> Row:
    """Return the largest batch that fits, within 3 %; 0 if none does."""
    model.set_attn_implementation(kind.attention)
    most = MOST_ROWS if torch.cuda.is_available() else 2
    low, high = 0, 1
    while high <= most and fits(model, kind, high, context):
        low, high = high, 2 * high
    while high - low > max(low // 32, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(model, kind, middle, context) else (low, middle)
    return {"cache": kind.name, "context": context, "largest_batch": low}


def measured(work: list[tuple[str, Callable[[], Row]]]) -> Iterator[Row]:
    """Yield rows of work, or why there is none; say before each what is next."""
    start = time.perf_counter()
    for i, (label, run) in enumerate(work):
        say(f"{i + 1}/{len(work)}: {label} ({time.perf_counter() - start:.0f} s)")
        try:
            row = run()
        except (ImportError, torch.cuda.OutOfMemoryError) as error:
            row = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        row = {"what": label} | row
        print(
            "  ".join(f"{name} {value:,.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items())
        )
        sys.stdout.flush()
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--layers", type=int, default=32, help="layers of the model; 32 by default")
    add("--point", action="append", type=parse_point, metavar="BxN", help="batch and context of a speed; may be repeated")
    add("--context", action="append", type=int, metavar="N", help="context of a largest batch; may be repeated")
    add("--cache", action="append", metavar="WORD", help="only caches whose name has this word; may be repeated")
    add("--preset", action="append", metavar="NAME", help="layouts of ours; k4v2_g128 by default")
    add("--no-capacity", action="store_true", help="without the largest batches")
    add("--no-speed", action="store_true", help="without speeds")
    add("--prompt", action="store_true", help="compute a prompt instead of filling caches, and time it")
    add("--tiny", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("hf.py: times need a GPU; --tiny runs a tiny model on the CPU")
    info = environment(argv)
    info["command"] = info["command"].replace("sweep.py", "hf.py")
    info |= {"transformers": transformers.__version__, "layers": options.layers}
    print(title(info), f"transformers {transformers.__version__}, {options.layers} layers", sep="\n", flush=True)
    register_attention()
    model = make_model(options.layers, options.tiny)
    chosen = [
        kind
        for kind in kinds(options.preset or ["k4v2_g128"])
        if not options.cache or any(word.lower() in kind.name.lower() for word in options.cache)
    ]
    work: list[tuple[str, Callable[[], Row]]] = []
    for batch, context in [] if options.no_speed else options.point or POINTS:
        for kind in chosen:
            call = functools.partial(speed, model, kind, batch, context, options.prompt)
            work.append((f"speed {batch} x {context}, {kind.name}", call))
    for context in [] if options.no_capacity else options.context or CONTEXTS:
        for kind in chosen:
            work.append((f"largest batch at {context}, {kind.name}", functools.partial(capacity, model, kind, context)))
    rows: list[Row] = []
    try:
        for row in measured(work):
            rows.append(row)
    except KeyboardInterrupt:
        say("interrupted: writing what is there")
    finally:
        if options.json:
            write_json(options.json, info, {"transformers": rows}, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
