"""Writing a step: new tokens into the raw pool, and pages that they complete, in one launch or two.

The first programs of the launch append: rotate a run of tokens of one kv head and scatter it to slots. The others encode one
tile of a page each, or return at once if the plan has none for them. A page takes its older tokens from the raw pool and the
others from the activations, so that no program waits for another. Where new raw tokens would go over older ones that a page
still takes, appending is a launch of its own, after the other one: of small programs, for most tokens of a chunk have no slot.
Bytes moved: each activation, raw tile and record once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..cache import check_plan
from ..checks import FLOATS, check_pages, check_tensor, require
from ..encoder import DEFAULT, Encoder
from ..launch import aligned, as_pages, as_tokens, check_pool, on
from ..layout import fields_per_byte
from ..pages.append import store_rotated
from ..pages.store import store_tile
from ..step import Step
from ..tile.blocks import Older, load_blocks

APPEND_BLOCK = tl.constexpr(16)
"""Tokens that one program appends. One number serves all steps: kernels that encode take long to compile."""


class Batch(NamedTuple):
    """New keys or values: token t is token t % n of sequence t // n, where every sequence has n in a tensor of 4 dimensions."""

    ptr: torch.Tensor
    stride_sequence: int
    stride_token: int
    stride_head: int


def as_batch(x: torch.Tensor) -> Batch:
    """Return [tokens, heads, channels], or [batch, heads, n, channels], as an argument of kernels."""
    return Batch(x, 0, x.stride(0), x.stride(1)) if x.dim() == 3 else Batch(x, x.stride(0), x.stride(2), x.stride(1))


class Task(NamedTuple):
    """A page that completes, as `Step.tasks` has it."""

    page: tl.tensor
    raw_page: tl.tensor
    older: tl.tensor
    token: tl.tensor
    rounded: tl.tensor


@triton.jit
def _of_half(k, v, half):
    """Return keys or values, which have as many channels."""
    values = half == 1
    return Batch(
        tl.where(values, v.ptr, k.ptr),
        tl.where(values, v.stride_sequence, k.stride_sequence),
        tl.where(values, v.stride_token, k.stride_token),
        tl.where(values, v.stride_head, k.stride_head),
    )


@triton.jit
def _append(
    raw, x, slots_ptr, index, num_tokens, count, half, head, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rotate a run of BLOCK tokens of one head and store them to their slots, where they have one."""
    token = index * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(slots_ptr + token, token < num_tokens, other=-1)
    if tl.max(slots, axis=0) >= 0:
        offs_d = tl.arange(0, triton.next_power_of_2(D))[None, :]
        place = (token // count).to(tl.int64) * x.stride_sequence + (token % count).to(tl.int64) * x.stride_token
        place += head * x.stride_head
        rows = tl.load(x.ptr + place[:, None] + offs_d, (slots >= 0)[:, None] & (offs_d < D), other=0.0)
        store_rotated(raw, rows.to(tl.float32), half, head, slots, G, D)


@triton.jit
def _append_half(
    raw, k, v, slots_ptr, index, num_tokens, count, half, head,
    G: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Append the keys or the values of a run of tokens of one head."""
    if D == D_V:
        _append(raw, _of_half(k, v, half), slots_ptr, index, num_tokens, count, half, head, G, D, BLOCK)
    elif half == 0:
        _append(raw, k, slots_ptr, index, num_tokens, count, half, head, G, D, BLOCK)
    else:
        _append(raw, v, slots_ptr, index, num_tokens, count, half, head, G, D_V, BLOCK)


@triton.jit(do_not_specialize=["num_tokens", "count"], do_not_specialize_on_alignment=["slots_ptr"])
def _kvarn_append_new_kernel(
    raw,  # Tokens
    k,  # Batch
    v,  # Batch
    slots_ptr,  # int64 [num_tokens]
    num_tokens,
    count,  # tokens of a sequence
    G: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, half = tl.program_id(1).to(tl.int64), tl.program_id(2)
    _append_half(raw, k, v, slots_ptr, tl.program_id(0), num_tokens, count, half, head, G, D, D_V, BLOCK)


@triton.jit
def _load_tile(x, raw, task, count, half, head, G: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr):
    """Load a tile of a page: older tokens from the raw pool, the others from activations, which are rotated."""
    sequence = (task.token + tl.minimum(task.older, G - 1)) // count  # of a new token, if there is any
    x_ptr = x.ptr + sequence.to(tl.int64) * x.stride_sequence + head * x.stride_head
    x_ptr += (task.token - sequence * count).to(tl.int64) * x.stride_token
    raw_ptr = raw.ptr + tl.maximum(task.raw_page, 0).to(tl.int64) * raw.stride_page + half * raw.stride_half
    older = Older(raw_ptr + head * raw.stride_head, raw.stride_token, task.older, task.rounded)
    return load_blocks(x_ptr, x.stride_token.to(tl.int64), G, D, ROTATE=ROTATE, older=older)


@triton.jit(
    do_not_specialize=["num_tokens", "num_tasks", "num_kv_heads", "num_appends", "count"],
    do_not_specialize_on_alignment=["slots_ptr", "tasks_ptr"],
)
def _kvarn_write_tokens_kernel(
    pages,  # Pages
    raw,  # Tokens
    k,  # Batch
    v,  # Batch
    slots_ptr,  # int64 [num_tokens]
    tasks_ptr,  # int32 [5, num_tasks]
    num_tokens,
    num_tasks,
    num_kv_heads,
    num_appends,  # runs of tokens
    count,  # tokens of a sequence
    LAYOUT: tl.constexpr,
    K_FIELDS: tl.constexpr,
    V_FIELDS: tl.constexpr,
    ENCODER: tl.constexpr,
):
    G: tl.constexpr = LAYOUT.page_size
    D: tl.constexpr = LAYOUT.head_dim
    D_V: tl.constexpr = LAYOUT.v_head_dim
    half = tl.program_id(0) % 2
    head = (tl.program_id(0) // 2 % num_kv_heads).to(tl.int64)
    index = tl.program_id(0) // 2 // num_kv_heads
    if index < num_appends:
        _append_half(raw, k, v, slots_ptr, index, num_tokens, count, half, head, G, D, D_V, APPEND_BLOCK)
    else:
        task_ptr = tasks_ptr + index - num_appends
        page = tl.load(task_ptr)
        if page >= 0:
            task = Task(
                page, tl.load(task_ptr + num_tasks), tl.load(task_ptr + 2 * num_tasks), tl.load(task_ptr + 3 * num_tasks),
                tl.load(task_ptr + 4 * num_tasks),
            )  # fmt: skip
            record_ptr = pages.ptr + page.to(tl.int64) * pages.stride_page + head * pages.stride_head
            if D == D_V:
                # Tiles of one size are loaded and rotated by the same code.
                blocks = _load_tile(_of_half(k, v, half), raw, task, count, half, head, G, D, LAYOUT.block_size)
                if half == 0:
                    store_tile(blocks, record_ptr, False, LAYOUT, K_FIELDS, ENCODER)
                else:
                    store_tile(blocks, record_ptr, True, LAYOUT, V_FIELDS, ENCODER)
            elif half == 0:
                k_blocks = _load_tile(k, raw, task, count, half, head, G, D, LAYOUT.block_size)
                store_tile(k_blocks, record_ptr, False, LAYOUT, K_FIELDS, ENCODER)
            else:
                v_blocks = _load_tile(v, raw, task, count, half, head, G, D_V, LAYOUT.v_block_size)
                store_tile(v_blocks, record_ptr, True, LAYOUT, V_FIELDS, ENCODER)


def write_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    raw_pages: torch.Tensor,
    step: Step,
    *,
    encoder: Encoder = DEFAULT,
) -> None:
    """Write the new tokens of a step: to the sink and the tail, and into the pages that they complete, in one launch or two.

    Call it before `attend`: a sequence may read pages that another one of the same step writes, as engines enter the pages of a
    prompt into their prefix cache when they schedule it.

    Args:
        k: float16, bfloat16 or float32 [num_tokens, num_kv_heads, head_dim], after the position encoding, not rotated; any
            strides whose innermost is 1. Or [batch, num_kv_heads, n, head_dim], where token t of the step is token t % n of
            sequence t // n.
        v: like `k`, with v_head_dim.
        pages: uint8 [num_pages, num_kv_heads, page_bytes], written in place.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim], written in
            place. A float16 pool saturates at 65504.
        step: `plan_step`.
        encoder: options of the encoder.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written.
    """
    num_kv_heads = check_step_pools(pages, raw_pages, step)
    check_new_tokens(k, v, num_kv_heads, step)
    if not gpu.on_device(pages):
        reference.write_tokens(k, v, pages, raw_pages, step, encoder=encoder, arithmetic=reference.ANY_ORDER)
        return
    num_tokens = step.num_tokens
    if num_tokens == 0 or num_kv_heads == 0 or step.batch == 0:
        return
    layout, count = step.layout, 2**30 if k.dim() == 3 else k.shape[2]
    pages, raw_pages, k, v = aligned(pages), check_pool("raw_pages", raw_pages), aligned(k), aligned(v)
    raw, new = as_tokens(raw_pages), (as_batch(k), as_batch(v))
    runs, num_tasks = -(-num_tokens // APPEND_BLOCK.value) if step.at_once else 0, step.tasks.shape[1]
    on(pages, _kvarn_write_tokens_kernel)[((runs + num_tasks) * num_kv_heads * 2,)](
        as_pages(pages),
        raw,
        *new,
        step.slots,
        step.tasks,
        num_tokens,
        num_tasks,
        num_kv_heads,
        runs,
        count,
        LAYOUT=layout,
        K_FIELDS=fields_per_byte(layout.k_bits),
        V_FIELDS=fields_per_byte(layout.v_bits),
        ENCODER=encoder,
        **configs.encode_options(layout, pages.device),
        enable_fp_fusion=False,
    )
    if not step.at_once:
        block = configs.append_block(layout.raw_head_dim)
        on(pages, _kvarn_append_new_kernel)[(-(-num_tokens // block), num_kv_heads, 2)](
            raw, *new, step.slots, num_tokens, count, G=layout.page_size, D=layout.head_dim, D_V=layout.v_head_dim,
            BLOCK=block, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def check_step_pools(pages: torch.Tensor, raw_pages: torch.Tensor, step: Step) -> int:
    """Check the pools of a layer against the plan of a step; return the number of kv heads."""
    check_plan(pages, step)
    layout, device = step.layout, step.seq_lens.device
    num_kv_heads = check_pages(pages, layout)
    check_tensor("raw_pages", raw_pages, [None, 2, num_kv_heads, layout.page_size, layout.raw_head_dim], FLOATS, device=device)
    return num_kv_heads


def check_new_tokens(k: object, v: object, num_kv_heads: int, step: Step) -> None:
    """Check the keys and values of a step: [num_tokens, heads, channels] or [batch, heads, n, channels]."""
    shape: list[int | None] = [step.num_tokens, num_kv_heads]
    if isinstance(k, torch.Tensor) and k.dim() == 4:
        n = step.num_tokens // max(k.shape[0], 1)
        require(n * k.shape[0] == step.num_tokens, "k", f"{step.num_tokens} tokens in all", f"{k.shape[0]} sequences")
        shape = [k.shape[0], num_kv_heads, n]
    check_tensor("k", k, [*shape, step.layout.head_dim], FLOATS, device=step.seq_lens.device)
    assert isinstance(k, torch.Tensor)
    check_tensor("v", v, [*shape, step.layout.v_head_dim], k.dtype, device=k.device)
