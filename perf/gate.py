"""The correctness gate: every operation against `kvarn_triton.reference`, before any of them is timed.

Rotation, packed bytes, stored scales and dequantized numbers must be equal bit for bit to what the reference computes on
the CPU. Attention is compared in float64 on the dequantized cache: at most twice the error of the same formula computed
with PyTorch in the dtype of the query (`cases.decode_errors`).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Iterator

import torch
from cases import DEFAULT_SHAPES, SHAPES, Shape, build_cache, decode_errors, relative_error
from common import DEFAULT_PRESETS, Options, Row, progress, sweep

import kvarn_triton as kvarn
from kvarn_triton import PageLayout, reference

ERROR_RATIO = 2.0


def device_of_gate() -> str:
    """Return where kernels run: the GPU, or the CPU in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def selected_shapes(options: Options) -> list[Shape]:
    """Return the shapes that the command line names, or all with --full; a few by default."""
    return [SHAPES[name] for name in options.shapes or (SHAPES if options.full else DEFAULT_SHAPES)]


@sweep(
    "gate",
    needs="kernels",
    headers={
        "operation": "operation",
        "heads": "heads",
        "preset": "preset",
        "dtype": "dtype",
        "criterion": "criterion",
        "detail": "found",
        "status": "status",
    },
    note="Correctness against the reference. heads: query heads per kv head x head_dim.",
)
def gate(options: Options) -> Iterator[Row]:
    """Check every operation; shapes with the same head_dim and group are checked once."""
    device = device_of_gate()
    interpreted = device == "cpu"
    presets = options.presets or DEFAULT_PRESETS
    if interpreted and options.quick:
        presets = presets[:1]
    heads = sorted({(shape.group, shape.head_dim) for shape in selected_shapes(options)})
    if interpreted and not options.full:  # groups share everything but the width of a product
        heads = [(group, dim) for group, dim in heads if (group, dim) in ((4, 128), (8, 64))] or heads[:1]
    dtypes = [torch.float16] if interpreted else [torch.float16, torch.bfloat16]
    by_dim = {dim: group for group, dim in heads}
    work = [(check_rotation, group, dim, "") for dim, group in by_dim.items()]
    for check in (check_cache_writes, check_decode):
        work += [(check, group, dim, preset) for group, dim in heads for preset in presets]
    calls = [(check, group, dim, preset, dtypes, options.seed, device) for check, group, dim, preset in work]
    with contextlib.ExitStack() as stack:
        if interpreted:
            results = map(_rows_of, *zip(*calls, strict=True))
        else:  # nearly all of the time is compilation, which finds a place on every core and stays in Triton's cache
            workers = max(min(len(calls), (os.cpu_count() or 2) // 2), 1)
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(workers, mp_context=context))
            results = pool.map(_rows_of, *zip(*calls, strict=True))
        for _, group, dim, preset in progress("gate", work, lambda w: f"{w[0].__name__} {w[1]} x {w[2]} {w[3]}".strip()):
            for row in next(results):
                row = {"heads": f"{group} x {dim}", "preset": preset, "group": group, "head_dim": dim, **row}
                if row["status"] != "ok":
                    options.red.add((row["operation"], preset, dim, group))
                yield row


def _rows_of(*call) -> list[Row]:
    """Return the rows of one call of `_guarded`; a function that another process can find."""
    return list(_guarded(*call))


def _guarded(check, group: int, dim: int, preset: str, dtypes, seed: int, device: str) -> Iterator[Row]:
    """Yield the rows of a check; an exception is a red row."""
    shape = Shape("gate", 2 * group, 2, dim)
    operations = {"check_rotation": "hadamard", "check_cache_writes": "store_pages", "check_decode": "decode_attention"}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        try:
            for row in check(shape, preset, dtype, seed, device):
                yield {"dtype": name, **row}
        except Exception as error:  # whatever it is, the operation must not be timed
            detail = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            red = {"criterion": "runs", "detail": detail, "status": "FAIL"}
            yield {"operation": operations[check.__name__], "dtype": name, **red}


def _equal(operation: str, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Row:
    """Return the row that says whether each pair (found, expected) is equal bit for bit."""
    wrong = []
    for name, (found, expected) in pairs.items():
        found, expected = found.cpu().contiguous().view(torch.uint8), expected.cpu().contiguous().view(torch.uint8)
        different = int((found != expected).sum())
        if different:
            wrong.append(f"{name}: {different} of {expected.numel()} bytes differ")
    return {
        "operation": operation,
        "criterion": "bit-equal",
        "detail": "; ".join(wrong) or "equal",
        "status": "FAIL" if wrong else "ok",
    }


def check_rotation(shape: Shape, preset: str, dtype: torch.dtype, seed: int, device: str) -> Iterator[Row]:
    """Check `hadamard`."""
    x = torch.randn(67, 3, shape.head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    yield _equal("hadamard", {"rotated": (kvarn.hadamard(x.to(device)), reference.hadamard(x))})


def check_cache_writes(shape: Shape, preset: str, dtype: torch.dtype, seed: int, device: str) -> Iterator[Row]:
    """Check `store_pages`, `dequantize_pages`, and `append_tokens` followed by `commit_pages`."""
    layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
    size, heads = layout.page_size, shape.num_kv_heads
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(3 * size + 5, heads, shape.head_dim, generator=generator) for _ in range(2))
    k[:, :, 1] = 8 * k[:, :, 1] + 3
    v[size + 3] *= 50
    k, v = k.to(dtype), v.to(dtype)
    page_ids = torch.tensor([4, -1, 1])
    token_starts = torch.tensor([5, 0, 2 * size])
    expected = torch.full(layout.pages_shape(6, heads), 0xFF, dtype=torch.uint8)
    found = expected.to(device, copy=True)
    kvarn.store_pages(k.to(device), v.to(device), found, page_ids.to(device), layout, token_starts=token_starts.to(device))
    reference.store_pages(k, v, expected, page_ids, layout, token_starts=token_starts)
    yield _equal("store_pages", {"pages": (found, expected)})

    found = kvarn.dequantize_pages(expected.to(device), page_ids.to(device), layout, dtype=dtype)
    wanted = reference.dequantize_pages(expected, page_ids, layout, dtype=dtype)
    yield _equal("dequantize_pages", {"k": (found[0], wanted[0]), "v": (found[1], wanted[1])})
    yield _check_commit(shape, layout, k, v, device)


def _check_commit(shape: Shape, layout: PageLayout, k: torch.Tensor, v: torch.Tensor, device: str) -> Row:
    """Append two sequences of tokens with a sink of 5 tokens, then let finished pages be quantized."""
    size, sink_len, lengths = layout.page_size, 5, (2 * layout.page_size + 7, layout.page_size)
    raw_table = torch.tensor([[3, 0, 6, 5], [1, 4, 2, 7]], dtype=torch.int32)
    block_table = torch.tensor([[2, 5, 0], [3, 1, 4]], dtype=torch.int32)
    positions = torch.stack([torch.where(torch.arange(lengths[0]) < n, torch.arange(lengths[0]), -1) for n in lengths])
    results = {}
    for where, api in ((device, kvarn), ("cpu", reference)):
        raw_pages = torch.zeros(8, 2, shape.num_kv_heads, size, shape.head_dim, dtype=k.dtype, device=where)
        pages = torch.full(layout.pages_shape(6, shape.num_kv_heads), 0xFF, dtype=torch.uint8, device=where)
        num_quantized = torch.zeros(2, dtype=torch.int32, device=where)
        tables = raw_table.to(where), block_table.to(where)
        slots = api.raw_slots(positions.to(where), tables[0], sink_len=sink_len, page_size=size)
        for row in range(2):
            api.append_tokens(k[: lengths[0]].to(where), v[: lengths[0]].to(where), raw_pages, slots[row])
        lens = torch.tensor(lengths, dtype=torch.int32, device=where)
        api.commit_pages(
            raw_pages, pages, *tables, lens, num_quantized, layout, sink_len=sink_len, max_new_pages=2
        )  # fmt: skip
        results[api] = {"raw_pages": raw_pages, "pages": pages, "num_quantized": num_quantized}
    return _equal("commit_pages", {name: (results[kvarn][name], results[reference][name]) for name in results[kvarn]})


def check_decode(shape: Shape, preset: str, dtype: torch.dtype, seed: int, device: str) -> Iterator[Row]:
    """Check `decode_attention` on ragged lengths, with and without raw pages, one of them empty; then `merge_states`."""
    layout = PageLayout.from_name(preset, head_dim=shape.head_dim)
    size = layout.page_size
    lengths = (2 * size + 3, 0, 37, size)
    outs = []
    for sink_len, tail_pages in ((0, 0), (9, 1)):
        case = build_cache(
            shape, layout, lengths, sink_len=sink_len, tail_pages=tail_pages, dtype=dtype, seed=seed, by_reference=True
        )
        placed = case.to(device)
        out, lse = kvarn.decode_attention(*placed.arguments, **placed.options, return_lse=True, split_size=2)
        outs.append((out, lse))
        out = out.cpu()
        errors = [decode_errors(case, out, row) for row in range(len(lengths))]
        worst = max(errors, key=lambda pair: pair[0] / pair[1] if pair[1] else (float("inf") if pair[0] else 0.0))
        green = all(found <= ERROR_RATIO * plain for found, plain in errors)
        yield {
            "operation": "decode_attention",
            "criterion": f"error <= {ERROR_RATIO:g}x plain" + (", raw pages" if sink_len else ""),
            "detail": f"{worst[0]:.1e} against {worst[1]:.1e}",
            "error": worst[0],
            "error_plain": worst[1],
            "status": "ok" if green else "FAIL",
        }
    yield _check_merge(*outs[0], *outs[1])


def _check_merge(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> Row:
    """Compare `merge_states` of two results with the reference in float64."""
    merged, lse = kvarn.merge_states(out_a, lse_a, out_b, lse_b)
    exact, exact_lse = reference.merge_states(
        out_a.cpu().double(), lse_a.cpu().double(), out_b.cpu().double(), lse_b.cpu().double()
    )
    bound = 2 * torch.finfo(out_a.dtype).eps
    error = relative_error(merged.cpu(), exact)
    finite = torch.isfinite(exact_lse)
    same = bool((torch.isfinite(lse.cpu()) == finite).all()) and relative_error(lse.cpu()[finite], exact_lse[finite]) < 1e-5
    return {
        "operation": "merge_states",
        "criterion": f"error <= {bound:.0e}",
        "detail": f"{error:.1e}" + ("" if same else "; lse differs"),
        "error": error,
        "status": "ok" if error <= bound and same else "FAIL",
    }
