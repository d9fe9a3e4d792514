"""What each GPU architecture has, in one table, and what is asked of the GPU at hand. A new architecture is a new row."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton runs kernels in its interpreter; fixed when the kernels are decorated, that is, on import."""
_KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """An architecture (CUDA programming guide, table of compute capabilities; CDNA ISA).

    Args:
        arch: its name, such as sm90 or gfx942.
        multiprocessor_bytes: shared memory of a multiprocessor (compute unit).
        program_bytes: most shared memory of one program.
        wavefront: threads of a warp (wavefront).
        starts_early: whether a kernel can start while the one before it ends (programmatic dependent launch).
        warp_groups: whether it has asynchronous products of warp groups (`wgmma`).
    """

    arch: str
    multiprocessor_bytes: int
    program_bytes: int
    wavefront: int = 32
    starts_early: bool = False
    warp_groups: bool = False

    @property
    def nvidia(self) -> bool:
        """Whether it is a GPU of NVIDIA, not of AMD."""
        return self.arch.startswith("sm")


GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm80", 164 * _KIB, 163 * _KIB),
        Gpu("sm86", 100 * _KIB, 99 * _KIB),
        Gpu("sm89", 100 * _KIB, 99 * _KIB),
        Gpu("sm90", 228 * _KIB, 227 * _KIB, starts_early=True, warp_groups=True),
        Gpu("sm100", 228 * _KIB, 227 * _KIB, starts_early=True),
        Gpu("sm120", 100 * _KIB, 99 * _KIB, starts_early=True),
        Gpu("gfx942", 64 * _KIB, 64 * _KIB, wavefront=64),
        Gpu("gfx950", 160 * _KIB, 160 * _KIB, wavefront=64),
    )
}
"""Every architecture that the kernels are compiled for in the tests."""


def on_device(tensor: torch.Tensor) -> bool:
    """Return whether kernels run for this tensor: on a GPU, or anywhere in Triton's interpreter."""
    return tensor.is_cuda or INTERPRETED


def uses_ptx() -> bool:
    """Return whether kernels may contain inline PTX: on NVIDIA GPUs, not on AMD's and not in the interpreter."""
    return torch.version.hip is None and not INTERPRETED


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
def _known(arch: str) -> Gpu:
    """Return the row of an architecture; without one, that of the nearest older one, with the least shared memory of all."""
    if arch in GPUS:
        return GPUS[arch]
    family = sorted((row for row in GPUS.values() if row.nvidia == arch.startswith("sm")), key=lambda row: _number(row.arch))
    older = [row for row in family if _number(row.arch) <= _number(arch)]
    nearest = older[-1] if older else family[0]
    least = min(row.multiprocessor_bytes for row in GPUS.values())
    threads = 64 if arch.startswith("gfx9") else 32
    return dataclasses.replace(
        nearest, arch=arch, multiprocessor_bytes=least, program_bytes=least, wavefront=threads, warp_groups=False
    )


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm").removeprefix("gfx"), 16 if arch.startswith("gfx") else 10)


def gpu_of(device: torch.device) -> Gpu | None:
    """Return what the architecture of a GPU has; None for a CPU."""
    arch = arch_of(device)
    return None if arch is None else _known(arch)


def launches_early(device: torch.device) -> bool:
    """Return whether a kernel can start while the one before it ends."""
    gpu = gpu_of(device)
    return gpu is not None and gpu.starts_early


def wavefront(device: torch.device) -> int:
    """Return the threads of a warp."""
    gpu = gpu_of(device)
    return 32 if gpu is None else gpu.wavefront


def multiprocessor_bytes(device: torch.device) -> int:
    """Return the shared memory of a multiprocessor: what the device says, else what is known of the architecture."""
    return _device_bytes(device) or _bytes_of(gpu_of(device))


def _bytes_of(gpu: Gpu | None) -> int:
    return min(gpu.multiprocessor_bytes for gpu in GPUS.values()) if gpu is None else gpu.multiprocessor_bytes


@functools.lru_cache
def _device_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 0)


@functools.lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 2 in the interpreter, where more programs only cost time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def num_programs(device: torch.device, programs_per_sm: int) -> int:
    """Return how many programs a GPU runs at once if a multiprocessor runs `programs_per_sm`."""
    return num_multiprocessors(device) * programs_per_sm
