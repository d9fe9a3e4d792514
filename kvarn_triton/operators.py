"""The operators `torch.ops.kvarn_triton.*`: schema, what runs, and what comes out, for tracers. `ops` has functions for them.

Operators take tensors, numbers and strings: a layout travels as its name and both head_dims, an encoder as its options, a table
of launch parameters as the row that the call needs. Each hands its arguments to the launcher of the same name. Overloads named
`into` write to tensors that the schema declares; all others return new ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .attention import decode, merge, prefill
from .encoder import Encoder
from .layout import PageLayout
from .pages import append, commit, cut, rotation, store
from .pages import dequantize as gather
from .tables import DecodeConfig, DecodeTable, Entry

_LIBRARY = torch.library.Library("kvarn_triton", "DEF")

_layout = functools.lru_cache(PageLayout.from_name)
_encoder = functools.lru_cache(Encoder)


@functools.lru_cache
def _table(row: tuple[int, ...], head_dim: int) -> DecodeTable:
    """Return a table that has nothing but a row made by `table_row`."""
    config = DecodeConfig(row[0], row[1], row[2], row[3], row[4], row[5], row[6] or None, bool(row[7]))
    return DecodeTable("given", (Entry(head_dim, config, "given"),))


def table_row(table: DecodeTable, head_dim: int) -> list[int]:
    """Return the launch parameters that a table has for a head_dim, in the order of `DecodeConfig`."""
    c = table.find(head_dim)
    return [
        c.num_warps, c.num_stages, c.block_t, c.block_d, c.programs_per_sm, c.few_programs_per_sm, c.maxnreg or 0,
        int(c.early_merge),
    ]  # fmt: skip


def _without_gradients(run: Callable) -> Callable:
    """Return `run` with results that never require gradients: the reference is made of operators that have some."""

    def run_without(*args: object) -> object:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return run_without


def _define(schema: str, run: Callable, fake: Callable | None) -> None:
    """Register an operator: its schema, what runs on every device, and what comes out of it, for tracers.

    Without a fake implementation, tracers trace what runs: it must consist of operators of PyTorch.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if fake is None:
        _LIBRARY.impl(name, run, "CompositeImplicitAutograd")
        return
    _LIBRARY.impl(name, run, "CUDA")
    _LIBRARY.impl(name, _without_gradients(run), "CPU")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"kvarn_triton::{name}", fake, lib=_LIBRARY)


def _fake_nothing(*args: object) -> None:
    """Stand in for an operator that only writes in place."""


def _fake_like(x: torch.Tensor, *args: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float32)


def _hadamard(x, block_size):
    return rotation.hadamard(x, block_size=block_size)


def _hadamard_into(out, x, block_size):
    rotation.hadamard(x, block_size=block_size, out=out)


_define("hadamard(Tensor x, int? block_size) -> Tensor", _hadamard, _fake_like)
_define("hadamard.into(Tensor(a!) out, Tensor x, int? block_size) -> ()", _hadamard_into, _fake_nothing)


def _raw_slots(positions, raw_table, sink_len, page_size):
    return append.raw_slots(positions, raw_table, sink_len=sink_len, page_size=page_size)


_define("raw_slots(Tensor positions, Tensor raw_table, int sink_len, int page_size) -> Tensor", _raw_slots, None)


def _append_tokens(k, v, raw_pages, slots):
    append.append_tokens(k, v, raw_pages, slots)


_define("append_tokens(Tensor k, Tensor v, Tensor(a!) raw_pages, Tensor slots) -> ()", _append_tokens, _fake_nothing)


def _store_pages(k, v, pages, page_ids, layout, head_dim, v_head_dim, iterations, equivariant, clip, fits, norm, token_starts):
    layout, encoder = _layout(layout, head_dim, v_head_dim), _encoder(iterations, equivariant, clip, fits, norm)
    store.store_pages(k, v, pages, page_ids, layout, token_starts=token_starts, encoder=encoder)


_define(
    "store_pages(Tensor k, Tensor v, Tensor(a!) pages, Tensor page_ids, str layout, int head_dim, int v_head_dim, "
    "int iterations, bool equivariant, bool clip, int fits, str norm, Tensor? token_starts) -> ()",
    _store_pages,
    _fake_nothing,
)


def _commit_pages(
    raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, layout, head_dim, v_head_dim, sink_len,
    keep_pages, max_new_pages, advance, iterations, equivariant, clip, fits, norm, kv_indptr, kv_indices,
):  # fmt: skip
    commit.commit_pages(
        raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, _layout(layout, head_dim, v_head_dim),
        sink_len=sink_len, keep_pages=keep_pages, max_new_pages=max_new_pages, advance=advance, kv_indptr=kv_indptr,
        kv_indices=kv_indices, encoder=_encoder(iterations, equivariant, clip, fits, norm),
    )  # fmt: skip


_define(
    "commit_pages(Tensor raw_pages, Tensor(a!) pages, Tensor raw_table, Tensor? block_table, Tensor committed_lens, "
    "Tensor(b!) num_quantized, str layout, int head_dim, int v_head_dim, int sink_len, int keep_pages, int max_new_pages, "
    "bool advance, int iterations, bool equivariant, bool clip, int fits, str norm, Tensor? kv_indptr, "
    "Tensor? kv_indices) -> ()",
    _commit_pages,
    _fake_nothing,
)


def _cut_back(
    raw_pages, pages, raw_table, block_table, new_lens, num_quantized, layout, head_dim, v_head_dim, sink_len, advance,
    kv_indptr, kv_indices,
):  # fmt: skip
    cut.cut_back(
        raw_pages, pages, raw_table, block_table, new_lens, num_quantized, _layout(layout, head_dim, v_head_dim),
        sink_len=sink_len, advance=advance, kv_indptr=kv_indptr, kv_indices=kv_indices,
    )  # fmt: skip


_define(
    "cut_back(Tensor(a!) raw_pages, Tensor pages, Tensor raw_table, Tensor? block_table, Tensor new_lens, "
    "Tensor(b!) num_quantized, str layout, int head_dim, int v_head_dim, int sink_len, bool advance, Tensor? kv_indptr, "
    "Tensor? kv_indices) -> ()",
    _cut_back,
    _fake_nothing,
)


def _dequantize_pages(pages, page_ids, layout, head_dim, v_head_dim, dtype, rotated, *, out=None):
    layout = _layout(layout, head_dim, v_head_dim)
    return gather.dequantize_pages(pages, page_ids, layout, dtype=dtype, rotated=rotated, out=out)


def _dequantize_pages_into(k, v, *args):
    _dequantize_pages(*args, out=(k, v))


def _fake_dequantize_pages(pages, page_ids, layout, head_dim, v_head_dim, dtype, rotated):
    shape = page_ids.shape[0], _layout(layout, head_dim, v_head_dim).page_size, pages.shape[1]
    return pages.new_empty(*shape, head_dim, dtype=dtype), pages.new_empty(*shape, v_head_dim, dtype=dtype)


_DEQUANTIZE = "Tensor pages, Tensor page_ids, str layout, int head_dim, int v_head_dim, ScalarType dtype, bool rotated"
_define(f"dequantize_pages({_DEQUANTIZE}) -> (Tensor k, Tensor v)", _dequantize_pages, _fake_dequantize_pages)
_define(f"dequantize_pages.into(Tensor(a!) k, Tensor(b!) v, {_DEQUANTIZE}) -> ()", _dequantize_pages_into, _fake_nothing)


def _merge_states(out_a, lse_a, out_b, lse_b):
    return merge.merge_states(out_a, lse_a, out_b, lse_b)


def _fake_merge_states(out_a, lse_a, out_b, lse_b):
    return _fake_like(out_a), _fake_like(lse_a)


_define(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)",
    _merge_states,
    _fake_merge_states,
)


def _define_attention(name: str, arguments: str, run: Callable, memory: tuple[str, ...] = ("workspace",)) -> None:
    """Register the four overloads of an attention function: new tensors or `into` given ones, without or with the lse.

    Those `into` given ones have optional tensors before the other arguments that are written to too: `memory`.
    """
    count = len(memory)

    def with_lse(*args):
        return run(*args, return_lse=True)

    def into(out, *args):
        run(*args[count:], out=out, **dict(zip(memory, args, strict=False)))

    def into_with_lse(out, *args):
        return run(*args[count:], out=out, return_lse=True, **dict(zip(memory, args, strict=False)))[1]

    v_head_dim = arguments.split(", ").index("int v_head_dim")

    def fake(q, *args):
        return q.new_empty(*q.shape[:2], (q, *args)[v_head_dim])

    def fake_with_lse(q, *args):
        return fake(q, *args), _fake_lse(q)

    written = ", ".join(["Tensor(a!) out", *(f"Tensor({letter}!)? {x}" for letter, x in zip("bc", memory, strict=False))])
    _define(f"{name}({arguments}) -> Tensor", run, fake)
    _define(f"{name}.lse({arguments}) -> (Tensor out, Tensor lse)", with_lse, fake_with_lse)
    _define(f"{name}.into({written}, {arguments}) -> ()", into, _fake_nothing)
    _define(f"{name}.into_lse({written}, {arguments}) -> Tensor", into_with_lse, lambda out, *args: _fake_lse(args[count]))


_CACHE = (
    "Tensor? raw_pages=None, Tensor? raw_table=None, Tensor? num_quantized=None, int sink_len=0, float? sm_scale=None, "
    "int? window=None, float? soft_cap=None, Tensor? sinks=None, Tensor? kv_indptr=None, Tensor? kv_indices=None, "
    "int? split_size=None"
)


def _decode_attention(
    q, pages, block_table, seq_lens, layout, head_dim, v_head_dim, raw_pages=None, raw_table=None, num_quantized=None,
    sink_len=0, sm_scale=None, window=None, soft_cap=None, sinks=None, kv_indptr=None, kv_indices=None, split_size=None,
    row=None, *, out=None, workspace=None, return_lse=False,
):  # fmt: skip
    layout = _layout(layout, head_dim, v_head_dim)
    return decode.decode_attention(
        q, pages, block_table, seq_lens, layout, raw_pages=raw_pages, raw_table=raw_table,
        num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices, sm_scale=sm_scale,
        window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse, split_size=split_size,
        workspace=workspace, table=None if row is None else _table(tuple(row), layout.raw_head_dim),
    )  # fmt: skip


_define_attention(
    "decode_attention",
    "Tensor q, Tensor pages, Tensor? block_table, Tensor seq_lens, str layout, int head_dim, int v_head_dim, "
    f"{_CACHE}, int[]? table=None",
    _decode_attention,
)


def _prefill_attention(
    q, pages, block_table, seq_lens, cu_seqlens_q, layout, head_dim, v_head_dim, k=None, v=None, raw_pages=None,
    raw_table=None, num_quantized=None, sink_len=0, sm_scale=None, window=None, soft_cap=None, sinks=None, kv_indptr=None,
    kv_indices=None, split_size=None, *, out=None, workspace=None, scratch=None, return_lse=False,
):  # fmt: skip
    return prefill.prefill_attention(
        q, pages, block_table, seq_lens, cu_seqlens_q, _layout(layout, head_dim, v_head_dim), k=k, v=v, raw_pages=raw_pages,
        raw_table=raw_table, num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices,
        sm_scale=sm_scale, window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
        split_size=split_size, workspace=workspace, scratch=scratch,
    )  # fmt: skip


_define_attention(
    "prefill_attention",
    "Tensor q, Tensor pages, Tensor? block_table, Tensor seq_lens, Tensor cu_seqlens_q, str layout, int head_dim, "
    f"int v_head_dim, Tensor? k=None, Tensor? v=None, {_CACHE}",
    _prefill_attention,
    memory=("workspace", "scratch"),
)
