"""Launch parameters: which a kernel gets for which layout on which device. Those of decode come from tables (`tables`).

Warps are chosen so that a tile stays in registers: about 64 float32 per thread and tile in the encoder.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton

from .device import INTERPRETED
from .layout import PageLayout
from .tables import DecodeConfig, DecodeTable, builtin_table


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters of one kernel: warps of a program, rows of a step, programs of a multiprocessor."""

    num_warps: int
    block_t: int = 64
    programs_per_sm: int = 1


def on_device(tensor: torch.Tensor) -> bool:
    """Return whether kernels run for this tensor: on a GPU, or anywhere in Triton's interpreter."""
    return tensor.is_cuda or INTERPRETED


def uses_ptx() -> bool:
    """Return whether kernels may contain inline PTX: on NVIDIA GPUs, not on AMD's and not in the interpreter."""
    return torch.version.hip is None and not INTERPRETED


def tile_warps(page_size: int, head_dim: int) -> int:
    """Return the warps of a program that keeps a tile [page_size, head_dim] in registers."""
    return min(max(page_size * triton.next_power_of_2(head_dim) // (32 * 64), 4), 32)


def store_config(layout: PageLayout) -> LaunchConfig:
    """Return the parameters of the kernels that encode one page tile."""
    num_warps = tile_warps(layout.page_size, layout.head_dim)
    block_t = row_block(triton.next_power_of_2(layout.head_dim))
    return LaunchConfig(num_warps=num_warps, block_t=block_t, programs_per_sm=max(16 // num_warps, 1))


def decode_config(
    layout: PageLayout, group: int, dtype: torch.dtype, device: torch.device, table: DecodeTable | None = None
) -> DecodeConfig:
    """Return the parameters of the decode kernel for `group` query heads per kv head and queries of `dtype`."""
    if dtype == torch.float32:
        # Products of float32 run on the scalar units, and a step of more tokens would spill their operands.
        return DecodeConfig(num_warps=4, num_stages=1, block_t=32, programs_per_sm=2, few_programs_per_sm=2)
    if table is None:
        table = builtin_table(arch_of(device))
    config = table.find(layout.head_dim, group)
    block_t = min(config.block_t, layout.page_size)
    while block_t * layout.head_dim * (layout.k_bits + layout.v_bits) // 8 > STEP_BYTES:
        block_t //= 2
    return dataclasses.replace(config, block_t=block_t)


STEP_BYTES = 32 * 1024
"""Most bytes of codes that one step of a decode program reads."""


@functools.lru_cache
def arch_of(device: torch.device) -> str | None:
    """Return the architecture of a GPU, such as sm90 or gfx942; None for a CPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@functools.lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 2 in the interpreter, where more programs only cost time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def num_programs(device: torch.device, programs_per_sm: int) -> int:
    """Return how many programs a GPU runs at once if a multiprocessor runs `programs_per_sm`."""
    return num_multiprocessors(device) * programs_per_sm


def append_block(head_dim: int) -> int:
    """Return the most tokens of one program that appends; for fewer tokens it is the next power of two."""
    return max(row_block(triton.next_power_of_2(head_dim)) // 4, 1)


def row_block(block_d: int) -> int:
    """Return how many rows of `block_d` channels one step of a streaming kernel handles: 4,096 elements."""
    return max(4096 // block_d, 1)
