"""Compile everything ahead of serving, and a guard that refuses to compile during it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from . import configs
from .append import append_tokens
from .checks import FLOATS, check_choice, require
from .commit import commit_pages
from .decode import decode_attention
from .encoder import DEFAULT, Encoder
from .layout import PageLayout
from .store import store_pages
from .tables import DecodeTable


class CompilationError(RuntimeError):
    """A kernel would have been compiled inside `no_compilation`."""


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Raise `CompilationError` instead of compiling a kernel of this package, or loading it from Triton's cache on disk.

    It holds for all threads of the process while it is active. A server enters it after `warmup`: a shape that was forgotten
    is then an error that names the kernel, not a step of several seconds.
    """
    compile_kernel = JITFunction._do_compile

    def refuse(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if self.__name__.startswith("_kvarn_"):
            raise CompilationError(
                f"{self.__name__} is not compiled for these arguments: call kvarn_triton.warmup with their layout"
            )
        return compile_kernel(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "_do_compile", refuse):
        yield


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
) -> None:
    """Compile, and load, every kernel that a server's steps launch for one model: decode, append, commit and store.

    Nothing depends on batch sizes, lengths, page counts or the size of the sink: one call serves them all. Cost: some
    seconds for each kernel that is not in Triton's cache on disk. Tensors of a few pages are allocated and dropped.

    Args:
        layout: the page format.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        device: where the server runs; on a CPU there is nothing to do.
        dtype: float16, bfloat16 or float32, of queries, keys and values.
        raw_dtype: dtype of the raw pages; by default `dtype`.
        encoder: options of the encoder.
        table: as given to `decode_attention`.

    Raises:
        ValueError: for a wrong option.
    """
    check_choice("dtype", dtype, FLOATS)
    raw_dtype = dtype if raw_dtype is None else raw_dtype
    check_choice("raw_dtype", raw_dtype, FLOATS)
    require(num_kv_heads >= 1 and num_q_heads % num_kv_heads == 0, "num_q_heads", "a multiple of num_kv_heads", num_q_heads)
    size, head_dim = layout.page_size, layout.head_dim
    pages = torch.zeros(layout.pages_shape(2, num_kv_heads), dtype=torch.uint8, device=device)
    if not configs.on_device(pages):
        return
    raw_pages = torch.zeros(2, 2, num_kv_heads, size, head_dim, dtype=raw_dtype, device=device)
    tokens = torch.zeros(size, num_kv_heads, head_dim, dtype=dtype, device=device)
    # Rows of length 0, ids and slots below 0: the kernels find nothing to do.
    columns, lens = torch.zeros(2, 3, dtype=torch.int32, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    _warm_decode(layout, num_q_heads, pages, raw_pages, dtype, table)
    for ids in (torch.int32, torch.int64):
        slots = torch.full((size,), -1, dtype=ids, device=device)
        count = configs.append_block(head_dim)
        while count:
            append_tokens(tokens[:count], tokens[:count], raw_pages, slots[:count])
            count //= 2
        page_ids = torch.full((1,), -1, dtype=ids, device=device)
        store_pages(tokens, tokens, pages, page_ids, layout, encoder=encoder)
        store_pages(tokens, tokens, pages, page_ids, layout, token_starts=page_ids, encoder=encoder)
    commit_pages(raw_pages, pages, columns, columns, lens, lens, layout, encoder=encoder)


def _warm_decode(
    layout: PageLayout,
    num_q_heads: int,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    dtype: torch.dtype,
    table: DecodeTable | None,
) -> None:
    """Compile decode attention, and its merge for every number of partial results that are looked at together."""
    device, num_kv_heads = pages.device, pages.shape[1]
    programs = configs.num_programs(device, configs.decode_config(layout, dtype, device, table).programs_per_sm)
    num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)[1]
    batches: dict[int, int] = {}
    for batch in (2**i for i in range(programs.bit_length() + 1)):
        batches.setdefault(configs.merge_block(programs, batch * num_tiles), batch)
    for batch in batches.values():
        q = torch.zeros(batch, num_q_heads, layout.head_dim, dtype=dtype, device=device)
        columns = torch.zeros(batch, -(-programs // (batch * num_tiles)), dtype=torch.int32, device=device)
        lens = torch.zeros(batch, dtype=torch.int32, device=device)
        raw = {"raw_pages": raw_pages, "raw_table": columns, "num_quantized": lens}
        for return_lse in (False, True):
            decode_attention(q, pages, columns, lens, layout, return_lse=return_lse, table=table)
            decode_attention(q, pages, columns, lens, layout, return_lse=return_lse, table=table, **raw)  # type: ignore[arg-type]
