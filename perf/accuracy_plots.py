"""Pictures of the accuracy sweep, also from several JSON files: python perf/accuracy_plots.py FILE.json ... --plot FILE.png"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Row, title

LOW_BITS = "k2v2"
"""Widths of which error over position and lengths of keys are drawn."""


def _geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(max(value, 1e-12) for value in values)


def draw_accuracy(plt: Any, rows: Sequence[Row]) -> Any:
    """Draw KL over bits, error of keys and KL over position, and lengths of keys: of the first model, means over its seeds."""
    rows = [row for row in rows if "kl_generated" in row and row["model"] == rows[0]["model"]]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colors = {method: plt.get_cmap("tab20")(i * 2 % 20 + i // 10) for i, method in enumerate(methods)}
    figure, axes = plt.subplots(2, 2, figsize=(13, 10))

    points: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        points[row["method"]][row["bits"]].append(row)
    for method, by_bits in points.items():
        xs = [statistics.fmean(row["bits_per_number"] for row in group) for group in by_bits.values()]
        ys = [_geometric_mean([row["kl_generated"] for row in group]) for group in by_bits.values()]
        order = sorted(range(len(xs)), key=xs.__getitem__)
        axes[0][0].plot([xs[i] for i in order], [ys[i] for i in order], marker="o", color=colors[method], label=method)
    axes[0][0].set(xlabel="bits per number, scales included", ylabel="KL on generated text (nats)", yscale="log")
    axes[0][0].set_title(
        f"{rows[0]['model']}, error over bits: " + ", ".join(dict.fromkeys(row["bits"] for row in rows)), fontsize=9
    )

    low = [row for row in rows if row["bits"] == LOW_BITS] or rows
    for method in methods:
        group = [row for row in low if row["method"] == method]
        if not group:
            continue
        for axis, key in ((axes[0][1], "k_error_by_page"), (axes[1][0], "kl_generated_by_page")):
            length = min(len(row[key]) for row in group)
            means = [statistics.fmean(row[key][i] for row in group) for i in range(length)]
            axis.plot(range(length), means, marker=".", color=colors[method], label=method)
        bins = [row["length_bins"] for row in group if "length_bins" in row]
        if bins:
            counts = [sum(column) / sum(map(sum, bins)) for column in zip(*bins, strict=True)]
            edges = [0.7 + 0.01 * i for i in range(len(counts) + 1)]
            axes[1][1].stairs(counts, edges, color=colors[method], label=method)
    width = low[0]["bits"]
    axes[0][1].set(xlabel="quantized page", ylabel="relative error of keys", title=f"accumulated error of keys, {width}")
    axes[1][0].set(xlabel="page, the 16-bit sink first", ylabel="KL (nats)", title=f"KL over position, generated text, {width}")
    axes[1][1].set(xlabel="length read back / exact length", ylabel="share of tokens", title=f"lengths of keys, {width}")
    axes[1][1].set_ylim(0, 0.1)
    axes[0][0].legend(fontsize=7)
    return figure


def draw_real(plt: Any, rows: Sequence[Row]) -> Any:
    """Draw what the sweep `real` says: nats of codes and of passages, and KL, over bits; one line a method."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["bits"] != "16"))
    exact = next(row for row in rows if row["bits"] == "16")
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.5))
    pictures = (
        ("code_nats", "codes in a context: nats a digit", "linear"),
        ("passage_nats", "passages of a context: nats a token", "linear"),
        ("kl_generated", "KL to 16 bits on generated text, nats", "log"),
    )
    for axis, (key, label, scale) in zip(axes, pictures, strict=True):
        for i, method in enumerate(methods):
            found = sorted((row["bits_per_number"], row[key], row["bits"]) for row in rows if row["method"] == method)
            style = {"linewidth": 2.5, "color": "black"} if method == "default" else {"color": plt.get_cmap("tab10")(i)}
            axis.plot([x for x, _, _ in found], [y for _, y, _ in found], marker="o", label=method, **style)
            if method == "default":
                for x, y, bits in found:
                    axis.annotate(bits, (x, y), fontsize=7, textcoords="offset points", xytext=(3, -10))
        if key in exact:
            axis.axhline(exact[key], color="gray", linestyle="--", label="16 bits")
        axis.set(xlabel="bits per number, scales included", ylabel=label, yscale=scale)
    for axis in axes[:2]:
        axis.set_ylim(top=max(row["code_nats"] for row in rows if not row["method"].startswith("RTN")) * 1.2)
    axes[0].legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the rows of several files as one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="written by sweep.py accuracy --json")
    parser.add_argument(
        "--encoder", action="append", default=[], metavar="NAME", help="one of the encoders sweep, to draw too; may be repeated"
    )
    parser.add_argument("--model", help="draw this one; the first by default")
    parser.add_argument("--plot", required=True, metavar="FILE.png")
    arguments = parser.parse_args(argv)
    import matplotlib.pyplot as plt

    runs = [json.loads(Path(file).read_text()) for file in arguments.files]
    rows = [row for run in runs for row in run["sweeps"]["accuracy"]]
    rows += [row for run in runs for row in run["sweeps"].get("encoders", ()) if row["method"] in arguments.encoder]
    figure = draw_accuracy(plt, [row for row in rows if arguments.model in (None, row["model"])])
    figure.suptitle(title(runs[0]["run"]), fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
