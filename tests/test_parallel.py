"""Caches spread over ranks: each part alone, all of them merged, and processes that exchange them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import SLOW, assert_same_bits
from parallel_cases import LAYOUT, case_of

import kvarn_triton
from kvarn_triton import merge_states, parallel, reference
from kvarn_triton.parallel import LocalStep, Shard, local_lens, local_pages, own_pages
from kvarn_triton.testing import relative_error

KINDS = ("decode", "long tail", "chunk", "columns")
SHARDS = ((1, 1), (2, 1), (3, 1), (3, 2), (2, 6), (9, 1), (16, 1))
"""Ranks, and pages of a run; of 16 ranks some have nothing of the longest sequence."""


def columns_of(shard: Shard, columns: int) -> list[int]:
    """Return the columns of a rank, one at a time."""
    return [i for i in range(columns) if i // shard.pages_per_run % shard.size == shard.rank]


def shards_of(size: int, run: int) -> list[Shard]:
    """Return all ranks of a group."""
    return [Shard(rank, size, run) for rank in range(size)]


@pytest.mark.parametrize(("size", "run"), SHARDS)
@pytest.mark.parametrize("skipped", [0, 1, 5])
def test_local_tables(size, run, skipped):
    """Tables and lengths of a rank, counted column by column and token by token."""
    table = torch.arange(22, dtype=torch.int32).view(2, 11) + 100
    lens = torch.tensor([10 * 64 + 7, 64], dtype=torch.int32)
    skip = torch.tensor([skipped, 0], dtype=torch.int32)
    given = skip if skipped else None
    for shard in shards_of(size, run):
        own = own_pages(table, shard)
        assert [(row >= 0).nonzero()[:, 0].tolist() for row in own] == [columns_of(shard, 11)] * 2
        found, counts = local_pages(table, shard, given), local_lens(lens, 64, shard, given)
        assert found.shape == local_pages(table, Shard(0, size, run)).shape
        for row, ids in enumerate(table.tolist()):
            mine = [i - int(skip[row]) for i in columns_of(shard, 11 + int(skip[row])) if i >= int(skip[row])]
            used = [i for i in mine if i * 64 < lens[row]]
            assert found[row, : len(used)].tolist() == [ids[i] for i in used]
            assert counts[row] == sum(min(64, int(lens[row]) - 64 * i) for i in used)


def attended(case, size: int, run: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what all ranks compute, merged; as `parallel.attend` does it, but in one process."""
    states = []
    for shard in shards_of(size, run):
        pages, raw_pages, (step, _) = case.part(shard)
        seen = dict(options) if shard.rank == 0 else options | {"sinks": None}
        if case.new:
            seen |= case.new if shard.rank == 0 else {"past_only": True, "tree_mask": None, "span_ends": None}
        states.append(kvarn_triton.attend(case.q, pages, raw_pages, step, return_lse=True, **seen))
    outs, lses = (torch.stack(parts) for parts in zip(*states, strict=True))
    return merge_states(outs, lses)


def exact_of(case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention of a rank that has everything, in float64."""
    pages, raw_pages, step = case.whole()
    new = {name: x.double() for name, x in case.new.items()}
    return reference.attend(case.q.double(), pages, raw_pages, step, return_lse=True, **new, **options)


def check(kind: str, device: torch.device, size: int, run: int, **options) -> None:
    """Compare what ranks compute with float64 on one that has everything."""
    case = case_of(kind, device, torch.float32)
    out, lse = attended(case, size, run, **options)
    exact, exact_lse = exact_of(case, **options)
    assert relative_error(out, exact) < 2e-6
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "run"), SHARDS)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_see_what_one_sees(kind, size, run, device, without_kernels):
    """Every token is attended to once, whatever the number of ranks; nothing of another rank is read."""
    check(kind, device, size, run)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[SLOW] if kind in ("long tail", "chunk") else []) for kind in KINDS])
def test_kernels(kind, device):
    """The same of kernels on a CPU, for a few ranks."""
    check(kind, device, 3, 1)


@pytest.mark.parametrize("kind", ["decode", "chunk"])
def test_options_of_attention(kind, device, without_kernels):
    """A soft cap and attention sinks, which count once."""
    check(kind, device, 3, 1, soft_cap=3.0, sinks=torch.linspace(-2, 4, 4, device=device), sm_scale=0.3)


def test_masks(device, without_kernels):
    """Trees and spans of new tokens, which one rank attends to."""
    count = len(case_of("chunk", device, torch.float32).q)
    words = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0)).to(device)
    ends = (torch.arange(count, dtype=torch.int32, device=device) // 4 + 1) * 4
    check("chunk", device, 3, 1, tree_mask=words, span_ends=ends)


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_refuse_alike(rank, device, monkeypatch, without_kernels):
    """What one rank alone is given is checked on all: none waits for one that was refused."""
    monkeypatch.setattr(parallel, "_ranks", lambda group: (rank, 2))
    monkeypatch.setattr(parallel, "_exchanged", lambda parts, rank, group: (parts.outs[rank], parts.lses[rank]))
    shard = Shard(rank, 2)
    chunk, decode = case_of("chunk", device), case_of("decode", device)
    words = torch.zeros(len(chunk.q), dtype=torch.int64, device=device)
    wrong = (
        (chunk, {"k": chunk.new["k"][1:]}, "k: expected"),
        (chunk, {"sinks": torch.zeros(3, device=device)}, "sinks: expected"),
        (chunk, {"tree_mask": words.int()}, "tree_mask: expected"),
        (chunk, {"span_ends": words}, "span_ends: expected"),
        (decode, {"tree_mask": words[: len(decode.q)]}, "tree_mask: expected None"),
    )
    for case, options, message in wrong:
        pages, raw_pages, local = case.part(shard)
        with pytest.raises(ValueError, match=message):
            parallel.attend(case.q, pages, raw_pages, local, **case.new | options)
    pages, raw_pages, local = chunk.part(shard)
    parallel.attend(chunk.q, pages, raw_pages, local, **chunk.new, tree_mask=words)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding(dtype, device, without_kernels):
    """Parts in 16 bits cost no more than another rounding: their weights add up to one."""
    case = case_of("decode", device, dtype)
    pages, raw_pages, step = case.whole()
    exact, _ = exact_of(case)
    one = relative_error(kvarn_triton.attend(case.q, pages, raw_pages, step), exact)
    for size in (2, 9):
        assert relative_error(attended(case, size, 1)[0], exact) < one + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("kind", ["chunk", "columns"])
def test_ranks_write_their_own(kind, device, without_kernels):
    """A step's pages are written by their owners, with the bits of one rank; raw pages are the same everywhere."""
    case = case_of(kind, device)
    pages, raw_pages, _ = case.whole()
    table = case.plan["block_table"]
    for shard in shards_of(3, 1):
        own_pages_, own_raw, _ = case.part(shard)
        own = table[:, columns_of(shard, table.shape[1])].flatten().long()
        assert_same_bits(own_pages_[own], pages[own])
        others = torch.ones(len(pages), dtype=torch.bool, device=device)
        others[own] = False
        assert (own_pages_[others] == 255).all()
        assert_same_bits(own_raw, raw_pages)


@pytest.mark.parametrize("kind", ["decode", pytest.param("chunk", marks=SLOW)])
def test_heads_of_a_rank(kind, device):
    """Tensor parallelism: heads of pages and of raw pages, in place or copied, give the bits of those heads."""
    case = case_of(kind, device)
    pages, raw_pages, step = case.whole()
    out = kvarn_triton.attend(case.q, pages, raw_pages, step, **case.new, split_size=2)
    for head in range(2):
        own, q_own = slice(head, head + 1), slice(2 * head, 2 * head + 2)
        new = {name: x[:, own].contiguous() for name, x in case.new.items()}
        for pools in ((pages[:, own], raw_pages[:, :, own]), (pages[:, own].clone(), raw_pages[:, :, own].clone())):
            part = kvarn_triton.attend(case.q[:, q_own].contiguous(), *pools, step, **new, split_size=2)
            assert_same_bits(part, out[:, q_own].contiguous())
        if new:  # a rank that only has these heads writes the bytes that all have
            written = case.pages[:, own].clone(), case.raw_pages[:, :, own].clone()
            kvarn_triton.write_tokens(**new, pages=written[0], raw_pages=written[1], step=step)
            assert_same_bits(written[0], pages[:, own].clone())


def run_worker(*arguments: object) -> None:
    """Run `parallel_worker.py`, which starts a process for each rank."""
    worker = Path(__file__).with_name("parallel_worker.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(worker.parent.parent), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, str(worker), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("size", [2, 3])
def test_processes(size, tmp_path):
    """Processes on a CPU that exchange their parts through gloo; the reference computes."""
    run_worker("gloo", size, tmp_path / "store")


@pytest.mark.slow("the compiler")
def test_warm_ranks():
    """A warm-up compiles all that ranks launch."""
    run_worker()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gpus(tmp_path):
    """The same on two GPUs through NCCL, and a captured step whose replays follow lengths."""
    run_worker("nccl", 2, tmp_path / "store")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "size: expected an integer of at least 1, got 0"),
        ((-1, 2), "rank: expected an integer of at least 0, got -1"),
        ((2, 2), "rank: expected a number below 2, the size, got 2"),
        ((0, 2, 0), "pages_per_run: expected an integer of at least 1, got 0"),
        ((0, 2, True), "pages_per_run: expected an integer of at least 1, got True"),
    ],
)
def test_wrong_shards(arguments, message):
    """Ranks that are none."""
    with pytest.raises(ValueError, match=message):
        Shard(*arguments)


def test_refusals(device):
    """What the pages of a rank can't answer is refused by name, before anything is exchanged."""
    case, shard = case_of("chunk", device), Shard(0, 1)
    pages, raw_pages, local = case.part(shard)
    call = {"q": case.q, "pages": pages, "raw_pages": raw_pages, "local": local, **case.new}
    for wrong, message in (
        ({"window": 64}, "window: expected None: the pages of a rank are not next to each other"),
        ({"keep_sink": True}, "keep_sink: expected None"),
        ({"out": case.q}, "out: expected None, got 'a tensor'"),
        ({"past_only": True}, "past_only: expected None, got True"),
        ({"k": None}, "k: expected a tensor, and v beside it, with cu_seqlens_q, got None"),
        ({"local": local.step}, "local: expected a LocalStep, got 'Step'"),
    ):
        with pytest.raises(ValueError, match=message):
            parallel.attend(**call | wrong)
    assert parallel.attend(**call).shape == case.q.shape
    table = case.plan["block_table"]
    with pytest.raises(ValueError, match="pages_per_block: expected a divisor of pages_per_run, 3, got 2"):
        own_pages(table, Shard(0, 2, 3), pages_per_block=2)
    with pytest.raises(ValueError, match="block_table: expected dtype int32, got int64"):
        local_pages(table.long(), shard)
    with pytest.raises(ValueError, match="lens: expected dtype int32, got int64"):
        local_lens(case.plan["seq_lens"].long(), 64, shard)
    csr = {"block_table": None, "kv_indptr": torch.arange(8, dtype=torch.int32, device=device), "kv_indices": table.flatten()}
    with pytest.raises(ValueError, match="step: expected one with a block_table, got kv_indices"):
        parallel.local_step(kvarn_triton.plan_step(**case.plan | csr), shard)
    assert isinstance(local, LocalStep) and local.step.layout == LAYOUT


def test_blocks_have_one_owner():
    """With blocks of several pages, a block belongs to the owner of its pages."""
    blocks = torch.arange(6, dtype=torch.int32)[None]
    assert own_pages(blocks, Shard(1, 2, 4), pages_per_block=2).tolist() == [[-1, -1, 2, 3, -1, -1]]
