"""The tail of latents, steps of a server, captured graphs and operators."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import ON_GPU, assert_same_bits, draw
from mla_helpers import LAYOUTS, lists_of, moved, tokens_of

import kvarn_triton as kvarn
from kvarn_triton import MLAConfig, MLALayout, reference
from kvarn_triton.testing import relative_error
from kvarn_triton.testing.latents import latent_case


def test_append_tokens(device):
    """Tokens land in their slots, rotated, with the bits of the reference; others are untouched."""
    latents, rope = (x.to(device) for x in tokens_of(5, torch.bfloat16))
    memory = torch.full((3, 66, 576), -7.0, dtype=torch.float16, device=device)
    raw_pages, expected = memory[:, :64], memory[:, :64].clone()
    slots = torch.tensor([3, -1, 64, 191, 0], device=device)
    kvarn.mla_append_tokens(latents, rope, raw_pages, slots)
    reference.mla_append_tokens(latents, rope, expected, slots)
    assert_same_bits(raw_pages, expected)
    assert int((memory != -7).any(dim=-1).sum()) == 4


@pytest.mark.parametrize("advance", [True, False])
def test_commit_pages(advance, device):
    """Pages that are due are quantized, once and in order; sequences that are not due, or without an id, are left alone."""
    layout = MLALayout(4, 64)
    raw_pages = torch.full((9, 64, 576), torch.nan, dtype=torch.float16)
    latents, rope = tokens_of(128, torch.float32)
    reference.mla_append_tokens(latents, rope, raw_pages, torch.arange(64, 192))
    call = {
        "raw_pages": raw_pages,
        "pages": torch.full((4, layout.page_bytes), 255, dtype=torch.uint8),
        "raw_table": torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]], dtype=torch.int32),
        "block_table": torch.tensor([[2], [3], [-1], [0]], dtype=torch.int32),
        "committed_lens": torch.tensor([128, 127, 500, 500], dtype=torch.int32),
        "num_quantized": torch.tensor([0, 0, 0, 1], dtype=torch.int32),
    }
    given, wanted = moved(call, device), {name: x.clone() for name, x in call.items()}
    kvarn.mla_commit_pages(**given, layout=layout, sink_len=64, advance=advance)
    reference.mla_commit_pages(**wanted, layout=layout, sink_len=64, advance=advance)
    assert_same_bits(given["pages"].cpu(), wanted["pages"])
    assert torch.equal(given["num_quantized"].cpu(), wanted["num_quantized"])
    assert wanted["num_quantized"].tolist() == ([1, 0, 0, 1] if advance else [0, 0, 0, 1])
    assert (wanted["pages"][2] != 255).any() and (wanted["pages"][[0, 1, 3]] == 255).all()


def test_a_server(device, without_kernels):
    """Token by token: append, commit, attend; what is attended to is what was appended, quantized page by page."""
    layout, steps = MLALayout(8, 64), 140
    latents, rope = (x.to(device) for x in tokens_of(steps, torch.float32))
    ints = {"dtype": torch.int32, "device": device}
    pages = torch.full((2, layout.page_bytes), 255, dtype=torch.uint8, device=device)
    raw_pages = torch.full((3, 64, 576), torch.nan, dtype=torch.float16, device=device)
    raw_table, block_table = torch.tensor([[2]], **ints), torch.tensor([[1, 0]], **ints)
    num_quantized = torch.zeros(1, **ints)
    for length in range(1, steps + 1):
        new = slice(length - 1, length)
        slots = kvarn.raw_slots(torch.tensor([[length - 1]], **ints), raw_table, sink_len=0, page_size=64)
        kvarn.mla_append_tokens(latents[new], rope[new], raw_pages, slots[0])
        lens = torch.tensor([length], **ints)
        kvarn.mla_commit_pages(raw_pages, pages, raw_table, block_table, lens, num_quantized, layout)
        assert int(num_quantized) == length // 64
        if length in (1, 63, 64, 65, 128, 140):
            q = draw(1, 4, 576, seed=length).half().to(device)
            tables = {"raw_pages": raw_pages, "raw_table": raw_table, "num_quantized": num_quantized}
            out = kvarn.mla_decode_attention(q, pages, block_table, lens, layout, sm_scale=0.05, **tables)
            tokens = torch.cat((latents[:length], rope[:length]), dim=1)
            weights = torch.softmax(0.05 * q[0].float() @ tokens.T, dim=-1)
            assert relative_error(out[0], weights @ tokens[:, :512]) < 0.02


CHUNKS = (
    ((150, 63, 0), (150, 63, 0)),
    ((200, 67, 1), (50, 4, 1)),
    ((201, 65, 2), (1, 1, 1)),  # three drafts are taken back
    ((256, 130, 3), (55, 65, 1)),
)
"""Lengths of three sequences after a step, and how many tokens of each are new."""
STEPS = {
    "decodes": {},
    "sink": {"sink_len": 64},
    "drafts": {"max_drafts": 3},
    "one slot": {"num_tail_slots": 1},
}
"""Options of the plan; with one slot new tokens go where a page that completes has its older ones."""


@pytest.mark.parametrize("name", STEPS)
def test_steps(name, device):
    """Prompts in chunks, decodes, drafts that are taken back: pools and plans as the reference has them, attention to them."""
    layout, options = LAYOUTS[0], STEPS[name].copy()
    latents, rope = tokens_of(400, torch.bfloat16)
    columns = options.get("sink_len", 0) // 64 + options.pop("num_tail_slots", 4)
    raw_table = torch.arange(3 * columns, dtype=torch.int32).flip(0).view(3, columns)
    block_table = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int().view(3, 4)
    sides = []
    for where, api in ((device, kvarn), (torch.device("cpu"), reference)):
        pages = torch.full((12, layout.page_bytes), 255, dtype=torch.uint8, device=where)
        raw_pages = torch.full((3 * columns, 64, 576), -7.0, dtype=torch.float16, device=where)
        for lens, new in CHUNKS:
            ends = torch.tensor([0, *new]).cumsum(0).int()
            tables = torch.tensor(lens, dtype=torch.int32), ends, block_table, raw_table
            step = api.plan_step(layout.keys, *(x.to(where) for x in tables), num_tokens=sum(new), **options)
            spans = zip(range(3), lens, new, strict=True)
            rows = torch.cat([torch.arange(length - n, length) + 20 * b for b, length, n in spans])
            given = (x[rows].to(where) for x in (latents, rope))
            api.mla_write_tokens(*given, pages, raw_pages, step, layout)
        sides.append((pages, raw_pages, step))
    found, expected = sides
    for result, wanted in zip(found[:2], expected[:2], strict=True):
        assert_same_bits(result.cpu(), wanted)
    q = draw(3, 2, 5, 576, seed=1).half()
    lists = torch.randint(-20, 256, (3, 2, 90), generator=torch.Generator().manual_seed(2)).int()
    for indices in (None, lists):
        given = None if indices is None else indices.to(device)
        out = kvarn.mla_attend(q.to(device), *found, layout, sm_scale=0.05, indices=given)
        exact = reference.mla_attend(q.double(), *expected, layout, sm_scale=0.05, indices=indices)
        assert relative_error(out.cpu(), exact) < 2**-9
    tokens = torch.cat((latents, rope), dim=1)[:256].double()
    weights = torch.softmax(0.05 * q[0, 1].double() @ tokens.T, dim=-1)
    dense = reference.mla_attend(q.double(), *expected, layout, sm_scale=0.05)
    assert relative_error(dense[0, 1], weights @ tokens[:, :512]) < 0.2


@pytest.mark.skipif(not ON_GPU, reason="needs CUDA graphs")
def test_replayed_graph(device):
    """A captured step appends, completes a page and attends as eager steps do, without a wait for the GPU."""
    call = moved(latent_case(LAYOUTS[0], [120, 60], num_heads=16, num_tail_slots=1), device)
    latents, rope = (x.to(device) for x in tokens_of(2 * 12, torch.float16))
    fed = {"latents": latents.reshape(12, 2, 512), "rope": rope.reshape(12, 2, 64)}
    graphed, eager = ({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()} for _ in range(2))
    new = {name: x[0].clone() for name, x in fed.items()}

    def step(x: dict) -> torch.Tensor:
        x["seq_lens"] += 1
        slots = kvarn.raw_slots(x["seq_lens"][:, None] - 1, x["raw_table"], sink_len=0, page_size=64).flatten()
        kvarn.mla_append_tokens(new["latents"], new["rope"], x["raw_pages"], slots)
        tables = (x[name] for name in ("raw_table", "block_table", "seq_lens", "num_quantized"))
        kvarn.mla_commit_pages(x["raw_pages"], x["pages"], *tables, x["layout"])
        return kvarn.mla_decode_attention(**x)

    spare = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    step(spare)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(graphed)
    for i in range(12):
        for name, x in fed.items():
            new[name].copy_(x[i])
        graph.replay()
        assert_same_bits(out, step(eager))
    assert graphed["num_quantized"].tolist() == [2, 1]


@pytest.mark.skipif(not ON_GPU, reason="needs 3 GB of pages")
def test_byte_offsets_above_2_to_31(device):
    """Pages whose bytes start beyond 2**31 are written and read where they are."""
    layout = MLALayout(4, 64)
    count = 2**31 // layout.page_bytes + 1000
    latents, rope = (x.to(device) for x in tokens_of(64, torch.float16))
    pages = torch.zeros(count, layout.page_bytes, dtype=torch.uint8, device=device)
    ids = torch.tensor([count - 1], dtype=torch.int32, device=device)
    kvarn.mla_store_pages(latents, rope, pages, ids, layout)
    small = pages[-1:].clone()
    call = {"q": draw(1, 16, 576).half().to(device), "seq_lens": torch.tensor([64], dtype=torch.int32, device=device)}
    far = kvarn.mla_decode_attention(pages=pages, block_table=ids[None], layout=layout, sm_scale=0.1, **call)
    near = kvarn.mla_decode_attention(pages=small, block_table=ids[None] * 0, layout=layout, sm_scale=0.1, **call)
    assert_same_bits(far, near)
    for x, y in zip(
        kvarn.mla_dequantize_pages(pages, ids, layout), kvarn.mla_dequantize_pages(small, ids * 0, layout), strict=True
    ):
        assert_same_bits(x, y)


@pytest.mark.parametrize(
    "name", ["append_tokens", "attend", "commit_pages", "decode_attention", "dequantize_pages", "store_pages", "write_tokens"]
)
def test_parameters_of_operators(name):
    """Functions of operators have the parameters of the functions of their names, less memory of results and encoders."""
    from kvarn_triton.mla import operators

    own, function = (inspect.signature(getattr(module, f"mla_{name}")).parameters for module in (operators, kvarn))
    assert list(own.values()) == [p for p in function.values() if p.name not in ("out", "encoder")]


def test_operators(device):
    """A step in one compiled graph gives what the functions do, and the operators are as PyTorch wants them."""
    from kvarn_triton.mla import operators

    layout, config = LAYOUTS[0], MLAConfig(16, 16, 4, maxnreg=248)
    call = moved(latent_case(layout, [127, 100], num_heads=2, sink_len=64, num_tail_slots=1), device)
    call["seq_lens"] = call["seq_lens"] + 1
    latents, rope = (x.to(device) for x in tokens_of(2, torch.float16))
    prompt, prompt_rope = (x.to(device) for x in tokens_of(67, torch.float16, seed=5))
    slots = kvarn.raw_slots(call["seq_lens"][:, None] - 1, call["raw_table"], sink_len=64, page_size=64).flatten()
    ids, starts = (torch.tensor([i], dtype=torch.int32, device=device) for i in (int(call["block_table"][1, 0]), 3))
    plan = kvarn.plan_step(layout.keys, call["seq_lens"], None, call["block_table"], call["raw_table"], sink_len=64)
    lists = lists_of(moved(call, torch.device("cpu")), 20).to(device)

    def step(api, x: dict) -> tuple[torch.Tensor, ...]:
        api.mla_append_tokens(latents, rope, x["raw_pages"], slots)
        api.mla_store_pages(prompt, prompt_rope, x["pages"], ids, layout, token_starts=starts)
        tables = (x[name] for name in ("raw_table", "block_table", "seq_lens", "num_quantized"))
        api.mla_commit_pages(x["raw_pages"], x["pages"], *tables, layout, sink_len=64)
        api.mla_write_tokens(latents, rope, x["pages"], x["raw_pages"], plan, layout)
        pools = x["q"], x["pages"], x["raw_pages"]
        attended = api.mla_attend(*pools, plan, layout, sm_scale=0.1, indices=lists, return_lse=True, num_splits=1)
        read = api.mla_dequantize_pages(x["pages"], ids, layout, dtype=torch.bfloat16, rotated=True)
        listed = api.mla_decode_attention(**x, indices=lists, return_lse=True)
        return *api.mla_decode_attention(**x, return_lse=True, num_splits=2, config=config), *listed, *read, *attended

    plain, traced = ({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()} for _ in range(2))
    expected = step(kvarn, plain)
    results = torch.compile(lambda x: step(operators, x), backend="aot_eager", fullgraph=True)(traced)
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result, wanted)
    for name in ("raw_pages", "pages", "num_quantized"):
        assert_same_bits(traced[name], plain[name])
    assert plain["num_quantized"].tolist() == [1, 0]
    tensors = [traced[name] for name in ("q", "pages", "block_table", "seq_lens")]
    raw = [traced[name] for name in ("raw_pages", "raw_table", "num_quantized")]
    torch.library.opcheck(torch.ops.kvarn_triton.mla_decode_attention, (*tensors, 4, 64, 0.1, *raw, 64, 2, None, lists))
