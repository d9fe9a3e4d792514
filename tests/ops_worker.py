"""Operators on CPU tensors outside Triton's interpreter, where the reference runs. `test_ops.py` calls these functions."""

from __future__ import annotations

import torch

import kvarn_triton as kvarn
from kvarn_triton import gpu, ops
from kvarn_triton.testing import cache_case

LAYOUT = kvarn.PageLayout(64, 64, 4, 2)
NAMES = LAYOUT.name, LAYOUT.head_dim, LAYOUT.v_head_dim
OTHER_VALUES = kvarn.PageLayout(64, 64, 4, 2, v_head_dim=80)
OTHER_NAMES = OTHER_VALUES.name, OTHER_VALUES.head_dim, OTHER_VALUES.v_head_dim
SINK = 16
ENCODER = 2, True, True, 1, "length"
OPS = torch.ops.kvarn_triton


def calls() -> list[tuple]:
    """Return each operator with arguments for it; every optional argument is given at least once."""
    case = cache_case(LAYOUT, [150, 70], sink_len=SINK)
    # Results are compared, and NaN is not equal to NaN.
    case.pages[(case.pages == 255).all(-1)] = 0
    case.raw_pages.nan_to_num_(0.0)
    k, v = (torch.randn(128, 2, 64).half() for _ in range(2))
    ids, starts = torch.tensor([1, -1, 0]), torch.tensor([64, 0, 3], dtype=torch.int32)
    raw = case.raw_pages, case.raw_table, case.num_quantized, SINK
    csr = torch.tensor([0, 2, 4], dtype=torch.int32), case.block_table.flatten()
    lens, committed = case.seq_lens, case.seq_lens + 64
    options = 0.1, 90, 20.0, torch.zeros(8)  # sm_scale, window, soft_cap, sinks
    row = [2, 2, 64, 64, 4, 4, 0, 1]
    # Heads before rows: the result is contiguous all the same.
    q = torch.randn(8, 2, 64).half().transpose(0, 1)
    q5, new = torch.randn(5, 8, 64).half(), torch.randn(5, 2, 64).half()
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    out, lse, workspace = torch.zeros(2, 8, 64).half(), torch.zeros(2, 8), torch.zeros(1 << 20, dtype=torch.uint8)
    plain = q, case.pages, case.block_table, lens, *NAMES
    full = q, case.pages, None, lens, *NAMES, *raw, *options, *csr, 2, row
    many = q5, case.pages, case.block_table, lens, cu_seqlens, *NAMES, None, None, *raw
    among = torch.tensor([1, 3, 5, 0, 2]), torch.tensor([0, 3, 0, 2, 0], dtype=torch.int32)
    fresh = q5, case.pages, None, lens, cu_seqlens, *NAMES, new, new, *raw, *options, *csr, 2, False, None, *among
    tiles = torch.zeros(2, 3, 64, 2, 64).unbind(0)
    cut = case.num_quantized.clone(), *NAMES, SINK, True
    commit = case.num_quantized.clone(), *NAMES, SINK, 0, 1, True, *ENCODER
    return [
        (OPS.hadamard.default, (q, None)),
        (OPS.hadamard.into, (torch.zeros(3, 64), torch.randn(3, 64), 32)),
        (OPS.raw_slots.default, (torch.tensor([[3, 149], [-1, 69]]), case.raw_table, SINK, 64)),
        (OPS.append_tokens.default, (k[:2], v[:2], case.raw_pages, torch.tensor([5, -1]))),
        (OPS.store_pages.default, (k, v, case.pages, ids[:2], *NAMES, *ENCODER, None)),
        (OPS.store_pages.default, (k, v, case.pages, ids, *NAMES, 4, False, False, 0, "balance", starts)),
        (OPS.commit_pages.default, (case.raw_pages, case.pages, raw[1], case.block_table, committed, *commit, None, None)),
        (OPS.commit_pages.default, (case.raw_pages, case.pages, raw[1], None, committed, *commit, *csr)),
        (OPS.cut_back.default, (case.raw_pages, case.pages, raw[1], None, lens - 60, *cut, *csr)),
        (OPS.dequantize_pages.default, (case.pages, case.block_table[0, :1], *NAMES, torch.bfloat16, True)),
        (OPS.dequantize_pages.into, (*tiles, case.pages, torch.tensor([-1, 1, -1]), *NAMES, torch.float16, False)),
        (OPS.decode_attention.default, plain),
        (OPS.decode_attention.default, full),
        (OPS.decode_attention.lse, full),
        (OPS.decode_attention.into, (out, None, *plain)),
        (OPS.decode_attention.into_lse, (out, workspace, *full)),
        (OPS.prefill_attention.default, many),
        (OPS.prefill_attention.lse, fresh),
        (OPS.prefill_attention.into, (torch.zeros_like(q5), workspace, None, *many)),
        (OPS.prefill_attention.into_lse, (torch.zeros_like(q5), None, torch.zeros(6, 2, 2, 64, 64).half(), *fresh)),
        (OPS.merge_states.default, (out, lse, out + 1, lse + 1)),
        (OPS.merge_states.stacked, (torch.stack((out, out + 1, out)), torch.stack((lse, lse + 1, lse - 2)))),
        *calls_with_other_values(),
        *calls_of_steps(),
    ]


def fields_of(step: kvarn.Step) -> tuple:
    """Return a plan as operators take it."""
    s = step
    return (
        s.layout.name, s.layout.head_dim, s.layout.v_head_dim, s.seq_lens, s.cu_seqlens_q, s.block_table, s.kv_indptr,
        s.kv_indices, s.raw_table, s.num_quantized, s.sink_lens, s.slots, s.tasks, s.sink_len, s.max_query_len, s.at_once,
    )  # fmt: skip


def calls_of_steps() -> list[tuple]:
    """Return the operators of a step: of prompts and of decodes, with tables of both forms."""
    case = cache_case(LAYOUT, [150, 70], sink_len=64)
    case.pages[(case.pages == 255).all(-1)] = 0
    case.raw_pages.nan_to_num_(0.0)
    rows, lens = torch.tensor([1, 0], dtype=torch.int32), case.seq_lens
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    plain = *NAMES, lens, None, case.block_table, case.raw_table, 2, 1, 64, False, None, 1, 0, None, None, None
    csr = torch.tensor([0, 3, 6], dtype=torch.int32), torch.arange(6, dtype=torch.int32)
    full = *NAMES, lens, cu_seqlens, None, case.raw_table, 5, 3, 64, True, rows, 1, 3, lens, *csr, True
    chunk = kvarn.plan_step(
        LAYOUT, lens, cu_seqlens, None, case.raw_table, num_tokens=5, sink_len=64, kv_indptr=csr[0], kv_indices=csr[1]
    )  # fmt: skip
    step = kvarn.plan_step(LAYOUT, lens, None, case.block_table, case.raw_table, sink_len=64)
    pools, options = (case.pages, case.raw_pages), (0.1, 90, 20.0, torch.zeros(8))
    q, new = torch.randn(5, 8, 64).half(), torch.randn(5, 2, 64).half()
    among = torch.tensor([1, 3, 5, 0, 2]), torch.tensor([0, 3, 0, 2, 0], dtype=torch.int32)
    many = q, *pools, *fields_of(chunk), new, new, *options, 2, None, False, None, *among
    one = (
        torch.randn(2, 8, 1, 64).half(),
        *pools,
        *fields_of(step),
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        [2, 2, 64, 64, 4, 4, 0, 1],
    )
    workspace, scratch = torch.zeros(1 << 20, dtype=torch.uint8), torch.zeros(6, 2, 2, 64, 64).half()
    read = torch.zeros(2, 2, 160, 64), torch.zeros(2, 2, 160, 64)
    ids = torch.tensor([0, 1], dtype=torch.int32)
    return [
        (OPS.plan_step.default, plain),
        (OPS.plan_step.default, full),
        (OPS.write_tokens.default, (new, new, *pools, *fields_of(chunk), *ENCODER)),
        (OPS.attend.default, many),
        (OPS.attend.lse, one),
        (OPS.attend.into, (torch.zeros_like(q), workspace, scratch, *many)),
        (OPS.attend.into_lse, (torch.zeros_like(q), None, None, *many)),
        (OPS.read_tokens.default, (*pools, *fields_of(step), *read, ids)),
        (OPS.copy_raw_pages.default, (case.raw_pages, ids, ids + 2)),
        (OPS.cut_tokens.default, (*pools, *fields_of(step), lens - 60)),
    ]


def calls_with_other_values() -> list[tuple]:
    """Return the operators that take a layout, or k and v, with values of another head_dim than keys."""
    case = cache_case(OTHER_VALUES, [150, 70], sink_len=SINK)
    case.pages[(case.pages == 255).all(-1)] = 0
    case.raw_pages.nan_to_num_(0.0)
    k, v = torch.randn(128, 2, 64).half(), torch.randn(128, 2, 80).half()
    tables = case.raw_table, case.block_table, case.seq_lens + 64, case.num_quantized.clone()
    plain = case.q, case.pages, case.block_table, case.seq_lens, *OTHER_NAMES
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    q5, out, tiles = torch.randn(5, 8, 64).half(), torch.zeros(2, 8, 80).half(), torch.zeros(1, 64, 2, 144).split((64, 80), -1)
    fresh = q5, *plain[1:4], cu_seqlens, *OTHER_NAMES, k[:5], v[:5]
    ids = case.block_table[0, :1]
    return [
        (OPS.append_tokens.default, (k[:2], v[:2], case.raw_pages, torch.tensor([5, -1]))),
        (OPS.store_pages.default, (k, v, case.pages, torch.tensor([1, 0]), *OTHER_NAMES, *ENCODER, None)),
        (OPS.commit_pages.default, (case.raw_pages, case.pages, *tables, *OTHER_NAMES, SINK, 0, 1, True, *ENCODER, None, None)),
        (OPS.cut_back.default, (case.raw_pages, case.pages, *tables, *OTHER_NAMES, SINK, False, None, None)),
        (OPS.dequantize_pages.default, (case.pages, ids, *OTHER_NAMES, torch.float32, False)),
        (OPS.dequantize_pages.into, (*tiles, case.pages, ids, *OTHER_NAMES, torch.float32, False)),
        (OPS.decode_attention.lse, plain),
        (OPS.decode_attention.into, (out, None, *plain)),
        (OPS.prefill_attention.default, fresh),
        (OPS.prefill_attention.lse, fresh),
    ]


def check_registration() -> None:
    """Run PyTorch's own checks: schema against what is written, fake against real results, compilation against eager."""
    assert not gpu.INTERPRETED
    checked = set()
    for operator, arguments in calls():
        try:
            torch.library.opcheck(operator, arguments)
        except Exception as error:
            raise AssertionError(f"{operator}: {error}") from error
        checked.add(str(operator))
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("kvarn_triton::")}
    assert {name.removesuffix(".default").replace(".", "::", 1) for name in checked} == registered


def check_no_gradients() -> None:
    """Results require no gradients, whatever the arguments do."""
    x = torch.randn(3, 64, requires_grad=True)
    case = cache_case(LAYOUT, [70])
    out, lse = ops.decode_attention(case.q.requires_grad_(), **case.kwargs, return_lse=True)
    assert not any(result.requires_grad for result in (ops.hadamard(x), out, lse))
    compiled = torch.compile(ops.hadamard, fullgraph=True, backend="aot_eager")
    assert not compiled(x).requires_grad and torch.equal(compiled(x), kvarn.hadamard(x.detach()))
