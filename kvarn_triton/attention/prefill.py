"""Attention of several query tokens per sequence: chunked prefill, verification of drafts, first chunks.

The first kernel attends with tiles of query rows (`prefill_kernel`); each page is decoded once for all rows of a tile. Where
there are fewer tiles than the GPU holds programs, the pages of a tile are split among several programs, and the second kernel
merges their results (`merge`). With scratch memory a launch before decodes each page once (`pages.expand`), and tiles
attend to numbers in 16 bits, on one architecture by a kernel of its own (`plain`); long chunks take such memory by themselves.
Few rows, as of drafts, have a kernel of their own on that architecture, too (`drafts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import configs, gpu, reference
from ..cache import (
    Cache,
    Results,
    check_new,
    check_queries,
    check_scratch,
    check_split_size,
    check_workspace,
    checked_for_attention,
)
from ..checks import require
from ..launch import Rows, aligned, as_rows, check_pool, copy_back
from ..layout import PageLayout
from ..masking import Mask
from ..pages.expand import launch_expand_pages
from ..pages.plain_raw import launch_plain_raw
from ..paging import ALL_PAGES
from .drafts import attend_drafts
from .merge import launch_merge_queries
from .plain import launch_plain_tiles, tokens_of_round
from .prefill_kernel import launch_prefill_tiles
from .prefill_plan import attends_plainly, config_of_call, share_tiles
from .schedule import Tiles
from .workspace import own_scratch, partials_of, tokens_per_round

MAX_PROGRAMS = 2**31 - 1
"""Most programs of a grid."""


def prefill_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    layout: PageLayout,
    *,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    sm_scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    split_size: int | None = None,
    workspace: torch.Tensor | None = None,
    scratch: torch.Tensor | None = None,
    keep_sink: bool = False,
    config: configs.PrefillConfig | None = None,
    tree_mask: torch.Tensor | None = None,
    span_ends: torch.Tensor | None = None,
    past_only: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with several query tokens per sequence, causally: chunked prefill, verification of drafts, first chunks.

    The query tokens of a sequence are its last ones: token i of n is at position `seq_lens[b] - n + i` and sees all
    positions up to its own, unless `tree_mask` or `span_ends` say otherwise of the n tokens. Their keys and values are `k` and
    `v` if given, exact and not in the cache yet; otherwise they are in the cache like all others (`append_tokens`).

    Args:
        q: float16, bfloat16 or float32 [total_tokens, num_q_heads, head_dim], the query tokens of all sequences one after the
            other, after the position encoding, not rotated.
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        block_table: int32 [batch, max_pages]; column j is the page id of body page j. None with `kv_indptr`.
        seq_lens: int32 [batch], tokens of each sequence, its query tokens included.
        cu_seqlens_q: int32 [batch + 1]; the query tokens of sequence b are those from cu_seqlens_q[b] to cu_seqlens_q[b + 1] of
            `q`. Tokens before cu_seqlens_q[0] and from cu_seqlens_q[batch] on are no sequence's: padding, whose output is not
            written if `out` is given, and zeros if not; their lse is -inf.
        layout: the page format.
        k: new keys like q, [total_tokens, num_kv_heads, head_dim], not rotated. None if they are in the cache.
        v: new values, like `k`, with v_head_dim.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim], rotated keys
            and values of sinks and tails (`append_tokens`). None if everything is quantized.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]. Needed with `raw_pages`.
        num_quantized: int32 [batch], how many body pages are read from `pages`. Needed with `raw_pages`.
        sink_len: tokens at the start of every sequence that stay raw.
        kv_indptr: int32 [batch + 1], with `kv_indices` instead of `block_table`: body page j of sequence b is
            kv_indices[kv_indptr[b] + j].
        kv_indices: int32 [n], page ids.
        sm_scale: factor of the scores, a number and no tensor; by default head_dim ** -0.5.
        window: how many positions a query sees, its own included. Pages that no query of a sequence sees are not read.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: float32 [num_q_heads], a logit per query head that takes weight and has no value.
        out: where to write: [total_tokens, num_q_heads, v_head_dim], of the dtype of `q`, any strides whose innermost is 1.
        return_lse: whether to return the log-sum-exp too.
        split_size: batch-invariant mode: pages of one run into which each sequence is cut, so that the bits of a row depend
            on its sequence alone. By default as many runs as it takes to give every multiprocessor work.
        workspace: uint8 [at least prefill_workspace_size(...)], contiguous; allocated if not given.
        scratch: memory for dequantized pages, which makes long chunks over long caches faster: [num_slots, 2, num_kv_heads,
            page_size, layout.raw_head_dim], any strides whose innermost is 1, float16 or bfloat16, float32 if `q` is. There is
            a slot for each entry of `block_table` or `kv_indices`: num_slots is at least block_table.numel() or
            len(kv_indices). A launch before the others writes each quantized page that some query sees to its slot; other
            slots are neither read nor written. Keys and values are rounded to the dtype of `scratch`, in which they are
            multiplied too; what is beyond the range of float16 becomes infinite (`dequantize_pages`). None: such memory of the
            dtype of `q` is allocated, at most 256 MiB, if that is 16 bits and sequences have 256 query tokens or more on
            average; not with `split_size` or `config`. It holds all pages; where they are more, some at a time, on GPUs of
            compute capability 9.0, which have a faster kernel for such calls if `q`, `scratch` and raw pages are of one 16-bit
            dtype, head_dims are 64, 128 or 256, and there is no soft cap or `tree_mask`. With a window it holds what that
            shows. Rounds take up to 256 MiB more for states. Otherwise every tile of query rows dequantizes the pages itself.
        keep_sink: with a window, whether the first `sink_len` tokens stay visible beside it (StreamingLLM, arXiv 2309.17453).
        config: launch parameters; by default the package's own for the device and the numbers of tokens and heads. In the
            batch-invariant mode the bits of a row depend on them too.
        tree_mask: int64 [total_tokens], with `k` and `v`: the new tokens of its sequence that each new token sees, bit j for
            the j-th, whatever the window; `build_tree_mask` makes such words of parents. A word without a bit of a new token
            says nothing, nor do words of a sequence with more than 64 new tokens: those tokens are causal, or have spans. A
            window hides older tokens from position `seq_lens[b] - n` plus the number of bits, less one.
        span_ends: int32 [total_tokens], with `k` and `v`: new token i of a sequence sees the new tokens before number
            max(i + 1, span_ends) of it.
        past_only: whether queries see only what is before the first query token of their sequence. The keys of the query tokens
            are then neither given nor in the cache, though `seq_lens` count them: another call attends to those, and
            `merge_states` joins both (`kvarn_triton.parallel`).

    Returns:
        `out` [total_tokens, num_q_heads, v_head_dim], or `out` and `lse` float32 [total_tokens, num_q_heads] (natural
        logarithm, sinks included). A query that sees nothing gives zeros and lse = -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option; nothing is written. Ids and lengths are not read to be
            checked.
    """
    cache = Cache(
        layout, pages, seq_lens, block_table, kv_indptr, kv_indices, raw_pages, raw_table, num_quantized, sink_len
    )  # fmt: skip
    cache = checked_for_attention(cache, None)
    mask = Mask(sm_scale, window, soft_cap, sinks, keep_sink, tree_mask, span_ends, past_only)
    check_queries(q, cache, mask, out)
    check_new(q, (k, v), cu_seqlens_q, cache, mask)
    check_split_size(split_size)
    results = Results(out, return_lse, workspace)
    plan = plan_prefill(q, cu_seqlens_q, cache, mask, results, split_size, scratch, config)
    if not gpu.on_device(q):
        return reference.prefill_attention(
            q, pages, block_table, seq_lens, cu_seqlens_q, layout, k=k, v=v, raw_pages=cache.raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices,
            sm_scale=mask.sm_scale, window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
            keep_sink=keep_sink, tree_mask=tree_mask, span_ends=span_ends, past_only=past_only,
        )  # fmt: skip
    return launch_prefill(q, (k, v), mask, results, plan)


class PrefillPlanned(NamedTuple):
    """How a call is computed."""

    tiles: Tiles
    num_bytes: int  # of partial results
    scratch: torch.Tensor | None
    plain: bool  # whether tiles attend to plain tokens (`plain`)


def plan_prefill(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache: Cache,
    mask: Mask,
    results: Results,
    split_size: int | None,
    scratch: torch.Tensor | None,
    config: configs.PrefillConfig | None,
) -> PrefillPlanned:
    """Return how a call is computed, and check its launch parameters and the memory for partial results and pages."""
    own = scratch is None and config is None and split_size is None
    scratch, ring = own_scratch(q, cache, mask) if own else (scratch, ALL_PAGES.value)
    config = config_of_call(q, cache, mask, split_size, scratch is not None, config)
    if scratch is not None and not own:
        check_scratch(scratch, q.dtype, cache)
        scratch = check_pool("scratch", scratch)
    tiles = _plan_tiles(q, cu_seqlens_q, cache, split_size, config, ring, fill=results.out is None)
    num_bytes = 0
    if tiles.num_splits > 1 or config.form == "warp_groups":
        num_bytes = len(tiles.tokens) * _token_bytes(tiles.num_splits, q.shape[1], cache.layout)
    if results.workspace is not None:
        check_workspace(results.workspace, num_bytes, q.device)
    plain = scratch is not None and len(scratch) > 0 and attends_plainly(q, cache, mask, config.block_m, scratch.dtype)
    return PrefillPlanned(tiles, num_bytes, scratch, plain)


def launch_prefill(
    q: torch.Tensor,
    keys_and_values: tuple[torch.Tensor | None, torch.Tensor | None],
    mask: Mask,
    results: Results,
    plan: PrefillPlanned,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend as planned to the cache and to new keys and values, if there are any; nothing is checked."""
    tiles, num_bytes, scratch, plain = plan
    cache, (k, v), out, workspace = tiles.cache, keys_and_values, results.out, results.workspace
    total_tokens, num_q_heads = q.shape[:2]
    if out is None:
        out = torch.empty(total_tokens, num_q_heads, cache.layout.v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(total_tokens, num_q_heads, dtype=torch.float32, device=q.device) if results.return_lse else None
    if workspace is None:
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    if total_tokens == 0 or num_q_heads == 0 or cache.batch == 0:
        if tiles.fill:
            out.zero_()
        return out if lse is None else (out, lse.fill_(-torch.inf))
    q, memory = aligned(q), aligned(out)
    new = None if k is None or v is None else (as_rows(aligned(k)), as_rows(aligned(v)))
    assert tiles.cu_seqlens_q is not None
    seen = tiles.cu_seqlens_q, cache, mask.windows, k is not None or mask.past_only
    if scratch is not None and tiles.ring >= cache.max_pages:
        launch_expand_pages(scratch, *seen, rotated=not plain)
    raw = None
    if plain:
        raw = launch_plain_raw(*seen)
        tiles = dataclasses.replace(tiles, tokens=tokens_of_round(tiles, mask, num_q_heads))
    rotation = 1 if plain or new is not None else cache.layout.v_block_size

    def launch(out: Rows, lse: torch.Tensor | None, part: Tiles) -> None:
        if plain and scratch is not None:
            launch_plain_tiles(out, lse, q, new, (scratch, raw), mask, part)
        else:
            launch_prefill_tiles(out, lse, q, new, scratch, mask, part)

    if tiles.config.form == "warp_groups":
        attend_drafts((memory, lse), q, new, mask, tiles, partials_of(memory, tiles, workspace[:num_bytes]))
    else:
        _attend(launch, (memory, lse), mask, rotation, tiles, workspace[:num_bytes])
    copy_back(memory, out)
    return out if lse is None else (out, lse)


def _plan_tiles(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cache: Cache,
    split_size: int | None,
    config: configs.PrefillConfig,
    ring: int,
    fill: bool,
) -> Tiles:
    """Return how the work of a call is cut: the tiles of its first round, which has as many tokens as the others at least."""
    total_tokens, num_q_heads = q.shape[:2]
    num_kv_heads, layout = cache.num_kv_heads, cache.layout
    group = num_q_heads // max(num_kv_heads, 1)
    if split_size is not None:
        splits = max(-(-cache.max_pages // split_size), 1)
    else:
        rows = -(-total_tokens // max(cache.batch, 1)) * group
        count = cache.batch * -(-rows // config.block_m) * num_kv_heads
        programs = gpu.num_programs(q.device, config.programs_per_sm)
        if config.form == "warp_groups":
            splits = share_tiles(count, programs, cache.max_pages)[0]
        else:
            splits = max(min(programs // max(count, 1), cache.max_pages), 1)
    most = MAX_PROGRAMS // max((-(-total_tokens * group // config.block_m) + cache.batch) * num_kv_heads, 1)
    require(splits <= most, "split_size", f"one that cuts pages into at most {most} runs", split_size)
    round_tokens = total_tokens
    if split_size is not None and splits > 1:
        round_tokens = tokens_per_round(total_tokens, _token_bytes(splits, num_q_heads, layout), config.block_m)
    return Tiles(cache, cu_seqlens_q, range(round_tokens), splits, split_size or 0, fill, config, ring)


def _token_bytes(num_splits: int, num_q_heads: int, layout: PageLayout) -> int:
    """Return how many bytes the partial results of a token take."""
    return 4 * num_splits * num_q_heads * (layout.v_head_dim + 1)


def _attend(
    launch: Callable[[Rows, torch.Tensor | None, Tiles], None],
    results: tuple[torch.Tensor, torch.Tensor | None],
    mask: Mask,
    rotation: int,
    tiles: Tiles,
    workspace: torch.Tensor,
) -> None:
    """Attend, in rounds of `tiles.tokens`, and merge what several programs have computed of a tile.

    Partial results are rotated back in blocks of `rotation` channels.
    """
    out, lse = results
    for first in range(0, out.shape[0], len(tiles.tokens)):
        tokens = range(first, min(first + len(tiles.tokens), out.shape[0]))
        part = dataclasses.replace(tiles, tokens=tokens)
        if tiles.num_splits == 1:
            launch(as_rows(out), lse, part)
            continue
        partial, partial_lse = partials_of(out, part, workspace)
        launch(as_rows(partial[0]), partial_lse, part)
        launch_merge_queries(out, lse, partial, partial_lse, mask.sinks, part, rotation)
