"""What a call is about: a cache, and where results go. Each is one object, made and checked once per call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from .checks import FLOATS, check_aligned, check_choice, check_pages, check_tensor, require
from .launch import Pages, Tokens, aligned, as_pages, as_tokens, check_pool
from .layout import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES, PageLayout
from .masking import Mask, check_among, check_mask
from .step import Step


@dataclass(eq=False)
class Cache:
    """Where the keys and values of sequences are: arguments of the same names of every call over a cache.

    `seq_lens` are the lengths that the call goes by, whatever it calls them. A call first checks it (`checked_for_...`), and
    kernels then take it as it is.
    """

    layout: PageLayout
    pages: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor | None
    kv_indptr: torch.Tensor | None
    kv_indices: torch.Tensor | None
    raw_pages: torch.Tensor | None
    raw_table: torch.Tensor | None
    num_quantized: torch.Tensor | None
    sink_len: int
    sink_lens: torch.Tensor | None = None
    """int32 [batch], `sink_len` or 0; None: `sink_len` for all. Where it is 0, the tail ring begins in column 0."""

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.seq_lens.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """How many key/value heads there are."""
        return self.pages.shape[1]

    @property
    def csr(self) -> bool:
        """Whether page ids come as `kv_indptr` and `kv_indices`."""
        return self.block_table is None

    @property
    def ids(self) -> torch.Tensor:
        """The page ids: a block table [batch, max_pages], or those of all sequences [n]."""
        ids = self.kv_indices if self.block_table is None else self.block_table
        assert ids is not None
        return ids

    @property
    def max_pages(self) -> int:
        """Columns of the block table, or the number of `kv_indices`, which bounds the pages of all sequences together."""
        return self.ids.shape[-1]

    @property
    def num_sink_pages(self) -> int:
        """Columns of the raw table for sinks."""
        return -(-self.sink_len // self.layout.page_size)

    @property
    def max_raw_pages(self) -> int:
        """Columns of the raw table; 0 without one."""
        return 0 if self.raw_table is None else self.raw_table.shape[1]

    def rows(self, first: int, last: int) -> Cache:
        """Return the cache of sequences `first` to `last` alone."""
        ends = {"kv_indptr": last + 1}
        names = ("seq_lens", "block_table", "kv_indptr", "raw_table", "num_quantized", "sink_lens")
        tensors = ((name, getattr(self, name)) for name in names)
        parts: dict[str, Any] = {name: x if x is None else x[first : ends.get(name, last)] for name, x in tensors}
        return dataclasses.replace(self, **parts)

    def tables(self) -> dict[str, Any]:
        """Return the arguments of kernels that say where the pages of sequences are, by name."""
        return {
            "table_ptr": self.ids,
            "indptr_ptr": self.kv_indptr,
            "seq_lens_ptr": self.seq_lens,
            "num_quantized_ptr": self.num_quantized,
            "sink_len": self.sinks,
            "stride_table": 0 if self.block_table is None else self.block_table.stride(0),
        }

    def raw_tables(self) -> dict[str, Any]:
        """Return the arguments of kernels that say where raw pages are, by name."""
        return {
            "raw": self.raw,
            "raw_table_ptr": self.raw_table,
            "num_tail_slots": self.max_raw_pages - self.num_sink_pages,
            "stride_raw_table": 0 if self.raw_table is None else self.raw_table.stride(0),
        }

    @property
    def sinks(self) -> int | torch.Tensor:
        """The lengths of sinks as an argument of kernels: one for all, or one for each."""
        return self.sink_len if self.sink_lens is None else self.sink_lens

    @property
    def quantized(self) -> Pages:
        """The quantized pages as an argument of kernels."""
        return as_pages(self.pages)

    @property
    def raw(self) -> Tokens | None:
        """The raw pages as an argument of kernels."""
        return as_tokens(self.raw_pages)


def check_raw_pages(raw_pages: object, num_kv_heads: int | None = None, device: torch.device | None = None) -> None:
    """Check a tensor of raw pages."""
    check_tensor("raw_pages", raw_pages, [None, 2, num_kv_heads, None, None], FLOATS, device=device)
    assert isinstance(raw_pages, torch.Tensor)
    check_choice("raw_pages.shape[3]", raw_pages.shape[3], SUPPORTED_PAGE_SIZES)
    check_choice("raw_pages.shape[4]", raw_pages.shape[4], SUPPORTED_HEAD_DIMS)


def check_raw_table(raw_table: torch.Tensor, sink_len: int, page_size: int) -> None:
    """Check that a raw table has room for the sink pages and at least one tail slot."""
    require(isinstance(sink_len, int) and sink_len >= 0, "sink_len", "an integer of at least 0", sink_len)
    least = -(-sink_len // page_size) + 1
    if raw_table.shape[1] < least:
        raise ValueError(
            f"raw_table: expected at least {least} columns (sink pages and one tail slot), got {raw_table.shape[1]}"
        )


def check_body_tables(
    block_table: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    batch: int | None,
    device: torch.device,
) -> int:
    """Check the page ids of the body, which come in exactly one of two forms, and return the number of sequences.

    Args:
        block_table: int32 [batch, max_pages], or None.
        kv_indptr: int32 [batch + 1], or None.
        kv_indices: int32 [n], or None.
        batch: sequences that there must be; None allows any number.
        device: where the tables must be.
    """
    if block_table is not None:
        require(kv_indptr is None, "kv_indptr", "None beside block_table", type(kv_indptr).__name__)
        require(kv_indices is None, "kv_indices", "None beside block_table", type(kv_indices).__name__)
        check_tensor("block_table", block_table, [batch, None], torch.int32, device=device)
        return block_table.shape[0]
    if kv_indptr is None and kv_indices is None:
        raise ValueError("block_table: expected a tensor, or kv_indptr and kv_indices, got None")
    check_tensor("kv_indptr", kv_indptr, [None if batch is None else batch + 1], torch.int32, device=device)
    check_tensor("kv_indices", kv_indices, [None], torch.int32, device=device)
    assert kv_indptr is not None
    require(kv_indptr.shape[0] >= 1, "kv_indptr", "at least 1 element", kv_indptr.shape[0])
    return kv_indptr.shape[0] - 1


def check_plan(pages: object, step: object) -> None:
    """Check that a step is one, and that pages are where its tables are."""
    require(isinstance(step, Step), "step", "a Step", type(step).__name__)
    assert isinstance(step, Step)
    device = step.seq_lens.device
    if isinstance(pages, torch.Tensor) and pages.device != device:
        raise ValueError(f"pages: expected device {device}, got {pages.device}")


def cache_of(pages: torch.Tensor, raw_pages: torch.Tensor, step: Step) -> Cache:
    """Return the cache that a plan and the pools of a layer are, as it is given."""
    check_plan(pages, step)
    return Cache(
        step.layout, pages, step.seq_lens, step.block_table, step.kv_indptr, step.kv_indices, raw_pages, step.raw_table,
        step.num_quantized, step.sink_len, step.sink_lens,
    )  # fmt: skip


def checked_for_attention(cache: Cache, batch: int | None) -> Cache:
    """Check the cache of an attention call for `batch` sequences, None for any number; return it as kernels take it."""
    layout, device = cache.layout, cache.pages.device if isinstance(cache.pages, torch.Tensor) else None
    num_kv_heads = check_pages(cache.pages, layout)
    check_tensor("seq_lens", cache.seq_lens, [batch], torch.int32, device=device)
    batch = cache.batch
    check_body_tables(cache.block_table, cache.kv_indptr, cache.kv_indices, batch, cache.pages.device)
    cache.pages = aligned(cache.pages)
    if cache.raw_pages is None:
        if cache.raw_table is not None or cache.num_quantized is not None or cache.sink_len:
            raise ValueError("raw_pages: expected a tensor beside raw_table, num_quantized or sink_len, got None")
        return cache
    raw_shape = [None, 2, num_kv_heads, layout.page_size, layout.raw_head_dim]
    check_tensor("raw_pages", cache.raw_pages, raw_shape, FLOATS, device=device)
    check_tensor("raw_table", cache.raw_table, [batch, None], torch.int32, device=device)
    assert cache.raw_table is not None
    check_raw_table(cache.raw_table, cache.sink_len, layout.page_size)
    check_tensor("num_quantized", cache.num_quantized, [batch], torch.int32, device=device)
    cache.raw_pages = check_pool("raw_pages", cache.raw_pages)
    return cache


def checked_for_completion(cache: Cache, lens_name: str) -> Cache:
    """Check the cache of a call that changes which pages are quantized, whose lengths have a name of their own.

    Returns it as kernels take it.
    """
    layout, raw_pages = cache.layout, cache.raw_pages
    num_kv_heads = check_pages(cache.pages, layout)
    device = cache.pages.device
    check_raw_pages(raw_pages, num_kv_heads, device)
    assert raw_pages is not None
    require(raw_pages.shape[3] == layout.page_size, "raw_pages.shape[3]", str(layout.page_size), raw_pages.shape[3])
    require(raw_pages.shape[4] == layout.raw_head_dim, "raw_pages.shape[4]", str(layout.raw_head_dim), raw_pages.shape[4])
    batch = check_body_tables(cache.block_table, cache.kv_indptr, cache.kv_indices, None, device)
    check_tensor("raw_table", cache.raw_table, [batch, None], torch.int32, device=device)
    assert cache.raw_table is not None
    check_raw_table(cache.raw_table, cache.sink_len, layout.page_size)
    check_tensor(lens_name, cache.seq_lens, [batch], torch.int32, device=device)
    check_tensor("num_quantized", cache.num_quantized, [batch], torch.int32, device=device)
    cache.pages, cache.raw_pages = aligned(cache.pages), check_pool("raw_pages", raw_pages)
    return cache


@dataclass(eq=False)
class Results:
    """Where the results of an attention call go: arguments of the same names."""

    out: torch.Tensor | None
    return_lse: bool
    workspace: torch.Tensor | None


def check_queries(q: torch.Tensor, cache: Cache, mask: Mask, out: torch.Tensor | None) -> None:
    """Check the queries of an attention call, what they see and where results go."""
    layout, device, num_kv_heads = cache.layout, cache.pages.device, cache.num_kv_heads
    check_tensor("q", q, [None, None, layout.head_dim], FLOATS, device=device)
    num_q_heads = q.shape[1]
    group = num_q_heads // max(num_kv_heads, 1)
    if group * num_kv_heads != num_q_heads or group < 1:
        raise ValueError(f"q: expected a multiple of the {num_kv_heads} kv heads of pages as query heads, got {num_q_heads}")
    check_mask(mask, num_q_heads, device)
    if out is not None:
        check_tensor("out", out, [*q.shape[:2], layout.v_head_dim], q.dtype, device=device)


def check_new(
    q: torch.Tensor,
    keys_and_values: tuple[torch.Tensor | None, torch.Tensor | None],
    cu_seqlens_q: torch.Tensor,
    cache: Cache,
    mask: Mask,
) -> None:
    """Check which query tokens are whose, their keys and values, and what they see of each other."""
    layout, device, (k, v) = cache.layout, q.device, keys_and_values
    check_tensor("cu_seqlens_q", cu_seqlens_q, [cache.batch + 1], torch.int32, device=device)
    require((k is None) == (v is None), "v", "a tensor beside k, and None without it", None if v is None else "a tensor")
    require(not mask.past_only or k is None, "past_only", "False beside k", mask.past_only)
    if k is not None and v is not None:
        check_tensor("k", k, [q.shape[0], cache.num_kv_heads, layout.head_dim], q.dtype, device=device)
        check_tensor("v", v, [q.shape[0], cache.num_kv_heads, layout.v_head_dim], q.dtype, device=device)
    check_among(mask, q.shape[0], k is not None, device)


def check_split_size(split_size: object) -> None:
    """Check the batch-invariant mode's option."""
    if split_size is not None:
        fits = isinstance(split_size, int) and not isinstance(split_size, bool) and split_size >= 1
        require(fits, "split_size", "an integer of at least 1", split_size)


def check_workspace(workspace: torch.Tensor, num_bytes: int, device: torch.device) -> None:
    """Check memory for partial results."""
    check_tensor("workspace", workspace, [None], torch.uint8, device=device)
    check_aligned("workspace", workspace, 16)
    require(workspace.numel() >= num_bytes, "workspace", f"at least {num_bytes} bytes", workspace.numel())


def check_scratch(scratch: torch.Tensor, dtype: torch.dtype, cache: Cache) -> None:
    """Check memory for the dequantized pages of a cache, for queries of `dtype`."""
    accepted = (torch.float32,) if dtype == torch.float32 else (torch.float16, torch.bfloat16)
    layout, table = cache.layout, cache.ids
    shape = [None, 2, cache.num_kv_heads, layout.page_size, layout.raw_head_dim]
    check_tensor("scratch", scratch, shape, accepted, device=table.device)
    if scratch.shape[0] < table.numel():
        entries = f"{table.numel()} entries of {'kv_indices' if cache.csr else 'block_table'}"
        raise ValueError(f"scratch: expected a slot for each of the {entries}, got {scratch.shape[0]}")
