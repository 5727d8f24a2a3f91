"""Draws how the cost of conversions grows, from the growth part of scale.py, as SVG.

Time above, on a logarithmic scale, and peak anonymous memory below, against layers on the left and
against the rank on the right; one line for each method. The same input gives the same bytes.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from plot_fidelity import GREY, INK, STYLES  # noqa: E402

LOOKS: dict[str, dict[str, Any]] = {
    "relatent": STYLES["relatent", "transformers"],
    "weights-only": STYLES["transmla", "transformers"],
}
WIDTH, HEIGHT = 7.2, 4.8  # inches


def draw(axes: Axes, line: dict[str, Any], key: str, scale: float) -> None:
    """The medians, and a bar over all runs of each point."""
    values = [point["value"] for point in line["points"]]
    runs = [[run[key] / scale for run in point["runs"]] for point in line["points"]]
    middle = [statistics.median(some) for some in runs]
    bars = [
        [at - min(some) for at, some in zip(middle, runs, strict=True)],
        [max(some) - at for at, some in zip(middle, runs, strict=True)],
    ]
    look = LOOKS[line["method"]]
    axes.errorbar(values, middle, bars, marker="o", markersize=4, capsize=2, **look)
    axes.set_xticks(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON file of scale.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG file to write")
    options = parser.parse_args()
    part = json.loads(options.results.read_text())["parts"].get("growth")
    if part is None:
        sys.exit(f"{options.results} has no part growth")
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "relatent",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
            "font.size": 9,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
            "axes.edgecolor": INK,
        }
    )
    figure, grid = plt.subplots(2, 2, figsize=(WIDTH, HEIGHT), sharey="row", sharex="col")
    figure.subplots_adjust(left=0.1, right=0.97, top=0.86, bottom=0.1, wspace=0.08, hspace=0.12)
    figure.suptitle(
        f"Cost of a conversion at the shapes of {part['shape']}", x=0.1, ha="left", fontsize=11
    )
    columns = {"layers": 0, "rank": 1}
    rows = (("seconds", 1.0, "seconds"), ("peak_anonymous_bytes", 1e6, "peak anonymous MB"))
    for row, (key, scale, label) in enumerate(rows):
        for line in part["lines"]:
            draw(grid[row, columns[line["axis"]]], line, key, scale)
        grid[row, 0].set_ylabel(label)
    # The methods are orders apart in time.
    grid[0, 0].set_yscale("log")
    grid[0, 0].yaxis.set_major_formatter("{x:g}")
    grid[1, 0].set_ylim(0, 1.08 * max(axes.dataLim.ymax for axes in grid[1]))
    for axes in grid.flat:
        axes.grid(axis="y", color=GREY, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=3)
    grid[1, 0].set_xlabel(f"layers, rank {part['rank_along_layers']}")
    grid[1, 1].set_xlabel(f"rank, {part['layers_along_rank']} layers")
    methods = sorted({line["method"] for line in part["lines"]})
    handles = [plt.Line2D([], [], marker="o", markersize=4, **LOOKS[name]) for name in methods]
    figure.legend(
        handles, methods, loc="upper left", bbox_to_anchor=(0.09, 0.945), ncols=2, frameon=False
    )
    figure.savefig(options.output, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
