"""Other kernels beside ours in one run: FlashInfer, FA3 (the library in vLLM's wheel), vLLM's Triton kernel, PyTorch's SDPA.

Whatever is importable is timed; of the rest the sweep says why not. Each peer reads a 16-bit cache in an arrangement that suits
it, runs in every variant that it offers, and is timed in the fastest one. Its output is compared with float64 before that.
What a server does once per step for all layers (`plan()`, the scheduler's metadata, `schedule_decode`) is outside of the time;
"alone" is our call without a schedule.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import SHAPES, Shape, cache_bytes
from common import MAIN_PRESET, Options, Row, progress, say, sweep
from prefill_sweeps import prefill_calls
from sixteen_bit import MAX_ERROR, SixteenBit, fastest
from timed import PAGES_ONLY, SERVED, check_timed_case, decode_calls, decode_sets, failed, free_memory, num_samples
from timing import Call, measure
from torch.nn.attention import SDPBackend

from kvarn_triton import PageLayout

Variants = dict[str, tuple[list[Call], torch.Tensor]]
"""By name: calls that return their output, and the keys and values [2, heads, context, head_dim] of the last sequence."""
PAGE_SIZES = (16, 128)
POINTS = ((1, 1024, 1), (1, 4096, 1), (1, 32768, 1), (8, 32768, 1), (128, 4096, 1), (8, 32768, 4), (1, 34816, 2048))
"""Sequences, tokens of each in the end, and query tokens of each: decode, drafts to verify, a chunk of a prompt."""
CHUNK = 64
"""Query tokens from which on the point is a chunk of a prompt, whose keys and values are new."""
MAX_ERROR_FP8 = 2**-4
"""Of an 8-bit cache, against float64 attention to what it holds: weights have 3 bits after the leading one."""
DRAFTS = 8
"""Query tokens of a sequence up to which vLLM has memory for splits of it."""


class MissingError(Exception):
    """A peer that can't be had here; the message says why."""


@dataclass(frozen=True)
class Peer:
    """One library: `find` returns what `variants` needs, or raises `MissingError`.

    `bits`: of the queries and the cache that it is given. `most`: the error that its output may have.
    """

    name: str
    find: Callable[[], Any]
    variants: Callable[[Any, Any], Variants]
    bits: int = 16
    most: float = MAX_ERROR


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # libraries that don't fit the machine raise anything
        raise MissingError(f"{name} can't be imported ({type(error).__name__}: {str(error).splitlines()[0][:80]})") from error


def find_flashinfer() -> Any:
    """Return the module."""
    return _imported("flashinfer")


def flashinfer_variants(flashinfer: Any, case: SixteenBit) -> Variants:
    """Return decode on plain and on tensor cores, or prefill of both of its generations."""
    found: Variants = {}
    shape, device = case.shape, case.q[0].device
    for page_size in PAGE_SIZES:
        pools, table = case.pool(page_size)
        pages = -(-case.context // page_size)
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * pages
        last = torch.full((case.batch,), (case.context - 1) % page_size + 1, dtype=torch.int32, device=device)
        tables = indptr, table[:, :pages].flatten(), last
        sizes = shape.num_q_heads, shape.num_kv_heads, shape.head_dim, page_size
        dtypes = {"q_data_type": torch.float16, "kv_data_type": torch.float16}
        for kind in (False, True) if case.tokens == 1 else ("fa2", "fa3"):
            memory = torch.empty(256 << 20, dtype=torch.uint8, device=device)
            try:
                if case.tokens == 1:
                    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(memory, "HND", use_tensor_cores=kind)
                    wrapper.plan(*tables, *sizes, **dtypes)
                else:
                    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(memory, "HND", backend=kind)
                    wrapper.plan(case.ends, *tables, *sizes, causal=True, **dtypes)
            except Exception as error:  # a variant that the GPU or the heads don't allow
                say(f"peers: FlashInfer, {kind}, pages of {page_size}: {str(error).splitlines()[0][:120]}")
                continue
            calls = [lambda q=q, pool=pool, run=wrapper.run: run(q, pool) for q, pool in zip(case.q, pools, strict=True)]
            name = f"{'tensor cores' if kind is True else 'plain' if kind is False else kind}, pages of {page_size}"
            found[name] = calls, case.last_in_pool(page_size)
    return found


def library_of_vllm(name: str) -> Any:
    """Load a library for sm90 of an installed vLLM without importing vLLM; return its operators."""
    spec = importlib.util.find_spec("vllm")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in Path(folder).rglob(f"{name}*.so")]
    if not files:
        raise MissingError(f"no {name}*.so in an installed vllm" if spec else "vllm is not installed")
    if torch.cuda.get_device_capability()[0] != 9:
        raise MissingError("it needs sm90")
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0][-80:]
        raise MissingError(f"{files[0].name} can't be loaded ({reason})") from error
    return getattr(torch.ops, name)


def find_fa3() -> Any:
    """Return the operators of FA3."""
    return library_of_vllm("_vllm_fa3_C")


def fa3_arguments(schema: Any, given: Row) -> list[Any]:
    """Return the arguments of an operator in order: those given by name, else the default, else None, 0 or False.

    The operator has grown arguments at its end: for caches that are spread over several GPUs, of which there is one here.
    """
    result = []
    for argument in schema.arguments:
        if argument.name in given:
            result.append(given[argument.name])
        elif argument.has_default_value():
            result.append(argument.default_value)
        else:
            result.append({"int": 1 if argument.name.endswith("world_size") else 0, "bool": False}.get(str(argument.type)))
    return result


def fa3_variants(operators: Any, case: SixteenBit) -> Variants:
    """Return calls with the library's own number of splits and with 32, each with the scheduler's metadata made ahead."""
    found: Variants = {}
    shape, dtype = case.shape, case.q[0].dtype
    out = case.out if dtype == case.out.dtype else None  # of 8 bits the library makes its own, in bfloat16
    for page_size in PAGE_SIZES:
        pools, table = case.pool(page_size, heads_first=False)
        for num_splits in (0, 32):
            metadata = operators.get_scheduler_metadata(
                case.batch, case.tokens, case.context, shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim,
                dtype, case.seq_lens, case.ends, None, None, None, None, page_size, 0, True, -1, -1, False, num_splits,
                None, 0,
            )  # fmt: skip
            given = {
                "out": out, "cu_seqlens_q": case.ends, "seqused_k": case.seq_lens, "max_seqlen_q": case.tokens,
                "max_seqlen_k": case.context, "page_table": table, "softmax_scale": shape.head_dim**-0.5, "is_causal": True,
                "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True,
                "scheduler_metadata": metadata, "num_splits": num_splits,
            }  # fmt: skip
            every = [
                fa3_arguments(operators.fwd.default._schema, given | {"q": q, "k": pool[:, 0], "v": pool[:, 1]})
                for q, pool in zip(case.q, pools, strict=True)
            ]
            calls = [lambda arguments=arguments: operators.fwd(*arguments)[0] for arguments in every]
            found[f"{num_splits or 'own'} splits, pages of {page_size}"] = calls, case.last_in_pool(page_size, False)
    return found


def find_vllm_triton() -> Any:
    """Return `unified_attention`."""
    for name in ("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention"):
        try:
            return _imported(name).unified_attention
        except MissingError as error:
            missing = error
    raise missing


def vllm_triton_variants(attention: Any, case: SixteenBit) -> Variants:
    """Return calls with the memory that lets it split sequences, which vLLM gives it where there are few of them."""
    shape, device, found = case.shape, case.q[0].device, {}
    segments, rows = 16, max(128 // shape.num_kv_heads, 1)
    sums = torch.empty(rows * min(case.tokens, DRAFTS), shape.num_q_heads, segments, shape.head_dim, device=device)
    split = {
        "seq_threshold_3D": rows, "num_par_softmax_segments": segments, "softmax_segm_output": sums,
        "softmax_segm_max": sums.new_empty(sums.shape[:3]), "softmax_segm_expsum": sums.new_empty(sums.shape[:3]),
    }  # fmt: skip
    known = inspect.signature(attention).parameters
    for page_size in PAGE_SIZES:
        pools, table = case.pool(page_size, heads_first=False)
        given = {
            "out": case.out, "cu_seqlens_q": case.ends, "max_seqlen_q": case.tokens, "seqused_k": case.seq_lens,
            "max_seqlen_k": case.context, "softmax_scale": shape.head_dim**-0.5, "causal": True, "window_size": (-1, -1),
            "block_table": table, "softcap": 0.0, "q_descale": None, "k_descale": None, "v_descale": None,
        }  # fmt: skip
        given |= {name: value for name, value in split.items() if name in known}

        def call(q: torch.Tensor, pool: torch.Tensor, given: Row = given) -> torch.Tensor:
            attention(q=q, k=pool[:, 0], v=pool[:, 1], **given)
            return case.out

        calls = [lambda q=q, pool=pool, call=call: call(q, pool) for q, pool in zip(case.q, pools, strict=True)]
        found[f"pages of {page_size}"] = calls, case.last_in_pool(page_size, False)
    return found


def sdpa_variants(backends: dict[str, SDPBackend | None], case: SixteenBit) -> Variants:
    """Return PyTorch's attention on caches without pages."""
    return {name: (case.sdpa_calls(backend), case.dense()[0, :, -1]) for name, backend in backends.items()}


PEERS = (
    Peer("FlashInfer", find_flashinfer, flashinfer_variants),
    Peer("FA3", find_fa3, fa3_variants),
    Peer("FA3 fp8", find_fa3, fa3_variants, 8, MAX_ERROR_FP8),
    Peer("vLLM Triton", find_vllm_triton, vllm_triton_variants),
    Peer("SDPA", lambda: {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}, sdpa_variants),
)


def find_all(peers: Sequence[Peer] = PEERS) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what was found of each peer by name, and why each of the others wasn't."""
    found, missing = {}, {}
    for peer in peers:
        try:
            found[peer.name] = peer.find()
        except MissingError as error:
            missing[peer.name] = str(error)
    return found, missing


def checked(variants: Variants, case: Any, most: float = MAX_ERROR) -> tuple[dict[str, list[Call]], str]:
    """Return the variants whose output is right (`case.error` is at most `most`), and what is wrong with the others."""
    right, wrong = {}, []
    for name, (calls, kv) in variants.items():
        try:
            error = case.error(calls[0](), kv)
        except Exception as failure:  # one variant that can't run leaves the others
            wrong.append(f"{name}: {type(failure).__name__}: {failure}".splitlines()[0][:120])
            continue
        if error <= most:
            right[name] = calls
        else:
            wrong.append(f"{name}: error {error:.1e}")
    return right, "; ".join(wrong)


def _ours(shape: Shape, batch: int, context: int, tokens: int, seed: int) -> tuple[dict[str, list[Call]], Row]:
    """Return our calls at a point by name, checked; and what was wrong."""
    layout, found, row = PageLayout.from_name(MAIN_PRESET, head_dim=shape.head_dim), {}, {}
    if tokens == 1:
        for cache in (PAGES_ONLY, SERVED):
            cases = decode_sets(shape, layout, batch, context, cache, seed)
            row |= check_timed_case(cases[0])
            row[f"bytes {cache}"] = cache_bytes(cases[0])
            found[f"k4v2 {cache}"] = decode_calls(cases, scheduled=True)
            found[f"k4v2 {cache}, alone"] = decode_calls(cases)
        return found, row
    new = tokens >= CHUNK
    cases = decode_sets(shape, layout, batch, context - tokens if new else context, PAGES_ONLY, seed)
    for what in ("chunk, tiles", "chunk, scratch") if new else ("verify",):
        calls, error = prefill_calls(cases, tokens, new, shape, seed, what)
        row["error"] = error
        if not error <= MAX_ERROR:
            row |= failed(f"error {error:.1e}")
        found["k4v2 scratch" if "scratch" in what else f"k4v2 {PAGES_ONLY}"] = calls
    return found, row


@sweep(
    "peers",
    needs="gpu",
    headers={
        "batch": "batch",
        "context": "context",
        "tokens": "query tokens",
        "us": "k4v2 us",
        "k4v2 served": "served us",
        "k4v2 pages only, alone": "pages, alone us",
        "k4v2 served, alone": "served, alone us",
        "k4v2 scratch": "with scratch us",
        **{peer.name: f"{peer.name} us" for peer in PEERS},
        "twin": "twin us",
    },
    note="one attention call, 32 / 8 heads, head_dim 128, float16, all providers in turn. k4v2: this package, everything\n"
    "quantized; served: a sink of 128 tokens and the last page at 16 bits. Others: a 16-bit cache (fp8: 8 bits, queries too),\n"
    "the best of their variants.",
)
def peers(options: Options) -> Iterator[Row]:
    """Time FlashInfer, FA3, vLLM's Triton kernel and SDPA beside ours, whichever of them can be imported."""
    found, missing = find_all()
    for name, reason in missing.items():
        say(f"peers: without {name}: {reason}")
    options.sections["peers_missing"] = missing
    shape = SHAPES[options.shapes[0] if options.shapes else "Llama-3.1-8B"]
    points = [(*point, 1) for point in options.points] or (POINTS[2:4] if options.quick else POINTS)
    for batch, context, tokens in progress("peers", points, str):
        free_memory()
        row: Row = {"shape": shape.name, "batch": batch, "context": context, "tokens": tokens}
        try:
            yield row | _point(found, shape, batch, context, tokens, options)
        except Exception as error:  # a point that can't run leaves the others
            yield row | failed(error)


def _point(found: dict[str, Any], shape: Shape, batch: int, context: int, tokens: int, options: Options) -> Row:
    ours, row = _ours(shape, batch, context, tokens, options.seed)
    if "fail" in row:
        return row
    case = SixteenBit(shape, batch, context, tokens, options.seed)
    providers = dict(ours)
    config, providers["twin"], row["error_twin"] = case.best_twin()
    row["variant twin"] = config
    eight = case.in_eight_bits()
    for peer in PEERS:
        if peer.name not in found:
            continue
        seen = case if peer.bits == 16 else eight
        right, row[f"note {peer.name}"] = checked(peer.variants(found[peer.name], seen), seen, peer.most)
        best, reason = fastest(right)  # type: ignore[arg-type]
        if best is None:
            row[f"note {peer.name}"] += f" {reason}"
            continue
        providers[peer.name], row[f"variant {peer.name}"] = right[str(best)], best
    timings, errors = measure(providers, samples=num_samples(options))
    row |= {name: timing.us for name, timing in timings.items()} | {f"note {name}": why for name, why in errors.items()}
    row |= {f"{name} p20-p80": f"{timing.us_p20:.4g}-{timing.us_p80:.4g}" for name, timing in timings.items()}
    return row | ({"us": row[f"k4v2 {PAGES_ONLY}"]} if f"k4v2 {PAGES_ONLY}" in row else failed("our kernel did not run"))
