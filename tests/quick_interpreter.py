"""Triton's interpreter without work that changes nothing, which is most of its time: what it computes stays the same.

Every call of a function inside a kernel replaces the operations of `triton.language` again, which the launch has done already.
Every sum of integers is computed a second time, for a check that is off (`InterpreterOptions.debug`). Every result makes the
type of its shape, and a table of numpy's dtypes, anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _replace_operations_once() -> None:
    """Replace the operations of `triton.language` once per launch."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[str]] = set()
    seen: dict[tuple[int, int], frozenset[str]] = {}

    def patch_once(function: Callable) -> Any:
        names = function.__globals__
        key = id(names), len(names)
        if key not in seen:
            seen[key] = frozenset(module.__name__ for module in (tl, tl.core) if any(x is module for x in names.values()))
        if seen[key] in replaced:
            return None
        replaced.add(seen[key])
        return patch(function)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


def _keep_types() -> None:
    """Make the type of a shape, and the numpy dtype of a type, once."""
    shape_type, unwrap, np_dtype = tl.core._type_for_tuple_values, tl.core._unwrap_shape, interpreter._get_np_dtype
    shapes: dict[tuple[int, ...], Any] = {}
    dtypes: dict[str, np.dtype] = {}

    def kept_shape_type(values: list, fields: list | None = None) -> Any:
        sizes = tuple([x.value if type(x) is tl.constexpr else x for x in values])
        if fields is not None or not set(map(type, sizes)) <= {int}:
            return shape_type(values, fields)
        if sizes not in shapes:
            shapes[sizes] = shape_type(values)
        return shapes[sizes]

    def plain_shape(shape: Any) -> list:
        if type(shape) not in (list, tuple, tl.tuple):
            return unwrap(shape)
        return [x.value if type(x) is tl.constexpr else x for x in shape]

    def kept_np_dtype(dtype: tl.dtype) -> np.dtype:
        if type(dtype) is not tl.dtype:
            return np_dtype(dtype)
        if dtype.name not in dtypes:
            dtypes[dtype.name] = np_dtype(dtype)
        return dtypes[dtype.name]

    tl.core._type_for_tuple_values = kept_shape_type
    tl.core._unwrap_shape = plain_shape
    interpreter._get_np_dtype = kept_np_dtype


def quicken() -> None:
    """Leave that work out from here on. A Triton whose interpreter is made otherwise raises AttributeError."""
    _replace_operations_once()
    _keep_types()
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
