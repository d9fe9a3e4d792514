"""Several query tokens per sequence: verifying drafts beside decoding one token, and chunks beside the same on 16-bit pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from cases import DecodeCase, Shape, build_cache, relative_error
from common import DEFAULT_PRESETS, Options, Row, progress, sweep
from gate import selected_shapes
from gpu_sweeps import DISTINCT_PAGES, PAGES_ONLY, decode_calls, decode_sets, failed, free_memory, is_red
from prefill_twin import CONFIGS, PrefillTwinConfig, twin_prefill
from timing import Call, measure

import kvarn_triton as kvarn
from kvarn_triton import PageLayout, reference

VERIFY = ((8, 32768, 4), (8, 32768, 8), (1, 32768, 4), (1, 32768, 8))
CHUNKS = ((1, 32768, 2048), (1, 8192, 2048), (8, 4096, 512), (1, 0, 4096))
"""Sequences, cached tokens, and query tokens of each sequence."""
MAX_ERROR = 2e-3
"""Of float16 results, against float64: twice what attention in float16 has on these inputs."""


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
        "us_decode": "decode us",
        "times_decode": "x decode",
    },
    note="one prefill_attention call, pages only. verify: the query tokens are in the cache; decode us: one token per\n"
    "sequence of the same cache. chunk: the query tokens' keys and values are given; with scratch, pages are\n"
    "dequantized once, in the time; 16-bit: the tuned twin, all tokens in 16-bit pages.",
)
def prefill(options: Options) -> Iterator[Row]:
    """Time `prefill_attention` for the first shape."""
    shape = selected_shapes(options)[0]
    presets = options.presets or DEFAULT_PRESETS[1:2]
    work = [
        (preset, *point) for preset in presets for point in (("verify", VERIFY), ("chunk", CHUNKS), ("chunk, scratch", CHUNKS))
    ]
    points = [(preset, what, *point) for preset, what, group in work for point in group]
    for preset, what, batch, context, tokens in progress("prefill", points, str):
        free_memory()
        row: Row = {"shape": shape.name, "preset": preset, "what": what, "batch": batch}
        row |= {"context": context, "tokens": tokens, "head_dim": shape.head_dim, "dtype": "float16"}
        if is_red(options, "decode_attention", preset, shape) or is_red(options, "store_pages", preset, shape):
            yield row | failed("the correctness gate is red")
            continue
        layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
        try:
            if what == "verify":
                yield row | _verify(shape, layout, batch, context, tokens, options)
            else:
                yield row | _chunk(shape, layout, batch, context, tokens, "scratch" in what, options)
        except Exception as error:  # one case that can't run leaves the others their times
            yield row | failed(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _calls(
    cases: Sequence[DecodeCase], tokens: int, new: bool, shape: Shape, seed: int, scratch: bool = False
) -> tuple[list[Call], list[dict]]:
    """Return a call for each case, without allocations, and their arguments."""
    generator = torch.Generator("cuda").manual_seed(seed)
    device = cases[0].pages.device
    batch, total = len(cases[0].seq_lens), len(cases[0].seq_lens) * tokens

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(total, heads, shape.head_dim, generator=generator, device="cuda").half()

    ends = torch.arange(0, total + 1, tokens, dtype=torch.int32, device="cuda")
    calls, every = [], []
    for case in cases:
        size = kvarn.prefill_workspace_size(
            total, batch, shape.num_q_heads, shape.num_kv_heads, case.layout, case.block_table.shape[1], device, scratch=scratch
        )
        arguments = {"q": draw(shape.num_q_heads), "pages": case.pages, "block_table": case.block_table, "layout": case.layout}
        arguments |= {"seq_lens": case.seq_lens + (tokens if new else 0), "cu_seqlens_q": ends}
        arguments |= {"k": draw(shape.num_kv_heads), "v": draw(shape.num_kv_heads)} if new else {}
        memory = {"out": torch.empty_like(arguments["q"]), "workspace": torch.empty(size, dtype=torch.uint8, device="cuda")}
        if scratch:
            slots = (case.block_table.numel(), 2, shape.num_kv_heads, case.layout.page_size, shape.head_dim)
            memory["scratch"] = torch.full(slots, torch.nan, dtype=torch.float16, device="cuda")
        calls.append(lambda arguments=arguments, memory=memory: kvarn.prefill_attention(**arguments, **memory))
        every.append(arguments | memory)
    return calls, every  # type: ignore[return-value]


def _error(arguments: dict) -> float:
    """Return the error of the last query token of the last sequence, against float64."""
    kvarn.prefill_attention(**arguments)
    cu, row = arguments["cu_seqlens_q"].tolist(), len(arguments["seq_lens"]) - 1
    length, first, last = int(arguments["seq_lens"][row]), cu[-2], cu[-1]
    new = "k" in arguments
    k, v = reference.gather_cache(
        arguments["pages"], arguments["block_table"], length - (last - first if new else 0), arguments["layout"], row=row,
        dtype=torch.float64,
    )  # fmt: skip
    if new:
        more = (reference.hadamard(arguments[name][first:last].double()).transpose(0, 1) for name in ("k", "v"))
        k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), more, strict=True))
    q = reference.hadamard(arguments["q"][last - 1 : last].double())
    positions = torch.arange(length, device=q.device)
    exact, _ = reference.attention.attend(q, k, v, positions[-1:], positions, q.shape[-1] ** -0.5)
    return relative_error(arguments["out"][last - 1 : last], reference.hadamard(exact))


def _verify(shape: Shape, layout: PageLayout, batch: int, context: int, tokens: int, options: Options) -> Row:
    cases = decode_sets(shape, layout, batch, context, PAGES_ONLY, options.seed)
    calls, arguments = _calls(cases, tokens, False, shape, options.seed)
    error = _error(arguments[0])
    if not error <= MAX_ERROR:
        return failed(f"error {error:.1e}", error=error)
    timings, errors = measure({"kvarn": calls, "decode": decode_calls(cases)}, samples=9 if options.quick else 21)
    if errors:
        return failed("; ".join(errors.values()), error=error)
    ours, decode = timings["kvarn"], timings["decode"]
    row = ours.fields() | {"spread": f"{ours.us_p20:.4g}-{ours.us_p80:.4g}", "error": error}
    return row | {"us_decode": decode.us, "times_decode": ours.us / decode.us}


def _chunk(shape: Shape, layout: PageLayout, batch: int, context: int, tokens: int, scratch: bool, options: Options) -> Row:
    lengths = [context] * batch
    case = build_cache(
        shape, layout, lengths, device="cuda", distinct_pages=DISTINCT_PAGES, seed=options.seed, poison=False
    )  # fmt: skip
    calls, arguments = _calls([case], tokens, True, shape, options.seed, scratch)
    error = _error(arguments[0])
    if not error <= MAX_ERROR:
        return failed(f"error {error:.1e}", error=error)
    generator = torch.Generator("cuda").manual_seed(options.seed)
    per_row = -(-(context + tokens) // layout.page_size)
    pages_shape = (batch * per_row, 2, shape.num_kv_heads, layout.page_size, shape.head_dim)
    pages = torch.empty(pages_shape, dtype=torch.float16, device="cuda").normal_(generator=generator)
    table = torch.randperm(batch * per_row, generator=generator, device="cuda").int().view(batch, per_row)
    lens, q, out = arguments[0]["seq_lens"], arguments[0]["q"], torch.empty_like(arguments[0]["q"])

    def twin(config: PrefillTwinConfig) -> list[Call]:
        return [lambda: twin_prefill(q, pages, table, lens, out, config)]

    twins, _ = measure({config: twin(config) for config in CONFIGS}, samples=3, sample_us=200.0)  # type: ignore[misc]
    best = min(twins, key=lambda config: twins[config].us)
    timings, errors = measure({"kvarn": calls, "16bit": twin(best)}, samples=9)  # type: ignore[arg-type]
    if errors:
        return failed("; ".join(errors.values()), error=error)
    ours, sixteen = timings["kvarn"], timings["16bit"]
    row = ours.fields() | {"spread": f"{ours.us_p20:.4g}-{ours.us_p80:.4g}", "error": error, "config_16bit": str(best)}
    pairs = batch * tokens * (context + (tokens + 1) / 2)
    row["tflops"] = 4 * pairs * shape.num_q_heads * shape.head_dim / ours.us / 1e6
    return row | {"us_16bit": sixteen.us, "percent_of_16bit": 100 * sixteen.us / ours.us}
