"""Calls whose kernels `compile_worker.py` compiles, by parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from compile_calls import (
    PLAIN,
    attend_steps,
    decode,
    dequantize,
    encode,
    plans_and_reads,
    prefill,
    rows_of,
    small_functions,
    write,
)
from mla_cases import mla_cases, mla_encode_cases, mla_encode_other_cases

from kvarn_triton import DEFAULT, PageLayout

MAIN = PageLayout(head_dim=128, page_size=128, k_bits=4, v_bits=2)
OTHER_VALUES = PageLayout(head_dim=192, page_size=128, k_bits=4, v_bits=2, v_head_dim=128)
SHARING = PageLayout(head_dim=128, page_size=128, k_bits=6, v_bits=5)
"""Codes whose high bits distant rows share."""
SHARING_TARGETS = ("sm80", "sm90", "sm100", "gfx942")
"""Targets that compile it."""
NARROW_TARGETS = ("sm86",)
"""Targets with 99 KB of shared memory, of which one compiles what needs most of it."""
OLDEST = triton.__version__.startswith("3.6.")
"""Whether this is the oldest supported Triton, which compiles more."""
ALL_STEPS_TARGETS = ("sm80", "sm90", "sm100", "gfx942") if OLDEST else ("sm90",)
"""Targets that compile all steps of the encoder. Both kernels encode with the same code, and what they load and store does not
depend on the encoder: the oldest Triton compiles all steps in both for one target, else one of the kernels has them."""
WIDE_TARGETS = ("sm90", "gfx942") if OLDEST else ("sm90",)
"""Targets that compile other layouts than MAIN of scratch memory too."""

Call = Callable[[], None]


def main_cases(target: str) -> dict[str, Call]:
    """Return calls of decode_attention at the usual head_dim, and of all that neither attends nor encodes."""
    return {
        "decode": lambda: decode(MAIN),
        "decode quantized only, group 8": lambda: decode(MAIN, raw=False),
        "decode quantized only, group 4": lambda: decode(MAIN, group=4, raw=False),
        "decode scheduled, group 4": lambda: decode(MAIN, group=4, scheduled=True),
        "small": lambda: small_functions(MAIN),
        "steps": lambda: plans_and_reads(MAIN),
    }


def decode_cases(target: str) -> dict[str, Call]:
    """Return other calls of decode_attention."""
    cases: dict[str, Call] = {
        "decode window and soft cap": lambda: decode(MAIN, window=1000, soft_cap=30.0),
        "decode head_dim 192 and 128": lambda: decode(OTHER_VALUES),
    }
    if target in SHARING_TARGETS:
        cases["decode quantized only, 6 and 5 bits"] = lambda: decode(SHARING, raw=False)
    return cases


def decode_other_cases(target: str) -> dict[str, Call]:
    """Return calls of decode_attention with other layouts and masks, and of what reads such caches."""
    return {
        "dequantize 6 and 5 bits": lambda: dequantize(SHARING, torch.bfloat16),
        "decode head_dim 80 and 192, 5 and 6 bits": lambda: decode(PageLayout(80, 64, 5, 6, v_head_dim=192), group=5),
        "steps, sinks in pages": lambda: attend_steps(MAIN),
        "decode window beside the sink": lambda: decode(MAIN, window=99, keep_sink=True),
        "decode group 4, 3 bits, head_dim 80": lambda: decode(PageLayout(80, 64, 3, 3), group=4, window=99, soft_cap=30.0),
        "decode group 2, head_dim 256": lambda: decode(PageLayout(256, 128, 4, 2), group=2, dtype=torch.bfloat16),
        "decode float32": lambda: decode(PageLayout(64, 64, 3, 8), dtype=torch.float32),
        "decode head_dim 256, 8 bits": lambda: decode(PageLayout(256, 128, 8, 8), group=16),
        "decode head_dim 512": lambda: decode(PageLayout(512, 64, 8, 8), group=2),
    }


def prefill_cases(target: str) -> dict[str, Call]:
    """Return calls of prefill_attention."""
    usual = rows_of(MAIN, "registers", 16) if target == "sm90" else None
    cases: dict[str, Call] = {
        "prefill few": lambda: prefill(MAIN, 8, new=False, split_size=1),
        "prefill 16 rows": lambda: prefill(MAIN, 8, new=False, config=usual),
        "prefill 32 rows": lambda: prefill(MAIN, 16, new=False, config=rows_of(MAIN, "registers", 32)),
        "prefill many": lambda: prefill(MAIN, 512),
    }
    if target == "sm90":
        fours, mixed = PageLayout(128, 128, 4, 4), PageLayout(128, 128, 2, 4)
        cases |= {
            "drafts 16 rows": lambda: prefill(MAIN, 8, new=False),
            "drafts 32 rows": lambda: prefill(MAIN, 16),
            "drafts 32 rows, 4 bits": lambda: prefill(fours, 16),
            "12 query heads": lambda: decode(MAIN, group=12, batch=4),
            "drafts 16 rows, bfloat16": lambda: prefill(
                mixed, 8, dtype=torch.bfloat16, config=rows_of(mixed, "warp_groups", 16)
            ),
        }
    if target in NARROW_TARGETS:
        cases |= {
            "prefill head_dim 512, 4 bits": lambda: prefill(PageLayout(512, 128, 4, 2), 8),
            "prefill head_dim 512 and 64": lambda: prefill(PageLayout(512, 128, 4, 2, v_head_dim=64), 8),
        }
    return cases


def prefill_other_cases(target: str) -> dict[str, Call]:
    """Return calls of prefill_attention with other layouts and masks."""
    cases: dict[str, Call] = {
        "prefill 16 rows, 6 and 5 bits": lambda: prefill(SHARING, 8, new=False),
        "prefill window and soft cap": lambda: prefill(MAIN, 512, window=99, soft_cap=30.0),
        "prefill window beside the sink": lambda: prefill(MAIN, 512, window=99, keep_sink=True),
        "prefill trees and spans, window": lambda: prefill(MAIN, 512, masks=("tree_mask", "span_ends"), window=99),
        "prefill float32": lambda: prefill(PageLayout(64, 64, 3, 8), 64, dtype=torch.float32),
        "prefill bfloat16, head_dim 80": lambda: prefill(PageLayout(80, 64, 3, 3), 64, group=5, dtype=torch.bfloat16),
        "prefill head_dim 256": lambda: prefill(PageLayout(256, 128, 8, 8), 64),
        "prefill head_dim 512": lambda: prefill(PageLayout(512, 128, 8, 8), 64),
    }
    if target == "sm90":
        cases |= {
            "prefill 16 rows, trees, window": lambda: prefill(MAIN, 8, masks=("tree_mask",), window=99),
            "prefill 32 rows, spans": lambda: prefill(MAIN, 16, masks=("span_ends",)),
        }
    return cases


def decode_rare_cases(target: str) -> dict[str, Call]:
    """Return calls of decode_attention with layouts of which others have every branch."""
    return {
        "steps, reads of head_dim 80 and 256": lambda: plans_and_reads(PageLayout(80, 64, 3, 8, v_head_dim=256)),
        "decode head_dim 80": lambda: decode(PageLayout(80, 64, 3, 3), group=5),
        "decode head_dim 80 and 256": lambda: decode(PageLayout(80, 64, 3, 8, v_head_dim=256), group=5),
        "decode bfloat16, group 16": lambda: decode(MAIN, group=16, dtype=torch.bfloat16),
    }


def prefill_rare_cases(target: str) -> dict[str, Call]:
    """Return calls of prefill_attention with layouts and masks of which others have every branch."""
    return {
        "prefill many, 6 and 5 bits": lambda: prefill(SHARING, 512),
        "prefill trees": lambda: prefill(MAIN, 64, masks=("tree_mask",)),
        "prefill head_dim 192 and 128": lambda: prefill(OTHER_VALUES, 512),
        "prefill 15 rows, bfloat16, head_dim 80": lambda: prefill(PageLayout(80, 64, 3, 3), 6, group=5, dtype=torch.bfloat16),
        "prefill 32 rows, window beside the sink": lambda: prefill(MAIN, 8, window=99, keep_sink=True),
        "prefill 32 rows, head_dim 256": lambda: prefill(PageLayout(256, 128, 8, 8), 16),
    }


def scratch_cases(target: str) -> dict[str, Call]:
    """Return calls of prefill_attention with scratch memory, and of what writes such pages."""
    cases: dict[str, Call] = {"prefill scratch": lambda: prefill(MAIN, 512, scratch=True)}
    if target in NARROW_TARGETS:
        cases["prefill scratch, head_dim 256"] = lambda: prefill(PageLayout(256, 128, 4, 2), 64, scratch=True)
    if target == "sm90":  # whose kernel of warp groups has other steps for each pair of head_dims
        cases |= {
            "prefill scratch, head_dim 64, pages of 64": lambda: prefill(PageLayout(64, 64, 2, 2), 512, scratch=True),
            "prefill scratch, in the cache": lambda: prefill(MAIN, 512, new=False, scratch=True, sinks=torch.zeros(8)),
            "prefill scratch, runs of pages": lambda: prefill(MAIN, 512, scratch=True, split_size=1),
            "prefill scratch, head_dim 256 and 128, bfloat16": lambda: prefill(
                PageLayout(256, 64, 4, 2, v_head_dim=128), 512, dtype=torch.bfloat16, scratch=True
            ),
        }
    if target in WIDE_TARGETS:
        cases |= {
            "prefill scratch, head_dim 256, bfloat16": lambda: prefill(
                PageLayout(256, 64, 3, 2), 64, dtype=torch.bfloat16, scratch=True, window=99
            ),
            "prefill scratch, window beside the sink": lambda: prefill(MAIN, 512, scratch=True, window=99, keep_sink=True),
            "prefill scratch, head_dim 512": lambda: prefill(PageLayout(512, 128, 8, 8), 64, scratch=True),
            "prefill scratch, spans": lambda: prefill(MAIN, 512, scratch=True, masks=("span_ends",)),
            "dequantize head_dim 80": lambda: dequantize(PageLayout(80, 64, 3, 8), torch.bfloat16),
            "dequantize head_dim 512": lambda: dequantize(PageLayout(512, 64, 2, 3), torch.float32),
            "dequantize head_dim 192 and 128": lambda: dequantize(OTHER_VALUES, torch.float16),
        }
    return cases


def encode_cases(target: str) -> dict[str, Call]:
    """Return calls of store_pages and commit_pages at the usual head_dim."""
    store = DEFAULT if target in ALL_STEPS_TARGETS else PLAIN
    every = DEFAULT if target == "sm90" and OLDEST else PLAIN
    return {"encode": lambda: encode(MAIN, encoder=store, commit=every), "write": lambda: write(MAIN, encoder=every)}


def encode_other_cases(target: str) -> dict[str, Call]:
    """Return calls of store_pages and commit_pages at other head_dims."""
    return {
        "encode head_dim 80": lambda: encode(PageLayout(80, 64, 2, 3)),
        "encode head_dim 80, 5 and 6 bits": lambda: encode(PageLayout(80, 64, 5, 6), commit=None),
        "encode head_dim 192, float32": lambda: encode(PageLayout(192, 128, 3, 8), dtype=torch.float32),
        "encode head_dim 192 and 128": lambda: encode(OTHER_VALUES),
        "write head_dim 192 and 128": lambda: write(OTHER_VALUES, dtype=torch.bfloat16),
    }


def encode_largest_cases(target: str) -> dict[str, Call]:
    """Return calls of store_pages and commit_pages with the largest tiles."""
    return {
        "encode head_dim 512": lambda: encode(PageLayout(512, 64, 8, 4)),
        "encode head_dim 64 and 256": lambda: encode(PageLayout(64, 64, 4, 2, v_head_dim=256)),
        "write head_dim 512": lambda: write(PageLayout(512, 64, 8, 4), dtype=torch.float32),
        "encode head_dim 512, all steps": lambda: encode(PageLayout(512, 64, 8, 4), encoder=DEFAULT, commit=None),
    }


PARTS = {
    "main": main_cases,
    "decode": decode_cases,
    "decode other": decode_other_cases,
    "prefill": prefill_cases,
    "prefill other": prefill_other_cases,
    "decode rare": decode_rare_cases,
    "prefill rare": prefill_rare_cases,
    "scratch": scratch_cases,
    "encode": encode_cases,
    "mla": mla_cases,
    "mla encode": mla_encode_cases,
    "mla encode other": mla_encode_other_cases,
    "encode other": encode_other_cases,
    "encode largest": encode_largest_cases,
}
