"""Calls of every function with tensors of many sizes, addresses and strides, none of which may choose another kernel."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

import kvarn_triton as kvarn

LAYOUT = kvarn.PageLayout(head_dim=64, page_size=64, k_bits=4, v_bits=2)
HEADS, GROUP, NUM_PAGES, NUM_RAW = 2, 4, 9, 7
DTYPE, SCRATCH = torch.float16, torch.bfloat16
LATENTS = kvarn.MLALayout(4, 64)
TILES = kvarn.MLAConfig(16, 32, 4)
"""The kernel of latent attention that GPUs with warp groups have, too."""
QUICK = kvarn.Encoder(iterations=0, clip=False, fits=0, norm="balance")
"""The encoder that takes the least time to compile."""
WARMUP = {
    "dtype": DTYPE, "encoder": QUICK, "prefill": True, "scratch": SCRATCH, "dequantize": torch.float32, "steps": True,
    "sink_columns": True, "tree_mask": True, "span_ends": True, "schedules": True,
}  # fmt: skip


class Variants:
    """Draws tensors of given values and sizes whose addresses and strides differ from call to call."""

    def __init__(self, seed: int, device: torch.device, most: int = 2**31) -> None:
        self.random, self.device, self.most = random.Random(seed), device, most

    def pick(self, *choices: int) -> int:
        """Return one of the choices, or the most that this world has of anything."""
        return min(self.random.choice(choices), self.most)

    def place(self, x: torch.Tensor, outer: tuple[int, ...] = (0, 1, 2, 8)) -> torch.Tensor:
        """Return a view with the values of `x`: somewhere in memory, with gaps of some elements between its rows."""
        x = x.to(self.device)
        first, gap = self.pick(0, 0, 1, 3, 4, 8), self.pick(0, *outer)
        sizes = list(x.shape)
        memory = torch.zeros(*sizes[:-1], sizes[-1] + gap, dtype=x.dtype, device=self.device)
        memory = torch.cat((memory.new_zeros(first), memory.flatten()))[first:].view(memory.shape)
        view = memory[..., : sizes[-1]]
        for dim, size in enumerate(sizes[:-1]):
            if size == 1 and self.pick(0, 1):  # any stride is right where there is nothing to step to
                strides = list(view.stride())
                strides[dim] = self.pick(0, 1, 5, 16)
                view = view.as_strided(view.shape, strides, view.storage_offset())
        return view.copy_(x)

    def ints(self, *shape: int, below: int = 1, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Return integers from 0 on."""
        return self.place(
            torch.tensor([self.random.randrange(below) for _ in range(torch.Size(shape).numel())]).view(shape).to(dtype)
        )

    def floats(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """Return numbers of activations."""
        return self.place(torch.ones(shape, dtype=dtype))

    def pool(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a pool, whose address and strides are multiples of 16."""
        memory = torch.zeros(shape[0] + 1, shape[1] + self.pick(0, 1), *shape[2:], dtype=dtype, device=self.device)
        return memory[self.pick(0, 1) :, : shape[1]][: shape[0]]


def masks(variants: Variants, tokens: int) -> dict:
    """Return what new tokens see of each other."""
    words = variants.ints(tokens, below=2**40, dtype=torch.int64)
    return {"tree_mask": words, "span_ends": variants.ints(tokens, below=60)}


def caches(variants: Variants, batch: int) -> dict:
    """Return the arguments of attention that say where a cache is: of two forms, with and without raw pages."""
    v, size = variants, LAYOUT.page_size
    columns = v.pick(1, 2, 5, 16, 17)
    lengths = v.ints(batch, below=columns * size + 1)
    tables = {"pages": v.pool(*LAYOUT.pages_shape(NUM_PAGES, HEADS), dtype=torch.uint8), "seq_lens": lengths, "layout": LAYOUT}
    tables["block_table"] = v.ints(batch, columns, below=NUM_PAGES)
    sink_len = v.pick(0, 1, 16, 64, 100)
    tables |= {
        "raw_pages": v.pool(NUM_RAW, 2, HEADS, size, LAYOUT.raw_head_dim, dtype=DTYPE),
        "raw_table": v.ints(batch, -(-sink_len // size) + v.pick(1, 2, 15), below=NUM_RAW),
        "num_quantized": v.place(((lengths.cpu() - sink_len).clamp(min=0) // size).int()),
        "sink_len": sink_len,
    }
    return tables


def warmed_calls(variants: Variants) -> dict[str, Callable[[], object]]:
    """Return calls of what `warmup` compiles."""
    v, batch = variants, variants.pick(1, 2, 3, 16, 33)
    tables, size, heads = caches(v, batch), LAYOUT.page_size, HEADS * GROUP
    split = {"split_size": v.pick(1, 2, 16) if v.pick(0, 1) else None, "return_lse": bool(v.pick(0, 1))}
    committed = {name: tables[name] for name in ("raw_pages", "pages", "raw_table", "block_table", "num_quantized", "sink_len")}
    committed["committed_lens"] = tables["seq_lens"]
    cut = {name: value for name, value in committed.items() if name != "committed_lens"} | {"new_lens": v.ints(batch, below=70)}
    out = {"out": v.floats(batch, heads, LAYOUT.v_head_dim)} if v.pick(0, 1) else {}
    tokens = v.pick(1, 2, 4, 5, 8, 17, 40, 300) * batch
    chunk = {"q": v.floats(tokens, heads, LAYOUT.head_dim)}
    chunk["cu_seqlens_q"] = v.place((torch.arange(batch + 1) * (tokens // batch)).int())
    chunk["seq_lens"] = v.place(tables["seq_lens"].cpu() + tokens // batch)
    if v.pick(0, 1):
        chunk |= {"k": v.floats(tokens, HEADS, LAYOUT.head_dim), "v": v.floats(tokens, HEADS, LAYOUT.v_head_dim)}
        chunk |= masks(v, tokens) if v.pick(0, 1) else {}
    else:
        chunk["seq_lens"] = tables["seq_lens"]
    if v.pick(0, 1):
        slots = tables["block_table"].numel()
        chunk["scratch"] = v.pool(slots, 2, HEADS, size, LAYOUT.raw_head_dim, dtype=SCRATCH)
    if v.pick(0, 1):
        chunk["out"] = v.floats(tokens, heads, LAYOUT.v_head_dim)
    count, ids = v.pick(1, 2, 7, 16, 65), (torch.int32, torch.int64)
    k, values = v.floats(count * size, HEADS, LAYOUT.head_dim), v.floats(count * size, HEADS, LAYOUT.v_head_dim)
    page_ids = v.ints(count, below=NUM_PAGES, dtype=ids[v.pick(0, 1)])
    starts = {"token_starts": v.ints(count, below=size, dtype=ids[v.pick(0, 1)])} if v.pick(0, 1) else {}
    slots = v.ints(count, below=NUM_RAW * size, dtype=ids[v.pick(0, 1)])
    results = v.floats(count, 64, HEADS, LAYOUT.head_dim, dtype=torch.float32)
    read = {"dtype": torch.float32, "rotated": bool(v.pick(0, 1)), "out": (results, v.place(results.cpu()))}
    state, lse = v.floats(count, heads, 64).contiguous(), torch.zeros(count, heads, device=v.device)
    planned = {name: tables[name] for name in ("seq_lens", "layout", "block_table", "raw_table", "num_quantized", "sink_len")}
    planned |= {"num_q_heads": heads, "num_kv_heads": HEADS, "split_size": split["split_size"]}
    scheduled = bool(v.pick(0, 1))

    def decode() -> None:
        schedule = kvarn.schedule_decode(**planned) if scheduled else None
        kvarn.decode_attention(v.floats(batch, heads, LAYOUT.head_dim), **tables, **out, **split, schedule=schedule)

    return {
        "decode_attention": decode,
        "prefill_attention": lambda: kvarn.prefill_attention(**tables | chunk, **split),
        "commit_pages": lambda: kvarn.commit_pages(**committed, layout=LAYOUT, encoder=QUICK),
        "cut_back": lambda: kvarn.cut_back(**cut, layout=LAYOUT),
        "append_tokens": lambda: kvarn.append_tokens(k[:count], values[:count], tables["raw_pages"], slots),
        "store_pages": lambda: kvarn.store_pages(k, values, tables["pages"], page_ids, LAYOUT, encoder=QUICK, **starts),
        "dequantize_pages": lambda: kvarn.dequantize_pages(tables["pages"], page_ids, LAYOUT, **read),
        "merge_states": lambda: kvarn.merge_states(state, lse, state, lse),
    }


def step_calls(variants: Variants) -> dict[str, Callable[[], object]]:
    """Return calls of a step with drawn sizes and options; `warmup` compiles what they launch."""
    v, batch, size, heads = variants, variants.pick(1, 2, 3, 16, 33), LAYOUT.page_size, HEADS * GROUP
    tables, sink_columns = caches(variants, batch), bool(v.pick(0, 1))
    sink_len = v.pick(0, 1) * size if sink_columns else tables["sink_len"]
    per, tokens = v.pick(1, 2, 3), v.pick(1, 2, 4, 5, 8, 17, 40)
    raw_table = v.ints(batch, -(-sink_len // size) + v.pick(3, 4, 16), below=NUM_RAW)
    lens = v.place(tables["seq_lens"].cpu().clamp(max=tables["block_table"].shape[1] * size) // 2 + 1)
    options = {"sink_len": sink_len, "sink_columns": sink_columns, "pages_per_block": per, "max_drafts": v.pick(0, 1, 16)}
    options["early_pages"] = bool(v.pick(0, 1))
    if v.pick(0, 1):
        options["rows"] = v.ints(batch, below=batch)
    if v.pick(0, 1):
        options["prefix_lens"] = v.ints(batch, below=2)
    ends = None
    if v.pick(0, 1):
        ends = v.place((torch.arange(batch + 1) * tokens).int())
        options |= {"num_tokens": batch * tokens, "max_query_len": tokens}
    count = 1 if ends is None else tokens
    shape = (batch, HEADS, count) if v.pick(0, 1) else (batch * count, HEADS)
    k, values = v.floats(*shape, LAYOUT.head_dim), v.floats(*shape, LAYOUT.v_head_dim)
    q = v.floats(shape[0], heads, *shape[2:], LAYOUT.head_dim)
    block_table = v.ints(batch, tables["block_table"].shape[1], below=NUM_PAGES // 3)
    pools = tables["pages"], tables["raw_pages"]
    given = {"k": k, "v": values} if v.pick(0, 1) else {}
    given |= masks(v, batch * tokens) if given and ends is not None and v.pick(0, 1) else {}
    given |= {"split_size": v.pick(1, 2, 16) if v.pick(0, 1) else None, "return_lse": bool(v.pick(0, 1))}
    read = [v.floats(batch, HEADS, v.pick(1, 5, 16, 70), d, dtype=torch.float32) for d in (LAYOUT.head_dim, LAYOUT.v_head_dim)]
    read[1] = v.place(torch.zeros(*read[0].shape[:3], LAYOUT.v_head_dim))
    starts = {"starts": v.ints(batch, below=3)} if v.pick(0, 1) else {}
    ids = v.place(torch.tensor([-1, 0]).int())
    planned: list[kvarn.Step] = []
    scheduled = ends is None and bool(v.pick(0, 1))

    def plan() -> None:
        planned.append(kvarn.plan_step(LAYOUT, lens, ends, block_table, raw_table, **options))

    def attend() -> None:
        schedule = kvarn.schedule_step(planned[0], heads, HEADS, split_size=given["split_size"]) if scheduled else None
        kvarn.attend(q, *pools, planned[0], **given, schedule=schedule)

    return {
        "plan_step": plan,
        "write_tokens": lambda: kvarn.write_tokens(k, values, *pools, planned[0], encoder=QUICK),
        "attend": attend,
        "read_tokens": lambda: kvarn.read_tokens(*pools, planned[0], *read, **starts),
        "cut_tokens": lambda: kvarn.cut_tokens(*pools, planned[0], v.place(lens.cpu() // 2)),
        "copy_raw_pages": lambda: kvarn.copy_raw_pages(pools[1], ids, ids),
    }


def latent_calls(variants: Variants) -> dict[str, Callable[[], object]]:
    """Return calls over latents; `mla_warmup` compiles what they launch."""
    v, batch, ids = variants, variants.pick(1, 2, 3, 16, 33), (torch.int32, torch.int64)
    columns, sink_pages = v.pick(1, 2, 5, 16, 17), v.pick(0, 1, 2)
    lengths = v.ints(batch, below=columns * 64 + 1)
    pools = v.pool(NUM_PAGES, 1, LATENTS.page_bytes, dtype=torch.uint8)[:, 0], v.pool(NUM_RAW, 64, 576, dtype=torch.float16)
    if v.pick(0, 1):  # of one page, any stride is right
        pools = pools[0], pools[1][:1].as_strided((1, *pools[1].shape[1:]), (1, *pools[1].stride()[1:]))
    tables = {"pages": pools[0], "block_table": v.ints(batch, columns, below=NUM_PAGES), "layout": LATENTS}
    raw = {"raw_pages": pools[1], "raw_table": v.ints(batch, sink_pages + v.pick(1, 2, 15), below=len(pools[1]))}
    raw |= {"num_quantized": v.ints(batch, below=2), "sink_len": 64 * sink_pages}
    n, heads, topk = v.pick(1, 2, 3), HEADS * GROUP, v.pick(1, 2, 16, 33)
    queries = (batch, n) if v.pick(0, 1) else (batch,)
    how = {"sm_scale": v.pick(1, 2) / 16, "return_lse": bool(v.pick(0, 1))} | (raw if v.pick(0, 1) else {})
    how |= {"num_splits": v.pick(1, 3, 9, 40)} if v.pick(0, 1) else {}
    how |= {"out": torch.empty(*queries, heads, 512, dtype=DTYPE, device=v.device)} if v.pick(0, 1) else {}
    count = v.pick(1, 2, 7, 16)
    latents, rope = v.floats(count * 64, 512), v.floats(count * 64, 64)
    page_ids = v.ints(count, below=NUM_PAGES, dtype=ids[v.pick(0, 1)])
    starts = {"token_starts": v.ints(count, below=64, dtype=ids[v.pick(0, 1)])} if v.pick(0, 1) else {}
    slots = v.ints(count, below=len(pools[1]) * 64, dtype=ids[v.pick(0, 1)])
    plan = kvarn.plan_step(LATENTS.keys, lengths, None, tables["block_table"], raw["raw_table"], sink_len=64 * sink_pages)
    results = v.floats(count, 64, 512, dtype=torch.float32), v.floats(count, 64, 64, dtype=torch.float32)
    q, lists = v.floats(*queries, heads, 576), v.ints(*queries, topk, below=columns * 64)
    return {
        "decode": lambda: kvarn.mla_decode_attention(q, seq_lens=lengths, **tables, **how),
        "decode, no warp groups": lambda: kvarn.mla_decode_attention(q, seq_lens=lengths, config=TILES, **tables, **how),
        "lists": lambda: kvarn.mla_decode_attention(q, seq_lens=lengths, indices=lists, **tables, **how),
        "commit": lambda: kvarn.mla_commit_pages(**tables, **raw, committed_lens=lengths, encoder=QUICK),
        "write": lambda: kvarn.mla_write_tokens(
            v.floats(batch, 512), v.floats(batch, 64), *pools, plan, LATENTS, encoder=QUICK
        ),
        "append": lambda: kvarn.mla_append_tokens(latents[:count], rope[:count], pools[1], slots),
        "store": lambda: kvarn.mla_store_pages(latents, rope, pools[0], page_ids, LATENTS, encoder=QUICK, **starts),
        "dequantize": lambda: kvarn.mla_dequantize_pages(
            pools[0], page_ids, LATENTS, rotated=bool(v.pick(0, 1)), out=results, dtype=torch.float32
        ),
    }


def other_calls(variants: Variants) -> dict[str, Callable[[], object]]:
    """Return calls of what `warmup` leaves out: the first call of each compiles what all others use."""
    v, count = variants, variants.pick(1, 2, 3, 16, 33)

    def flat(x: torch.Tensor) -> torch.Tensor:
        """Return contiguous values of `x` at some address."""
        first = v.pick(0, 0, 1, 4)
        memory = torch.zeros(x.numel() + first, dtype=x.dtype, device=v.device)
        return memory[first:].view(x.shape).copy_(x)

    tile, codes = flat(torch.ones(count, 64, 64)), flat(torch.zeros(count, 64, 64, dtype=torch.uint8))
    scale, packed = flat(torch.ones(count, 64)), flat(torch.zeros(count, 2048, dtype=torch.uint8))
    rows = v.floats(count, 64)
    return {
        "hadamard": lambda: kvarn.hadamard(rows, out=flat(torch.zeros(count, 64, dtype=DTYPE))),
        "variance_normalize": lambda: kvarn.variance_normalize(tile, per="token", encoder=QUICK),
        "quantize": lambda: kvarn.quantize(tile, 4, per="token", encoder=QUICK),
        "dequantize": lambda: kvarn.dequantize(codes, scale, scale, per="token"),
        "pack": lambda: kvarn.pack(codes, 4, per="token"),
        "unpack": lambda: kvarn.unpack(packed, 4, 64, 64, per="token"),
    }


def run(seeds: int, device: torch.device, guard: Callable) -> None:
    """Warm up, call everything else once, then call all variants inside `guard`."""
    kvarn.warmup(LAYOUT, HEADS * GROUP, HEADS, device, **WARMUP)
    kvarn.warmup(LAYOUT, HEADS * GROUP, HEADS, device, **WARMUP | {"sink_columns": False})
    kvarn.mla_warmup(
        LATENTS, HEADS * GROUP, device, dtype=DTYPE, encoder=QUICK, max_queries=3, indices=True, dequantize=torch.float32,
        steps=True,
    )  # fmt: skip
    kvarn.mla_warmup(LATENTS, HEADS * GROUP, device, dtype=DTYPE, encoder=QUICK, config=TILES)
    for call in other_calls(Variants(0, device)).values():
        call()
    with guard():
        for seed in range(seeds):
            for calls in (warmed_calls, step_calls, latent_calls, other_calls):
                for call in calls(Variants(seed, device)).values():
                    call()
