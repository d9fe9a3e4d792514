"""Compile ahead of serving what calls of latent attention launch: `warmup` for latents."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from .. import gpu, merging
from ..checks import FLOATS, check_choice, check_count, require
from ..encoder import DEFAULT, Encoder
from ..mla_layout import LATENT_DIM, TOKEN_DIM, MLALayout
from ..serving.plan import plan_every_way
from .config import MLAConfig, mla_config
from .decode import mla_decode_attention
from .dequantize import mla_dequantize_pages
from .step import mla_write_tokens
from .store import mla_store_pages
from .tail import mla_append_tokens, mla_commit_pages


def mla_warmup(
    layout: MLALayout,
    num_heads: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    encoder: Encoder = DEFAULT,
    max_queries: int = 1,
    indices: bool = False,
    config: MLAConfig | None = None,
    dequantize: torch.dtype | None = None,
    steps: bool = False,
) -> None:
    """Compile, and load, every kernel that a server's steps launch for one model with latent attention.

    Nothing depends on batch sizes, lengths, page counts, the size of the sink or of lists, nor on addresses and strides of
    tensors, as `warmup` says. Tensors of a few pages are allocated and dropped.

    Args:
        layout: the page format.
        num_heads: query heads.
        device: where the server runs; on a CPU there is nothing to do.
        dtype: float16 or bfloat16, of queries, latents and rotary channels.
        encoder: options of the encoder.
        max_queries: most query tokens of a sequence.
        indices: whether attention gets `indices` in some calls.
        config: as given to `mla_decode_attention`.
        dequantize: dtype of what `mla_dequantize_pages` gives; None if it is not called.
        steps: whether `plan_step` and `mla_write_tokens` are called.

    Raises:
        ValueError: for a wrong option.
    """
    require(isinstance(layout, MLALayout), "layout", "an MLALayout", type(layout).__name__)
    check_count("num_heads", num_heads, 1)
    check_choice("dtype", dtype, (torch.float16, torch.bfloat16))
    check_count("max_queries", max_queries, 1)
    if config is not None:
        require(isinstance(config, MLAConfig), "config", "an MLAConfig", type(config).__name__)
    if dequantize is not None:
        check_choice("dequantize", dequantize, FLOATS)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8, device=device)
    if not gpu.on_device(pages):
        return
    # Rows of length 0, ids and slots below 0: the kernels find nothing to do.
    columns, lens = torch.zeros(1, 2, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    raw_pages = torch.zeros(2, layout.page_size, TOKEN_DIM, dtype=torch.float16, device=device)
    tables: dict[str, Any] = {"pages": pages, "block_table": columns, "layout": layout}
    raw: dict[str, Any] = {"raw_pages": raw_pages, "raw_table": columns, "num_quantized": lens}
    calls: list[dict[str, Any]] = [{"config": config}]
    if indices:
        calls.append({"config": config, "indices": torch.full((1, 1, 1), -1, dtype=torch.int32, device=device)})
    # Of as many query tokens as there are kinds of tiles; the merge looks at few or many partial results together.
    chosen = {mla_config(layout, n * num_heads, device): n for n in range(max_queries, 0, -1)}
    for given in calls:
        for n in {1} if config is not None or "indices" in given else set(chosen.values()):
            q = torch.zeros(1, n, num_heads, TOKEN_DIM, dtype=dtype, device=device)
            given |= {"seq_lens": lens, "sm_scale": 1.0}
            for num_splits, return_lse in itertools.product(merging.MERGE_BLOCKS[:2], (False, True)):
                mla_decode_attention(q, num_splits=num_splits, return_lse=return_lse, **tables, **raw, **given)
            mla_decode_attention(q, **tables, **given)
    mla_commit_pages(**tables, **raw, committed_lens=lens, encoder=encoder)
    step = plan_every_way(layout.keys, lens, columns, columns) if steps else None
    tokens = torch.zeros(layout.page_size, TOKEN_DIM, dtype=dtype, device=device)
    latents, rope = tokens[:, :LATENT_DIM], tokens[:, LATENT_DIM:]
    if step is not None:
        mla_write_tokens(latents[:1], rope[:1], pages, raw_pages, step, layout, encoder=encoder)
    for ids in (torch.int32, torch.int64):
        none = torch.full((1,), -1, dtype=ids, device=device)
        mla_append_tokens(latents[:1], rope[:1], raw_pages, none)
        for starts in (None, none):
            mla_store_pages(latents, rope, pages, none, layout, token_starts=starts, encoder=encoder)
        if dequantize is not None:
            for rotated in (False, True):
                mla_dequantize_pages(pages, none, layout, dtype=dequantize, rotated=rotated)
