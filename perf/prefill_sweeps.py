"""Several query tokens per sequence: verifying drafts beside decoding one token, chunks beside the same on 16-bit pages, and
new tokens with masks beside causal ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from cases import SHAPES, DecodeCase, Shape, attention_errors, build_cache
from common import MAIN_PRESET, Options, Row, progress, sweep
from gate import selected_shapes
from sixteen_bit import MAX_ERROR, SixteenBit, fastest
from timed import (
    DISTINCT_PAGES,
    PAGES_ONLY,
    RED,
    SINK_LEN,
    decode_calls,
    decode_sets,
    failed,
    free_memory,
    is_red,
    num_samples,
    spread_fields,
)
from timing import Call, measure
from torch.nn.attention import SDPBackend

import kvarn_triton as kvarn
from kvarn_triton import PageLayout, configs

VERIFY = ((8, 32768, 4), (8, 32768, 8), (1, 32768, 4), (1, 32768, 8))
CHUNKS = ((1, 131072, 2048), (1, 32768, 2048), (1, 8192, 2048), (8, 4096, 512), (1, 1024, 2048), (1, 0, 4096))
"""Sequences, cached tokens, and query tokens of each sequence."""
MASKED = ((8, 32768, 4), (8, 32768, 8), (8, 32768, 16), (8, 32768, 64), (1, 32768, 64), (1, 8192, 2048))
"""The same, of new tokens with masks; the last one is a chunk with images."""
IMAGE_TOKENS = 256
Point = tuple[str, str, int, int, int]
"""Preset, what ("verify", or "chunk" with "served", "scratch", or "tiles"), sequences, cached tokens, query tokens of each."""


@sweep(
    "prefill",
    needs="gpu",
    headers={
        "shape": "shape",
        "preset": "preset",
        "what": "what",
        "batch": "batch",
        "context": "cached",
        "tokens": "tokens each",
        "us": "us",
        "spread": "p20-p80",
        "tflops": "TFLOP/s",
        "us_16bit": "16-bit us",
        "percent_of_16bit": "% of 16-bit speed",
        "us_fa3": "FA3 us",
        "us_cudnn": "cuDNN us",
        "us_decode": "decode us",
        "times_decode": "x decode",
    },
    note="one prefill_attention call, pages only. verify: the query tokens are in the cache; decode us: one token per\n"
    "sequence of the same cache. chunk: the query tokens' keys and values are given. It takes scratch memory by itself,\n"
    "at most 256 MiB; scratch: it is given such memory, of any size; tiles: it has none, and every tile of query rows\n"
    "dequantizes the pages; served: a sink of 128 tokens and one page of the tail are in 16 bits. 16-bit: the tuned twin,\n"
    "all tokens in 16-bit pages. FA3: of an installed vLLM, likewise. cuDNN: PyTorch's attention, 16 bits, dense and, but\n"
    "for a first chunk, without a mask, so that it computes a little more.",
)
def prefill(options: Options) -> Iterator[Row]:
    """Time `prefill_attention` for the first shape."""
    shape = selected_shapes(options)[0]
    kinds = "chunk", "chunk, served", "chunk, scratch", "chunk, tiles"
    groups = (("verify", VERIFY), *((kind, CHUNKS) for kind in kinds))
    points = [
        (preset, what, *point) for preset in options.presets or (MAIN_PRESET,) for what, group in groups for point in group
    ]
    for point in progress("prefill", points, str):
        yield prefill_point(options, shape.name, point)


def prefill_point(options: Options, shape_name: str, point: Point) -> Row:
    """Return the row of one point."""
    preset, what, batch, context, tokens = point
    shape, row = SHAPES[shape_name], {"shape": shape_name, "preset": preset, "what": what, "batch": batch}
    row |= {"context": context, "tokens": tokens, "head_dim": shape.head_dim, "dtype": "float16"}
    free_memory()
    if is_red(options, ("prefill_attention", "store_pages"), preset, shape):
        return row | failed(RED)
    layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
    try:
        if what == "verify":
            return row | _verify(shape, layout, batch, context, tokens, options)
        return row | _chunk(shape, layout, batch, context, tokens, what, options)
    except Exception as error:  # one case that can't run leaves the others their times
        return row | failed(error)


def prefill_calls(
    cases: Sequence[DecodeCase],
    tokens: int,
    new: bool,
    shape: Shape,
    seed: int,
    what: str = "verify",
    masks: dict[str, torch.Tensor] | None = None,
) -> tuple[list[Call], float]:
    """Return a call for each case, without allocations, and the first one's error at the last sequence's last token."""
    generator = torch.Generator("cuda").manual_seed(seed)
    device, layout, heads = cases[0].pages.device, cases[0].layout, shape.num_kv_heads
    batch, total = len(cases[0].seq_lens), len(cases[0].seq_lens) * tokens

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(total, heads, shape.head_dim, generator=generator, device=device).half()

    ends = torch.arange(0, total + 1, tokens, dtype=torch.int32, device=device)
    every = []
    for case in cases:
        columns = case.block_table.shape[1]
        size = kvarn.prefill_workspace_size(
            total, batch, shape.num_q_heads, heads, layout, columns, device, scratch="scratch" in what
        )  # fmt: skip
        arguments = case.call | {"q": draw(shape.num_q_heads), "cu_seqlens_q": ends}
        if new:
            arguments |= {"k": draw(heads), "v": draw(heads), "seq_lens": case.seq_lens + tokens}
        arguments |= {"out": torch.empty_like(arguments["q"]), **(masks or {})}
        arguments |= {"workspace": torch.empty(size, dtype=torch.uint8, device=device)}
        if "tiles" in what:
            group = shape.num_q_heads // heads
            arguments["config"] = configs.prefill_config(layout, torch.float16, device, total, batch, group, None)
        if "scratch" in what:
            slots = (case.block_table.numel(), 2, heads, layout.page_size, shape.head_dim)
            arguments["scratch"] = torch.full(slots, torch.nan, dtype=torch.float16, device=device)
        every.append(arguments)
    kvarn.prefill_attention(**every[0])
    error, _ = attention_errors(every[0], every[0]["out"], batch - 1, last=1)
    return [lambda arguments=arguments: kvarn.prefill_attention(**arguments) for arguments in every], error  # type: ignore[misc]


def _verify(shape: Shape, layout: PageLayout, batch: int, context: int, tokens: int, options: Options) -> Row:
    cases = decode_sets(shape, layout, batch, context, PAGES_ONLY, options.seed)
    calls, error = prefill_calls(cases, tokens, False, shape, options.seed)
    if not error <= MAX_ERROR:
        return failed(f"error {error:.1e}", error=error)
    timings, errors = measure({"kvarn": calls, "decode": decode_calls(cases)}, samples=num_samples(options))
    if errors:
        return failed("; ".join(errors.values()), error=error)
    ours, decode = timings["kvarn"], timings["decode"]
    return spread_fields(ours) | {"error": error, "us_decode": decode.us, "times_decode": ours.us / decode.us}


def _chunk(shape: Shape, layout: PageLayout, batch: int, context: int, tokens: int, what: str, options: Options) -> Row:
    served = {"sink_len": SINK_LEN, "tail_pages": 1} if "served" in what else {}
    case = build_cache(shape, layout, [context] * batch, distinct_pages=DISTINCT_PAGES, seed=options.seed, **served)
    calls, error = prefill_calls([case], tokens, True, shape, options.seed, what)
    if not error <= MAX_ERROR:
        return failed(f"error {error:.1e}", error=error)
    sixteen_bit = SixteenBit(shape, batch, context + tokens, tokens, options.seed, sets=1)
    config, twin, twin_error = sixteen_bit.best_twin()
    others, why = {"cudnn": sixteen_bit.sdpa_calls(SDPBackend.CUDNN_ATTENTION, masked=False)}, {}
    others["fa3"], why["fa3"] = _fa3_calls(sixteen_bit)
    providers = {"kvarn": calls, "16bit": twin} | {name: calls for name, calls in others.items() if calls}
    timings, errors = measure(providers, samples=9)
    not_there = {name: errors.pop(name, why.get(name)) for name in others if name not in timings}
    if errors:
        return failed("; ".join(errors.values()), error=error)
    ours, sixteen = timings["kvarn"], timings["16bit"]
    row = spread_fields(ours) | {"error": error, "config_16bit": config, "error_16bit": twin_error}
    pairs = batch * tokens * (context + (tokens + 1) / 2)
    row["tflops"] = 4 * pairs * shape.num_q_heads * shape.head_dim / ours.us / 1e6
    if twin_error <= MAX_ERROR:
        row |= {"us_16bit": sixteen.us, "percent_of_16bit": 100 * sixteen.us / ours.us}
    return row | {f"us_{name}": timings[name].us for name in others if name in timings} | not_there


def _fa3_calls(sixteen_bit: SixteenBit) -> tuple[list[Call], str]:
    """Return the calls of the fastest right variant of FA3; where none runs, none and why."""
    from peers import MissingError, checked, fa3_variants, find_fa3  # which imports this file

    try:
        variants, wrong = checked(fa3_variants(find_fa3(), sixteen_bit), sixteen_bit)
    except MissingError as missing:
        return [], str(missing)
    name, error = fastest(variants)  # type: ignore[arg-type]
    return ([], wrong or error) if name is None else (variants[name], "")  # type: ignore[index]


@sweep(
    "masks",
    needs="gpu",
    headers={
        "shape": "shape",
        "preset": "preset",
        "batch": "batch",
        "context": "cached",
        "tokens": "new tokens each",
        "us": "causal us",
        "spread": "p20-p80",
        "us_tree": "tree us",
        "times_tree": "x causal",
        "us_block": "block us",
        "times_block": "x causal",
        "us_images": "images us",
        "times_images": "x causal",
    },
    note="one prefill_attention call with given new keys and values, pages only. tree: tree_mask of random trees; block:\n"
    "span_ends that let all new tokens see each other; images: spans of 256 tokens.",
)
def masks(options: Options) -> Iterator[Row]:
    """Time masks among new tokens beside causal calls."""
    shape, preset = selected_shapes(options)[0], (options.presets or (MAIN_PRESET,))[0]
    for batch, context, tokens in progress("masks", MASKED, str):
        row: Row = {"shape": shape.name, "preset": preset, "batch": batch, "context": context, "tokens": tokens}
        row |= {"head_dim": shape.head_dim, "dtype": "float16"}
        free_memory()
        if is_red(options, ("prefill_attention", "store_pages"), preset, shape):
            yield row | failed(RED)
            continue
        try:
            yield row | _masked(shape, PageLayout.from_name(preset, head_dim=shape.head_dim), batch, context, tokens, options)
        except Exception as error:  # one case that can't run leaves the others their times
            yield row | failed(error)


def masks_of(batch: int, tokens: int, seed: int, device: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return what calls of as many new tokens get, by name: nothing, random trees, blocks, images."""
    total, ints = batch * tokens, {"dtype": torch.int32, "device": device}
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(total) % tokens
    parents = (torch.rand(total, generator=generator) * (number + 1)).int() - 1
    words = kvarn.build_tree_mask(parents.to(device), torch.arange(0, total + 1, tokens, **ints))
    ends = (number // IMAGE_TOKENS + 1) * IMAGE_TOKENS
    every = {"causal": {}, "tree": {"tree_mask": words}, "block": {"span_ends": torch.full((total,), tokens, **ints)}}
    return every if tokens <= IMAGE_TOKENS else {"causal": {}, "images": {"span_ends": ends.to(**ints)}}


def _masked(shape: Shape, layout: PageLayout, batch: int, context: int, tokens: int, options: Options) -> Row:
    cases = decode_sets(shape, layout, batch, context, PAGES_ONLY, options.seed)
    providers, row = {}, {}
    for name, given in masks_of(batch, tokens, options.seed, "cuda").items():
        providers[name], error = prefill_calls(cases, tokens, True, shape, options.seed, masks=given)
        row[f"error_{name}"] = error
        if not error <= MAX_ERROR:
            return failed(f"error {error:.1e} of {name}", **row)
    timings, errors = measure(providers, samples=num_samples(options))
    if errors:
        return failed("; ".join(errors.values()), **row)
    causal = timings.pop("causal")
    row |= spread_fields(causal)
    for name, timing in timings.items():
        row |= {f"us_{name}": timing.us, f"times_{name}": timing.us / causal.us} | timing.fields(f"{name}_")
    return row
