"""nano-vllm over pages of kvarn_triton: the smallest whole server around the three calls of a step.

    pip install --no-deps nano-vllm-fork xxhash        # beside torch, transformers and kvarn_triton
    python docs/nano_vllm.py FOLDER "A prompt" "Another one"

FOLDER has a Qwen3 model. In a program of your own:

    import nano_vllm; nano_vllm.install("k4v2_g128")
    from nanovllm import LLM, SamplingParams

Nothing of nano-vllm is changed on disk: its `Attention` and some methods of its `ModelRunner` and `BlockManager` are replaced
before a model is made. Prefix caching works, with a sink too, and CUDA graphs are meant to: what depends on lengths is computed
inside the graph. One engine for each process, on one GPU. flash_attn isn't needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from kvarn_triton import PageLayout, Step, attend, plan_step, write_tokens


class Cache:
    """What layers share: sizes, the 16-bit slots of sequences, and the plan of a step.

    Args:
        layout_name: `k<bits>v<bits>_g<page_size>`.
        num_sink_pages: pages at the start of a sequence that stay in 16 bits.
    """

    def __init__(self, layout_name: str, num_sink_pages: int) -> None:
        self.layout_name, self.num_sink_pages = layout_name, num_sink_pages
        self.columns = num_sink_pages + 1  # raw pages of a slot: its sink, and one for the tail, as there are no drafts
        self.layers: list[KVarNAttention] = []
        self.raw_table = torch.empty(0)  # int32 [max_num_seqs, columns], at one address: captured graphs read it
        self.free: list[int] = []
        self.rows: list[tuple[int, bool]] = []  # of the raw table: the slot, and whether its sink is in pages
        self.step: Step | None = None
        self.block_size = 0

    def allocate(self, runner: Any) -> None:
        """Allocate the memory of all layers: raw pages for `max_num_seqs` sequences, and pages in what is then left."""
        config = runner.config
        if runner.world_size > 1:
            raise NotImplementedError("tensor_parallel_size: expected 1: other ranks are not told which sequence is which")
        layers = [module for module in runner.model.modules() if isinstance(module, KVarNAttention)]
        layout, heads, device = layers[0].layout, layers[0].num_kv_heads, next(runner.model.parameters()).device
        raw_shape = (config.max_num_seqs * self.columns, 2, heads, layout.page_size, layout.raw_head_dim)
        for layer in layers:
            layer.raw_pages = torch.zeros(raw_shape, dtype=runner.dtype, device=device)
        pages_per_block = runner.block_size // layout.page_size
        if config.num_kvcache_blocks <= 0:
            free, total = torch.cuda.mem_get_info()
            available = min(int(free * 0.9), free - int(total * (1 - config.gpu_memory_utilization)))
            config.num_kvcache_blocks = available // (len(layers) * pages_per_block * heads * layout.page_bytes)
        if config.num_kvcache_blocks <= 0:
            raise MemoryError(f"no memory for pages beside 16-bit slots of {config.max_num_seqs} sequences: lower max_num_seqs")
        for layer in layers:
            layer.pages = layout.empty_pages(config.num_kvcache_blocks * pages_per_block, heads, device)
        self.raw_table = torch.zeros(config.max_num_seqs, self.columns, dtype=torch.int32, device=device)
        self.free = list(range(config.max_num_seqs))
        self.layers, self.block_size = layers, runner.block_size

    def enter(self, seqs: list[Any]) -> None:
        """Write the rows of the raw table for the sequences of a step, unless they are those of the last one."""
        entered = [(seq.slot, seq.num_cached_tokens > 0) for seq in seqs]
        if entered == self.rows:
            return
        self.rows, rows = entered, []
        for slot, hit in entered:
            row = list(range(slot * self.columns, (slot + 1) * self.columns))
            if hit:  # its sink is in pages
                row[: self.num_sink_pages] = [-1] * self.num_sink_pages
            rows.append(row)
        self.raw_table[: len(rows)].copy_(torch.tensor(rows, dtype=torch.int32, pin_memory=True), non_blocking=True)

    def plan(self, context: Any, num_tokens: int) -> None:
        """Plan the step for all layers, on the device. In a decode step this is captured with the layers."""
        layout = self.layers[0].layout
        lens, ends, sizes = context.context_lens, None, {}
        if context.is_prefill:
            lens, ends = context.cu_seqlens_k[1:] - context.cu_seqlens_k[:-1], context.cu_seqlens_q
            sizes = {"num_tokens": num_tokens, "max_query_len": context.max_seqlen_q}
        self.step = plan_step(
            layout, lens, ends, context.block_tables, self.raw_table[: len(lens)], **sizes,
            sink_len=self.num_sink_pages * layout.page_size, sink_columns=self.num_sink_pages > 0,
            pages_per_block=self.block_size // layout.page_size,
        )  # fmt: skip


CACHE: Cache


class KVarNAttention(torch.nn.Module):
    """Takes the place of nano-vllm's `Attention`."""

    def __init__(self, num_heads: int, head_dim: int, scale: float, num_kv_heads: int) -> None:
        super().__init__()
        self.scale, self.num_kv_heads = scale, num_kv_heads
        self.layout = PageLayout.from_name(CACHE.layout_name, head_dim=head_dim)
        self.pages = self.raw_pages = torch.empty(0)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write the new tokens [tokens, heads, head_dim], then attend: others of the step may read what is written."""
        from nanovllm.utils.context import get_context

        if not CACHE.layers:  # nano-vllm measures memory before there is a cache
            return torch.zeros_like(q)
        if self is CACHE.layers[0]:
            CACHE.plan(get_context(), len(q))
        write_tokens(k, v, self.pages, self.raw_pages, CACHE.step)
        return attend(q, self.pages, self.raw_pages, CACHE.step, k=k, v=v, sm_scale=self.scale)


def import_engine() -> tuple[Any, Any, type]:
    """Return nano-vllm's modules `models.qwen3` and `engine.model_runner`, which import flash_attn, installed or not, and its
    `BlockManager`."""
    missing = "flash_attn" not in sys.modules and importlib.util.find_spec("flash_attn") is None
    if missing:
        stand_in = types.ModuleType("flash_attn")
        stand_in.flash_attn_varlen_func = stand_in.flash_attn_with_kvcache = None  # type: ignore[attr-defined]
        sys.modules["flash_attn"] = stand_in
    try:
        import nanovllm.engine.model_runner as model_runner
        import nanovllm.models.qwen3 as qwen3
        from nanovllm.engine.block_manager import BlockManager
    finally:
        if missing:
            del sys.modules["flash_attn"]
    return qwen3, model_runner, BlockManager


def take_rope_parameters(qwen3: Any) -> None:
    """Let `qwen3` read the rotary base where transformers 5 keeps it: in a dictionary, which nano-vllm refuses."""
    get_rope = qwen3.get_rope

    def rope(head_size: int, rotary_dim: int, max_position: int, base: float, rope_scaling: Any = None) -> Any:
        if isinstance(rope_scaling, dict) and rope_scaling.get("rope_type", "default") == "default":
            base, rope_scaling = rope_scaling.get("rope_theta", base), None
        return get_rope(head_size, rotary_dim=rotary_dim, max_position=max_position, base=base, rope_scaling=rope_scaling)

    qwen3.get_rope = rope


def take_slots(block_manager: Any) -> None:
    """Let a sequence have a slot as long as it has blocks, and admit none without: nano-vllm runs more than `max_num_seqs`."""
    can_allocate, allocate, deallocate = block_manager.can_allocate, block_manager.allocate, block_manager.deallocate

    def allocate_slot(self: Any, seq: Any) -> None:
        allocate(self, seq)
        seq.slot = CACHE.free.pop()

    def deallocate_slot(self: Any, seq: Any) -> None:
        deallocate(self, seq)
        CACHE.free.append(seq.slot)

    block_manager.can_allocate = lambda self, seq: bool(CACHE.free) and can_allocate(self, seq)
    block_manager.allocate, block_manager.deallocate = allocate_slot, deallocate_slot


def enter_steps(model_runner: Any) -> None:
    """Write the tables of a step after nano-vllm has prepared it, and have our memory allocated."""

    def entering(prepare: Callable[[Any, list[Any]], Any]) -> Callable[[Any, list[Any]], Any]:
        def prepare_step(self: Any, seqs: list[Any]) -> Any:
            inputs = prepare(self, seqs)
            if CACHE.layers:
                CACHE.enter(seqs)
                context = model_runner.get_context()
                if context.block_tables is None:  # prompts without a prefix hit: nano-vllm needs no table there
                    context.block_tables = self.prepare_block_tables(seqs)
            return inputs

        return prepare_step

    runner = model_runner.ModelRunner
    runner.allocate_kv_cache = lambda self: CACHE.allocate(self)
    runner.prepare_prefill, runner.prepare_decode = entering(runner.prepare_prefill), entering(runner.prepare_decode)


def install(layout_name: str, num_sink_pages: int = 1) -> None:
    """Have nano-vllm keep keys and values in pages. Call it once, before an engine is made."""
    global CACHE
    CACHE = Cache(layout_name, num_sink_pages)
    qwen3, model_runner, block_manager = import_engine()
    qwen3.Attention = KVarNAttention
    take_rope_parameters(qwen3)
    take_slots(block_manager)
    enter_steps(model_runner)


def main() -> None:
    """Generate text for some prompts."""
    parser = argparse.ArgumentParser(prog="nano_vllm.py")
    parser.add_argument("model", help="folder of a Qwen3 model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--layout", default="k4v2_g128")
    parser.add_argument("--max-num-seqs", type=int, default=16, help="sequences with 16-bit slots; a multiple of 16")
    options = parser.parse_args()
    install(options.layout)
    from nanovllm import LLM, SamplingParams

    engine = LLM(options.model, max_num_seqs=options.max_num_seqs)
    for prompt, answer in zip(options.prompts, engine.generate(options.prompts, SamplingParams(temperature=0.6)), strict=True):
        print(f"{prompt!r}: {answer['text']!r}")


if __name__ == "__main__":
    main()
