"""Codes to the bytes of a page and back (`docs/page_format.md`)."""

from __future__ import annotations

import torch

from ..layout import fields_per_byte, largest_power_of_two_divisor, num_high_bits
from .codec import Per


def pack(codes: torch.Tensor, bits: int, *, per: Per) -> torch.Tensor:
    """Pack codes into the bytes of a page (`docs/page_format.md`).

    Args:
        codes: uint8 [..., page_size, head_dim], each below 2**bits.
        bits: 2, 3, 4, 5, 6 or 8.
        per: "channel" packs channels of one token into bytes (keys), "token" tokens of one channel (values).

    Returns:
        uint8 [..., page_size * head_dim * bits / 8].
    """
    planes = _planes(codes if per == "channel" else codes.transpose(-1, -2), bits, per).to(torch.int32)
    fields = fields_per_byte(bits)
    width = 8 // fields
    shifts = torch.arange(fields, dtype=torch.int32, device=codes.device)[:, None]
    packed = ((planes & (2**width - 1)) << (shifts * width)).sum(-2).flatten(-2)
    if bits > width:
        high = ((planes >> width) << (shifts * num_high_bits(bits))).sum(-2)  # [..., rows, byte]
        packed = torch.cat((packed, _share_bytes(high, bits).flatten(-2)), dim=-1)
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
    if bits > width:
        high = _unshare_bytes(packed[..., num_bytes:].to(torch.int32), bits, num_rows).unsqueeze(-2)
        planes = planes | (((high >> (shifts * num_high_bits(bits))) & (2 ** (bits - width) - 1)) << width)
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


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    """Return from which bit of a shared byte on the high bits of each of the bytes of codes are that share it."""
    width = fields_per_byte(bits) * num_high_bits(bits)
    return torch.arange(0, 8, width, dtype=torch.int32, device=device)


def _share_bytes(high: torch.Tensor, bits: int) -> torch.Tensor:
    """Put high bits [..., rows, byte] of bytes of codes together in bytes: those of the halves of a row, or of distant rows."""
    shifts = _shifts(bits, high.device)
    if bits == 3:
        return (high.unflatten(-1, (len(shifts), -1)) << shifts[:, None]).sum(-2)
    block = largest_power_of_two_divisor(high.shape[-2])
    blocks = high.unflatten(-2, (-1, len(shifts), block // len(shifts)))
    return (blocks << shifts[:, None, None]).sum(-3).flatten(-3, -2)


def _unshare_bytes(shared: torch.Tensor, bits: int, num_rows: int) -> torch.Tensor:
    """Undo `_share_bytes` of [..., bytes]; bits of others remain above those of each byte of codes."""
    shifts = _shifts(bits, shared.device)
    if bits == 3:
        return (shared.unflatten(-1, (num_rows, 1, -1)) >> shifts[:, None]).flatten(-2)
    block = largest_power_of_two_divisor(num_rows)
    blocks = shared.unflatten(-1, (num_rows // block, 1, block // len(shifts), -1))
    return (blocks >> shifts[:, None, None]).flatten(-4, -2)
