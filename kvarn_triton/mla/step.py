"""A step of a server over latents: what all layers share is planned once, by `plan_step`; then a layer writes and attends.

`_kvarn_mla_write_pages_kernel`: one program encodes a page that the step completes, or returns at once if the plan has none for
it. A page takes its older tokens from the raw pool, the others from the activations. Grid: (page,). New tokens are appended
afterwards, by a launch of their own (`tail`), so that none goes over one that a page still takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..cache import check_plan
from ..checks import require
from ..encoder import DEFAULT, Encoder
from ..launch import aligned, on
from ..layout import fields_per_byte
from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout
from ..step import Step
from ..tile.arithmetic import to_half
from ..tile.blocks import Older, load_blocks
from .cache import LatentCache, checked
from .config import MLAConfig
from .decode import mla_decode_attention
from .store import check_tokens, store_record
from .tail import launch_append

LATENTS = tl.constexpr(LATENT_DIM)
ROPE = tl.constexpr(ROPE_DIM)


@triton.jit(do_not_specialize=["num_tasks"], do_not_specialize_on_alignment=["tasks_ptr"])
def _kvarn_mla_write_pages_kernel(
    pages,  # uint8 [num_pages, page_bytes] and its stride
    raw,  # float16 [num_raw_pages, page_size, 576] and its strides
    latents,  # [num_tokens, 512] and its stride
    rope,  # [num_tokens, 64] and its stride
    tasks_ptr,  # int32 [5, num_tasks]
    num_tasks,
    LAYOUT: tl.constexpr,
    FIELDS: tl.constexpr,
    ENCODER: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    task_ptr = tasks_ptr + tl.program_id(0)
    page = tl.load(task_ptr)
    if page >= 0:
        raw_page, count = tl.maximum(tl.load(task_ptr + num_tasks), 0), tl.load(task_ptr + 2 * num_tasks)
        first = tl.load(task_ptr + 3 * num_tasks).to(tl.int64)
        raw_ptr = raw[0] + raw_page.to(tl.int64) * raw[1]
        older = Older(raw_ptr, raw[2], count, tl.load(task_ptr + 4 * num_tasks))
        stride = latents[1].to(tl.int64)
        blocks = load_blocks(latents[0] + first * stride, stride, G, LATENTS, ROTATE=LAYOUT.block_size, older=older)
        token, offs_r = tl.arange(0, G)[:, None], tl.arange(0, ROPE)[None, :]
        x = tl.load(rope[0] + (first + token) * rope[1] + offs_r, token >= count, other=0.0).to(tl.float32)
        y = tl.load(raw_ptr + LATENTS + token.to(tl.int64) * raw[2] + offs_r, token < count, other=0.0)
        halves = tl.where(token < count, y, to_half(x))
        store_record(blocks, halves, pages[0] + page.to(tl.int64) * pages[1], LAYOUT, FIELDS, ENCODER)


def check_mla_step(pages: torch.Tensor, raw_pages: torch.Tensor, step: Step, layout: MLALayout) -> torch.Tensor:
    """Check that a plan is one for latents where `pages` are, and that there are raw pages; return its block table."""
    check_plan(pages, step)
    require(raw_pages is not None, "raw_pages", "a tensor", "NoneType")
    require(isinstance(layout, MLALayout), "layout", "an MLALayout", type(layout).__name__)
    require(step.layout.page_size == layout.page_size, "step", f"pages of {layout.page_size} tokens", step.layout.page_size)
    require(step.block_table is not None, "step", "a plan with a block_table", "one with kv_indices")
    require(step.sink_lens is None, "step", "a plan without sink_columns", "one with them")
    fits = step.sink_len % layout.page_size == 0
    require(fits, "step", f"a plan whose sink_len is a multiple of {layout.page_size}", step.sink_len)
    assert step.block_table is not None
    return step.block_table


def mla_write_tokens(
    latents: torch.Tensor,
    rope: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    layout: MLALayout,
    *,
    encoder: Encoder = DEFAULT,
) -> None:
    """Write the new tokens of a step into the pages that they complete, to the sink and the tail: two launches.

    Call it before attention, as `write_tokens`.

    Args:
        latents: float16, bfloat16 or float32 [num_tokens, 512], not rotated; any stride.
        rope: like `latents`, [num_tokens, 64], after the position encoding.
        pages: uint8 [num_pages, page_bytes], written in place.
        raw_pages: float16 [num_raw_pages, page_size, 576], written in place; numbers saturate at 65504.
        step: `plan_step(layout.keys, ...)`, with a block table and without `sink_columns`; `sink_len` is a multiple of the page
            size.
        layout: the page format.
        encoder: options of the encoder.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride or plan; nothing is written.
    """
    table = check_mla_step(pages, raw_pages, step, layout)
    cache = LatentCache(layout, pages, table, step.seq_lens, raw_pages, step.raw_table, step.num_quantized, step.sink_len)
    cache = checked(cache, "seq_lens")
    check_tokens(latents, rope, pages.device, step.num_tokens)
    if not gpu.on_device(pages):
        reference.mla_write_tokens(
            latents, rope, pages, raw_pages, step, layout, encoder=encoder, arithmetic=reference.ANY_ORDER
        )  # fmt: skip
        return
    if step.num_tokens == 0 or cache.batch == 0:
        return
    assert cache.raw_pages is not None
    latents, rope = aligned(latents), aligned(rope)
    on(pages, _kvarn_mla_write_pages_kernel)[(step.tasks.shape[1],)](
        (cache.pages, cache.pages.stride(0)),
        (cache.raw_pages, *cache.raw_pages.stride()[:2]),
        (latents, latents.stride(0)),
        (rope, rope.stride(0)),
        step.tasks,
        step.tasks.shape[1],
        LAYOUT=layout,
        FIELDS=fields_per_byte(layout.bits),
        ENCODER=encoder,
        **configs.encode_options(layout.keys, pages.device),
        enable_fp_fusion=False,
    )
    launch_append(latents, rope, cache.raw_pages, step.slots)


def mla_attend(
    q: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    layout: MLALayout,
    *,
    sm_scale: float,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    num_splits: int | None = None,
    config: MLAConfig | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend with the queries of a step, after `mla_write_tokens`: `mla_decode_attention` with the tables of the plan.

    Args:
        q: float16 or bfloat16 [batch, num_heads, 576] or [batch, n, num_heads, 576]: of the last token, or the last n tokens,
            of each sequence, as `mla_decode_attention` takes them, which says what the others and the results are.
        pages: uint8 [num_pages, page_bytes].
        raw_pages: float16 [num_raw_pages, page_size, 576].
        step: as in `mla_write_tokens`.
        layout: the page format.
        sm_scale: factor of the scores.
        indices: int32 [batch, topk] or [batch, n, topk], positions to attend to.
        out: where to write.
        return_lse: whether to return the log-sum-exp too.
        num_splits: among how many programs the tokens of each sequence, or list, are shared.
        config: launch parameters.

    Returns:
        `out`, or `out` and `lse`.

    Raises:
        ValueError: for a wrong shape, dtype, device, stride, option or plan; nothing is written.
    """
    block_table = check_mla_step(pages, raw_pages, step, layout)
    return mla_decode_attention(
        q, pages, block_table, step.seq_lens, layout, sm_scale=sm_scale, raw_pages=raw_pages, raw_table=step.raw_table,
        num_quantized=step.num_quantized, sink_len=step.sink_len, indices=indices, out=out, return_lse=return_lse,
        num_splits=num_splits, config=config,
    )  # fmt: skip
