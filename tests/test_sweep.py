"""The command line of perf/sweep.py: its registry, the gate's coverage, the last screen, exit codes, and the peers' reasons."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import draw

import kvarn_triton
from kvarn_triton import reference
from kvarn_triton.testing import relative_error

sys.path.insert(0, str(Path(__file__).parent.parent / "perf"))
import common
import gate
import gate_attention
import gate_checks
import gate_mla  # noqa: F401
import gate_steps  # noqa: F401
import mla_twin
import peers
import sixteen_bit
import summary
import sweep
from cases import Shape, attention_of_row

sweep.register_sweeps()


@pytest.fixture
def in_kernel_order(without_kernels, monkeypatch) -> None:
    """Have the reference compute, in the kernels' order of sums: what is tested is what the gate calls."""
    monkeypatch.setattr(reference, "ANY_ORDER", reference.KERNEL_ORDER)


def run_checks(names=None) -> tuple[list[dict], list[dict]]:
    """Return the rows of checks on the small page format, and what they called."""
    results = [gate.run_task(gate.Task(name), "cpu") for name in names or gate_checks.CHECKS]
    return [row for rows, _ in results for row in rows], [called for _, called in results]


def test_registry():
    """Every sweep has a subcommand and a line of help; every name that documents use is there."""
    names = "gate decode ragged prefill masks peers tune write steps store dequantize hadamard overhead host capacity error"
    assert set(common.SWEEPS) == {
        *names.split(),
        "parallel",
        "offload",
        "compile",
        "accuracy",
        "encoders",
        "raw_tokens",
        "real",
        "choice",
        "predicts",
        "model",
        "mla",
        "mla_lists",
    }
    for name, entry in common.SWEEPS.items():
        assert sweep.parser().parse_args([name]).command == name
        assert entry.run.__doc__.strip()
    assert set(sweep.SEARCHES) < set(common.SWEEPS)
    assert {entry.needs for entry in common.SWEEPS.values()} <= {"gpu", "compiler", "any"}


def test_the_gate_calls_everything(in_kernel_order, monkeypatch):
    """Every public function is called with each of its arguments; a name that no check calls is red."""
    rows, calls = run_checks()
    assert [row for row in rows if row["status"] != "ok"] == []
    row = gate.coverage(calls)
    assert row["status"] == "ok" and row["functions"] == sum(
        inspect.isfunction(getattr(kvarn_triton, name)) for name in kvarn_triton.__all__
    )
    monkeypatch.setattr(kvarn_triton, "forgotten", lambda x: x, raising=False)
    monkeypatch.setattr(kvarn_triton, "__all__", [*kvarn_triton.__all__, "forgotten"])
    row = gate.coverage(calls)
    assert row["status"] == "FAIL" and row["detail"] == "forgotten"


def test_an_option_that_no_check_passes_is_red():
    """An argument counts as called only if it was given something."""
    calls = [{name: set(arguments) for name, arguments in gate.public_functions().items()}]
    assert gate.coverage(calls)["status"] == "ok"
    calls[0]["decode_attention"] -= {"soft_cap"}
    assert gate.coverage(calls)["detail"] == "decode_attention(soft_cap)"


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("store_pages", "pages: store and dequantize"),
        ("decode_attention", "decode, window"),
        ("prefill_attention", "prefill, chunk: soft cap"),
    ],
)
def test_wrong_results_are_red(name, check, in_kernel_order, monkeypatch):
    """A function that computes something else, or raises an error, makes its row red and the exit code 1."""
    right = getattr(kvarn_triton, name)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        for changed in (result[0],) if isinstance(result, tuple) else (args[2],):
            changed.view(-1)[:7] += 1
        return result

    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    for replacement in (wrong, broken):
        monkeypatch.setattr(kvarn_triton, name, replacement)
        rows, _ = run_checks([check])
        red = [row for row in rows if row["status"] == "FAIL"]
        assert red[0]["operation"] == name and sweep.is_red(red[0])
        assert any(line.startswith("          FAIL") for line in summary.screen({"gate": rows}))


def test_the_gate_runs_what_is_timed():
    """The tasks are all checks on the small format, and those of operations on each preset; long ones come first."""
    tasks = gate.gate_tasks(common.Options(quick=True, shapes=("Llama-3.1-8B",)))
    assert {task.check for task in tasks if not task.preset} == set(gate_checks.CHECKS)
    assert {task.check for task in tasks if task.preset} <= set(gate.ON_SHAPES)
    assert [task.cost for task in tasks] == sorted((task.cost for task in tasks), reverse=True)


def checked() -> list[dict]:
    """Return rows as those of the gate."""
    fields = {"check": "decode, window", "operation": "decode_attention", "criterion": "error <= 2x plain", "status": "ok"}
    rows = [fields | {"error": 2e-4, "allowed": 8e-4, "detail": ""}]
    rows.append({"check": "hadamard", "operation": "hadamard", "criterion": "bit-equal", "status": "ok", "detail": "equal"})
    calls = [{name: set(arguments) for name, arguments in gate.public_functions().items()}]
    return [*rows, gate.coverage(calls)]


def test_last_screen_without_a_gpu():
    """About 15 lines from given rows: counts, errors, the compiler's counts, and what it means."""
    errors = [
        {"preset": "k4v2_g128", "encoder": name, "k_error": 0.08, "v_error": 0.3 * i, "attention_error": 0.4 * i}
        for i, name in enumerate(("default", "published"), 1)
    ]
    compiled = {"target": "sm90", "call": "decode", "kernel": "decode_attention", "registers": 255, "stack": 24}
    compiled |= {"loop_per_page": 1843, "status": "ok"}
    sizes = {"preset": "k4v2_g128", "bytes_per_token": 109.0, "times_smaller": 4.7, "bytes_per_token_bf16": 512}
    lines = summary.screen({"gate": checked(), "capacity": [sizes], "error": errors, "compile": [compiled]})
    text = "\n".join(lines)
    assert 12 <= len(lines) <= 18 and max(map(len, lines)) <= 130
    for part in ("all agree", "109 (4.7x less)", "0.30 (0.60)", "1,843 instructions", "255 (24)", "loses", "sweep.py --all"):
        assert part in text
    assert "2.0e-04 where 8.0e-04 is allowed (decode, window)" in text


def test_last_screen_with_a_gpu():
    """Times beside 16 bits; where 16 bits are faster is said, and a row without a time is a failure."""
    point = {"shape": summary.SHAPE, "preset": "k4v2_g128", "cache": "pages only", "percent_of_copy": 80.0}
    rows = [
        point | {"batch": 8, "context": 32768, "us": 68.3, "us_16bit": 247.2, "times_16bit": 3.6},
        point | {"batch": 1, "context": 1024, "us": 9.7, "us_16bit": 7.1, "times_16bit": 0.73},
        point | {"batch": 1, "context": 32768, "us": None, "fail": "the correctness gate is red"},
    ]
    chunk = {"what": "chunk, scratch", "batch": 1, "context": 32768, "tokens": 2048, "us": 2600.0, "percent_of_16bit": 99.0}
    store = {"pages": 512, "us": 608.0, "copy_us": 78.0}
    text = "\n".join(summary.screen({"gate": checked(), "decode": rows, "prefill": [chunk], "store": [store]}))
    for part in ("68.3 us (3.6x 16 bits, 80 % of copy)", "1 x 1K 9.7 us, 16 bits 7.1", "99 % of 16 bits", "608 us, a copy"):
        assert part in text
    assert "FAIL decode: the correctness gate is red" in text


def test_default_command_line(monkeypatch, tmp_path, capsys):
    """Without a command the default run's rows become the last screen and the JSON file; a red row gives exit code 1."""
    rows = [("gate", row) for row in checked()]
    monkeypatch.setattr(summary, "without_gpu", lambda options: iter(rows))
    monkeypatch.setattr(summary, "with_gpu", lambda options: iter(rows))
    path = tmp_path / "rows.json"
    assert sweep.main(["--json", str(path)]) == 0
    assert "all agree with the reference" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert len(written["sweeps"]["gate"]) == 3 and written["run"]["commit"]
    rows.append(("gate", rows[0][1] | {"status": "FAIL", "detail": "equal only in part"}))
    assert sweep.main([]) == 1
    assert "FAIL: 1 rows are red" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("name", ["peers", "decode", "prefill", "store"])
def test_times_need_a_gpu(name):
    """A timed sweep without a GPU is refused in one sentence."""
    with pytest.raises(SystemExit, match=f"{name}: times need a GPU"):
        sweep.main([name])


@pytest.mark.parametrize("arguments", [[], ["--all"], ["gate"], ["error"]])
def test_what_has_no_gate_before_it(arguments, monkeypatch):
    """`--no-gate` is refused where it would leave out nothing, or what was asked for."""
    monkeypatch.setattr(sweep, "rows_of", lambda names, options: iter(()))
    with pytest.raises(SystemExit, match="--no-gate: expected a timed sweep"):
        sweep.main([*arguments, "--no-gate"])


def test_no_gate(monkeypatch, capsys):
    """A timed sweep without the gate runs alone, and its title says so."""
    seen = []
    monkeypatch.setattr(sweep, "chosen_sweeps", lambda command: ["gate", command])
    monkeypatch.setattr(sweep, "rows_of", lambda names, options: seen.append(names) or iter(()))
    assert sweep.main(["mla", "--no-gate"]) == 0
    assert "no gate: nothing was checked first" in capsys.readouterr().out
    assert sweep.main(["mla"]) == 0
    assert "no gate" not in capsys.readouterr().out
    assert seen == [["mla"], ["gate", "mla"]]


def test_all_leaves_out_what_cannot_run(monkeypatch):
    """`--all` takes every sweep but searches, and without a GPU those that need none."""
    names = sweep.chosen_sweeps(None)
    assert names[0] == "gate" and not set(names) & set(sweep.SEARCHES)
    assert ("decode" in names) == torch.cuda.is_available()


def test_missing_peers_are_named(monkeypatch):
    """A peer that can't be imported is no error; the reason says what is missing."""
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    found, missing = peers.find_all()
    assert "SDPA" in found and "flashinfer can't be imported" in missing["FlashInfer"]
    assert missing["FA3"] == "vllm is not installed"


def test_arguments_of_an_operator_that_has_grown():
    """Arguments are found by name; those that a newer version has at its end get a default, None or a world of one."""
    schema = torch._C.parse_schema(
        "f(Tensor q, Tensor? new, int sm_margin, int cp_world_size, bool? pack, float cap=1.5) -> Tensor"
    )
    assert peers.fa3_arguments(schema, {"q": 3}) == [3, None, 0, 1, None, 1.5]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the sweep itself checks each peer")
@pytest.mark.parametrize("tokens", [1, 3])
def test_sdpa_and_arrangements(tokens):
    """PyTorch's attention is right on the memory that all peers share, and each arrangement reads what it should."""
    case = sixteen_bit.SixteenBit(Shape("small", 4, 2, 64), 2, 200, tokens, 0, device="cpu", sets=2)
    variants = peers.sdpa_variants({"any": None}, case)
    right, wrong = peers.checked(variants, case)
    assert list(right) == ["any"] and not wrong
    calls, kv = variants["any"]
    assert peers.checked({"of other keys": (calls, case.last_in_pool())}, case)[0] == {}
    for page_size in peers.PAGE_SIZES:
        for heads_first in (True, False):
            pools, table = case.pool(page_size, heads_first)
            token, kv = 137, case.last_in_pool(page_size, heads_first)
            page = pools[0][int(table[-1, token // page_size])]
            expected = page[:, :, token % page_size] if heads_first else page[:, token % page_size]
            assert torch.equal(kv[:, :, token], expected)


class _FA3:
    """Stands for the library: decode attention to pages of any type."""

    class fwd:  # noqa: N801
        default = SimpleNamespace(
            _schema=torch._C.parse_schema(
                "fwd(Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? seqused_k, Tensor? page_table, "
                "float softmax_scale) -> Tensor[]"
            )
        )

        def __new__(cls, q, k, v, out, lens, table, scale):
            """Attend in float64; results of 8-bit queries are in bfloat16."""
            assert (out is None) == (q.dtype == torch.float8_e4m3fn)
            rows = []
            for row, length in enumerate(lens.tolist()):
                keys, values = (x[table[row].long()].flatten(0, 1)[:length].double().transpose(0, 1) for x in (k, v))
                weights = torch.softmax(scale * q[row].double().unflatten(0, (len(keys), -1)) @ keys.mT, dim=-1)
                rows.append((weights @ values).flatten(0, 1))
            return [torch.stack(rows).to(torch.bfloat16 if out is None else out.dtype)]

    @staticmethod
    def get_scheduler_metadata(*given):
        """Made for the type that is used."""
        return given[7]


def test_eight_bits_are_held_to_what_they_hold():
    """The cache of 8 bits has as many bytes in all; what reads it is right against it, and not against the 16-bit one."""
    case = sixteen_bit.SixteenBit(Shape("small", 4, 2, 64), 2, 200, 1, 0, device="cpu", sets=2)
    eight = case.in_eight_bits()
    assert eight.memory.nbytes == case.memory.nbytes and eight.sets == len(eight.q) == 4
    for held in (case, eight):
        variants = peers.fa3_variants(_FA3, held)
        right, wrong = peers.checked(variants, held, 2**-8)
        assert len(right) == 4 and not wrong and all(len(calls) == held.sets for calls in right.values())
    calls, _ = peers.fa3_variants(_FA3, eight)["own splits, pages of 16"]
    assert peers.checked({"": (calls, case.last_in_pool(16, False))}, case, 2**-8)[0] == {}
    assert {peer.name: peer.bits for peer in peers.PEERS if peer.bits != 16} == {"FA3 fp8": 8}


def test_plain_formula_is_the_reference():
    """`attention_of_row` in float64 is the reference's attention, for decode and for new tokens with every option."""
    subject = gate_checks.Subject()
    options = {"window": 70, "soft_cap": 3.0, "sinks": draw(8), "sm_scale": 0.3}
    for name, call in (
        ("decode_attention", gate_attention.decode_call(subject, False)),
        ("prefill_attention", gate_attention.prefill_call(subject, True, (9, 4))),
    ):
        call |= options | {"q": call["q"].double()}
        exact = getattr(reference, name)(**call)
        found = torch.cat([attention_of_row(call, row, torch.float64) for row in range(len(call["seq_lens"]))])
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [mla_twin.TwinConfig(16, 32, 4, 2), mla_twin.TwinConfig(32, 16, 4, 1, 8)])
def test_the_twin_of_latent_attention(config, device):
    """It is attention, whatever its tiles and splits are."""
    pages, q = (
        draw(6, 64, 576, dtype=torch.float16, device=device),
        draw(2, 20, 576, seed=1, dtype=torch.float16, device=device),
    )
    table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32, device=device)
    lens = torch.tensor([150, 3], dtype=torch.int32, device=device)
    out = mla_twin.twin_mla(q, pages, table, lens, 0.05, 4, config)
    for row, length in enumerate(lens.tolist()):
        tokens = pages[table[row].long()].flatten(0, 1)[:length].double()
        weights = torch.softmax(0.05 * q[row].double() @ tokens.T, dim=-1)
        assert relative_error(out[row], weights @ tokens[:, :512]) < 2**-9
    slots = torch.tensor([[5, 200, 64, 7, 380], [1, 2, 0, 0, 0]], dtype=torch.int32, device=device)
    lens = torch.tensor([5, 2], dtype=torch.int32, device=device)
    out = mla_twin.twin_mla(q, pages, slots, lens, 0.05, 4, config, listed=True)
    for row, length in enumerate(lens.tolist()):
        tokens = pages.flatten(0, 1)[slots[row, :length].long()].double()
        weights = torch.softmax(0.05 * q[row].double() @ tokens.T, dim=-1)
        assert relative_error(out[row], weights @ tokens[:, :512]) < 2**-9
