"""What keeps the code readable: the sizes of functions and files, and the lengths of parameter lists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvarn_triton

PACKAGE = Path(kvarn_triton.__file__).parent
ROOT = Path(__file__).parent.parent
FOLDERS = PACKAGE, ROOT / "tests", ROOT / "perf", ROOT / "docs" / "examples"
FILE_LINES = 350
FUNCTION_LINES = 80
"""Without the docstring."""
KERNEL_PARAMETERS = 30
JIT_PARAMETERS = 14
PYTHON_PARAMETERS = 8
"""Of private functions. Public ones have what users give them, and the reference has the same."""


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    """Return every function of the package, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def most_parameters(path: Path, function: ast.FunctionDef) -> int | None:
    """Return how many parameters a function may have; None for any number."""
    if function.name.startswith("_kvarn_"):
        return KERNEL_PARAMETERS
    if any("triton." in ast.unparse(decorator) for decorator in function.decorator_list):
        return JIT_PARAMETERS
    public = function.name in (*kvarn_triton.__all__, "cache_case") or path.is_relative_to(PACKAGE / "reference")
    # An engine says what its backends are called with.
    given = path == PACKAGE / "integrations" / "vllm" / "backend.py" and function.name in ("__init__", "forward")
    return None if public or given else PYTHON_PARAMETERS


def test_fusion_is_said():
    """Every launch says whether products may be fused with sums: what Triton does else follows an environment variable."""
    count = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            kernel = call.func.value if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) else None
            if isinstance(kernel, ast.Call) and ast.unparse(kernel.func) == "on":
                count += 1
                names = {keyword.arg for keyword in call.keywords}
                assert "enable_fp_fusion" in names, f"{path}:{call.lineno}: {ast.unparse(kernel)}"
    assert count >= 30, count


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_sizes_of_files(folder):
    """No file is longer than a reader can keep in mind: of the package, its tests, its measurements and its examples."""
    lines = {path: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    assert lines
    assert not {str(path): count for path, count in lines.items() if count > FILE_LINES}


def test_sizes():
    """No function or parameter list is longer than a reader can keep in mind."""
    for path, function in functions():
        lines = function.end_lineno - function.lineno + 1
        if ast.get_docstring(function) is not None:
            lines -= function.body[0].end_lineno - function.body[0].lineno + 1
        assert lines <= FUNCTION_LINES, f"{path}: {function.name} has {lines} lines"
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        most = most_parameters(path, function)
        assert most is None or len(arguments) <= most, f"{path}: {function.name} has {len(arguments)} parameters"
