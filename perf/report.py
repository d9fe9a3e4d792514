"""Tables, the JSON file and the plot of a run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accuracy_plots import draw_accuracy, draw_real
from common import SWEEPS, Row, title


def format_cell(value: Any) -> str:
    """Return a table cell: numbers with three or four digits, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def print_table(name: str, rows: list[Row]) -> None:
    """Print the rows of a sweep as a table under its note."""
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise SystemExit("perf/sweep.py: tables need the package tabulate: pip install tabulate") from error
    entry = SWEEPS[name]
    shown = entry.tabulate(rows) if entry.tabulate else rows
    shown = [row | {"us": "FAIL"} if "fail" in row else row for row in shown]
    headers = {key: head for key, head in entry.headers.items() if any(row.get(key) is not None for row in shown)}
    if entry.tabulate and shown:
        headers |= {key: key for key in shown[0] if key not in entry.headers and not key.startswith("_")}
    print(f"\n{name}: {entry.note}\n")
    if not shown:
        print("no rows")
        return
    cells = [[format_cell(row.get(key)) for key in headers] for row in shown]
    numeric = [all(isinstance(row.get(key), int | float | None) or key == "us" for row in shown) for key in headers]
    align = ["right" if is_number else "left" for is_number in numeric]
    print(tabulate(cells, headers=list(headers.values()), disable_numparse=True, colalign=align), flush=True)
    for message in dict.fromkeys(row["fail"] for row in rows if "fail" in row):
        print(f"FAIL: {message}")


def write_json(path: str, info: Row, results: dict[str, list[Row]], sections: Row) -> None:
    """Write everything that was measured: what identifies the run, and all rows with all their fields."""
    text = json.dumps({"run": info, **sections, "sweeps": results}, indent=1, default=str)
    Path(path).write_text(text + "\n")


def draw(path: str, info: Row, results: dict[str, list[Row]], sections: Row) -> None:
    """Draw decode times and bandwidth over context if they were measured, otherwise error over bits per element."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise SystemExit("perf/sweep.py: --plot needs the package matplotlib: pip install matplotlib") from error
    timed = [row for row in results.get("decode", []) if row.get("us") is not None]
    if timed:
        figure = _draw_decode(plt, timed)
    elif results.get("error"):
        figure = _draw_error(plt, results["error"])
    elif results.get("accuracy") or results.get("encoders"):
        figure = draw_accuracy(plt, results.get("accuracy") or results["encoders"])
    elif results.get("real"):
        figure = draw_real(plt, results["real"])
    else:
        raise SystemExit("perf/sweep.py: --plot draws the decode, the error, the accuracy or the real sweep, and none has rows")
    figure.suptitle(title(info), fontsize=8)
    figure.tight_layout(rect=(0, 0 if timed else 0.14, 1, 0.97))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_decode(plt: Any, rows: list[Row]) -> Any:
    """Draw, for the first shape, time and percent of copy bandwidth over context; one column of axes per batch."""
    shape = rows[0]["shape"]
    rows = [row for row in rows if row["shape"] == shape and row["cache"] == rows[0]["cache"]]
    batches = sorted({row["batch"] for row in rows})
    figure, axes = plt.subplots(2, len(batches), figsize=(4.2 * len(batches), 7), squeeze=False)
    for column, batch in enumerate(batches):
        at = [row for row in rows if row["batch"] == batch]
        lines: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
        for row in at:
            lines[row["preset"]].append((row["context"], row["us"], row["percent_of_copy"]))
            if row.get("us_16bit") is not None:
                lines["16-bit paged twin"].append((row["context"], row["us_16bit"], row["percent_of_copy_16bit"]))
        for label, points in lines.items():
            points = sorted(set(points))
            style = {"color": "black", "linestyle": "--"} if "16-bit" in label else {}
            contexts = [point[0] for point in points]
            axes[0][column].plot(contexts, [point[1] for point in points], marker="o", label=label, **style)
            axes[1][column].plot(contexts, [point[2] for point in points], marker="o", label=label, **style)
        axes[0][column].set(title=f"{shape}, batch {batch}, {at[0]['cache']}", ylabel="us per call", xscale="log", yscale="log")
        axes[1][column].axhline(100, color="grey", linewidth=1, label="device-to-device copy")
        axes[1][column].set(xlabel="context (tokens)", ylabel="% of copy bandwidth", xscale="log")
        axes[1][column].set_ylim(0, max(110, *axes[1][column].get_ylim()))
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=7)
    return figure


def _draw_error(plt: Any, rows: list[Row]) -> Any:
    """Draw the error of keys, values and attention over bits per element, one line per distribution and encoder."""
    quantities = (("k_error", "keys"), ("v_error", "values"), ("attention_error", "attention output"))
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.4))
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["distribution"] for row in rows))}
    for axis, (key, label) in zip(axes, quantities, strict=True):
        lines: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            bits = row["bits_per_element"] if key == "attention_error" else row[f"{key[0]}_bits"]
            lines[row["distribution"], row["encoder"]].append((bits, row[key]))
        for (distribution, encoder), points in lines.items():
            xs, ys = zip(*sorted(set(points)), strict=True)
            dashes = {"published": "--", "unbalanced": ":"}.get(encoder, "-")
            text = f"{distribution}, {encoder}" if key == "k_error" else None
            if key == "attention_error":  # presets of different keys and values don't lie on one line
                markers = {"published": "x", "unbalanced": "_"}.get(encoder, ".")
                axis.plot(xs, ys, markers, color=colors[distribution])
            else:
                axis.plot(xs, ys, dashes, marker=".", color=colors[distribution], label=text, linewidth=1)
        what = "bits per element, scales included" if key == "attention_error" else "bits of a code"
        axis.set(title=f"relative error of {label}", xlabel=what, yscale="log")
    axes[2].set_title("attention output (. default, x published, _ unbalanced)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=7)
    return figure


def losses(rows: Sequence[Row]) -> str:
    """Return the lines that say where the 16-bit twin is faster."""
    compared = [row for row in rows if row.get("times_16bit") is not None]
    lost = [row for row in compared if row["times_16bit"] < 1]
    if not compared:
        return "No row was compared with the 16-bit twin."
    lines = [f"16 bits are faster in {len(lost)} of {len(compared)} rows" + (":" if lost else ".")]
    for row in sorted(lost, key=lambda row: row["times_16bit"]):
        point = f"{row['shape']} {row['preset']} batch {row['batch']} context {row['context']}"
        lines.append(f"  {point} ({row['cache']}): {row['times_16bit']:.2f}x")
    return "\n".join(lines)
