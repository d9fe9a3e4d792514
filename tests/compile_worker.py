"""Compile kernels for one target and print what each uses, as JSON: `python compile_worker.py sm90 main decode`.

A process of its own, because kernels that the interpreter has decorated can't be compiled.
"""

from __future__ import annotations

import json
import sys

from compile_cases import PARTS

from kvarn_triton.testing.compiler import Compiled, compile_for, resources


def describe(compiled: Compiled, case: str) -> dict:
    """Return what one kernel uses."""
    used = resources(compiled)
    ptx = compiled.kernel.asm.get("ptx", "")
    return {
        "kernel": compiled.name,
        "case": case,
        "stack": used.stack,
        "shared": used.shared,
        "registers": used.registers,
        "num_warps": used.num_warps,
        "page_loop": used.product_loop.total(),
        "page_barriers": used.product_loop["BAR"],
        "unset": used.unset,
        "overwritten": used.overwritten,
        "negated": used.negated,
        "loop_spills": used.product_loop["LDL"] + used.product_loop["STL"],
        "loops": [loop.total() for loop in used.loops],
        "starts_early": getattr(compiled.kernel.metadata, "launch_pdl", False),
        "waits": "griddepcontrol.wait" in ptx.partition("st.global")[0],
        "lets_next_start": "griddepcontrol.launch_dependents" in ptx,
        # The balancing multiplies and adds, a fit adds more often than it multiplies.
        "balance_loop": max((loop.total() for loop in used.loops if loop["FFMA"] > loop["FADD"]), default=0),
        "fit_loop": max((loop.total() for loop in used.loops if loop["FFMA"] <= loop["FADD"]), default=0),
        "product_waits": max((loop["WARPGROUP"] for loop in used.loops), default=0),
        "loop_spills_of_all": sum(loop["LDL"] + loop["STL"] for loop in used.loops),
    }


def main(target: str, parts: list[str]) -> None:
    """Compile all cases of some parts for a target."""
    rows = []
    for part in parts:
        for case, call in PARTS[part](target).items():
            with compile_for(target) as kernels:
                call()
            rows += [describe(kernel, case) for kernel in kernels]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
