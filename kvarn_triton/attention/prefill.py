"""Attention of several query tokens per sequence: chunked prefill, verification of drafts, first chunks.

The first kernel attends with tiles of query rows (`prefill_tiles`); each page is decoded once for all rows of a tile. Where
there are fewer tiles than the GPU holds programs, the pages of a tile are split among several programs, and the second kernel
merges their results (`prefill_merge`). With scratch memory a launch before decodes each page once (`prefill_expand`), and tiles
attend to numbers in 16 bits.
"""

from __future__ import annotations

import torch

from .. import configs, gpu, reference
from ..cache import check_attention, check_call, check_scratch
from ..checks import check_aligned, check_tensor, require
from ..launch import aligned, check_pool, copy_back
from ..layout import PageLayout
from ..pages.expand import launch_expand_pages
from . import workspace as workspaces
from .merge_queries import launch_merge_queries
from .prefill_kernel import launch_prefill_tiles
from .workspace import tokens_per_round

MAX_PROGRAMS = 2**31 - 1
"""Most programs of a grid."""


def prefill_workspace_size(
    total_tokens: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    layout: PageLayout,
    max_pages: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float16,
    split_size: int | None = None,
    scratch: bool = False,
) -> int:
    """Return how many bytes of workspace `prefill_attention` needs at most.

    They suffice for every call with as many or fewer tokens, sequences, heads and columns, and grow with each of them. Without
    `split_size` that is some partial results for each multiprocessor. With it, 256 MiB suffice for any number of tokens, which
    are then computed in rounds; only partial results of a single token that are larger take more.

    Args:
        total_tokens: query tokens of all sequences.
        batch: sequences.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        layout: the page format.
        max_pages: columns of `block_table`; with `kv_indices`, its length.
        device: where the call will run; the number of programs depends on it.
        dtype: dtype of the queries.
        split_size: as given to `prefill_attention`.
        scratch: whether `prefill_attention` gets a `scratch`.
    """
    row_bytes = 4 * (layout.v_head_dim + 1)
    if split_size is not None:
        splits = -(-max_pages // split_size)
        token_bytes = splits * num_q_heads * row_bytes
        return min(total_tokens * token_bytes, max(workspaces.ROUND_BYTES, token_bytes)) if splits > 1 else 0
    # Tiles times splits are no more than programs, and rows no more than those of all tiles.
    rows = total_tokens * num_q_heads
    sizes = [least for least in (1, *(most + 1 for most in configs.TILE_ROWS)) if least <= rows]
    tiles = [configs.prefill_config(layout, dtype, device, least, 1, 1, None, scratch) for least in sizes]
    programs = [gpu.num_programs(device, config.programs_per_sm) * config.block_m for config in tiles]
    return row_bytes * min(max(programs, default=0), max_pages * rows)


def _num_splits(
    total_tokens: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    max_pages: int,
    device: torch.device,
    config: configs.PrefillConfig,
    split_size: int | None,
) -> int:
    """Return among how many programs the pages of a tile are split."""
    if split_size is not None:
        return max(-(-max_pages // split_size), 1)
    rows = -(-total_tokens // max(batch, 1)) * (num_q_heads // max(num_kv_heads, 1))
    tiles = batch * -(-rows // config.block_m) * num_kv_heads
    programs = gpu.num_programs(device, config.programs_per_sm)
    return max(min(programs // max(tiles, 1), max_pages), 1)


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with several query tokens per sequence, causally: chunked prefill, verification of drafts, first chunks.

    The query tokens of a sequence are its last ones: token i of n is at position `seq_lens[b] - n + i` and sees all
    positions up to its own. The keys and values of these n tokens are `k` and `v` if given, exact and not in the cache
    yet; otherwise they are in the cache like all others (`append_tokens`).

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
            multiplied too; what is beyond the range of float16 becomes infinite (`dequantize_pages`). None: every tile of
            query rows dequantizes the pages itself.

    Returns:
        `out` [total_tokens, num_q_heads, v_head_dim], or `out` and `lse` float32 [total_tokens, num_q_heads] (natural
        logarithm, sinks included). A query that sees nothing gives zeros and lse = -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids and lengths are not read to be checked.
    """
    num_kv_heads = check_attention(
        q, None, pages, block_table, seq_lens, layout,
        raw_pages=raw_pages, raw_table=raw_table, num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr,
        kv_indices=kv_indices, window=window, soft_cap=soft_cap, sinks=sinks, out=out,
    )  # fmt: skip
    total_tokens, num_q_heads, v_head_dim = *q.shape[:2], layout.v_head_dim
    batch = seq_lens.shape[0]
    check_tensor("cu_seqlens_q", cu_seqlens_q, [batch + 1], torch.int32, device=q.device)
    require((k is None) == (v is None), "v", "a tensor beside k, and None without it", None if v is None else "a tensor")
    if k is not None and v is not None:
        check_tensor("k", k, [total_tokens, num_kv_heads, layout.head_dim], q.dtype, device=q.device)
        check_tensor("v", v, [total_tokens, num_kv_heads, v_head_dim], q.dtype, device=q.device)
    sm_scale = check_call(sm_scale, split_size)
    if raw_pages is not None:
        raw_pages = check_pool("raw_pages", raw_pages)
    table = block_table if block_table is not None else kv_indices
    assert table is not None
    if scratch is not None:
        check_scratch(scratch, q.dtype, table, num_kv_heads, layout)
        scratch = check_pool("scratch", scratch)
    group = num_q_heads // max(num_kv_heads, 1)
    config = configs.prefill_config(layout, q.dtype, q.device, total_tokens, batch, group, split_size, scratch is not None)
    splits = _num_splits(total_tokens, batch, num_q_heads, num_kv_heads, table.shape[-1], q.device, config, split_size)
    most = MAX_PROGRAMS // max((-(-total_tokens * group // config.block_m) + batch) * num_kv_heads, 1)
    require(splits <= most, "split_size", f"one that cuts pages into at most {most} runs", split_size)
    token_bytes = 0 if splits == 1 else 4 * splits * num_q_heads * (v_head_dim + 1)
    round_tokens = total_tokens
    if split_size is not None:
        round_tokens = tokens_per_round(total_tokens, token_bytes, config.block_m)
    num_bytes = round_tokens * token_bytes
    if workspace is not None:
        check_tensor("workspace", workspace, [None], torch.uint8, device=q.device)
        check_aligned("workspace", workspace, 16)
        require(workspace.numel() >= num_bytes, "workspace", f"at least {num_bytes} bytes", workspace.numel())
    if not gpu.on_device(q):
        return reference.prefill_attention(
            q, pages, block_table, seq_lens, cu_seqlens_q, layout, k=k, v=v, raw_pages=raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices, sm_scale=sm_scale,
            window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
        )  # fmt: skip
    fill = out is None
    if out is None:
        out = torch.empty(total_tokens, num_q_heads, v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(total_tokens, num_q_heads, dtype=torch.float32, device=q.device) if return_lse else None
    if workspace is None:
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    if total_tokens == 0 or num_q_heads == 0 or batch == 0:
        if fill:
            out.zero_()
        return out if lse is None else (out, lse.fill_(-torch.inf))
    q, pages, memory = aligned(q), aligned(pages), aligned(out)
    if k is not None and v is not None:
        k, v = aligned(k), aligned(v)
    if scratch is not None:
        launch_expand_pages(
            scratch, cu_seqlens_q, pages, block_table, kv_indptr, kv_indices, seq_lens, layout, num_quantized, sink_len, window,
            has_new=k is not None,
        )  # fmt: skip
    for first in range(0, total_tokens, round_tokens):
        tokens = range(first, min(first + round_tokens, total_tokens))
        partial, partial_lse = None, None
        if splits > 1:
            shape = splits, len(tokens), num_q_heads
            sums, end = (4 * splits * len(tokens) * num_q_heads * n for n in (v_head_dim, v_head_dim + 1))
            partial = workspace[:sums].view(torch.float32).view(*shape, v_head_dim)
            partial_lse = workspace[sums:end].view(torch.float32).view(shape)
        launch_prefill_tiles(
            memory, lse, partial, partial_lse, q, k, v, cu_seqlens_q, pages, block_table, kv_indptr, kv_indices, seq_lens,
            layout, raw_pages, raw_table, num_quantized, scratch, sink_len, sm_scale, window, soft_cap, sinks, splits,
            split_size or 0, config, tokens, fill,
        )  # fmt: skip
        if partial is not None and partial_lse is not None:
            launch_merge_queries(
                memory,
                lse,
                partial,
                partial_lse,
                cu_seqlens_q,
                sinks,
                layout,
                rotated=k is None,
                first_token=first,
                fill=fill,
                split_size=split_size or 0,
            )
    copy_back(memory, out)
    return out if lse is None else (out, lse)
