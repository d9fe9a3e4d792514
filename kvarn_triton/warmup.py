"""Compile everything ahead of serving."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import torch

from . import configs, gpu
from .attention.decode import decode_attention
from .attention.decode_schedule import schedule_decode, schedule_step
from .attention.prefill import prefill_attention
from .attention.prefill_plan import other_configs, sizes_of_heads
from .attention.states import merge_states
from .attention.workspace import merge_sizes
from .checks import FLOATS, check_choice, require
from .encoder import DEFAULT, Encoder
from .layout import PageLayout
from .pages.append import append_tokens
from .pages.commit import commit_pages
from .pages.cut import cut_back
from .pages.dequantize import dequantize_pages
from .pages.store import store_pages
from .serving.attention import attend
from .serving.move import copy_raw_pages, cut_tokens
from .serving.plan import plan_every_way
from .serving.read import read_tokens
from .serving.write import write_tokens
from .step import TASK_FIELDS, Step
from .tables import DecodeTable, PrefillConfig, builtin_table


def warmup(
    layout: PageLayout,
    num_q_heads: int,
    num_kv_heads: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    raw_dtype: torch.dtype | None = None,
    encoder: Encoder = DEFAULT,
    table: DecodeTable | None = None,
    config: PrefillConfig | None = None,
    window: bool = False,
    keep_sink: bool = False,
    soft_cap: bool = False,
    sinks: bool = False,
    csr: bool = False,
    prefill: bool = False,
    past_only: bool = False,
    scratch: torch.dtype | None = None,
    dequantize: torch.dtype | None = None,
    steps: bool = False,
    sink_columns: bool = False,
    tree_mask: bool = False,
    span_ends: bool = False,
    schedules: bool = False,
) -> None:
    """Compile, and load, every kernel that a server's steps launch for one model: decode, append, commit, store, cut and merge.

    Nothing depends on batch sizes, lengths, page counts, the size of the sink or of the window, nor on addresses and strides of
    tensors: one call serves them all. (Strides of 2**31 elements and more are numbers of 64 bits, which kernels of their own
    take.) Activations and results whose address is no multiple of 16 bytes, or whose strides are none of 16 elements, are
    copied; pools with such strides are refused. Cost: some seconds for each kernel that is not in Triton's cache on disk.
    Tensors of a few pages are allocated and dropped.

    Five options, from `window` on, are one kind of attention call, which all layers of many models share. Where layers differ,
    as in models that have a window in every other layer, call it once for each kind: what they share is compiled once. The same
    goes for calls of prefill attention that get another `config`, or none.

    Args:
        layout: the page format.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        device: where the server runs; on a CPU there is nothing to do.
        dtype: float16, bfloat16 or float32, of queries, keys and values.
        raw_dtype: dtype of the raw pages; by default `dtype`.
        encoder: options of the encoder.
        table: as given to `decode_attention`.
        config: as given to `prefill_attention`, with `scratch` and without.
        window: whether attention gets a `window`; of any size.
        keep_sink: as attention gets it.
        soft_cap: whether attention gets a `soft_cap`.
        sinks: whether attention gets `sinks`.
        csr: whether page ids come as `kv_indptr` and `kv_indices`.
        prefill: whether `prefill_attention` is called too, on raw pages of `raw_dtype`, with and without new keys and values.
        past_only: whether some calls of `prefill_attention` get it.
        scratch: dtype of the `scratch` that some calls of `prefill_attention` get; None if none do.
        dequantize: dtype of what `dequantize_pages` and `read_tokens` give; None if they are not called.
        steps: whether `plan_step`, `write_tokens`, `attend` and `copy_raw_pages` are called.
        sink_columns: as `plan_step` gets it.
        tree_mask: whether prefill attention gets a `tree_mask` in some of its calls with new keys and values.
        span_ends: whether it gets `span_ends` in some; in the same ones, if there are both.
        schedules: whether `schedule_decode` and `schedule_step` are called, and decode attention gets what they make.

    Raises:
        ValueError: for a wrong option.
    """
    check_choice("dtype", dtype, FLOATS)
    raw_dtype = dtype if raw_dtype is None else raw_dtype
    check_choice("raw_dtype", raw_dtype, FLOATS)
    if scratch is not None:
        check_choice("scratch", scratch, (torch.float32,) if dtype == torch.float32 else (torch.float16, torch.bfloat16))
        require(prefill, "prefill", "True beside scratch", prefill)
    require(prefill or not past_only, "prefill", "True beside past_only", prefill)
    if config is not None:
        require(prefill, "prefill", "True beside config", prefill)
        configs.check_prefill_config(config, layout, dtype, scratch is not None)
    require(prefill or not (tree_mask or span_ends), "prefill", "True beside tree_mask and span_ends", prefill)
    if dequantize is not None:
        check_choice("dequantize", dequantize, FLOATS)
    require(steps or not sink_columns, "sink_columns", "False without steps", sink_columns)
    require(num_kv_heads >= 1 and num_q_heads % num_kv_heads == 0, "num_q_heads", "a multiple of num_kv_heads", num_q_heads)
    size = layout.page_size
    pages = torch.zeros(layout.pages_shape(2, num_kv_heads), dtype=torch.uint8, device=device)
    if not gpu.on_device(pages):
        return
    raw_pages = torch.zeros(2, 2, num_kv_heads, size, layout.raw_head_dim, dtype=raw_dtype, device=device)
    k, v = (torch.zeros(size, num_kv_heads, d, dtype=dtype, device=device) for d in (layout.head_dim, layout.v_head_dim))
    # Rows of length 0, ids and slots below 0: the kernels find nothing to do.
    columns, lens = torch.zeros(2, 3, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"window": 1, "keep_sink": keep_sink} if window else {}
    if soft_cap:
        options["soft_cap"] = 1.0
    if sinks:
        options["sinks"] = torch.zeros(num_q_heads, device=device)
    model = _Model(layout, num_q_heads, dtype, csr)
    for shifted in {False, sink_columns}:
        some = options | {"keep_sink": False} if shifted and window else options
        _warm_decode(model, pages, raw_pages, {"table": table, **some}, shifted, (False, True) if schedules else (False,))
        among = past_only, tree_mask, span_ends
        own = dtype if config is None and dtype != torch.float32 else None  # of long chunks that get no scratch
        for memory in {None, scratch, own} if prefill else ():
            _warm_prefill(model, pages, raw_pages, memory, {"config": config, **some}, shifted, among)
    if steps:
        _warm_steps(model, (k[:1], v[:1]), pages, raw_pages, sink_columns, encoder)
        if dequantize is not None:
            _warm_reads(model, pages, raw_pages, sink_columns, dequantize)
    _warm_pages(layout, (k, v), pages, raw_pages, encoder, dequantize)
    state, lse = (torch.zeros(1, n, dtype=d, device=device) for n, d in ((layout.v_head_dim, dtype), (1, torch.float32)))
    merge_states(state, lse[0], state, lse[0])
    block_table, indices = _body_tables(columns, csr)
    cut_back(raw_pages, pages, columns, block_table, lens, lens, layout, **indices)
    commit_pages(raw_pages, pages, columns, block_table, lens, lens, layout, encoder=encoder, **indices)


def _warm_pages(
    layout: PageLayout,
    new: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    encoder: Encoder,
    dequantize: torch.dtype | None,
) -> None:
    """Compile what stores tokens and pages, and what dequantizes them, for ids of both dtypes."""
    k, v = new
    for ids in (torch.int32, torch.int64):
        slots = torch.full((layout.page_size,), -1, dtype=ids, device=pages.device)
        count = configs.append_block(layout.raw_head_dim)
        while count:
            append_tokens(k[:count], v[:count], raw_pages, slots[:count])
            count //= 2
        page_ids = torch.full((1,), -1, dtype=ids, device=pages.device)
        store_pages(k, v, pages, page_ids, layout, encoder=encoder)
        store_pages(k, v, pages, page_ids, layout, token_starts=page_ids, encoder=encoder)
        if dequantize is not None:
            for rotated in (False, True):
                dequantize_pages(pages, page_ids, layout, dtype=dequantize, rotated=rotated)


def _body_tables(columns: torch.Tensor, csr: bool) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Return a block table, or None and CSR tables of as many ids."""
    if not csr:
        return columns, {}
    indptr = torch.zeros(columns.shape[0] + 1, dtype=torch.int32, device=columns.device)
    return None, {"kv_indptr": indptr, "kv_indices": columns.flatten()}


def _step(
    layout: PageLayout,
    lens: torch.Tensor,
    ends: torch.Tensor | None,
    tables: dict[str, Any],
    raw_table: torch.Tensor,
    shifted: bool,
) -> Step:
    """Return the plan of a step in which nothing happens; `shifted`: sinks are of the sequences' own lengths."""
    none = torch.empty(TASK_FIELDS, 0, dtype=torch.int32, device=lens.device)
    count = lens.shape[0] if ends is None else 0
    tables = {"block_table": None, "kv_indptr": None, "kv_indices": None} | tables
    return Step(
        layout=layout, seq_lens=lens, cu_seqlens_q=ends, raw_table=raw_table, num_quantized=lens,
        sink_lens=lens if shifted else None, slots=torch.full((count,), -1, device=lens.device), tasks=none, sink_len=0,
        max_query_len=1, at_once=True, **tables,
    )  # fmt: skip


class _Model(NamedTuple):
    """What all calls have in common."""

    layout: PageLayout
    num_q_heads: int
    dtype: torch.dtype
    csr: bool


def _warm_decode(
    model: _Model,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    options: dict[str, Any],
    shifted: bool,
    schedules: tuple[bool, ...],
) -> None:
    """Compile decode attention, without schedules and with them, and its merge for every number of partial results."""
    layout, num_q_heads, dtype, csr = model
    device, num_kv_heads = pages.device, pages.shape[1]
    table, size_heads = options["table"], (num_q_heads, num_kv_heads)
    shared: dict[str, Any] = {name: options[name] for name in ("window", "keep_sink") if name in options}
    few = [] if table is not None else sizes_of_heads(layout, dtype, device, size_heads)
    ways: list[tuple[DecodeTable | None, tuple[int, int, bool]]] = [(None, size) for size in few]
    # Calls that get a table take the usual kernel, whatever their sizes are.
    table = table or (builtin_table(gpu.arch_of(device)) if few else None)
    ways += [(table, size) for size in merge_sizes(layout, dtype, device, size_heads, csr, table)]
    for table, (batch, width, has_raw) in ways:
        if shifted and not has_raw:
            continue
        q = torch.zeros(batch, num_q_heads, layout.head_dim, dtype=dtype, device=device)
        columns, raw_table = (torch.zeros(batch, n, dtype=torch.int32, device=device) for n in (width, 1))
        lens = torch.zeros(batch, dtype=torch.int32, device=device)
        block_table, indices = _body_tables(columns, csr)
        step = _step(layout, lens, None, {"block_table": block_table, **indices}, raw_table, shifted)
        raw: dict[str, Any] = {"raw_table": raw_table, "num_quantized": lens} if has_raw else {}
        for return_lse, split_size, planned in itertools.product((False, True), (None, 1), schedules):
            given: dict[str, Any] = {**options, "return_lse": return_lse, "split_size": split_size, "table": table}
            heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
            some: dict[str, Any] = {"split_size": split_size, "dtype": dtype, "table": table, **heads, **shared}
            if shifted:
                given["schedule"] = schedule_step(step, **some) if planned else None
                attend(q, pages, raw_pages, step, **given)
            else:
                tables: dict[str, Any] = indices | raw
                given["schedule"] = schedule_decode(layout, lens, block_table, **tables, **some) if planned else None
                memory: dict[str, Any] = {"raw_pages": raw_pages} if has_raw else {}
                decode_attention(q, pages, block_table, lens, layout, **tables, **memory, **given)


def _warm_prefill(
    model: _Model,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    scratch: torch.dtype | None,
    options: dict[str, Any],
    shifted: bool,
    among: tuple[bool, bool, bool],
) -> None:
    """Compile prefill attention for tiles of all sizes, with one run of pages, a few and many, and scratch memory if any.

    `among`: whether some calls are `past_only`, have a tree mask, and ends of spans.
    """
    layout, num_q_heads, dtype, csr = model
    shape = 65, pages.shape[1]
    k, v = (torch.zeros(*shape, d, dtype=dtype, device=pages.device) for d in (layout.head_dim, layout.v_head_dim))
    lens = torch.zeros(1, dtype=torch.int32, device=pages.device)
    ends = torch.zeros(2, dtype=torch.int32, device=pages.device)
    raw_table = torch.zeros(1, 2, dtype=torch.int32, device=pages.device)
    group = num_q_heads // pages.shape[1]
    kinds = ("tree_mask", torch.int64), ("span_ends", torch.int32)
    masks = dict(kind for kind, some in zip(kinds, among[1:], strict=True) if some)
    for count in sorted({max(rows // group, 1) for rows in configs.TILE_ROWS} | {65}):
        q = torch.zeros(count, num_q_heads, layout.head_dim, dtype=dtype, device=pages.device)
        for columns, split_size in ((1, None), (2, None), (4096, None), (2, 1), (64, 1)):
            block_table, indices = _body_tables(torch.zeros(1, columns, dtype=torch.int32, device=pages.device), csr)
            step = _step(layout, lens, ends, {"block_table": block_table, **indices}, raw_table, shifted)
            step = dataclasses.replace(step, slots=torch.full((count,), -1, device=pages.device))
            raw: dict[str, Any] = {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": lens}
            memory = {}  # one slot for all columns: nothing is written
            if scratch is not None:
                memory["scratch"] = raw_pages.new_empty(1, *raw_pages.shape[1:], dtype=scratch).expand(columns, -1, -1, -1, -1)
            given: list[dict[str, Any]] = [{}, {"k": k[:count], "v": v[:count]}]
            if masks:
                given.append(given[1] | {name: torch.zeros(count, dtype=kind, device=q.device) for name, kind in masks.items()})
            given += [{"past_only": True}] * among[0]
            others = other_configs(layout, dtype, q.device, count, group) if split_size is None and not memory else []
            ways = [options, *(options | {"config": other} for other in others if options.get("config") is None)]
            for keys, return_lse, way in itertools.product(given, (False, True), ways):
                some = {"return_lse": return_lse, "split_size": split_size, **keys, **memory, **way}
                if shifted:
                    attend(q, pages, raw_pages, step, **some)
                else:
                    prefill_attention(q, pages, block_table, lens, ends, layout, **indices, **raw, **some)


def _warm_steps(
    model: _Model,
    new: tuple[torch.Tensor, torch.Tensor],
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    sink_columns: bool,
    encoder: Encoder,
) -> None:
    """Compile the plan of steps with and without every argument, what they write, and copies of raw pages."""
    layout, csr = model.layout, model.csr
    ints: dict[str, Any] = {"dtype": torch.int32, "device": pages.device}
    lens, columns, ids = torch.zeros(1, **ints), torch.zeros(1, 3, **ints), torch.full((1,), -1, **ints)
    block_table, indices = _body_tables(columns, csr)
    step = plan_every_way(layout, lens, block_table, columns, sink_columns=sink_columns, **indices)
    for at_once in (True, False):
        write_tokens(*new, pages, raw_pages, dataclasses.replace(step, at_once=at_once), encoder=encoder)
    cut_tokens(pages, raw_pages, step, lens)
    copy_raw_pages(raw_pages, ids, ids)


def _warm_reads(model: _Model, pages: torch.Tensor, raw_pages: torch.Tensor, shifted: bool, dtype: torch.dtype) -> None:
    """Compile `read_tokens`."""
    layout, csr = model.layout, model.csr
    ints: dict[str, Any] = {"dtype": torch.int32, "device": pages.device}
    lens, columns = torch.zeros(1, **ints), torch.zeros(1, 3, **ints)
    block_table, indices = _body_tables(columns, csr)
    step = _step(layout, lens, None, {"block_table": block_table, **indices}, columns, shifted)
    shape = 1, pages.shape[1], 1
    k, v = (torch.zeros(*shape, d, dtype=dtype, device=pages.device) for d in (layout.head_dim, layout.v_head_dim))
    for starts in (None, lens):
        read_tokens(pages, raw_pages, step, k, v, starts=starts)
