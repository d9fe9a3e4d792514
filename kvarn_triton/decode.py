"""Paged split-K decode attention over sink, quantized and tail pages in one call.

The first kernel runs as many programs as the GPU holds. A program attends to one piece of the work (`schedule`): with a tile
of up to 8 query heads to a run of consecutive pages of one sequence, or to the end of one run and the start of the next. The
second kernel merges the partial results and undoes the rotation. Grids: (program,) and (query head, sequence). Bytes moved:
every record byte once for each tile, plus 4 * (head_dim + 1) bytes per query head and partial result, twice.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from . import configs, reference
from .append import check_raw_table
from .attend import attend_quantized
from .attend_raw import attend_raw
from .checks import FLOATS, check_aligned, check_pages, check_tensor, require
from .layout import PageLayout, fields_per_byte
from .merge import launch_merge_splits
from .paging import load_page_id, prefetch_record
from .query import load_query, rotate_query
from .schedule import find_row, plan, row_lengths, start_of_piece
from .workspace import num_partials

_NOT_SPECIALIZED = [
    "batch", "num_tiles", "sink_len", "num_sink_pages", "num_tail_slots", "split_size", "few_programs",
    "stride_table", "stride_raw_table",
]  # fmt: skip
"""Arguments that may change from call to call without a compilation."""


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def _kvarn_decode_attention_kernel(
    partial_ptr,  # float32 [num_partials, TILE, head_dim], rotated
    partial_lse_ptr,  # float32 [num_partials, TILE], base 2
    q_ptr,  # [batch, num_q_heads, head_dim]
    pages_ptr,  # uint8 [num_pages, num_kv_heads, page_bytes]
    block_table_ptr,  # int32 [batch, max_pages]
    seq_lens_ptr,  # int32 [batch]
    raw_pages_ptr,  # [num_raw_pages, 2, num_kv_heads, page_size, head_dim]
    raw_table_ptr,  # int32 [batch, num_sink_pages + num_tail_slots]
    num_quantized_ptr,  # int32 [batch]
    qk_scale,  # sm_scale * log2(e)
    batch,
    num_tiles,  # of query heads: num_kv_heads * ceil(GROUP / TILE)
    sink_len,
    num_sink_pages,
    num_tail_slots,
    split_size,
    few_programs,
    stride_q_batch,
    stride_q_head,
    stride_pages_page,
    stride_pages_head,
    stride_table,
    stride_raw_page,
    stride_raw_half,
    stride_raw_head,
    stride_raw_token,
    stride_raw_table,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    TILE: tl.constexpr,  # query heads of a tile
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # bytes of a key, padded to a power of two of at least 32
    CHANNELS: tl.constexpr,  # channels of a value, padded to a power of two
    BLOCK_T: tl.constexpr,  # quantized tokens of one product
    BLOCK_D: tl.constexpr,  # channels of one product
    BLOCK_R: tl.constexpr,  # raw tokens of one step
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    HAS_RAW: tl.constexpr,
    OPERAND: tl.constexpr,
    QUERY_OPERAND: tl.constexpr,
    RAW_OPERAND: tl.constexpr,
    PTX: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY_MERGE: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    num_programs = tl.num_programs(0)
    if EARLY_MERGE:
        gdc_launch_dependents()
    pieces, size, longer, split = plan(
        seq_lens_ptr, num_quantized_ptr, batch, num_tiles, num_programs, few_programs, sink_len, split_size,
        G, BLOCK_R, HAS_RAW,
    )  # fmt: skip
    align = tl.maximum(split, 1)
    TILES: tl.constexpr = triton.cdiv(GROUP, TILE)
    for piece in range(tl.program_id(0), pieces, num_programs):
        unit = start_of_piece(piece, size, longer)
        end = start_of_piece(piece + 1, size, longer)
        while unit < end:
            row, row_start = find_row(
                seq_lens_ptr, num_quantized_ptr, unit, batch, num_tiles, sink_len, split, G, BLOCK_R, HAS_RAW
            )  # fmt: skip
            seq_len, num_sinks, num_paged, num_tails = row_lengths(
                seq_lens_ptr, num_quantized_ptr, row, row < batch, sink_len, G, BLOCK_R, HAS_RAW
            )  # fmt: skip
            row_units = num_sinks + num_paged + num_tails
            aligned_units = tl.cdiv(row_units, align) * align
            tile = (unit - row_start) // aligned_units
            head = tile // TILES
            first_head = tile % TILES * TILE
            first = (unit - row_start) % aligned_units
            last = tl.minimum(first + end - unit, row_units)

            # Both here, so that what they are made of needs no registers in the loops below.
            part = row * num_tiles + tile + piece
            next_unit = row_start + (tile + 1) * aligned_units

            pages_row_ptr = pages_ptr + head.to(tl.int64) * stride_pages_head
            table_row_ptr = block_table_ptr + row.to(tl.int64) * stride_table
            first_page = tl.maximum(first - num_sinks, 0)
            last_page = tl.minimum(last - num_sinks, num_paged)
            q_row_ptr = q_ptr + row.to(tl.int64) * stride_q_batch + (head * GROUP + first_head) * stride_q_head
            loaded = load_query(
                q_row_ptr, stride_q_head, tl.minimum(GROUP - first_head, TILE), BLOCK_N, BLOCK_K, LAYOUT, K_FIELDS
            )
            page = tl.zeros((), tl.int32)
            if first_page < last_page:
                page = load_page_id(table_row_ptr, first_page, last_page, PTX)
                prefetch_record(pages_row_ptr + page.to(tl.int64) * stride_pages_page, LAYOUT.page_bytes, PTX)
            planes, q_factor = rotate_query(loaded, BLOCK_N, BLOCK_K, LAYOUT, K_FIELDS, QUERY_OPERAND)
            q_factor = q_factor * qk_scale
            m_i = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            l_i = tl.zeros((BLOCK_N,), tl.float32)
            acc = tl.zeros((BLOCK_N, CHANNELS), tl.float32)
            acc, m_i, l_i = attend_quantized(
                acc, m_i, l_i, planes, q_factor,
                pages_row_ptr, table_row_ptr, stride_pages_page, page, first_page, last_page,
                seq_len - sink_len, LAYOUT, BLOCK_T, BLOCK_D, K_FIELDS, V_FIELDS, OPERAND, PTX, NUM_STAGES,
            )  # fmt: skip
            if HAS_RAW:
                first_tail = tl.maximum(first - num_sinks - num_paged, 0)
                acc, m_i, l_i = attend_raw(
                    acc, m_i, l_i, planes, q_factor,
                    raw_pages_ptr + head.to(tl.int64) * stride_raw_head, raw_table_ptr + row.to(tl.int64) * stride_raw_table,
                    stride_raw_page, stride_raw_half, stride_raw_token,
                    first, tl.maximum(tl.minimum(last, num_sinks) - first, 0),
                    first_tail, tl.maximum(last - num_sinks - num_paged - first_tail, 0), num_paged * G,
                    num_sink_pages, num_tail_slots, tl.minimum(seq_len, sink_len), seq_len - sink_len,
                    LAYOUT, BLOCK_R, K_FIELDS, RAW_OPERAND, PTX, NUM_STAGES,
                )  # fmt: skip

            offs_n = tl.arange(0, BLOCK_N)
            offs_d = tl.arange(0, CHANNELS)
            mask_n = offs_n < TILE
            place = part.to(tl.int64) * TILE + offs_n
            tl.store(partial_lse_ptr + place, m_i + tl.log2(l_i), mask_n)
            mask = mask_n[:, None] & (offs_d < LAYOUT.head_dim)[None, :]
            tl.store(partial_ptr + place[:, None] * LAYOUT.head_dim + offs_d[None, :], acc * (1.0 / l_i)[:, None], mask)
            unit = next_unit


def _check_decode(q, pages, block_table, seq_lens, layout, raw_pages, raw_table, num_quantized, sink_len, out) -> int:
    """Check the arguments of `decode_attention` and return the number of kv heads."""
    num_kv_heads = check_pages(pages, layout.page_bytes)
    device = pages.device
    check_tensor("q", q, [None, None, layout.head_dim], FLOATS, device=device)
    batch, num_q_heads = q.shape[0], q.shape[1]
    group = num_q_heads // max(num_kv_heads, 1)
    if group * num_kv_heads != num_q_heads or group < 1:
        raise ValueError(f"q: expected a multiple of the {num_kv_heads} kv heads of pages as query heads, got {num_q_heads}")
    check_tensor("block_table", block_table, [batch, None], torch.int32, device=device)
    check_tensor("seq_lens", seq_lens, [batch], torch.int32, device=device)
    if raw_pages is None:
        if raw_table is not None or num_quantized is not None or sink_len:
            raise ValueError("raw_pages: expected a tensor beside raw_table, num_quantized or sink_len, got None")
    else:
        check_tensor("raw_pages", raw_pages, [None, 2, num_kv_heads, layout.page_size, layout.head_dim], FLOATS, device=device)
        check_tensor("raw_table", raw_table, [batch, None], torch.int32, device=device)
        check_raw_table(raw_table, sink_len, layout.page_size)
        check_tensor("num_quantized", num_quantized, [batch], torch.int32, device=device)
    if out is not None:
        check_tensor("out", out, q.shape, q.dtype, device=device)
    return num_kv_heads


def decode_attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    *,
    raw_pages: torch.Tensor | None = None,
    raw_table: torch.Tensor | None = None,
    num_quantized: torch.Tensor | None = None,
    sink_len: int = 0,
    sm_scale: float | None = None,
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
        block_table: int32 [batch, max_pages]; column j is the page id of body page j.
        seq_lens: int32 [batch], tokens to attend to. 0 is legal.
        layout: the page format.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, head_dim], rotated keys and values
            of sinks and tails (`append_tokens`). None if everything is quantized.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots]; the sink pages, then the ring in which body page j has
            slot j % num_tail_slots. Needed with `raw_pages`.
        num_quantized: int32 [batch], how many body pages are read from `pages`. Needed with `raw_pages`.
        sink_len: tokens at the start of every sequence that stay raw.
        sm_scale: factor of the scores; by default head_dim ** -0.5.
        out: where to write; like `q`, any strides whose innermost is 1.
        return_lse: whether to return the log-sum-exp too.
        split_size: batch-invariant mode: pages of one run into which each sequence is cut (16 raw tokens count as a page), so
            that the bits of a row depend on the row alone, whatever else is in the batch. By default the runs are as long
            as it takes to give every multiprocessor the same work.
        workspace: uint8 [at least decode_workspace_size(...)], contiguous; allocated if not given.
        table: launch parameters by layout (`load_table`); by default the package's own for the device.

    Returns:
        `out`, or `out` and `lse` float32 [batch, num_q_heads] (natural logarithm, of scores times `sm_scale`). A sequence of
        length 0 gives zeros and lse = -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids and lengths are not read to be checked.
    """
    num_kv_heads = _check_decode(q, pages, block_table, seq_lens, layout, raw_pages, raw_table, num_quantized, sink_len, out)
    batch, num_q_heads, head_dim = q.shape
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    config = configs.decode_config(layout, q.dtype, q.device, table)
    if split_size is not None:
        require(isinstance(split_size, int) and split_size >= 1, "split_size", "an integer of at least 1", split_size)
    max_pages, max_raw_pages = block_table.shape[1], 0 if raw_table is None else raw_table.shape[1]
    programs = configs.num_programs(q.device, config.programs_per_sm)
    partials = num_partials(batch * num_tiles, layout, max_pages, max_raw_pages, split_size or 0, programs)
    num_bytes = 4 * partials * tile * (head_dim + 1)
    if workspace is not None:
        check_tensor("workspace", workspace, [None], torch.uint8, device=q.device)
        check_aligned("workspace", workspace, 16)
        require(workspace.numel() >= num_bytes, "workspace", f"at least {num_bytes} bytes", workspace.numel())
    if not configs.on_device(q):
        return reference.decode_attention(
            q, pages, block_table, seq_lens, layout, raw_pages=raw_pages, raw_table=raw_table,
            num_quantized=num_quantized, sink_len=sink_len, sm_scale=sm_scale, out=out, return_lse=return_lse,
        )  # fmt: skip
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, num_q_heads, dtype=torch.float32, device=q.device) if return_lse else None
    if workspace is None:
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    partial_bytes = 4 * partials * tile * head_dim
    partial = workspace[:partial_bytes].view(torch.float32).view(partials, tile, head_dim)
    partial_lse = workspace[partial_bytes:num_bytes].view(torch.float32).view(partials, tile)
    if batch == 0 or num_q_heads == 0:
        return out if lse is None else (out, lse)

    units = max_pages + max_raw_pages * (layout.page_size // configs.RAW_BLOCK)
    programs = min(programs, max(batch * num_tiles * units, 1))
    few_programs = min(programs, configs.num_programs(q.device, config.few_programs_per_sm))
    _launch_decode(
        partial, partial_lse, q, pages, block_table, seq_lens, layout, raw_pages, raw_table, num_quantized, sink_len,
        sm_scale, split_size or 0, programs, few_programs, config,
    )  # fmt: skip
    launch_merge_splits(
        out, lse, partial, partial_lse, seq_lens, num_quantized, num_kv_heads, layout, sink_len, split_size or 0, programs,
        few_programs, config.early_merge,
    )  # fmt: skip
    return out if lse is None else (out, lse)


def _launch_decode(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    q: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    layout: PageLayout,
    raw_pages: torch.Tensor | None,
    raw_table: torch.Tensor | None,
    num_quantized: torch.Tensor | None,
    sink_len: int,
    sm_scale: float | None,
    split_size: int,
    programs: int,
    few_programs: int,
    config: configs.DecodeConfig,
) -> None:
    """Attend to the pieces; the arguments are not checked."""
    batch, num_q_heads, head_dim = q.shape
    num_kv_heads = pages.shape[1]
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    k_fields, v_fields = fields_per_byte(layout.k_bits), fields_per_byte(layout.v_bits)
    channels = triton.next_power_of_2(head_dim)
    has_raw = raw_pages is not None
    raw = raw_pages if raw_pages is not None else q
    num_sink_pages = -(-sink_len // layout.page_size)
    _kvarn_decode_attention_kernel[(programs,)](
        partial,
        partial_lse,
        q,
        pages,
        block_table,
        seq_lens,
        raw,
        block_table if raw_table is None else raw_table,
        seq_lens if num_quantized is None else num_quantized,
        (head_dim**-0.5 if sm_scale is None else sm_scale) * math.log2(math.e),
        batch,
        num_tiles,
        sink_len,
        num_sink_pages,
        0 if raw_table is None else raw_table.shape[1] - num_sink_pages,
        split_size,
        few_programs,
        q.stride(0),
        q.stride(1),
        pages.stride(0),
        pages.stride(1),
        block_table.stride(0),
        raw.stride(0) if has_raw else 0,
        raw.stride(1) if has_raw else 0,
        raw.stride(2) if has_raw else 0,
        raw.stride(3) if has_raw else 0,
        0 if raw_table is None else raw_table.stride(0),
        LAYOUT=layout,
        GROUP=num_q_heads // num_kv_heads,
        TILE=tile,
        BLOCK_N=configs.HEAD_TILE,
        BLOCK_K=max(channels // k_fields, 32),
        CHANNELS=channels,
        BLOCK_T=config.block_t,
        BLOCK_D=min(config.block_d, channels),
        BLOCK_R=configs.RAW_BLOCK,
        K_FIELDS=k_fields,
        V_FIELDS=v_fields,
        HAS_RAW=has_raw,
        OPERAND=tl.float32 if q.dtype == torch.float32 else tl.int8,
        QUERY_OPERAND=configs.operand(q.dtype, q.dtype),
        RAW_OPERAND=configs.operand(q.dtype, raw.dtype),
        PTX=configs.uses_ptx(),
        NUM_STAGES=config.num_stages,
        EARLY_MERGE=config.early_merge,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **config.options(),
    )
