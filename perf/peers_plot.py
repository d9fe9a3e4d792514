"""Draw decode attention beside other kernels from `perf/results/peers_h200.json` (extra `[plot]`).

python perf/peers_plot.py docs/peers_h200.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
POINTS = (
    ("8x32K 32/8/128", "8 x 32K"),
    ("128x4K 32/8/128", "128 x 4K"),
    ("1x32K 32/8/128", "1 x 32K"),
    ("1x4K 32/8/128", "1 x 4K"),
    ("1x1K 32/8/128", "1 x 1K"),
)
KERNELS = (
    ("kvarn_triton k4v2, served", ("kv:k4v2 served f16",), "tab:red"),
    ("FA3, fp8", ("fa38:",), "tab:blue"),
    ("FlashInfer, fp8", ("fi8:",), "tab:blue"),
    ("vLLM Triton, fp8", ("vllm8:",), "tab:blue"),
    ("FA3, 16 bits", ("fa3:",), "black"),
    ("FlashInfer, 16 bits", ("fi:",), "black"),
    ("cuDNN (SDPA), 16 bits", ("sdpa:cudnn",), "black"),
    ("vLLM Triton, 16 bits", ("vllm:",), "black"),
    ("vLLM Triton, int4", ("int4:",), "tab:green"),
    ("vLLM TurboQuant, 4 bits", ("tq4:",), "tab:green"),
    ("published KVarN, k4v2", ("pub k4v2 served:",), "tab:green"),
)
"""Label, what names of variants begin with (the fastest is drawn), color: ours, fp8, 16 bits, 4 bits and less."""


def fastest(times: dict[str, float], starts: tuple[str, ...]) -> float | None:
    """Return the time of the fastest variant whose name begins with one of `starts`, None if there is none."""
    return min((us for name, us in times.items() if name.startswith(starts)), default=None)


def plot(results: Path, picture: Path) -> None:
    """Draw a panel per point, a row per kernel."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "peers", "font.size": 9}
    )  # text as text, the same ids each time
    found = json.loads(results.read_text())
    rows = {row["row"]: row["us"] for row in found["rows"]}
    figure, panels = plt.subplots(1, len(POINTS), figsize=(10.5, 3.2), sharey=True, layout="constrained")
    for panel, (key, label) in zip(panels, POINTS, strict=True):
        times = [(i, fastest(rows[key], starts), color) for i, (_, starts, color) in enumerate(KERNELS)]
        for i, us, color in times:
            if us is not None:
                panel.plot(us, i, "o", color=color, markersize=5)
                panel.annotate(
                    f"{us:,.0f}" if us >= 100 else f"{us:.1f}", (us, i), (6, -3), textcoords="offset points", color=color
                )
        ours = times[0][1]
        panel.axvline(ours, color="tab:red", linewidth=0.8, alpha=0.5)
        panel.set_xscale("log")
        largest = max(us for _, us, _ in times if us is not None)
        panel.set_xlim(min(us for _, us, _ in times if us is not None) / 1.4, largest * (largest / ours) ** 0.55)
        panel.set_xticks([])
        panel.minorticks_off()
        panel.set_title(label, fontsize=10)
        panel.grid(axis="y", alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(KERNELS)), [name for name, _, _ in KERNELS])
    panels[0].invert_yaxis()
    figure.suptitle(
        f"One decode attention call, us (log scale, less is better): batch x context, 32 query and 8 kv heads, head_dim 128, "
        f"{found['run']['device']}",
        fontsize=10,
    )
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None, dpi=130)


def main() -> None:
    """Draw the picture that README shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="file to write, .svg or .png")
    parser.add_argument("--results", type=Path, default=RESULTS / "peers_h200.json")
    arguments = parser.parse_args()
    plot(arguments.results, arguments.picture)


if __name__ == "__main__":
    main()
