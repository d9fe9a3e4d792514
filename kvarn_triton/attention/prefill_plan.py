"""What the kernels of prefill attention are compiled for, and which of them a call takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import configs, gpu
from ..cache import Cache
from ..checks import require
from ..layout import PageLayout, fields_per_byte
from ..masking import Mask

LEAST_TILES = 8
"""Tiles of query heads from which on decode attention takes the kernel of `drafts`; 4 take 5 % longer at 1 x 32K
(`perf/results/heads_h200.json`)."""
WAVES = 2
"""Most programs of a launch of `drafts`, as a multiple of those that a GPU runs at once."""
LEAST_FILL = 0.8
"""Share of a GPU's time from which on prefill attention takes that kernel: it is about as much faster than the usual one."""
PROGRAM_START = 1 / 64
"""What a program takes before and after its pages, as a share of what a tile takes: about two pages of 16K tokens."""


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


@functools.lru_cache
def plan_of(
    layout: PageLayout,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    group: int,
    flags: tuple[bool, bool, bool],
    ptx: bool,
    config: configs.PrefillConfig,
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
    )


def attends_plainly(q: torch.Tensor, cache: Cache, mask: Mask, block_m: int, scratch: torch.dtype) -> bool:
    """Return whether a call with scratch memory of a dtype attends to plain tokens (`plain`) with tiles of block_m rows."""
    raw = q.dtype if cache.raw_pages is None else cache.raw_pages.dtype
    same = q.dtype == scratch == raw
    return same and mask.shows_runs and configs.has_plain_kernel(cache.layout, q.dtype, q.device, block_m)


def _takes_drafts(q: torch.Tensor, cache: Cache, mask: Mask) -> bool:
    """Return whether `drafts` has an answer to a call: causal, scores as they are, one dtype of 16 bits, and a GPU for it."""
    plain = mask.window is None and mask.soft_cap is None and mask.tree_mask is None and mask.span_ends is None
    same = cache.raw_pages is None or cache.raw_pages.dtype == q.dtype
    return plain and same and configs.has_draft_kernel(cache.layout, q.dtype, q.device)


@functools.lru_cache(maxsize=4096)
def share_tiles(tiles: int, programs: int, max_pages: int) -> tuple[int, float]:
    """Return among how many programs `drafts` divides each tile, if a GPU runs `programs` at once, and how full that keeps it.

    More than fit at once, up to WAVES times as many, where otherwise many would stay empty. The second is a share of 1.
    """
    most = max(min(WAVES * programs // max(tiles, 1), max_pages), 1)
    waves = {splits: -(-tiles * splits // programs) for splits in range(1, most + 1)}
    splits = min(waves, key=lambda splits: waves[splits] * (1 / splits + PROGRAM_START))
    return splits, tiles * splits / programs / max(waves[splits], 1)


def fills(tiles: int, programs: int, max_pages: int) -> bool:
    """Return whether tiles are as many as `drafts` has memory for, and keeps a GPU busy with, if pages are enough for that."""
    few = tiles * max_pages <= programs
    return tiles <= WAVES * programs and (few or share_tiles(tiles, programs, max_pages)[1] >= LEAST_FILL)


def config_of_heads(q: torch.Tensor, cache: Cache, mask: Mask) -> tuple[configs.PrefillConfig, int] | None:
    """Return the launch parameters of `drafts` for one query token of each sequence, and how many programs share a tile.

    The query heads of a kv head are the rows of a tile, of which `decode_kernel` has 8. None where that is faster, with few
    tiles, and for more of them than there is memory for.
    """
    group = q.shape[1] // max(cache.num_kv_heads, 1)
    if group <= configs.HEAD_TILE or not _takes_drafts(q, cache, mask):
        return None
    return _config_of_heads(cache.layout, q.dtype, q.device, (group, cache.num_kv_heads, cache.batch), cache.max_pages)


@functools.lru_cache(maxsize=1024)
def _config_of_heads(
    layout: PageLayout, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int, int], max_pages: int
) -> tuple[configs.PrefillConfig, int] | None:
    group, num_kv_heads, batch = sizes
    config = configs.config_of_form("warp_groups", layout, dtype, device, group)
    tiles, programs = batch * num_kv_heads * -(-group // config.block_m), gpu.num_programs(device, config.programs_per_sm)
    return (config, share_tiles(tiles, programs, max_pages)[0]) if LEAST_TILES <= tiles <= WAVES * programs else None


def sizes_of_heads(
    layout: PageLayout, dtype: torch.dtype, device: torch.device, heads: tuple[int, int]
) -> list[tuple[int, int, bool]]:
    """Return batches, columns of tables, and whether there are raw pages, of decode calls that `config_of_heads` speaks of.

    They differ when compiled: programs share the pages of a tile, or don't. `heads` are those of queries and kv heads.
    """
    group = heads[0] // heads[1]
    if group <= configs.HEAD_TILE or not configs.has_draft_kernel(layout, dtype, device):
        return []
    block_m = configs.config_of_form("warp_groups", layout, dtype, device, group).block_m
    batch = -(-LEAST_TILES // (heads[1] * -(-group // block_m)))
    return [(batch, columns, raw) for columns in (1, 4096) for raw in (False, True)]


def other_configs(layout: PageLayout, dtype: torch.dtype, device: torch.device, tokens: int, group: int) -> list:
    """Return what calls of `tokens` of each sequence get beside the usual launch parameters: with more sequences, or masks."""
    form = configs.prefill_config(layout, dtype, device, tokens, 1, group, None).form
    return [configs.config_of_form("registers", layout, dtype, device, tokens * group)] if form == "warp_groups" else []


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
        fits = split_size is None and _takes_drafts(q, cache, mask)
        what = "another one for this GPU, window, soft_cap, tree_mask, span_ends, split_size, or raw_pages of another dtype"
        require(config.form != "warp_groups" or fits, "config.form", what, config.form)
        return config
    config = configs.prefill_config(layout, q.dtype, device, q.shape[0], cache.batch, group, split_size, scratch)
    if config.form == "warp_groups":
        tiles = cache.batch * -(-q.shape[0] // max(cache.batch, 1) * group // config.block_m) * cache.num_kv_heads
        programs = gpu.num_programs(device, config.programs_per_sm)
        if not (_takes_drafts(q, cache, mask) and fills(tiles, programs, cache.max_pages)):
            config = configs.config_of_form("registers", layout, q.dtype, device, config.block_m)
    return config
