"""Calls of every function with given layouts and dtypes, of which `compile_cases.py` makes cases."""

from __future__ import annotations

import dataclasses

import torch

import kvarn_triton as kvarn
from kvarn_triton import PageLayout, configs

PLAIN = kvarn.Encoder(iterations=8, clip=False, fits=0, norm="balance")
"""An encoder without the steps that take the compiler longest."""


def decode(
    layout: PageLayout,
    *,
    group: int = 8,
    dtype: torch.dtype = torch.float16,
    raw: bool = True,
    scheduled: bool = False,
    batch: int = 2,
    **options: float,
) -> None:
    """Call decode_attention for two kv heads, after its schedule or without."""
    heads = 2
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
