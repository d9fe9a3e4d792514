"""What the compiler makes of every kernel on every architecture: registers, spills, shared memory, loops. Nothing runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import DEFAULT_PRESETS, MAIN_PRESET, Clock, Options, Row, in_processes, num_workers, sweep

import kvarn_triton as kvarn
from kvarn_triton import PageLayout
from kvarn_triton.gpu import GPUS
from kvarn_triton.testing import cache_case, compiler

MAIN_TARGET = "sm90"
NUM_KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
MAIN_CALLS = {"sm90": ("decode, pages only", "prefill, drafts", "store_pages", "dequantize_pages")}
MAIN_CALLS["sm80"] = MAIN_CALLS["sm90"][:2]
"""What the default run compiles."""
Call = tuple[float, int | None, Callable[[], Any]]
"""Seconds that it takes, trips of the largest loop for one page if that loop walks pages, and what makes the launches."""


@sweep(
    "compile",
    needs="any",
    headers={
        "target": "target",
        "kernel": "kernel",
        "call": "call",
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

    By default all presets for one architecture and one preset for the others.
    """
    targets = options.targets or (MAIN_TARGET, *(target for target in compiler.TARGETS if target != MAIN_TARGET))
    if options.quick and not options.targets:
        targets = (MAIN_TARGET,)
    work = []
    for target in targets:
        everything = options.full or (target == MAIN_TARGET and not options.quick)
        presets = options.presets or (DEFAULT_PRESETS if everything else (MAIN_PRESET,))
        work += [(target, presets[0], name) for name in calls_without_preset()]
        work += [(target, preset, name) for preset in presets for name in calls_of(preset)]
    total = sum(cost_of(*task) for task in work)
    yield from compile_all(work, Clock(total / num_workers() + 5, total))


def cost_of(target: str, preset: str, name: str) -> float:
    """Return about how many seconds it takes to compile what a call launches."""
    return {**calls_of(preset), **calls_without_preset()}[name][0]


def compile_all(work: list[tuple[str, str, str]], clock: Clock) -> Iterator[Row]:
    """Compile (target, preset, name of a call), several at a time, and yield the rows of the kernels."""
    work = sorted(work, key=lambda task: -cost_of(*task))
    seen = set()
    for i, rows in in_processes(compile_call, work, interpret=False):
        clock.done("compile: " + ", ".join(work[i]), cost_of(*work[i]))
        for row in rows:
            key = (row["target"], row["kernel"], row.get("instructions"), row.get("registers"))
            if key not in seen or row["status"] != "ok":  # calls share kernels
                seen.add(key)
                yield row


def compile_call(target: str, preset: str, name: str) -> list[Row]:
    """Return a row for each kernel that a call launches."""
    _, trips, call = {**calls_of(preset), **calls_without_preset()}[name]
    fields: Row = {"target": target, "preset": preset, "call": name}
    try:
        with compiler.compile_for(target) as compiled:
            call()
        return [fields | _counts(kernel, trips) for kernel in compiled]
    except Exception as failure:  # a kernel that doesn't compile is a result
        detail = f"{type(failure).__name__}: {failure}".splitlines()[0][:100]
        return [{**fields, "kernel": name, "status": f"FAIL {detail}"}]


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


@functools.cache
def calls_of(preset: str) -> dict[str, Call]:
    """Return by name the calls whose kernels depend on the preset, on small tensors."""
    layout = PageLayout.from_name(preset, head_dim=HEAD_DIM)
    size, heads = layout.page_size, {"num_kv_heads": NUM_KV_HEADS, "group": GROUP}
    served = cache_case(layout, [128 + 3 * size], sink_len=128, **heads).kwargs
    plain = served | {"raw_pages": None, "raw_table": None, "num_quantized": None, "sink_len": 0}
    writing = {name: x for name, x in served.items() if name != "seq_lens"}
    lens, ids = served["seq_lens"], torch.arange(2)
    new = torch.randn(256, NUM_KV_HEADS, HEAD_DIM).half()

    def attend(cache: dict[str, Any]) -> object:
        return kvarn.decode_attention(torch.zeros(1, NUM_KV_HEADS * GROUP, HEAD_DIM).half(), **cache, split_size=2)

    def prefill(tokens: int, k: torch.Tensor | None = None, scratch: torch.Tensor | None = None) -> object:
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        q = torch.zeros(tokens, NUM_KV_HEADS * GROUP, HEAD_DIM).half()
        return kvarn.prefill_attention(q, cu_seqlens_q=ends, **served, k=k, v=k, scratch=scratch)

    pages = served["pages"]
    memory = torch.zeros(served["block_table"].numel(), 2, NUM_KV_HEADS, size, HEAD_DIM).half()
    return {
        "decode, pages only": (6.0, 1, lambda: attend(plain)),
        "decode, served": (7.0, None, lambda: attend(served)),
        "prefill, drafts": (8.0, None, lambda: prefill(4)),
        "prefill, chunk": (8.0, None, lambda: prefill(256, new)),
        "prefill, scratch": (6.0, None, lambda: prefill(256, new, memory)),
        "store_pages": (20.0, None, lambda: kvarn.store_pages(new, new, pages, ids, layout)),
        "commit_pages": (19.0, None, lambda: kvarn.commit_pages(**writing, committed_lens=lens)),
        "cut_back": (3.0, None, lambda: kvarn.cut_back(**writing, new_lens=lens)),
        "dequantize_pages": (2.0, None, lambda: kvarn.dequantize_pages(pages, ids, layout)),
    }


@functools.cache
def calls_without_preset() -> dict[str, Call]:
    """Return by name the calls of kernels that are the same for every preset, or that only tests and research make."""
    from twin import CONFIGS, twin_attention

    tiles, codes = torch.randn(2, 128, 128), torch.zeros(2, 128, 128, dtype=torch.uint8)
    scale, packed = torch.ones(2, 128), torch.zeros(2, 128 * 64, dtype=torch.uint8)
    out, lse = torch.randn(4, 128).half(), torch.zeros(4)
    new, raw = torch.randn(4, NUM_KV_HEADS, HEAD_DIM).half(), torch.zeros(2, 2, NUM_KV_HEADS, 128, HEAD_DIM).half()
    slots, config = torch.zeros(4, dtype=torch.int64), CONFIGS[1]
    plain, table = torch.zeros(4, 2, NUM_KV_HEADS, 128, HEAD_DIM).half(), torch.zeros(1, 4, dtype=torch.int32)
    q, lens = torch.zeros(1, NUM_KV_HEADS * GROUP, HEAD_DIM).half(), torch.zeros(1, dtype=torch.int32)
    return {
        "hadamard": (1.0, None, lambda: kvarn.hadamard(new)),
        "append_tokens": (1.5, None, lambda: kvarn.append_tokens(new, new, raw, slots)),
        "merge_states": (1.0, None, lambda: kvarn.merge_states(out, lse, out, lse)),
        "variance_normalize": (3.5, None, lambda: kvarn.variance_normalize(tiles, per="channel")),
        "quantize": (3.0, None, lambda: kvarn.quantize(tiles, 4, per="channel")),
        "dequantize": (1.0, None, lambda: kvarn.dequantize(codes, scale, scale, per="channel")),
        "pack": (2.0, None, lambda: kvarn.pack(codes, 4, per="channel")),
        "unpack": (1.0, None, lambda: kvarn.unpack(packed, 4, 128, 128, per="channel")),
        "16-bit twin": (
            1.0,
            128 // config.block_t,
            lambda: twin_attention(q, plain, table, lens, torch.empty_like(q), config=config),
        ),
    }
