"""Memory through which the GPUs of a host exchange results of attention, without a collective: `Exchange`."""

from __future__ import annotations

from typing import Any

import torch

from .attention.exchange import launch_exchange, plan_exchange
from .checks import FLOATS, check_choice, check_count, check_tensor, require
from .launch import aligned
from .layout import SUPPORTED_HEAD_DIMS


class Exchange:
    """Memory of each GPU of a group that the others write results to: one launch exchanges and merges them.

    A collective takes two more launches, and longer. It is for ranks whose GPUs reach each other's memory, as NVLink lets them:
    `torch.distributed._symmetric_memory` connects it. All ranks make it together, once for a server: making it waits for all of
    them, and exchanges a result, which compiles the kernel. After that nothing waits for the host, and calls can be captured.

    All ranks make the same calls in the same order, on one stream or on streams that wait for each other, and let go of it when
    all have made the last one. A rank that waits in vain for another ends with an error of its GPU after some minutes.

    Args:
        num_q_heads: query heads of a rank.
        v_head_dim: channels of a value.
        max_tokens: the most query tokens of a call. It takes 2 x GPUs x `max_tokens` x `num_q_heads` results of memory.
        dtype: of queries and results.
        device: this rank's GPU.
        group: of `torch.distributed`; by default all processes.

    Raises:
        ValueError: for a wrong number, dtype or device.
        RuntimeError: from PyTorch, if the GPUs don't reach each other's memory.
    """

    def __init__(
        self,
        num_q_heads: int,
        v_head_dim: int,
        max_tokens: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        group: Any = None,
    ) -> None:
        from torch import distributed

        check_count("num_q_heads", num_q_heads, least=1)
        check_choice("v_head_dim", v_head_dim, SUPPORTED_HEAD_DIMS)
        check_count("max_tokens", max_tokens, least=1)
        check_choice("dtype", dtype, FLOATS)
        self.device, self.dtype = torch.device(device), dtype
        fits = self.device.type == "cuda" and torch.version.hip is None
        require(fits, "device", "an NVIDIA GPU", str(device))
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.group = group
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        self._plan = plan_exchange(rank, size, max_tokens * num_q_heads, v_head_dim, dtype)
        self._connect()
        ranks = torch.full((1, v_head_dim), float(rank), dtype=dtype, device=self.device)
        out, _ = self.merge(ranks, torch.zeros(1, device=self.device))
        if not bool((out == (size - 1) / 2).all()):
            raise RuntimeError(f"Exchange: expected the mean of ranks 0 to {size - 1}, got {out[0, 0].item()}")

    def _connect(self) -> None:
        """Make this rank's memory, and learn the addresses of all."""
        from torch import distributed
        from torch.distributed import _symmetric_memory

        with torch.cuda.device(self.device):
            self._memory = _symmetric_memory.empty(self._plan.num_bytes, dtype=torch.uint8, device=self.device)
            group: Any = distributed.group.WORLD if self.group is None else self.group
            self._handle = _symmetric_memory.rendezvous(self._memory, group)
            parts = [self._handle.get_buffer(rank, self._memory.shape, torch.uint8) for rank in range(self.size)]
            self._memories = torch.tensor([part.data_ptr() for part in parts], device=self.device)
            self._epochs = torch.zeros(self._plan.num_blocks, dtype=torch.int32, device=self.device)
            self._memory.zero_()
            torch.cuda.synchronize(self.device)
            distributed.barrier(self.group)

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        return self._plan.rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self._plan.size

    @property
    def max_rows(self) -> int:
        """The most results of a call: tokens times query heads."""
        return self._plan.max_rows

    @property
    def v_head_dim(self) -> int:
        """Channels of a result."""
        return self._plan.v_head_dim

    def check(self, v_head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise a ValueError unless results like these are what it was made for."""
        made, given = (self.v_head_dim, self.dtype, self.device), (v_head_dim, dtype, device)
        require(made == given, "exchange", f"results of {given[0]} channels, {given[1]} on {given[2]}", made)

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the merged results of all ranks, the same bits on all of them, those of `merge_states`.

        Args:
            out: [..., v_head_dim], attention of the same queries to what this rank has, of at most `max_rows` rows.
            lse: float32 [...], natural logarithm of the sum of exponentiated scores; -inf where that is nothing.

        Raises:
            ValueError: for another shape, dtype or device than it was made for.
        """
        dims = out.dim() if isinstance(out, torch.Tensor) else 1
        check_tensor("out", out, [*[None] * (dims - 1), self.v_head_dim], self.dtype, device=self.device, contiguous_dims=dims)
        check_tensor("lse", lse, out.shape[:-1], torch.float32, device=self.device, contiguous_dims=dims - 1)
        require(lse.numel() <= self.max_rows, "out", f"at most {self.max_rows} rows, which Exchange was made for", lse.numel())
        return launch_exchange((aligned(out), lse), self._memory, self._memories, self._epochs, self._plan)
