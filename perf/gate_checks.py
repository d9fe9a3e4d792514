"""What the gate checks: each public function and each of its options on small cases, against `kvarn_triton.reference`.

Packed bytes, stored scales, rotated and dequantized numbers must be equal, bit for bit, to what the reference computes on the
CPU. The checks of attention are in `gate_attention`.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Row
from triton.runtime import interpreter

import kvarn_triton
from kvarn_triton import PUBLISHED, DecodeConfig, DecodeTable, PageLayout, PrefillConfig, gpu, reference
from kvarn_triton.tables import Entry
from kvarn_triton.testing import cache_case, relative_error

SMALL = PageLayout(64, 64, 4, 2)
UNEQUAL = PageLayout(64, 64, 4, 2, v_head_dim=80)
SOME_CONFIG = PrefillConfig(64, 4, 32, 32)
"""Launch parameters of prefill attention that are nobody's own."""


@dataclass(frozen=True)
class Subject:
    """What a check runs on: page format, query heads per kv head, dtype of activations, device, and seed of random numbers."""

    layout: PageLayout = SMALL
    group: int = 4
    dtype: torch.dtype = torch.float16
    device: str = "cpu"
    seed: int = 0

    def draw(self, *shape: int, shift: int = 0) -> torch.Tensor:
        """Return random activations on the CPU."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + shift)).to(self.dtype)


class Recorder:
    """The public names of kvarn_triton; functions note with which arguments they were called."""

    def __init__(self) -> None:
        self.calls: dict[str, set[str]] = defaultdict(set)

    def __getattr__(self, name: str) -> Any:
        function = getattr(kvarn_triton, name)
        if not inspect.isfunction(function):
            return function
        signature = inspect.signature(function)

        def noted(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            self.calls[name] |= {key for key, value in given.items() if value is not None}
            return function(*args, **kwargs)

        return noted


Check = Callable[[Recorder, Subject], Iterator[Row]]
CHECKS: dict[str, tuple[str, float, Check]] = {}
"""By name: the operation that must not be timed if the check is red; seconds that it takes in the interpreter; the check."""


def check(name: str, operation: str, seconds: float) -> Callable[[Check], Check]:
    """Register a check."""

    def register(run: Check) -> Check:
        CHECKS[name] = operation, seconds, run
        return run

    return register


def equal(operation: str, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Row:
    """Return the row that says whether each pair (found, expected) is equal bit for bit."""
    wrong = []
    for name, (found, expected) in pairs.items():
        found, expected = found.cpu().contiguous().view(torch.uint8), expected.cpu().contiguous().view(torch.uint8)
        different = int((found != expected).sum()) if found.shape == expected.shape else expected.numel()
        if different:
            wrong.append(f"{name}: {different} of {expected.numel()} bytes differ")
    return {"operation": operation, "criterion": "bit-equal", "detail": "; ".join(wrong) or "equal", "ok": not wrong}


def moved(call: dict[str, Any], device: str) -> dict[str, Any]:
    """Return copies of a call's tensors on a device."""
    return {name: x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for name, x in call.items()}


@check("hadamard", "hadamard", 0.3)
def _rotation(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    x = subject.draw(67, 3, subject.layout.head_dim)
    placed = x.to(subject.device)
    out = torch.empty_like(placed)
    kvarn.hadamard(placed, block_size=16, out=out)
    pairs = {"rotated": (kvarn.hadamard(placed), reference.hadamard(x))}
    yield equal("hadamard", pairs | {"blocks of 16": (out, reference.hadamard(x, block_size=16))})


@check("pages: store and dequantize", "store_pages", 6.0)
def _pages(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    layout, size, device = subject.layout, subject.layout.page_size, subject.device
    k, v = subject.draw(3 * size + 5, 2, layout.head_dim), subject.draw(3 * size + 5, 2, layout.v_head_dim, shift=1)
    k[:, :, 1] = 8 * k[:, :, 1] + 3
    v[size + 3] *= 50
    page_ids, starts = torch.tensor([4, -1, 1]), torch.tensor([5, 0, 2 * size])
    expected = torch.full(layout.pages_shape(6, 2), 0xFF, dtype=torch.uint8)
    found, ids = expected.to(device, copy=True), page_ids.to(device)
    kvarn.store_pages(k.to(device), v.to(device), found, ids, layout, token_starts=starts.to(device))
    reference.store_pages(k, v, expected, page_ids, layout, token_starts=starts)
    yield equal("store_pages", {"pages": (found, expected)})
    read = kvarn.dequantize_pages(expected.to(device), ids, layout, dtype=subject.dtype)
    wanted = reference.dequantize_pages(expected, page_ids, layout, dtype=subject.dtype)
    yield equal("dequantize_pages", {"k": (read[0], wanted[0]), "v": (read[1], wanted[1])})


@check("pages: published encoder, rotated result", "store_pages", 3.0)
def _page_options(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    layout, device = subject.layout, subject.device
    k, v = subject.draw(layout.page_size, 2, layout.head_dim), subject.draw(layout.page_size, 2, layout.v_head_dim, shift=1)
    expected, ids = torch.zeros(layout.pages_shape(1, 2), dtype=torch.uint8), torch.tensor([0])
    found = expected.to(device, copy=True)
    kvarn.store_pages(k.to(device), v.to(device), found, ids.to(device), layout, encoder=PUBLISHED)
    reference.store_pages(k, v, expected, ids, layout, encoder=PUBLISHED)
    yield equal("store_pages", {"pages": (found, expected)})
    wanted = reference.dequantize_pages(expected, ids, layout, dtype=subject.dtype, rotated=True)
    out = tuple(torch.empty_like(x, device=device) for x in wanted)
    kvarn.dequantize_pages(expected.to(device), ids.to(device), layout, rotated=True, out=out)
    yield equal("dequantize_pages", {"k": (out[0], wanted[0]), "v": (out[1], wanted[1])})


@check("steps of the method: balance, quantize, pack", "quantize", 3.0)
def _tiles(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    size, dim, device = subject.layout.page_size, subject.layout.head_dim, subject.device
    tiles = subject.draw(2, size, dim)
    for per, bits in (("channel", 4), ("token", 2)):
        options = {"per": per, "encoder": PUBLISHED}
        expected = reference.variance_normalize(tiles, **options)
        found = kvarn.variance_normalize(tiles.to(device), **options)
        names = ("balanced", "token scale", "channel scale")
        yield equal("variance_normalize", dict(zip(names, zip(found, expected, strict=True), strict=True)))
        expected = reference.quantize(tiles, bits, **options)
        found = kvarn.quantize(tiles.to(device), bits, **options)
        yield equal("quantize", dict(zip(("codes", "scale", "zero"), zip(found, expected, strict=True), strict=True)))
        placed = [x.to(device) for x in expected]
        yield equal("dequantize", {"numbers": (kvarn.dequantize(*placed, per=per), reference.dequantize(*expected, per=per))})
        packed = reference.pack(expected[0], bits, per=per)
        yield equal("pack", {"bytes": (kvarn.pack(placed[0], bits, per=per), packed)})
        yield equal("unpack", {"codes": (kvarn.unpack(packed.to(device), bits, size, dim, per=per), expected[0])})


@check("tails: append and commit", "commit_pages", 6.0)
def _tails(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    yield from _committed(kvarn, subject, {"max_new_pages": 2}, csr=False)


@check("tails: kept pages, shared counts, CSR ids", "commit_pages", 4.0)
def _tail_options(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    yield from _committed(kvarn, subject, {"keep_pages": 1, "advance": False, "encoder": PUBLISHED}, csr=True)


def _committed(kvarn: Recorder, subject: Subject, options: Row, csr: bool) -> Iterator[Row]:
    """Append two sequences of tokens with a sink of 5 tokens, then let finished pages be quantized."""
    layout, size, sink_len = subject.layout, subject.layout.page_size, 5
    lengths = (2 * size + 7, size)
    k, v = subject.draw(lengths[0], 2, layout.head_dim), subject.draw(lengths[0], 2, layout.v_head_dim, shift=1)
    tables = {"raw_table": torch.tensor([[3, 0, 6, 5], [1, 4, 2, 7]], dtype=torch.int32)}
    block_table = torch.tensor([[2, 5, 0], [3, 1, 4]], dtype=torch.int32)
    tables |= as_csr(block_table) if csr else {"block_table": block_table}
    columns = torch.arange(lengths[0])
    positions = torch.stack([torch.where(columns < n, columns, -1) for n in lengths])
    results = []
    for where, api in ((subject.device, kvarn), ("cpu", reference)):
        call = tables | {"num_quantized": torch.zeros(2, dtype=torch.int32), "committed_lens": torch.tensor(lengths).int()}
        call["raw_pages"] = torch.zeros(8, 2, 2, size, layout.raw_head_dim, dtype=subject.dtype)
        call["pages"] = torch.full(layout.pages_shape(6, 2), 0xFF, dtype=torch.uint8)
        call = moved(call, where)
        slots = api.raw_slots(positions.to(where), call["raw_table"], sink_len=sink_len, page_size=size)
        for row in range(2):
            api.append_tokens(k.to(where), v.to(where), call["raw_pages"], slots[row])
        api.commit_pages(**call, layout=layout, sink_len=sink_len, **options)
        results.append({"slots": slots, **{name: call[name] for name in ("raw_pages", "pages", "num_quantized")}})
    found, expected = results
    yield equal("append_tokens", {name: (found[name], expected[name]) for name in ("slots", "raw_pages")})
    yield equal("commit_pages", {name: (found[name], expected[name]) for name in ("pages", "num_quantized")})


@check("tails: cut back", "cut_back", 2.0)
def _cut(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    layout, size = subject.layout, subject.layout.page_size
    case = cache_case(layout, [16 + 2 * size + 5, 16 + size], sink_len=16, dtype=subject.dtype, num_tail_slots=1)
    names = ("raw_pages", "pages", "raw_table", "block_table", "num_quantized")
    call = {name: getattr(case, name) for name in names} | {"layout": layout, "sink_len": 16}
    call["new_lens"] = torch.tensor([16 + size + 9, 16 + size - 1], dtype=torch.int32)
    for options in ({}, {"advance": False, **as_csr(case.block_table)}):
        found, expected = moved(call | options, subject.device), moved(call | options, "cpu")
        kvarn.cut_back(**found)
        reference.cut_back(**expected)
        pairs = {name: (found[name], expected[name]) for name in ("raw_pages", "num_quantized")}
        yield equal("cut_back", {name: (a.nan_to_num(7.0), b.nan_to_num(7.0)) for name, (a, b) in pairs.items()})


def as_csr(block_table: torch.Tensor) -> dict[str, Any]:
    """Return the page ids of a block table in CSR form."""
    indptr = torch.arange(len(block_table) + 1, dtype=torch.int32) * block_table.shape[1]
    return {"block_table": None, "kv_indptr": indptr.to(block_table.device), "kv_indices": block_table.flatten()}


@check("a look at the tables of a cache", "check_cache", 0.5)
def _look(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    call = cache_case(subject.layout, [200, 64], sink_len=16, dtype=subject.dtype, device=subject.device).kwargs
    kvarn.check_cache(**call | {"window": 100, "keep_sink": True})
    kvarn.check_cache(**call | as_csr(call["block_table"]))
    call["block_table"][0, 0] = len(call["pages"])
    try:
        kvarn.check_cache(**call)
        found = "a page id out of range was not noticed"
    except ValueError:
        found = ""
    yield {"operation": "check_cache", "criterion": "finds what is wrong", "detail": found or "found", "ok": not found}


@check("header of pages", "page_header", 0.1)
def _header(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    header = kvarn.read_page_header(kvarn.page_header(subject.layout, 3, 5))
    ok = header == (subject.layout, 3, 5)
    yield {"operation": "page_header", "criterion": "reads what was written", "detail": str(header), "ok": ok}


@check("merging of partial results", "merge_states", 0.5)
def _merge(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    outs = [subject.draw(5, 8, subject.layout.v_head_dim, shift=i) for i in range(2)]
    lses = [3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    lses[0][1], lses[1][2], lses[1][3] = -torch.inf, -torch.inf, 90.0
    states = [x for pair in zip(outs, lses, strict=True) for x in pair]
    outs, lses = ([*parts, parts[0].flip(0)] for parts in (outs, lses))
    for given in (states, [torch.stack(outs), torch.stack(lses)]):
        merged, lse = kvarn.merge_states(*(x.to(subject.device) for x in given))
        exact, exact_lse = reference.merge_states(*(x.double() for x in given))
        row = {"operation": "merge_states", "criterion": "error <= one rounding"}
        row |= {"error": relative_error(merged.cpu(), exact), "allowed": torch.finfo(subject.dtype).eps}
        same = bool(((lse.cpu() - exact_lse).nan_to_num(0.0).abs() <= 1e-5).all())
        detail = f"{row['error']:.1e}{'' if same else '; lse differs'}"
        yield row | {"detail": detail, "ok": same and row["error"] <= row["allowed"]}


@check("warm-up, and nothing compiled after it", "warmup", 2.0)
def _warm(kvarn: Recorder, subject: Subject) -> Iterator[Row]:
    layout, dtype, device = subject.layout, subject.dtype, torch.device(subject.device)
    table = some_table(kvarn, device)
    case = cache_case(layout, [90], sink_len=16, dtype=dtype, seed=subject.seed, device=subject.device)
    options = {
        "window": 70,
        "keep_sink": True,
        "soft_cap": 5.0,
        "sinks": torch.zeros(8, device=device),
        **as_csr(case.block_table),
    }
    ends, q = torch.tensor([0, 3], dtype=torch.int32, device=device), subject.draw(3, 8, layout.head_dim).to(device)
    kinds = dict.fromkeys(("window", "keep_sink", "soft_cap", "sinks", "csr", "prefill", "past_only"), True)
    others = {"raw_dtype": dtype, "scratch": dtype, "encoder": PUBLISHED, "dequantize": torch.float32, "table": table}
    others |= {"config": SOME_CONFIG, "steps": True, "sink_columns": True, "tree_mask": True, "span_ends": True}
    others["schedules"] = True
    among = {"tree_mask": torch.zeros(3, dtype=torch.int64), "span_ends": torch.zeros(3, dtype=torch.int32)}
    among |= {name: subject.draw(3, 2, d) for name, d in (("k", layout.head_dim), ("v", layout.v_head_dim))}
    with launches_on(device) as launches:
        kvarn.warmup(layout, 8, 2, device, dtype=dtype, **kinds, **others)
        before = set(launches)
        with kvarn.no_compilation():
            kvarn.decode_attention(case.q, **case.kwargs | options, table=table)
            seen = {name: options[name] for name in ("window", "keep_sink", "kv_indptr", "kv_indices")}
            raw = {"raw_table": case.raw_table, "num_quantized": case.num_quantized, "sink_len": 16}
            schedule = kvarn.schedule_decode(layout, case.seq_lens, None, 8, 2, **raw, **seen, dtype=dtype, table=table)
            kvarn.decode_attention(case.q, **case.kwargs | options, table=table, schedule=schedule)
            for given in ({}, moved(among, subject.device)):
                kvarn.prefill_attention(q, cu_seqlens_q=ends, **case.kwargs | options | given, config=SOME_CONFIG)
            kvarn.dequantize_pages(case.pages, case.block_table[0], layout, dtype=torch.float32)
            ids = options["kv_indptr"], options["kv_indices"]
            step = kvarn.plan_step(
                layout, case.seq_lens, None, None, case.raw_table, sink_columns=True, kv_indptr=ids[0], kv_indices=ids[1]
            )  # fmt: skip
            k, v = (torch.zeros(1, 2, d, dtype=dtype, device=device) for d in (layout.head_dim, layout.v_head_dim))
            kvarn.write_tokens(k, v, case.pages, case.raw_pages, step, encoder=PUBLISHED)
    new = ", ".join(sorted({name for name, _ in set(launches) - before}))
    yield {"operation": "warmup", "criterion": "nothing is compiled after it", "detail": new or "nothing", "ok": not new}


@contextlib.contextmanager
def launches_on(device: torch.device) -> Iterator[list[tuple[str, str]]]:
    """Note kernels and their compile-time arguments instead of interpreting them; on a GPU they run, and none is noted."""
    found: list[tuple[str, str]] = []

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        found.append((self.fn.__name__, repr(sorted((key, x) for key, x in kwargs.items() if key.isupper()))))

    if device.type == "cuda" or not gpu.INTERPRETED:
        yield found
        return
    with mock.patch.object(interpreter.GridExecutor, "__call__", note):
        yield found


def some_table(kvarn: Recorder, device: torch.device) -> DecodeTable:
    """Return a table of launch parameters, by way of a file."""
    arch = gpu.arch_of(device) or "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        kvarn.save_table(path, DecodeTable(arch, (Entry(512, DecodeConfig(programs_per_sm=1), "gate"),)))
        return kvarn.load_table(path, arch)
