"""Exchange results of attention between the GPUs of a host, and merge them, in one launch.

Each GPU has memory that the others write to. A program writes its rows of this GPU's result into the memory of all others,
tells them, waits until they have told it the same, and merges what lies in its own memory, as `attention/states.py` does. Grid:
(block of rows,). Bytes moved: each result once over the link to each other GPU, and once from memory for the merge.

A count of each block, its epoch, says which exchange it is, and which half of the memory is written to. A GPU that is one
exchange ahead writes to the other half; it can't be two ahead, because it waits for the others in between. So nothing waits
until memory has been read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import configs
from ..launch import on

_LINE = 128
"""Bytes to whose multiples the parts of the memory are aligned."""
_MOST_POLLS = tl.constexpr(1 << 29)
"""Of about a microsecond each: after minutes a GPU gives up waiting for others, as collectives do."""


@dataclass(frozen=True)
class ExchangePlan:
    """What an exchange is compiled for, and where things lie in the memory of each GPU.

    From its start: a word of each other GPU for each block, its epoch; log-sum-exps [half, GPU, row]; results [half, GPU, row,
    channel].
    """

    rank: int
    size: int  # GPUs
    max_rows: int
    v_head_dim: int
    itemsize: int  # bytes of a number of a result
    block_r: int

    @property
    def num_blocks(self) -> int:
        """Return how many programs the largest exchange has."""
        return -(-self.max_rows // self.block_r)

    @property
    def lse_start(self) -> int:
        """Return the byte at which log-sum-exps begin."""
        return _lines(4 * self.size * self.num_blocks)

    @property
    def out_start(self) -> int:
        """Return the byte at which results begin."""
        return self.lse_start + _lines(4 * 2 * self.size * self.max_rows)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the memory of a GPU."""
        return self.out_start + _lines(2 * self.size * self.max_rows * self.v_head_dim * self.itemsize)


def _lines(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


def plan_exchange(rank: int, size: int, max_rows: int, v_head_dim: int, dtype: torch.dtype) -> ExchangePlan:
    """Return the plan of exchanges of up to `max_rows` rows between `size` GPUs. A program of one warp has a few rows."""
    block_r = max(configs.row_block(configs.padded(v_head_dim)) // 8, 1)
    return ExchangePlan(rank, size, max_rows, v_head_dim, dtype.itemsize, block_r)


@triton.jit
def _slots(memory, out_ptr, source, epoch, PLAN: tl.constexpr):
    """Return pointers to the first log-sum-exp and result that GPU `source` writes to `memory` in an exchange."""
    place = ((epoch & 1) * PLAN.size + source).to(tl.int64) * PLAN.max_rows
    lse_ptr = tl.multiple_of((memory + PLAN.lse_start).to(tl.pointer_type(tl.float32)), 16) + place
    first_ptr = tl.multiple_of((memory + PLAN.out_start).to(out_ptr.dtype), 16)
    return lse_ptr, first_ptr + place * PLAN.v_head_dim


@triton.jit
def _tell_and_wait(memory_ptr, memories_ptr, epoch, block, PLAN: tl.constexpr):
    """Write the epoch to the words of this GPU in the memory of all others, and wait until theirs are as far."""
    PADDED: tl.constexpr = triton.next_power_of_2(PLAN.size)
    gpus = tl.arange(0, PADDED)
    others = (gpus < PLAN.size) & (gpus != PLAN.rank)
    words = tl.load(memories_ptr + gpus, others, other=0).to(tl.pointer_type(tl.int32)) + (PLAN.rank * PLAN.num_blocks + block)
    tl.debug_barrier()  # all warps have written what the words announce
    tl.atomic_xchg(words, tl.zeros_like(gpus) + epoch, others, sem="release", scope="sys")
    own = memory_ptr.to(tl.pointer_type(tl.int32)) + (gpus * PLAN.num_blocks + block)
    behind, polls = 1, 0
    while behind > 0:
        seen = tl.atomic_add(own, tl.zeros_like(gpus), others, sem="acquire", scope="sys")
        # The difference is right when the counts run over, too.
        behind = tl.max(tl.where(others, epoch - seen, 0), axis=0)
        polls += 1
        if polls > _MOST_POLLS:
            tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r,r", [polls], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["lse_ptr", "part_lse_ptr"])
def _kvarn_exchange_kernel(
    out_ptr,  # [rows, v_head_dim]
    lse_ptr,  # float32 [rows], natural logarithm
    part_ptr,  # [rows, v_head_dim], this GPU's
    part_lse_ptr,  # float32 [rows]
    memory_ptr,  # uint8, this GPU's memory
    memories_ptr,  # int64 [size], addresses of the memory of all GPUs
    epochs_ptr,  # int32 [blocks], exchanges so far
    num_rows,
    PLAN: tl.constexpr,
):
    BLOCK_D: tl.constexpr = triton.next_power_of_2(PLAN.v_head_dim)
    BLOCK_R: tl.constexpr = PLAN.block_r
    SIZE: tl.constexpr = PLAN.size
    block = tl.program_id(0)
    epoch = tl.load(epochs_ptr + block) + 1
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = rows < num_rows
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    place = rows[:, None].to(tl.int64) * PLAN.v_head_dim + offs_d
    mask = mask_r[:, None] & (offs_d < PLAN.v_head_dim)
    own, own_lse = tl.load(part_ptr + place, mask, other=0.0), tl.load(part_lse_ptr + rows, mask_r, other=float("-inf"))
    for step in tl.static_range(1, SIZE):
        memory = tl.load(memories_ptr + (PLAN.rank + step) % SIZE).to(tl.pointer_type(tl.uint8))
        lses, results = _slots(memory, part_ptr, PLAN.rank, epoch, PLAN)
        tl.store(lses + rows, own_lse, mask_r)
        tl.store(results + place, own, mask)
    _tell_and_wait(memory_ptr, memories_ptr, epoch, block, PLAN)
    tl.store(epochs_ptr + block, epoch)
    top = own_lse
    for gpu in tl.static_range(SIZE):
        if gpu != PLAN.rank:
            lses, _ = _slots(memory_ptr, part_ptr, gpu, epoch, PLAN)
            top = tl.maximum(top, tl.load(lses + rows, mask_r, other=float("-inf"), cache_modifier=".cg"))
    some = top > float("-inf")
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for gpu in tl.static_range(SIZE):
        lse, part = own_lse, own
        if gpu != PLAN.rank:
            lses, results = _slots(memory_ptr, part_ptr, gpu, epoch, PLAN)
            lse = tl.load(lses + rows, mask_r, other=float("-inf"), cache_modifier=".cg")
            part = tl.load(results + place, mask, other=0.0, cache_modifier=".cg")
        weight = tl.where((lse == top) & some, 1.0, tl.exp(lse - tl.where(some, top, 0.0)))
        total += weight
        acc += tl.where(weight[:, None] > 0, part.to(tl.float32), 0.0) * weight[:, None]
    merged = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out_ptr + place, merged.to(out_ptr.dtype.element_ty), mask)
    tl.store(lse_ptr + rows, tl.log(total) + top, mask_r)


def launch_exchange(
    part: tuple[torch.Tensor, torch.Tensor],
    memory: torch.Tensor,
    memories: torch.Tensor,
    epochs: torch.Tensor,
    plan: ExchangePlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the merged results of all GPUs, `part` being this one's `out` and `lse`, contiguous; nothing is checked.

    `memory` is this GPU's, `memories` has the addresses of all, `epochs` counts the exchanges of each block.
    """
    out, lse = (torch.empty_like(x, memory_format=torch.contiguous_format, requires_grad=False) for x in part)
    num_rows = lse.numel()
    if num_rows:
        on(out, _kvarn_exchange_kernel)[(-(-num_rows // plan.block_r),)](
            out, lse, *part, memory, memories, epochs, num_rows, PLAN=plan, num_warps=1, enable_fp_fusion=False
        )
    return out, lse
