"""What calls cost the host, in microseconds: up to the driver, and through an operator. Nothing runs on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from common import MAIN_PRESET, Options, Row, in_processes, progress, sweep

import kvarn_triton as kvarn
from kvarn_triton import Encoder, PageLayout, ops
from kvarn_triton.attention import decode
from kvarn_triton.pages import append
from kvarn_triton.testing import cache_case, compiler

CALLS = 2000
HOST_RUNS, HOST_CALLS = 500, 3
PLAIN = Encoder(iterations=1, clip=False, fits=0, norm="balance")
"""An encoder that the compiler is done with soon; the host does as much for any."""


def _microseconds(call: Callable[[], object]) -> float:
    """Return the time of one of many calls in a row."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


@sweep(
    "overhead",
    needs="any",
    headers={
        "function": "function",
        "device": "tensors",
        "plain_us": "plain us",
        "operator_us": "operator us",
        "us": "us more",
    },
    note="host time of an eager call whose launcher returns at once, called as it is and through its operator, without\n"
    f"gradients: medians of runs of {CALLS:,} calls, taken in turns.",
)
def overhead(options: Options) -> Iterator[Row]:
    """Time the functions of a decode step with launchers that do nothing."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = PageLayout(64, 64, 4, 2)
    case = cache_case(layout, [70], device=device, seed=options.seed)
    k, slots = torch.zeros(1, 2, 64, dtype=torch.float16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    arguments: dict[str, tuple[object, tuple, Row]] = {
        "append_tokens": (append, (k, k, case.raw_pages, slots), {}),
        "decode_attention": (decode, (case.q,), case.kwargs),
    }
    for name in progress("overhead", list(arguments)):
        module, args, kwargs = arguments[name]
        yield {"function": name, "device": device.type} | _compare(module, name, args, kwargs, 5 if options.quick else 21)


def _compare(module: object, name: str, args: tuple, kwargs: Row, samples: int) -> Row:
    """Return the times of a function of a module and of its operator, with a launcher that returns its query."""

    def nothing(first: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor | None:
        return first if name == "decode_attention" else None

    operator = getattr(ops, name)
    with torch.no_grad(), mock.patch.object(module, name, nothing):
        plain, through = zip(
            *(
                (_microseconds(lambda: nothing(*args, **kwargs)), _microseconds(lambda: operator(*args, **kwargs)))
                for _ in range(samples)
            ),
            strict=True,
        )
    plain_us, operator_us = statistics.median(plain), statistics.median(through)
    return {"plain_us": plain_us, "operator_us": operator_us, "us": operator_us - plain_us}


def _host_calls(layout: PageLayout) -> dict[str, Callable[[], object]]:
    """Return the calls of a step of two sequences with a sink and a tail, whose tensors are there."""
    batch, heads, size = 2, 2, layout.page_size
    lens, table = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, 2, dtype=torch.int32)
    pages = torch.zeros(layout.pages_shape(4, heads), dtype=torch.uint8)
    raw_pages = torch.zeros(4, 2, heads, size, layout.raw_head_dim, dtype=torch.float16)
    raw = {"raw_pages": raw_pages, "raw_table": table, "num_quantized": lens, "sink_len": size}
    q, drafts = (torch.zeros(n, 8 * heads, layout.head_dim, dtype=torch.float16) for n in (batch, 4 * batch))
    k, slots = torch.zeros(batch, heads, layout.head_dim, dtype=torch.float16), torch.zeros(batch, dtype=torch.int64)
    workspace = torch.zeros(2**22, dtype=torch.uint8)
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    given = {"layout": layout, "workspace": workspace, **raw}
    return {
        "decode_attention": lambda: kvarn.decode_attention(q, pages, table, lens, out=q, **given),
        "prefill_attention, 4 drafts": lambda: kvarn.prefill_attention(drafts, pages, table, lens, ends, out=drafts, **given),
        "append_tokens": lambda: kvarn.append_tokens(k, k, raw_pages, slots),
        "commit_pages": lambda: kvarn.commit_pages(
            raw_pages, pages, table, table, lens, lens, layout, sink_len=size, advance=False, encoder=PLAIN
        ),
    }


def host_time(name: str) -> Row:
    """Return the least time of the host for a call, over many runs, with kernels of sm90 that are compiled before."""
    with compiler.compile_for("sm90") as kernels:
        call = _host_calls(PageLayout.from_name(MAIN_PRESET))[name]
        call()
        launches = len(kernels)
        times = []
        for _ in range(HOST_RUNS):
            start = time.thread_time()
            for _ in range(HOST_CALLS):
                call()
            times.append((time.thread_time() - start) / HOST_CALLS * 1e6)
    return {"function": name, "launches": launches, "us": min(times)}


@sweep(
    "host",
    needs="any",
    headers={"function": "function", "launches": "launches", "us": "us"},
    note="host time of a call with kernels that are compiled: checks, launch parameters and Triton's launcher, without the\n"
    f"driver. The least of {HOST_RUNS} runs of {HOST_CALLS} calls: others are longer by what else the machine did.",
)
def host(options: Options) -> Iterator[Row]:
    """Time what a step costs the host, without a GPU."""
    names = [(name,) for name in _host_calls(PageLayout.from_name(MAIN_PRESET))]
    for _, row in in_processes(host_time, names, interpret=False):
        yield row
