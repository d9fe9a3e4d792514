"""Codes to the bytes of a page and back (`docs/page_format.md`)."""

from __future__ import annotations

import torch

from ..layout import fields_per_byte, largest_power_of_two_divisor
from .codec import Per


def pack(codes: torch.Tensor, bits: int, *, per: Per) -> torch.Tensor:
    """Pack codes into the bytes of a page (`docs/page_format.md`).

    Args:
        codes: uint8 [..., page_size, head_dim], each below 2**bits.
        bits: 2, 3, 4 or 8.
        per: "channel" packs channels of one token into bytes (keys), "token" tokens of one channel (values).

    Returns:
        uint8 [..., page_size * head_dim * bits / 8].
    """
    planes = _planes(codes if per == "channel" else codes.transpose(-1, -2), bits, per).to(torch.int32)
    fields = fields_per_byte(bits)
    width = 8 // fields
    shifts = torch.arange(fields, dtype=torch.int32, device=codes.device)[:, None]
    packed = ((planes & (2**width - 1)) << (shifts * width)).sum(-2).flatten(-2)
    if bits == 3:
        bit_planes = (planes >> 2).unflatten(-1, (2, -1))  # [..., rows, field, half, byte]
        halves = torch.arange(2, dtype=torch.int32, device=codes.device)[:, None]
        high = (bit_planes << (shifts[..., None] + 4 * halves)).sum((-3, -2)).flatten(-2)
        packed = torch.cat((packed, high), dim=-1)
    return packed.to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, page_size: int, head_dim: int, *, per: Per) -> torch.Tensor:
    """Return the codes uint8 [..., page_size, head_dim] that `pack` packed into `packed`."""
    num_rows, num_items = (page_size, head_dim) if per == "channel" else (head_dim, page_size)
    fields = fields_per_byte(bits)
    width = 8 // fields
    num_bytes = num_rows * num_items // fields
    shifts = torch.arange(fields, dtype=torch.int32, device=packed.device)[:, None]
    low = packed[..., :num_bytes].to(torch.int32).unflatten(-1, (num_rows, 1, -1))
    planes = (low >> (shifts * width)) & (2**width - 1)
    if bits == 3:
        halves = torch.arange(2, dtype=torch.int32, device=packed.device)[:, None]
        high = packed[..., num_bytes:].to(torch.int32).unflatten(-1, (num_rows, 1, 1, -1))
        planes = planes | (((high >> (shifts[..., None] + 4 * halves)) & 1) << 2).flatten(-2)
    rows = _rows(planes, bits, per)
    return (rows if per == "channel" else rows.transpose(-1, -2)).to(torch.uint8).contiguous()


def _planes(rows: torch.Tensor, bits: int, per: Per) -> torch.Tensor:
    """Return items [..., rows, items] as planes [..., rows, field, byte]: keys within blocks of the rotation."""
    fields, num_items = fields_per_byte(bits), rows.shape[-1]
    block = largest_power_of_two_divisor(num_items) if per == "channel" else num_items
    return rows.unflatten(-1, (num_items // block, fields, block // fields)).transpose(-3, -2).flatten(-2)


def _rows(planes: torch.Tensor, bits: int, per: Per) -> torch.Tensor:
    """Undo `_planes`."""
    fields, num_items = planes.shape[-2], planes.shape[-2] * planes.shape[-1]
    block = largest_power_of_two_divisor(num_items) if per == "channel" else num_items
    return planes.unflatten(-1, (num_items // block, block // fields)).transpose(-3, -2).flatten(-3)
