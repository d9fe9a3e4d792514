"""Calls whose kernels `compile_worker.py` compiles, by parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
from mla_cases import mla_cases, mla_encode_cases, mla_encode_other_cases

import kvarn_triton as kvarn
from kvarn_triton import DEFAULT, PageLayout, configs

MAIN = PageLayout(head_dim=128, page_size=128, k_bits=4, v_bits=2)
OTHER_VALUES = PageLayout(head_dim=192, page_size=128, k_bits=4, v_bits=2, v_head_dim=128)
SHARING = PageLayout(head_dim=128, page_size=128, k_bits=6, v_bits=5)
"""Codes whose high bits distant rows share."""
SHARING_TARGETS = ("sm80", "sm90", "sm100", "gfx942")
"""Targets that compile it."""
PLAIN = kvarn.Encoder(iterations=8, clip=False, fits=0, norm="balance")
"""An encoder without the steps that take the compiler longest."""
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


def decode(
    layout: PageLayout,
    *,
    group: int = 8,
    dtype: torch.dtype = torch.float16,
    raw: bool = True,
    scheduled: bool = False,
    **options: float,
) -> None:
    """Call decode_attention for two kv heads, after its schedule or without."""
    batch, heads = 2, 2
    tables = {"block_table": torch.zeros(batch, 2, dtype=torch.int32), "seq_lens": torch.zeros(batch, dtype=torch.int32)}
    if raw:
        tables |= {
            "raw_pages": torch.zeros(4, 2, heads, layout.page_size, layout.raw_head_dim, dtype=dtype),
            "raw_table": torch.zeros(batch, 2, dtype=torch.int32),
            "num_quantized": torch.zeros(batch, dtype=torch.int32),
            "sink_len": layout.page_size,
        }
    q = torch.zeros(batch, heads * group, layout.head_dim, dtype=dtype)
    pages = torch.zeros(layout.pages_shape(4, heads), dtype=torch.uint8)
    if scheduled:
        given = {name: x for name, x in tables.items() if name != "raw_pages"}
        given |= {name: x for name, x in options.items() if name == "window"}
        options["schedule"] = kvarn.schedule_decode(layout, num_q_heads=q.shape[1], num_kv_heads=heads, **given)
    kvarn.decode_attention(q, pages, layout=layout, return_lse=True, **tables, **options)


def prefill(
    layout: PageLayout,
    tokens: int,
    *,
    group: int = 4,
    dtype: torch.dtype = torch.float16,
    new: bool = True,
    scratch: bool = False,
    masks: tuple[str, ...] = (),
    **options: object,
) -> None:
    """Call prefill_attention for two sequences and kv heads, split among programs or not."""
    lens, table = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    raw_pages = torch.zeros(4, 2, 2, layout.page_size, layout.raw_head_dim, dtype=dtype)
    tables = {"block_table": table, "seq_lens": lens, "raw_pages": raw_pages, "raw_table": table, "num_quantized": lens}
    q, k = (torch.zeros(tokens, 2 * heads, layout.head_dim, dtype=dtype) for heads in (group, 1))
    tables |= {"k": k, "v": torch.zeros(tokens, 2, layout.v_head_dim, dtype=dtype)} if new else {}
    tables |= {"scratch": torch.zeros_like(raw_pages)} if scratch else {}
    if tokens >= 2 * configs.SCRATCH_TOKENS and not scratch:  # else the call takes such memory by itself
        options["config"] = configs.prefill_config(layout, dtype, q.device, tokens, 2, group, None)
    kinds = {"tree_mask": torch.int64, "span_ends": torch.int32}
    tables |= {name: torch.zeros(tokens, dtype=kinds[name]) for name in masks}
    pages, ends = torch.zeros(layout.pages_shape(4, 2), dtype=torch.uint8), torch.zeros(3, dtype=torch.int32)
    kvarn.prefill_attention(q, pages, cu_seqlens_q=ends, layout=layout, return_lse=True, **tables, **options)


def rows_of(layout: PageLayout, form: str, rows: int) -> configs.PrefillConfig:
    """Return launch parameters for a few rows in one form of the loop over pages."""
    return configs.config_of_form(form, layout, torch.float16, torch.device("cpu"), rows)


def encode(
    layout: PageLayout,
    dtype: torch.dtype = torch.float16,
    *,
    encoder: kvarn.Encoder = PLAIN,
    commit: kvarn.Encoder | None = PLAIN,
) -> None:
    """Call store_pages and commit_pages with their encoders; with keys and values of different head_dim append_tokens too."""
    pages, ids = torch.zeros(layout.pages_shape(4, 2), dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    k, v = (torch.zeros(2 * layout.page_size, 2, d, dtype=dtype) for d in (layout.head_dim, layout.v_head_dim))
    kvarn.store_pages(k, v, pages, ids, layout, encoder=encoder)
    raw_pages = torch.zeros(4, 2, 2, layout.page_size, layout.raw_head_dim, dtype=dtype)
    if layout.head_dim != layout.v_head_dim:
        kvarn.append_tokens(k[:5], v[:5], raw_pages, torch.zeros(5, dtype=torch.int32))
    if commit is not None:
        kvarn.commit_pages(raw_pages, pages, ids[:, None].repeat(1, 2), ids[:, None], ids, ids, layout, encoder=commit)


def dequantize(layout: PageLayout, dtype: torch.dtype) -> None:
    """Call dequantize_pages."""
    kvarn.dequantize_pages(torch.zeros(layout.pages_shape(4, 2), dtype=torch.uint8), torch.zeros(2).int(), layout, dtype=dtype)


def small_functions(layout: PageLayout) -> None:
    """Call everything else."""
    pages, ids = torch.zeros(layout.pages_shape(4, 2), dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    tokens = torch.zeros(5, 2, layout.head_dim, dtype=torch.float16)
    tile = torch.zeros(layout.page_size, layout.head_dim)
    kvarn.hadamard(tokens)
    kvarn.append_tokens(tokens, tokens, torch.zeros(4, 2, 2, layout.page_size, layout.head_dim).half(), torch.zeros(5).int())
    kvarn.dequantize_pages(pages, ids, layout)
    raw_pages = torch.zeros(4, 2, 2, layout.page_size, layout.head_dim).half()
    kvarn.cut_back(raw_pages, pages, ids[:, None], ids[:, None], ids, ids, layout)
    kvarn.merge_states(tokens, tokens[..., 0].float(), tokens, tokens[..., 0].float())
    kvarn.variance_normalize(tile, per="channel")
    codes, scale, zero = kvarn.quantize(tile, 3, per="channel")
    kvarn.dequantize(codes, scale, zero, per="channel")
    kvarn.unpack(kvarn.pack(codes, 3, per="token"), 3, layout.page_size, layout.head_dim, per="token")


def step_of(layout: PageLayout, ends: torch.Tensor | None, **options: object) -> tuple:
    """Plan a step of two sequences whose sinks may be in pages; return pages, raw pages and the plan."""
    ints = {"dtype": torch.int32}
    sizes = {} if ends is None else {"num_tokens": 5, "max_query_len": 3}
    step = kvarn.plan_step(
        layout, torch.zeros(2, **ints), ends, torch.zeros(2, 4, **ints), torch.zeros(2, 3, **ints), sink_len=layout.page_size,
        sink_columns=True, **sizes, **options,
    )  # fmt: skip
    pages = torch.zeros(layout.pages_shape(4, 2), dtype=torch.uint8)
    return pages, torch.zeros(4, 2, 2, layout.page_size, layout.raw_head_dim, dtype=torch.float16), step


def plans_and_reads(layout: PageLayout) -> None:
    """Call plan_step with and without its arguments, read_tokens and copy_raw_pages."""
    ids = torch.zeros(2, dtype=torch.int32)
    step_of(layout, None)
    pages, raw_pages, step = step_of(layout, torch.zeros(3, dtype=torch.int32), rows=ids, prefix_lens=ids)
    step_of(layout, None, early_pages=True, max_drafts=1)
    kvarn.plan_step(layout, ids, None, None, ids[:, None], kv_indptr=torch.zeros(3).int(), kv_indices=ids)
    k, v = (torch.zeros(2, 2, 9, d, dtype=torch.float16) for d in (layout.head_dim, layout.v_head_dim))
    kvarn.read_tokens(pages, raw_pages, step, k, v)
    kvarn.copy_raw_pages(raw_pages, ids, ids)


def attend_steps(layout: PageLayout, dtype: torch.dtype = torch.float16) -> None:
    """Call attend for decodes and for a chunk with and without scratch memory, where a sink may be in pages."""
    pages, raw_pages, step = step_of(layout, None)
    q, k = (torch.zeros(5, heads, layout.head_dim, dtype=dtype) for heads in (16, 2))
    kvarn.attend(q[:2], pages, raw_pages, step)
    pages, raw_pages, step = step_of(layout, torch.zeros(3, dtype=torch.int32))
    v = torch.zeros(5, 2, layout.v_head_dim, dtype=dtype)
    for scratch in (None, torch.zeros(8, *raw_pages.shape[1:], dtype=torch.float16)):
        kvarn.attend(q, pages, raw_pages, step, k=k, v=v, scratch=scratch)


def write(layout: PageLayout, dtype: torch.dtype = torch.float16, *, encoder: kvarn.Encoder = PLAIN) -> None:
    """Call write_tokens."""
    pages, raw_pages, step = step_of(layout, torch.zeros(3, dtype=torch.int32))
    k, v = (torch.zeros(5, 2, d, dtype=dtype) for d in (layout.head_dim, layout.v_head_dim))
    for at_once in (True, False):
        kvarn.write_tokens(k, v, pages, raw_pages, dataclasses.replace(step, at_once=at_once), encoder=encoder)


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
    cases: dict[str, Call] = {
        "prefill few": lambda: prefill(MAIN, 8, new=False, split_size=1),
        "prefill 16 rows": lambda: prefill(MAIN, 8, new=False),
        "prefill 32 rows": lambda: prefill(MAIN, 16, new=False, config=rows_of(MAIN, "registers", 32)),
        "prefill many": lambda: prefill(MAIN, 512),
    }
    if target == "sm90":
        fours, mixed = PageLayout(128, 128, 4, 4), PageLayout(128, 128, 2, 4)
        cases |= {
            "drafts 16 rows": lambda: prefill(MAIN, 8, new=False, config=rows_of(MAIN, "warp_groups", 16)),
            "drafts 32 rows": lambda: prefill(MAIN, 16),
            "drafts 32 rows, 4 bits": lambda: prefill(fours, 16, config=rows_of(fours, "warp_groups", 32)),
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
