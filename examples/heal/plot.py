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


PANELS = {"nats": "nats lost per token", "kl": "KL(source || healed) per token"}


def rows_of(place: str) -> list[dict[str, float]]:
    path = Path(place)
    path = path / "healing_report.json" if path.is_dir() else path
    rows: list[dict[str, float]] = json.loads(path.read_text())["validation"]
    if not rows:
        raise SystemExit(f"plot: {path} has no figures: heal with --validation")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".svg or .png")
    options = parser.parse_args()

    figure, panels = plt.subplots(1, len(PANELS), figsize=(10, 4.2), layout="constrained")
    for axes, (key, label) in zip(panels, PANELS.items()):
        for run in options.runs:
            name, _, place = run.rpartition("=")
            rows = rows_of(place)
            tokens = [row["tokens"] for row in rows]
            values = [row[key] for row in rows]
            axes.plot(tokens, values, marker="o", markersize=3, label=name or place)
        # No tokens at the start, and below the source's loss at the end: linear around zero.
        axes.set_xscale("symlog", linthresh=1e5)
        axes.set_yscale("symlog", linthresh=0.1)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel(label)
        axes.grid(True, alpha=0.3)
    panels[-1].legend(loc="lower left")
    figure.savefig(options.output)


if __name__ == "__main__":
    main()
