"""Set-up of the whole test run: options, the interpreter where there is no GPU, and poisoned memory everywhere."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, so before the package is imported
    torch.set_num_threads(1)  # tensors are small: threads cost more than they gain
    from quick_interpreter import quicken

    with contextlib.suppress(AttributeError):  # then tests take longer
        quicken()


pytest.register_assert_rewrite("server_machine")  # its assertions say what they compare, as those in files of tests do


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this test suite."""
    parser.addoption("--all", action="store_true", help="run tests that take minutes, too")
    parser.addoption("--release", action="store_true", help="run what --all runs, and what is compiled before a release only")
    parser.addoption("--server-steps", type=int, default=0, metavar="N", help="random requests of test_server.py's long run")


def pytest_configure(config: pytest.Config) -> None:
    """Say what marks mean."""
    config.addinivalue_line("markers", "slow(what): minutes of `what`; runs with --all, and what interprets on a GPU too")
    config.addinivalue_line("markers", "rare: minutes of the compiler, for what seldom differs; runs with --release")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let a process that has no more tests take some of another one."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow and rare tests; those that run are first, so that no process works on one when the others are done."""
    fast = {"the interpreter"} if torch.cuda.is_available() else set()
    every = config.getoption("release")
    for item in items:
        mark = item.get_closest_marker("slow")
        if item.get_closest_marker("rare") and not every:
            item.add_marker(pytest.mark.skip(reason="compiled before a release: run with --release"))
        elif mark and mark.args[0] not in fast and not (every or config.getoption("all")):
            item.add_marker(pytest.mark.skip(reason=f"minutes of {mark.args[0]}: run with --all"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, or with the largest integer, so that output that nobody wrote can't pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        # The interpreter's numpy: log2 of 0 is meant to be -inf, and masked-out lanes compute anything.
        computing = "numpy|triton|quick_interpreter|kvarn_triton.tile.interpreted"
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=computing)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="triton")
        # Triton 3.9 announces another default of enable_fp_fusion; kernels that need it off say so.
        warnings.filterwarnings("ignore", message=".*FP_FUSION")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the reference compute, as it does on CPU tensors: kernels have their own tests."""
    from kvarn_triton import gpu

    monkeypatch.setattr(gpu, "on_device", lambda tensor: tensor.is_cuda)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list to which each launch of attention over plain tokens adds its records [programs, numbers].

    There are two multiprocessors, so that one program has all that a tile sees.
    """
    from kvarn_triton import gpu
    from kvarn_triton.attention import plain

    found, launch = [], plain.launch_records
    monkeypatch.setattr(gpu, "num_multiprocessors", lambda device: 2)

    def spy(records: torch.Tensor, *args: object) -> None:
        launch(records, *args)
        found.append(records.clone())

    monkeypatch.setattr(plain, "launch_records", spy)
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Tiny models of transformers by family, made once for a file."""
    from transformers_models import make_models

    return make_models()


@pytest.fixture
def llama(models: dict[str, Any]) -> Any:
    """Return a Llama whose attention reads pages."""
    models["llama"].set_attn_implementation("kvarn")
    return models["llama"]
