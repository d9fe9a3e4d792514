"""A step of a server in plain PyTorch: what `plan_step` says of lengths, and writing and attending as it says.

A page of a table holds `page_size` tokens from position `origin + i * page_size` on; `origin` is the length of the sink, or 0
where the table has columns for the sink too. With at most `max_drafts` tokens that may be taken back, a sequence of L tokens
has

    pages that end by L - max_drafts        in quantized form, and
    tokens of pages that end after L - 2 * max_drafts      in the tail ring: whatever is taken back, the ring has the rest.

So which pages a step completes follows from lengths before and after it. Pages that a sequence got from a prefix cache are in
quantized form from the start: `prefix_lens`.

With `early_pages` a page is quantized as soon as its last token is written, and again if that token was taken back. Pages that
end by `computed`, the tokens before the step, are then final, and

    pages that end by max(computed, L - max_drafts)        are read in quantized form, while
    tokens of pages that end after L - max_drafts          are in the tail ring.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from ..encoder import DEFAULT, Encoder
from ..layout import PageLayout
from ..step import Step, StepInputs, inputs_of
from .arithmetic import KERNEL_ORDER, Arithmetic
from .attention import gather_cache, prefill_attention
from .cache import append_tokens, cut_back, encode_records
from .codec import HALF_MAX, hadamard, working_dtype


def flat_tokens(x: torch.Tensor) -> torch.Tensor:
    """Return [batch, heads, n, channels] as [batch * n, heads, channels]; three dimensions as they are."""
    return x.transpose(1, 2).flatten(0, 1) if isinstance(x, torch.Tensor) and x.dim() == 4 else x


@torch.no_grad()
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
    """Plan a step; see `kvarn_triton.plan_step`."""
    inputs = inputs_of(
        layout, seq_lens, cu_seqlens_q, block_table, raw_table, num_tokens, max_query_len, sink_len, sink_columns, rows,
        pages_per_block, max_drafts, prefix_lens, kv_indptr, kv_indices, early_pages,
    )  # fmt: skip
    step = inputs.step(out)
    fill_plan(inputs, step)
    return step


def fill_plan(inputs: StepInputs, step: Step) -> None:
    """Write the plan of a step to its memory, one sequence after the other."""
    step.slots.fill_(-1)
    step.tasks.fill_(-1)
    tables: dict[str, list] = {name: [] for name in ("num_quantized", "sink_lens", "raw_table", "block_table", "kv_indptr")}
    num_tasks = 0
    for b in range(step.batch):
        row = sequence_of(inputs, b)
        for t in range(row.start, min(row.start + row.length - row.computed, step.num_tokens)):
            slot = row.slot(row.computed + t - row.start)
            step.slots[t] = -1 if slot is None else slot
        for i in range(row.begin, min(row.end, row.begin + step.tasks.shape[1] - num_tasks)):
            step.tasks[:, num_tasks] = torch.tensor(row.task(i))
            num_tasks += 1
        skipped = row.inputs.num_sink_pages if inputs.sink_columns and row.sink_len else 0
        shift = inputs.num_sink_pages if row.sink_len < inputs.sink_len else 0
        tables["num_quantized"].append(max(max(row.quantized, row.floor) - skipped, 0))
        tables["sink_lens"].append(row.sink_len)
        tables["raw_table"].append(row.raw_ids[shift:] + [-1] * shift)
        tables["block_table"].append(row.ids[skipped:] + [-1] * min(skipped, len(row.ids)))
        tables["kv_indptr"].append(min(row.first_id + skipped, row.first_id + len(row.ids)))
    if inputs.kv_indptr is not None:
        tables["kv_indptr"].append(int(inputs.kv_indptr[-1]))
    for name in inputs.shapes().keys() & tables.keys():
        memory = getattr(step, name)
        memory.copy_(torch.tensor(tables[name], dtype=torch.int32).view(memory.shape))


@dataclass(frozen=True)
class Sequence:
    """One sequence of a step: its tables and lengths as numbers, and what follows from them."""

    inputs: StepInputs
    ids: list[int]  # of pages, by column
    first_id: int  # number of the first of them among `kv_indices`
    raw_ids: list[int]
    start: int  # number of its first new token among those of the step
    computed: int  # tokens before the new ones
    length: int
    sink_len: int  # raw tokens at the start
    floor: int  # columns whose pages are quantized from the start

    def pages_to(self, length: int) -> int:
        """Return how many columns of pages end by a length."""
        return max(length - self.origin, 0) // self.inputs.layout.page_size

    @property
    def origin(self) -> int:
        """Position of the first token of the first column."""
        return 0 if self.inputs.sink_columns else self.inputs.sink_len

    @property
    def begin(self) -> int:
        """Column of the first page that this step quantizes."""
        return max(self.pages_to(self.computed - self.inputs.delay), self.floor)

    @property
    def end(self) -> int:
        """Column after the last page that has been quantized."""
        return min(self.pages_to(self.length - self.inputs.delay), len(self.ids))

    @property
    def quantized(self) -> int:
        """Column after the last page that is read in quantized form: none of its tokens can be taken back."""
        certain = self.length - self.inputs.max_drafts
        return min(self.pages_to(max(certain, self.computed) if self.inputs.early_pages else certain), len(self.ids))

    @property
    def rounded(self) -> int:
        """Column of the first page whose tokens are in the ring, too."""
        return self.pages_to(self.length - self.inputs.max_drafts - self.inputs.delay)

    def place(self, position: int) -> tuple[int, int]:
        """Return the column of the raw table, and the place in its page, of the token at a position."""
        size, body = self.inputs.layout.page_size, position - self.sink_len
        if body < 0:
            return position // size, position % size
        return self.inputs.num_sink_pages + body // size % self.inputs.num_tail_slots, body % size

    def slot(self, position: int) -> int | None:
        """Return where the token at a position goes in the raw pool, if it does."""
        size = self.inputs.layout.page_size
        in_ring = position >= self.origin and (position - self.origin) // size >= self.rounded
        if position < 0 or not (position < self.sink_len or in_ring):
            return None
        column, place = self.place(position)
        return self.raw_ids[column] * size + place if self.raw_ids[column] >= 0 else None

    def task(self, column: int) -> list[int]:
        """Return a page that completes as `Step.tasks` has it."""
        size = self.inputs.layout.page_size
        first = self.origin + column * size
        older = min(max(self.computed - first, 0), size)
        raw_page = self.raw_ids[self.place(first)[0]]
        rounded = older > 0 or column >= self.rounded
        return [self.ids[column], raw_page, older, self.start + first - self.computed, int(rounded)]


def sequence_of(inputs: StepInputs, b: int) -> Sequence:
    """Return sequence b of a step."""
    request = b if inputs.rows is None else max(int(inputs.rows[b]), 0)
    length, start, count = max(int(inputs.seq_lens[b]), 0), b, 1
    if inputs.cu_seqlens_q is None:
        count = min(length, 1)
    else:
        start = int(inputs.cu_seqlens_q[b])
        count = max(int(inputs.cu_seqlens_q[b + 1]) - start, 0)
    raw_ids, first_id = inputs.raw_table[request].tolist(), 0
    if inputs.block_table is None:
        assert inputs.kv_indptr is not None and inputs.kv_indices is not None
        first_id = int(inputs.kv_indptr[b])
        ids = inputs.kv_indices[first_id : int(inputs.kv_indptr[b + 1])].tolist()
    else:
        blocks, per = inputs.block_table[request].tolist(), inputs.pages_per_block
        ids = [block * per + i if block >= 0 else -1 for block in blocks for i in range(per)]
    sink_len = 0 if inputs.sink_columns and inputs.sink_len and raw_ids[0] < 0 else inputs.sink_len
    prefix_len = 0 if inputs.prefix_lens is None else int(inputs.prefix_lens[request])
    row = Sequence(inputs, ids, first_id, raw_ids, start, length - count, length, sink_len, 0)
    return dataclasses.replace(row, floor=min(row.pages_to(prefix_len), len(ids)))


@torch.no_grad()
def write_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    *,
    encoder: Encoder = DEFAULT,
    arithmetic: Arithmetic = KERNEL_ORDER,
) -> None:
    """Write the tokens of a step; see `kvarn_triton.write_tokens`. `arithmetic` is the order of sums."""
    k, v, layout = flat_tokens(k), flat_tokens(v), step.layout
    for page, raw_page, older, token, rounded in step.tasks.t().tolist():
        if page < 0:
            continue
        tiles = []
        for half, x in enumerate((k, v)):
            new = hadamard(x[token + older : token + layout.page_size].to(working_dtype(x.dtype)), arithmetic=arithmetic)
            if rounded:
                new = new.clamp(-HALF_MAX, HALF_MAX) if raw_pages.dtype == torch.float16 else new
                new = new.to(raw_pages.dtype).to(working_dtype(raw_pages.dtype))
            old = raw_pages[max(raw_page, 0), half, :, :older, : x.shape[-1]]
            tiles.append(torch.cat((old.to(new.dtype), new.transpose(0, 1)), dim=1))
        pages[page] = encode_records(tiles[0], tiles[1], layout, encoder, arithmetic)
    append_tokens(k, v, raw_pages, step.slots)


def tables_of_row(step: Step, b: int) -> dict[str, Any]:
    """Return the tables of one sequence and the length of its raw sink: arguments of `prefill_attention`."""
    sink_len = step.sink_len if step.sink_lens is None else int(step.sink_lens[b])
    num_tail_slots = step.raw_table.shape[1] - -(-step.sink_len // step.layout.page_size)
    raw_table = step.raw_table[b : b + 1, : -(-sink_len // step.layout.page_size) + num_tail_slots]
    tables: dict[str, Any] = {"raw_table": raw_table, "num_quantized": step.num_quantized[b : b + 1], "sink_len": sink_len}
    if step.block_table is not None:
        return tables | {"block_table": step.block_table[b : b + 1]}
    assert step.kv_indptr is not None
    return tables | {"block_table": None, "kv_indptr": step.kv_indptr[b : b + 2], "kv_indices": step.kv_indices}


@torch.no_grad()
def attend(
    q: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    table: object = None,
    keep_sink: bool = False,
    config: object = None,
    tree_mask: torch.Tensor | None = None,
    span_ends: torch.Tensor | None = None,
    past_only: bool = False,
    schedule: object = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries of a step; see `kvarn_triton.attend`."""
    q = flat_tokens(q)
    result = q.new_zeros(*q.shape[:2], step.layout.v_head_dim) if out is None else out
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    if step.cu_seqlens_q is None:
        ends, k, v = torch.arange(step.batch + 1), None, None
    else:
        ends = step.cu_seqlens_q
        k, v = (x if x is None else flat_tokens(x) for x in (k, v))
    for b in range(step.batch):
        span = slice(int(ends[b]), int(ends[b + 1]))
        if span.start >= span.stop:
            continue
        own = torch.tensor([0, span.stop - span.start], dtype=torch.int32, device=q.device)
        new = (None, None) if k is None or v is None else (k[span], v[span])
        masks: dict[str, Any] = {"tree_mask": tree_mask, "span_ends": span_ends}
        masks = {name: x if x is None else x[span] for name, x in masks.items()}
        result[span], lse[span] = prefill_attention(
            q[span], pages, seq_lens=step.seq_lens[b : b + 1], cu_seqlens_q=own, layout=step.layout, raw_pages=raw_pages,
            k=new[0], v=new[1], sm_scale=sm_scale, window=window, soft_cap=soft_cap, sinks=sinks, return_lse=True,
            keep_sink=keep_sink, past_only=past_only, **masks, **tables_of_row(step, b),
        )  # fmt: skip
    return (result, lse) if return_lse else result


@torch.no_grad()
def read_tokens(
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
) -> None:
    """Write the keys and values of sequences to memory; see `kvarn_triton.read_tokens`."""
    for b, length in enumerate(step.seq_lens.tolist()):
        if length <= 0:
            continue
        tables = tables_of_row(step, b)
        tables["num_quantized"] = int(tables["num_quantized"])
        tokens = gather_cache(pages, seq_len=length, layout=step.layout, row=0, raw_pages=raw_pages, **tables)
        start = 0 if starts is None else max(int(starts[b]), 0)
        for result, x in zip((k, v), tokens, strict=True):
            count = min(length, result.shape[2] - start)
            if count > 0:
                result[b, :, start : start + count] = hadamard(x[:, :count]).to(result.dtype)


@torch.no_grad()
def copy_raw_pages(raw_pages: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy raw pages; see `kvarn_triton.copy_raw_pages`."""
    kept = (sources >= 0) & (targets >= 0)
    raw_pages[targets[kept].long()] = raw_pages[sources[kept].long()]


@torch.no_grad()
def cut_tokens(pages: torch.Tensor, raw_pages: torch.Tensor, step: Step, new_lens: torch.Tensor) -> None:
    """Cut the sequences of a step back; see `kvarn_triton.cut_tokens`."""
    for b in range(step.batch):
        cut_back(
            raw_pages, pages, new_lens=new_lens[b : b + 1], layout=step.layout, advance=False, **tables_of_row(step, b)
        )  # fmt: skip
