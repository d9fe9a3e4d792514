"""Several devices in one process: launches happen where the tensors are, and tensors of two devices are refused by name."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import pytest
import torch
from error_cases import WRONG, valid_arguments
from helpers import assert_same_bits

import kvarn_triton as kvarn
from kvarn_triton import launch

PACKAGE = Path(kvarn.__file__).parent
FIRST = {"store_pages": "pages", "append_tokens": "raw_pages", "decode_attention": "pages", "prefill_attention": "pages"}
"""The tensor whose device the others must have, where it isn't the first one in the table of errors."""


def test_launches_are_on_the_tensors_device():
    """No kernel is launched without `launch.on`, which knows the device of a tensor."""
    launches = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = ast.unparse(node.func.value)
                if "_kvarn_" in kernel:
                    launches += 1
                    assert kernel.startswith("on("), f"{path.name}: {kernel}"
    assert launches >= 17


class Recorder:
    """Stands in for a kernel, and for the driver: records what is launched on which device."""

    def __init__(self) -> None:
        self.current, self.launched = 0, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append((self.current, grid, args, kwargs))

    @contextlib.contextmanager
    def device(self, index):
        """Make a device the current one for a while."""
        before, self.current = self.current, index
        yield
        self.current = before


def test_guard(monkeypatch):
    """A launch makes the tensor's device current, and the old one again after it; without a guard if it is that already."""
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: recorder.current)
    monkeypatch.setattr(torch.cuda, "device", recorder.device)
    for index in (0, 1, -1):
        tensor = torch.zeros(1)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda self, index=index: index)
        kernel = launch.on(tensor, recorder)
        assert (kernel is recorder) == (index != 1)
        kernel[(3, 2)](tensor, SIZE=index)
        device, grid, args, kwargs = recorder.launched.pop()
        assert (device, grid, args[0] is tensor, kwargs) == (max(index, 0), (3, 2), True, {"SIZE": index})
        assert recorder.current == 0


@pytest.mark.parametrize("function", WRONG)
def test_mixed_devices(function, device):
    """Each tensor on another device than the others is refused by its name; those of the device `meta` have no memory."""
    arguments = valid_arguments(device)[function]
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    first = FIRST.get(function, "pages" if "pages" in names else names[0])
    for name in names:
        if name != first:
            with pytest.raises(ValueError, match=f"^{name}: expected device {device}, got meta"):
                getattr(kvarn, function)(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("function", WRONG)
def test_other_device(function):
    """With tensors on the second GPU and the first one current, results are those of the second one current."""
    device = torch.device("cuda", 1)
    results = []
    for current in (0, 1):
        torch.manual_seed(0)
        with torch.cuda.device(current):
            arguments = valid_arguments(device)[function]
            returned = getattr(kvarn, function)(**arguments)
            assert torch.cuda.current_device() == current
        torch.cuda.synchronize(device)
        tensors = list(arguments.values()) + list(returned if isinstance(returned, tuple) else [returned])
        results.append([x for x in tensors if isinstance(x, torch.Tensor)])
    for other, own in zip(*results, strict=True):
        assert other.device == device
        assert_same_bits(other, own)
