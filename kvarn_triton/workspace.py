"""Sizes of the memory that attention calls need beside their results."""

from __future__ import annotations

import torch

from . import configs
from .layout import PageLayout


def num_partials(
    num_tiles: int, layout: PageLayout, max_pages: int, max_raw_pages: int, split_size: int, num_programs: int
) -> int:
    """Return how many partial results the tiles of all sequences can have at most: one per tile, plus one per piece."""
    units = max_pages + max_raw_pages * (layout.page_size // configs.RAW_BLOCK)
    return num_tiles + (num_tiles * -(-units // split_size) if split_size else num_programs)


def decode_workspace_size(
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    layout: PageLayout,
    max_pages: int,
    device: torch.device,
    *,
    max_raw_pages: int = 0,
    dtype: torch.dtype = torch.float16,
    split_size: int | None = None,
    table: configs.DecodeTable | None = None,
) -> int:
    """Return how many bytes of workspace `decode_attention` needs.

    Args:
        batch: sequences.
        num_q_heads: query heads.
        num_kv_heads: key/value heads.
        layout: the page format.
        max_pages: columns of `block_table`.
        device: where the call will run; the number of programs depends on it.
        max_raw_pages: columns of `raw_table`, 0 without one.
        dtype: dtype of the queries.
        split_size: as given to `decode_attention`.
        table: as given to `decode_attention`.
    """
    tile, num_tiles = configs.head_tiles(num_q_heads, num_kv_heads)
    programs = configs.num_programs(device, configs.decode_config(layout, dtype, device, table).programs_per_sm)
    partials = num_partials(batch * num_tiles, layout, max_pages, max_raw_pages, split_size or 0, programs)
    return 4 * partials * tile * (layout.head_dim + 1)
