"""Lets nano-vllm, which is written for CUDA, run on a CPU with `enforce_eager=True`: for tests and `nano.py --tiny` only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist


def install() -> None:
    """Replace the functions of PyTorch that ask for CUDA or pinned memory, for the whole process."""
    torch._dynamo.config.disable = True  # a small model is computed sooner than it is compiled
    init, set_default_device = dist.init_process_group, torch.set_default_device

    def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)

    def process_group(backend: str, *args: Any, **kwargs: Any) -> None:
        init("gloo", *args, **kwargs)

    dist.init_process_group = process_group
    torch.tensor, torch.zeros = unpinned(torch.tensor), unpinned(torch.zeros)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.set_default_device = lambda device: set_default_device("cpu")
    for name in ("set_device", "empty_cache", "reset_peak_memory_stats", "synchronize"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.mem_get_info = lambda *args: (1 << 26, 1 << 26)
    torch.cuda.memory_stats = lambda *args: {"allocated_bytes.all.current": 0, "allocated_bytes.all.peak": 0}
