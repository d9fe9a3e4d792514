"""What a model's code calls of latent attention, as operators of PyTorch, for `torch.compile(fullgraph=True)`.

`from kvarn_triton.mla import operators` registers `torch.ops.kvarn_triton.mla_*`; importing the package registers nothing. Each
function has the parameters of the function of its name, less those of results and encoders. What that one refuses, it refuses
when it runs. There are no gradients.
"""

from __future__ import annotations

import functools

import torch

from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout
from ..step import Step
from . import decode, dequantize, store, tail
from . import step as steps
from .config import MLAConfig

_LIBRARY = torch.library.Library("kvarn_triton", "FRAGMENT")
_OPS = torch.ops.kvarn_triton
_layout = functools.lru_cache(MLALayout)
_config = functools.lru_cache(MLAConfig.of_numbers)

_LIBRARY.define(
    "mla_decode_attention(Tensor q, Tensor pages, Tensor block_table, Tensor seq_lens, int bits, int page_size, "
    "float sm_scale, Tensor? raw_pages, Tensor? raw_table, Tensor? num_quantized, int sink_len, int? num_splits, "
    "int[]? config, Tensor? indices=None) -> (Tensor out, Tensor lse)"
)
_LIBRARY.define(
    "mla_store_pages(Tensor latents, Tensor rope, Tensor(a!) pages, Tensor page_ids, int bits, int page_size, "
    "Tensor? token_starts) -> ()"
)
_LIBRARY.define(
    "mla_dequantize_pages(Tensor pages, Tensor page_ids, int bits, int page_size, ScalarType dtype, bool rotated) "
    "-> (Tensor latents, Tensor rope)"
)
_LIBRARY.define(
    "mla_write_tokens(Tensor latents, Tensor rope, Tensor(a!) pages, Tensor(b!) raw_pages, Tensor seq_lens, "
    "Tensor block_table, Tensor raw_table, Tensor num_quantized, Tensor slots, Tensor tasks, int sink_len, int bits, "
    "int page_size) -> ()"
)
_LIBRARY.define("mla_append_tokens(Tensor latents, Tensor rope, Tensor(a!) raw_pages, Tensor slots) -> ()")
_LIBRARY.define(
    "mla_commit_pages(Tensor raw_pages, Tensor(a!) pages, Tensor raw_table, Tensor block_table, Tensor committed_lens, "
    "Tensor(b!) num_quantized, int bits, int page_size, int sink_len, bool advance) -> ()"
)


@torch.no_grad()
def _decode(q, pages, block_table, seq_lens, bits, page_size, sm_scale, *cache):
    names = ("raw_pages", "raw_table", "num_quantized", "sink_len", "num_splits", "config", "indices")
    options = dict(zip(names, cache, strict=False))
    options["config"] = _config(tuple(options["config"])) if options["config"] else None
    layout = _layout(bits, page_size)
    return decode.mla_decode_attention(
        q, pages, block_table, seq_lens, layout, sm_scale=sm_scale, return_lse=True, **options
    )  # fmt: skip


@torch.no_grad()
def _store(latents, rope, pages, page_ids, bits, page_size, token_starts):
    store.mla_store_pages(latents, rope, pages, page_ids, _layout(bits, page_size), token_starts=token_starts)


@torch.no_grad()
def _dequantize(pages, page_ids, bits, page_size, dtype, rotated):
    return dequantize.mla_dequantize_pages(pages, page_ids, _layout(bits, page_size), dtype=dtype, rotated=rotated)


@torch.no_grad()
def _append(latents, rope, raw_pages, slots):
    tail.mla_append_tokens(latents, rope, raw_pages, slots)


@torch.no_grad()
def _commit(raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, *sizes):
    bits, page_size, sink_len, advance = sizes
    tail.mla_commit_pages(
        raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, _layout(bits, page_size), sink_len=sink_len,
        advance=advance,
    )  # fmt: skip


@torch.no_grad()
def _write(latents, rope, pages, raw_pages, *plan):
    *tensors, sink_len, bits, page_size = plan
    layout, names = _layout(bits, page_size), ("seq_lens", "block_table", "raw_table", "num_quantized", "slots", "tasks")
    step = Step(
        layout.keys, cu_seqlens_q=None, kv_indptr=None, kv_indices=None, sink_lens=None, sink_len=sink_len, max_query_len=1,
        at_once=False, **dict(zip(names, tensors, strict=True)),
    )  # fmt: skip
    steps.mla_write_tokens(latents, rope, pages, raw_pages, step, layout)


def _fake_decode(q, *_):
    return q.new_empty(*q.shape[:-1], LATENT_DIM), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _fake_dequantize(pages, page_ids, _bits, page_size, dtype, _rotated):
    return tuple(pages.new_empty(page_ids.shape[0], page_size, d, dtype=dtype) for d in (LATENT_DIM, ROPE_DIM))


for _name, _run, _fake in (
    ("mla_decode_attention", _decode, _fake_decode),
    ("mla_store_pages", _store, lambda *_: None),
    ("mla_dequantize_pages", _dequantize, _fake_dequantize),
    ("mla_write_tokens", _write, lambda *_: None),
    ("mla_append_tokens", _append, lambda *_: None),
    ("mla_commit_pages", _commit, lambda *_: None),
):
    for _key in ("CUDA", "CPU"):
        _LIBRARY.impl(_name, _run, _key)
    torch.library.register_fake(f"kvarn_triton::{_name}", _fake, lib=_LIBRARY)


def mla_decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: MLALayout,
    *,
    sm_scale: float,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    indices: torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    config: MLAConfig | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Call `kvarn_triton.mla_decode_attention`, which says what it does, as an operator."""
    numbers = None if config is None else config.numbers()
    out, lse = _OPS.mla_decode_attention(
        q, pages, block_table, seq_lens, layout.bits, layout.page_size, sm_scale, raw_pages, raw_table, num_quantized, sink_len,
        num_splits, numbers, indices,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def mla_store_pages(
    latents: torch.Tensor,
    rope: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: MLALayout,
    *,
    token_starts: torch.Tensor | None = None,
) -> None:
    """Call `kvarn_triton.mla_store_pages`, which says what it does, as an operator."""
    _OPS.mla_store_pages(latents, rope, pages, page_ids, layout.bits, layout.page_size, token_starts)


def mla_dequantize_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: MLALayout,
    *,
    dtype: torch.dtype = torch.float16,
    rotated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `kvarn_triton.mla_dequantize_pages`, which says what it does, as an operator."""
    return _OPS.mla_dequantize_pages(pages, page_ids, layout.bits, layout.page_size, dtype, rotated)


def mla_append_tokens(latents: torch.Tensor, rope: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Call `kvarn_triton.mla_append_tokens`, which says what it does, as an operator."""
    _OPS.mla_append_tokens(latents, rope, raw_pages, slots)


def mla_commit_pages(
    raw_pages: torch.Tensor,
    pages: torch.Tensor,
    raw_table: torch.Tensor,
    block_table: torch.Tensor,
    committed_lens: torch.Tensor,
    num_quantized: torch.Tensor,
    layout: MLALayout,
    *,
    sink_len: int = 0,
    advance: bool = True,
) -> None:
    """Call `kvarn_triton.mla_commit_pages`, which says what it does, as an operator."""
    sizes = layout.bits, layout.page_size, sink_len, advance
    _OPS.mla_commit_pages(raw_pages, pages, raw_table, block_table, committed_lens, num_quantized, *sizes)


def mla_write_tokens(
    latents: torch.Tensor, rope: torch.Tensor, pages: torch.Tensor, raw_pages: torch.Tensor, step: Step, layout: MLALayout
) -> None:
    """Call `kvarn_triton.mla_write_tokens`, which says what it does, as an operator."""
    table, sizes = steps.check_mla_step(pages, raw_pages, step, layout), (step.sink_len, layout.bits, layout.page_size)
    tensors = step.seq_lens, table, step.raw_table, step.num_quantized, step.slots, step.tasks
    _OPS.mla_write_tokens(latents, rope, pages, raw_pages, *tensors, *sizes)


def mla_attend(
    q: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    layout: MLALayout,
    *,
    sm_scale: float,
    indices: torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    config: MLAConfig | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Call `kvarn_triton.mla_attend`, which says what it does, by the operator of `mla_decode_attention`."""
    table = steps.check_mla_step(pages, raw_pages, step, layout)
    return mla_decode_attention(
        q, pages, table, step.seq_lens, layout, sm_scale=sm_scale, raw_pages=raw_pages, raw_table=step.raw_table,
        num_quantized=step.num_quantized, sink_len=step.sink_len, indices=indices, return_lse=return_lse, num_splits=num_splits,
        config=config,
    )  # fmt: skip
