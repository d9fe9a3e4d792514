"""Launch parameters: what they hold, and tables of those of the decode kernel: files of them, and the package's own.

A table belongs to one architecture. `perf/sweep.py tune` measures one on the GPU at hand and writes it to a file;
`decode_attention` takes it as `table`. The package's own tables are in `decode_tables.json`, each entry with its source:
"measured" on a GPU, or "derived" from what the compiler says of registers, shared memory and instructions.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path

import triton

from . import gpu
from .checks import check_choice, check_count, require

TABLE_VERSION = 2
_BUILTIN = Path(__file__).with_name("decode_tables.json")
_SPLIT_ENTRIES = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
"""Whether the package's own entries with `split_bits` count where heads are rows: Triton 3.9 spills registers with those
alone."""


@dataclass(frozen=True)
class DecodeConfig:
    """Launch parameters of the decode kernel.

    Args:
        num_warps: warps of a program.
        num_stages: stages of the software pipeline; 2 keep one page in shared memory, 3 two.
        block_t: most tokens of one product with keys.
        block_d: most channels of one product with values.
        programs_per_sm: programs of one multiprocessor.
        few_programs_per_sm: the same, where there is little work for each (`schedule.LEAST_UNITS`).
        maxnreg: most registers of a thread; None leaves it to the compiler. NVIDIA only.
        early_merge: start the merge while the decode kernel ends (programmatic dependent launch: sm90 and later).
        columns: whether tiles of up to 4 query heads are columns of products (`attention.columns`), not rows. NVIDIA only, with
            one warp.
    """

    num_warps: int = 1
    num_stages: int = 2
    block_t: int = 128
    block_d: int = 128
    programs_per_sm: int = 8
    few_programs_per_sm: int = 8
    maxnreg: int | None = None
    early_merge: bool = False
    columns: bool = False

    def options(self) -> dict[str, int]:
        """Return the launch options that only some GPUs have."""
        return {} if self.maxnreg is None else {"maxnreg": self.maxnreg}

    def numbers(self) -> list[int]:
        """Return the fields as numbers, as an operator takes them."""
        sizes = [self.num_warps, self.num_stages, self.block_t, self.block_d, self.programs_per_sm, self.few_programs_per_sm]
        return [*sizes, self.maxnreg or 0, int(self.early_merge), int(self.columns)]

    @classmethod
    def of_numbers(cls, n: tuple[int, ...]) -> DecodeConfig:
        """Return the launch parameters of which `n` are the numbers."""
        return cls(n[0], n[1], n[2], n[3], n[4], n[5], n[6] or None, *map(bool, n[7:]))


def _check_power(name: str, value: object, low: int, high: int) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high and not value & (value - 1)
    require(fits, name, f"a power of two from {low} to {high}", value)


FORMS = "dequantized", "registers", "folded", "warp_groups"
"""Of the loop over pages of prefill attention: `PrefillConfig.form`."""
MOST_WARPS = 64
"""Of all programs of a multiprocessor."""


@dataclass(frozen=True)
class PrefillConfig:
    """Launch parameters of `prefill_attention`. That they fit a GPU is for the compiler to say.

    Args:
        block_m: query rows of a tile: 16 to 256; 16 or 32 in the forms "registers" and "warp_groups".
        num_warps: warps of a program; 4 in the form "warp_groups".
        block_t: tokens of pages of one product with keys: 16 to the size of a page.
        block_r: raw or new tokens of one step: 16 to the size of a page.
        num_stages: stages of the software pipeline.
        programs_per_sm: programs of one multiprocessor, for which registers are shared out; at most 64 warps together.
        block_d: most channels of one product with values, from 16 on, unless pages are dequantized to shared memory.
        form: of the loop over pages. They are "dequantized" to shared memory (`attention.dequantized`), in "registers"
            (`attention.registers`), or left as they are, with scales "folded" into queries and weights (`attention.halves`),
            which is the form of float32 queries and of more than 256 channels. With `scratch` memory "dequantized". The form
            "warp_groups" (`attention.drafts`) is a kernel of its own for GPUs of compute capability 9.0: for 2 and 4 bits,
            pages of 128 tokens and 128 channels, queries and raw pages of one 16-bit dtype, without `window`, `soft_cap`,
            `tree_mask`, `span_ends` and `split_size`; `block_t`, `block_r` and `block_d` say nothing to it.

    Raises:
        ValueError: for numbers that are no powers of two, or out of range, and for another form.
    """

    block_m: int
    num_warps: int
    block_t: int
    block_r: int
    num_stages: int = 2
    programs_per_sm: int = 2
    block_d: int = 128
    form: str = "dequantized"

    def __post_init__(self) -> None:
        check_choice("form", self.form, FORMS)
        groups = self.form == "warp_groups"
        most = 32 if groups or self.form == "registers" else 256
        warps = (4, 4) if groups else (1, 16)
        for name, low, high in (("block_m", 16, most), ("num_warps", *warps), ("block_t", 16, 128), ("block_r", 16, 128)):
            _check_power(name, getattr(self, name), low, high)
        _check_power("block_d", self.block_d, 16, 512)
        for name in ("num_stages", "programs_per_sm"):
            check_count(name, getattr(self, name), 1)
        programs = MOST_WARPS // self.num_warps
        require(self.programs_per_sm <= programs, "programs_per_sm", f"at most {programs}", self.programs_per_sm)

    def options(self) -> dict[str, int]:
        """Return launch options: on NVIDIA GPUs as many registers as let `programs_per_sm` programs run side by side."""
        if not gpu.uses_ptx():
            return {}
        return {"maxnreg": min(65536 // (32 * self.num_warps * self.programs_per_sm) // 8 * 8, 255)}

    def numbers(self) -> list[int]:
        """Return the fields as numbers, as an operator takes them."""
        sizes = [self.block_m, self.num_warps, self.block_t, self.block_r, self.num_stages, self.programs_per_sm, self.block_d]
        return [*sizes, FORMS.index(self.form)]

    @classmethod
    def of_numbers(cls, n: tuple[int, ...]) -> PrefillConfig:
        """Return the launch parameters of which `n` are the numbers."""
        return cls(n[0], n[1], n[2], n[3], n[4], n[5], n[6], FORMS[n[7]])


@dataclass(frozen=True)
class Entry:
    """Launch parameters for a head_dim, and where they are from.

    With `split_bits` they are for layouts of that head_dim whose codes have high bits elsewhere (`layout.split_bits`), and no
    more bits than that; the others are for all widths. With `max_heads` they are for tiles of at most so many query heads.
    """

    head_dim: int
    config: DecodeConfig
    source: str
    split_bits: int = 0
    max_heads: int = 0


@dataclass(frozen=True)
class DecodeTable:
    """The launch parameters of one architecture."""

    arch: str
    entries: tuple[Entry, ...]

    def find(self, head_dim: int, split_bits: int = 0, heads: int = 0) -> DecodeConfig:
        """Return the parameters of the nearest head_dim that isn't smaller, else of the largest: those for a layout's
        `split_bits`, and those for tiles of `heads` query heads, if there are such.
        """
        # Plain lists, which torch.compile can trace.
        entries = [entry for entry in self.entries if 0 < heads <= entry.max_heads]
        if head_dim > max([entry.head_dim for entry in entries] or [0]):
            entries = [entry for entry in self.entries if not entry.max_heads]
        plain = [entry for entry in entries if not entry.split_bits]
        if not plain:
            return DecodeConfig()
        head_dims = [entry.head_dim for entry in plain]
        nearest = min([size for size in head_dims if size >= head_dim] or [max(head_dims)])
        own = [entry for entry in entries if entry.head_dim == nearest and 0 < split_bits <= entry.split_bits]
        if not own:
            return plain[head_dims.index(nearest)].config
        widths = [entry.split_bits for entry in own]
        return own[widths.index(min(widths))].config


def _read(data: object, path: Path) -> list[DecodeTable]:
    if not isinstance(data, dict) or data.get("version") != TABLE_VERSION or not isinstance(data.get("tables"), dict):
        raise ValueError(f"path: expected a table of launch parameters, version {TABLE_VERSION}, got {path.name}")
    tables = []
    for arch, rows in data["tables"].items():
        entries = []
        for row in rows:
            try:
                config = DecodeConfig(**row["config"])
                entries.append(Entry(row["head_dim"], config, row["source"], row.get("split_bits", 0), row.get("max_heads", 0)))
            except (KeyError, TypeError) as error:
                raise ValueError(f"path: expected entries of DecodeConfig, got {row!r} in {path.name}") from error
        tables.append(DecodeTable(arch, tuple(entries)))
    return tables


def load_table(path: str | Path, arch: str | None = None) -> DecodeTable:
    """Return the table of an architecture from a file that `save_table` or `perf/sweep.py tune` wrote.

    Args:
        path: the file.
        arch: such as sm90; may be left out if the file holds one table.

    Raises:
        ValueError: if the file is no such table or has none for `arch`.
    """
    path = Path(path)
    try:
        tables = _read(json.loads(path.read_text()), path)
    except json.JSONDecodeError as error:
        raise ValueError(f"path: expected JSON, got {path.name}: {error}") from error
    found = [table for table in tables if arch in (None, table.arch)]
    require(len(found) == 1, "arch", f"one of {', '.join(table.arch for table in tables)}", arch)
    return found[0]


def _row_of(entry: Entry) -> dict[str, object]:
    limits = {name: getattr(entry, name) for name in ("split_bits", "max_heads") if getattr(entry, name)}
    return {"head_dim": entry.head_dim, **limits, "source": entry.source, "config": dataclasses.asdict(entry.config)}


def save_table(path: str | Path, *tables: DecodeTable) -> None:
    """Write tables to a file; those of other architectures that the file holds stay."""
    path = Path(path)
    kept = _read(json.loads(path.read_text()), path) if path.exists() else []
    merged = {table.arch: table for table in (*kept, *tables)}
    data = {
        "version": TABLE_VERSION,
        "tables": {arch: [_row_of(entry) for entry in table.entries] for arch, table in sorted(merged.items())},
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


@functools.lru_cache
def builtin_table(arch: str | None) -> DecodeTable:
    """Return the package's table of an architecture; for one that it doesn't know, that of the nearest older one.

    None, a CPU in Triton's interpreter, gets parameters that keep it fast.
    """
    if arch is None:
        rows = DecodeConfig(programs_per_sm=1, few_programs_per_sm=1)
        columns = dataclasses.replace(rows, columns=True)
        return DecodeTable("cpu", (Entry(512, rows, "interpreter"), Entry(256, columns, "interpreter", max_heads=4)))
    tables = {table.arch: table for table in _read(json.loads(_BUILTIN.read_text()), _BUILTIN)}
    if not _SPLIT_ENTRIES:
        tables = {
            arch: DecodeTable(arch, tuple(entry for entry in table.entries if not entry.split_bits or entry.max_heads))
            for arch, table in tables.items()
        }
    if arch in tables:
        return tables[arch]
    family = [known for known in tables if known.startswith(arch[:2])]
    if arch.startswith("sm"):
        family.sort(key=lambda known: int(known[2:]))
        older = [known for known in family if int(known[2:]) <= int(arch[2:])]
        family = older or family[:1]
    return tables[family[-1]] if family else DecodeTable(arch, ())
