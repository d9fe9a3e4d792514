"""The sweeps that need no GPU: bytes of every page format, errors of quantization, counts of the compiler, a small model."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from cases import DISTRIBUTIONS, SHAPES, build_cache, draw_tiles, relative_error
from common import DEFAULT_PRESETS, Options, Row, progress, say, sweep

import kvarn_triton as kvarn
from kvarn_triton import DEFAULT, PRESETS, PUBLISHED, Encoder, PageLayout, reference
from kvarn_triton.gpu import GPUS
from kvarn_triton.testing import compiler

HEAD_DIMS = (64, 128, 256)
MAIN_TARGET, MAIN_PRESET = "sm90", "k4v2_g128"


@sweep(
    "capacity",
    needs="any",
    headers={
        "preset": "preset",
        "head_dim": "head_dim",
        "page_bytes": "page bytes",
        "bytes_per_token": "B/token",
        "bytes_per_token_bf16": "bf16 B/token",
        "times_smaller": "x smaller",
        "bits_per_element": "bits/element",
    },
    note="bytes of keys and values per token and kv head, scales included, against bf16. Sinks and tails stay at 16 bits.",
)
def capacity(options: Options) -> Iterator[Row]:
    """Count the bytes of every preset."""
    for head_dim in HEAD_DIMS:
        for preset in options.presets or PRESETS:
            layout = PageLayout.from_name(preset, head_dim=head_dim)
            yield {
                "preset": preset,
                "head_dim": head_dim,
                "page_bytes": layout.page_bytes,
                "bytes_per_token": layout.bytes_per_token,
                "bytes_per_token_bf16": 4 * head_dim,
                "times_smaller": 4 * head_dim / layout.bytes_per_token,
                "bits_per_element": layout.bits_per_element,
            }


ENCODERS = {"unbalanced": dataclasses.replace(PUBLISHED, iterations=0), "published": PUBLISHED, "default": DEFAULT}
SHORT_NAMES = {"unbalanced": "plain", "published": "publ.", "default": "default"}
ERROR_PAGES, ERROR_HEADS, ERROR_QUERIES = 3, 4, 16
LOGIT_STD = 2.0
"""Queries are scaled so that the scores of one query spread this much: neither uniform weights nor a single one."""


def _error_table(rows: list[Row]) -> list[Row]:
    """Put the encoders of one distribution and preset side by side: keys / values / attention."""
    table: dict[tuple[str, str], Row] = {}
    for row in rows:
        line = table.setdefault((row["distribution"], row["preset"]), {k: row[k] for k in ("distribution", "preset")})
        for key, short in (("k_error", "K"), ("v_error", "V"), ("attention_error", "out")):
            line[f"{short} {SHORT_NAMES[row['encoder']]}"] = row[key]
    names = [f"{short} {name}" for short in ("K", "V", "out") for name in SHORT_NAMES.values()]
    return [{k: line[k] for k in ("distribution", "preset", *names)} for line in table.values()]


@sweep(
    "error",
    needs="any",
    headers={"distribution": "distribution", "preset": "preset"},
    note="relative error (Frobenius norm, rotated back) of keys K, values V and attention output of the reference on\n"
    "synthetic tiles. plain: not balanced; publ.: as published (arXiv 2606.03458); equiv.: this package's default encoder.",
    tabulate=_error_table,
)
def error(options: Options) -> Iterator[Row]:
    """Quantize synthetic tiles with every preset and encoder."""
    presets = options.presets or (DEFAULT_PRESETS if options.quick else PRESETS if options.full else PRESETS[:7])
    work = [(distribution, preset) for distribution in DISTRIBUTIONS for preset in presets]
    for distribution, preset in progress("error", work, " ".join):
        for name, encoder in ENCODERS.items():
            yield _quantization_error(distribution, preset, name, encoder, options.seed)


def _quantization_error(distribution: str, preset: str, name: str, encoder: Encoder, seed: int, head_dim: int = 128) -> Row:
    layout = PageLayout.from_name(preset, head_dim=head_dim)
    tokens = ERROR_PAGES * 128
    shape = (ERROR_HEADS, tokens, head_dim)
    k, v = (draw_tiles(distribution, shape, seed=seed + i).transpose(0, 1).contiguous() for i in range(2))
    num_pages = tokens // layout.page_size
    pages = torch.zeros(layout.pages_shape(num_pages, ERROR_HEADS), dtype=torch.uint8)
    ids = torch.arange(num_pages)
    reference.store_pages(k, v, pages, ids, layout, encoder=encoder)
    found = reference.dequantize_pages(pages, ids, layout, dtype=torch.float32)
    k_found, v_found = (x.flatten(0, 1) for x in found)
    generator = torch.Generator().manual_seed(seed + 2)
    q = torch.randn(ERROR_HEADS, ERROR_QUERIES, head_dim, generator=generator)
    spread = torch.einsum("hqd,thd->hqt", q, k).std(dim=-1, keepdim=True)
    q = q * (LOGIT_STD / spread)

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hqt,thd->hqd", torch.softmax(torch.einsum("hqd,thd->hqt", q, k), -1), v)

    return {
        "distribution": distribution,
        "preset": preset,
        "encoder": name,
        "head_dim": head_dim,
        "k_bits": layout.k_bits,
        "v_bits": layout.v_bits,
        "bits_per_element": layout.bits_per_element,
        "k_error": relative_error(k_found, k),
        "v_error": relative_error(v_found, v),
        "attention_error": relative_error(attend(k_found, v_found), attend(k, v)),
    }


@sweep(
    "compile",
    needs="compiler",
    headers={
        "target": "target",
        "kernel": "kernel",
        "preset": "preset",
        "registers": "registers",
        "stack": "stack B",
        "shared": "shared B",
        "num_warps": "warps",
        "instructions": "instructions",
        "largest_loop": "largest loop",
        "loop_per_page": "loop per page",
        "status": "status",
    },
    note="COUNTS of the compiler, not times; nothing ran. registers and stack (spills included) per thread, shared memory per\n"
    "program; instructions: the whole kernel's; largest loop: instructions of one trip of one warp; loop per page: warp\n"
    "instructions for one page of one kv head. NVIDIA only where there is a disassembler.",
)
def compile_kernels(options: Options) -> Iterator[Row]:
    """Compile every kernel for every architecture: what fits in registers, what spills, how long the loops are.

    By default all presets for one architecture and one preset for the others. Architectures compile in parallel.
    """
    targets = options.targets or (MAIN_TARGET, *(target for target in compiler.TARGETS if target != MAIN_TARGET))
    if options.quick and not options.targets:
        targets = (MAIN_TARGET,)
    tasks = []
    for target in targets:
        everything = options.full or (target == MAIN_TARGET and not options.quick)
        tasks.append((target, options.presets or (DEFAULT_PRESETS if everything else (MAIN_PRESET,))))
    workers = min(len(tasks), os.cpu_count() or 1)
    say(f"compile: {len(tasks)} architectures, {workers} at a time")
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_target, *task) for task in tasks]
        for future in progress("compile", futures, lambda future: tasks[futures.index(future)][0]):
            yield from future.result()


def compile_target(target: str, presets: tuple[str, ...]) -> list[Row]:
    """Return the rows of one architecture."""
    rows: list[Row] = []
    for name, preset, trips, call in kernel_calls(presets):
        fields: Row = {"target": target, "preset": preset}
        try:
            with compiler.compile_for(target) as compiled:
                call()
            counted = [fields | _counts(kernel, trips) for kernel in compiled]
        except Exception as failure:  # a kernel that doesn't compile is a result
            detail = f"{type(failure).__name__}: {failure}".splitlines()[0][:100]
            counted = [{**fields, "kernel": name, "status": f"FAIL {detail}"}]
        known = {(row["kernel"], row.get("instructions"), row.get("registers")) for row in rows if "merge" in row["kernel"]}
        rows += [row for row in counted if (row["kernel"], row.get("instructions"), row.get("registers")) not in known]
    return rows


def _counts(kernel: compiler.Compiled, trips: int | None) -> Row:
    """Return what the compiler made of a kernel; `trips` of its largest loop do the work of one page."""
    used = compiler.resources(kernel)
    loop = used.product_loop if "decode" in kernel.name else used.loops[0] if used.loops else None
    per_page = None
    if loop is not None and trips and "merge" not in kernel.name:
        per_page = loop.total() * trips * used.num_warps
    return {
        "kernel": kernel.name.removeprefix("_kvarn_").removeprefix("_").removesuffix("_kernel"),
        "registers": used.registers,
        "stack": used.stack,
        "shared": used.shared,
        "num_warps": used.num_warps,
        "instructions": used.instructions or None,
        "largest_loop": loop.total() if loop is not None else None,
        "loop_per_page": per_page,
        "opcodes": dict(loop) if loop is not None else None,
        "status": "ok" if used.shared <= GPUS[kernel.target].program_bytes else "FAIL: too much shared memory",
    }


KernelCall = tuple[str, str, int | None, Callable[[], Any]]
"""Name, preset, trips of the largest loop for one page if that loop walks pages, and the call."""


def kernel_calls(presets: tuple[str, ...]) -> Iterator[KernelCall]:
    """Yield calls that launch every kernel of the package on small tensors; kernels that ignore the preset come once."""
    shape = SHAPES["Llama-3.1-8B"]
    for i, preset in enumerate(presets):
        layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
        case = build_cache(shape, layout, [2 * layout.page_size] * 2, by_reference=True, distinct_pages=1)
        served = build_cache(
            shape, layout, [4 * layout.page_size], sink_len=128, tail_pages=1, by_reference=True, distinct_pages=1
        )
        ids, lens = torch.arange(2), torch.tensor([512], dtype=torch.int32)
        kv = torch.randn(2 * layout.page_size, 2, shape.num_kv_heads, shape.head_dim).half()
        k, v = kv[:, 0], kv[:, 1]

        def attend(case: Any) -> object:
            return kvarn.decode_attention(*case.arguments, **case.options, split_size=2)

        def commit(case: Any = served, lens: torch.Tensor = lens) -> None:
            tables = case.raw_table, case.block_table
            kvarn.commit_pages(case.raw_pages, case.pages, *tables, lens, case.num_quantized.clone(), case.layout, sink_len=128)

        yield "decode_attention", f"{preset} pages only", 1, lambda case=case: attend(case)
        yield "decode_attention", f"{preset} served", None, lambda case=served: attend(case)
        yield "store_pages", preset, None, lambda k=k, v=v, c=case, ids=ids: kvarn.store_pages(k, v, c.pages, ids, c.layout)
        yield "commit_pages", preset, None, commit
        yield "dequantize_pages", preset, None, lambda c=case, ids=ids: kvarn.dequantize_pages(c.pages, ids, c.layout)
        if i == 0:
            yield from _presetless_calls(k, v, served)


def _presetless_calls(k: torch.Tensor, v: torch.Tensor, case: Any) -> Iterator[KernelCall]:
    """Yield the calls of kernels that are the same for every preset, or that only tests and research call."""
    from twin import CONFIGS, twin_attention

    tiles = torch.randn(2, 128, 128)
    codes = torch.zeros(2, 128, 128, dtype=torch.uint8)
    scale = torch.ones(2, 128)
    out, lse = torch.randn(4, 128).half(), torch.zeros(4)
    slots = torch.zeros(len(k), dtype=torch.int64)
    yield "hadamard", "", None, lambda: kvarn.hadamard(k.contiguous())
    yield "append_tokens", "", None, lambda: kvarn.append_tokens(k, v, case.raw_pages, slots)
    yield "merge_states", "", None, lambda: kvarn.merge_states(out, lse, out, lse)
    yield "variance_normalize", "", None, lambda: kvarn.variance_normalize(tiles, per="channel")
    yield "quantize", "4 bits", None, lambda: kvarn.quantize(tiles, 4, per="channel")
    yield "dequantize", "4 bits", None, lambda: kvarn.dequantize(codes, scale, scale, per="channel")
    yield "pack", "4 bits", None, lambda: kvarn.pack(codes, 4, per="channel")
    packed = torch.zeros(2, 128 * 64, dtype=torch.uint8)
    yield "unpack", "4 bits", None, lambda: kvarn.unpack(packed, 4, 128, 128, per="channel")
    plain = torch.zeros(4, 2, case.pages.shape[1], 128, 128).half()
    config = CONFIGS[1]
    trips = 128 // config.block_t
    table = case.block_table[:, :4].contiguous()
    yield (
        "twin",
        "16-bit twin",
        trips,
        lambda: twin_attention(case.q, plain, table, case.seq_lens, torch.empty_like(case.q), config=config),
    )


MODEL_PRESETS = ("k8v8_g64", "k4v4_g64", "k4v2_g64", "k2v2_g64")


@sweep(
    "model",
    needs="any",
    headers={
        "preset": "preset",
        "encoder": "encoder",
        "bytes_per_token": "B/token",
        "mean_kl": "mean KL",
        "top1_agreement": "agreement",
        "first_divergence": "first divergence",
        "diverged": "diverged",
        "near_ties": "near ties",
        "sequences": "of",
    },
    note="a small trained byte-level language model with the quantized cache against the 16-bit cache, fed the same tokens.\n"
    "KL in nats; agreement: same most likely byte; first divergence: median number of greedy bytes before one differs,\n"
    "where one does; near ties: divergences where the 16-bit model itself hardly preferred its byte.",
)
def model(options: Options) -> Iterator[Row]:
    """Generate with the 16-bit cache and with quantized ones; trains the model at the first call."""
    import lm
    import lm_text
    from lm_compare import compare

    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = not options.quick and (device == "cuda" or options.full)
    config = lm.CONFIGS["default" if large else "tiny"]
    say("model: loading it, or training it now, once, for a minute or more")
    network = lm.load_or_train(config, options.seed, device=device)
    count, num_tokens = (2, 32) if options.quick else (8, 96) if large else (4, 64)
    lengths = [config.seq_len - num_tokens - 8 * (i + 1) for i in range(count)]
    prompts, _ = lm_text.heldout_prompts(lengths, num_tokens, seed=options.seed)
    layouts = [PageLayout.from_name(name, head_dim=config.head_dim) for name in options.presets or MODEL_PRESETS]
    for name, encoder in (("published", PUBLISHED), ("default", DEFAULT)):
        say(f"model: {name} encoder")
        for row in compare(network, prompts, layouts, num_tokens, encoder=encoder, seed=options.seed):
            steps = [step for step in row["same_tokens"] if step is not None]
            median = statistics.median(steps) if steps else None
            row |= {"preset": row["layout"], "encoder": name, "first_divergence": median, "sequences": count}
            row |= {"config": "default" if large else "tiny", "device": device}
            yield row | {"num_tokens": num_tokens, "prompt_lengths": lengths}
