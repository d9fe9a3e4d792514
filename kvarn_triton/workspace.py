"""Sizes of the memory that attention calls need beside their results."""

from __future__ import annotations

import torch

from . import configs
from .layout import PageLayout


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
    """Return how many bytes of workspace `decode_attention` needs. Window, soft cap and sinks make no difference.

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
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    programs = configs.num_programs(device, configs.decode_config(layout, dtype, device, table).programs_per_sm)
    partials = num_partials(batch, num_tiles, layout, max_pages, max_raw_pages, csr, split_size or 0, programs)
    return 4 * partials * tile * (layout.v_head_dim + 1)
