"""Operators: what PyTorch checks of their registration, a compiled decode step, what is refused, and what an import costs."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from helpers import bits_of, layout_id
from test_dispatch import run_python

import kvarn_triton as kvarn
from kvarn_triton import DecodeConfig, DecodeTable, MLAConfig, PageLayout, PrefillConfig, ops
from kvarn_triton.mla import operators  # noqa: F401
from kvarn_triton.tables import Entry
from kvarn_triton.testing import cache_case

ENCODER = kvarn.Encoder(3, equivariant=False, clip=False, fits=2, norm="balance")
"""Every option other than the default."""
LAYOUT = PageLayout(64, 64, 4, 2)
SINK = 16
FUNCTIONS = [name for name, value in vars(ops).items() if inspect.isfunction(value) and value.__module__ == ops.__name__]


def run_worker(function: str) -> None:
    """Run a function of `ops_worker.py` in a process without Triton's interpreter."""
    run_python(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import ops_worker; ops_worker.{function}()")


@pytest.mark.parametrize("function", ["check_registration", "check_no_gradients"])
def test_registered_operators(function):
    """Schemas, fake implementations and gradients of all operators."""
    run_worker(function)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith("_")])
def test_same_parameters(name):
    """Every function has the parameters, defaults and annotations of its launcher."""
    own, launcher = (inspect.signature(getattr(module, name), follow_wrapped=False) for module in (ops, kvarn))
    assert own == launcher


def test_schemas():
    """The text of every schema is what it was: compiled programs and other languages call operators by it."""
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kvarn_triton::"))
    parts = (name.removeprefix("kvarn_triton::").partition(".") for name in names)
    found = [str(getattr(getattr(torch.ops.kvarn_triton, name), to or "default")._schema) for name, _, to in parts]
    assert found == Path(__file__).with_name("schemas.txt").read_text().splitlines()


def test_importing_the_package_registers_nothing():
    """Operators exist once `ops` is imported, and not before."""
    run_python(
        "import torch, kvarn_triton\n"
        "assert not hasattr(torch.ops.kvarn_triton, 'hadamard')\n"
        "from kvarn_triton import ops\n"
        "assert hasattr(torch.ops.kvarn_triton, 'hadamard')\n"
    )


class Layer:
    """A cache, and the decode step of a layer over it, with the operators or with the launchers."""

    def __init__(self, module, layout: PageLayout, device: torch.device) -> None:
        self.module = module
        case = cache_case(layout, [140, 70], sink_len=SINK, num_kv_heads=1, device=device)
        self.case = case
        self.projection = torch.randn(4 * layout.v_head_dim, 32, generator=torch.Generator().manual_seed(1)).half().to(device)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Append a token per sequence, complete pages, attend and project."""
        m, c = self.module, self.case
        m.append_tokens(k, v, c.raw_pages, m.raw_slots(positions, c.raw_table, sink_len=SINK, page_size=64).flatten())
        m.commit_pages(c.raw_pages, c.pages, c.raw_table, c.block_table, c.seq_lens, c.num_quantized, c.layout, sink_len=SINK)
        out = m.decode_attention(q, **c.kwargs)
        return m.hadamard(out).flatten(1) @ self.projection

    def state(self) -> list[torch.Tensor]:
        """Return the bits of all that a step writes."""
        return [bits_of(x) for x in (self.case.raw_pages, self.case.pages, self.case.num_quantized)]


@pytest.mark.parametrize("layout", [LAYOUT, PageLayout(64, 64, 4, 2, v_head_dim=80)], ids=layout_id)
def test_compiled_decode_step(layout, device):
    """A step in one graph gives the bits of the eager one, in the cache too; other lengths compile nothing.

    The third step completes a page of the first sequence.
    """
    eager, traced = Layer(kvarn, layout, device), Layer(ops, layout, device)
    compiled = torch.compile(traced.step, fullgraph=True, backend="aot_eager")
    before = eager.state()[1].clone()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for lengths in ([141, 71], [142, 72], [144, 73]):
            q = torch.randn(2, 4, 64, generator=random).half().to(device)
            head_dims = layout.head_dim, layout.v_head_dim
            k, v = (torch.randn(2, 1, d, generator=random).half().to(device) for d in head_dims)
            for layer in (eager, traced):
                layer.case.seq_lens.copy_(torch.tensor(lengths))
            positions = (eager.case.seq_lens - 1)[:, None]
            with torch._dynamo.config.patch(error_on_recompile=lengths != [141, 71]):
                result = compiled(q, k, v, positions)
            assert torch.equal(bits_of(result), bits_of(eager.step(q, k, v, positions)))
            assert all(torch.equal(a, b) for a, b in zip(eager.state(), traced.state(), strict=True))
    assert not torch.equal(before, eager.state()[1])


def test_options_reach_the_launcher(device, monkeypatch):
    """A table's row for the head_dim, the encoder and memory of the caller arrive, in a compiled graph too."""
    seen = []
    for name, module in (("decode_attention", ops.decode), ("commit_pages", ops.commit)):
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, launch=launch, **kwargs: seen.append(kwargs) or launch(*args, **kwargs))
    wanted = DecodeConfig(num_warps=2, num_stages=1, maxnreg=64, programs_per_sm=1, few_programs_per_sm=1)
    table = DecodeTable("any", (Entry(64, wanted, "measured"), Entry(512, DecodeConfig(), "measured")))
    case = cache_case(LAYOUT, [70], device=device)
    raw = case.raw_table, case.block_table, case.seq_lens, case.num_quantized
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    tables = {name: getattr(case, name) for name in ("raw_table", "num_quantized", "sink_len")}
    options = {"window": 65, "split_size": 2, "table": table, **tables}
    schedule = kvarn.schedule_decode(LAYOUT, case.seq_lens, case.block_table, 8, 2, **options)

    def step(out):
        ops.commit_pages(case.raw_pages, case.pages, *raw, LAYOUT, keep_pages=1, encoder=ENCODER)
        return ops.decode_attention(
            case.q,
            **case.kwargs,
            window=65,
            soft_cap=30.0,
            out=out,
            workspace=workspace,
            return_lse=True,
            split_size=2,
            table=table,
            schedule=schedule,
        )

    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = torch.zeros_like(case.q)
        result, lse = run(out)
        assert result is out and out.abs().sum() > 0 and lse.shape == (1, 8)
        commit, attention = seen[-2:]
        assert commit["encoder"] == ENCODER and commit["keep_pages"] == 1
        assert attention["table"].find(64) == wanted
        assert (attention["window"], attention["soft_cap"], attention["split_size"]) == (65, 30.0, 2)
        assert attention["workspace"].shape == workspace.shape
        assert attention["schedule"].records is schedule.records and attention["schedule"].made_for == schedule.made_for


@pytest.mark.parametrize("config", [DecodeConfig(1, 2, 64, 32, 8, 4, 128, True), DecodeConfig(2, 3, 32, 64, 6, 5)])
def test_rows_of_tables(config):
    """Launch parameters survive the way through an operator's schema, those of split codes too."""
    known = DecodeTable("any", (Entry(128, config, "measured"), Entry(128, DecodeConfig(8), "measured", 6)))
    memory = torch.zeros(1, 8, 128), torch.zeros(1, 1, 1)
    for layout, wanted in ((LAYOUT, config), (PageLayout(64, 64, 4, 6), DecodeConfig(8))):
        table = ops._table(tuple(ops._row(known, layout, *memory)))
        assert table.find(64) == table.find(64, 6) == wanted


OTHERS = {
    int: lambda value: 2 * value,
    bool: lambda value: not value,
    type(None): lambda value: 64,
    str: lambda value: "folded",
}
"""Another legal value of a launch parameter, by its type."""


@pytest.mark.parametrize(
    "config",
    [DecodeConfig(programs_per_sm=4), PrefillConfig(64, 4, 32, 16), MLAConfig(16, 32, 4)],
    ids=lambda x: type(x).__name__,
)
def test_every_launch_parameter_has_a_number(config):
    """No field is lost on the way through a schema, whichever differs from what it is by default."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        other = dataclasses.replace(config, **{field.name: OTHERS[type(value)](value)})
        assert other != config and type(config).of_numbers(tuple(other.numbers())) == other


@pytest.mark.parametrize("config", [PrefillConfig(64, 4, 32, 16), PrefillConfig(16, 2, 64, 32, 3, 5, 128, "registers")])
def test_prefill_configs(config, device, monkeypatch):
    """Launch parameters of prefill attention arrive, in a compiled graph too."""
    seen = []
    launch = ops.prefill.prefill_attention
    monkeypatch.setattr(
        ops.prefill, "prefill_attention", lambda *args, **kwargs: seen.append(kwargs["config"]) or launch(*args, **kwargs)
    )
    case = cache_case(LAYOUT, [70], dtype=torch.float16, device=device)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)

    def step(q):
        return ops.prefill_attention(q, **case.kwargs, cu_seqlens_q=ends, config=config)

    expected = kvarn.prefill_attention(case.q, **case.kwargs, cu_seqlens_q=ends, config=config)
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        assert torch.equal(run(case.q), expected)
    assert seen == [config, config]


def test_refusals(device):
    """The launcher's errors come through, eagerly and from a compiled graph; those of the functions too."""
    case = cache_case(LAYOUT, [70], device=device)
    arguments = case.kwargs | {"block_table": case.block_table.long()}
    compiled = torch.compile(ops.decode_attention, fullgraph=True, backend="aot_eager")
    for attend in (ops.decode_attention, compiled):
        with pytest.raises(ValueError, match="block_table: expected dtype int32, got int64"):
            attend(case.q, **arguments)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="workspace: expected None without out, got 'a tensor'"):
        ops.decode_attention(case.q, **case.kwargs, workspace=workspace)
    with pytest.raises(ValueError, match="out: expected a tuple of two tensors, got 'list'"):
        ops.dequantize_pages(case.pages, case.block_table[0], LAYOUT, out=[])
    with pytest.raises(ValueError, match="q: expected shape"):
        ops.decode_attention(torch.zeros(1, 8, 80, device=device).half(), **case.kwargs)


def test_options_change_results(device):
    """Options that show in what comes out: the bits of the launcher with the same options, not those with other ones."""
    k, v = (torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(seed)).to(device) for seed in (0, 1))
    ids = torch.zeros(1, dtype=torch.int32, device=device)
    stored = [torch.zeros(LAYOUT.pages_shape(1, 1), dtype=torch.uint8, device=device) for _ in range(3)]
    ops.store_pages(k, v, stored[0], ids, LAYOUT, encoder=ENCODER)
    kvarn.store_pages(k, v, stored[1], ids, LAYOUT, encoder=ENCODER)
    kvarn.store_pages(k, v, stored[2], ids, LAYOUT)
    assert torch.equal(stored[0], stored[1]) and not torch.equal(stored[0], stored[2])

    pages, lens = stored[0], torch.tensor([60], dtype=torch.int32, device=device)
    ends, q = torch.tensor([0, 3], dtype=torch.int32, device=device), k[:3].half()
    sinks = torch.zeros(1, device=device)
    calls = [("dequantize_pages", (pages, ids, LAYOUT), option) for option in ({"rotated": True}, {"dtype": torch.float32})]
    for option in ({"sm_scale": 0.5}, {"window": 7}, {"soft_cap": 0.5}, {"sinks": sinks}):
        calls.append(("prefill_attention", (q, pages, ids[None], lens, ends, LAYOUT), option))
        calls.append(("decode_attention", (q[:1], pages, ids[None], lens, LAYOUT), option))
    for name, arguments, option in calls:
        results = [call(*arguments, **given) for call, given in ((getattr(ops, name), option), (getattr(kvarn, name), option))]
        plain = getattr(kvarn, name)(*arguments)
        first, second, other = (x[0] if isinstance(x, tuple) else x for x in (*results, plain))
        assert torch.equal(first, second), (name, option)
        assert first.dtype != other.dtype or not torch.equal(first, other), (name, option)
