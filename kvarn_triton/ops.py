"""The functions that a model's code calls, as operators of PyTorch: for `torch.compile(fullgraph=True)` and other tracers.

`from kvarn_triton import ops` registers `torch.ops.kvarn_triton.*`; importing the package alone registers nothing. Each
function has the name and the parameters of a launcher and reaches it through an operator, and both are made from the
launcher's signature. What the launcher refuses, it refuses when it runs; an argument of a type that the operator doesn't take
is an error of PyTorch. Attention refuses `workspace` and `scratch` without `out`: what an operator writes to, it declares.
There are no gradients: results never require any, whatever their arguments do.

Operators take tensors, numbers and strings: a layout travels as its name and both head_dims, an encoder as its options, a table
of launch parameters as the row that the call needs, a configuration as its numbers. Overloads named `into` write to tensors
that the schema declares; those with `lse` return the log-sum-exp too.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .attention import decode, prefill, states
from .attention.parts import DecodeSchedule  # noqa: F401, a text below names it
from .checks import require
from .configs import head_tiles
from .encoder import Encoder
from .forms import FORMS, LAST, OF_STEP, RESULTS
from .layout import PageLayout, split_bits
from .pages import append, commit, cut, dequantize, rotation, store
from .registry import Registry, call, call_pair, fake_nothing, names_of  # noqa: F401, texts name some
from .serving import attention, move, plan, read, write
from .step import Step, StepInputs, inputs_of  # noqa: F401, a text below names it
from .tables import DecodeConfig, DecodeTable, Entry, PrefillConfig

_OPS = torch.ops.kvarn_triton

_layout = functools.lru_cache(PageLayout.from_name)
_encoder = functools.lru_cache(Encoder)
_config = functools.lru_cache(PrefillConfig.of_numbers)
_REGISTRY = Registry(torch.library.Library("kvarn_triton", "DEF"), globals(), FORMS, LAST, RESULTS)
_operator, _define, _like = _REGISTRY.operator, _REGISTRY.define, _REGISTRY.like


def _row(table: DecodeTable, layout: PageLayout, q: torch.Tensor, pages: torch.Tensor) -> list[int]:
    """Return the launch parameters that a table has for a layout and heads, in the order of `DecodeConfig`."""
    heads = head_tiles(q.shape[1], pages.shape[1])[0]
    return table.find(layout.raw_head_dim, split_bits(layout), heads).numbers()


@functools.lru_cache
def _table(row: tuple[int, ...]) -> DecodeTable:
    """Return a table that has a row made by `_row` for every layout."""
    return DecodeTable("given", (Entry(0, DecodeConfig.of_numbers(row), "given"),))


def _fake_like(x: torch.Tensor, **_: Any) -> torch.Tensor:
    """Return an empty tensor like `x`, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_pages(pages, page_ids, layout, head_dim, v_head_dim, dtype, **_):
    """Return empty keys and values of pages."""
    shape = page_ids.shape[0], _layout(layout).page_size, pages.shape[1]
    return pages.new_empty(*shape, head_dim, dtype=dtype), pages.new_empty(*shape, v_head_dim, dtype=dtype)


def _fake_attention(q: torch.Tensor, v_head_dim: int, return_lse: bool = False, **_: Any) -> Any:
    """Return an empty `out`, or `out` and `lse`, of attention; queries of a step may be [batch, heads, n, channels]."""
    rows = q.shape[0] if q.dim() == 3 else q.shape[0] * q.shape[2]
    out = q.new_empty(rows, q.shape[1], v_head_dim)
    return (out, q.new_empty(rows, q.shape[1], dtype=torch.float32)) if return_lse else out


hadamard = _operator(rotation.hadamard, "Tensor", _fake_like, into="Tensor(a!) out")
raw_slots = _operator(append.raw_slots, "Tensor", fake=None)
append_tokens = _operator(append.append_tokens, writes=("raw_pages",))
store_pages = _operator(store.store_pages, writes=("pages",))
commit_pages = _operator(commit.commit_pages, writes=("pages", "num_quantized"))
cut_back = _operator(cut.cut_back, writes=("raw_pages", "num_quantized"))
dequantize_pages = _operator(
    dequantize.dequantize_pages, "(Tensor k, Tensor v)", _fake_pages, into="Tensor(a!) k, Tensor(b!) v"
)
_STATES = ["Tensor out_a", "Tensor lse_a", "Tensor out_b", "Tensor lse_b"]
for _overload, _taken, _one in (("", _STATES, ""), (".stacked", _STATES[:2], "[0]")):
    _run = f"return states.merge_states({', '.join(names_of(_taken))})"
    _fake = f"return _fake_like(out_a{_one}), _fake_like(lse_a{_one})"
    _define(f"merge_states{_overload}", _taken, "(Tensor out, Tensor lse)", _run, _fake)
_two = f"_OPS.merge_states.default({', '.join(names_of(_STATES))})"
merge_states = _like(states.merge_states, f"_OPS.merge_states.stacked(out_a, lse_a) if out_b is lse_b is None else {_two}")
decode_attention = _operator(decode.decode_attention, "Tensor", _fake_attention, into="Tensor(a!) out, Tensor(b!)? workspace")
prefill_attention = _operator(
    prefill.prefill_attention,
    "Tensor",
    _fake_attention,
    into="Tensor(a!) out, Tensor(b!)? workspace, Tensor(c!)? scratch",
)
write_tokens = _operator(write.write_tokens, writes=("pages", "raw_pages"))
attend = _operator(
    attention.attend,
    "Tensor",
    _fake_attention,
    into="Tensor(a!) out, Tensor(b!)? workspace, Tensor(c!)? scratch",
    own=OF_STEP,
)
read_tokens = _operator(read.read_tokens, writes=("k", "v"))
copy_raw_pages = _operator(move.copy_raw_pages, writes=("raw_pages",))
cut_tokens = _operator(move.cut_tokens, writes=("raw_pages",))


def _inputs(layout: str, head_dim: int, v_head_dim: int, *fields: Any) -> StepInputs:
    """Return what an operator got as the fields of `StepInputs`."""
    return StepInputs(_layout(layout, head_dim, v_head_dim), *fields)


def _plan(inputs: StepInputs) -> list[torch.Tensor]:
    """Return the tensors of a plan, in the order of `StepInputs.shapes`."""
    step = plan.plan_from(inputs, None)
    return [getattr(step, name) for name in inputs.shapes()]


def _fake_plan(inputs: StepInputs) -> list[torch.Tensor]:
    """Return the tensors of a plan, empty."""
    return [inputs.seq_lens.new_empty(shape, dtype=dtype) for shape, dtype in inputs.shapes().values()]


_PLANNED = [
    *["str layout", "int head_dim", "int v_head_dim", "Tensor seq_lens", "Tensor? cu_seqlens_q", "Tensor? block_table"],
    *["Tensor raw_table", "int num_tokens", "int max_query_len", "int sink_len", "bool sink_columns", "Tensor? rows"],
    *["int pages_per_block", "int max_drafts", "Tensor? prefix_lens", "Tensor? kv_indptr", "Tensor? kv_indices"],
    "bool early_pages=False",
]
_define(
    "plan_step",
    _PLANNED,
    "Tensor[]",
    *(f"return {f}(_inputs({', '.join(names_of(_PLANNED))}))" for f in ("_plan", "_fake_plan")),
)


def _planned(inputs: StepInputs, out: Step | None) -> Step:
    """Return the plan of a step, by way of the operator."""
    require(out is None, "out", "None", type(out).__name__)
    fields = [getattr(inputs, name) for name in names_of(_PLANNED[3:])]
    layout = inputs.layout
    tensors = _OPS.plan_step.default(layout.name, layout.head_dim, layout.v_head_dim, *fields)
    return inputs.step_in(dict(zip(inputs.shapes(), tensors, strict=True)))


plan_step = _like(
    plan.plan_step,
    "_planned(inputs_of(layout, seq_lens, cu_seqlens_q, block_table, raw_table, num_tokens, max_query_len, sink_len, "
    "sink_columns, rows, pages_per_block, max_drafts, prefix_lens, kv_indptr, kv_indices, early_pages), out)",
)
