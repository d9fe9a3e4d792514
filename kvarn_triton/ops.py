"""The functions that a model's code calls, as operators of PyTorch: for `torch.compile(fullgraph=True)` and other tracers.

`from kvarn_triton import ops` registers `torch.ops.kvarn_triton.*`; importing the package alone registers nothing. Each
function has the name and the parameters of a launcher and reaches it through an operator (`operators`). What the launcher
refuses, it refuses when it runs; an argument of a type that the operator doesn't take is an error of PyTorch. There are no
gradients: results never require any, whatever their arguments do.
"""

from __future__ import annotations

import torch

from . import operators as _operators
from .checks import require
from .encoder import DEFAULT, Encoder
from .layout import PageLayout
from .tables import DecodeTable

_OPS = torch.ops.kvarn_triton


def hadamard(x: torch.Tensor, *, block_size: int | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x` rotated; see `kvarn_triton.hadamard`."""
    if out is None:
        return _OPS.hadamard.default(x, block_size)
    _OPS.hadamard.into(out, x, block_size)
    return out


def raw_slots(positions: torch.Tensor, raw_table: torch.Tensor, *, sink_len: int, page_size: int) -> torch.Tensor:
    """Return where tokens live in the raw pool; see `kvarn_triton.raw_slots`. Compilers see what it does and fuse it."""
    return _OPS.raw_slots.default(positions, raw_table, sink_len, page_size)


def append_tokens(k: torch.Tensor, v: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Rotate tokens and write them into `raw_pages`; see `kvarn_triton.append_tokens`."""
    _OPS.append_tokens.default(k, v, raw_pages, slots)


def store_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    *,
    token_starts: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize full pages and write them into `pages`; see `kvarn_triton.store_pages`."""
    _OPS.store_pages.default(
        k, v, pages, page_ids, layout.name, layout.head_dim, layout.v_head_dim, encoder.iterations, encoder.equivariant,
        encoder.clip, encoder.fits, encoder.norm, token_starts,
    )  # fmt: skip


def commit_pages(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor | None,
    committed_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: PageLayout,
    *,
    sink_len: int = 0,
    keep_pages: int = 0,
    max_new_pages: int = 1,
    advance: bool = True,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    encoder: Encoder = DEFAULT,
) -> None:
    """Quantize finished pages of the tail into `pages`, and advance `num_quantized`; see `kvarn_triton.commit_pages`."""
    _OPS.commit_pages.default(
        raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, layout.name, layout.head_dim,
        layout.v_head_dim, sink_len, keep_pages, max_new_pages, advance, encoder.iterations, encoder.equivariant, encoder.clip,
        encoder.fits, encoder.norm, kv_indptr, kv_indices,
    )  # fmt: skip


def cut_back(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor | None,
    new_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: PageLayout,
    *,
    sink_len: int = 0,
    advance: bool = True,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
) -> None:
    """Cut sequences back, into quantized pages too; see `kvarn_triton.cut_back`."""
    _OPS.cut_back.default(
        raw_pages, pages, raw_table, block_table, new_lens, num_quantized, layout.name, layout.head_dim, layout.v_head_dim,
        sink_len, advance, kv_indptr, kv_indices,
    )  # fmt: skip


def dequantize_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    *,
    dtype: torch.dtype = torch.float16,
    rotated: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of quantized pages; see `kvarn_triton.dequantize_pages`."""
    arguments = pages, page_ids, layout.name, layout.head_dim, layout.v_head_dim, dtype, rotated
    if out is None:
        return _OPS.dequantize_pages.default(*arguments)
    require(isinstance(out, tuple) and len(out) == 2, "out", "a tuple of two tensors", type(out).__name__)
    _OPS.dequantize_pages.into(*out, *arguments)
    return out


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two attention results over disjoint keys; see `kvarn_triton.merge_states`."""
    return _OPS.merge_states.default(out_a, lse_a, out_b, lse_b)


def _attend(overloads, arguments, out, memory, return_lse):
    """Call the overload that `out` and return_lse ask for. `memory` has what else is written to, by name."""
    if out is None:
        for name, tensor in memory.items():
            require(tensor is None, name, "None without out", "a tensor")
        return overloads.lse(*arguments) if return_lse else overloads.default(*arguments)
    if return_lse:
        return out, overloads.into_lse(out, *memory.values(), *arguments)
    overloads.into(out, *memory.values(), *arguments)
    return out


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    table: DecodeTable | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with one query token per sequence; see `kvarn_triton.decode_attention`.

    Raises:
        ValueError: for a `workspace` without `out` too.
    """
    row = None if table is None else _operators.table_row(table, layout.raw_head_dim)
    arguments = (
        q, pages, block_table, seq_lens, layout.name, layout.head_dim, layout.v_head_dim, raw_pages, raw_table, num_quantized,
        sink_len, sm_scale, window, soft_cap, sinks, kv_indptr, kv_indices, split_size, row,
    )  # fmt: skip
    return _attend(_OPS.decode_attention, arguments, out, {"workspace": workspace}, return_lse)


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    layout: PageLayout,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with several query tokens per sequence; see `kvarn_triton.prefill_attention`.

    Raises:
        ValueError: for a `workspace` or `scratch` without `out` too.
    """
    arguments = (
        q, pages, block_table, seq_lens, cu_seqlens_q, layout.name, layout.head_dim, layout.v_head_dim, k, v, raw_pages,
        raw_table, num_quantized, sink_len, sm_scale, window, soft_cap, sinks, kv_indptr, kv_indices, split_size,
    )  # fmt: skip
    return _attend(_OPS.prefill_attention, arguments, out, {"workspace": workspace, "scratch": scratch}, return_lse)
