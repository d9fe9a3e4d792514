"""Record which kernels calls of many sizes, addresses and strides would compile for sm90: `python variants_worker.py`.

Prints those that `warmup` does not compile. A process of its own, because kernels that the interpreter has decorated have no
keys. Nothing is compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import variant_cases
from triton.runtime.jit import JITFunction

from kvarn_triton import configs
from kvarn_triton.inspection import compile_for

SEEDS = 80


def main() -> None:
    """Print each kernel once for each key that is new."""
    seen: set[tuple[str, str]] = set()
    new: list[str] = []
    guarded = False

    def record(self: JITFunction, key: str, signature: dict, *rest: object) -> None:
        if guarded and (self.__name__, key) not in seen:
            new.append(f"{self.__name__} {key[:2000]}")
        seen.add((self.__name__, key))

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        nonlocal guarded
        guarded = True
        yield
        guarded = False

    with (
        compile_for("sm90"),
        mock.patch.object(JITFunction, "_do_compile", record),
        mock.patch.object(configs, "num_multiprocessors", lambda device: 132),
    ):
        variant_cases.run(SEEDS, torch.device("cpu"), guard)
    assert len({name for name, _ in seen}) == 17, seen
    print("\n".join(new))


if __name__ == "__main__":
    main()
