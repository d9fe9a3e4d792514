"""What kernels in Gluon have in common: names that Triton changed after 3.6, and pairs of numbers in words."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from .arithmetic import SPLIT_PTX

_MEMORY = gl.shared_memory_descriptor
# Each line: the name, or what it was until then.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
reinterpret = getattr(_MEMORY, "reinterpret", None) or _MEMORY._reinterpret


@gluon.jit
def split_pairs(words):
    """Return the lower and the upper halves of words int32, float16."""
    return gl.inline_asm_elementwise(
        SPLIT_PTX, "=&r,=&r,r,r", [words], (gl.float16, gl.float16), is_pure=True, pack=2
    )  # fmt: skip
