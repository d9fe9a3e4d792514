"""Sums, square roots and rotations: in the order of the kernels, or as PyTorch has them.

The kernels add in a known order, and GPUs round a product and a sum once. `KERNEL_ORDER` does the same on any device, so that
codes, packed bytes and stored scales are equal bit for bit in float32: it is the specification, and what tests compare with.
`ANY_ORDER` leaves the order to PyTorch and is ten times as fast on a CPU. Its results differ by rounding, so that a number
almost halfway between two codes may get the other one. In float64 both are the method without rounding errors that matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

BLOCK_TOKENS = 16
"""Distance of the tokens that a sum over tokens adds one after the other (`dot`)."""


def block_channels(head_dim: int) -> int:
    """Return the distance of the channels that a sum over channels adds one after the other (`dot`)."""
    return 32 if head_dim >= 256 else 16


def butterflies(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return `hadamard` of [..., head_dim] times the root of `block_size`: sums and differences only, each step of halves."""
    y = x.reshape(-1, block_size)
    half = block_size // 2
    while half:
        pairs = y.reshape(-1, block_size // (2 * half), 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack((a + b, a - b), dim=2).reshape(-1, block_size)
        half //= 2
    return y.reshape(x.shape)


def fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return `x * y + z` of float32 tensors, rounded once as GPUs do it; of float64 tensors plainly."""
    if x.dtype == torch.float64:
        return x * y + z
    product, z = x.double() * y.double(), z.double()
    total = product + z
    rest = total - product
    error = (product - (total - rest)) + (z - rest)
    # Rounding twice is rounding once if the first result, where inexact, is the neighbour with an odd last bit.
    move = (error.abs() > 0) & (total.view(torch.int64) % 2 == 0)
    return torch.where(move, torch.nextafter(total, torch.copysign(torch.full_like(error, math.inf), error)), total).float()


def sum_halves(x: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 0, whose size is a power of two, always adding the second half to the first."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x


def dot(x: torch.Tensor, y: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum `x * y` of tiles [..., tokens, channels] over tokens (dim -2) or channels (dim -1), which stay with size 1.

    A thread of the kernels holds every 16th token (`BLOCK_TOKENS`) and every `block_channels`-th channel: those are added
    first, one after the other and without rounding the products; the sums of threads then in halves.
    """
    stride = BLOCK_TOKENS if dim == -2 else block_channels(x.shape[-1])
    x, y = (tile.movedim(dim, 0).unflatten(0, (-1, stride)) for tile in torch.broadcast_tensors(x, y))
    total = torch.zeros_like(x[0])
    for each_x, each_y in zip(x, y, strict=True):
        total = fma(each_x, each_y, total)
    return sum_halves(total).movedim(0, dim)


def sum_tokens(x: torch.Tensor) -> torch.Tensor:
    """Sum [..., tokens, 1] over tokens, always the second half onto the first: [..., 1, 1]."""
    return sum_halves(x.movedim(-2, 0)).movedim(0, -2)


def sqrt(x: torch.Tensor) -> torch.Tensor:
    """Return the correctly rounded square root; `torch.sqrt` of float32 on a CPU can be one unit off in the last place."""
    return torch.sqrt(x.double()).to(x.dtype)


@functools.cache
def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return butterflies(torch.eye(size, dtype=dtype, device=device), size)


def _rotate(x: torch.Tensor, block_size: int) -> torch.Tensor:
    matrix = _hadamard_matrix(block_size, x.dtype, x.device)
    return (x.reshape(-1, block_size) @ matrix).reshape(x.shape)


@dataclass(frozen=True)
class Arithmetic:
    """The operations of the encoder whose results depend on the order of sums; functions of this module say what they do.

    Args:
        butterflies: (x, block_size); sums and differences of channels.
        fma: (x, y, z).
        dot: (x, y, dim).
        sum_tokens: (x).
        sqrt: (x).
    """

    butterflies: Callable[[torch.Tensor, int], torch.Tensor]
    fma: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    dot: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    sum_tokens: Callable[[torch.Tensor], torch.Tensor]
    sqrt: Callable[[torch.Tensor], torch.Tensor]


KERNEL_ORDER = Arithmetic(butterflies, fma, dot, sum_tokens, sqrt)
"""The order of the kernels: equal bits."""
ANY_ORDER = Arithmetic(
    butterflies=_rotate,
    fma=lambda x, y, z: torch.addcmul(z, x, y),
    dot=lambda x, y, dim: (x * y).sum(dim, keepdim=True),
    sum_tokens=lambda x: x.sum(-2, keepdim=True),
    sqrt=torch.sqrt,
)
"""PyTorch's own order: fast on CPUs."""
