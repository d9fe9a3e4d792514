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
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from .attention import decode, prefill, states
from .attention.parts import DecodeSchedule  # noqa: F401, a text below names it
from .checks import require
from .configs import head_tiles
from .encoder import Encoder
from .forms import FORMS, LAST, RESULTS, Form
from .layout import PageLayout, split_bits
from .pages import append, commit, cut, dequantize, rotation, store
from .serving import attention, move, plan, read, write
from .step import Step, StepInputs, inputs_of  # noqa: F401, a text below names it
from .tables import DecodeConfig, DecodeTable, Entry, PrefillConfig

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LIBRARY = torch.library.Library("kvarn_triton", "DEF")
_OPS = torch.ops.kvarn_triton

_layout = functools.lru_cache(PageLayout.from_name)
_encoder = functools.lru_cache(Encoder)
_config = functools.lru_cache(PrefillConfig.of_numbers)


def _row(table: DecodeTable, layout: PageLayout, q: torch.Tensor, pages: torch.Tensor) -> list[int]:
    """Return the launch parameters that a table has for a layout and heads, in the order of `DecodeConfig`."""
    heads = head_tiles(q.shape[1], pages.shape[1])[0]
    return table.find(layout.raw_head_dim, split_bits(layout), heads).numbers()


@functools.lru_cache
def _table(row: tuple[int, ...]) -> DecodeTable:
    """Return a table that has a row made by `_row` for every layout."""
    return DecodeTable("given", (Entry(0, DecodeConfig.of_numbers(row), "given"),))


def _without_gradients(run: Callable) -> Callable:
    """Return `run` with results that never require gradients: the reference is made of operators that have some."""

    def run_without(*args: object) -> object:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return run_without


def _function(text: str) -> Any:
    """Return the function that a text defines; names in it are those of this file.

    It is a function like any other: Python binds its arguments, at no cost and with its own errors, and compilers trace it.
    """
    scope: dict[str, Any] = {}
    exec(text, globals(), scope)
    return scope.popitem()[1]


def _form(p: inspect.Parameter, writes: tuple[str, ...], has_default: bool) -> Form:
    """Return how a parameter of a launcher gets through its operator."""
    kind = p.annotation.removeprefix("torch.").replace("dtype", "ScalarType").replace(" | None", "?")
    if p.name in writes:
        kind = f"Tensor({'ab'[writes.index(p.name)]}!)"
    fields, apart, joined = FORMS.get(p.name, Form(f"{kind} {p.name}", p.name, p.name))
    if p.kind is p.KEYWORD_ONLY:
        fields, joined = f"{fields}={p.default}" if has_default else fields, f"{p.name}={joined}"
    return Form(fields, apart, joined)


def _names(fields: list[str]) -> list[str]:
    """Return the names that fields of a schema have in Python."""
    return [field.split()[-1].partition("=")[0] for field in fields]


def _keywords(names: list[str]) -> str:
    """Return the text that hands variables on by their names."""
    return ", ".join(f"{name}={name}" for name in names)


def _define(name: str, fields: list[str], result: str, run: str, fake: str) -> None:
    """Register an operator: its schema, what runs on every device, and what comes out of it, for tracers.

    Args:
        name: with the overload.
        fields: what its schema takes.
        result: what its schema returns.
        run: what it does, a text.
        fake: what it does when it is traced. If empty, tracers trace what runs: it must consist of operators of PyTorch.
    """
    _LIBRARY.define(f"{name}({', '.join(fields)}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
    # PyTorch leaves out the last arguments where they are what the schema has by default.
    parameters = ", ".join(field.split()[-1] for field in fields)
    launch = _function(f"def launch({parameters}): {run}")
    if not fake:
        _LIBRARY.impl(name, launch, "CompositeImplicitAutograd")
        return
    _LIBRARY.impl(name, launch, "CUDA")
    _LIBRARY.impl(name, _without_gradients(launch), "CPU")
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"kvarn_triton::{name}", _function(f"def fake({parameters}): {fake}"), lib=_LIBRARY)


def _call(overloads: Any, arguments: tuple, out: Any = None, return_lse: bool = False, **memory: Any) -> Any:
    """Call the overload that `out` and `return_lse` ask for. `memory` has what else is written to, by name."""
    if out is None:
        for name, tensor in memory.items():
            require(tensor is None, name, "None without out", "a tensor")
        return overloads.lse(*arguments) if return_lse else overloads.default(*arguments)
    if return_lse:
        return out, overloads.into_lse(out, *memory.values(), *arguments)
    overloads.into(out, *memory.values(), *arguments)
    return out


def _call_pair(overloads: Any, arguments: tuple, out: Any) -> Any:
    """Call the overload that `out`, a tuple of two tensors or None, asks for."""
    if out is None:
        return overloads.default(*arguments)
    require(isinstance(out, tuple) and len(out) == 2, "out", "a tuple of two tensors", type(out).__name__)
    overloads.into(*out, *arguments)
    return out


def _fake_nothing(**_: Any) -> None:
    """Stand in for a launcher that only writes in place."""


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


def _like(launcher: Callable[_P, _R], value: str) -> Callable[_P, _R]:
    """Return a function with the name and the parameters of a launcher; a text says what it returns."""
    name, parameters = launcher.__name__, inspect.signature(launcher).parameters.values()
    bare = inspect.Signature([p.replace(default=p.empty, annotation=p.empty) for p in parameters])
    function = _function(f"def {name}{bare}: return {value}")
    function.__defaults__, function.__kwdefaults__ = launcher.__defaults__, launcher.__kwdefaults__
    functools.update_wrapper(function, launcher, assigned=["__annotations__"])
    function.__doc__ = f"Call `kvarn_triton.{name}`, which says what it does, as an operator."
    return function


def _operator(
    launcher: Callable[_P, _R],
    result: str = "()",
    fake: Callable | None = _fake_nothing,
    *,
    writes: tuple[str, ...] = (),
    into: str = "",
) -> Callable[_P, _R]:
    """Register the overloads of a launcher, and return the function that calls them.

    For `hadamard` that is `hadamard(Tensor x, int? block_size) -> Tensor` and
    `hadamard.into(Tensor(a!) out, Tensor x, int? block_size) -> ()`, with these functions:

        def launch(x, block_size): return rotation.hadamard(x, block_size=block_size)
        def launch(out, x, block_size): rotation.hadamard(x, block_size=block_size, out=out)
        def hadamard(x, *, block_size=None, out=None): return _call(_OPS.hadamard, (x, block_size), out=out)

    Args:
        launcher: a function of a module that this file imports; texts find it there.
        result: what the schema returns that is given no memory for it.
        fake: takes what the schema has, by name, and the launcher's options of results, and returns empty ones. None where the
            launcher is made of operators of PyTorch.
        writes: parameters that are written in place.
        into: what a schema has for memory of results, if the launcher takes any.
    """
    name, parameters = launcher.__name__, inspect.signature(launcher).parameters
    taken = [p for p in parameters.values() if p.name not in RESULTS]
    has_lse, names = "return_lse" in parameters, list(parameters)
    behind = names[names.index("return_lse") :] if has_lse else []
    taken.sort(key=lambda p: LAST.index(p.name) if p.name in LAST else len(LAST) if p.name in behind else -1)
    # Only schemas of attention have defaults.
    forms = [_form(p, writes, has_default=has_lse) for p in taken]
    fields, memory = ", ".join(form.fields for form in forms).split(", "), into.split(", ") if into else []
    is_pair = bool(into) and "out" not in _names(memory)
    given = f"out=({', '.join(_names(memory))})" if is_pair else _keywords(_names(memory))
    overloads: list[tuple[str, list[str], str, str, str]] = [("", [], result, "", "return {}")]
    if into:
        overloads.append((".into", memory, "()", given, "{}"))
    if has_lse:
        overloads.append((".lse", [], "(Tensor out, Tensor lse)", "return_lse=True", "return {}"))
        overloads.append((".into_lse", memory, "Tensor", f"{given}, return_lse=True", "return {}[1]"))
    launch = f"{launcher.__module__.rpartition('.')[2]}.{name}"
    joined, passed = ", ".join(form.joined for form in forms), _keywords(_names(fields))
    for overload, written, returned, options, body in overloads:
        run = body.format(f"{launch}({joined}, {options})")
        traced = body.format(f"{fake.__name__}({passed}, {options})") if fake else ""
        _define(name + overload, written + fields, returned, run, traced)

    apart = ", ".join(form.apart for form in forms)
    if "step" in parameters:
        apart = apart.replace("_row(table, layout,", "_row(table, step.layout,")
    call = f"_OPS.{name}.default({apart})"
    if into:
        options = _keywords([x for x in RESULTS if x in parameters])
        call = f"{'_call_pair' if is_pair else '_call'}(_OPS.{name}, ({apart}), {options})"
    return _like(launcher, call)


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
    _run = f"return states.merge_states({', '.join(_names(_taken))})"
    _fake = f"return _fake_like(out_a{_one}), _fake_like(lse_a{_one})"
    _define(f"merge_states{_overload}", _taken, "(Tensor out, Tensor lse)", _run, _fake)
_two = f"_OPS.merge_states.default({', '.join(_names(_STATES))})"
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
    attention.attend, "Tensor", _fake_attention, into="Tensor(a!) out, Tensor(b!)? workspace, Tensor(c!)? scratch"
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
    "plan_step", _PLANNED, "Tensor[]", *(f"return {f}(_inputs({', '.join(_names(_PLANNED))}))" for f in ("_plan", "_fake_plan"))
)


def _planned(inputs: StepInputs, out: Step | None) -> Step:
    """Return the plan of a step, by way of the operator."""
    require(out is None, "out", "None", type(out).__name__)
    fields = [getattr(inputs, name) for name in _names(_PLANNED[3:])]
    layout = inputs.layout
    tensors = _OPS.plan_step.default(layout.name, layout.head_dim, layout.v_head_dim, *fields)
    return inputs.step_in(dict(zip(inputs.shapes(), tensors, strict=True)))


plan_step = _like(
    plan.plan_step,
    "_planned(inputs_of(layout, seq_lens, cu_seqlens_q, block_table, raw_table, num_tokens, max_query_len, sink_len, "
    "sink_columns, rows, pages_per_block, max_drafts, prefix_lens, kv_indptr, kv_indices, early_pages), out)",
)
