"""Nats against tokens, one line for each healed folder.

    python examples/heal/plot.py -o healing.svg "relatent, 50 %=HEALED" "transmla, 50 %=OTHER" ...

Each argument is a name and a folder (or a healing_report.json) that heal.py wrote with --validation.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def curve(place: str) -> tuple[list[float], list[float]]:
    path = Path(place)
    path = path / "healing_report.json" if path.is_dir() else path
    rows = json.loads(path.read_text())["validation"]
    if not rows:
        raise SystemExit(f"plot: {path} has no figures: heal with --validation")
    return [row["tokens"] for row in rows], [row["nats"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".svg or .png")
    options = parser.parse_args()

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for run in options.runs:
        name, _, place = run.rpartition("=")
        tokens, nats = curve(place)
        axes.plot(tokens, nats, marker="o", markersize=3, label=name or place)
    # The start has no tokens, so the scale is linear up to the first measurement after it.
    axes.set_xscale("symlog", linthresh=3e5)
    axes.set_yscale("log")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("nats lost per token")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(options.output)


if __name__ == "__main__":
    main()
