"""What kernels are compiled from is in the hash by which Triton's cache on disk knows them."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITCallable

import kvarn_triton

TESTS = Path(__file__).parent
PACKAGE = Path(kvarn_triton.__file__).parent
ENCODING = {f"_kvarn_{name}_kernel" for name in ("store_pages", "commit_pages", "quantize", "variance_normalize")}
READING = ("dequantize_pages", "decode_attention", "prefill_attention")
PAGED = {f"_kvarn_{name}_kernel" for name in ("store_pages", "commit_pages", *READING)}


@pytest.fixture(scope="module")
def hashes() -> dict[str, dict[str, str]]:
    """Return the hash of every kernel, by what was changed; "" for nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(TESTS / "cache_key_worker.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(("prefix", "kernels"), [("codec.", ENCODING), ("layout.", PAGED)])
def test_changes_make_new_kernels(prefix, kernels, hashes):
    """A binary of another encoder, or of another page format, is never taken from the cache."""
    changes = [name for name in hashes if name.startswith(prefix)]
    assert len(changes) >= 10
    for change in changes:
        same = {kernel for kernel in kernels if hashes[change][kernel] == hashes[""][kernel]}
        assert not same, f"{change} is not in the hash of {same}"


def names_read(function: ast.FunctionDef) -> set[str]:
    """Return the names that a function reads and does not make itself."""
    own = {argument.arg for argument in function.args.args}
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    own |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - own


def test_constexpr_functions_read_what_is_hashed():
    """They read constexprs, other functions and Triton; of modules of the package only the encoder's constants (`CODEC`)."""
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        if "constexpr_function" not in path.read_text():
            continue  # those of integrations import what may not be installed
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("constexpr_function" in ast.unparse(d) for d in node.decorator_list):
                seen += 1
                for name in names_read(node) & vars(module).keys():
                    value = getattr(module, name)
                    hashed = isinstance(value, (JITCallable, tl.constexpr)) or value in (triton, tl, gluon, gl)
                    assert hashed or name in ("codec", "math"), f"{path.stem}.{node.name} reads {name}, which is in no hash"
    assert seen > 10
