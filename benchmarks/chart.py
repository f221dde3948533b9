"""The charts of speed.md: what a training step makes of the machine, from the figures of step.py.

pip install -e ".[bench]"
python benchmarks/chart.py [cpu|cuda]         writes benchmarks/results/step_<device>.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - after the choice of how to draw

RESULTS = Path(__file__).resolve().parent / "results"
OURS, THEIRS = "#2b6cb0", "#a0aec0"


def draw(result, path):
    """One bar a row of the step's table, in its order, the ratio to the reference at its end."""
    rows = result["groups"]["all"]["rows"]
    labels = [f"{row['name']}, {row['precision']}" for row in rows]
    labels = [label + (", memory kept" if row["allocator"] == "kept" and row["preset"] == "reference" else "")
              + (", memory not kept" if row["allocator"] == "default" and row["preset"] != "reference" else "")
              for label, row in zip(labels, rows, strict=True)]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.27 * len(rows)))
    colours = [THEIRS if row["preset"] == "reference" else OURS for row in rows]
    bars = axes.barh(labels, [row["img/s"] for row in rows], color=colours)
    axes.bar_label(bars, [f" {row['ratio']:.2f}x" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("pictures a second; at the bars: times the reference, eager fp32", fontsize=8)
    cores = f"{result['cores']} cores of " if result.get("cores") else ""
    axes.set_title(
        f"A training step, 64x64, batch 128, {cores}{result['device'].split(' (')[0]}", fontsize=9, loc="left"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    result = json.loads((RESULTS / f"step_{device}.json").read_text())
    draw(result, RESULTS / f"step_{device}.png")
    print(f"written: {RESULTS / f'step_{device}.png'}")


if __name__ == "__main__":
    main()
