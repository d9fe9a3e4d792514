"""A cache of latents and its validation: what calls over a cache share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..cache import check_raw_table
from ..checks import check_aligned, check_tensor, require
from ..launch import aligned
from ..mla_layout import TOKEN_DIM, MLALayout, check_mla_pages


@dataclass(eq=False)
class LatentCache:
    """Where the latents of sequences are: arguments of the same names of every call over a cache (`docs/mla.md`)."""

    layout: MLALayout
    pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    raw_pages: torch.Tensor | None
    raw_table: torch.Tensor | None
    num_quantized: torch.Tensor | None
    sink_len: int

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.seq_lens.shape[0]

    @property
    def num_sink_pages(self) -> int:
        """Columns of the raw table for sinks."""
        return self.sink_len // self.layout.page_size

    @property
    def max_pages(self) -> int:
        """Most pages of a sequence, quantized or raw."""
        return self.block_table.shape[1] + (0 if self.raw_table is None else self.raw_table.shape[1])


def check_raw_latents(raw_pages: object, device: torch.device | None = None, page_size: int | None = None) -> None:
    """Check a pool of raw tokens; kernels write to it, so that it must be as they take it."""
    check_tensor("raw_pages", raw_pages, [None, page_size, TOKEN_DIM], torch.float16, device=device)
    assert isinstance(raw_pages, torch.Tensor)
    check_aligned("raw_pages", raw_pages, 32)


def checked(cache: LatentCache, lens: str) -> LatentCache:
    """Return a cache as kernels take it; `lens` is what the call names `seq_lens`.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option, and for raw pages without their tables.
    """
    check_mla_pages(cache.pages, cache.layout)
    device, page_size = cache.pages.device, cache.layout.page_size
    check_tensor("block_table", cache.block_table, [None, None], torch.int32, device=device)
    batch = cache.block_table.shape[0]
    check_tensor(lens, cache.seq_lens, [batch], torch.int32, device=device)
    require(
        isinstance(cache.sink_len, int) and cache.sink_len >= 0 and cache.sink_len % page_size == 0,
        "sink_len", f"a multiple of {page_size}, the page_size", cache.sink_len,
    )  # fmt: skip
    if cache.raw_pages is None:
        alone = cache.raw_table is None and cache.num_quantized is None and cache.sink_len == 0
        require(alone, "raw_pages", "a tensor beside raw_table, num_quantized or sink_len", None)
    else:
        check_raw_latents(cache.raw_pages, device, page_size)
        check_tensor("raw_table", cache.raw_table, [batch, None], torch.int32, device=device)
        check_tensor("num_quantized", cache.num_quantized, [batch], torch.int32, device=device)
        assert cache.raw_table is not None
        check_raw_table(cache.raw_table, cache.sink_len, page_size)
        cache = dataclasses.replace(cache, raw_pages=aligned(cache.raw_pages))  # a view: strides as kernels know them
    return dataclasses.replace(cache, pages=aligned(cache.pages))
