"""Warm up for sm90 without a GPU, then call with other shapes where nothing may be compiled: `python warmup_worker.py`.

With the argument `stub` nothing is compiled in the warm-up either: Triton keeps a stub for each key that it would compile. A
process of its own, because kernels that the interpreter has decorated have no keys.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from unittest import mock

import torch
import triton

import kvarn_triton as kvarn
from kvarn_triton.testing.compiler import compile_for

LAYOUT = kvarn.PageLayout(head_dim=64, page_size=64, k_bits=4, v_bits=2)
OTHER_VALUES = kvarn.PageLayout(head_dim=64, page_size=64, k_bits=4, v_bits=2, v_head_dim=128)
DRAFTS = kvarn.PageLayout(128, 128, 4, 2)
HEADS = 2
QUICK = kvarn.Encoder(iterations=0, clip=False, fits=0, norm="balance")
"""The encoder that takes the least time to compile."""


def step(
    batch: int,
    max_pages: int,
    sink_len: int,
    group: int = 4,
    num_heads: int = HEADS,
    split_size: int | None = None,
    window: int | None = None,
    layout: kvarn.PageLayout = LAYOUT,
) -> None:
    """Call everything that a server's step calls; with a window also with a soft cap, sinks and CSR tables."""
    size, head_dims = layout.page_size, (layout.head_dim, layout.v_head_dim)
    pages = torch.zeros(layout.pages_shape(3, num_heads), dtype=torch.uint8)
    raw_pages = torch.zeros(5, 2, num_heads, size, layout.raw_head_dim, dtype=torch.float16)
    q = torch.zeros(batch, num_heads * group, layout.head_dim, dtype=torch.float16)
    k, v = (torch.zeros(batch, num_heads, d, dtype=torch.float16) for d in head_dims)
    table: torch.Tensor | None = torch.zeros(batch, max_pages, dtype=torch.int32)
    ids, options = {}, {"split_size": split_size}
    if window is not None:
        table, indptr = None, torch.zeros(batch + 1, dtype=torch.int32)
        ids = {"kv_indptr": indptr, "kv_indices": torch.zeros(batch * max_pages, dtype=torch.int32)}
        options |= {"window": window, "soft_cap": 1.0 * window, "sinks": torch.zeros(num_heads * group)}
    raw_table = torch.zeros(batch, -(-sink_len // size) + 2, dtype=torch.int32)
    lens = torch.zeros(batch, dtype=torch.int32)
    raw = {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": lens, "sink_len": sink_len}
    kvarn.append_tokens(k, v, raw_pages, torch.zeros(batch, dtype=torch.int64))
    kvarn.decode_attention(q, pages, table, lens, layout, **options, **ids, **raw)
    kvarn.decode_attention(q, pages, table, lens, layout, **options, **ids, return_lse=True)
    kvarn.commit_pages(raw_pages, pages, raw_table, table, lens, lens, layout, sink_len=sink_len, encoder=QUICK, **ids)
    k, v = (torch.zeros(3 * size, num_heads, d, dtype=torch.float16) for d in head_dims)
    kvarn.store_pages(k, v, pages, torch.zeros(3, dtype=torch.int32), layout, encoder=QUICK)


def chunk(
    batch: int,
    tokens: int,
    max_pages: int,
    new: bool,
    scratch: bool,
    window: int | None = None,
    layout: kvarn.PageLayout = LAYOUT,
) -> None:
    """Call prefill attention with `tokens` query tokens for each sequence."""
    size, head_dim, total = layout.page_size, layout.head_dim, batch * tokens
    pages = torch.zeros(layout.pages_shape(3, HEADS), dtype=torch.uint8)
    raw_pages = torch.zeros(5, 2, HEADS, size, head_dim, dtype=torch.float16)
    q, kv = (torch.zeros(total, heads, head_dim, dtype=torch.float16) for heads in (4 * HEADS, HEADS))
    tables = {"raw_pages": raw_pages, "raw_table": torch.zeros(batch, 4, dtype=torch.int32), "sink_len": size}
    table, lens = torch.zeros(batch, max_pages, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
    ends = torch.arange(batch + 1, dtype=torch.int32)
    tables |= {"k": kv, "v": kv} if new else {}
    if scratch:
        tables["scratch"] = torch.zeros(batch * max_pages, *raw_pages.shape[1:], dtype=torch.bfloat16)
    kvarn.prefill_attention(q, pages, table, lens, ends, layout, num_quantized=lens, window=window, **tables)


def main() -> None:
    """Warm up, then call."""
    quick = {"dtype": torch.float16, "encoder": QUICK}
    with compile_for("sm90") as kernels:
        kvarn.warmup(LAYOUT, 4 * HEADS, HEADS, torch.device("cpu"), **quick)
        count = len(kernels)
        with kvarn.no_compilation():
            for batch, max_pages, sink_len in ((1, 1, 0), (2, 16, 1), (3, 5, 64), (64, 32, 200), (200, 48, 16)):
                step(batch, max_pages, sink_len)
                step(batch, max_pages, sink_len, split_size=batch)
            for other in ({"group": 1}, {"window": 1}):
                try:
                    step(2, 2, 0, **other)
                except kvarn.CompilationError as error:
                    print(f"refused: {error}")
                else:
                    raise AssertionError(f"{other} was not warmed up, but compiled")
        step(2, 2, 0, group=1)
        assert len(kernels) > count
        kvarn.warmup(LAYOUT, 4 * HEADS, HEADS, torch.device("cpu"), **quick, prefill=True, scratch=torch.bfloat16)
        with kvarn.no_compilation():
            for batch, tokens, max_pages in (
                (1, 1, 9),
                (2, 4, 5),
                (4, 5, 7),
                (3, 8, 6),
                (3, 16, 40),
                (2, 17, 3),
                (8, 300, 64),
                (5, 2, 1),
            ):
                for new, scratch in itertools.product((False, True), repeat=2):
                    chunk(batch, tokens, max_pages, new, scratch)
        if sys.argv[1:] == ["stub"]:  # keys tell what a window of any size takes
            kvarn.warmup(
                LAYOUT, 4 * HEADS, HEADS, torch.device("cpu"), **quick, prefill=True, scratch=torch.bfloat16, window=True
            )
            with kvarn.no_compilation():
                for window, scratch in itertools.product((1, 7, 16, 4096, 2**31 - 1), (False, True)):
                    chunk(2, 17, 3, True, scratch, window)
        if sys.argv[1:] == ["stub"]:  # few rows have a kernel of their own, with more sequences another one
            kvarn.warmup(DRAFTS, 4 * HEADS, HEADS, torch.device("cpu"), **quick, prefill=True)
            with kvarn.no_compilation():
                for batch, tokens, max_pages in ((1, 5, 9), (1, 8, 300), (2, 8, 1), (4, 8, 3), (9, 5, 40), (3, 4, 7)):
                    for new in (False, True):
                        chunk(batch, tokens, max_pages, new, False, layout=DRAFTS)
            # As have more than 8 query heads, from some sequences on, up to some.
            kvarn.warmup(DRAFTS, 12 * HEADS, HEADS, torch.device("cpu"), **quick)
            with kvarn.no_compilation():
                for batch, max_pages, sink_len in ((1, 1, 0), (3, 9, 1), (4, 1, 0), (5, 300, 128), (8, 4, 1), (200, 48, 16)):
                    step(batch, max_pages, sink_len, group=12, layout=DRAFTS)
                    step(batch, max_pages, sink_len, group=12, layout=DRAFTS, split_size=batch)
        options = {"window": True, "soft_cap": True, "sinks": True, "csr": True}
        kvarn.warmup(LAYOUT, 4 * HEADS, HEADS, torch.device("cpu"), **quick, **options)
        with kvarn.no_compilation():
            for batch, max_pages, sink_len in ((1, 1, 0), (2, 16, 1), (64, 32, 200)):
                for window in (1, 16, 4096):
                    step(batch, max_pages, sink_len, window=window, split_size=3 if window == 16 else None)
        kvarn.warmup(OTHER_VALUES, 4 * HEADS, HEADS, torch.device("cpu"), **quick)
        with kvarn.no_compilation():
            for batch, max_pages, sink_len in ((1, 1, 0), (3, 5, 64), (64, 32, 200)):
                step(batch, max_pages, sink_len, layout=OTHER_VALUES)
    print("ok")


if __name__ == "__main__":
    stub = mock.patch.object(triton.compiler, "compile", lambda *args, **kwargs: object())
    with stub if sys.argv[1:] == ["stub"] else contextlib.nullcontext():
        main()
