"""The memory that attention calls need beside their results: sizes, and what long chunks take by themselves."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from .. import configs, gpu, merging
from ..cache import Cache
from ..layout import PageLayout
from ..masking import Mask
from ..paging import ALL_PAGES
from .prefill_plan import WAVES, attends_plainly
from .schedule import Tiles

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


@dataclass(frozen=True)
class MostWork:
    """What bounds the work of a decode call, whatever the lengths are."""

    layout: PageLayout
    max_pages: int  # of a sequence; if csr of all sequences together
    max_raw_pages: int
    csr: bool
    split_size: int  # units of a piece; 0: balanced

    @property
    def raw_units(self) -> int:
        """Units of work (`schedule`) of the raw tokens of a sequence."""
        return self.max_raw_pages * (self.layout.page_size // configs.RAW_BLOCK)


def most_units(batch: int, most: MostWork) -> int:
    """Return how many units of work (`schedule`) one head of all sequences can have at most."""
    return (1 if most.csr else batch) * most.max_pages + batch * most.raw_units


def _most_pieces(batch: int, most: MostWork) -> int:
    """Return into how many pieces of split_size units one head of all sequences can be cut at most."""
    if not most.csr:
        return batch * -(-(most.max_pages + most.raw_units) // most.split_size)
    # p pages and the raw runs of one sequence: at most floor(p / split_size) pieces, those of the runs alone, and one more.
    return most.max_pages // most.split_size + batch * (-(-most.raw_units // most.split_size) + 1)


def num_partials(batch: int, num_tiles: int, most: MostWork, num_programs: int) -> int:
    """Return how many partial results the tiles of all sequences can have at most: one per tile, plus one per piece."""
    return batch * num_tiles + (num_tiles * _most_pieces(batch, most) if most.split_size else num_programs)


def rows_per_round(batch: int, num_tiles: int, most: MostWork, partial_bytes: int) -> int:
    """Return how many sequences a round of a call with `split_size` has, if a partial result takes `partial_bytes` bytes."""
    none, one = (partial_bytes * num_partials(rows, num_tiles, most, 0) for rows in (0, 1))
    return min(max((ROUND_BYTES - none) // max(one - none, 1), 1), batch)


def merge_sizes(
    layout: PageLayout,
    dtype: torch.dtype,
    device: torch.device,
    heads: tuple[int, int],
    csr: bool,
    table: configs.DecodeTable | None,
) -> list[tuple[int, int, bool]]:
    """Return batches and columns of tables, without raw pages and with one, for which merges of decode differ when compiled.

    `heads` are those of queries and kv heads.
    """
    tile, num_tiles = configs.head_tiles(*heads)
    programs = gpu.num_programs(device, configs.decode_config(layout, dtype, device, table, tile).programs_per_sm)
    sizes: dict[tuple[bool, int, int], tuple[int, int, bool]] = {}
    widths = [0, *(2**i for i in range(programs.bit_length() + 1))]
    for batch, columns, raw in itertools.product(range(1, programs + 1), widths, (False, True)):
        most = MostWork(layout, columns * (batch if csr else 1), int(raw), csr, 0)
        working = min(programs, num_tiles * most_units(batch, most))
        block_s = merging.merge_block(working, batch * num_tiles, configs.padded(layout.v_head_dim))
        channels = merging.merge_channels(layout.v_head_dim, batch * heads[0], device)
        sizes.setdefault((raw, block_s, channels), (batch, columns, raw))
    return list(sizes.values())


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
    most = MostWork(layout, max_pages, max_raw_pages, csr, split_size or 0)

    def size(rows: int, heads: int, group: int) -> int:
        tile, tiles = configs.head_tiles(heads * group, heads)
        programs = gpu.num_programs(device, configs.decode_config(layout, dtype, device, table, tile).programs_per_sm)
        return 4 * num_partials(rows, tiles, most, programs) * tile * (layout.v_head_dim + 1)

    # Heads are padded to whole tiles: fewer may take more.
    heads = [(h, group) for h in range(1, num_kv_heads + 1) for group in range(1, num_q_heads // h + 1)]
    whole, least = (max((size(rows, *each) for each in heads), default=0) for rows in (batch, min(batch, 1)))
    if split_size is not None:
        return min(whole, max(ROUND_BYTES, least))
    if table is None and num_q_heads > configs.HEAD_TILE and configs.has_draft_kernel(layout, dtype, device):
        rows = batch * num_q_heads
        forms = (configs.config_of_form("warp_groups", layout, dtype, device, block_m) for block_m in configs.TILE_ROWS[:2])
        most_rows = max(WAVES * gpu.num_programs(device, config.programs_per_sm) * config.block_m for config in forms)
        whole = max(whole, 4 * (layout.v_head_dim + 1) * min(most_rows, max(max_pages, 1) * rows))
    return whole


def partials_of(out: torch.Tensor, tiles: Tiles, workspace: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for the partial results of a launch's tiles, and for their log-sum-exps."""
    shape, v_head_dim = (tiles.num_splits, len(tiles.tokens), out.shape[1]), out.shape[2]
    memory, rows = workspace.view(torch.float32), math.prod(shape)
    partial = memory[: rows * v_head_dim].view(*shape, v_head_dim)
    return partial, memory[rows * v_head_dim : rows * (v_head_dim + 1)].view(shape)


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
    config: configs.PrefillConfig | None = None,
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
        config: as given to `prefill_attention`.

    Raises:
        ValueError: for a `config` that `prefill_attention` refuses.
    """
    if config is not None:
        configs.check_prefill_config(config, layout, dtype, scratch)
    row_bytes = 4 * (layout.v_head_dim + 1)
    if split_size is not None:
        splits = -(-max_pages // split_size)
        token_bytes = splits * num_q_heads * row_bytes
        return min(total_tokens * token_bytes, max(ROUND_BYTES, token_bytes)) if splits > 1 else 0
    # Tiles times splits are no more than programs, and rows no more than those of all tiles.
    rows = total_tokens * num_q_heads
    sizes = [least for least in (1, *(most + 1 for most in configs.TILE_ROWS)) if least <= rows]
    forms = {scratch, scratch or config is None}  # long chunks take scratch memory by themselves
    tiles = [
        config or configs.prefill_config(layout, dtype, device, least, 1, 1, None, form) for form in forms for least in sizes
    ]
    programs = [gpu.num_programs(device, config.programs_per_sm) * config.block_m for config in tiles]
    drafts = any(config.form == "warp_groups" for config in tiles)  # partial results, whatever there is
    most = min(max(programs, default=0) * (WAVES if drafts else 1), max(max_pages, int(drafts)) * rows)
    return row_bytes * (max(most, rows) if drafts and config is not None else most)


def own_scratch(q: torch.Tensor, cache: Cache, mask: Mask) -> tuple[torch.Tensor | None, int]:
    """Return memory for dequantized pages, where a long chunk is worth it, and how many pages of each sequence it holds.

    Those are all, if that isn't much. If tiles attend to plain tokens (`plain`), they are what a window shows, or as many as
    may be, in rounds. Such calls take memory of a page where there are none: it stands for pages that nothing sees.
    """
    layout, worth = cache.layout, q.element_size() == 2 and q.shape[0] >= configs.SCRATCH_TOKENS * cache.batch > 0
    page_shape = 2, cache.num_kv_heads, layout.page_size, layout.raw_head_dim
    slots, ring = cache.ids.numel(), ALL_PAGES.value
    if not (worth and math.prod(page_shape) > 0 and gpu.on_device(q)):
        return None, ring
    block_m = configs.prefill_config(layout, q.dtype, q.device, q.shape[0], cache.batch, 1, None, True).block_m
    plain = attends_plainly(q, cache, mask, block_m, q.dtype)
    most = configs.SCRATCH_BYTES // (q.element_size() * math.prod(page_shape))
    shown = cache.max_pages if mask.window is None else (mask.window + q.shape[0]) // layout.page_size + 2
    if plain and shown < cache.max_pages and cache.batch * shown < slots:
        slots, ring = cache.batch * shown, shown
    if slots > most and mask.window is None:
        ring = most // cache.batch
        slots = cache.batch * ring
        plain = plain and ring * layout.page_size >= configs.ROUND_TOKENS
    if slots > most or (not plain and (slots == 0 or ring != ALL_PAGES.value)):
        return None, ALL_PAGES.value
    return torch.empty(max(slots, 1), *page_shape, dtype=q.dtype, device=q.device), ring
