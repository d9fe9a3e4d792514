"""Which code runs where: the reference on CPU tensors, kernels on GPUs and in the interpreter; importing does nothing."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvarn_triton as kvarn
from kvarn_triton import reference

PACKAGE = Path(kvarn.__file__).parent
FUNCTIONS = [name for name in kvarn.__all__ if inspect.isfunction(getattr(kvarn, name))]
WITHOUT_TWIN = {
    "check_cache", "check_step", "decode_workspace_size", "load_table", "mla_warmup", "no_compilation", "page_header",
    "prefill_workspace_size", "read_page_header", "save_table", "schedule_decode", "schedule_step", "warmup",
}  # fmt: skip
"""The reference needs no workspace, no schedule, and compiles nothing; a look at tables or a header is the same everywhere."""


def run_python(code: str) -> None:
    """Run a program in a process without the interpreter's environment variable."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


CPU_CALLS = """
import torch
import kvarn_triton as kvarn
from kvarn_triton import PageLayout, gpu, reference
from kvarn_triton.testing import cache_case

assert not gpu.INTERPRETED
from triton.runtime.jit import JITFunction
def refuse(*args, **kwargs):
    raise AssertionError("a kernel was launched for CPU tensors")
JITFunction.run = refuse

layout = PageLayout(64, 64, 3, 2)
case = cache_case(layout, [150, 70], sink_len=16)
assert torch.equal(kvarn.decode_attention(case.q, **case.kwargs), reference.decode_attention(case.q, **case.kwargs))
k = torch.randn(64, 2, 64)
pages = torch.zeros(layout.pages_shape(1, 2), dtype=torch.uint8)
kvarn.store_pages(k, k, pages, torch.zeros(1, dtype=torch.int32), layout)
assert kvarn.dequantize_pages(pages, torch.zeros(1, dtype=torch.int64), layout)[0].shape == (1, 64, 2, 64)
kvarn.append_tokens(k, k, case.raw_pages, torch.arange(64))
tables = case.raw_table, case.block_table, case.seq_lens, case.num_quantized
kvarn.commit_pages(case.raw_pages, case.pages, *tables, layout, sink_len=16)
kvarn.cut_back(case.raw_pages, case.pages, *tables, layout, sink_len=16)
tiles = kvarn.variance_normalize(kvarn.hadamard(torch.randn(2, 64, 64)), per="token")[0]
codes, scale, zero = kvarn.quantize(tiles, 3, per="token")
assert torch.equal(kvarn.unpack(kvarn.pack(codes, 3, per="token"), 3, 64, 64, per="token"), codes)
assert (kvarn.dequantize(codes, scale, zero, per="token") - tiles).abs().max() < 2
state = torch.randn(3, 64), torch.zeros(3)
kvarn.merge_states(*state, *state)
"""


def test_cpu_tensors_run_the_reference():
    """Without a GPU and without the interpreter, every function works on CPU tensors and launches nothing."""
    run_python(CPU_CALLS)


def test_import_touches_no_gpu():
    """Importing the package initializes no device and asks for none."""
    run_python(
        "import torch\n"
        "def refuse(*args, **kwargs):\n"
        "    raise AssertionError('a device was asked for')\n"
        "torch.cuda._lazy_init = torch.cuda.get_device_properties = torch.cuda.current_device = refuse\n"
        "import kvarn_triton, kvarn_triton.testing\n"
        "assert not torch.cuda.is_initialized()\n"
    )


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - WITHOUT_TWIN))
def test_reference_twin(name):
    """Every public function has a twin in the reference with the same parameters and defaults.

    Twins that encode also take the order of sums, which is no choice of a kernel.
    """
    own = inspect.signature(getattr(kvarn, name)).parameters.values()
    twin = [p for p in inspect.signature(getattr(reference, name)).parameters.values() if p.name != "arithmetic"]
    assert [(p.name, p.kind, p.default) for p in own] == [(p.name, p.kind, p.default) for p in twin]


def test_public_names_are_documented():
    """Every public name exists, and functions and classes have docstrings."""
    for name in kvarn.__all__:
        value = getattr(kvarn, name)
        if callable(value):
            assert inspect.getdoc(value), name


FLOORS = (
    ("checks", "compilation", "encoder", "forms", "header", "layout", "mla_layout", "registry", "step"),
    ("reference",),
    ("cache", "debugging", "gpu", "launch", "masking", "paging", "tables"),
    ("tile",),
    ("configs", "merging"),
    ("pages",),
    ("attention",),
    ("mla", "serving"),
    ("exchange", "ops", "parallel", "testing", "warmup"),
    ("integrations",),
)
"""Which parts of the package stand on which: each imports from floors below it, and from its own."""


def imports_of(path: Path) -> set[str]:
    """Return the parts of the package that a file imports: a folder, or a file that is in none."""
    folders = path.relative_to(PACKAGE).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = folders[: len(folders) - (node.level - 1)]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            names |= {inside[0] if inside else module.split(".")[0] for module in modules}
    return names


def test_imports_go_one_way():
    """No part of the package imports from a floor above its own; the reference imports no kernel."""
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        found.add(part)
        above = {name for name in imports_of(path) if floor_of[name] > floor_of[part]}
        assert not above, f"{path.relative_to(PACKAGE)} imports {above}"
        if part == "reference":
            assert "triton" not in path.read_text().replace("kvarn_triton", ""), path
    assert found == floor_of.keys()


def test_no_environment_variables():
    """No environment variable of ours changes what the package computes."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert "environ" not in text and "getenv" not in text, path


def test_workspace_size(device):
    """The workspace holds the sums of each query head of all partial results, and its size is known without tensors.

    Ten pages are three runs of four; there is a partial result for each run, and for each kv head of a sequence one more.
    """
    size = kvarn.decode_workspace_size(3, 8, 2, kvarn.PageLayout(), 10, device, split_size=4)
    assert size == 3 * 2 * (3 + 1) * 4 * (128 + 1) * 4
    assert kvarn.decode_workspace_size(3, 8, 2, kvarn.PageLayout(), 10, torch.device("cpu")) > 0
