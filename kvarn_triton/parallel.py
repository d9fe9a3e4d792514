"""Caches spread over several GPUs: each rank of a group has some pages of every sequence, and attends to those alone.

    shard = Shard(rank, size)
    step = plan_step(layout, seq_lens, cu_seqlens_q, own_pages(block_table, shard), raw_table, ...)
    local = local_step(step, shard)                             # once a step, then in every layer
    write_tokens(k, v, pages, raw_pages, step)                  # quantizes what is this rank's
    out = attend(q, pages, raw_pages, local, k=k, v=v)          # one exchange; the result is on all ranks

`pages` holds this rank's pages, `raw_pages` the sinks and tails of all sequences on every rank. Only tensor operations and one
collective of `torch.distributed` are used, or, where GPUs reach each other's memory, an `Exchange`, which is faster: nothing
waits for the GPU, and all of it can be captured. docs/parallel.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .attention.prefill import check_new
from .attention.states import merge_states
from .cache import cache_of, check_queries, checked_for_attention
from .checks import FLOATS, check_count, check_tensor, require
from .exchange import Exchange
from .masking import Mask
from .reference.step import flat_tokens
from .serving.attention import attend as attend_here
from .step import Step

_MASKS = "tree_mask", "span_ends"
_NO_WINDOW = "None: the pages of a rank are not next to each other, so that no window is one of theirs"


@dataclass(frozen=True)
class Shard:
    """Which pages a rank has: of the columns of a table, runs of `pages_per_run` in turn.

    Args:
        rank: the rank, in its group.
        size: ranks of the group.
        pages_per_run: columns in a row that have one owner. 1: page i is rank i % size's. Tables are cut into as many blocks as
            there are ranks by the number of columns divided by `size`, rounded up.

    Raises:
        ValueError: for a number that is none of these.
    """

    rank: int
    size: int
    pages_per_run: int = 1

    def __post_init__(self) -> None:
        check_count("size", self.size, least=1)
        check_count("rank", self.rank)
        require(self.rank < self.size, "rank", f"a number below {self.size}, the size", self.rank)
        check_count("pages_per_run", self.pages_per_run, least=1)

    def owner(self, column: torch.Tensor) -> torch.Tensor:
        """Return the rank that has the pages of columns."""
        return column // self.pages_per_run % self.size

    def count(self, columns: torch.Tensor) -> torch.Tensor:
        """Return how many of the first `columns` columns are this rank's."""
        run, all_runs = self.pages_per_run, self.pages_per_run * self.size
        return columns // all_runs * run + (columns % all_runs - self.rank * run).clamp(0, run)


class LocalStep(NamedTuple):
    """A step as a rank attends to it: `local_step`."""

    step: Step
    """Lengths and tables of what this rank attends to."""
    shard: Shard


def own_pages(block_table: torch.Tensor, shard: Shard, *, pages_per_block: int = 1) -> torch.Tensor:
    """Return a block table with -1 for the pages of other ranks: what `plan_step` gets, so that a rank writes its own alone.

    Args:
        block_table: int32 [rows, columns], the same on all ranks. An id is a place in the pool of the page's owner.
        shard: which columns are this rank's.
        pages_per_block: as `plan_step` gets it; a run of pages is whole blocks.

    Raises:
        ValueError: for a wrong shape or dtype, or a run that is not whole blocks.
    """
    check_tensor("block_table", block_table, [None, None], torch.int32)
    check_count("pages_per_block", pages_per_block, least=1)
    fits = shard.pages_per_run % pages_per_block == 0
    require(fits, "pages_per_block", f"a divisor of pages_per_run, {shard.pages_per_run}", pages_per_block)
    column = torch.arange(block_table.shape[1], dtype=torch.int32, device=block_table.device) * pages_per_block
    return torch.where(shard.owner(column) == shard.rank, block_table, -1)


def local_pages(block_table: torch.Tensor, shard: Shard, skip: torch.Tensor | None = None) -> torch.Tensor:
    """Return the columns of this rank next to each other: a table for attention to its pages.

    Args:
        block_table: int32 [batch, columns].
        shard: which columns are this rank's.
        skip: int32 [batch], columns of the whole table before the first one of `block_table`, of each row; None: none.

    Returns:
        int32 [batch, n], n the same for all ranks. What is in columns after the last page of a rank is of no meaning.
    """
    check_tensor("block_table", block_table, [None, None], torch.int32)
    run, all_runs, columns = shard.pages_per_run, shard.pages_per_run * shard.size, block_table.shape[1]
    width = columns // all_runs * run + min(columns % all_runs, run)
    number = torch.arange(width, dtype=torch.int32, device=block_table.device)[None]
    if skip is not None:
        number = number + shard.count(skip)[:, None]
    column = number // run * all_runs + shard.rank * run + number % run
    if skip is not None:
        column = column - skip[:, None]
    return block_table.gather(1, column.clamp(0, columns - 1).expand(block_table.shape[0], -1).long())


def local_lens(lens: torch.Tensor, page_size: int, shard: Shard, skip: torch.Tensor | None = None) -> torch.Tensor:
    """Return how many of the first `lens` tokens of tables are in pages of this rank: its `seq_lens`, of pages alone.

    Args:
        lens: int32 [batch], tokens in pages; below 0 is taken for 0.
        page_size: tokens of a page.
        shard: which columns are this rank's.
        skip: as in `local_pages`.
    """
    check_tensor("lens", lens, [None], torch.int32)
    lens, before = lens.clamp(min=0), torch.zeros_like(lens) if skip is None else skip
    end = before + (lens + page_size - 1) // page_size
    missing = torch.where(shard.owner(end - 1) == shard.rank, (end - before) * page_size - lens, 0)  # of the last page
    return (shard.count(end) - shard.count(before)) * page_size - missing


def local_step(step: Step, shard: Shard) -> LocalStep:
    """Return what a rank attends to of a step: its pages, and the sinks and tails that are its to attend to.

    The sink and the tail of a sequence are attended to by the owner of the page after its last quantized one. New tokens of a
    chunk count as new on every rank, and `attend` gives their keys to one.

    Args:
        step: `plan_step`, with a block table that has the columns of all ranks, as `own_pages` returns it or whole.
        shard: which columns are this rank's.

    Raises:
        ValueError: for a step with `kv_indices`.
    """
    require(isinstance(step, Step), "step", "a Step", type(step).__name__)
    require(isinstance(shard, Shard), "shard", "a Shard", type(shard).__name__)
    if step.block_table is None:
        raise ValueError("step: expected one with a block_table, got kv_indices, which have no columns of ranks")
    size, lens = step.layout.page_size, step.seq_lens.clamp(min=0)
    new = torch.zeros_like(lens) if step.cu_seqlens_q is None else step.cu_seqlens_q.diff()
    sinks = torch.full_like(lens, step.sink_len) if step.sink_lens is None else step.sink_lens
    skip = None if step.sink_lens is None else sinks // size  # columns of a sink, which `plan_step` has taken away
    cached = (lens - new).clamp(min=0)
    body = (cached - sinks).clamp(min=0)
    in_pages = torch.minimum(body, step.num_quantized.clamp(min=0) * size)
    pages = (in_pages + size - 1) // size

    before = torch.zeros_like(lens) if skip is None else skip
    count = shard.count(before + pages) - shard.count(before)
    has_raw = shard.owner(before + pages) == shard.rank
    raw_tokens = torch.minimum(cached, sinks) + body - in_pages
    local = local_lens(in_pages, size, shard, skip) + torch.where(has_raw, raw_tokens, 0) + new
    # The ring goes on from the last page of this rank, where it went on from the last one of all.
    first, slots = (sinks + size - 1) // size, step.raw_table.shape[1] - -(-step.sink_len // size)
    column = torch.arange(step.raw_table.shape[1], dtype=torch.int32, device=lens.device)[None] - first[:, None]
    turned = first[:, None] + (column + (pages - count)[:, None]) % slots
    in_ring = (column >= 0) & (column < slots)
    raw_table = step.raw_table.gather(1, torch.where(in_ring, turned, column + first[:, None]).long())
    changed: dict[str, Any] = {"seq_lens": torch.where(lens > 0, local, 0), "num_quantized": count}
    changed |= {"block_table": local_pages(step.block_table, shard, skip), "raw_table": raw_table}
    return LocalStep(dataclasses.replace(step, sink_lens=torch.where(has_raw, sinks, 0), **changed), shard)


def attend(
    q: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    local: LocalStep,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    group: Any = None,
    exchange: Exchange | None = None,
    return_lse: bool = False,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries of a step to the pages of all ranks: `kvarn_triton.attend` on each, one exchange, one merge.

    All ranks call it with the same queries and options. Rank 0 attends to the new tokens of a chunk, and to attention sinks.

    Args:
        q: as in `kvarn_triton.attend`, like all that is not explained here.
        pages: this rank's pages.
        raw_pages: the same on all ranks.
        local: `local_step`.
        k: the step's keys. Needed, with `v`, by a step that has `cu_seqlens_q`: a chunk sees its own tokens exactly.
        v: the step's values.
        group: of `torch.distributed`; by default all processes, or those of `exchange`.
        exchange: the same on all ranks: memory through which GPUs exchange results faster than a collective does. Calls with
            more rows than it was made for take the collective.
        return_lse: whether to return the log-sum-exp too.
        options: `sm_scale`, `soft_cap`, `sinks`, `tree_mask`, `span_ends`, `split_size`, `workspace`, `scratch`, `table` and
            `config`.

    Returns:
        `out`, or `out` and `lse`, the same bits on all ranks: what one rank with all pages gives, but for the rounding of each
        rank's part to the dtype of `q`.

    Raises:
        ValueError: for a window, a group of other ranks than `local_step` was made for, or what `kvarn_triton.attend` refuses.
    """
    require(isinstance(local, LocalStep), "local", "a LocalStep", type(local).__name__)
    step, shard = local
    for name, expected in (("window", _NO_WINDOW), ("keep_sink", _NO_WINDOW), ("out", "None"), ("past_only", "None")):
        value = options.get(name)
        require(value is None or value is False, name, expected, "a tensor" if isinstance(value, torch.Tensor) else value)
    if step.cu_seqlens_q is not None:
        require(k is not None and v is not None, "k", "a tensor, and v beside it, with cu_seqlens_q", None)
        options["past_only"] = shard.rank > 0
    if shard.rank > 0:
        _check_for_rank_0(q, k, v, pages, raw_pages, step, options)
        k, v = None, None
        options |= {"sinks": None} | dict.fromkeys(_MASKS[: 0 if step.cu_seqlens_q is None else 2])
    if shard.size == 1:
        return attend_here(q, pages, raw_pages, step, k=k, v=v, return_lse=return_lse, **options)
    group = group if exchange is None else _group_of(exchange, group)
    rank, size = _ranks(group)
    require((rank, size) == (shard.rank, shard.size), "group", f"rank {shard.rank} of {shard.size}", f"rank {rank} of {size}")
    dims = q.dim() if isinstance(q, torch.Tensor) else 0
    check_tensor("q", q, [None] * max(dims, 3), FLOATS, contiguous_dims=0)
    if exchange is not None and step.num_tokens * q.shape[1] <= exchange.max_rows:
        exchange.check(step.layout.v_head_dim, q.dtype, q.device)
        part = attend_here(q, pages, raw_pages, step, k=k, v=v, return_lse=True, **options)
        out, lse = exchange.merge(part[0], part[1])
        return (out, lse) if return_lse else out
    parts = _parts(size, (step.num_tokens, q.shape[1], step.layout.v_head_dim), q.dtype, q.device)
    # What a rank has computed is where it is sent from.
    _, lse = attend_here(q, pages, raw_pages, step, k=k, v=v, out=parts.outs[rank], return_lse=True, **options)
    parts.lses[rank].copy_(lse)
    out, lse = _exchanged(parts, rank, group)
    return (out, lse) if return_lse else out


def _check_for_rank_0(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    options: dict[str, Any],
) -> None:
    """Refuse what rank 0 refuses of what it alone is given: it would leave the others waiting for it."""
    cache = checked_for_attention(cache_of(pages, raw_pages, step), step.batch)
    mask = Mask(None, None, None, options.get("sinks"), False, options.get("tree_mask"), options.get("span_ends"))
    q, k, v = flat_tokens(q), None if k is None else flat_tokens(k), None if v is None else flat_tokens(v)
    check_queries(q, cache, mask, None)
    if step.cu_seqlens_q is not None:
        check_new(q, (k, v), step.cu_seqlens_q, cache, mask)


def merge_ranks(
    out: torch.Tensor, lse: torch.Tensor, group: Any = None, exchange: Exchange | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the merged results of all ranks of a group, on all of them: one exchange, then `merge_states`.

    Args:
        out: float16, bfloat16 or float32 [..., v_head_dim], attention of the same queries to what this rank has.
        lse: float32 [...]; -inf where that is nothing.
        group: of `torch.distributed`; by default all processes, or those of `exchange`.
        exchange: as in `attend`.
    """
    dims = out.dim() if isinstance(out, torch.Tensor) else 0
    check_tensor("out", out, [None] * dims, FLOATS)
    check_tensor("lse", lse, out.shape[:-1], torch.float32, device=out.device, contiguous_dims=0)
    group = group if exchange is None else _group_of(exchange, group)
    if exchange is not None and lse.numel() <= exchange.max_rows:
        return exchange.merge(out.contiguous(), lse.contiguous())
    rank, size = _ranks(group)
    parts = _parts(size, out.shape, out.dtype, out.device)
    parts.outs[rank].copy_(out)
    parts.lses[rank].copy_(lse)
    return _exchanged(parts, rank, group)


class _Parts(NamedTuple):
    """Results of all ranks as they are exchanged."""

    memory: torch.Tensor  # uint8 [size, bytes]
    outs: torch.Tensor  # [size, ..., v_head_dim]
    lses: torch.Tensor  # float32 [size, ...]


def _parts(size: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Parts:
    """Return memory for the results of all ranks, in which kernels take each as it is."""
    rows, line = math.prod(shape[:-1]), 64
    out_bytes = rows * shape[-1] * dtype.itemsize
    start = -(-out_bytes // line) * line
    memory = torch.empty(size, start + max(-(-4 * rows // line), 1) * line, dtype=torch.uint8, device=device)
    outs = memory[:, :out_bytes].view(dtype).view(size, *shape)
    return _Parts(memory, outs, memory[:, start : start + 4 * rows].view(torch.float32).view(size, *shape[:-1]))


def _ranks(group: Any) -> tuple[int, int]:
    """Return the rank of this process in a group, and how many there are."""
    from torch import distributed

    return distributed.get_rank(group), distributed.get_world_size(group)


def _group_of(exchange: Exchange, group: Any) -> Any:
    """Return the group of an exchange, which a given group must be."""
    require(isinstance(exchange, Exchange), "exchange", "an Exchange", type(exchange).__name__)
    require(group is None or group is exchange.group, "group", "None, or the group of exchange", "another")
    return exchange.group


def _exchanged(parts: _Parts, rank: int, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the parts of all ranks to all of them, and merge them."""
    from torch import distributed

    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # until torch 2.12
    gather(parts.memory.view(-1), parts.memory[rank], group=group)
    return merge_states(parts.outs, parts.lses)
