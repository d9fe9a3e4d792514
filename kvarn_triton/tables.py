"""Tables of launch parameters of the decode kernel: what they hold, files of them, and the package's own.

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

from .checks import require

TABLE_VERSION = 2
_BUILTIN = Path(__file__).with_name("decode_tables.json")


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
    """

    num_warps: int = 1
    num_stages: int = 2
    block_t: int = 128
    block_d: int = 128
    programs_per_sm: int = 8
    few_programs_per_sm: int = 8
    maxnreg: int | None = None
    early_merge: bool = False

    def options(self) -> dict[str, int]:
        """Return the launch options that only some GPUs have."""
        return {} if self.maxnreg is None else {"maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Entry:
    """Launch parameters for a head_dim, and where they are from."""

    head_dim: int
    config: DecodeConfig
    source: str


@dataclass(frozen=True)
class DecodeTable:
    """The launch parameters of one architecture."""

    arch: str
    entries: tuple[Entry, ...]

    def find(self, head_dim: int) -> DecodeConfig:
        """Return the parameters of the nearest head_dim that isn't smaller, else of the largest."""
        if not self.entries:
            return DecodeConfig()
        # Plain lists, which torch.compile can trace.
        head_dims = [entry.head_dim for entry in self.entries]
        nearest = min([size for size in head_dims if size >= head_dim] or [max(head_dims)])
        return self.entries[head_dims.index(nearest)].config


def _read(data: object, path: Path) -> list[DecodeTable]:
    if not isinstance(data, dict) or data.get("version") != TABLE_VERSION or not isinstance(data.get("tables"), dict):
        raise ValueError(f"path: expected a table of launch parameters, version {TABLE_VERSION}, got {path.name}")
    tables = []
    for arch, rows in data["tables"].items():
        entries = []
        for row in rows:
            try:
                config = DecodeConfig(**row["config"])
                entries.append(Entry(row["head_dim"], config, row["source"]))
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


def save_table(path: str | Path, *tables: DecodeTable) -> None:
    """Write tables to a file; those of other architectures that the file holds stay."""
    path = Path(path)
    kept = _read(json.loads(path.read_text()), path) if path.exists() else []
    merged = {table.arch: table for table in (*kept, *tables)}
    data = {
        "version": TABLE_VERSION,
        "tables": {
            arch: [{"head_dim": e.head_dim, "source": e.source, "config": dataclasses.asdict(e.config)} for e in table.entries]
            for arch, table in sorted(merged.items())
        },
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


@functools.lru_cache
def builtin_table(arch: str | None) -> DecodeTable:
    """Return the package's table of an architecture; for one that it doesn't know, that of the nearest older one.

    None, a CPU in Triton's interpreter, gets parameters that keep it fast.
    """
    if arch is None:
        return DecodeTable("cpu", (Entry(512, DecodeConfig(programs_per_sm=1, few_programs_per_sm=1), "interpreter"),))
    tables = {table.arch: table for table in _read(json.loads(_BUILTIN.read_text()), _BUILTIN)}
    if arch in tables:
        return tables[arch]
    family = [known for known in tables if known.startswith(arch[:2])]
    if arch.startswith("sm"):
        family.sort(key=lambda known: int(known[2:]))
        older = [known for known in family if int(known[2:]) <= int(arch[2:])]
        family = older or family[:1]
    return tables[family[-1]] if family else DecodeTable(arch, ())
