"""How kernels meet the caller's tensors: on the device of those, and with no property that would choose another binary.

Triton compiles a kernel anew for a pointer that is no multiple of 16 bytes, and for an integer that is 1 or no multiple of 16.
Pointers of tables and lengths, and integers that may change, are exempt in each kernel (`do_not_specialize_on_alignment`,
`do_not_specialize`): their loads are of single numbers. All other tensors come through `aligned`, so that their address and
strides are multiples of 16, which loads of whole rows are made for. What remains is 64-bit: strides of 2**31 elements and more.

A tensor of rows or pages comes with its strides, as one argument: `Rows`, `Pages`, `Tokens`; None stands for one that is not
there, and a kernel knows when it is compiled. Tables and lengths are arguments of their own, because exemptions don't reach
into tuples; an integer that may change is made one that needs none (`masking.changing`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Rows(NamedTuple):
    """Rows of tokens and heads [tokens, heads, channels]: queries, results, keys or values."""

    ptr: torch.Tensor
    stride_token: int
    stride_head: int


class Pages(NamedTuple):
    """Quantized pages: uint8 [num_pages, num_kv_heads, page_bytes]."""

    ptr: torch.Tensor
    stride_page: int
    stride_head: int


class Tokens(NamedTuple):
    """Pages of tokens that are not quantized [num_pages, 2, num_kv_heads, page_size, channels]: raw pages, scratch memory."""

    ptr: torch.Tensor
    stride_page: int
    stride_half: int
    stride_head: int
    stride_token: int


def as_rows(x: torch.Tensor) -> Rows:
    """Return rows [tokens, heads, channels] as an argument of a kernel."""
    return Rows(x, x.stride(0), x.stride(1))


def as_pages(pages: torch.Tensor) -> Pages:
    """Return quantized pages as an argument of a kernel."""
    return Pages(pages, pages.stride(0), pages.stride(1))


def as_tokens(pages: torch.Tensor | None) -> Tokens | None:
    """Return pages of tokens as an argument of a kernel; None stays None."""
    return None if pages is None else Tokens(pages, *pages.stride()[:4])


class _OnDevice:
    """A kernel that is launched on a device which is not the current one."""

    def __init__(self, kernel: Any, index: int) -> None:
        self.kernel, self.index = kernel, index

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            with torch.cuda.device(self.index):
                return self.kernel[grid](*args, **kwargs)

        return run


def on(tensor: torch.Tensor, kernel: Any) -> Any:
    """Return `kernel`, to be launched on the device of `tensor`; at no cost but two look-ups where that is the current one."""
    index = tensor.get_device()
    return kernel if index < 0 or index == torch.cuda.current_device() else _OnDevice(kernel, index)


def _view(x: torch.Tensor) -> torch.Tensor | None:
    """Return `x` with strides in multiples of 16 elements, those of dimensions of size 1 included; None if that is no view."""
    strides, union = x.stride()[:-1], x.data_ptr()
    for stride in strides:
        union |= stride
    if not union & 15:
        return x
    strides = tuple(0 if size == 1 else stride for stride, size in zip(strides, x.shape, strict=False))
    if x.numel() == 0:
        return x.new_empty(x.shape)
    if x.data_ptr() & 15 or any(stride & 15 for stride in strides):
        return None
    return x.as_strided(x.shape, (*strides, 1))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as kernels take it, whose last dimension is contiguous: a copy if its address or strides are odd ones."""
    view = _view(x)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False).copy_(x.detach())
        if view is None
        else view
    )


def check_pool(name: str, pool: torch.Tensor) -> torch.Tensor:
    """Return a pool of tokens [..., page_size, channels] as kernels take it.

    It is refused where `aligned` would copy, because kernels write to it, and where a page spans 2**31 elements, because places
    within a page are numbers of 32 bits.
    """
    if pool.stride(-2) * pool.shape[-2] >= 2**31:
        raise ValueError(f"{name}: expected pages that span less than 2**31 elements, got strides {list(pool.stride())}")
    view = _view(pool)
    if view is None:
        raise ValueError(
            f"{name}: expected an address in multiples of 16 bytes and outer strides in multiples of 16 elements, "
            f"got address {pool.data_ptr() % 16} past one and strides {list(pool.stride())}"
        )
    return view


def copy_back(memory: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return `out`, with the values of what `aligned` made of it."""
    return out if memory is out or memory.data_ptr() == out.data_ptr() else out.detach().copy_(memory)
