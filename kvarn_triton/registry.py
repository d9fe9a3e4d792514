"""Operators of PyTorch that are made from the signatures of launchers: their schemas, and the functions that call them.

What a module registers is made of texts: Python binds the parameters of such functions, at no cost and with its own errors, and
compilers trace them. Names in those texts are those of that module (`Registry.scope`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from .checks import require

_P = ParamSpec("_P")
_R = TypeVar("_R")


def names_of(fields: list[str]) -> list[str]:
    """Return the names that fields of a schema have in Python."""
    return [field.split()[-1].partition("=")[0] for field in fields]


def keywords(names: list[str]) -> str:
    """Return the text that hands variables on by their names."""
    return ", ".join(f"{name}={name}" for name in names)


def _without_gradients(run: Callable) -> Callable:
    """Return `run` with results that never require gradients: the reference is made of operators that have some."""

    def run_without(*args: object) -> object:
        if not torch.is_grad_enabled():
            return run(*args)
        with torch.no_grad():
            return run(*args)

    return run_without


def call(overloads: Any, arguments: tuple, out: Any = None, return_lse: bool = False, **memory: Any) -> Any:
    """Call the overload that `out` and `return_lse` ask for. `memory` has what else is written to, by name."""
    if out is None:
        for name, tensor in memory.items():
            require(tensor is None, name, "None without out", "a tensor")
        return overloads.lse(*arguments) if return_lse else overloads.default(*arguments)
    if return_lse:
        return out, overloads.into_lse(out, *memory.values(), *arguments)
    overloads.into(out, *memory.values(), *arguments)
    return out


def call_pair(overloads: Any, arguments: tuple, out: Any) -> Any:
    """Call the overload that `out`, a tuple of two tensors or None, asks for."""
    if out is None:
        return overloads.default(*arguments)
    require(isinstance(out, tuple) and len(out) == 2, "out", "a tuple of two tensors", type(out).__name__)
    overloads.into(*out, *arguments)
    return out


def fake_nothing(**_: Any) -> None:
    """Stand in for a launcher that only writes in place."""


class Form(NamedTuple):
    """How a parameter gets through an operator, as text."""

    fields: str  # what a schema has for it
    apart: str  # what a function makes of it
    joined: str  # what an operator makes of the fields


class Registry(NamedTuple):
    """What operators of a module have in common."""

    library: torch.library.Library
    scope: dict[str, Any]  # names of the module
    forms: dict[str, Form]  # of parameters of types that no schema can have
    last: tuple[str, ...]  # parameters that stand last in a schema, wherever a launcher has them
    results: tuple[str, ...]  # parameters that choose an overload
    without: tuple[str, ...] = ()  # parameters that neither operators nor their functions have

    def function(self, text: str) -> Any:
        """Return the function that a text defines."""
        found: dict[str, Any] = {}
        exec(text, self.scope, found)
        return found.popitem()[1]

    def form(self, p: inspect.Parameter, writes: tuple[str, ...], has_default: bool) -> Form:
        """Return how a parameter of a launcher gets through its operator."""
        kind = p.annotation.removeprefix("torch.").replace("dtype", "ScalarType").replace(" | None", "?")
        if p.name in writes:
            kind = f"Tensor({'ab'[writes.index(p.name)]}!)"
        fields, apart, joined = self.forms.get(p.name, Form(f"{kind} {p.name}", p.name, p.name))
        if p.kind is p.KEYWORD_ONLY:
            fields, joined = f"{fields}={p.default}" if has_default else fields, f"{p.name}={joined}"
        return Form(fields, apart, joined)

    def define(self, name: str, fields: list[str], result: str, run: str, fake: str) -> None:
        """Register an operator: its schema, what runs on every device, and what comes out of it, for tracers.

        Args:
            name: with the overload.
            fields: what its schema takes.
            result: what its schema returns.
            run: what it does, a text.
            fake: what it does when it is traced. If empty, tracers trace what runs: it must consist of operators of PyTorch.
        """
        library = self.library
        library.define(f"{name}({', '.join(fields)}) -> {result}", tags=(torch.Tag.pt2_compliant_tag,))
        # PyTorch leaves out the last arguments where they are what the schema has by default.
        parameters = ", ".join(field.split()[-1] for field in fields)
        launch = self.function(f"def launch({parameters}): {run}")
        if not fake:
            library.impl(name, launch, "CompositeImplicitAutograd")
            return
        library.impl(name, launch, "CUDA")
        library.impl(name, _without_gradients(launch), "CPU")
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"{library.ns}::{name}", self.function(f"def fake({parameters}): {fake}"), lib=library)

    def like(self, launcher: Callable[_P, _R], value: str) -> Callable[_P, _R]:
        """Return a function with the name and the parameters of a launcher; a text says what it returns."""
        name, signature = launcher.__name__, inspect.signature(launcher)
        parameters = [p for p in signature.parameters.values() if p.name not in self.without]
        bare = inspect.Signature([p.replace(default=p.empty, annotation=p.empty) for p in parameters])
        function = self.function(f"def {name}{bare}: return {value}")
        function.__defaults__ = launcher.__defaults__
        function.__kwdefaults__ = {
            p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
        }
        kept = {p.name: p.annotation for p in parameters}
        function.__annotations__ = kept | {"return": launcher.__annotations__["return"]}
        function.__doc__ = f"Call `kvarn_triton.{name}`, which says what it does, as an operator."
        return function

    def operator(
        self,
        launcher: Callable[_P, _R],
        result: str = "()",
        fake: Callable | None = fake_nothing,
        *,
        writes: tuple[str, ...] = (),
        into: str = "",
        own: Mapping[str, Form] | None = None,
    ) -> Callable[_P, _R]:
        """Register the overloads of a launcher, and return the function that calls them.

        For `hadamard` that is `hadamard(Tensor x, int? block_size) -> Tensor` and
        `hadamard.into(Tensor(a!) out, Tensor x, int? block_size) -> ()`, with these functions:

            def launch(x, block_size): return rotation.hadamard(x, block_size=block_size)
            def launch(out, x, block_size): rotation.hadamard(x, block_size=block_size, out=out)
            def hadamard(x, *, block_size=None, out=None): return call(_OPS.hadamard, (x, block_size), out=out)

        Where a launcher has an option `return_lse` and `into` is empty, there is one operator, which returns both.

        Args:
            launcher: a function of a module that is in `scope`; texts find it there.
            result: what the schema returns that is given no memory for it.
            fake: takes what the schema has, by name, and the launcher's options of results, and returns empty ones. None where
                the launcher is made of operators of PyTorch.
            writes: parameters that are written in place.
            into: what a schema has for memory of results, if it takes any.
            own: parameters that get through in another way than in `forms`.
        """
        name, parameters = launcher.__name__, inspect.signature(launcher).parameters
        has_lse, names = "return_lse" in parameters, list(parameters)
        behind, last = names[names.index("return_lse") :] if has_lse else [], self.last
        taken = [p for p in parameters.values() if p.name not in self.results + self.without]
        taken.sort(key=lambda p: last.index(p.name) if p.name in last else len(last) if p.name in behind else -1)
        # Only schemas of attention that take memory have defaults.
        among = self._replace(forms=self.forms | dict(own or {}))
        forms = [among.form(p, writes, has_default=has_lse and bool(into)) for p in taken]
        fields, memory = ", ".join(form.fields for form in forms).split(", "), into.split(", ") if into else []
        is_pair = bool(into) and "out" not in names_of(memory)
        given = f"out=({', '.join(names_of(memory))})" if is_pair else keywords(names_of(memory))
        both = "return_lse=True"
        overloads: list[tuple[str, list[str], str, str, str]] = [
            ("", [], result, "" if into or not has_lse else both, "return {}")
        ]
        if into:
            overloads.append((".into", memory, "()", given, "{}"))
        if into and has_lse:
            overloads.append((".lse", [], "(Tensor out, Tensor lse)", both, "return {}"))
            overloads.append((".into_lse", memory, "Tensor", f"{given}, {both}", "return {}[1]"))
        launch = f"{launcher.__module__.rpartition('.')[2]}.{name}"
        joined, passed = ", ".join(form.joined for form in forms), keywords(names_of(fields))
        for overload, written, returned, options, body in overloads:
            run = body.format(f"{launch}({joined}, {options})")
            traced = body.format(f"{fake.__name__}({passed}, {options})") if fake else ""
            self.define(name + overload, written + fields, returned, run, traced)

        apart = ", ".join(form.apart for form in forms)
        value = f"_OPS.{name}.default({apart})"
        if into:
            options = keywords([x for x in self.results if x in parameters])
            value = f"{'call_pair' if is_pair else 'call'}(_OPS.{name}, ({apart}), {options})"
        elif has_lse:
            value = f"{value} if return_lse else {value}[0]"
        return self.like(launcher, value)
