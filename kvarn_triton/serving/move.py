"""What happens to a cache between steps: raw pages are copied for beams, sequences are cut back.

One program copies the keys or the values of one page and kv head. Grid: (page, kv head, keys or values). Cutting back is the
launch of `cut_back`, over the tables of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import gpu, reference
from ..cache import cache_of, check_raw_pages, checked_for_completion
from ..checks import check_tensor
from ..launch import as_tokens, check_pool, on
from ..pages.cut import launch_cut_back
from ..step import Step


@triton.jit(do_not_specialize_on_alignment=["sources_ptr", "targets_ptr"])
def _kvarn_copy_raw_pages_kernel(
    raw,  # Tokens
    sources_ptr,  # int32 [n]
    targets_ptr,  # int32 [n]
    G: tl.constexpr,
    D: tl.constexpr,
):
    index = tl.program_id(0)
    source = tl.load(sources_ptr + index).to(tl.int64)
    target = tl.load(targets_ptr + index).to(tl.int64)
    if (source >= 0) & (target >= 0) & (source != target):
        place = tl.program_id(1).to(tl.int64) * raw.stride_head + tl.program_id(2) * raw.stride_half
        offs_d = tl.arange(0, triton.next_power_of_2(D))[None, :]
        for first in tl.static_range(0, G, 32):
            token = first + tl.arange(0, 32)[:, None]
            offset = place + token * raw.stride_token + offs_d
            tile = tl.load(raw.ptr + source * raw.stride_page + offset, (offs_d < D) & (token < G))
            tl.store(raw.ptr + target * raw.stride_page + offset, tile, (offs_d < D) & (token < G))


def copy_raw_pages(raw_pages: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy raw pages in one launch: what two sequences don't share when one continues as the other.

    Quantized pages need no copy: both have their ids in `block_table`.

    Args:
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, head_dim], written in place.
        sources: int32 [n], ids of raw pages.
        targets: int32 [n]; page sources[i] is copied to page targets[i]. No target is another target or another's source. Where
            one of both is below 0 nothing is copied.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Ids are not read to be checked.
    """
    check_raw_pages(raw_pages)
    check_tensor("sources", sources, [None], torch.int32, device=raw_pages.device)
    check_tensor("targets", targets, [sources.shape[0]], torch.int32, device=raw_pages.device)
    raw_pages = check_pool("raw_pages", raw_pages)
    if not gpu.on_device(raw_pages):
        reference.copy_raw_pages(raw_pages, sources, targets)
        return
    num_kv_heads, page_size, head_dim = raw_pages.shape[2:]
    if sources.shape[0] and num_kv_heads:
        on(raw_pages, _kvarn_copy_raw_pages_kernel)[(sources.shape[0], num_kv_heads, 2)](
            as_tokens(raw_pages), sources, targets, G=page_size, D=head_dim, num_warps=4, enable_fp_fusion=False
        )


def cut_tokens(pages: torch.Tensor, raw_pages: torch.Tensor, step: Step, new_lens: torch.Tensor) -> None:
    """Cut the sequences of a step back to `new_lens` tokens, into quantized pages too: a conversation is edited.

    The page that a new end is inside of is dequantized into its slot of the tail ring; it is not written, for others may share
    it. The next step is planned with lengths that follow from `new_lens`, and with `prefix_lens` of at least `new_lens` if it
    has `max_drafts` without `early_pages`. Nothing is to be done where no more than `max_drafts` tokens are taken back.

    Args:
        pages: uint8 [num_pages, num_kv_heads, page_bytes].
        raw_pages: float16, bfloat16 or float32 [num_raw_pages, 2, num_kv_heads, page_size, layout.raw_head_dim], written in
            place.
        step: the last step of the sequences, which has been written.
        new_lens: int32 [batch], tokens that each sequence keeps; for sequences that are not cut their length.

    Raises:
        ValueError: for a wrong shape, dtype, device or stride; nothing is written. Lengths are not read to be checked.
    """
    cache = cache_of(pages, raw_pages, step)
    cache.seq_lens = new_lens
    cache = checked_for_completion(cache, "new_lens")
    if not gpu.on_device(pages):
        reference.cut_tokens(pages, raw_pages, step, new_lens)
        return
    launch_cut_back(cache)
