"""The checks of attention: decode and prefill with each of their options, on small caches with a sink, pages and a tail.

Results are compared with float64 on the dequantized cache: at most twice the error of the same formula computed with PyTorch in
the dtype of the query (`cases.attention_of_row`). Memory that no sequence owns is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import ERROR_RATIO, attention_of_row
from common import Row
from gate_checks import SOME_CONFIG, UNEQUAL, Recorder, Subject, as_csr, check, equal, moved, some_table

from kvarn_triton import reference
from kvarn_triton.testing import cache_case, relative_error

LSE_ERROR = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5}
"""Rounding of a query to 11, 8 or 24 bits times scores of up to 5, and the sum."""
FLOAT32_ERROR = 2e-6
"""Sums of a thousand float32 products, in another order than the yardstick's."""
SINK_LEN = 16
Call = dict[str, Any]


def _scaled(kvarn: Recorder, call: Call) -> Call:
    shape = (*call["q"].shape[:2], call["layout"].v_head_dim)
    return {"sm_scale": 0.3, "out": torch.empty(shape, dtype=call["q"].dtype)}


def _pages_only(kvarn: Recorder, call: Call) -> Call:
    return dict.fromkeys(("raw_pages", "raw_table", "num_quantized")) | {"sink_len": 0}


OPTIONS: dict[str, Callable[[Recorder, Call], Call]] = {
    "sink, pages, tail": lambda kvarn, call: {},
    "pages only": _pages_only,
    "window": lambda kvarn, call: {"window": 70},
    "window and sink": lambda kvarn, call: {"window": 50, "keep_sink": True},
    "soft cap": lambda kvarn, call: {"soft_cap": 3.0},
    "sinks": lambda kvarn, call: {"sinks": torch.linspace(-2, 4, call["q"].shape[1])},
    "CSR page ids": lambda kvarn, call: as_csr(call["block_table"]),
    "scale, given output": _scaled,
    "split size, workspace": lambda kvarn, call: {"split_size": 1, "workspace": True},
}
"""What is changed in a call, by name."""


def _tree(kvarn: Recorder, call: Call) -> Call:
    """Return words of random trees; those of the second sequence see what random bits say."""
    total, ends = len(call["q"]), call["cu_seqlens_q"]
    random = torch.Generator().manual_seed(total)
    token = torch.arange(total) - ends[0]
    parents = (torch.rand(total, generator=random) * (token + 1)).long() - 1
    words = kvarn.build_tree_mask(parents=parents, cu_seqlens_q=ends)
    words[ends[1] :] = torch.randint(2**62, (total - int(ends[1]),), generator=random)
    return {"tree_mask": words}


def _spans(kvarn: Recorder, call: Call) -> Call:
    """Return spans of the first sequence, and one over all new tokens of the second."""
    spans = torch.zeros(len(call["q"]), dtype=torch.int32)
    spans[3:20], spans[21:38], spans[call["cu_seqlens_q"][1] :] = 20, 38, 2**31 - 1
    return {"span_ends": spans}


AMONG: dict[str, Callable[[Recorder, Call], Call]] = {"trees": _tree, "spans": _spans}
"""The same for calls with new tokens."""


def decode_call(subject: Subject, pages_only: bool) -> Call:
    """Return a call of decode_attention over three sequences, one of which is empty."""
    layout, size = subject.layout, subject.layout.page_size
    sink_len = 0 if pages_only else SINK_LEN
    lengths = [2 * size, 0, size] if pages_only else [SINK_LEN + 2 * size + 9, 0, 37]
    case = cache_case(
        layout, lengths, num_kv_heads=2, group=subject.group, dtype=subject.dtype, sink_len=sink_len, num_tail_slots=1,
        seed=subject.seed,
    )  # fmt: skip
    if pages_only:  # a page may count in part: a sequence was cut short
        case.seq_lens = torch.tensor([2 * size - 22, 0, size - 1], dtype=torch.int32)
    return case.kwargs | {"q": case.q}


def prefill_call(subject: Subject, new: bool, queries: tuple[int, int], pages_only: bool = False) -> Call:
    """Return a call of prefill_attention: query tokens whose keys and values are new, or in the tail or pages of the cache."""
    layout, size, total = subject.layout, subject.layout.page_size, sum(queries)
    sink_len = 0 if pages_only else SINK_LEN
    lengths = [2 * size, size] if pages_only else [SINK_LEN + 2 * size + 9, SINK_LEN + 21]
    case = cache_case(
        layout, lengths, num_kv_heads=2, group=subject.group, dtype=subject.dtype, sink_len=sink_len, num_tail_slots=1,
        seed=subject.seed,
    )  # fmt: skip
    call = case.kwargs | {"q": subject.draw(total, 2 * subject.group, layout.head_dim)}
    call["cu_seqlens_q"] = torch.tensor([0, queries[0], total], dtype=torch.int32)
    if new:
        call["k"], call["v"] = (subject.draw(total, 2, d, shift=d) for d in (layout.head_dim, layout.v_head_dim))
        call["seq_lens"] = call["seq_lens"] + torch.tensor(queries, dtype=torch.int32)
    return call


def attention_row(kvarn: Recorder, operation: str, call: Call, device: str) -> Row:
    """Make a call of attention on the device; compare its result and log-sum-exp with float64."""
    out, lse = getattr(kvarn, operation)(**moved(call, device), return_lse=True)
    seen = {name: x for name, x in call.items() if name not in ("out", "workspace", "table", "config", "split_size", "scratch")}
    exact, exact_lse = getattr(reference, operation)(**seen | {"q": call["q"].double()}, return_lse=True)
    plain = torch.cat([attention_of_row(call, row, call["q"].dtype) for row in range(len(call["seq_lens"]))])
    error, allowed = relative_error(out.cpu(), exact), max(ERROR_RATIO * relative_error(plain, exact), FLOAT32_ERROR)
    attended = exact_lse > -torch.inf
    same = torch.equal(attended, lse.cpu() > -torch.inf)
    same = same and bool(((lse.cpu() - exact_lse).abs()[attended] <= LSE_ERROR[call["q"].dtype]).all())
    row = {"operation": operation, "criterion": f"error <= {ERROR_RATIO:g}x plain", "error": error, "allowed": allowed}
    return row | {
        "detail": f"{error:.1e} of {allowed:.1e}" + ("" if same else "; lse differs"),
        "ok": error <= allowed and same,
    }


def workspace_of(kvarn: Recorder, operation: str, call: Call, device: str) -> torch.Tensor:
    """Return NaN-filled memory of the size that the package asks for."""
    csr = call["block_table"] is None
    ids, sizes = call["kv_indices"] if csr else call["block_table"], (*call["q"].shape[:2], call["pages"].shape[1])
    options: Row = {"dtype": call["q"].dtype, "split_size": call.get("split_size")}
    if operation == "decode_attention":
        raw = 0 if call["raw_table"] is None else call["raw_table"].shape[1]
        options |= {"csr": csr, "max_raw_pages": raw, "table": call.get("table")}
        sizes = (*sizes, call["layout"], ids.shape[-1], torch.device(device))
        return torch.full((kvarn.decode_workspace_size(*sizes, **options),), 0xFF, dtype=torch.uint8)
    sizes = (sizes[0], len(call["seq_lens"]), *sizes[1:], call["layout"], ids.shape[-1], torch.device(device))
    size = kvarn.prefill_workspace_size(*sizes, **options, scratch="scratch" in call, config=call.get("config"))
    return torch.full((size,), 0xFF, dtype=torch.uint8)


def _check_decode(kvarn: Recorder, subject: Subject, option: str) -> Iterator[Row]:
    call = decode_call(subject, option == "pages only")
    call |= OPTIONS[option](kvarn, call)
    if option == "split size, workspace":
        call |= {"table": some_table(kvarn, torch.device(subject.device)), **as_csr(call["block_table"])}
    if "workspace" in call:
        call["workspace"] = workspace_of(kvarn, "decode_attention", call, subject.device)
    yield attention_row(kvarn, "decode_attention", call, subject.device)


def _check_scheduled(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    """Compare calls with schedules, the second in the memory of the first, with those that find their parts themselves."""
    for csr in (False, True):
        call = decode_call(subject, pages_only=False)
        seen = {"window": 50, "keep_sink": True, "split_size": 1, "table": some_table(kvarn, torch.device(subject.device))}
        call = moved(call | seen | (as_csr(call["block_table"]) if csr else {}), subject.device)
        names = ("raw_table", "num_quantized", "sink_len", *(("kv_indptr", "kv_indices") if csr else ()), *seen)
        given: dict[str, Any] = {name: call[name] for name in names} | {"dtype": call["q"].dtype}
        heads = call["q"].shape[1], call["pages"].shape[1]
        schedule = kvarn.schedule_decode(call["layout"], call["seq_lens"], call["block_table"], *heads, **given)
        kvarn.schedule_decode(call["layout"], call["seq_lens"], call["block_table"], *heads, **given, out=schedule)
        results = [kvarn.decode_attention(**call, schedule=each) for each in (schedule, None)]
        yield equal("decode_attention", {"table" if csr else "lists": tuple(x.cpu() for x in results)})


def _check_prefill(kvarn: Recorder, subject: Subject, option: str) -> Iterator[Row]:
    form, _, option = option.partition(": ")
    call = prefill_call(
        subject, new=form != "drafts", queries=(40, 5) if form == "chunk" else (7, 3), pages_only=option == "pages only"
    )
    call |= (OPTIONS | AMONG)[option](kvarn, call)
    if option == "split size, workspace":
        call["config"] = SOME_CONFIG
    if form == "past":
        call |= {"k": None, "v": None, "past_only": True}
    if form == "scratch":
        ids = call["block_table"] if call["block_table"] is not None else call["kv_indices"]
        shape = (ids.numel(), 2, 2, subject.layout.page_size, subject.layout.raw_head_dim)
        call["scratch"] = torch.full(shape, torch.nan, dtype=subject.dtype)
    if "workspace" in call:
        call["workspace"] = workspace_of(kvarn, "prefill_attention", call, subject.device)
    yield attention_row(kvarn, "prefill_attention", call, subject.device)


def _check_unequal(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    unequal = Subject(UNEQUAL, subject.group, subject.dtype, subject.device, subject.seed)
    yield from _check_decode(kvarn, unequal, "sink, pages, tail")
    yield from _check_prefill(kvarn, unequal, "chunk: sink, pages, tail")


DECODE_SECONDS, PREFILL_SECONDS = 1.5, 2.0
for _option in OPTIONS:
    check(f"decode, {_option}", "decode_attention", DECODE_SECONDS)(functools.partial(_check_decode, option=_option))
for _option in (
    *(f"chunk: {option}" for option in OPTIONS | AMONG),
    "drafts: sink, pages, tail",
    "drafts: pages only",
    "past: sink, pages, tail",
    "scratch: sink, pages, tail",
    "scratch: split size, workspace",
):
    check(f"prefill, {_option}", "prefill_attention", PREFILL_SECONDS)(functools.partial(_check_prefill, option=_option))
check("decode, schedules", "schedule_decode", 2 * DECODE_SECONDS)(_check_scheduled)
check("attention, values of another head_dim", "decode_attention", DECODE_SECONDS + PREFILL_SECONDS)(_check_unequal)
