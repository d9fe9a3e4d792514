"""Checks of the arguments that say where a cache is and what is seen of it, shared by attention and page completion."""

from __future__ import annotations

import numbers

import torch

from .checks import FLOATS, check_choice, check_pages, check_tensor, require
from .layout import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES, PageLayout

INT32_MAX = 2**31 - 1


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


def check_attention(
    q: torch.Tensor,
    batch: int | None,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None,
    raw_table: torch.Tensor | None,
    num_quantized: torch.Tensor | None,
    sink_len: int,
    kv_indptr: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
    window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor | None,
) -> int:
    """Check what attention calls over a cache have in common, and return the number of kv heads.

    `batch` is the number of sequences that the call is for; None takes that of `seq_lens`.
    """
    num_kv_heads = check_pages(pages, layout)
    device = pages.device
    check_tensor("q", q, [None, None, layout.head_dim], FLOATS, device=device)
    num_q_heads = q.shape[1]
    group = num_q_heads // max(num_kv_heads, 1)
    if group * num_kv_heads != num_q_heads or group < 1:
        raise ValueError(f"q: expected a multiple of the {num_kv_heads} kv heads of pages as query heads, got {num_q_heads}")
    check_tensor("seq_lens", seq_lens, [batch], torch.int32, device=device)
    batch = seq_lens.shape[0]
    check_body_tables(block_table, kv_indptr, kv_indices, batch, device)
    if raw_pages is None:
        if raw_table is not None or num_quantized is not None or sink_len:
            raise ValueError("raw_pages: expected a tensor beside raw_table, num_quantized or sink_len, got None")
    else:
        raw_shape = [None, 2, num_kv_heads, layout.page_size, layout.raw_head_dim]
        check_tensor("raw_pages", raw_pages, raw_shape, FLOATS, device=device)
        check_tensor("raw_table", raw_table, [batch, None], torch.int32, device=device)
        assert raw_table is not None
        check_raw_table(raw_table, sink_len, layout.page_size)
        check_tensor("num_quantized", num_quantized, [batch], torch.int32, device=device)
    _check_options(num_q_heads, window, soft_cap, sinks, device)
    if out is not None:
        check_tensor("out", out, [*q.shape[:2], layout.v_head_dim], q.dtype, device=device)
    return num_kv_heads


def _check_options(
    num_q_heads: int, window: int | None, soft_cap: float | None, sinks: torch.Tensor | None, device: torch.device
) -> None:
    """Check what changes the weights of tokens."""
    if window is not None:
        fits = isinstance(window, int) and not isinstance(window, bool) and 1 <= window <= INT32_MAX
        require(fits, "window", f"None or an integer from 1 to {INT32_MAX}", window)
    if soft_cap is not None:
        # Times log2(e), and one over it, are float32 numbers that are neither 0 nor infinite.
        fits = isinstance(soft_cap, (int, float)) and not isinstance(soft_cap, bool) and 1e-30 <= soft_cap <= 1e30
        require(fits, "soft_cap", "None or a number above 0 (from 1e-30 to 1e30)", soft_cap)
    if sinks is not None:
        check_tensor("sinks", sinks, [num_q_heads], torch.float32, device=device)


def check_call(sm_scale: object, split_size: object) -> float | None:
    """Check the options that every attention call has beside what it attends to; return `sm_scale` as a Python number.

    A tensor is refused as a scale, because reading its number would wait for the GPU.
    """
    if split_size is not None:
        fits = isinstance(split_size, int) and not isinstance(split_size, bool) and split_size >= 1
        require(fits, "split_size", "an integer of at least 1", split_size)
    if sm_scale is None:
        return None
    if not isinstance(sm_scale, numbers.Real) or isinstance(sm_scale, bool) or not -1e30 <= float(sm_scale) <= 1e30:
        raise ValueError(f"sm_scale: expected None or a finite number (up to 1e30), got {sm_scale!r}")
    return float(sm_scale)


def check_scratch(
    scratch: torch.Tensor, dtype: torch.dtype, table: torch.Tensor, num_kv_heads: int, layout: PageLayout
) -> None:
    """Check memory for the dequantized pages of a table, for queries of `dtype`."""
    accepted = (torch.float32,) if dtype == torch.float32 else (torch.float16, torch.bfloat16)
    shape = [None, 2, num_kv_heads, layout.page_size, layout.raw_head_dim]
    check_tensor("scratch", scratch, shape, accepted, device=table.device)
    if scratch.shape[0] < table.numel():
        entries = f"{table.numel()} entries of {'block_table' if table.dim() == 2 else 'kv_indices'}"
        raise ValueError(f"scratch: expected a slot for each of the {entries}, got {scratch.shape[0]}")
