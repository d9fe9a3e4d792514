"""What Triton's interpreter lacks: a fused multiply-add that rounds once. Nothing here runs on a GPU."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def fma(x: tl.tensor, y: tl.tensor, z: tl.tensor) -> tl.tensor:
    """Return `x * y + z` of float32 tensors, rounded once (`reference.arithmetic.fma`); the interpreter's own rounds twice."""
    left, right, addend = (t.handle.data.astype(np.float64) for t in (x, y, z))
    product = left * right
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    even = total.view(np.int64) % 2 == 0
    total = np.where((np.abs(error) > 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return tl.tensor(TensorHandle(total.astype(np.float32), tl.float32), tl.block_type(tl.float32, list(total.shape)))
