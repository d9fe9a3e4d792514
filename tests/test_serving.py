"""Steps of an engine through `plan_step`, `write_tokens`, `attend` and `read_tokens`, against an oracle that keeps every
token."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from engine import ENCODER, Engine
from engine_scheduler import Case
from helpers import ON_GPU, SLOW, bits_of

import kvarn_triton
from kvarn_triton import PageLayout, reference
from kvarn_triton.step import slots_for

SMALL = PageLayout(64, 64, 4, 2)
CASES = {
    "prefix-cache": Case(SMALL, sink_len=64, sink_columns=True),
    "prefix-cache-drafts": Case(SMALL, sink_len=128, sink_columns=True, max_drafts=5, num_tail_slots=2),
    "blocks-of-2": Case(SMALL, sink_len=64, sink_columns=True, pages_per_block=2, max_blocks=4, num_blocks=10, num_kv_heads=2),
    "csr": Case(SMALL, sink_len=64, sink_columns=True, csr=True, num_tail_slots=3),
    "csr-body": Case(SMALL, sink_len=16, csr=True),
    "no-sink": Case(SMALL, max_drafts=3, num_tail_slots=2, dtype=torch.bfloat16, raw_dtype=torch.float32),
    "short-sink": Case(PageLayout(64, 64, 3, 2), sink_len=100, raw_dtype=torch.bfloat16 if ON_GPU else torch.float16),
    "early-pages": Case(SMALL, sink_len=64, sink_columns=True, max_drafts=5, early_pages=True, num_tail_slots=2),
    "early-long": Case(SMALL, sink_len=16, max_drafts=60, early_pages=True, num_tail_slots=2),
    "early-blocks": Case(
        SMALL,
        sink_len=64,
        sink_columns=True,
        pages_per_block=2,
        max_blocks=4,
        num_blocks=10,
        max_drafts=70,
        early_pages=True,
        num_tail_slots=3,
        raw_dtype=torch.float32,
    ),
    "long-drafts": Case(SMALL, sink_len=16, max_drafts=40, num_tail_slots=3),
}


def run(api, name: str, device: torch.device, seeds: range, steps: int) -> Engine:
    """Drive an engine; return the last one."""
    for seed in seeds:
        engine = Engine(api, CASES[name], device, seed)
        for _ in range(steps):
            engine.step()
    return engine


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    """Steps of the reference."""
    run(reference, name, torch.device("cpu"), range(4), 12)


@pytest.mark.parametrize("name", CASES)
def test_kernels(name, device):
    """Steps of the kernels."""
    run(kvarn_triton, name, device, range(40 if ON_GPU else 1), 14 if ON_GPU else 5)


def test_everything_happens():
    """Runs have prefix hits, of blocks of the same step too, rejected drafts, and requests that are preempted."""
    engines = []
    for seed in range(8):
        engines.append(Engine(reference, CASES["prefix-cache-drafts"], torch.device("cpu"), seed))
        for _ in range(14):
            engines[-1].step()
    for name in ("hits", "same_step_hits", "rejected", "preempted"):
        assert sum(getattr(engine, name) for engine in engines) >= 3, name


def random_plan(random: Random, device: torch.device) -> tuple[tuple, dict]:
    """Return arguments of plan_step, among them lengths and ids that nobody means to give."""
    batch, size, requests = random.randint(0, 5), SMALL.page_size, 6

    def ints(*shape: int, least: int, most: int) -> torch.Tensor:
        numbers = [random.randint(least, most) for _ in range(torch.Size(shape).numel())]
        return torch.tensor(numbers, dtype=torch.int32, device=device).view(shape)

    sink_columns = random.random() < 0.5
    sink_len = random.choice((0, 64, 128)) if sink_columns else random.choice((0, 16, 64, 100))
    drafts = random.choice((0, 0, 1, 5, 70))
    options = {"sink_columns": sink_columns, "sink_len": sink_len, "max_drafts": drafts}
    early = options["early_pages"] = random.random() < 0.5
    slots = slots_for((2 - early) * drafts, size) + random.randint(0, 2)
    raw_table = ints(requests, -(-sink_len // size) + slots, least=-1, most=40)
    count = requests
    if random.random() < 0.6:
        options["rows"] = ints(batch, least=-1, most=requests - 1)
    else:
        count, raw_table = batch, raw_table[:batch]
    if random.random() < 0.5:
        options["prefix_lens"] = ints(count, least=-5, most=300)
    ends = None
    if random.random() < 0.7:
        counts = [random.choice((0, 1, 1, 2, 5, 64, 130, 300)) for _ in range(batch)]
        ends = torch.tensor([0, *counts]).cumsum(0).int().to(device) + random.randint(0, 3)
        options |= {"num_tokens": int(ends[-1]) + random.randint(0, 140), "max_query_len": max([1, *counts])}
    lens = ints(batch, least=random.choice((-3, 1)), most=random.choice((3, 130, 700)))
    if random.random() < 0.3:
        ids = ints(9 * batch, least=-1, most=60)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * random.randint(0, 9)
        return (SMALL, lens, ends, None, raw_table), options | {"kv_indptr": starts, "kv_indices": ids}
    options["pages_per_block"] = random.choice((1, 1, 2, 3))
    return (SMALL, lens, ends, ints(count, random.randint(1, 9), least=-1, most=60), raw_table), options


def compare_plans(arguments: tuple, options: dict, name: object) -> None:
    """Compare the plan of the kernel with that of the reference, number by number."""
    plan, expected = (api.plan_step(*arguments, **options) for api in (kvarn_triton, reference))
    for field in dataclasses.fields(plan):
        got, want = getattr(plan, field.name), getattr(expected, field.name)
        if field.name == "tasks":  # what is said of no page means nothing
            got, want = (torch.where(x[:1] >= 0, x, -1) if x.shape[1] else x for x in (got, want))
        same = torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want
        assert same, (name, field.name, got, want)
    again = kvarn_triton.plan_step(*arguments, **options, out=plan)
    assert again is plan and torch.equal(plan.slots, expected.slots)


def test_plans(device):
    """Plans of the kernel are those of the reference, whatever lengths and ids there are."""
    for seed in range(1500 if ON_GPU else 120):
        compare_plans(*random_plan(Random(seed), device), seed)


@pytest.mark.parametrize("one_each", [False, True])
def test_large_plans(one_each, device):
    """More sequences, pages of a chunk, columns and raw columns than a kernel looks at together: three times as many."""
    batch, ints = 300, {"dtype": torch.int32, "device": device}
    generator = torch.Generator().manual_seed(0)
    lens = torch.randint(1, 700, (batch,), generator=generator)
    counts = torch.minimum(lens, torch.randint(0, 70, (batch,), generator=generator))
    lens[[7, 290]], counts[[7, 290]] = 140 * 64 + 5, 138 * 64  # more than 128 pages each
    block_table = torch.randint(0, 9999, (batch, 1100), generator=generator)
    raw_table = torch.randint(0, 9999, (batch, 2 + 300), generator=generator)
    raw_table[::3, 0] = -1
    tables = block_table.to(**ints), raw_table.to(**ints)
    options = {"sink_len": 128, "sink_columns": True, "rows": torch.randperm(batch, generator=generator).to(**ints)}
    ends = None
    if not one_each:
        ends = torch.cat((torch.zeros(1), counts.cumsum(0))).to(**ints)
        options |= {"num_tokens": int(ends[-1]) + 9, "max_drafts": 3}
    compare_plans((SMALL, lens.to(**ints), ends, *tables), options, one_each)


@pytest.mark.parametrize(("count", "at_once"), [(65, True), (66, False)])
def test_tails_that_are_written_over(count, at_once, device):
    """A page takes its older tokens from a slot that tokens of the same step go to: two launches, if there are so many."""
    ints = {"dtype": torch.int32, "device": device}
    tables = torch.arange(4, **ints)[None], torch.arange(2, **ints)[None]
    lens, ends = torch.tensor([63 + count], **ints), torch.tensor([0, count], **ints)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(count, 1, 64, generator=generator).half().to(device) for _ in range(2))
    raw = torch.randn(2, 2, 1, 64, 64, generator=generator).half().to(device)
    results = []
    for api in (kvarn_triton, reference):
        step = api.plan_step(SMALL, lens, ends, *tables, num_tokens=count, max_drafts=5, early_pages=True)
        pages, raw_pages = torch.zeros(SMALL.pages_shape(4, 1), dtype=torch.uint8, device=device), raw.clone()
        api.write_tokens(k, v, pages, raw_pages, step, encoder=ENCODER)
        results.append((pages, raw_pages))
    assert step.at_once == at_once
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(bits_of(got), bits_of(wanted))


@pytest.mark.parametrize("layout", [SMALL, PageLayout(80, 64, 3, 4, v_head_dim=64), PageLayout(64, 64, 6, 5)], ids=str)
def test_four_dimensions(layout, device):
    """Activations [batch, heads, n, channels] of any strides are written and attended to as [tokens, heads, channels] are."""
    batch, heads, n, ints = 3, 2, 70, {"dtype": torch.int32, "device": device}
    lens = torch.tensor([70, 130, 200], **ints)
    ends = torch.arange(batch + 1, **ints) * n
    tables = torch.arange(12, **ints).view(batch, 4), torch.arange(6, **ints).view(batch, 2)
    step = kvarn_triton.plan_step(layout, lens, ends, *tables, num_tokens=batch * n, max_query_len=n, sink_len=16)
    generator = torch.Generator().manual_seed(0)
    head_dims = layout.head_dim, layout.v_head_dim
    k, v = (torch.randn(batch, heads, n, d, generator=generator).half().to(device) for d in head_dims)
    q = torch.randn(batch, 2 * heads, n, layout.head_dim, generator=generator).half().to(device)
    results = []
    forms = (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.transpose(1, 2).flatten(0, 1))
    for form in forms:
        pages = torch.zeros(layout.pages_shape(12, heads), dtype=torch.uint8, device=device)
        raw_pages = torch.zeros(6, 2, heads, 64, layout.raw_head_dim, dtype=torch.float16, device=device)
        kvarn_triton.write_tokens(form(k), form(v), pages, raw_pages, step, encoder=ENCODER)
        out = kvarn_triton.attend(form(q), pages, raw_pages, step, k=form(k), v=form(v))
        results.append((pages, raw_pages, out))
    assert (results[0][0] != 0).any() and (results[0][1] != 0).any()
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(bits_of(one), bits_of(two))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_copies_of_raw_pages(dtype, device):
    """Pages are copied bit by bit, all channels of keys and values; ids below 0 copy nothing."""
    raw_pages = torch.randn(7, 2, 3, 64, 80).to(dtype).to(device)
    expected = raw_pages.clone()
    sources, targets = torch.tensor([0, 2, -1, 6, 3]), torch.tensor([1, 4, 5, -1, 3])
    expected[[1, 4]] = raw_pages[[0, 2]]
    kvarn_triton.copy_raw_pages(raw_pages, sources.int().to(device), targets.int().to(device))
    assert torch.equal(raw_pages, expected)


@pytest.mark.parametrize("options", [{}, *(pytest.param(x, marks=SLOW) for x in ({"window": 90}, {"split_size": 1}))], ids=str)
def test_sinks_of_sequences(options, device):
    """Sequences with and without a raw sink in one batch, each by its own tables: decodes, chunks, reads, cuts."""
    heads, ints = 2, {"dtype": torch.int32, "device": device}
    lens = torch.tensor([140, 150, 130, 75], **ints)
    block_table = torch.randperm(20, generator=torch.Generator().manual_seed(1)).int().view(4, 5).to(device)
    raw_table = torch.tensor([[-1, 0, 1], [2, 3, 4], [-1, 5, 6], [7, 8, 9]], **ints)
    generator = torch.Generator().manual_seed(0)
    pages = torch.zeros(SMALL.pages_shape(20, heads), dtype=torch.uint8, device=device)
    filled = (torch.randn(20 * 64, heads, 64, generator=generator).to(device) for _ in range(2))
    kvarn_triton.store_pages(*filled, pages, torch.arange(20, **ints), SMALL, encoder=ENCODER)
    raw_pages = torch.randn(10, 2, heads, 64, 64, generator=generator).half().to(device)
    for count in (1, 6):
        q, k, v = (torch.randn(4 * count, n, 64, generator=generator).half().to(device) for n in (4, heads, heads))
        ends = None if count == 1 else torch.arange(5, **ints) * count
        sizes = {} if count == 1 else {"num_tokens": 4 * count, "max_query_len": count}
        given = {} if count == 1 else {"k": k, "v": v}
        results = []
        for api in (kvarn_triton, reference):
            step = api.plan_step(SMALL, lens, ends, block_table, raw_table, sink_len=64, sink_columns=True, **sizes)
            pools = pages.clone(), raw_pages.clone()
            out = api.attend(q, *pools, step, **given, **options)
            read = [torch.zeros(4, heads, 150, 64, device=device) for _ in range(2)]
            api.read_tokens(*pools, step, *read)
            api.cut_tokens(*pools, step, lens // 2)
            results.append((out.float(), *read, pools[1].float()))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)
