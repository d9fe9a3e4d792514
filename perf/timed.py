"""What the timed sweeps share: caches that are timed, checked first, and the fields of their rows.

GB/s counts the bytes that the operation can't avoid: each input and output once, split-K partials and scratch not. "% of
copy" is that over the bandwidth of a large device-to-device copy of the same run, which counts read plus written bytes.
The column "copy us" is a copy that moves exactly the row's bytes, half of them read, half of them written.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from cases import ERROR_RATIO, DecodeCase, Shape, attention_errors, build_cache
from common import Options, Row, say
from timing import Call, Timing, copy_bandwidth, num_input_sets

import kvarn_triton as kvarn
from kvarn_triton import PageLayout

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
RED = "the correctness gate is red"


def roof(options: Options) -> float:
    """Return the copy bandwidth in GB/s, measured once in a run."""
    if "roof" not in options.sections:
        say("measuring the copy bandwidth")
        options.sections["roof"] = copy_bandwidth()
    return options.sections["roof"]["copy_gb_s"]


def num_samples(options: Options) -> int:
    """Return how many samples of each provider are taken."""
    return 9 if options.quick else 21


def is_red(options: Options, operations: Sequence[str], preset: str, shape: Shape) -> bool:
    """Return whether a check of an operation failed on what is to be timed; only attention depends on the group of heads.

    Checks on the small page format, of options above all, have no preset: they stop nothing but the exit code.
    """
    return any(
        red[:3] == (operation, preset, shape.head_dim) and ("attention" not in operation or red[3] == shape.group)
        for red in options.red
        for operation in operations
    )


def free_memory() -> None:
    """Give the memory of dead tensors back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def spread_fields(timing: Timing) -> Row:
    """Return all numbers of a timing, and its spread as text."""
    return timing.fields() | {"spread": f"{timing.us_p20:.4g}-{timing.us_p80:.4g}"}


def timed_fields(timing: Timing | None, error: str | None, num_bytes: int, roof_gb_s: float) -> Row:
    """Return the fields of a timed provider that moves `num_bytes`, or FAIL."""
    if timing is None:
        return {"us": None, "fail": error or "not timed", "bytes": num_bytes}
    gb_s = num_bytes / timing.us / 1e3
    bandwidth = {"gb_s": gb_s, "percent_of_copy": 100 * gb_s / roof_gb_s, "copy_bandwidth_gb_s": roof_gb_s}
    return spread_fields(timing) | {"bytes": num_bytes} | bandwidth


def failed(message: object, **fields: object) -> Row:
    """Return a row that says FAIL where its times would be; `message` is a text or an exception."""
    if isinstance(message, Exception):
        message = f"{type(message).__name__}: {message}".splitlines()[0][:200]
    return {**fields, "us": None, "fail": message}


def decode_sets(
    shape: Shape, layout: PageLayout, batch: int, context: int, cache: str, seed: int, dtype: torch.dtype = torch.float16
) -> list[DecodeCase]:
    """Return cases of the same sizes on different pages, together more than the L2 cache holds."""
    sets = num_input_sets(batch * context * shape.num_kv_heads * layout.page_bytes // layout.page_size)
    served = {"sink_len": SINK_LEN, "tail_pages": 1} if cache == SERVED else {}
    lengths = [context] * (batch * sets)
    case = build_cache(
        shape, layout, lengths, distinct_pages=DISTINCT_PAGES, dtype=dtype, seed=seed, **served
    )  # fmt: skip
    return [case.rows(i * batch, (i + 1) * batch) for i in range(sets)]


def decode_calls(
    cases: Sequence[DecodeCase],
    table: kvarn.DecodeTable | None = None,
    split_size: int | None = None,
    scheduled: bool = False,
) -> list[Call]:
    """Return the calls of `decode_attention`, without allocations; `scheduled`: with schedules that are made before."""
    how = {"table": table, "split_size": split_size}
    workspace = torch.empty(cases[0].workspace_size(**how), dtype=torch.uint8, device="cuda")
    memory = {"out": torch.empty_like(cases[0].q), "workspace": workspace}
    schedules = [case.schedule(**how) if scheduled else None for case in cases]

    def call_of(case: DecodeCase, schedule: kvarn.DecodeSchedule | None) -> Call:
        return lambda: kvarn.decode_attention(**case.call, **how, **memory, schedule=schedule)

    return [call_of(*each) for each in zip(cases, schedules, strict=True)]


def check_timed_case(case: DecodeCase, split_size: int | None = None) -> Row:
    """Check the last sequence of the case that is timed: nothing is returned but errors, and `fail` if they are too large."""
    out = torch.full_like(case.q, float("nan"))
    kvarn.decode_attention(**case.call, out=out, split_size=split_size)
    error, plain = attention_errors(case.call, out, len(case.seq_lens) - 1)
    row: Row = {"error": error, "error_plain": plain}
    if not error <= ERROR_RATIO * plain:
        row |= failed(f"error {error:.1e}, the plain formula's is {plain:.1e}")
    return row
