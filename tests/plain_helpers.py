"""What tests of prefill attention over plain tokens share: numbers of records, caches, scratch memory.

A record says what one program attends to, in segments; `kvarn_triton.attention.records` has its fields. The fixture `listed` of
`conftest.py` collects the records of launches.
"""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from helpers import ON_GPU
from prefill_cases import SMALL, new_scratch

from kvarn_triton import configs
from kvarn_triton.attention.records import COUNT, HEADER, LEAD, MASKED, ROOM, SEGMENTS, SHIFT, START, WHOLE, WINDOW
from kvarn_triton.cache import Cache

NEEDS_PLAIN_KERNEL = pytest.mark.skipif(
    ON_GPU and not configs.has_plain_kernel(SMALL, torch.float16, torch.device("cuda", 0), 128), reason="needs wgmma"
)


def numbers(records: torch.Tensor, segment: int, field: tl.constexpr) -> list[int]:
    """Return a number of a segment, of all programs that have rows."""
    return records[records[:, 2] > 0, HEADER.value + field.value * ROOM.value + segment].tolist()


def numbers_of(record: list[int]) -> dict[str, list[int]]:
    """Return the numbers of all segments of a record, by name."""
    fields = {"start": START, "lead": LEAD, "whole": WHOLE, "masked": MASKED, "count": COUNT, "shift": SHIFT, "window": WINDOW}
    first = {name: HEADER.value + field.value * ROOM.value for name, field in fields.items()}
    return {name: record[place : place + SEGMENTS.value] for name, place in first.items()}


def scratched(arguments: dict, dtype: torch.dtype | None = None) -> dict:
    """Return the option that makes a call attend to plain tokens."""
    return {"scratch": new_scratch(arguments, dtype)}


def cache_of(arguments: dict) -> Cache:
    """Return the cache of a call."""
    names = ("layout", "pages", "seq_lens", "block_table", "kv_indptr", "kv_indices", "raw_pages", "raw_table", "num_quantized")
    return Cache(*(arguments.get(name) for name in names), arguments.get("sink_len", 0))
