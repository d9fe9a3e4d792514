"""Latent attention beside its 16-bit twin, and beside FlashMLA, FA3 and FlashInfer where they can be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mla_twin
import torch
from common import Options, Row, progress, sweep
from mla_peers import MLA_PEERS, SixteenBitLatents, find_mla_peers, right_variants
from timed import failed, free_memory, num_samples, roof, timed_fields
from timing import Call, measure, num_input_sets

import kvarn_triton as kvarn
from kvarn_triton import MLAConfig, MLALayout, gpu

POINTS = ((64, 8192), (8, 32768), (1, 32768))
HEADS = (16, 128)
LAYOUTS = (MLALayout(4, 64), MLALayout(4, 128), MLALayout(8, 64))
SM_SCALE = 192**-0.5
DISTINCT = 64
"""Pages with tokens of their own; others are copies of them."""
OTHER_CONFIGS = {
    16: (
        *(MLAConfig(16, 32, 4, 2, 2), MLAConfig(16, 64, 4, 1, 2), MLAConfig(16, 32, 4, 2, 3, 168)),
        *(MLAConfig(16, 64, 8, 2, 2, 128), MLAConfig(16, 64, 8, 1, 2, 128), MLAConfig(16, 64, 4, 2, 4)),
    ),
    128: (
        *(MLAConfig(64, 64, 8, 1), MLAConfig(64, 32, 8), MLAConfig(32, 64, 8), MLAConfig(32, 32, 4, 2, 2)),
        *(MLAConfig(16, 64, 4, 2, 2), MLAConfig(64, 32, 8, 1), MLAConfig(32, 64, 4)),
    ),
}
"""What else is timed with --full."""
MOST_ERROR = 2**-8
"""Of the last sequence, relative to float32 attention to the dequantized pages: three roundings to float16, with room."""


class _Case:
    """Sequences of one length on pages of their own, several sets of them: quantized, and as plain float16."""

    def __init__(self, heads: int, batch: int, context: int, seed: int) -> None:
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.batch, self.context = batch, context
        self.sets = num_input_sets(batch * context * 400)
        self.tokens = self.draw(DISTINCT * 128, 576)
        self.q = [self.draw(batch, heads, 576) for _ in range(self.sets)]
        self.lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")

    def draw(self, *shape: int) -> torch.Tensor:
        """Return random numbers."""
        return torch.empty(shape, dtype=torch.float16, device="cuda").normal_(generator=self.generator)

    def tables(self, page_size: int) -> list[torch.Tensor]:
        """Return block tables of all sets, which share no page."""
        shape = self.sets, self.batch, self.context // page_size
        ids = torch.randperm(shape[0] * shape[1] * shape[2], generator=self.generator, device="cuda")
        return list(ids.int().view(shape))

    def pool(self, distinct: torch.Tensor, page_size: int) -> torch.Tensor:
        """Return a pool of copies of distinct pages, as many as the tables name."""
        count = self.sets * self.batch * (self.context // page_size)
        return distinct.repeat(-(-count // len(distinct)), *[1] * (distinct.dim() - 1))[:count]

    def quantized(self, layout: MLALayout) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return pages and tables."""
        pages = layout.empty_pages(DISTINCT, "cuda")
        ids = torch.arange(DISTINCT, device="cuda")
        kvarn.mla_store_pages(self.tokens[:, :512], self.tokens[:, 512:], pages, ids, layout)
        return self.pool(pages, layout.page_size), self.tables(layout.page_size)

    def lists(self, topk: int, run: int) -> list[torch.Tensor]:
        """Return ascending lists int32 [batch, topk] of all sets: runs of `run` tokens in a row, each somewhere."""
        starts = torch.rand(self.sets, self.batch, self.context // run, generator=self.generator, device="cuda").argsort(-1)
        tokens = run * starts[..., : topk // run, None] + torch.arange(run, device="cuda")
        return list(tokens.flatten(-2).sort(-1).values.int())

    def calls(
        self, layout: MLALayout, config: MLAConfig | None = None, lists: list[torch.Tensor] | None = None
    ) -> tuple[list[Call], float]:
        """Return calls over all sets, and the relative error of the last sequence."""
        pages, tables = self.quantized(layout)
        listed: list[torch.Tensor | None] = [None] * self.sets if lists is None else [*lists]
        out = torch.empty(*self.q[0].shape[:2], 512, dtype=torch.float16, device="cuda")

        def call(q: torch.Tensor, table: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
            return kvarn.mla_decode_attention(
                q, pages, table, self.lens, layout, sm_scale=SM_SCALE, indices=indices, out=out, config=config
            )  # fmt: skip

        result = call(self.q[0], tables[0], listed[0])[-1].double()
        latents, rope = kvarn.mla_dequantize_pages(pages, tables[0][-1], layout, dtype=torch.float32)
        tokens = torch.cat((latents, rope), dim=-1).flatten(0, 1).double()
        tokens = tokens if lists is None else tokens[lists[0][-1].long()]
        expected = torch.softmax(SM_SCALE * self.q[0][-1].double() @ tokens.T, dim=-1) @ tokens[:, :512]
        error = float((result - expected).norm() / expected.norm())
        sets = zip(self.q, tables, listed, strict=True)
        return [lambda q=q, t=t, i=i: call(q, t, i) for q, t, i in sets], error  # type: ignore[misc]

    def plain(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return float16 pages of 64 tokens and tables."""
        return self.pool(self.tokens.view(-1, 64, 576), 64), self.tables(64)


def _twins(case: _Case, pages: torch.Tensor, tables: Sequence[torch.Tensor], topk: int | None = None) -> dict[str, list[Call]]:
    """Return the twin in each of its configurations; with `topk` tables have slots of so many tokens."""
    lens = case.lens if topk is None else torch.full_like(case.lens, topk)
    programs = gpu.num_multiprocessors(torch.device("cuda", torch.cuda.current_device()))
    found = {}
    for config in mla_twin.CONFIGS["few" if case.q[0].shape[1] <= 16 else "many"]:
        found[f"twin {config}"] = [
            lambda q=q, t=t, c=config: mla_twin.twin_mla(q, pages, t, lens, SM_SCALE, programs, c, topk is not None)
            for q, t in zip(case.q, tables, strict=True)
        ]
    return found


@sweep(
    "mla",
    needs="gpu",
    headers={
        "heads": "heads",
        "batch": "batch",
        "context": "context",
        "what": "what",
        "us": "us",
        "spread": "p20-p80",
        "gb_s": "GB/s",
        "percent_of_copy": "% of copy",
        "times_twin": "x twin",
        **{f"times_{peer.name.lower()}": f"x {peer.name}" for peer in MLA_PEERS},
        "error": "error",
    },
    note="pages only. x twin: how many times faster than the fastest configuration of the 16-bit twin; x FlashMLA, FA3,\n"
    "FlashInfer: than the fastest variant of theirs on 16-bit latents. All launches of a call are in its time.",
)
def mla(options: Options) -> Iterator[Row]:
    """Time decode attention to latents at 4 and 8 bits beside 16-bit kernels."""
    roof_gb_s = roof(options)
    found, options.sections["mla_missing"] = find_mla_peers()
    work = [(heads, *point) for point in options.points or POINTS for heads in HEADS]
    if options.full:
        work += [(heads, *POINTS[0]) for heads in (32, 64)]
    for heads, batch, context in progress("mla", work, lambda w: f"{w[0]} heads, {w[1]} x {w[2]}"):
        free_memory()
        row: Row = {"heads": heads, "batch": batch, "context": context}
        case = _Case(heads, batch, context, options.seed)
        plain, tables = case.plain()
        providers: dict[str, list[Call]] = {}
        sizes: dict[str, float] = {}
        found_errors: dict[str, float] = {}
        for layout in LAYOUTS:
            others = OTHER_CONFIGS.get(heads, ()) if options.full and layout == LAYOUTS[0] else ()
            for config in (None, *others):
                name = f"{layout.bits} bits, pages of {layout.page_size}" + ("" if config is None else f", {config}")
                try:
                    providers[name], found_errors[name] = case.calls(layout, config)
                    sizes[name] = layout.bytes_per_token
                except Exception as error:  # a configuration that doesn't fit
                    yield row | {"what": name} | failed(error)
        peers, wrong = right_variants(found, SixteenBitLatents(case.q, plain, tables, context, SM_SCALE))
        options.sections.setdefault("mla_wrong", {})[f"{heads} heads, {batch} x {context}"] = wrong
        sixteen = _twins(case, plain, tables) | peers
        timings, errors = measure(providers | sixteen, samples=num_samples(options))
        best = {
            kind: min((timings[name].us for name in timings if name.startswith(kind)), default=None)
            for kind in ("twin", *(peer.name for peer in MLA_PEERS))
        }
        for name in (*providers, *sixteen):
            bytes_read = int(batch * (context * sizes.get(name, 1152.0) + heads * (576 + 512) * 2))
            result = row | {"what": name} | timed_fields(timings.get(name), errors.get(name), bytes_read, roof_gb_s)
            if name in found_errors:
                result["error"] = found_errors[name]
                if not found_errors[name] <= MOST_ERROR:
                    result |= failed(f"error {found_errors[name]:.1e}")
            if result["us"] is not None:
                result |= {f"times_{kind.lower()}": us / result["us"] for kind, us in best.items() if us is not None}
            yield result


LIST_POINTS = ((1, 32768), (16, 32768), (64, 8192), (16, 131072))
TOPK = 2048
LISTS = {"16 in a row": (16, False), "single tokens": (1, False), "single tokens, any order": (1, True)}
"""How long the runs of a list are, and whether its order is random."""
OTHER_LIST_CONFIGS = {
    16: (MLAConfig(16, 16, 4, 1, 3, 168), MLAConfig(16, 32, 8, 1, 1), MLAConfig(16, 32, 4, 2)),
    128: (MLAConfig(32, 32, 8, 1), MLAConfig(32, 64, 8, 1), MLAConfig(64, 32, 8, 2), MLAConfig(64, 16, 8, 1)),
}
"""What else is timed with --full."""


@sweep(
    "mla_lists",
    needs="gpu",
    headers={
        "heads": "heads",
        "batch": "batch",
        "context": "context",
        "lists": "lists",
        "what": "what",
        "us": "us",
        "spread": "p20-p80",
        "times_twin": "x twin",
        "error": "error",
    },
    note=f"lists of {TOPK:,} tokens; pages only. x twin: how many times faster than the fastest configuration of the 16-bit\n"
    "twin on the same tokens, whose slots it is given. All launches of a call are in its time.",
)
def mla_lists(options: Options) -> Iterator[Row]:
    """Time decode attention to lists of latents beside the 16-bit twin on the same lists, and beside all tokens."""
    roof_gb_s = roof(options)
    work = [(heads, *point) for point in options.points or LIST_POINTS for heads in HEADS]
    for heads, batch, context in progress("mla_lists", work, lambda w: f"{w[0]} heads, {w[1]} x {w[2]}"):
        free_memory()
        case = _Case(heads, batch, context, options.seed)
        plain, tables = case.plain()
        for name, (run, shuffled) in LISTS.items():
            row: Row = {"heads": heads, "batch": batch, "context": context, "lists": name}
            lists = case.lists(min(TOPK, context), run)
            order = torch.randperm(lists[0].shape[1], generator=case.generator, device="cuda")
            lists = [x[:, order].contiguous() for x in lists] if shuffled else lists
            pages = [x.long() // 64 for x in lists]
            slots = [(t.gather(1, p) * 64 + x % 64).int() for t, p, x in zip(tables, pages, lists, strict=True)]
            ours: dict[str, list[Call]] = {}
            errors: dict[str, float] = {}
            sizes = {"all tokens, 4 bits": context * LAYOUTS[0].bytes_per_token}
            for layout in LAYOUTS:
                others = OTHER_LIST_CONFIGS[heads] if options.full and layout == LAYOUTS[0] else ()
                for config in (None, *others):
                    what = f"{layout.bits} bits, pages of {layout.page_size}" + ("" if config is None else f", {config}")
                    try:
                        ours[what], errors[what] = case.calls(layout, config, lists)
                        sizes[what] = lists[0].shape[1] * layout.bytes_per_token
                    except Exception as error:  # a configuration that doesn't fit
                        yield row | {"what": what} | failed(error)
            ours["all tokens, 4 bits"], errors["all tokens, 4 bits"] = case.calls(LAYOUTS[0])
            twins = _twins(case, plain, slots, lists[0].shape[1])
            timings, failures = measure(ours | twins, samples=num_samples(options))
            best = min((timings[key].us for key in timings if key.startswith("twin")), default=None)
            for what in (*ours, *twins):
                num_bytes = int(batch * sizes.get(what, 1152.0 * lists[0].shape[1]))
                result = row | {"what": what} | timed_fields(timings.get(what), failures.get(what), num_bytes, roof_gb_s)
                if what in errors:
                    result["error"] = errors[what]
                    if not errors[what] <= MOST_ERROR:
                        result |= failed(f"error {errors[what]:.1e}")
                if result["us"] is not None and best is not None:
                    result["times_twin"] = best / result["us"]
                yield result
