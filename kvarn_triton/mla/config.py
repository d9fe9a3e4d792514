"""Launch parameters of latent attention: which a kernel gets for how many query rows on which device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .. import gpu
from ..checks import check_count, require
from ..layout import fields_per_byte
from ..mla_layout import MLALayout

_KIB = 1024


@dataclass(frozen=True)
class HopperPlan:
    """What the kernel of warp groups is compiled for."""

    rows: int  # of a tile
    bits: int
    ring: int  # blocks in shared memory, with 16 rows


HOPPER_ROWS = (16, 64)
"""Query rows of a tile of the kernel of warp groups: columns of its products, or rows."""


@dataclass(frozen=True)
class MLAConfig:
    """Launch parameters of `mla_decode_attention`.

    Args:
        block_m: query rows of a tile, (query token, head) of one sequence: a power of two from 16 on.
        block_t: tokens that are dequantized at once: 16, 32 or 64.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline.
        programs_per_sm: programs of one multiprocessor, by which the number of splits is chosen.
        maxnreg: most registers of a thread; None leaves it to the compiler. NVIDIA only.
        warp_groups: whether the kernel of warp groups (`hopper`) does it: on compute capability 9.0 alone, and not for lists.
            `block_m` is 16 or 64 then, and the other parameters but `programs_per_sm` play no part.
    """

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int = 2
    programs_per_sm: int = 1
    maxnreg: int | None = None
    warp_groups: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (("block_m", 16, 128), ("block_t", 16, 64), ("num_warps", 1, 16)):
            value = getattr(self, name)
            fits = isinstance(value, int) and least <= value <= most and not value & (value - 1)
            require(fits, name, f"a power of two from {least} to {most}", value)
        check_count("num_stages", self.num_stages, 1)
        check_count("programs_per_sm", self.programs_per_sm, 1)
        if self.maxnreg is not None:
            check_count("maxnreg", self.maxnreg, 24)
        fits = not self.warp_groups or self.block_m in HOPPER_ROWS
        require(fits, "block_m", f"{' or '.join(map(str, HOPPER_ROWS))} with warp_groups", self.block_m)

    def options(self) -> dict[str, int]:
        """Return the launch options that only some GPUs have."""
        return {} if self.maxnreg is None else {"maxnreg": self.maxnreg}

    def numbers(self) -> list[int]:
        """Return the fields as numbers, as an operator takes them."""
        sizes = [self.block_m, self.block_t, self.num_warps, self.num_stages, self.programs_per_sm]
        return [*sizes, self.maxnreg or 0, int(self.warp_groups)]

    @classmethod
    def of_numbers(cls, n: tuple[int, ...]) -> MLAConfig:
        """Return the launch parameters of which `n` are the numbers; graphs of older versions have the first 5 or 6."""
        n = (*n, 0, 0)
        return cls(n[0], n[1], n[2], n[3], n[4], n[5] or None, bool(n[6]))


@dataclass(frozen=True)
class MLAPlan:
    """What the kernel is compiled for."""

    block_m: int  # query rows of a tile
    block_t: int  # tokens of a block
    num_stages: int  # of the software pipeline
    planes: int  # parts of the channels of a latent, each an operand of its own
    fields: int  # of a byte
    ptx: bool
    early: bool  # whether the kernel starts before the one that prepares its queries ends


@functools.lru_cache
def hopper_plan(layout: MLALayout, rows: int, has_raw: bool) -> HopperPlan:
    """Return what the kernel of warp groups is compiled for: as many blocks as fit shared memory, beside one of raw tokens."""
    return HopperPlan(rows, layout.bits, (4 if layout.bits == 4 else 3) - has_raw)


@functools.lru_cache
def mla_plan(layout: MLALayout, config: MLAConfig, ptx: bool, early: bool) -> MLAPlan:
    """Return what the kernel is compiled for."""
    fields = fields_per_byte(layout.bits)
    return MLAPlan(config.block_m, config.block_t, config.num_stages, max(fields, 2), fields, ptx, early)


def mla_config(layout: MLALayout, rows: int, device: torch.device, sparse: bool = False) -> MLAConfig:
    """Return the parameters for `rows` query rows of a sequence; `sparse`: of a query token with a list of tokens."""
    known, arch = gpu.gpu_of(device), gpu.arch_of(device)
    return _sparse_config(rows, arch, known) if sparse else _mla_config(layout.bits, rows, known)


@functools.lru_cache
def _mla_config(bits: int, rows: int, known: gpu.Gpu | None) -> MLAConfig:
    """Return what fits: a block of 64 tokens takes 64 KiB of shared memory, its bytes up to 44, and a tile of 16 rows 18."""
    if known is None:
        return MLAConfig(16, 32, 4)  # the interpreter
    if not known.nvidia:
        return MLAConfig(16, 16, 4, num_stages=1)
    few = rows <= 16
    if known.program_bytes < 128 * _KIB:
        return MLAConfig(16 if few else 32, 32, 4)
    if known.program_bytes < 200 * _KIB:
        return MLAConfig(16, 32, 4, programs_per_sm=2) if few else MLAConfig(32, 32, 4)
    if known.warp_groups:
        return MLAConfig(16 if few else 64, 64, 4, warp_groups=True)
    if few:
        return MLAConfig(16, 64 if bits == 4 else 32, 4, programs_per_sm=2)
    return MLAConfig(32, 64, 8)


@functools.lru_cache
def _sparse_config(rows: int, arch: str | None, known: gpu.Gpu | None) -> MLAConfig:
    """Return what fits of lists: a block of 32 tokens takes 32 KiB of shared memory, and nothing is copied ahead."""
    if known is None or not known.nvidia:
        return _mla_config(4, rows, known)
    if rows <= 16:
        return MLAConfig(16, 32, 4, num_stages=1, programs_per_sm=2 if known.program_bytes >= 128 * _KIB else 1)
    return MLAConfig(64 if rows > 32 and arch == "sm90" else 32, 32, 8, num_stages=1)
