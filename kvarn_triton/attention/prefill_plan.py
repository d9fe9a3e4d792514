"""What the kernels of prefill attention are compiled for, and which of them a call takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import configs
from ..cache import Cache
from ..checks import require
from ..layout import PageLayout, fields_per_byte
from ..masking import Mask

REST_SPLITS = 4
"""Most programs that share what `drafts` leaves of a tile: raw tokens of a sink and of a tail are about 24 units."""
FREE_PROGRAMS = 32
"""One of so many programs of a GPU is left to the rest, which so runs beside whole pages."""


@dataclass(frozen=True)
class PrefillPlan:
    """What the kernel is compiled for."""

    group: int  # query heads of a kv head
    block_m: int  # rows of a tile
    k_channels: int  # channels of a key, padded to a power of two
    v_head_dim: int
    v_channels: int  # channels of a value, padded to a power of two
    block_t: int  # tokens of pages of one product with keys
    block_d: int  # channels of one product with values, unless pages are dequantized
    block_r: int  # raw or new tokens of one step
    k_fields: int  # 1 with scratch memory: channels are in order
    v_fields: int
    operand: tl.dtype
    query_operand: tl.dtype
    raw_operand: tl.dtype
    scratch_operand: tl.dtype
    form: str  # of the loop over pages (`configs.PrefillConfig`)
    apart: bool  # the keys of query tokens are not in the cache
    single: bool  # one share: the result itself is written
    ptx: bool
    num_stages: int
    token_stages: int  # of loops over tokens that are not quantized
    early_merge: bool
    rest: bool  # whether whole pages are left to `drafts`, which merges partial results that are rotated


@functools.lru_cache
def plan_of(
    layout: PageLayout,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    group: int,
    flags: tuple[bool, bool, bool],
    ptx: bool,
    config: configs.PrefillConfig,
    rest: bool = False,
) -> PrefillPlan:
    """Return what the kernel is compiled for.

    `dtypes` are those of queries, of raw pages and of scratch memory, if any; `flags` are `apart`, `single`, `early_merge`.
    """
    q_dtype, raw_dtype, scratch_dtype = dtypes
    apart, single, early = flags
    k_channels, v_channels = triton.next_power_of_2(layout.head_dim), triton.next_power_of_2(layout.v_head_dim)
    return PrefillPlan(
        group=group,
        block_m=config.block_m,
        k_channels=k_channels,
        v_head_dim=layout.v_head_dim,
        v_channels=v_channels,
        block_t=config.block_t,
        block_d=min(config.block_d, v_channels),
        block_r=config.block_r,
        k_fields=fields_per_byte(layout.k_bits) if scratch_dtype is None else 1,
        v_fields=fields_per_byte(layout.v_bits),
        operand=configs.operand(q_dtype, torch.float16),
        query_operand=configs.operand(q_dtype, q_dtype),
        raw_operand=configs.operand(q_dtype, raw_dtype),
        scratch_operand=configs.operand(q_dtype, scratch_dtype or q_dtype),
        form=config.form,
        apart=apart,
        single=single,
        ptx=ptx,
        num_stages=config.num_stages,
        # More than 256 channels: 99 KB of shared memory hold one step only.
        token_stages=1 if max(k_channels, v_channels) > 256 else config.num_stages,
        early_merge=early,
        rest=rest,
    )


def attends_plainly(q: torch.Tensor, cache: Cache, mask: Mask, block_m: int, scratch: torch.dtype) -> bool:
    """Return whether a call with scratch memory of a dtype attends to plain tokens (`plain`) with tiles of block_m rows."""
    raw = q.dtype if cache.raw_pages is None else cache.raw_pages.dtype
    same = q.dtype == scratch == raw
    return same and mask.shows_runs and configs.has_plain_kernel(cache.layout, q.dtype, q.device, block_m)


def _attends_to_all(mask: Mask) -> bool:
    """Return whether whole pages need no mask, and scores are products."""
    return mask.window is None and mask.soft_cap is None


def splits_of_drafts(programs: int, count: int, max_pages: int) -> tuple[int, int]:
    """Return among how many programs to divide the pages and the rest of each of `count` tiles, if a GPU runs `programs`."""
    pages = max(min((programs - programs // FREE_PROGRAMS) // max(count, 1), max_pages), 1)
    return pages, max(min(programs // (2 * max(count, 1)), REST_SPLITS), 1)


def config_of_call(
    q: torch.Tensor,
    cache: Cache,
    mask: Mask,
    split_size: int | None,
    scratch: bool,
    config: configs.PrefillConfig | None,
) -> configs.PrefillConfig:
    """Return the launch parameters of a call: those that it got, checked, or those for its sizes."""
    layout, device, group = cache.layout, q.device, q.shape[1] // max(cache.num_kv_heads, 1)
    if config is not None:
        configs.check_prefill_config(config, layout, q.dtype, scratch)
        fits = _attends_to_all(mask) and split_size is None and configs.has_draft_kernel(layout, q.dtype, device)
        what = "another one on this GPU, and with window, soft_cap or split_size"
        require(config.form != "warp_groups" or fits, "config.form", what, config.form)
        return config
    return configs.prefill_config(layout, q.dtype, device, q.shape[0], cache.batch, group, split_size, scratch)
