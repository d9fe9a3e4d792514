"""Ranks of a group, one process each: `python parallel_worker.py BACKEND SIZE FILE`, run by `test_parallel.py`.

`python parallel_worker.py` compiles what a rank launches, for a GPU that is not there.
"""

from __future__ import annotations

import itertools
import sys
from unittest import mock

import pytest
import torch
import triton
from helpers import assert_same_bits
from parallel_cases import LAYOUT, SINK_LEN, case_of
from torch import distributed, multiprocessing

import kvarn_triton
from kvarn_triton import PrefillConfig, gpu, parallel, reference
from kvarn_triton.attention.exchange import launch_exchange, plan_exchange
from kvarn_triton.parallel import Exchange, Shard, local_lens, local_pages, local_step, own_pages
from kvarn_triton.testing import cache_case, relative_error
from kvarn_triton.testing.compiler import compile_for, resources


def check_attention(shard: Shard, device: torch.device, exchange: Exchange | None = None) -> None:
    """Compare steps on all ranks with one rank that has everything; all ranks have the same bits."""
    sinks = torch.linspace(-2, 4, 4, device=device)
    for kind, options in (("decode", {"soft_cap": 3.0, "sinks": sinks}), ("chunk", {}), ("columns", {"sinks": sinks})):
        case = case_of(kind, device)
        pages, raw_pages, step = case.whole()
        new = {name: x.double() for name, x in case.new.items()}
        exact, exact_lse = reference.attend(case.q.double(), pages, raw_pages, step, return_lse=True, **new, **options)
        pages, raw_pages, local = case.part(shard)
        out, lse = parallel.attend(case.q, pages, raw_pages, local, exchange=exchange, return_lse=True, **case.new, **options)
        assert relative_error(out, exact) < 2e-3, kind
        torch.testing.assert_close(lse, exact_lse, rtol=0, atol=5e-3)
        first = out.clone()
        distributed.broadcast(first, 0)
        assert_same_bits(out, first)


def check_merging(shard: Shard, device: torch.device, exchange: Exchange | None = None) -> None:
    """Merge given results: of a rank with nothing, of rows that no rank has anything of, of no row."""
    random = torch.Generator().manual_seed(0)
    outs = torch.randn(shard.size, 5, 3, 80, generator=random).half().to(device)
    lses = torch.randn(shard.size, 5, 3, generator=random).to(device)
    lses[0], lses[:, 2] = -torch.inf, -torch.inf
    outs[0] = torch.nan
    out, lse = parallel.merge_ranks(outs[shard.rank], lses[shard.rank], exchange=exchange)
    expected, expected_lse = kvarn_triton.merge_states(outs, lses)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    assert (out[2] == 0).all()
    assert parallel.merge_ranks(outs[0][:0], lses[0][:0], exchange=exchange)[0].shape == (0, 3, 80)
    case = case_of("decode", device)
    pages, raw_pages, step = case.whole()
    with pytest.raises(ValueError, match=f"group: expected rank 0 of 9, got 'rank {shard.rank} of {shard.size}'"):
        parallel.attend(case.q, pages, raw_pages, local_step(step, Shard(0, 9)))


def check_tables(shard: Shard, device: torch.device) -> None:
    """Attend without a step where everything is quantized, the last page in part."""
    case = cache_case(LAYOUT, [5 * 64, 64, 7 * 64], num_tail_slots=1, dtype=torch.float32, device=device)
    case.seq_lens -= 22
    tables = {"pages": case.pages, "layout": LAYOUT, "return_lse": True}
    whole = kvarn_triton.decode_attention(case.q, block_table=case.block_table, seq_lens=case.seq_lens, **tables)
    table, lens = local_pages(case.block_table, shard), local_lens(case.seq_lens, LAYOUT.page_size, shard)
    part = kvarn_triton.decode_attention(case.q, block_table=table, seq_lens=lens, **tables)
    for found, expected in zip(parallel.merge_ranks(*part), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def check_graph(shard: Shard, device: torch.device, exchange: Exchange | None = None) -> None:
    """A captured step, exchange included, follows lengths that change between replays."""
    case = case_of("decode", device)
    lens = case.plan["seq_lens"]
    pages, raw_pages, _ = case.part(shard)
    whole_pages, whole_raw, _ = case.whole()

    def run() -> torch.Tensor:
        step = kvarn_triton.plan_step(**case.plan | {"block_table": own_pages(case.plan["block_table"], shard)})
        return parallel.attend(case.q, pages, raw_pages, local_step(step, shard), exchange=exchange)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()
    full = lens.clone()
    tails = (full - SINK_LEN) % LAYOUT.page_size
    for missing in (0, 2):  # as many pages, fewer tokens in the tail
        lens.copy_(torch.where(tails >= missing, full - missing, full))
        graph.replay()
        step = kvarn_triton.plan_step(**case.plan)
        exact = kvarn_triton.attend(case.q, whole_pages, whole_raw, step)
        assert relative_error(out, exact) < 2e-3


def check_exchange(shard: Shard, device: torch.device) -> None:
    """Exchange without a collective: what was checked with one, calls that are too large for it, and many in a row."""
    sizes = {"num_q_heads": 4, "max_tokens": 16, "device": device}
    made = {head_dim: Exchange(v_head_dim=head_dim, dtype=torch.float16, **sizes) for head_dim in (64, 80)}
    gather = mock.patch.object(parallel, "_exchanged", side_effect=parallel._exchanged)
    with gather as gathered:
        check_merging(shard, device, made[80])
        check_attention(shard, device, made[64])  # its chunks have more rows
        large = gathered.call_count
        assert large > 0
        check_graph(shard, device, made[64])
        assert gathered.call_count == large
    random = torch.Generator(device).manual_seed(0)
    counts = torch.randint(1, made[80].max_rows + 1, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for count in counts:  # ranks run ahead of each other, as far as they can
        outs = torch.randn(shard.size, count, 80, generator=random, device=device).half()
        lses = torch.randn(shard.size, count, generator=random, device=device)
        with kvarn_triton.no_compilation():
            found = made[80].merge(outs[shard.rank], lses[shard.rank])
        for x, expected in zip(found, kvarn_triton.merge_states(outs, lses), strict=True):
            wrong += (x != expected).sum()
    assert wrong == 0
    part = torch.zeros(3, 80, device=device)
    with pytest.raises(ValueError, match="out: expected dtype float16, got float32"):
        parallel.merge_ranks(part, part[:, 0].contiguous(), exchange=made[80])
    case = case_of("decode", device)
    pages, raw_pages, local = case.part(shard)
    with pytest.raises(ValueError, match="exchange: expected results of 64 channels"):
        parallel.attend(case.q, pages, raw_pages, local, exchange=made[80])
    with pytest.raises(ValueError, match="group: expected None, or the group of exchange, got 'another'"):
        parallel.attend(case.q, pages, raw_pages, local, exchange=made[64], group=distributed.group.WORLD)


def check_warmup() -> None:
    """After a warm-up with the options that `docs/parallel.md` names, no rank compiles anything."""
    device, kinds = torch.device("cpu"), {"steps": True, "sink_columns": True, "prefill": True, "past_only": True}
    config = PrefillConfig(64, 4, 32, 32)
    with compile_for("sm90"):
        kvarn_triton.warmup(LAYOUT, 4, 2, device, dtype=torch.float16, config=config, **kinds)
        with kvarn_triton.no_compilation():
            for rank, count in itertools.product(range(2), (1, 9)):
                ends = None if count == 1 else torch.tensor([0, 9], dtype=torch.int32)
                lens, table = torch.tensor([300], dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32)
                # The plan's own kernel would give no plan here.
                tables = {"block_table": table, "raw_table": table[:, :2], "num_tokens": None if ends is None else count}
                step = reference.plan_step(LAYOUT, lens, ends, **tables, sink_len=SINK_LEN)
                raw_pages, new = torch.zeros(2, 2, 2, 64, 64).half(), torch.zeros(count, 2, 64).half()
                pages = torch.zeros(LAYOUT.pages_shape(1, 2), dtype=torch.uint8)
                options = {} if ends is None else {"config": config}
                with mock.patch.object(parallel, "_ranks", lambda group, rank=rank: (rank, 2)):
                    q, local = new.repeat(1, 2, 1), local_step(step, Shard(rank, 2))
                    parallel.attend(q, pages, raw_pages, local, k=new, v=new, **options)


def check_compiled() -> None:
    """The kernel of an exchange on NVIDIA's GPUs: writes of 16 bytes, and words that all GPUs see behind what they announce."""
    for target, size in (("sm80", 2), ("sm90", 2), ("sm90", 8), ("sm100", 8), ("sm120", 3)):
        plan, part = plan_exchange(1, size, 512, 128, torch.bfloat16), torch.zeros(10, 128, dtype=torch.bfloat16)
        words, memory = torch.zeros(size, dtype=torch.int64), torch.zeros(plan.num_bytes, dtype=torch.uint8)
        with compile_for(target) as kernels:
            launch_exchange((part, part[:, 0].float()), memory, words, words.int(), plan)
        text, found = kernels[0].kernel.asm["ptx"], resources(kernels[0])
        assert found.stack == 0 and found.registers <= 128, found
        assert text.count("st.global.v4") >= 2 * size and "st.global.b16" not in text
        assert text.count("atom.global.sys.release.exch") == text.count("atom.global.sys.acquire.add") == 1
        # All threads have written before one of them tells the others.
        writes, told = text.rindex("st.global", 0, text.index("sys.release")), text.index("sys.release")
        assert "bar.sync" in text[writes:told]


def run_rank(rank: int, size: int, backend: str, path: str) -> None:
    """Join the group and check everything."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(device)
    assert gpu.on_device(torch.zeros(1, device=device)) == (backend == "nccl")
    options = {"device_id": device} if backend == "nccl" else {}
    distributed.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=size, **options)
    try:
        shard = Shard(rank, size)
        check_merging(shard, device)
        check_tables(shard, device)
        check_attention(shard, device)
        if backend == "nccl":
            check_graph(shard, device)
            check_exchange(shard, device)
    finally:
        distributed.destroy_process_group()


if __name__ == "__main__":
    if not sys.argv[1:]:
        # Kernels are known by what Triton would compile, which other tests compile.
        compiler = mock.patch.object(triton.compiler, "compile", lambda *args, **kwargs: object())
        with compiler, mock.patch.object(distributed, "all_gather_single", lambda *args, **kwargs: None, create=True):
            check_warmup()
        check_compiled()
        sys.exit()
    backend, size, path = sys.argv[1:]
    multiprocessing.spawn(run_rank, (int(size), backend, path), nprocs=int(size))
