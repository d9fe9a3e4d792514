"""Quantized pages as plain latents and rotary channels, for engines with attention of their own, and to look at a cache.

One program decodes a part of the tokens of a page (`tile.dequantize`), and copies their rotary channels. Grid: (program,),
those of a page next to each other. Bytes moved: each record byte in, each element out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..checks import FLOATS, INDICES, check_choice, check_tensor, require
from ..launch import aligned, copy_back, on
from ..mla_layout import LATENT_DIM, ROPE_DIM, MLALayout, check_mla_pages
from ..pages.dequantize import read_plan
from ..tile.dequantize import Chunk, Target, dequantize_keys

LATENTS = tl.constexpr(LATENT_DIM)
ROPE = tl.constexpr(ROPE_DIM)
_TOKENS = tl.constexpr(16)
"""Tokens whose rotary channels, or zeros, are written at once."""


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["page_ids_ptr"])
def _kvarn_mla_dequantize_pages_kernel(
    latents,  # [n, page_size, 512] and its strides
    rope,  # [n, page_size, 64] and its strides
    pages,  # uint8 [num_pages, page_bytes] and its stride
    page_ids_ptr,  # [n]
    parts,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    entry = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    page = tl.load(page_ids_ptr + entry).to(tl.int64)
    record_ptr = pages[0] + tl.maximum(page, 0) * pages[1]
    latents_ptr = latents[0] + entry.to(tl.int64) * latents[1]
    rope_ptr = rope[0] + entry.to(tl.int64) * rope[1]
    offs_r, offs_c = tl.arange(0, ROPE)[None, :], tl.arange(0, LATENTS)[None, :]
    tokens = tl.where(page >= 0, G, 0)
    for first in range(part * _TOKENS, G, parts * _TOKENS):
        token = (first + tl.arange(0, _TOKENS))[:, None]
        halves_ptr = (record_ptr + LAYOUT.rope_offset).to(tl.pointer_type(tl.float16))
        x = tl.load(halves_ptr + token * ROPE + offs_r, token < tokens, other=0.0)
        tl.store(rope_ptr + token.to(tl.int64) * rope[2] + offs_r, x.to(rope_ptr.dtype.element_ty))
        if page < 0:
            zeros = tl.zeros((_TOKENS, LATENTS), latents_ptr.dtype.element_ty)
            tl.store(latents_ptr + token.to(tl.int64) * latents[2] + offs_c, zeros)
    if page >= 0:
        none = part * 0
        chunk = Chunk(entry, none.to(tl.int64), none, none, part, parts)
        dequantize_keys(Target(latents_ptr, latents[2], None), record_ptr, chunk, LAYOUT, PLAN)


def mla_dequantize_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: MLALayout,
    *,
    dtype: torch.dtype = torch.float16,
    rotated: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latents and rotary channels of quantized pages.

    Args:
        pages: uint8 [num_pages, page_bytes].
        page_ids: int32 or int64 [n]. An id below 0 gives zeros.
        layout: the page format.
        dtype: float16, bfloat16 or float32 of the result; ignored if `out` is given.
        rotated: return latents as they are stored, without undoing the Hadamard rotation.
        out: (latents, rope) to write to, like the results; any strides whose innermost is 1, such as parts of tokens of 576
            channels.

    Returns:
        `latents` [n, page_size, 512] and `rope` [n, page_size, 64].

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids are not read to be checked.
    """
    check_mla_pages(pages, layout)
    check_tensor("page_ids", page_ids, [None], INDICES, device=pages.device)
    check_choice("dtype", dtype, FLOATS)
    num_pages = page_ids.shape[0]
    shape = (num_pages, layout.page_size)
    if out is not None:
        require(isinstance(out, tuple) and len(out) == 2, "out", "a tuple of two tensors", type(out).__name__)
        check_tensor("out[0]", out[0], [*shape, LATENT_DIM], FLOATS, device=pages.device)
        check_tensor("out[1]", out[1], [*shape, ROPE_DIM], out[0].dtype, device=pages.device)
    if not gpu.on_device(pages):
        return reference.mla_dequantize_pages(pages, page_ids, layout, dtype=dtype, rotated=rotated, out=out)
    if out is None:
        latents, rope = (torch.empty(*shape, d, dtype=dtype, device=pages.device) for d in (LATENT_DIM, ROPE_DIM))
    else:
        latents, rope = out
    if num_pages == 0:
        return latents, rope
    pages, latents_memory, rope_memory = aligned(pages), aligned(latents), aligned(rope)
    plan = read_plan(layout.keys, pages.device, rotated)
    parts = min(configs.gather_parts(num_pages, pages.device), layout.page_size // _TOKENS.value)
    on(pages, _kvarn_mla_dequantize_pages_kernel)[(num_pages * parts,)](
        (latents_memory, *latents_memory.stride()[:2]),
        (rope_memory, *rope_memory.stride()[:2]),
        (pages, pages.stride(0)),
        page_ids,
        parts,
        LAYOUT=layout,
        PLAN=plan,
        num_warps=plan.num_warps,
        enable_fp_fusion=False,
    )
    return copy_back(latents_memory, latents), copy_back(rope_memory, rope)
