"""What a model's code calls of latent attention, as operators of PyTorch, for `torch.compile(fullgraph=True)`.

`from kvarn_triton.mla import operators` registers `torch.ops.kvarn_triton.mla_*`; importing the package registers nothing. Each
function has the parameters of the function of its name, less those of results and encoders, and is made from its signature
(`registry`). What that one refuses, it refuses when it runs. There are no gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..forms import FORMS
from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout
from ..registry import Form, Registry, fake_nothing  # noqa: F401, texts name it
from ..step import Step
from . import decode, dequantize, step, store, tail
from .config import MLAConfig

_OPS = torch.ops.kvarn_triton
_layout = functools.lru_cache(MLALayout)
_config = functools.lru_cache(MLAConfig.of_numbers)
_PLAN = "seq_lens", "block_table", "raw_table", "num_quantized", "slots", "tasks"
_FORMS = {
    "layout": Form("int bits, int page_size", "layout.bits, layout.page_size", "_layout(bits, page_size)"),
    "step": Form(
        f"{', '.join(f'Tensor {name}' for name in _PLAN)}, int sink_len",
        "*_fields(pages, raw_pages, step, layout)",
        f"_step(_layout(bits, page_size), sink_len, {', '.join(_PLAN)})",
    ),
    "config": FORMS["config"],
    "indices": Form("Tensor? indices=None", "indices", "indices"),
}
_REGISTRY = Registry(
    torch.library.Library("kvarn_triton", "FRAGMENT"), globals(), _FORMS, last=("num_splits", "config", "indices"),
    results=("return_lse",), without=("out", "encoder"),
)  # fmt: skip
_operator = _REGISTRY.operator


def _fields(pages: torch.Tensor, raw_pages: torch.Tensor, plan: Step, layout: MLALayout) -> tuple:
    """Return what an operator takes of a plan, checked."""
    table = step.check_mla_step(pages, raw_pages, plan, layout)
    return plan.seq_lens, table, plan.raw_table, plan.num_quantized, plan.slots, plan.tasks, plan.sink_len


def _step(layout: MLALayout, sink_len: int, *tensors: torch.Tensor) -> Step:
    """Return the plan that an operator got."""
    return Step(
        layout.keys, cu_seqlens_q=None, kv_indptr=None, kv_indices=None, sink_lens=None, sink_len=sink_len, max_query_len=1,
        at_once=False, **dict(zip(_PLAN, tensors, strict=True)),
    )  # fmt: skip


def _fake_decode(q: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty results of attention."""
    return q.new_empty(*q.shape[:-1], LATENT_DIM), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _fake_dequantize(pages, page_ids, page_size, dtype, **_):
    """Return empty latents and rotary channels of pages."""
    return tuple(pages.new_empty(page_ids.shape[0], page_size, d, dtype=dtype) for d in (LATENT_DIM, ROPE_DIM))


mla_decode_attention = _operator(decode.mla_decode_attention, "(Tensor out, Tensor lse)", _fake_decode)
mla_store_pages = _operator(store.mla_store_pages, writes=("pages",))
mla_dequantize_pages = _operator(dequantize.mla_dequantize_pages, "(Tensor latents, Tensor rope)", _fake_dequantize)
mla_write_tokens = _operator(step.mla_write_tokens, writes=("pages", "raw_pages"))
mla_append_tokens = _operator(tail.mla_append_tokens, writes=("raw_pages",))
mla_commit_pages = _operator(tail.mla_commit_pages, writes=("pages", "num_quantized"))


def _attend(q: torch.Tensor, pages: torch.Tensor, raw_pages: torch.Tensor, plan: Step, layout: MLALayout, **more: Any) -> Any:
    """Attend with a step by the operator of `mla_decode_attention`."""
    table = step.check_mla_step(pages, raw_pages, plan, layout)
    more |= {"raw_pages": raw_pages, "raw_table": plan.raw_table, "num_quantized": plan.num_quantized}
    return mla_decode_attention(q, pages, table, plan.seq_lens, layout, sink_len=plan.sink_len, **more)


mla_attend = _REGISTRY.like(
    step.mla_attend,
    "_attend(q, pages, raw_pages, step, layout, sm_scale=sm_scale, indices=indices, return_lse=return_lse, "
    "num_splits=num_splits, config=config)",
)
