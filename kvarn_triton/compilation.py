"""A guard that refuses to compile kernels, for servers that have warmed up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton.runtime.jit import JITFunction


class CompilationError(RuntimeError):
    """A kernel would have been compiled inside `no_compilation`."""


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Raise `CompilationError` instead of compiling a kernel of this package, or loading it from Triton's cache on disk.

    It holds for all threads of the process while it is active. A server enters it after `warmup`: a shape that was forgotten
    is then an error that names the kernel, not a step of several seconds.
    """
    compile_kernel = JITFunction._do_compile

    def refuse(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if self.__name__.startswith("_kvarn_"):
            warm = "mla_warmup" if self.__name__.startswith("_kvarn_mla_") else "warmup"
            raise CompilationError(
                f"{self.__name__} is not compiled for these arguments: call kvarn_triton.{warm} with their layout"
            )
        return compile_kernel(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "_do_compile", refuse):
        yield
