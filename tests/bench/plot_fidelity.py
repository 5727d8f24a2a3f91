"""Draws what fidelity.py measured: nats lost against cache budget, as SVG.

One line for each method and model, through the best rotary size at every budget. Colour and dashes
tell the methods apart, markers the models. The same input gives the same bytes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402

INK = "#24292f"
GREY = "#d8dee4"
# Colour-blind safe, and of different darkness for those who print.
STYLES: dict[tuple[str, str], dict[str, Any]] = {
    ("relatent", "transformers"): {"color": "#0b5cad", "linestyle": "-"},
    ("relatent", "deepseek"): {"color": "#12805c", "linestyle": "-."},
    ("transmla", "transformers"): {"color": "#d1580a", "linestyle": "--"},
}
MARKERS = "osD^v"
WIDTH, HEIGHT = 7.2, 4.4  # inches
LABEL_GAP = 12.0  # points between labels that would touch
LETTER = 7.0  # points, generous: the viewer's font may be wider than the one here

Line = tuple[str, str, str]  # model, method, engine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of fidelity.py")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG file to write")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--title")
    return parser.parse_args()


def read_lines(files: list[Path], models: list[str] | None) -> dict[Line, dict[float, float]]:
    """For each line the fewest nats lost at every budget."""
    lines: dict[Line, dict[float, float]] = {}
    for file in files:
        for row in json.loads(file.read_text())["cells"]:
            if not row["in_table"] or (models and row["model"] not in models):
                continue
            nats = row["verify"]["validation"]["nats"]
            name = f"{row['model']} {row['method']} at {100 * row['budget']:g} %"
            if nats <= 0:
                print(f"{name}: {nats:.2g} nats, left out of a log scale", file=sys.stderr)
                continue
            points = lines.setdefault((row["model"], row["method"], row["engine"]), {})
            points[row["budget"]] = min(nats, points.get(row["budget"], nats))
    return lines


def spread(wanted: list[float], gap: float) -> list[float]:
    """The positions nearest to those wanted (ascending) that keep a gap between them."""
    blocks: list[list[float]] = []  # sum of (wanted - offset in the block), members
    for position in wanted:
        blocks.append([position, 1])
        while len(blocks) > 1:
            (total, count), (below, members) = blocks[-1], blocks[-2]
            if total / count - below / members >= gap * members:
                break
            blocks[-2:] = [[below + total - gap * members * count, members + count]]
    return [total / count + gap * i for total, count in blocks for i in range(int(count))]


def labels(lines: dict[Line, dict[float, float]]) -> dict[Line, str]:
    several = len({model for model, _, _ in lines}) > 1
    out = {}
    for model, method, engine in lines:
        text = f"{method}, {model}" if several else method
        out[model, method, engine] = text if engine == "transformers" else f"{text} ({engine})"
    return out


def label_lines(axes: Axes, lines: dict[Line, dict[float, float]]) -> None:
    """Names each line at its right end."""
    texts = labels(lines)
    ends = sorted((points[max(points)], max(points), line) for line, points in lines.items())
    points_per_pixel = 72 / axes.figure.dpi
    heights = [points_per_pixel * axes.transData.transform((100 * x, y))[1] for y, x, _ in ends]
    # A line may end earlier than others; all labels stand in one column beside the plot.
    right = axes.transAxes.transform((1, 0))[0]
    for (y, x, line), own, place in zip(ends, heights, spread(heights, LABEL_GAP), strict=True):
        _, method, engine = line
        pixels = right - axes.transData.transform((100 * x, y))[0]
        axes.annotate(
            texts[line],
            (100 * x, y),
            xytext=(pixels * points_per_pixel + 10, place - own),
            textcoords="offset points",
            color=STYLES[method, engine]["color"],
            fontweight="bold" if method == "relatent" else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkB": 5},
        )


def draw(axes: Axes, lines: dict[Line, dict[float, float]]) -> None:
    models = sorted({model for model, _, _ in lines})
    for line in sorted(lines):
        model, method, engine = line
        budgets = sorted(lines[line])
        axes.plot(
            [100 * budget for budget in budgets],
            [lines[line][budget] for budget in budgets],
            marker=MARKERS[models.index(model) % len(MARKERS)],
            markersize=5,
            linewidth=1.8,
            **STYLES[method, engine],
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    ticks = sorted({100 * budget for points in lines.values() for budget in points})
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.set_xlabel("cache per token, of the source's")
    axes.set_ylabel("nats lost per token, log scale")
    axes.grid(axis="y", color=GREY, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=3)


def main() -> None:
    options = arguments()
    lines = read_lines(options.results, options.models)
    if not lines:
        sys.exit("nothing to draw")
    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "relatent",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
            "font.size": 10,
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
            "axes.edgecolor": INK,
        }
    )
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT))
    beside = 20 + LETTER * max(map(len, labels(lines).values()))
    figure.subplots_adjust(left=0.09, right=1 - beside / (72 * WIDTH), top=0.91, bottom=0.12)
    models = sorted({model for model, _, _ in lines})
    title = options.title or "Nats lost against cache size"
    if not options.title and len(models) == 1:
        title += f", {models[0]}"
    axes.set_title(title, loc="left", fontsize=11)
    draw(axes, lines)
    figure.canvas.draw()
    label_lines(axes, lines)
    figure.savefig(options.output, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
