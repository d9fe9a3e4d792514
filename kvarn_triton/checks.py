"""Boundary validation with one wording: `argument: expected X, got Y`. No check reads a tensor's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .layout import PageLayout

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise the package's ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def check_count(name: str, value: object, least: int = 0) -> None:
    """Check a number of things."""
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31
    require(fits, name, f"an integer of at least {least}", value)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(
    name: str,
    tensor: object,
    shape: Sequence[int | None],
    dtypes: torch.dtype | Sequence[torch.dtype],
    *,
    device: torch.device | None = None,
    contiguous_dims: int = 1,
) -> None:
    """Check one tensor argument.

    Args:
        name: the argument's name, which starts the message.
        tensor: what the caller passed.
        shape: expected sizes; None stands for any size, and a leading Ellipsis for any leading dimensions.
        dtypes: the accepted dtype or dtypes.
        device: where the tensor must be, if that is fixed.
        contiguous_dims: how many of the last dimensions must be contiguous; 0 allows any strides.

    Raises:
        ValueError: `name: expected ..., got ...`.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    accepted = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in accepted:
        names = " or ".join(_dtype_name(dtype) for dtype in accepted)
        raise ValueError(f"{name}: expected dtype {names}, got {_dtype_name(tensor.dtype)}")
    got = list(tensor.shape)
    if len(got) != len(shape) or any(want is not None and want != size for want, size in zip(shape, got, strict=True)):
        sizes = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{sizes}], got {got}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    check_contiguous(name, tensor, contiguous_dims)


def check_contiguous(name: str, tensor: torch.Tensor, dims: int) -> None:
    """Check that the last `dims` dimensions of `tensor` are contiguous."""
    stride = 1
    for dim in range(tensor.dim() - 1, tensor.dim() - 1 - dims, -1):
        if tensor.shape[dim] > 1 and tensor.stride(dim) != stride:
            last = "dimension" if dims == 1 else f"{dims} dimensions"
            raise ValueError(f"{name}: expected the last {last} contiguous, got strides {list(tensor.stride())}")
        stride *= tensor.shape[dim]


def check_aligned(name: str, tensor: torch.Tensor, num_bytes: int) -> None:
    """Check that `tensor` starts at, and strides by, a multiple of `num_bytes`, a power of two."""
    size = tensor.element_size()
    union = tensor.data_ptr()
    for stride in tensor.stride()[:-1]:
        union |= stride * size
    if not union & (num_bytes - 1) and tensor.stride(-1) == 1:
        return
    strides = [stride * size for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]
    outer = strides[:-1] if strides and strides[-1] == size else strides
    if tensor.data_ptr() % num_bytes or any(stride % num_bytes for stride in outer):
        raise ValueError(
            f"{name}: expected address and outer strides in multiples of {num_bytes} bytes, "
            f"got address {tensor.data_ptr() % num_bytes} past one and byte strides {strides}"
        )


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check that `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")


def check_pages(pages: object, layout: PageLayout) -> int:
    """Check a tensor of pages against the layout of a call and return its number of kv heads.

    A pool from `PageLayout.empty_pages` knows the layout that it was made for.
    """
    check_tensor("pages", pages, [None, None, layout.page_bytes], torch.uint8)
    assert isinstance(pages, torch.Tensor)
    made_for = getattr(pages, "kvarn_layout", layout)
    if made_for is not layout and made_for != layout:
        raise ValueError(f"layout: expected {made_for}, for which pages was made, got {layout}")
    check_aligned("pages", pages, 16)
    return pages.shape[1]


def check_tiles(name: str, tiles: object, page_sizes: Sequence[int], head_dims: Sequence[int], dtypes: object) -> None:
    """Check a contiguous tensor [..., page_size, head_dim] of supported sizes."""
    dims = tiles.dim() if isinstance(tiles, torch.Tensor) else 2
    if dims < 2:
        raise ValueError(f"{name}: expected shape [..., page_size, head_dim], got {list(tiles.shape)}")  # type: ignore[attr-defined]
    check_tensor(name, tiles, [None] * dims, dtypes, contiguous_dims=dims)  # type: ignore[arg-type]
    assert isinstance(tiles, torch.Tensor)
    check_choice(f"{name}.shape[-2]", tiles.shape[-2], page_sizes)
    check_choice(f"{name}.shape[-1]", tiles.shape[-1], head_dims)
