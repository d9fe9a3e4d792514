"""What an eager call through an operator costs beside the plain function: microseconds of the host, nothing runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from common import Options, Row, progress, sweep

from kvarn_triton import PageLayout, ops
from kvarn_triton.attention import decode
from kvarn_triton.pages import append
from kvarn_triton.testing import cache_case

CALLS = 2000


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
