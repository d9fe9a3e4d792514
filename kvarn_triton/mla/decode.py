"""Paged split-K decode attention with latents as keys and values: absorbed queries over sink, quantized and tail pages.

Three launches: queries are rotated (`query`), tiles of query rows attend to splits of each sequence (`decode_kernel`), and one
program for each row merges its partial results and rotates them back. Grid of the last: (row,). With a list of tokens for each
query token there are four (`sparse`).
"""

from __future__ import annotations

import functools
import numbers

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .. import gpu, merging, reference
from ..attention.merge import MergePlan, merged, store_result
from ..checks import check_count, check_tensor, require
from ..launch import aligned, as_rows, copy_back, on
from ..mla_layout import LATENT_DIM, TOKEN_DIM, MLALayout
from .cache import LatentCache, checked
from .config import MLAConfig, hopper_plan, mla_config
from .decode_kernel import launch_mla_splits
from .query import rotate_queries
from .sparse import launch_mla_sparse

LEAST_BLOCKS = 4
"""Blocks of tokens below which a split is not worth a program, in the longest sequence that the tables have room for."""


@functools.lru_cache
def _plan_merge(num_splits: int, early: bool) -> tuple[MergePlan, int]:
    """Return what the merge is compiled for, and its warps."""
    block_s = next((block for block in merging.MERGE_BLOCKS if block >= num_splits), merging.MERGE_BLOCKS[1])
    block_s = min(block_s, merging.MERGE_BLOCKS[1])
    plan = MergePlan(LATENT_DIM, LATENT_DIM, LATENT_DIM, LATENT_DIM, block_s, early, True, 1, 1, None)
    return plan, merging.merge_warps(block_s, LATENT_DIM)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["lse_ptr"])
def _kvarn_mla_merge_kernel(
    out,  # Rows [tokens, num_heads, 512]
    lse_ptr,  # float32 [tokens, num_heads], natural logarithm, or None
    partial_ptr,  # float32 [num_splits, rows, 512], rotated
    partial_lse_ptr,  # float32 [num_splits, rows], base 2
    num_splits,
    PLAN: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = token * tl.num_programs(1) + head
    total = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    if PLAN.early:
        gdc_wait()
    result, lse = merged(partial_ptr + row * PLAN.v_head_dim, partial_lse_ptr + row, num_splits, total, PLAN)
    lse_row_ptr = lse_ptr
    if lse_ptr is not None:
        lse_row_ptr = lse_ptr + row
    store_result(out.ptr + token * out.stride_token + head * out.stride_head, lse_row_ptr, result, lse, PLAN)


def _num_splits(batch: int, tiles: int, max_tokens: int, config: MLAConfig, device: torch.device) -> int:
    """Return among how many programs a tile of query rows of a sequence is shared: about as many as run at once."""
    programs = gpu.num_programs(device, config.programs_per_sm)
    most = max(-(-max_tokens // (config.block_t * LEAST_BLOCKS)), 1)
    return min(max(programs // max(batch * tiles, 1), 1), most)


def mla_decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: MLALayout,
    *,
    sm_scale: float,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    config: MLAConfig | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with absorbed queries to the latents of each sequence, which are keys and values of all heads.

    The score of a token is sm_scale times the product of 576 channels, latent and rotary; the result is a weighted sum of
    latents, 512 channels. What multiplies it by a head's own matrix is the caller's, as is what absorbed the queries.

    Args:
        q: float16 or bfloat16 [batch, num_heads, 576], the query of the last token of each sequence: 512 absorbed channels, not
            rotated by any Hadamard matrix, then 64 rotary ones. Or [batch, n, num_heads, 576], those of the last n tokens, of
            which each sees the tokens up to itself.
        pages: uint8 [num_pages, page_bytes].
        block_table: int32 [batch, max_pages]; column j is the id in `pages` of body page j.
        seq_lens: int32 [batch], tokens to attend to, those of the queries among them. 0 is legal.
        layout: the page format.
        sm_scale: factor of the scores, a number: of the model's head_dim before queries were absorbed, such as 192 ** -0.5.
        raw_pages: float16 [num_raw_pages, page_size, 576], tokens of sinks and tails (`mla_append_tokens`). None if everything
            is quantized.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]; the sink pages, then the ring in which body page j has
            slot j % num_tail_slots. Needed with `raw_pages`.
        num_quantized: int32 [batch], how many body pages are read from `pages`. Needed with `raw_pages`.
        sink_len: tokens at the start of every sequence that stay raw, a multiple of page_size.
        indices: int32 [batch, topk], or [batch, n, topk] beside several query tokens: the positions of the tokens that each
            query token attends to, from 0 on, those of the sink included, in any order. A number below 0, and one of a token
            that the query token does not see, stands for none. A position that is there twice counts twice. None: all tokens.
        out: where to write: [*q.shape[:-1], 512], of the dtype of `q`, contiguous.
        return_lse: whether to return the log-sum-exp too.
        num_splits: among how many programs the tokens of each sequence, or list, are shared; chosen by the shapes if not given.
            With the same number, the bits of a row depend on nothing else in the batch.
        config: launch parameters; by default the package's own for the device and the number of query rows.

    Returns:
        `out` [*q.shape[:-1], 512], or `out` and `lse` float32 [*q.shape[:-1]] (natural logarithm, of scores times `sm_scale`).
        Where there is no token to see `out` is 0 and lse = -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option; nothing is written. Ids, lengths and positions are not
            read to be checked.
    """
    cache = checked(
        LatentCache(layout, pages, block_table, seq_lens, raw_pages, raw_table, num_quantized, sink_len), "seq_lens"
    )  # fmt: skip
    dims = q.dim() if isinstance(q, torch.Tensor) else 3
    lead: list[int | None] = [cache.batch, None, None] if dims == 4 else [cache.batch, None]
    check_tensor("q", q, [*lead, TOKEN_DIM], (torch.float16, torch.bfloat16), device=pages.device, contiguous_dims=1)
    number = isinstance(sm_scale, numbers.Real) and not isinstance(sm_scale, bool)
    require(number and -1e30 <= float(sm_scale) <= 1e30, "sm_scale", "a finite number (up to 1e30)", sm_scale)
    shape = (*q.shape[:-1], LATENT_DIM)
    if out is not None:
        check_tensor("out", out, shape, q.dtype, device=q.device, contiguous_dims=dims)
    if indices is not None:
        _check_indices(indices, q, cache)
    if num_splits is not None:
        check_count("num_splits", num_splits, 1)
    if config is not None:
        require(isinstance(config, MLAConfig), "config", "an MLAConfig", type(config).__name__)
        known = gpu.gpu_of(q.device)
        has_groups = known is not None and known.warp_groups and indices is None
        require(has_groups or not config.warp_groups, "config.warp_groups", "False but for sm90, without indices", True)
    if not gpu.on_device(q):
        return reference.mla_decode_attention(
            q, pages, block_table, seq_lens, layout, sm_scale=sm_scale, raw_pages=raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, indices=indices, out=out, return_lse=return_lse,
        )  # fmt: skip
    out = torch.empty(shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel():
        rows = q.shape[1:-1].numel() if indices is None else q.shape[-2]
        config = config or mla_config(layout, rows, q.device, indices is not None)
        _attend(out, lse, q, cache, indices, float(sm_scale), num_splits, config)
    return out if lse is None else (out, lse)


def _check_indices(indices: torch.Tensor, q: torch.Tensor, cache: LatentCache) -> None:
    """Check the lists of tokens of a call, and that the places of all tokens are numbers of 32 bits."""
    check_tensor("indices", indices, [*q.shape[:-2], None], torch.int32, device=q.device)
    for name, pool in (("pages", cache.pages), ("raw_pages", cache.raw_pages)):
        fits = pool is None or pool.shape[0] * cache.layout.page_size < 2**31
        require(fits, name, "less than 2**31 tokens beside indices", None if pool is None else list(pool.shape))


def _attend(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor,
    cache: LatentCache,
    indices: torch.Tensor | None,
    sm_scale: float,
    num_splits: int | None,
    config: MLAConfig,
) -> None:
    """Attend as `mla_decode_attention` does; nothing is checked, and there is something to do."""
    num_queries, num_heads = q.shape[1:3] if q.dim() == 4 else (1, q.shape[1])
    # What has its tokens shared out: a sequence, all rows together, or the list of a query token.
    units, rows, most = cache.batch, num_queries * num_heads, cache.max_pages * cache.layout.page_size
    if indices is not None:
        units, rows, most = cache.batch * num_queries, num_heads, indices.shape[-1]
    if num_splits is None:
        num_splits = _num_splits(units, -(-rows // config.block_m), most, config, q.device)
    partial = torch.empty(num_splits, units * rows, LATENT_DIM, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(num_splits, units * rows, dtype=torch.float32, device=q.device)
    queries = rotate_queries(aligned(q).reshape(-1, num_heads, TOKEN_DIM), sm_scale)
    if config.warp_groups:
        from .hopper import launch_mla_hopper  # Gluon, where it is used

        plan = hopper_plan(cache.layout, config.block_m, cache.raw_pages is not None)
        launch_mla_hopper(partial, partial_lse, queries, cache, (num_queries, num_heads), plan)
    elif indices is None:
        launch_mla_splits(partial, partial_lse, queries, cache, (num_queries, num_heads), config)
    else:
        lists = indices.reshape(units, most)
        launch_mla_sparse(partial, partial_lse, queries, cache, lists, (num_queries, num_heads), config)
    memory = aligned(out)
    flat = memory.view(-1, num_heads, LATENT_DIM)
    early = gpu.launches_early(q.device)
    merge, num_warps = _plan_merge(num_splits, early)
    on(out, _kvarn_mla_merge_kernel)[flat.shape[:2]](
        as_rows(flat), lse, partial, partial_lse, num_splits, PLAN=merge, num_warps=num_warps, enable_fp_fusion=False,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    copy_back(memory, out)
