"""Every tuned number of the package: which launch parameters a kernel gets for which layout.

Warps are chosen so that a tile stays in registers: about 64 float32 per thread and tile in the encoder.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .device import INTERPRETED
from .layout import PageLayout


@dataclass(frozen=True)
class LaunchConfig:
    """Launch parameters of one kernel: warps of a program, software pipeline stages, tokens of a step, programs of an SM."""

    num_warps: int
    num_stages: int = 1
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


def decode_config(layout: PageLayout, group: int, dtype: torch.dtype) -> LaunchConfig:
    """Return the parameters of the decode kernel for `group` query heads per kv head and queries of `dtype`."""
    block_n = max(triton.next_power_of_2(group), 8)
    accumulators = triton.next_power_of_2(layout.head_dim) * block_n
    num_warps = min(max(accumulators // 1024, 1), 8)
    if dtype == torch.float32:
        # Products of float32 run on the scalar units: one warp would hold all of a tile's operands and spill.
        return LaunchConfig(num_warps=max(num_warps, 4), num_stages=1, block_t=32)
    # At large batches a whole page a step beats half a page at equal splits on an H200
    # (perf/results/decode_configs_h200.json), but the codes of a step must leave room in 64 KiB of shared memory (gfx942).
    block_t = layout.page_size if layout.head_dim <= 256 else 64
    while block_t * layout.head_dim * (layout.k_bits + layout.v_bits) // 8 > STEP_BYTES:
        block_t //= 2
    return LaunchConfig(num_warps=num_warps, num_stages=2, block_t=block_t)


STEP_BYTES = 32 * 1024
"""Most bytes of codes that one step of a decode program reads."""


PROGRAMS_PER_SM = 8
"""Decode programs that fill one multiprocessor: one warp of up to 255 registers each."""


@functools.lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 1 in the interpreter, where more splits only cost time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def default_num_splits(device: torch.device, num_rows: int, max_pages: int, num_warps: int) -> int:
    """Return into how many runs of pages a sequence is cut, from shapes alone.

    Args:
        device: where the kernel runs.
        num_rows: sequences times kv heads.
        max_pages: the most pages that a sequence can have.
        num_warps: warps of one decode program.
    """
    programs = num_multiprocessors(device) * max(PROGRAMS_PER_SM // num_warps, 1)
    # Rounded down: one program more than the GPU holds would run alone after all others.
    return max(min(programs // max(num_rows, 1), max_pages, MAX_SPLITS), 1)


MAX_SPLITS = 256


def row_block(block_d: int) -> int:
    """Return how many rows of `block_d` channels one step of a streaming kernel handles: 4,096 elements."""
    return max(4096 // block_d, 1)
