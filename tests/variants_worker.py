"""Record which kernels calls of many sizes, addresses and strides would compile for sm90: `python variants_worker.py`.

Prints those that `warmup` does not compile. A process of its own, because kernels that the interpreter has decorated have no
keys. Nothing is compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import variant_cases
from triton.runtime.jit import JITFunction

import kvarn_triton as kvarn
from kvarn_triton import gpu
from kvarn_triton.testing.compiler import Compiled, compile_for

SEEDS = 80
MANY = 70_000
"""More rows than the second and third axis of a grid can have programs."""


def check_grids(kernels: list[Compiled]) -> None:
    """Call everything for many rows and look at the grids."""
    kernels.clear()
    heads, ids = torch.zeros(MANY, 2, 64, dtype=torch.float16), torch.zeros(MANY, 1, dtype=torch.int32)
    flat, layout = ids[:, 0].contiguous(), kvarn.PageLayout(64, 64, 4, 2)
    pages = torch.zeros(layout.pages_shape(1, 1), dtype=torch.uint8)
    raw_pages = torch.zeros(1, 2, 1, 64, 64, dtype=torch.float16)
    for split_size in (None, 1):
        kvarn.decode_attention(heads, pages, ids.expand(-1, 3).contiguous(), flat, layout, split_size=split_size)
        ends = torch.arange(MANY + 1, dtype=torch.int32)
        kvarn.prefill_attention(heads, pages, ids.expand(-1, 3).contiguous(), flat, ends, layout, split_size=split_size)
    kvarn.commit_pages(raw_pages, pages, ids, ids, flat, flat, layout, max_new_pages=10**9)
    kvarn.append_tokens(heads[:, :1], heads[:, :1], raw_pages, flat)
    kvarn.store_pages(heads[:64, :1], heads[:64, :1], pages, flat, layout, token_starts=flat)
    step = kvarn.plan_step(layout, flat, None, ids, ids)
    kvarn.write_tokens(heads[:, :1], heads[:, :1], pages, raw_pages, step)
    kvarn.attend(heads, pages, raw_pages, step)
    kvarn.read_tokens(pages, raw_pages, step, heads[:, :1, None], heads[:, :1, None])
    kvarn.copy_raw_pages(raw_pages, flat, flat)
    kvarn.merge_states(heads, heads[..., 0].float(), heads, heads[..., 0].float())
    kvarn.hadamard(heads)
    latents, tokens = kvarn.MLALayout(4, 64), torch.zeros(64, 576, dtype=torch.float16)
    pages, raw_pages = torch.zeros(1, latents.page_bytes, dtype=torch.uint8), torch.zeros(1, 64, 576, dtype=torch.float16)
    q = torch.zeros(1, 2, 576, dtype=torch.float16).expand(MANY, 2, 576)
    for indices in (None, ids):
        kvarn.mla_decode_attention(q, pages, ids, flat, latents, sm_scale=1.0, indices=indices)
    kvarn.mla_decode_attention(q, pages[:0], ids, flat, latents, sm_scale=1.0)  # all is raw: the same kernel, which is warm
    assert not [kernel for kernel in kernels if kernel.name == "_kvarn_mla_decode_kernel"]
    kvarn.mla_commit_pages(raw_pages, pages, ids, ids, flat, flat, latents)
    tokens = tokens[:1].expand(MANY, 576)
    kvarn.mla_append_tokens(tokens[:, :512], tokens[:, 512:], raw_pages, flat)
    step = kvarn.plan_step(latents.keys, flat, None, ids, ids)
    kvarn.mla_write_tokens(tokens[:, :512], tokens[:, 512:], pages, raw_pages, step, latents)
    kvarn.mla_store_pages(tokens[:, :512], tokens[:, 512:], pages, flat, latents, token_starts=flat)
    kvarn.mla_dequantize_pages(pages, flat, latents)
    assert len({kernel.name for kernel in kernels}) >= 24
    for kernel in kernels:
        assert kernel.grid[0] < 2**31 and all(size < 2**16 for size in kernel.grid[1:]), kernel


def call_many_heads() -> None:
    """Cut long tables into many runs where heads alone fill the GPU, so that a call without `split_size` has few."""
    layout, ints = variant_cases.LAYOUT, {"dtype": torch.int32}
    pages, q = torch.zeros(layout.pages_shape(1, 64), dtype=torch.uint8), torch.zeros(3, 64, 64, dtype=variant_cases.DTYPE)
    raw_pages = torch.zeros(1, 2, 64, 64, 64, dtype=variant_cases.DTYPE)
    raw = {"raw_pages": raw_pages, "raw_table": torch.zeros(1, 1, **ints), "num_quantized": torch.zeros(1, **ints)}
    for split_size in (None, 1, 9):
        table, ends = torch.zeros(1, 90, **ints), torch.zeros(2, **ints)
        kvarn.prefill_attention(q, pages, table, raw["num_quantized"], ends, layout, split_size=split_size, **raw)
        kvarn.decode_attention(q[:1], pages, table, raw["num_quantized"], layout, split_size=split_size, **raw)


def main() -> None:
    """Print each kernel once for each key that is new."""
    seen: set[tuple[str, str]] = set()
    new: list[str] = []
    guarded = False

    def record(self: JITFunction, key: str, signature: dict, *rest: object) -> None:
        if guarded and (self.__name__, key) not in seen:
            new.append(f"{self.__name__} {key[:2000]}")
        seen.add((self.__name__, key))

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        nonlocal guarded
        guarded = True
        yield
        guarded = False

    with (
        compile_for("sm90") as kernels,
        mock.patch.object(JITFunction, "_do_compile", record),
        mock.patch.object(gpu, "num_multiprocessors", lambda device: 132),
    ):
        kvarn.warmup(variant_cases.LAYOUT, 64, 64, torch.device("cpu"), **variant_cases.WARMUP)
        with guard():
            call_many_heads()
        variant_cases.run(SEEDS, torch.device("cpu"), guard)
        check_grids(kernels)
    assert len({name for name, _ in seen}) == 39, seen
    print("\n".join(new))


if __name__ == "__main__":
    main()
