"""Every kernel compiles for every architecture, without a GPU, within its shared memory; recorded counts don't grow.

The budget of the decode kernel is what its speed rests on (`docs/performance.md`). A compiler or a change that exceeds it isn't
wrong, but slower: look at the disassembly.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import kvarn_triton
from kvarn_triton.gpu import GPUS
from kvarn_triton.testing.compiler import TARGETS, negated_extremes, overwritten_operands, reads_of_unset_registers

TESTS = Path(__file__).parent
PACKAGE = Path(kvarn_triton.__file__).parent
OLDEST = triton.__version__.startswith("3.6.")

INSTRUCTIONS_PER_PAGE = 2300
"""Most warp instructions of the loop over pages for one page of 128 tokens: k4v2_g128, head_dim 128, float16, 8 query heads per
kv head, all warps of a program together. An H200 has about 3,050 issue slots in the time that it needs to read the page."""
BUDGET_CASES = ("decode quantized only, group 8", "decode")
"""Without and with a sink and a tail."""
INSTRUCTIONS_PER_PAGE_OF_COLUMNS = 1500
"""The same of 4 query heads per kv head, which are columns of products; the loop spills nothing."""
COLUMN_CASES = ("decode quantized only, group 4", "decode scheduled, group 4")
SPILLS_PER_PAGE = 0 if OLDEST else 24
"""Most loads and stores of spilled registers in that loop, which are among its instructions. The kernel needs all 255
registers; Triton 3.9 spills some of them, 20 instructions on sm100, in a loop that is shorter than that of Triton 3.6."""
INSTRUCTIONS_PER_PAGE_OF_SHARING = 2600
"""The same of keys of 6 bits and values of 5. The page has 1.7 times the bytes; with 4 bits it takes 1,835 at most
(`perf/results/bits_cpu.txt`)."""
SPILLS_OF_SHARING = 85 if OLDEST else 8
"""Loads and stores of spilled registers among them."""
INSTRUCTIONS_PER_PAGE_OF_ROWS = {"prefill 16 rows": 4000, "prefill 32 rows": 5700}
"""The same of prefill attention for as many query rows with a sink and a tail, masks included, which most pages skip."""
INSTRUCTIONS_OF_DRAFTS = {"drafts 16 rows": 840, "drafts 32 rows": 1130}
"""Most instructions of one of the four warps of `attention/hopper_drafts.py` for a page. Most pages skip the masks, and the
branch that scales sums, about 110 and 190 of them."""
SPILLS_OF_DRAFTS = {"drafts 16 rows": 20, "drafts 32 rows": 45}
"""Loads and stores of spilled registers among them."""
BARRIERS_OF_DRAFTS = 5
"""Barriers of such a page; one of them is in that branch."""
INSTRUCTIONS_PER_STEP = 5900
"""Most warp instructions of a step of the balancing of a 128 x 128 tile, all warps of a program together. There are three of
them, nine as published: the floor is three multiply-adds per number and direction, 3,072 of them."""
INSTRUCTIONS_PER_FIT = 6700
"""The same of one fit of its values; the floor is ten instructions per number, 5,120 of them."""
INSTRUCTIONS_PER_READ = 14000
"""Most warp instructions of the loops that dequantize the keys and the values of a page of 128 tokens: k4v2_g128, head_dim 128,
float16, one kv head. The floor is seven additions per number, 7,168 of them; an H200 has about 18,000 issue slots in the time
that a copy of the bytes takes."""
INSTRUCTIONS_PER_64_LATENTS = 5300
"""Most warp instructions of the loop over pages of latent attention for 64 tokens: 4 bits, 16 heads, all warps of a program
together. An H200 has about 6,300 issue slots in the time that it needs to read them."""
INSTRUCTIONS_PER_64_OF_GROUPS = 6700 if OLDEST else 7200
"""The same of the kernel of warp groups, 8 bits too. Fewer of them took as long (`docs/notes/mla.md`)."""
SPILLS_OF_GROUPS = 12 if OLDEST else 40
WARPS_OF_TILES = 16
"""Of the form for tiles of 64 rows; that of columns has 24."""
INSTRUCTIONS_PER_64_OF_TILES = 6500
"""The same of its tiles of 64 rows."""
INSTRUCTIONS_PER_STEP_OF_PROMPTS = 520
"""Of one warp of `attention/hopper.py` for 128 tokens (64 of more than 128 channels), where nothing is masked or spilled."""
WAITS_OF_TILES = 14
"""Most instructions around products in a loop of these. ptxas may wait for each product where it lacks registers: 88."""
INSTRUCTIONS_PER_32_LISTED = 5000
"""The same for 32 tokens of a list, each with the scales of its own page."""
MLA_BUDGET_TARGETS = ("sm90", "sm100")
READ_TRIPS = (8, 16)
"""How often the loops over values and over keys run there; that of values is the larger one."""
BUDGET_TARGETS = ("sm80", "sm90", "sm100")
EARLY_TARGETS = ("sm90", "sm100", "sm120")
"""Where a merge starts while the kernel ends whose results it merges: it must wait before it stores, and be let to start."""


USUAL_PARTS = "main", "decode", "prefill", "scratch", "encode", "mla", "mla encode"
SPLIT_TARGETS = "sm90", "gfx942"
"""Targets that compile so many layouts that each part is a test."""
PROCESSES = [
    *((target, (part,)) for target in SPLIT_TARGETS for part in USUAL_PARTS),
    ("sm80", ("main", "decode", "prefill", "scratch")),
    ("sm100", ("main", "decode", "prefill", "scratch", "encode", "mla")),
    ("sm86", ("prefill", "scratch")),
]
"""What one process compiles."""
OTHER_PROCESSES = [("sm90", (part,)) for part in ("decode other", "prefill other")]
"""Layouts and masks beside the usual ones: of the oldest Triton; the newest compiles them before a release."""
PROCESSES += OTHER_PROCESSES if OLDEST else []
RARE_PROCESSES = [
    *([] if OLDEST else OTHER_PROCESSES),
    *(("sm90", (part,)) for part in ("decode rare", "prefill rare", "encode other", "encode largest", "mla encode other")),
    *(("gfx942", (part,)) for part in ("decode other", "prefill other", "mla encode")),
    ("sm80", ("encode", "mla", "mla encode")),
    ("sm86", ("main", "decode", "encode", "mla", "mla encode")),
    ("sm100", ("mla encode",)),
    *((target, USUAL_PARTS) for target in ("sm89", "sm120", "gfx950")),
]
"""What is compiled before a release only: targets that differ from others in the shared memory of a program, of which one has
the least, and what takes minutes. Encoders do: two targets compile those of the usual shapes in CI with the oldest Triton, and
two with the newest; one target those of rare shapes."""
KERNELS = {
    "main": (
        *("append_tokens", "cut_back", "decode_attention", "dequantize", "dequantize_pages", "hadamard", "merge_splits"),
        *("merge_states", "pack", "quantize", "unpack", "variance_normalize", "copy_raw_pages", "plan_step", "read_tokens"),
        "schedule_decode",
    ),
    "decode": ("decode_attention", "merge_splits"),
    "prefill": ("merge_queries", "prefill_attention"),
    "decode other": ("decode_attention", "merge_splits"),
    "prefill other": ("prefill_attention",),
    "decode rare": ("decode_attention", "merge_splits"),
    "prefill rare": ("prefill_attention",),
    "scratch": ("expand_pages", "prefill_attention"),
    "encode": ("advance_quantized", "append_new", "commit_pages", "store_pages", "write_tokens"),
    "mla": (
        *("mla_append_tokens", "mla_decode", "mla_dequantize_pages", "mla_find_tokens", "mla_merge", "mla_rotate_queries"),
        "mla_sparse",
    ),
    "mla encode": ("mla_advance", "mla_commit_pages", "mla_store_pages", "mla_write_pages", "plan_step"),
    "mla encode other": ("mla_advance", "mla_commit_pages", "mla_store_pages", "mla_write_pages", "plan_step"),
    "encode other": ("advance_quantized", "append_tokens", "commit_pages", "store_pages", "write_tokens"),
    "encode largest": ("advance_quantized", "commit_pages", "store_pages", "write_tokens"),
}
"""Kernels that a part launches, all of the package together, but for those of one target."""
KERNELS_OF_TARGET = {
    ("sm90", "prefill"): ("attend_drafts",),
    ("sm90", "scratch"): ("attend_hopper", "list_tiles", "plain_raw"),
    ("sm90", "mla"): ("mla_hopper",),
}


def processes() -> list:
    """Return the parameters of a test: what one process compiles, named by its target and its part."""
    params = []
    rare = [(target, (part,)) for target, parts in RARE_PROCESSES for part in parts]
    usual = [(target, parts) for target, parts in PROCESSES if (target, parts) not in rare]
    for target, parts in usual + RARE_PROCESSES:
        marks = [] if parts == ("main",) else [pytest.mark.slow("the compiler")]
        if (target, parts) in RARE_PROCESSES:
            marks.append(pytest.mark.rare)
        if parts[0] in ("encode other", "encode largest"):
            marks.append(pytest.mark.skipif(not OLDEST, reason="the oldest Triton compiles encoders of rare shapes"))
        name = target if parts == USUAL_PARTS else f"{target}-{parts[0]}".replace(" ", "-")
        params.append(pytest.param(target, parts, marks=marks, id=name))
    return params


def compiled(target: str, parts: tuple[str, ...], log: Path) -> list[dict]:
    """Compile parts for a target and return what every kernel uses."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), environment.get("PYTHONPATH", "")])
    with log.open("w") as errors:  # a compiler that fails can print megabytes
        command = [sys.executable, str(TESTS / "compile_worker.py"), target, *parts]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert result.returncode == 0, log.read_text()[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(("target", "parts"), processes())
def test_compiles(target, parts, tmp_path):
    """All kernels of all cases compile and fit the shared memory of one program (KF 29: head_dim 512 too)."""
    kernels = compiled(target, parts, tmp_path / "errors")
    expected = {name for part in parts for name in KERNELS[part] + KERNELS_OF_TARGET.get((target, part), ())}
    assert {kernel["kernel"] for kernel in kernels} >= {f"_kvarn_{name}_kernel" for name in expected}
    for kernel in kernels:
        assert kernel["shared"] <= GPUS[target].program_bytes, kernel
        assert not kernel["unset"] and not kernel["overwritten"] and not kernel["negated"], kernel
        assert kernel["starts_early"] == kernel["waits"], kernel
        if kernel["kernel"] == "_kvarn_merge_queries_kernel":
            assert kernel["starts_early"] == (target in EARLY_TARGETS), kernel
    for first, second in itertools.pairwise(kernels):
        assert first["lets_next_start"] or not second["starts_early"], (first, second)
    if target in BUDGET_TARGETS:
        for part in {"main", "decode", "prefill", "encode"}.intersection(parts):
            check_budgets(part, kernels)
    if target in MLA_BUDGET_TARGETS and "mla" in parts:
        case = "mla 16 heads, no warp groups" if target == "sm90" else "mla 16 heads"
        few = next(k for k in kernels if (k["kernel"], k["case"]) == ("_kvarn_mla_decode_kernel", case))
        assert 0 < few["page_loop"] * few["num_warps"] <= INSTRUCTIONS_PER_64_LATENTS, few
        assert few["loop_spills"] <= 4, few
        lists = next(k for k in kernels if (k["kernel"], k["case"]) == ("_kvarn_mla_sparse_kernel", "mla lists"))
        assert 0 < lists["page_loop"] * lists["num_warps"] <= INSTRUCTIONS_PER_32_LISTED, lists
        assert lists["loop_spills"] == 0, lists
    for kernel in kernels:
        if kernel["kernel"] == "_kvarn_attend_drafts_kernel" and kernel["case"] in INSTRUCTIONS_OF_DRAFTS:
            assert 0 < kernel["page_loop"] <= INSTRUCTIONS_OF_DRAFTS[kernel["case"]], kernel
            assert kernel["loop_spills"] <= SPILLS_OF_DRAFTS[kernel["case"]], kernel
            assert kernel["page_barriers"] <= BARRIERS_OF_DRAFTS, kernel
        if kernel["kernel"] == "_kvarn_attend_hopper_kernel":  # loops of both groups: steps with a mask, and the others
            assert kernel["product_waits"] <= 4 and kernel["loops"][2] <= INSTRUCTIONS_PER_STEP_OF_PROMPTS, kernel
        if kernel["kernel"] != "_kvarn_mla_hopper_kernel":
            continue
        if kernel["num_warps"] == WARPS_OF_TILES:
            assert kernel["product_waits"] <= WAITS_OF_TILES, kernel
            if "quantized only" in kernel["case"]:  # loops of the groups that take turns, and of the one that makes numbers
                first, second, numbers = kernel["loops"][:3]
                assert kernel["loop_spills_of_all"] <= (2 if OLDEST else 4), kernel
                assert 2 * (first + second) + 4 * numbers <= INSTRUCTIONS_PER_64_OF_TILES, kernel
        elif "quantized only" in kernel["case"]:
            # Loops of the warps that sum, compute scores (twice, for every second block), multiply queries, and weigh.
            sums, even, odd, queries, weigh = kernel["loops"][:5]
            assert kernel["loop_spills_of_all"] <= SPILLS_OF_GROUPS, kernel
            assert 4 * (sums + max(even, odd) + queries + weigh) <= INSTRUCTIONS_PER_64_OF_GROUPS, kernel


def check_budgets(part: str, kernels: list[dict]) -> None:
    """Assert what the kernels of a part may use."""

    def find(name: str, case: str) -> dict:
        return next(k for k in kernels if (k["kernel"], k["case"]) == (f"_kvarn_{name}_kernel", case))

    if part == "main":
        for case in BUDGET_CASES:
            decode = find("decode_attention", case)
            assert 0 < decode["page_loop"] * decode["num_warps"] <= INSTRUCTIONS_PER_PAGE, decode
            assert decode["loop_spills"] <= SPILLS_PER_PAGE, decode
        for case in COLUMN_CASES:
            decode = find("decode_attention", case)
            assert 0 < decode["page_loop"] * decode["num_warps"] <= INSTRUCTIONS_PER_PAGE_OF_COLUMNS, decode
            assert decode["loop_spills"] == 0, decode
        read = find("dequantize_pages", "small")
        values, keys = read["loops"][:2]
        assert read["num_warps"] == 1 and values > keys, read
        assert values * READ_TRIPS[0] + keys * READ_TRIPS[1] <= INSTRUCTIONS_PER_READ, read
        assert read["stack"] == 0 and read["registers"] <= 128, read
    elif part == "decode":
        decode = find("decode_attention", "decode quantized only, 6 and 5 bits")
        assert 0 < decode["page_loop"] * decode["num_warps"] <= INSTRUCTIONS_PER_PAGE_OF_SHARING, decode
        assert decode["loop_spills"] <= SPILLS_OF_SHARING, decode
    elif part == "prefill":
        for case, most in INSTRUCTIONS_PER_PAGE_OF_ROWS.items():
            prefill = find("prefill_attention", case)
            assert 0 < prefill["page_loop"] * prefill["num_warps"] <= most, prefill
    else:
        for name, case in (("store_pages", "encode"), ("commit_pages", "encode"), ("write_tokens", "write")):
            encode = find(name, case)
            loops = {name: encode[name] * encode["num_warps"] for name in ("balance_loop", "fit_loop")}
            assert loops["balance_loop"] <= INSTRUCTIONS_PER_STEP and loops["fit_loop"] <= INSTRUCTIONS_PER_FIT, encode
            assert any(loops.values()), encode  # some targets compile a kernel with an encoder of no fits
            assert encode["loop_spills_of_all"] == 0, encode


def test_every_part_is_compiled():
    """Every target compiles the usual parts, and all parts together launch every kernel of the package."""
    for target in TARGETS:
        assert {part for name, parts in PROCESSES + RARE_PROCESSES if name == target for part in parts} >= set(USUAL_PARTS)
    parts = *(KERNELS[part] for part in USUAL_PARTS), *KERNELS_OF_TARGET.values()
    names = {f"_kvarn_{name}_kernel" for part in parts for name in part}
    found = {
        name for path in PACKAGE.rglob("*.py") for name in re.findall(r"^def (_kvarn_\w+_kernel)\(", path.read_text(), re.M)
    }
    assert names | {"_kvarn_exchange_kernel"} == found  # which `parallel_worker.py` compiles


def test_unset_registers_are_found():
    """A descriptor whose lower half is a copy that the compiler lost is found; what was written before it is read is not."""
    whole = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0010*/                   UMOV UR14, 0x20 ;
        /*0020*/                   UMOV UR15, 0x80000020 ;
        /*0030*/                   UIADD3 UR18, UP1, UR14, 0x2, URZ ;
        /*0040*/                   UIADD3.X UR19, UR15, URZ, URZ, UP1, !UPT ;
        /*0050*/               @P0 LDG.E R2, desc[UR4][R8.64] ;
        /*0060*/                   HGMMA.64x128x16.F32 R88, R24, gdesc[UR12], R88 ;
        /*0070*/                   HGMMA.64x128x16.F32 R88, R28, gdesc[UR16], R88, gsb0 ;
    """
    assert reads_of_unset_registers(whole) == []
    lost = whole.replace("UR14, 0x2, URZ", "UR18, 0x2, URZ").replace("UR15, URZ, URZ, UP1", "UR19, URZ, URZ, UP1")
    assert len(reads_of_unset_registers(lost)) == 2
    assert len(reads_of_unset_registers(whole.replace("UMOV UR15", "UMOV UR16"))) == 1


def test_overwritten_operands_are_found():
    """A left operand from before a loop that the loop uses as scratch registers is found; one that is made in it is not."""
    whole = """
        /*0000*/                   F2FP.F16.F32.PACK_AB R168, R1, R2 ;
    .L_x_4:
        /*0010*/                   HGMMA.64x64x16.F32 R24, R168, gdesc[UR20], RZ, !UPT ;
        /*0020*/                   FMUL R184, R24, UR42 ;
        /*0030*/                   F2FP.F16.F32.PACK_AB R184, R184, R25 ;
        /*0040*/                   LDSM.16.M88.4 R185, [R3] ;
        /*0050*/                   HGMMA.64x128x16.F32 R88, R184, gdesc[UR20].tnspB, R88 ;
        /*0060*/               @P5 BRA `(.L_x_4) ;
    """
    assert overwritten_operands(whole) == []
    lost = whole.replace("FMUL R184", "FMUL R170").replace("LDSM.16.M88.4 R185", "LDSM.16.M88.4 R169")
    assert len(overwritten_operands(lost)) == 1
    assert overwritten_operands(lost.replace("LDSM.16.M88.4 R169", "MOV R170")) == []
    assert len(overwritten_operands(whole.replace("HGMMA.64x64x16.F32 R24", "HGMMA.64x64x16.F32 R140"))) == 1
    # Weights that the next trip multiplies, because nothing in their own trip reads them.
    made = whole.replace("PACK_AB R184, R184, R25", "PACK_AB R169, R184, R25")
    assert overwritten_operands(made) == []
    assert len(overwritten_operands(made.replace("R88, R184, gdesc", "R88, R168, gdesc"))) == 1


def test_negated_extremes_are_found():
    """The larger of three numbers, one of them negated: ptxas loses the sign. Two numbers, or a difference, are right."""
    lost = """
	neg.s32 	%r1, %r248;
	max.s32 	%r613, %r612, %r1;
	max.s32 	%r54, %r613, %r625;
"""
    assert negated_extremes(lost) == ["max.s32 %r613, %r612, %r1;"]
    assert negated_extremes(lost.replace("%r54, %r613", "%r54, %r614")) == []
    assert negated_extremes(lost.replace("neg.s32 \t%r1, %r248", "sub.s32 \t%r1, %r250, %r248")) == []
    assert negated_extremes(lost.replace("max.s32 \t%r54", "min.s32 \t%r54")) == []
