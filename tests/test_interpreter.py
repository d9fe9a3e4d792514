"""Triton's interpreter as tests run it computes what it computes otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow("the interpreter")
def test_quick_interpreter():
    """`quick_interpreter.py` changes no bit of what kernels return."""
    digests = []
    for arguments in ([], ["quick"]):
        command = [sys.executable, "-W", "ignore", str(TESTS / "quick_worker.py"), *arguments]
        digests.append(subprocess.run(command, check=True, capture_output=True, text=True, cwd=TESTS.parent).stdout)
    assert len(digests[0]) == 65 and digests[0] == digests[1]
