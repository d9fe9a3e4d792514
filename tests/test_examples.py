"""What the documents print runs: the examples of `docs/examples/` and the program of README, on a CPU, no interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted(path.stem for path in (ROOT / "docs" / "examples").glob("*.py") if path.stem != "exact")
README_PROGRAM = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RUN = """
import contextlib, io, json, runpy, sys, traceback
results = {}
for path in sys.argv[1:]:
    printed, failure = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(path, run_name="__main__")
    except Exception:
        failure = traceback.format_exc()
    results[path] = printed.getvalue(), failure
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What each program prints, by name. One process runs them all: it imports PyTorch once, and has no interpreter, no GPU."""
    program = tmp_path_factory.mktemp("readme") / "readme.py"
    program.write_text(README_PROGRAM[0])
    paths = {"README": program} | {name: ROOT / "docs" / "examples" / f"{name}.py" for name in EXAMPLES}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "docs" / "examples"), environment.get("PYTHONPATH", "")])
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", RUN, *map(str, paths.values())]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    return {name: found[str(path)] for name, path in paths.items()}


@pytest.mark.parametrize("name", ["README", *EXAMPLES])
def test_runs(printed, name):
    """Each program ends without an error, and errors that it prints are those of its bits on random numbers."""
    text, failure = printed[name]
    assert failure is None, failure
    assert text
    limit = (
        0.16 if name in ("prompt_then_decode", "drafts", "tree_of_drafts", "sliding_window") else 0.55
    )  # 4-bit values; 2-bit values
    errors = [float(number) for number in re.findall(r"error (?:of \D*)?(\d\.\d+)", text)]
    assert all(error < limit for error in errors), text


def test_readme_has_one_program():
    """README prints one program, and it is whole."""
    assert len(README_PROGRAM) == 1


def test_sizes_of_readme(printed):
    """README's table of sizes is the one that `sizes.py` prints, and its sentence has the same lengths."""
    lines = printed["sizes"][0].splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert rows and all(row in README for row in rows), "\n".join(rows)
    lengths = re.search(r"k4v2_g128 is smaller than 16 bits from (\d+) tokens on, than fp8 from (\d+)", printed["sizes"][0])
    assert lengths is not None
    assert all(f"{int(length):,}" in README for length in lengths.groups())


def test_expected_errors_of_readme(printed):
    """README's expected errors are those that `expected_errors.py` prints, up to what random numbers differ by."""
    rows = re.findall(r"\| `(k\dv\d_g128)` \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", printed["expected_errors"][0])
    said = {preset: float(error) for error, preset in re.findall(r"(0\.\d+)\s+with\s+`(k\dv\d_g128)`", README)}
    assert rows and {preset for preset, _ in rows} == said.keys()
    for preset, error in rows:
        assert float(error) == pytest.approx(said[preset], rel=0.05, abs=0.001), preset


def test_examples_are_listed():
    """The gallery's page names every example."""
    page = (ROOT / "docs" / "examples" / "README.md").read_text()
    assert [name for name in EXAMPLES if f"{name}.py" not in page] == []
