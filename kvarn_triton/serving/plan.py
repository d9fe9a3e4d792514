"""The first call of a step: plan it for all layers."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from .. import gpu, reference
from ..cache import check_body_tables, check_raw_table
from ..checks import check_count, check_tensor, require
from ..layout import PageLayout
from ..step import Step, StepInputs, inputs_of
from .plan_kernel import launch_plan_step


def plan_step(
    layout: PageLayout,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    block_table: torch.Tensor | None,
    raw_table: torch.Tensor,
    *,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
    sink_len: int = 0,
    sink_columns: bool = False,
    rows: torch.Tensor | None = None,
    pages_per_block: int = 1,
    max_drafts: int = 0,
    prefix_lens: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    early_pages: bool = False,
    out: Step | None = None,
) -> Step:
    """Plan one step of a server for all of its layers, on the device: one launch, and nothing is read back.

    Which pages are quantized follows from lengths, so no count is kept between steps: a page is quantized in the step that
    writes its last token, or, with `max_drafts` and without `early_pages`, as many tokens later. Then, in every layer,
    `write_tokens` and `attend`.

    Args:
        layout: the page format.
        seq_lens: int32 [batch], tokens of each sequence, those of this step included. 0: padding; nothing is written or read.
        cu_seqlens_q: int32 [batch + 1]; the new tokens of sequence b are those from cu_seqlens_q[b] to cu_seqlens_q[b + 1].
            Tokens before the first and after the last number are padding. None: one new token for each sequence, its last.
        block_table: int32 [batch, max_blocks], ids that are set before pages complete; a page with an id below 0 is not
            written. None with `kv_indptr` and `kv_indices`.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]. The ring needs (2 * max_drafts + page_size - 2) //
            page_size + 1 slots, with `early_pages` (max_drafts + page_size - 2) // page_size + 1; with one for each page that a
            step's tokens, and without `early_pages` `max_drafts` more, can touch, a step is written by one launch, else by two.
        num_tokens: new tokens of all sequences, padding included: the first size of `k`. Needed beside `cu_seqlens_q`.
        max_query_len: most new tokens of a sequence; by default `num_tokens`.
        sink_len: tokens at the start of every sequence that stay raw.
        sink_columns: whether tables begin at position 0: `block_table` has columns for the pages of the sink too, and
            `sink_len` is a multiple of `page_size`. Then sink pages are also quantized, each to its own block, and a sequence
            whose raw id in the first column is below 0 has no raw sink: it came from a prefix cache, and its first pages are
            read from `pages` like all others.
        rows: int32 [batch], the row of `block_table`, `raw_table` and `prefix_lens` that each sequence has: those tables then
            have a row for each request that is alive, in any order. Not of `kv_indptr`. Below 0 is taken for 0.
        pages_per_block: pages of a block, if ids are those of blocks: page i of block b is `pages[b * pages_per_block + i]`.
        max_drafts: most tokens at the end of a sequence that may be taken back afterwards, by a smaller `seq_lens` in the next
            step.
        prefix_lens: int32 [batch], tokens that each sequence got in quantized form when it began; needed if it got any,
            `max_drafts` is above 0 and `early_pages` is False.
        kv_indptr: int32 [batch + 1], rising; where the page ids of each sequence begin in `kv_indices`, and the last one's end.
        kv_indices: int32 [n], page ids.
        early_pages: whether a page is quantized in the step that writes its last token, draft or not, and once more if that
            token was taken back. The sequence itself reads it when its tokens are certain, from the ring until then; another
            one may get it from a prefix cache as soon as its tokens are accepted. Without drafts it changes nothing. The same
            in all steps of a sequence.
        out: the plan of another step with the same tensors, sizes and options, to be written to: for captured graphs that
            don't capture this call.

    Returns:
        `Step`. It has views of tables that are needed as they are; the others are copied once for all layers.

    Raises:
        ValueError: for a wrong shape, dtype, device or option. Ids and lengths are not read to be checked.
    """
    return plan_from(
        inputs_of(
            layout, seq_lens, cu_seqlens_q, block_table, raw_table, num_tokens, max_query_len, sink_len, sink_columns, rows,
            pages_per_block, max_drafts, prefix_lens, kv_indptr, kv_indices, early_pages,
        ),
        out,
    )  # fmt: skip


def plan_from(inputs: StepInputs, out: Step | None) -> Step:
    """Check what a step is planned from, and plan it."""
    _check(inputs)
    step = inputs.step(out)
    if gpu.on_device(inputs.seq_lens):
        launch_plan_step(inputs, step)
    else:
        reference.step.fill_plan(inputs, step)
    return step


def _check(inputs: StepInputs) -> None:
    """Check what a step is planned from."""
    seq_lens, layout, sink_len = inputs.seq_lens, inputs.layout, inputs.sink_len
    check_tensor("seq_lens", seq_lens, [None], torch.int32)
    batch, device = seq_lens.shape[0], seq_lens.device
    check_count("num_tokens", inputs.num_tokens)
    check_count("max_query_len", inputs.max_query_len)
    if inputs.cu_seqlens_q is not None:
        check_tensor("cu_seqlens_q", inputs.cu_seqlens_q, [batch + 1], torch.int32, device=device)
    check_tensor("raw_table", inputs.raw_table, [batch if inputs.rows is None else None, None], torch.int32, device=device)
    requests, csr = inputs.raw_table.shape[0], inputs.block_table is None
    check_body_tables(inputs.block_table, inputs.kv_indptr, inputs.kv_indices, batch if csr else requests, device)
    check_raw_table(inputs.raw_table, sink_len, layout.page_size)
    for name, tensor, length in (("rows", inputs.rows, batch), ("prefix_lens", inputs.prefix_lens, requests)):
        if tensor is not None:
            check_tensor(name, tensor, [length], torch.int32, device=device)
    require(isinstance(inputs.sink_columns, bool), "sink_columns", "a bool", inputs.sink_columns)
    fits = not (inputs.sink_columns and sink_len % layout.page_size)
    require(fits, "sink_columns", f"False where sink_len is no multiple of {layout.page_size}", inputs.sink_columns)
    check_count("pages_per_block", inputs.pages_per_block, least=1)
    require(not csr or inputs.pages_per_block == 1, "pages_per_block", "1 beside kv_indices", inputs.pages_per_block)
    check_count("max_drafts", inputs.max_drafts)
    require(isinstance(inputs.early_pages, bool), "early_pages", "a bool", inputs.early_pages)
    least = inputs.least_tail_slots
    expected = f"a number for which the {inputs.num_tail_slots} tail slots of raw_table suffice ({least} are needed)"
    require(inputs.num_tail_slots >= least, "max_drafts", expected, inputs.max_drafts)


def plan_every_way(
    layout: PageLayout,
    lens: torch.Tensor,
    block_table: torch.Tensor | None,
    raw_table: torch.Tensor,
    *,
    sink_columns: bool = False,
    **indices: Any,
) -> Step:
    """Plan a step in which nothing happens with and without every argument, so that all of it is compiled; return a plan."""
    ends = torch.zeros(2, dtype=torch.int32, device=lens.device)
    sizes: tuple[dict[str, Any], ...] = ({"cu_seqlens_q": None}, {"cu_seqlens_q": ends, "num_tokens": 1})
    some, per_block = (None, lens), (1,) if indices else (1, 2)
    for size, rows, prefix_lens, per, early in itertools.product(sizes, some, some, per_block, (False, True)):
        step = plan_step(
            layout, lens, block_table=block_table, raw_table=raw_table, rows=rows, prefix_lens=prefix_lens, pages_per_block=per,
            sink_columns=sink_columns, sink_len=layout.page_size if sink_columns else 0, max_drafts=int(early),
            early_pages=early, **size, **indices,
        )  # fmt: skip
    return step
