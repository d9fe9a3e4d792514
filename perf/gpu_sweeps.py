"""The timed sweeps: decode against a 16-bit twin and a copy; store, dequantize and Hadamard against a copy.

GB/s counts the bytes that the operation can't avoid: each input and output once, split-K partials and scratch not. "% of
copy" is that over the bandwidth of a large device-to-device copy of the same run, which counts read plus written bytes.
The column "copy us" is a copy that moves exactly the row's bytes, half of them read, half of them written.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch
import twin
from cases import DecodeCase, Shape, build_cache, cache_bytes, decode_errors
from common import DEFAULT_PRESETS, Options, Row, progress, say, sweep
from gate import ERROR_RATIO, selected_shapes
from timing import Call, Timing, copy_bandwidth, copy_calls, measure, num_input_sets
from torch.nn.attention import SDPBackend, sdpa_kernel

import kvarn_triton as kvarn
from kvarn_triton import PageLayout

POINTS = ((1, 1024), (1, 4096), (1, 32768), (8, 4096), (8, 32768), (128, 4096))
FEWER_POINTS = ((1, 32768), (8, 32768), (128, 4096))
QUICK_POINTS = ((1, 4096), (8, 32768))
SERVED, PAGES_ONLY = "served", "pages only"
SINK_LEN = 128
DISTINCT_PAGES = 256
TIMED = {
    "us": "us",
    "spread": "p20-p80",
    "gb_s": "GB/s",
    "percent_of_copy": "% of copy",
    "copy_us": "copy us",
    "us_16bit": "16-bit us",
    "times_16bit": "x 16-bit",
    "us_sdpa": "SDPA us",
    "bytes_per_token": "B/token",
}


def roof(options: Options) -> float:
    """Return the copy bandwidth in GB/s, measured once in a run."""
    if "roof" not in options.sections:
        say("measuring the copy bandwidth")
        options.sections["roof"] = copy_bandwidth()
    return options.sections["roof"]["copy_gb_s"]


def is_red(options: Options, operation: str, preset: str, shape: Shape) -> bool:
    """Return whether a check of `operation` failed; only attention depends on the group of query heads."""
    return any(
        red[:3] == (operation, preset, shape.head_dim) and (operation != "decode_attention" or red[3] == shape.group)
        for red in options.red
    )


def free_memory() -> None:
    """Give the memory of dead tensors back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def timed_fields(timing: Timing | None, error: str | None, num_bytes: int, roof_gb_s: float) -> Row:
    """Return the fields of a timed provider that moves `num_bytes`, or FAIL."""
    if timing is None:
        return {"us": None, "fail": error or "not timed", "bytes": num_bytes}
    gb_s = num_bytes / timing.us / 1e3
    return {
        **timing.fields(),
        "spread": f"{timing.us_p20:.4g}-{timing.us_p80:.4g}",
        "bytes": num_bytes,
        "gb_s": gb_s,
        "percent_of_copy": 100 * gb_s / roof_gb_s,
        "copy_bandwidth_gb_s": roof_gb_s,
    }


def failed(message: str, **fields: object) -> Row:
    """Return a row that says FAIL where its times would be."""
    return {**fields, "us": None, "fail": message}


# --- decode


@sweep(
    "decode",
    needs="gpu",
    headers={"shape": "shape", "preset": "preset", "batch": "batch", "context": "context", "cache": "cache", **TIMED},
    note="one decode_attention call. served: a sink of 128 tokens and the last page at 16 bits; pages only: all quantized.\n"
    "x 16-bit: time of the tuned 16-bit paged twin over ours, below 1 where 16 bits win. B/token: cache bytes read per token\n"
    "and kv head. % of copy: of the large copy's bandwidth; copy us: a copy that moves the same bytes.",
)
def decode(options: Options) -> Iterator[Row]:
    """Time decode attention at every point of every shape; the presets of one point run against each other."""
    roof_gb_s = roof(options)
    work = [(shape, cache, point) for shape, cache, points in _decode_grid(options) for point in points]
    presets = options.presets or DEFAULT_PRESETS
    for shape, cache, (batch, context) in progress(
        "decode", work, lambda w: f"{w[0].name} {w[1]} batch {w[2][0]} context {w[2][1]}"
    ):
        free_memory()
        try:
            yield from _decode_point(options, shape, cache, batch, context, presets, roof_gb_s)
        except torch.cuda.OutOfMemoryError:
            for preset in presets:
                fields = {"shape": shape.name, "preset": preset, "batch": batch, "context": context, "cache": cache}
                yield {**fields, "us": None, "spread": "skipped", "skipped": "not enough memory"}


def _decode_grid(options: Options) -> list[tuple[Shape, str, Sequence[tuple[int, int]]]]:
    """Return (shape, cache, points): all points for the first shape, fewer for the others unless asked for all."""
    shapes = selected_shapes(options)
    if options.quick:
        return [(shape, SERVED, options.points or QUICK_POINTS) for shape in shapes[:2]]
    grid: list[tuple[Shape, str, Sequence[tuple[int, int]]]] = []
    for i, shape in enumerate(shapes):
        everything = options.full or i == 0
        points = options.points or (POINTS if everything else FEWER_POINTS)
        grid += [(shape, cache, points) for cache in ((SERVED, PAGES_ONLY) if everything else (SERVED,))]
    return grid


def _decode_point(
    options: Options, shape: Shape, cache: str, batch: int, context: int, presets: Sequence[str], roof_gb_s: float
) -> Iterator[Row]:
    providers: dict[str, Sequence[Call]] = {}
    sixteen_bytes = 4 * shape.head_dim * shape.num_kv_heads * batch * context + 4 * batch * shape.num_q_heads * shape.head_dim
    dense = DenseCalls(shape, batch, context, options.seed)
    twin_error = dense.error()
    config = dense.tuned_config() if twin_error <= 1e-2 else None
    if config is not None:
        providers["16bit"] = dense.twin_calls(config)
        providers["sdpa"] = dense.sdpa_calls()
    rows: dict[str, Row] = {}
    for preset in presets:
        layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
        row: Row = {"shape": shape.name, "preset": preset, "batch": batch, "context": context, "cache": cache}
        row["dtype"] = str(options.dtype).removeprefix("torch.")
        rows[preset] = row | {"num_q_heads": shape.num_q_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
        if is_red(options, "decode_attention", preset, shape) or is_red(options, "store_pages", preset, shape):
            rows[preset] |= failed("the correctness gate is red")
            continue
        try:
            cases = decode_sets(shape, layout, batch, context, cache, options.seed, options.dtype)
            rows[preset] |= check_timed_case(cases[0])
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a broken preset leaves the others their times
            rows[preset] |= failed(f"{type(error).__name__}: {error}".splitlines()[0][:200])
            continue
        if "fail" not in rows[preset]:
            num_bytes = cache_bytes(cases[0])
            rows[preset] |= {"cache_bytes": num_bytes, "bytes_per_token": num_bytes / (batch * context * shape.num_kv_heads)}
            num_bytes += 4 * batch * shape.num_q_heads * shape.head_dim
            rows[preset]["bytes"] = num_bytes
            providers[preset] = decode_calls(cases)
            providers[f"copy {preset}"] = copy_calls(num_bytes)
    timings, errors = measure(providers, samples=9 if options.quick else 21)
    for row in rows.values():
        yield _decode_row(row, timings, errors, roof_gb_s, sixteen_bytes, config, twin_error)


def _decode_row(
    row: Row,
    timings: dict[str, Timing],
    errors: dict[str, str],
    roof_gb_s: float,
    sixteen_bytes: int,
    config: twin.TwinConfig | None,
    twin_error: float,
) -> Row:
    preset = row["preset"]
    if "fail" not in row:
        row |= timed_fields(timings.get(preset), errors.get(preset), row["bytes"], roof_gb_s)
    if "us" not in row or row["us"] is None:
        return row
    if copied := timings.get(f"copy {preset}"):
        row |= {"copy_us": copied.us, "copy_us_p20": copied.us_p20, "copy_us_p80": copied.us_p80}
    if sixteen := timings.get("16bit"):
        row |= {"us_16bit": sixteen.us, "us_16bit_p20": sixteen.us_p20, "us_16bit_p80": sixteen.us_p80}
        row |= {"bytes_16bit": sixteen_bytes, "percent_of_copy_16bit": 100 * sixteen_bytes / sixteen.us / 1e3 / roof_gb_s}
        row |= {"times_16bit": sixteen.us / row["us"], "config_16bit": str(config), "error_16bit": twin_error}
    else:
        row["note_16bit"] = errors.get("16bit") or f"the twin's error is {twin_error:.1e}"
    if dense := timings.get("sdpa"):
        row |= {"us_sdpa": dense.us, "us_sdpa_p20": dense.us_p20, "us_sdpa_p80": dense.us_p80}
    else:
        row["note_sdpa"] = errors.get("sdpa", "not run")
    return row


def decode_sets(
    shape: Shape, layout: PageLayout, batch: int, context: int, cache: str, seed: int, dtype: torch.dtype = torch.float16
) -> list[DecodeCase]:
    """Return cases of the same sizes on different pages, together more than the L2 cache holds."""
    per_set = batch * context * shape.num_kv_heads * layout.page_bytes // layout.page_size
    sets = num_input_sets(per_set)
    served = {"sink_len": SINK_LEN, "tail_pages": 1} if cache == SERVED else {}
    case = build_cache(
        shape,
        layout,
        [context] * (batch * sets),
        device="cuda",
        distinct_pages=DISTINCT_PAGES,
        dtype=dtype,
        seed=seed,
        poison=False,
        **served,
    )
    return [case.rows(i * batch, (i + 1) * batch) for i in range(sets)]


def decode_calls(
    cases: Sequence[DecodeCase], table: kvarn.DecodeTable | None = None, split_size: int | None = None
) -> list[Call]:
    """Return the calls of `decode_attention`, without allocations."""
    case = cases[0]
    how = {"table": table, "split_size": split_size}
    workspace = torch.empty(case.workspace_size(**how), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(case.q)
    return [
        lambda case=case: kvarn.decode_attention(*case.arguments, **case.options, **how, out=out, workspace=workspace)  # type: ignore[misc]
        for case in cases
    ]


def check_timed_case(case: DecodeCase, split_size: int | None = None) -> Row:
    """Check the last sequence of the case that is timed: nothing is returned but errors, and `fail` if they are too large."""
    out = torch.full_like(case.q, float("nan"))
    kvarn.decode_attention(*case.arguments, **case.options, out=out, split_size=split_size)
    error, plain = decode_errors(case, out, len(case.seq_lens) - 1)
    row: Row = {"error": error, "error_plain": plain}
    if not error <= ERROR_RATIO * plain:
        row |= failed(f"error {error:.1e}, the plain formula's is {plain:.1e}")
    return row


class DenseCalls:
    """The 16-bit competitors at one point: inputs and calls of the paged twin and of PyTorch's attention."""

    def __init__(self, shape: Shape, batch: int, context: int, seed: int, page_size: int = 128) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        per_row = -(-context // page_size)
        sets = num_input_sets(4 * shape.head_dim * shape.num_kv_heads * batch * context)
        pages_shape = (sets * batch * per_row, 2, shape.num_kv_heads, page_size, shape.head_dim)
        self.shape, self.batch, self.context, self.sets = shape, batch, context, sets
        self.pages = torch.empty(pages_shape, dtype=torch.float16, device="cuda").normal_(generator=generator)
        ids = torch.randperm(len(self.pages), generator=generator, device="cuda").int().view(sets, batch, per_row)
        self.tables = [table.clone() for table in ids]
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        q_shape = (sets, batch, shape.num_q_heads, shape.head_dim)
        self.q = [q.clone() for q in torch.randn(q_shape, generator=generator, device="cuda").half()]
        self.out = torch.empty_like(self.q[0])

    def twin_calls(self, config: twin.TwinConfig) -> list[Call]:
        """Return the calls of the paged twin."""
        num_splits = twin.default_num_splits(self.batch * self.shape.num_kv_heads, self.tables[0].shape[1], config.waves)
        partial = twin.allocate_partial(self.q[0], num_splits)
        return [
            lambda q=q, table=table: twin.twin_attention(  # type: ignore[misc]
                q, self.pages, table, self.seq_lens, self.out, config=config, partial=partial
            )
            for q, table in zip(self.q, self.tables, strict=True)
        ]

    def tuned_config(self) -> twin.TwinConfig:
        """Return the fastest launch configuration of the twin at this point."""

        def median_us(calls: dict[twin.TwinConfig, Sequence[Call]]) -> dict[twin.TwinConfig, float]:
            timings, _ = measure(calls, samples=5, sample_us=200.0)  # type: ignore[arg-type]
            return {config: timing.us for config, timing in timings.items()}  # type: ignore[misc]

        return twin.tune(self.twin_calls, median_us)

    def error(self) -> float:
        """Return the twin's relative error on the last sequence, against float64."""
        self.twin_calls(twin.TwinConfig())[0]()
        pages = self.pages[self.tables[0][-1].long()].double()
        k, v = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.context]
        q = self.q[0][-1].double().unflatten(0, (self.shape.num_kv_heads, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.shape.head_dim**-0.5, dim=-1)
        expected = (weights @ v).flatten(0, 1)
        return ((self.out[-1].double() - expected).norm() / expected.norm()).item()

    def sdpa_calls(self) -> list[Call]:
        """Return the calls of PyTorch's flash attention on dense caches of equal lengths; the same memory, read as such."""
        dense_shape = (self.sets, 2, self.batch, self.shape.num_kv_heads, -1, self.shape.head_dim)
        dense = self.pages.view(dense_shape)[..., : self.context, :]

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return [
            lambda q=q, kv=kv: call(q[:, :, None], kv[0], kv[1])  # type: ignore[misc]
            for q, kv in zip(self.q, dense, strict=True)
        ]
