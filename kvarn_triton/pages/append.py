"""Append tokens to the raw pool: rotate keys and values and scatter them to slots, all heads in one launch.

One program writes the keys or the values of a run of tokens of one kv head. Grid: (run, kv head, keys or values). Bytes moved:
each activation in and out once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import configs, gpu, reference
from ..cache import check_raw_pages, check_raw_table
from ..checks import FLOATS, INDICES, check_choice, check_tensor, require
from ..launch import aligned, as_rows, as_tokens, check_pool, on
from ..layout import SUPPORTED_HEAD_DIMS, SUPPORTED_PAGE_SIZES, largest_power_of_two_divisor
from ..tile.arithmetic import hadamard, to_half

rotation_block = triton.constexpr_function(largest_power_of_two_divisor)


@triton.jit
def _load_rows(rows, tokens, head, slots, D: tl.constexpr):
    """Load the activations [tokens, channels] of one head, those that have a slot."""
    offs_d = tl.arange(0, triton.next_power_of_2(D))[None, :]
    place = (tokens * rows.stride_token + head * rows.stride_head)[:, None] + offs_d
    return tl.load(rows.ptr + place, (slots >= 0)[:, None] & (offs_d < D), other=0.0).to(tl.float32)


@triton.jit
def store_rotated(raw, x, half, head, slots, G: tl.constexpr, D: tl.constexpr):
    """Rotate activations [tokens, channels] of one head and store them to their slots, where they have one."""
    offs_d = tl.arange(0, x.shape[1])[None, :]
    rotated = hadamard(x, rotation_block(D))
    if raw.ptr.dtype.element_ty == tl.float16:
        rotated = to_half(rotated)
    place = slots // G * raw.stride_page + half * raw.stride_half + head * raw.stride_head + slots % G * raw.stride_token
    mask = (slots >= 0)[:, None] & (offs_d < D)
    tl.store(raw.ptr + place[:, None] + offs_d, rotated.to(raw.ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_tokens", "stride_slots"], do_not_specialize_on_alignment=["slots_ptr"])
def _kvarn_append_tokens_kernel(
    raw,  # Tokens
    k,  # Rows [num_tokens, num_kv_heads, head_dim]
    v,  # Rows [num_tokens, num_kv_heads, v_head_dim]
    slots_ptr,  # [num_tokens]
    num_tokens,
    stride_slots,
    G: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head, half = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slots = tl.load(slots_ptr + tokens * stride_slots, tokens < num_tokens, other=-1).to(tl.int64)
    if D == D_V:
        # Rows of one size are rotated by the same code.
        if half == 0:
            x = _load_rows(k, tokens, head, slots, D)
        else:
            x = _load_rows(v, tokens, head, slots, D)
        store_rotated(raw, x, half, head, slots, G, D)
    elif half == 0:
        store_rotated(raw, _load_rows(k, tokens, head, slots, D), half, head, slots, G, D)
    else:
        store_rotated(raw, _load_rows(v, tokens, head, slots, D_V), half, head, slots, G, D_V)


def append_tokens(k: torch.Tensor, v: torch.Tensor, raw_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Rotate the keys and values of tokens and write them into the raw pool.

    Args:
        k: float16, bfloat16 or float32 [num_tokens, num_kv_heads, head_dim], after the position encoding, not rotated; any
            strides whose innermost is 1.
        v: like `k`, with the same or another head_dim; each is rotated as `PageLayout` says of its own.
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, the larger head_dim], written in
            place; index 0 of the second dimension holds keys, 1 values. What is smaller takes the first channels, and the
            others keep what they are. A float16 pool saturates at 65504.
        slots: int32 or int64 [num_tokens]; raw page id * page_size + offset in the page (`raw_slots`). Below 0: skipped.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Slots are not read to be checked.
    """
    check_raw_pages(raw_pages)
    num_kv_heads, page_size, raw_head_dim = raw_pages.shape[2:]
    check_tensor("k", k, [None, num_kv_heads, None], FLOATS, device=raw_pages.device)
    check_tensor("v", v, [k.shape[0], num_kv_heads, None], k.dtype, device=raw_pages.device)
    head_dim, v_head_dim = k.shape[2], v.shape[2]
    check_choice("k.shape[2]", head_dim, SUPPORTED_HEAD_DIMS)
    check_choice("v.shape[2]", v_head_dim, SUPPORTED_HEAD_DIMS)
    larger = max(head_dim, v_head_dim)
    require(raw_head_dim == larger, "raw_pages.shape[4]", f"{larger}, the larger head_dim of k and v", raw_head_dim)
    check_tensor("slots", slots, [k.shape[0]], INDICES, device=raw_pages.device, contiguous_dims=0)
    raw_pages = check_pool("raw_pages", raw_pages)
    if not gpu.on_device(raw_pages):
        reference.append_tokens(k, v, raw_pages, slots)
        return
    num_tokens = k.shape[0]
    if num_tokens == 0:
        return
    block_r = min(configs.append_block(larger), configs.padded(num_tokens))
    on(raw_pages, _kvarn_append_tokens_kernel)[(-(-num_tokens // block_r), num_kv_heads, 2)](
        as_tokens(raw_pages),
        as_rows(aligned(k)),
        as_rows(aligned(v)),
        slots,
        num_tokens,
        slots.stride(0),
        G=page_size,
        D=head_dim,
        D_V=v_head_dim,
        BLOCK_R=block_r,
        num_warps=1,
        enable_fp_fusion=False,
    )


def raw_slots(positions: torch.Tensor, raw_table: torch.Tensor, *, sink_len: int, page_size: int) -> torch.Tensor:
    """Return where tokens live in the raw pool, computed on the device: what `append_tokens` takes as `slots`.

    Args:
        positions: int32 or int64 [batch, n], positions in each sequence; below 0 for padding.
        raw_table: int32 [batch, num_sink_pages + num_tail_slots].
        sink_len: tokens at the start of every sequence that stay raw.
        page_size: 64 or 128.

    Returns:
        int64 [batch, n]; -1 for padding. Body pages share the slots of the ring: of a prompt, pass only the positions that stay
        raw, and -1 for those that `store_pages` quantizes.

    Raises:
        ValueError: for a wrong shape, dtype, device or option.
    """
    check_tensor("positions", positions, [None, None], INDICES, contiguous_dims=0)
    check_tensor("raw_table", raw_table, [positions.shape[0], None], torch.int32, device=positions.device, contiguous_dims=0)
    check_choice("page_size", page_size, SUPPORTED_PAGE_SIZES)
    check_raw_table(raw_table, sink_len, page_size)
    return reference.raw_slots(positions, raw_table, sink_len=sink_len, page_size=page_size)
