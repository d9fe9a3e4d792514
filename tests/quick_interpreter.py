"""Triton's interpreter without work that changes nothing, which is half of its time: what it computes stays the same.

Every call of a function inside a kernel replaces the operations of `triton.language` again, which the launch has replaced
already. Every sum of integers is computed a second time, for a check that is off (`InterpreterOptions.debug`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _modules(function: Callable) -> frozenset[str]:
    """Return which of Triton's modules a function can see."""
    values = getattr(function, "__globals__", {}).values()
    return frozenset(module.__name__ for module in (tl, tl.core) if any(value is module for value in values))


def quicken() -> None:
    """Replace the operations once per launch, and check no sums."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[str]] = set()

    def patch_once(function: Callable) -> Any:
        modules = _modules(function)
        if modules in replaced:
            return None
        replaced.add(modules)
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
