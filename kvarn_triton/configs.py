"""Launch parameters: which a kernel gets for which layout on which device. Those of decode come from tables (`tables`)."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton.language as tl

from . import gpu
from .checks import require
from .layout import PageLayout, fields_per_byte, num_high_bits, split_bits
from .reference.arithmetic import BLOCK_TOKENS, block_channels
from .tables import DecodeConfig, DecodeTable, PrefillConfig, builtin_table
from .tile.dequantize import STORE_RUN


def padded(n: int) -> int:
    """Return the next power of two; Triton's own function costs microseconds outside of kernels."""
    return 1 << max(n - 1, 0).bit_length()


def block_warps(head_dim: int, device: torch.device) -> int:
    """Return the warps of a program that holds a tile in registers: a thread for each number of a block (`blocks`)."""
    return _block_warps(head_dim, gpu.wavefront(device))


def _block_warps(head_dim: int, wavefront: int) -> int:
    return BLOCK_TOKENS * block_channels(head_dim) // wavefront


def gather_threads(block_size: int, device: torch.device) -> tuple[int, int]:
    """Return the warps and threads of a program that dequantizes blocks of `block_size` channels: enough to write a token."""
    wavefront = gpu.wavefront(device)
    num_warps = max(block_size // STORE_RUN.value // wavefront, 1)
    return num_warps, num_warps * wavefront


def gather_parts(programs: int, device: torch.device) -> int:
    """Return among how many programs to divide each of `programs`, so that 16 run on a multiprocessor: at most 16."""
    return min(max(gpu.num_programs(device, 16) // programs, 1), 16)


def expand_columns(programs: int, max_pages: int, device: torch.device) -> int:
    """Return how many programs share the pages of a row, if `programs` have one page of each row: one page each, or some.

    Tables may be far wider than sequences are long; programs that find nothing to do cost time too.
    """
    return min(max(gpu.num_programs(device, 64) // max(programs, 1), 64), max_pages)


def encode_options(layout: PageLayout, device: torch.device) -> dict[str, int]:
    """Return the launch options of kernels that encode pages: the warps of the larger tile, which fills their registers."""
    return _encode_options(layout.raw_head_dim, gpu.wavefront(device), gpu.uses_ptx())


@functools.lru_cache
def _encode_options(head_dim: int, wavefront: int, ptx: bool) -> dict[str, int]:
    options = {"num_warps": _block_warps(head_dim, wavefront)}
    if ptx:
        options["maxnreg"] = 128  # two programs per multiprocessor: one waits at a barrier while the other computes
    return options


def decode_config(
    layout: PageLayout, dtype: torch.dtype, device: torch.device, table: DecodeTable | None = None, heads: int = 0
) -> DecodeConfig:
    """Return the parameters of the decode kernel for queries of `dtype` in tiles of `heads` query heads; 0: of any number.

    Those of the table, with as many pages in shared memory as all programs of a multiprocessor have room for.
    """
    return _decode_config(layout, dtype, gpu.arch_of(device), gpu.multiprocessor_bytes(device), table, heads)


@functools.lru_cache
def _decode_config(
    layout: PageLayout, dtype: torch.dtype, arch: str | None, available: int, table: DecodeTable | None, heads: int
) -> DecodeConfig:
    if dtype == torch.float32:
        # Products of float32 run on the scalar units, and a step of more tokens would spill their operands.
        return DecodeConfig(4, num_stages=1, block_t=32, block_d=64, programs_per_sm=2, few_programs_per_sm=2)
    config = (builtin_table(arch) if table is None else table).find(layout.raw_head_dim, split_bits(layout), heads)
    num_stages, programs = config.num_stages, config.programs_per_sm
    room = available * COLUMN_ROOM if config.columns else available
    while num_stages > 2 and programs * _shared_bytes(layout, num_stages) > room:
        num_stages -= 1
    if _page_shared_bytes(layout) > PROGRAM_BYTES:
        num_stages = 1
    programs = min(programs, max(available // _shared_bytes(layout, num_stages), 1))
    few = min(config.few_programs_per_sm, programs)
    block_t = min(config.block_t, layout.page_size)
    return dataclasses.replace(
        config, block_t=block_t, num_stages=num_stages, programs_per_sm=programs, few_programs_per_sm=few
    )


def check_prefill_config(config: object, layout: PageLayout, dtype: torch.dtype, scratch: bool) -> None:
    """Check launch parameters that a call got, for queries of `dtype`, with scratch memory or not."""
    require(isinstance(config, PrefillConfig), "config", "a PrefillConfig", type(config).__name__)
    assert isinstance(config, PrefillConfig)
    for name in ("block_t", "block_r"):
        value = getattr(config, name)
        require(value <= layout.page_size, f"config.{name}", f"at most {layout.page_size}, the page_size", value)
    form = "dequantized" if scratch else "folded" if _only_folded(layout, dtype) else config.form
    why = " with scratch" if scratch else f" for {str(dtype).removeprefix('torch.')} and {layout.raw_head_dim} channels"
    require(config.form == form, "config.form", form + why, config.form)
    fits = form != "warp_groups" or _fits_drafts(layout, dtype)
    require(fits, "config.form", f"another one for {layout.name} of {layout.raw_head_dim} channels", config.form)


SCRATCH_TOKENS, SCRATCH_BYTES = 256, 2**28
"""Query tokens of a sequence, on average, from which on prefill attention takes memory for dequantized pages by itself, and
most bytes that it takes. Chunks of 512 tokens over 4,096 take 0.4 of the time with it (`perf/results/prefill_h200.json`,
`chunks_h200.json`)."""
ROUND_TOKENS = 512
"""Tokens of a sequence that such memory has to hold if it can't hold all: with fewer, states would be moved too often."""
TILE_ROWS = 16, 32, 64
"""Rows of a sequence and kv head up to which smaller tiles are taken. The first two are dequantized in registers."""


def prefill_config(
    layout: PageLayout,
    dtype: torch.dtype,
    device: torch.device,
    total_tokens: int,
    batch: int,
    group: int,
    split_size: int | None,
    scratch: bool = False,
) -> PrefillConfig:
    """Return the parameters for `total_tokens` query tokens of `batch` sequences with `group` query heads per kv head.

    In the batch-invariant mode (`split_size`) they depend on neither of the first two. With `scratch` pages are dequantized
    before.
    """
    if scratch:
        return _scratch_config(layout, dtype, device)
    rows = -(-total_tokens // max(batch, 1)) * group if split_size is None else None
    form = prefill_form(device, rows)
    # Of 16 rows and values of 4 bits that kernel is slower (`perf/results/drafts_h200.json`).
    many = rows is not None and (rows > TILE_ROWS[0] or layout.v_bits == 2)
    if form == "registers" and many and has_draft_kernel(layout, dtype, device):
        form = "warp_groups"
    return config_of_form(form, layout, dtype, device, rows)


def _fits_drafts(layout: PageLayout, dtype: torch.dtype) -> bool:
    dims, bits = {layout.head_dim, layout.v_head_dim, layout.page_size}, {layout.k_bits, layout.v_bits}
    return dtype != torch.float32 and dims == {128} and bits <= {2, 4}


def has_draft_kernel(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a kernel of its own attends with few query rows (`attention.drafts`)."""
    known = gpu.gpu_of(device)
    return _fits_drafts(layout, dtype) and (known is None or known.warp_groups)


def _only_folded(layout: PageLayout, dtype: torch.dtype) -> bool:
    """Return whether there is but one form of the loop over pages."""
    return dtype == torch.float32 or padded(layout.raw_head_dim) > 256


def config_of_form(
    form: str, layout: PageLayout, dtype: torch.dtype, device: torch.device, rows: int | None = None
) -> PrefillConfig:
    """Return the parameters for a form of the loop over pages; where there is no choice of forms, those of the only one.

    `rows` are those of a sequence and kv head, None in the batch-invariant mode.
    """
    channels = padded(layout.raw_head_dim)
    if _only_folded(layout, dtype):
        form = "folded"
    if form == "dequantized":
        if channels == 256:
            return PrefillConfig(64, 4, 64, 32, programs_per_sm=1)
        if rows is None or rows <= TILE_ROWS[-1]:
            return PrefillConfig(64, 4, layout.page_size, 64)
        return PrefillConfig(128, 8, layout.page_size, 64, num_stages=3, programs_per_sm=1)
    block_m = 16 if rows is not None and rows <= TILE_ROWS[0] else 32
    if form == "registers":
        return _register_config(layout, dtype, device, block_m)
    if form == "warp_groups":
        # Registers of a multiprocessor hold four programs of 16 rows, or three of 32 with memory for a small third page.
        programs, small = (4 if block_m == 16 else 3), layout.page_bytes <= 2**14
        num_stages = 3 if block_m == 32 and small else 2
        return PrefillConfig(block_m, 4, layout.page_size, layout.page_size, num_stages, programs, form=form)
    few = decode_config(layout, dtype, device)
    num_stages, block_t, block_d = few.num_stages, few.block_t, few.block_d
    if num_stages == 1 or (channels > 256 and _holds_little(device)):
        # A page too large for shared memory goes through it tile by tile: small ones, beside 16 rows of as many channels.
        num_stages, block_t, block_d = 1, 32, 32
    return PrefillConfig(16, few.num_warps, block_t, RAW_BLOCK, num_stages, few.programs_per_sm, block_d, form)


def _register_config(layout: PageLayout, dtype: torch.dtype, device: torch.device, block_m: int) -> PrefillConfig:
    """Return the parameters for tiles of 16 or 32 rows whose pages are dequantized in registers.

    Warps share the numbers of a page: each has a part of the tokens, then of the channels. Queries and weights are in shared
    memory. The larger of both head_dims counts.
    """
    larger = dataclasses.replace(layout, head_dim=layout.raw_head_dim, v_head_dim=layout.raw_head_dim)
    channels = padded(layout.raw_head_dim)
    num_stages = decode_config(larger, dtype, device).num_stages
    if channels > 128:
        num_warps, block_d, programs, block_r = block_m // 8, 64, 64 // block_m, RAW_BLOCK
    elif block_m == 16:
        num_warps, block_d, programs, block_r = 2, 128, 4, RAW_BLOCK
    else:
        num_warps, block_d, programs, block_r = 2, 64, 4, 2 * RAW_BLOCK
        num_stages = min(num_stages, 2)  # shared memory of a third page would be missing in the L1 cache, for spilled registers
    raw_bytes = max(num_stages - 1, 1) * block_r * 4 * channels
    shared = max(_shared_bytes(larger, num_stages), raw_bytes) + 2 * block_m * (channels + layout.page_size)
    programs = max(min(programs, gpu.multiprocessor_bytes(device) // shared), 1)
    return PrefillConfig(block_m, num_warps, layout.page_size, block_r, num_stages, programs, block_d, "registers")


def prefill_form(device: torch.device, rows: int | None) -> str:
    """Return the form of the loop over pages (`PrefillConfig`) for 16-bit queries of up to 256 channels.

    `rows` are those of a sequence and kv head, None in the batch-invariant mode.
    """
    known = gpu.gpu_of(device)
    if known is not None and not known.nvidia:
        return "folded"
    few = rows is not None and rows <= TILE_ROWS[1]
    return "registers" if few or not holds_dequantized_pages(device) else "dequantized"


def _scratch_config(layout: PageLayout, dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    """Return the parameters for pages of 16-bit numbers (32-bit ones of float32 queries) in scratch memory.

    As many rows as registers hold. Keys and values of the tokens of one step take at most a fifth of shared memory: there are
    three steps of them beside the queries. At most 64 tokens: with 128 (sm90) ptxas 12.8 overwrites queries that it keeps in
    registers (`testing.compiler.overwritten_operands`).
    """
    channels = padded(layout.raw_head_dim)
    if dtype == torch.float32:
        return PrefillConfig(16, 4, RAW_BLOCK, RAW_BLOCK, num_stages=1 if channels > 256 else 2)
    tokens = gpu.multiprocessor_bytes(device) // (5 * 4 * channels)
    block_t = min(max(1 << (tokens.bit_length() - 1), RAW_BLOCK), 64)
    block_m, num_warps = 128, 8
    if channels > 256:
        block_m = 32
    elif padded(layout.v_head_dim) == 256 and not holds_dequantized_pages(device):
        block_m, num_warps = 64, 4
    return PrefillConfig(block_m, num_warps, block_t, block_t, num_stages=3, programs_per_sm=1)


def has_plain_kernel(layout: PageLayout, dtype: torch.dtype, device: torch.device, block_m: int) -> bool:
    """Return whether a kernel attends with tiles of block_m rows to plain tokens of `dtype` (`attention.plain`)."""
    known = gpu.gpu_of(device)
    channels = {layout.head_dim, layout.v_head_dim}
    fits = block_m == 128 and dtype != torch.float32 and channels <= {64, 128, 256}
    return fits and (gpu.INTERPRETED if known is None else known.warp_groups)


def plain_steps(layout: PageLayout) -> tuple[int, int]:
    """Return the tokens of a step of that kernel, and how many steps are in shared memory."""
    return (64 if layout.raw_head_dim > 128 else 128), 2


def holds_dequantized_pages(device: torch.device) -> bool:
    """Return whether a program has room for a page of 16-bit numbers beside what it was made of, as in the interpreter."""
    known = gpu.gpu_of(device)
    return known is None or (known.nvidia and gpu.multiprocessor_bytes(device) >= 200 * _KIB)


def _holds_little(device: torch.device) -> bool:
    """Return whether a page of 512 channels fits into shared memory, but not with queries and new tokens beside it."""
    known = gpu.gpu_of(device)
    return known is not None and known.nvidia and gpu.multiprocessor_bytes(device) <= 100 * _KIB


_KIB = 1024
PROGRAM_BYTES = 56 * _KIB
"""Largest page that a decode program keeps in shared memory; larger ones go through it tile by tile."""


def _padded_channels(layout: PageLayout) -> tuple[int, int]:
    """Return the channels of a key and of a value, padded to powers of two."""
    return padded(layout.head_dim), padded(layout.v_head_dim)


def _with_high_bits(num_bytes: int, bits: int) -> int:
    """Return how much shared memory takes what `num_bytes` bytes of codes are, less their high bits, with those.

    High bits of 3-bit codes are loaded for either half of a row, and padded to whole rows.
    """
    return 3 * num_bytes if bits == 3 else num_bytes * bits // (bits - num_high_bits(bits))


def _page_shared_bytes(layout: PageLayout) -> int:
    """Return how much shared memory a page takes in a decode program: codes padded to whole products."""
    k_channels, v_channels = _padded_channels(layout)
    k_bytes = layout.page_size * max(k_channels // fields_per_byte(layout.k_bits), 32)
    v_bytes = v_channels * max(layout.page_size // fields_per_byte(layout.v_bits), 32)
    codes = _with_high_bits(k_bytes, layout.k_bits) + _with_high_bits(v_bytes, layout.v_bits)
    return codes + 4 * k_channels + 2 * v_channels + 6 * layout.page_size + 8


def _shared_bytes(layout: PageLayout, num_stages: int) -> int:
    """Return about how much shared memory a decode program needs: pages, or raw tokens, and what the driver keeps."""
    raw = 2 * RAW_BLOCK * sum(_padded_channels(layout))
    page = _page_shared_bytes(layout) if num_stages > 1 else 16 * _KIB
    return max(page, raw) * max(num_stages - 1, 1) + _KIB


RAW_BLOCK = 16
"""Raw tokens of a unit of work (`schedule`): about as many bytes as a quantized page, and what shared memory holds."""
HEAD_TILE = 8
"""Most query heads of one kv head that a program attends with: in two terms each (`operands`), the rows of a product."""


COLUMN_ROOM = 0.75
"""Share of shared memory in which programs with heads as columns keep two pages each; else one. With 0.97 of it `k4v2_g128`
takes 66.5 us at 8 x 32K, with one page 63.2; with 0.7 `k2v2_g128` takes 50.3, else 54.5 (`decode_columns_h200.json`)."""


def has_columns(tile: int, dtype: torch.dtype, config: DecodeConfig) -> bool:
    """Return whether decode has tiles of query heads of `dtype` as columns of its products (`attention.columns`)."""
    some = tile <= HEAD_TILE // 2 and dtype != torch.float32 and (gpu.uses_ptx() or gpu.INTERPRETED)
    return config.columns and config.num_warps == 1 and some


def head_tiles(num_q_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Return the query heads of a tile, and the number of tiles of all kv heads."""
    group = num_q_heads // max(num_kv_heads, 1)
    tiles = -(-group // HEAD_TILE)
    return -(-group // max(tiles, 1)), num_kv_heads * tiles


def append_block(head_dim: int) -> int:
    """Return the most tokens of one program that appends; for fewer tokens it is the next power of two."""
    return max(row_block(padded(head_dim)) // 4, 1)


def row_block(block_d: int) -> int:
    """Return how many rows of `block_d` channels one step of a streaming kernel handles: 4,096 elements."""
    return max(4096 // block_d, 1)


def operand(q_dtype: torch.dtype, dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which numbers of `dtype` meet queries of `q_dtype`. The interpreter can't multiply bfloat16."""
    if q_dtype == torch.float32 or dtype == torch.float32:
        return tl.float32
    if dtype == torch.bfloat16:
        return tl.float32 if gpu.INTERPRETED else tl.bfloat16
    return tl.float16
