"""Put the Python of a vLLM wheel over the compiled functions of an installed one: python vllm_overlay.py WHEEL FOLDER

FOLDER then has a package `vllm` for the front of PYTHONPATH: everything of the wheel but what is compiled, and the compiled
libraries of the vLLM that this Python has, which may be of another release. There is no wheel for CPUs of some releases.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path


def main(wheel: str, folder: str) -> None:
    """Unpack the wheel, and copy the libraries."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "no vLLM is installed"
    with zipfile.ZipFile(wheel) as packed:
        names = [name for name in packed.namelist() if name.startswith("vllm/") and not name.endswith(".so")]
        packed.extractall(folder, names)
    for library in sorted(Path(spec.origin).parent.glob("*.so")):
        shutil.copy(library, Path(folder) / "vllm")
        print(f"{library.name}: of the installed vLLM")
    print(f"{len(names)} files of {Path(wheel).name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
