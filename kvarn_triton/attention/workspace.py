"""Sizes of the memory that attention calls need beside their results."""

from __future__ import annotations

import torch

from .. import configs, gpu
from ..layout import PageLayout

ROUND_BYTES = 2**28
"""Most memory for partial results of a call with `split_size`; what needs more is computed in rounds that use it again.

The work of one round fills any GPU many times over. A round has at least one sequence (decode) or token (prefill).
"""


def tokens_per_round(total_tokens: int, token_bytes: int, block_m: int) -> int:
    """Return how many query tokens with partial results of `token_bytes` bytes a round has; whole tiles if it can be.

    A tile with tokens in two rounds is computed twice.
    """
    tokens = max(ROUND_BYTES // max(token_bytes, 1), 1)
    if tokens >= total_tokens:
        return total_tokens
    return max(tokens - tokens % block_m, min(tokens, block_m))


def most_units(batch: int, layout: PageLayout, max_pages: int, max_raw_pages: int, csr: bool) -> int:
    """Return how many units of work (`schedule`) one head of all sequences can have at most.

    `max_pages` and `csr` as for `decode_workspace_size`.
    """
    pages = max_pages if csr else batch * max_pages
    return pages + batch * max_raw_pages * (layout.page_size // configs.RAW_BLOCK)


def _most_pieces(batch: int, layout: PageLayout, max_pages: int, max_raw_pages: int, csr: bool, split_size: int) -> int:
    """Return into how many pieces of split_size units one head of all sequences can be cut at most."""
    raw = max_raw_pages * (layout.page_size // configs.RAW_BLOCK)
    if not csr:
        return batch * -(-(max_pages + raw) // split_size)
    # p pages and the raw runs of one sequence: at most floor(p / split_size) pieces, those of the runs alone, and one more.
    return max_pages // split_size + batch * (-(-raw // split_size) + 1)


def num_partials(
    batch: int,
    num_tiles: int,
    layout: PageLayout,
    max_pages: int,
    max_raw_pages: int,
    csr: bool,
    split_size: int,
    num_programs: int,
) -> int:
    """Return how many partial results the tiles of all sequences can have at most: one per tile, plus one per piece."""
    pieces = num_programs
    if split_size:
        pieces = num_tiles * _most_pieces(batch, layout, max_pages, max_raw_pages, csr, split_size)
    return batch * num_tiles + pieces


def rows_per_round(
    batch: int,
    num_tiles: int,
    layout: PageLayout,
    max_pages: int,
    max_raw_pages: int,
    csr: bool,
    split_size: int,
    partial_bytes: int,
) -> int:
    """Return how many sequences a round of a call with `split_size` has, if a partial result takes `partial_bytes` bytes."""

    def size(rows: int) -> int:
        return partial_bytes * num_partials(rows, num_tiles, layout, max_pages, max_raw_pages, csr, split_size, 0)

    return min(max((ROUND_BYTES - size(0)) // max(size(1) - size(0), 1), 1), batch)


def _decode_bytes(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    layout: PageLayout,
    max_pages: int,
    max_raw_pages: int,
    csr: bool,
    split_size: int,
    num_programs: int,
) -> int:
    """Return how many bytes partial results of some sequences take."""
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    partials = num_partials(batch, num_tiles, layout, max_pages, max_raw_pages, csr, split_size, num_programs)
    return 4 * partials * tile * (layout.v_head_dim + 1)


def decode_workspace_size(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    layout: PageLayout,
    max_pages: int,
    device: torch.device,
    *,
    max_raw_pages: int = 0,
    csr: bool = False,
    dtype: torch.dtype = torch.float16,
    split_size: int | None = None,
    table: configs.DecodeTable | None = None,
) -> int:
    """Return how many bytes of workspace `decode_attention` needs at most. Window, soft cap and sinks make no difference.

    They suffice for every call with as many or fewer sequences, heads, pages and raw pages, and grow with each of them. With
    `split_size` 256 MiB suffice for any number of sequences, which are then computed in rounds; only a single sequence whose
    partial results are larger takes more.

    Args:
        batch: sequences.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        layout: the page format.
        max_pages: columns of `block_table`; with `csr` the length of `kv_indices`, which bounds the pages of all sequences
            together, however they share them out.
        device: where the call will run; the number of programs depends on it.
        max_raw_pages: columns of `raw_table`, 0 without one.
        csr: whether page ids come as `kv_indptr` and `kv_indices`.
        dtype: dtype of the queries.
        split_size: as given to `decode_attention`.
        table: as given to `decode_attention`.
    """
    programs = gpu.num_programs(device, configs.decode_config(layout, dtype, device, table).programs_per_sm)
    options = layout, max_pages, max_raw_pages, csr, split_size or 0, programs
    # Heads are padded to whole tiles: fewer may take more.
    heads = [(h * group, h) for h in range(1, num_kv_heads + 1) for group in range(1, num_q_heads // h + 1)]
    size, least = (max((_decode_bytes(n, q, kv, *options) for q, kv in heads), default=0) for n in (batch, min(batch, 1)))
    return size if split_size is None else min(size, max(ROUND_BYTES, least))
