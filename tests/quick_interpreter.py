"""Triton's interpreter without work that changes nothing, which is most of its time: what it computes stays the same.

Every call of a function inside a kernel replaces the operations of `triton.language` again, which the launch has done already,
and calls each of them through two others. Every sum of integers is computed a second time, for a check that is off
(`InterpreterOptions.debug`). Every result makes the type of its shape, its name, its number of elements and a table of numpy's
dtypes anew. Operands that have one shape and dtype are brought to it.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
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


def _keep_shapes() -> None:
    """Make what a tensor and a type of blocks have of their shape once."""
    make_tensor, make_block = tl.tensor.__init__, tl.block_type.__init__
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}
    of_blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if isinstance(type, tl.block_type) else ()
        kept = of_tensors.get(sizes)
        if kept is None:
            make_tensor(self, handle, type)
            of_tensors[sizes] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = kept

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([x.value if type(x) is tl.constexpr else x for x in shape])
        key = element_ty.name, sizes
        if key not in of_blocks:
            make_block(self, element_ty, shape)
            of_blocks[key] = {name: value for name, value in vars(self).items() if name != "element_ty"}
        else:
            vars(self).update(of_blocks[key], element_ty=element_ty)

    tl.tensor.__init__ = init_tensor
    tl.block_type.__init__ = init_block


def _leave_shapes() -> None:
    """Return operands that have one shape as they are."""
    broadcast = TritonSemantic.broadcast_impl_value

    def leave_or_broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if isinstance(one, tl.block_type):
            if isinstance(other, tl.block_type) and one.shape.values == other.shape.values:
                return lhs, rhs
        elif not isinstance(other, tl.block_type):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = leave_or_broadcast


RANGES = {name: range(-(2 ** (bits - 1)), 2 ** (bits - 1)) for name, bits in (("int8", 8), ("int32", 32), ("int64", 64))}
"""Integers that become one of a tensor's dtype."""
PLAIN = {"fp32", "int1", "uint32", *RANGES}
"""Dtypes of which two operands give a result of the same one, whatever the operation."""


def _leave_dtypes() -> None:
    """Return operands that have one of these dtypes as they are, and make a number one of its tensors at once."""
    check = TritonSemantic.binary_op_type_checking_impl

    def leave_or_check(
        self: Any, lhs: Any, rhs: Any, lhs_ptr: bool = False, rhs_ptr: bool = False, arithmetic: bool = True, *others: bool,
        **named: bool,
    ) -> Any:  # fmt: skip
        kinds = type(lhs), type(rhs)
        if kinds == (tl.tensor, tl.tensor):
            name, other = lhs.dtype.name, rhs.dtype.name
            # Pointers are left alone where offsets are added to them.
            if (name == other and name in PLAIN) or (lhs_ptr and other in RANGES and type(lhs.dtype) is tl.pointer_type):
                return self.broadcast_impl_value(lhs, rhs)
        elif arithmetic and not named:
            if kinds[0] is tl.tensor and (rhs in RANGES.get(lhs.dtype.name, ()) if kinds[1] is int else kinds[1] is float):
                if kinds[1] is int or lhs.dtype.name == "fp32":
                    return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, lhs.dtype))
            elif kinds == (int, tl.tensor) and lhs in RANGES.get(rhs.dtype.name, ()):
                return self.broadcast_impl_value(self.scalar_constant(lhs, rhs.dtype), rhs)
        return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic, *others, **named)

    TritonSemantic.binary_op_type_checking_impl = leave_or_check


def _leave_values() -> None:
    """Return what is no constant of the compiler as it is, with one look at its type."""
    unwrap, to_tensor = tl.core._unwrap_if_constexpr, TritonSemantic.to_tensor
    plain = {tl.tensor, tl.dtype, int, float, bool, type(None)}

    def leave_or_unwrap(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    def leave_or_make(self: Any, value: Any, *options: Any, **named: Any) -> Any:
        return value if type(value) is tl.tensor else to_tensor(self, value, *options, **named)

    for module in list(sys.modules.values()):
        if getattr(module, "_unwrap_if_constexpr", None) is unwrap:
            module._unwrap_if_constexpr = leave_or_unwrap  # type: ignore[attr-defined]
    TritonSemantic.to_tensor = leave_or_make


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
COMPARISONS = {
    "less_than": np.less, "less_equal": np.less_equal, "greater_than": np.greater, "greater_equal": np.greater_equal,
    "equal": np.equal, "not_equal": np.not_equal,
}  # fmt: skip
NUMBERS = {"int8": np.int8, "int32": np.int32, "int64": np.int64, "uint32": np.uint32, "fp32": np.float32}
"""Dtypes whose numbers numpy computes with as the interpreter does."""


def _compute_at_once(name: str, operation: np.ufunc) -> None:
    """Have numpy compute an operation of two operands of one dtype, which it broadcasts."""
    check_and_compute, compares = getattr(TritonSemantic, name), name in COMPARISONS

    def compute(self: Any, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
        kind, other = lhs.dtype.name if type(lhs) is tl.tensor else "", type(rhs)
        if kind not in NUMBERS:
            return check_and_compute(self, lhs, rhs, *options, **named)
        result = lhs.type
        if other is tl.tensor and rhs.dtype.name == kind:
            data = operation(lhs.handle.data, rhs.handle.data)
            if type(rhs.type) is tl.block_type:
                if type(result) is not tl.block_type:
                    result = rhs.type
                elif result.shape.values != rhs.type.shape.values:
                    result = tl.block_type(lhs.dtype, list(data.shape))
        elif (other is int and rhs in RANGES.get(kind, ())) or (other is float and kind == "fp32"):
            data = operation(lhs.handle.data, NUMBERS[kind](rhs))
        else:
            return check_and_compute(self, lhs, rhs, *options, **named)
        if compares:
            result = result.with_element_ty(tl.int1) if type(result) is tl.block_type else tl.int1
        return tl.tensor(interpreter.TensorHandle(data, lhs.dtype), result)

    setattr(TritonSemantic, name, compute)


def _call_at_once() -> None:
    """Call the operations of `triton.language` without the two functions around each."""

    def set_quick(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        semantic, function = TritonSemantic(builder), inspect.unwrap(member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = set_quick


def quicken() -> None:
    """Leave that work out from here on. A Triton whose interpreter is made otherwise raises AttributeError."""
    _replace_operations_once()
    _keep_types()
    _keep_shapes()
    _leave_shapes()
    _leave_dtypes()
    _leave_values()
    _call_at_once()
    for name, operation in (ARITHMETIC | COMPARISONS).items():
        _compute_at_once(name, operation)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
