"""Paged split-K decode attention over sink, quantized and tail pages in one call.

The first kernel attends to pieces of the work (`decode_pieces`), the second merges the partial results and undoes the rotation
(`merge`). Both follow one plan (`schedule`).
"""

from __future__ import annotations

import torch

from .. import configs, gpu, reference
from ..cache import check_attention, check_call
from ..checks import check_aligned, check_tensor, require
from ..launch import aligned, check_pool, copy_back
from ..layout import PageLayout
from .decode_kernel import launch_decode_pieces
from .merge import launch_merge_splits
from .schedule import Units, Work
from .workspace import most_units, num_partials, rows_per_round


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
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
    table: configs.DecodeTable | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with one query token per sequence to its sink, quantized and tail pages.

    Args:
        q: float16, bfloat16 or float32 [batch, num_q_heads, head_dim], after the position encoding, not rotated. Query head i
            reads kv head i // group; group = num_q_heads / num_kv_heads may be any integer. Pages are read once for 8 of them.
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        block_table: int32 [batch, max_pages]; column j is the page id of body page j. None with `kv_indptr` and `kv_indices`.
        seq_lens: int32 [batch], tokens to attend to. 0 is legal.
        layout: the page format.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim], rotated keys
            and values of sinks and tails (`append_tokens`). None if everything is quantized.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]; the sink pages, then the ring in which body page j has
            slot j % num_tail_slots. Needed with `raw_pages`.
        num_quantized: int32 [batch], how many body pages are read from `pages`. Needed with `raw_pages`.
        sink_len: tokens at the start of every sequence that stay raw.
        kv_indptr: int32 [batch + 1], rising; where the page ids of each sequence begin in `kv_indices`, and the last one's end.
        kv_indices: int32 [n]; `kv_indices[kv_indptr[b] + j]` is the page id of body page j of sequence b.
        sm_scale: factor of the scores, a number and no tensor; by default head_dim ** -0.5.
        window: see only the last `window` tokens, the query's own among them: those at positions >= seq_len - window, of the
            raw ones at the start too. Pages without such a token are not read, nor are their ids. Any number from call to call.
        soft_cap: above 0; a score becomes soft_cap * tanh(score / soft_cap), after `sm_scale` and before the softmax.
        sinks: float32 [num_q_heads], attention sinks: the logit of one more token of each query head, which has a weight but no
            value. Not capped. -inf is none.
        out: where to write: [batch, num_q_heads, v_head_dim], of the dtype of `q`, any strides whose innermost is 1.
        return_lse: whether to return the log-sum-exp too.
        split_size: batch-invariant mode: pages of one run into which each sequence is cut (16 raw tokens count as a page), so
            that the bits of a row depend on the row alone, whatever else is in the batch. By default the runs are as long
            as it takes to give every multiprocessor the same work.
        workspace: uint8 [at least decode_workspace_size(...)], contiguous; allocated if not given.
        table: launch parameters by layout (`load_table`); by default the package's own for the device.

    Returns:
        `out` [batch, num_q_heads, v_head_dim], or `out` and `lse` float32 [batch, num_q_heads] (natural logarithm, of capped
        scores times `sm_scale`, the logit of `sinks` included). A sequence of length 0 gives zeros, and lse = -inf or the logit
        of `sinks`. Calls over parts of a sequence, to be merged (`merge_states`), get `sinks` in one of them only.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or option, and for two forms of page ids, or none; nothing is
            written. Ids and lengths are not read to be checked.
    """
    num_kv_heads = check_attention(
        q, q.shape[0] if isinstance(q, torch.Tensor) and q.dim() else None, pages, block_table, seq_lens, layout,
        raw_pages=raw_pages, raw_table=raw_table, num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr,
        kv_indices=kv_indices, window=window, soft_cap=soft_cap, sinks=sinks, out=out,
    )  # fmt: skip
    batch, num_q_heads, v_head_dim = *q.shape[:2], layout.v_head_dim
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    config = configs.decode_config(layout, q.dtype, q.device, table)
    sm_scale = check_call(sm_scale, split_size)
    if raw_pages is not None:
        raw_pages = check_pool("raw_pages", raw_pages)
    page_ids = kv_indices if block_table is None else block_table
    assert page_ids is not None
    csr, max_pages = block_table is None, page_ids.shape[-1]
    max_raw_pages = 0 if raw_table is None else raw_table.shape[1]
    programs = gpu.num_programs(q.device, config.programs_per_sm)
    sizes = num_tiles, layout, max_pages, max_raw_pages, csr, split_size or 0
    round_rows = batch if split_size is None else rows_per_round(batch, *sizes, 4 * tile * (v_head_dim + 1))
    partials = num_partials(round_rows, *sizes, programs)
    num_bytes = 4 * partials * tile * (v_head_dim + 1)
    if workspace is not None:
        check_tensor("workspace", workspace, [None], torch.uint8, device=q.device)
        check_aligned("workspace", workspace, 16)
        require(workspace.numel() >= num_bytes, "workspace", f"at least {num_bytes} bytes", workspace.numel())
    if not gpu.on_device(q):
        return reference.decode_attention(
            q, pages, block_table, seq_lens, layout, raw_pages=raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, kv_indptr=kv_indptr, kv_indices=kv_indices, sm_scale=sm_scale,
            window=window, soft_cap=soft_cap, sinks=sinks, out=out, return_lse=return_lse,
        )  # fmt: skip
    if out is None:
        out = torch.empty(batch, num_q_heads, v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device) if return_lse else None
    if workspace is None:
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    partial_bytes = 4 * partials * tile * v_head_dim
    partial = workspace[:partial_bytes].view(torch.float32).view(partials, tile, v_head_dim)
    partial_lse = workspace[partial_bytes:num_bytes].view(torch.float32).view(partials, tile)
    if batch == 0 or num_q_heads == 0:
        return out if lse is None else (out, lse)

    q, pages, memory = aligned(q), aligned(pages), aligned(out)
    programs = min(programs, max(num_tiles * most_units(round_rows, layout, max_pages, max_raw_pages, csr), 1))
    few_programs = min(programs, gpu.num_programs(q.device, config.few_programs_per_sm))
    units = Units(layout.page_size, configs.RAW_BLOCK, has_raw=raw_pages is not None, has_window=window is not None)
    for first in range(0, batch, round_rows):
        part: tuple[torch.Tensor | None, ...] = (memory, lse, q, seq_lens, num_quantized, block_table, raw_table)
        indptr = kv_indptr
        if round_rows < batch:
            part = tuple(x if x is None else x[first : first + round_rows] for x in part)
            indptr = kv_indptr if kv_indptr is None else kv_indptr[first : first + round_rows + 1]
        part_out, part_lse, part_q, lens, counts, ids, raw_ids = part
        assert part_out is not None and part_q is not None and lens is not None
        work = Work(lens, counts, sink_len, window, split_size or 0, programs, few_programs, units)
        launch_decode_pieces(
            partial, partial_lse, part_q, pages, ids, layout, raw_pages, raw_ids, indptr, kv_indices, sm_scale, soft_cap, work,
            config,
        )  # fmt: skip
        launch_merge_splits(part_out, part_lse, partial, partial_lse, sinks, num_kv_heads, layout, work, config.early_merge)
    copy_back(memory, out)
    return out if lse is None else (out, lse)
