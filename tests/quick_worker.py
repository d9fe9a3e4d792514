"""Print a digest of what kernels compute in Triton's interpreter, as it is or with `quick`: `python quick_worker.py quick`."""

from __future__ import annotations

import hashlib
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

if sys.argv[1:] == ["quick"]:
    from quick_interpreter import quicken

    quicken()

import kvarn_triton as kvarn
from kvarn_triton import PageLayout
from kvarn_triton.testing import cache_case


def results() -> list[torch.Tensor]:
    """Encode, read back and attend, with most operations of kernels: codes with high bits, masks, tables of every kind."""
    layout = PageLayout(64, 64, 5, 2, v_head_dim=80)
    make = torch.Generator().manual_seed(0)
    k, v = (torch.randn(128, 2, d, generator=make).bfloat16() for d in (64, 80))
    pages, ids = layout.empty_pages(3, 2, "cpu"), torch.tensor([2, 0], dtype=torch.int32)
    kvarn.store_pages(k, v, pages, ids, layout)
    out = [pages[ids], *kvarn.dequantize_pages(pages, ids, layout)]
    for group, options in ((3, {"window": 99, "soft_cap": 20.0}), (6, {"split_size": 1, "sinks": torch.zeros(12)})):
        case = cache_case(layout, [150, 0, 300], group=group, sink_len=16)
        out += kvarn.decode_attention(case.q, **case.kwargs, return_lse=True, **options)
    q, new = torch.randn(7, 4, 64, generator=make), torch.randn(2, 7, 2, 80, generator=make)
    case, ends = cache_case(layout, [90, 150], group=2, dtype=torch.float32), torch.tensor([0, 3, 7], dtype=torch.int32)
    out += kvarn.prefill_attention(q, cu_seqlens_q=ends, k=new[0, ..., :64], v=new[1], **case.kwargs, return_lse=True)
    return out


if __name__ == "__main__":
    digest = hashlib.sha256()
    for tensor in results():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    print(digest.hexdigest())
