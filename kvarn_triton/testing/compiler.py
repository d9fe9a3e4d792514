"""Compile the package's kernels for GPUs that are not here, and count what the compiler made of them.

Inside `compile_for("sm90")` the public functions compile the kernels that they would launch, with the very arguments and
configurations of the call, and launch nothing:

    with compile_for("sm90") as kernels:
        store_pages(k, v, pages, page_ids, layout)
    print(resources(kernels[0]))
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .. import gpu

TARGETS = {
    arch: GPUTarget("cuda", int(arch[2:]), row.wavefront) if row.nvidia else GPUTarget("hip", arch, row.wavefront)
    for arch, row in gpu.GPUS.items()
}
"""Every architecture that the kernels are compiled for in the tests."""

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_OPCODE = re.compile(r"(?:/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?|^\s+(?=(?:v|s|ds|global|buffer|flat|scratch)_))(\w+)")
_LABEL = re.compile(r"^\s*(\.L_x_\d+|\.LBB\d+_\d+):")
_UNIFORM = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s+([^;]*\bUR\d[^;]*);")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s+([^;]*);")
_PREDICATE = re.compile(r"!?U?P(?:\d+|T)")
_BRANCH = re.compile(r"(?:BRA\b|s_c?branch\w*).*?(\.L_x_\d+|\.LBB\d+_\d+)")


class _OfflineDriver:
    """As much of a driver as `JITFunction.warmup` asks for; one device number per target, because kernels are cached by it."""

    def __init__(self, target: GPUTarget) -> None:
        device = 1000 + list(TARGETS.values()).index(target)
        self.get_current_target = lambda: target
        self.get_current_device = lambda: device
        self.get_current_stream = lambda device=0: 0


@dataclass
class Compiled:
    """One compiled kernel: its name, grid, target and Triton's object."""

    name: str
    grid: tuple[int, ...]
    target: str
    kernel: Any


@contextlib.contextmanager
def compile_for(target: str) -> Iterator[list[Compiled]]:
    """Make launches compile for `target` and return at once; yields the list to which compiled kernels are added.

    Args:
        target: a key of `TARGETS`.

    Raises:
        RuntimeError: in Triton's interpreter, where nothing is compiled.
    """
    if gpu.INTERPRETED:
        raise RuntimeError("compile_for: expected Triton's compiler, got the interpreter (TRITON_INTERPRET)")
    compiled: list[Compiled] = []
    run = JITFunction.run

    def warm(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.fn.__name__, tuple(grid), target, kernel))
        return kernel

    had_gpu = torch.cuda.is_available()
    driver.set_active(_OfflineDriver(TARGETS[target]))
    try:
        with (
            mock.patch.object(JITFunction, "run", warm),
            mock.patch.object(gpu, "on_device", lambda tensor: True),
            mock.patch.object(gpu, "uses_ptx", lambda: TARGETS[target].backend == "cuda"),
            mock.patch.object(gpu, "arch_of", lambda device: target),
        ):
            yield compiled
    finally:
        if had_gpu:
            driver.reset_active()


@dataclass
class Resources:
    """What one program of a kernel uses: per thread registers and stack bytes, per program shared bytes and instructions.

    Attributes:
        registers: registers of a thread; AMD counts vector registers.
        stack: bytes of local memory of a thread; spilled registers are among them.
        shared: bytes of shared memory of a program.
        num_warps: warps of a program.
        instructions: static instructions of the whole kernel.
        loops: opcode counts of each innermost loop body, largest first: what one trip costs one warp.
        unset: instructions that read a uniform register which nothing has written (NVIDIA). There are none in a right
            program; ptxas 12.8 has lost the copy of a descriptor of a matrix in shared memory.
        overwritten: products of a loop whose left operand is in registers from before the loop, and does not outlive the first
            trip (NVIDIA). There are none in a right program; ptxas 12.8 has lost the copy of such an operand too.
        negated: extremes of three integers, one of them negated, in what the assembler is given (NVIDIA). ptxas 12.8 to 13.0
            lose the sign for sm90 and sm100, so that kernels are written without them.
    """

    registers: int
    stack: int
    shared: int
    num_warps: int
    instructions: int
    loops: list[collections.Counter[str]] = field(default_factory=list)
    unset: list[str] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    negated: list[str] = field(default_factory=list)

    @property
    def product_loop(self) -> collections.Counter[str]:
        """The loop with the most products of the tensor cores, the shortest of those: the loop over pages of decode.

        The compiler may also make a loop of what comes between pages, with a page of its own in it.
        """

        def products(loop: collections.Counter[str]) -> int:
            return sum(count for name, count in loop.items() if name.startswith(("IMMA", "HMMA", "HGMMA", "v_mfma")))

        return max(self.loops, key=lambda loop: (products(loop), -loop.total()), default=collections.Counter())


def programs_per_multiprocessor(used: Resources, target: str) -> int:
    """Return how many programs with these resources a multiprocessor of `target` holds at once.

    Registers are counted per scheduler (NVIDIA: 16,384 registers, warps rounded up to 256; AMD: 512 per lane, rounded up to
    8), shared memory per multiprocessor with 1 KiB of overhead per program (NVIDIA).
    """
    if TARGETS[target].backend == "cuda":
        warps = 16384 // max(-(-used.registers * 32 // 256) * 256, 1)
        shared = (gpu.GPUS[target].program_bytes + 1024) // (used.shared + 1024)
    else:
        warps = 512 // max(-(-used.registers // 8) * 8, 1)
        shared = gpu.GPUS[target].program_bytes // max(used.shared, 1)
    return min(4 * warps // used.num_warps, shared, 32)


def _run_tool(name: str, flags: list[str], path: str) -> str:
    command = [os.path.join(_TOOLS, name), *flags, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _innermost_loops(lines: list[str]) -> list[list[str]]:
    """Return the lines of every innermost loop body of a disassembly."""
    labels, spans = {}, []
    for i, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label.group(1)] = i
    for i, line in enumerate(lines):
        branch = _BRANCH.search(line)
        if branch and labels.get(branch.group(1), i) < i:
            spans.append((labels[branch.group(1)], i + 1))
    return [
        lines[first:last]
        for first, last in spans
        if not any(span != (first, last) and first <= span[0] and span[1] <= last for span in spans)
    ]


def find_loops(sass: str) -> list[collections.Counter[str]]:
    """Return the opcode counts of every innermost loop body in a disassembly, largest first."""
    bodies = _innermost_loops(sass.splitlines())
    loops = [collections.Counter(op.group(1) for op in map(_OPCODE.search, body) if op) for body in bodies]
    return sorted((counts for counts in loops if counts.total() > 4), key=lambda counts: -counts.total())


def _registers_written(name: str) -> int:
    """Return how many registers an instruction of this name writes."""
    if product := re.match(r"HGMMA\.64x(\d+)x", name):
        return int(product.group(1)) // 2
    if matrices := re.search(r"88\.(\d)$", name):
        return int(matrices.group(1))
    size = re.search(r"\.(64|96|128)\b", name)
    return int(size.group(1)) // 32 if size else 2 if "WIDE" in name else 1


def overwritten_operands(sass: str) -> list[str]:
    """Return the products of a disassembly (HGMMA) whose left operand a loop brings along in registers, and overwrites.

    What is written last is the operand of the next trip if it is a copy, or weights (F2FP) that nothing in their trip reads.
    """
    found = []
    for body in _innermost_loops(sass.splitlines()):
        brought: dict[int, str] = {}
        writer: dict[int, str] = {}
        read: set[int] = set()  # since it was written last
        for match in filter(None, map(_INSTRUCTION.search, body)):
            name, operands = match.group(1), [operand.strip() for operand in match.group(2).split(",")]
            if name.startswith("HGMMA") and re.fullmatch(r"R\d+", operands[1]):
                first = int(operands[1][1:])
                brought |= {register: match.group(0).strip() for register in range(first, first + 4) if register not in writer}
                read.update(range(first, first + 4))
            target = next((operand for operand in operands if not _PREDICATE.fullmatch(operand)), "")
            read.update(
                int(register) for operand in operands if operand != target for register in re.findall(r"\bR(\d+)", operand)
            )
            if re.fullmatch(r"R\d+", target):
                written = range(int(target[1:]), int(target[1:]) + _registers_written(name))
                writer |= dict.fromkeys(written, name)
                read.difference_update(written)
        for register, line in brought.items():
            last = writer.get(register, "MOV")
            if not (last.startswith("MOV") or (last.startswith("F2FP") and register not in read)):
                found.append(line)
    return sorted(set(found))


def reads_of_unset_registers(sass: str) -> list[str]:
    """Return the instructions of a disassembly that read a uniform register before any instruction, in order, writes it."""
    written, found = {63}, []
    for match in _UNIFORM.finditer(sass):
        name, operands = match.group(1), [operand.strip() for operand in match.group(2).split(",")]
        # The target comes first, after predicates that the instruction sets.
        target = next((i for i, operand in enumerate(operands) if not _PREDICATE.fullmatch(operand)), 0)
        target = target if re.fullmatch(r"UR\d+", operands[target]) else -1
        size = re.search(r"\.(64|96|128|256)\b", name)
        count = int(size.group(1)) // 32 if size else 2 if "WIDE" in name else 1
        for i, operand in enumerate(operands):
            for register in map(int, re.findall(r"UR(\d+)", operand)) if i != target else ():
                wide = operand.startswith(("desc", "gdesc")) or (name.startswith("U") and name.endswith(".64"))
                read = range(register, register + (2 if wide else 1))
                if operand.startswith("gdesc") and name.startswith("HGMMA"):
                    # Descriptors of two matrices, of which the left one may be in registers instead.
                    read = range(register + (2 if operands[1].startswith("R") else 0), register + 4)
                if not written.issuperset(read):
                    found.append(match.group(0).strip())
                    written.update(read)
        if target >= 0:
            register = int(operands[target][2:])
            written.update(range(register, register + count))
    return found


def negated_extremes(ptx: str) -> list[str]:
    """Return the instructions of PTX that take an extreme of integers, one negated, and belong to an extreme of three."""
    negated = set(re.findall(r"neg\.s32\s+(%r\d+)", ptx))
    extremes = re.findall(r"((max|min)(?:\.relu)?\.s32\s+(%r\d+), (%r\d+), (\S+);)", ptx)
    kinds = {result: kind for _, kind, result, *_ in extremes}
    used = {(kind, operand) for _, kind, _, *operands in extremes for operand in operands}
    return [
        " ".join(text.split())
        for text, kind, result, *operands in extremes
        if negated.intersection(operands) and ((kind, result) in used or kind in map(kinds.get, operands))
    ]


def resources(compiled: Compiled) -> Resources:
    """Return what a compiled kernel uses, from the compiler's metadata and the disassembly."""
    metadata, asm = compiled.kernel.metadata, compiled.kernel.asm
    if "amdgcn" in asm:
        numbers = {
            key: int(match.group(1)) if (match := re.search(rf"\.{key}:\s+(\d+)", asm["amdgcn"])) else 0
            for key in ("vgpr_count", "private_segment_fixed_size")
        }
        loops = find_loops(asm["amdgcn"])
        count = sum(1 for line in asm["amdgcn"].splitlines() if _OPCODE.search(line))
        return Resources(
            numbers["vgpr_count"], numbers["private_segment_fixed_size"], metadata.shared, metadata.num_warps, count, loops
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run_tool("cuobjdump", ["-res-usage"], file.name)
        sass = _run_tool("nvdisasm", ["-c"], file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return Resources(
        registers=int(match.group(1)),
        stack=int(match.group(2)),
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        instructions=sum(1 for _ in _OPCODE.finditer(sass)),
        loops=find_loops(sass),
        unset=reads_of_unset_registers(sass),
        overwritten=overwritten_operands(sass),
        negated=negated_extremes(asm["ptx"]),
    )
