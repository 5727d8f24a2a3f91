"""Nats lost against cache budget: `--method relatent` beside `--method transmla`.

Both methods get the same calibration file, the same number of cache values per token and layer
(rotary + rank; a constant coordinate comes on top, for both) and the same validation tokens. How
a budget is best divided between rotary key and latent differs from method to method and from
model to model, so several rotary sizes may be tried for a budget; the best is reported for each
method, and every one tried is listed. It is chosen on the validation tokens, for both alike.

--ablate BUDGET:ROPE shows what each stage of the relatent method is worth in that one cell.

Options of `relatent convert` go through --extra and --transmla-extra; give them with an equals
sign, as in --extra="--fit-stride 4".
"""

import argparse
import contextlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runner import Failure, Row, Runner, parser_of

# Flags that take stages out of the relatent method, and the stages as they come in one by one.
ALL_OUT = (
    "--plain-list",
    "--no-expected-rotation",
    "--no-output-metric",
    "--no-query-fit",
    "--no-key-fit",
    "--no-refit",
)
STAGES = (
    ("+ expected rotation", "--no-expected-rotation"),
    ("+ free list of frequencies", "--plain-list"),
    ("+ output metric", "--no-output-metric"),
    ("+ refit of o_proj", "--no-refit"),
    ("+ query fit", "--no-query-fit"),
    ("+ key fit", "--no-key-fit"),
)

Budget = tuple[float, list[int]]  # a part of the source's cache, rotary sizes to try in it


@dataclass(frozen=True)
class Cell:
    """One conversion."""

    method: str
    engine: str
    budget: float
    rope_dim: int
    extra: str = ""


@dataclass(frozen=True)
class Sizes:
    """What of the source's shape decides which cells there are."""

    head_dim: int
    cache_elements: int  # per token and layer

    def rank(self, budget: float, rope_dim: int) -> int:
        return math.floor(budget * self.cache_elements) - rope_dim

    def divides(self, rope_dim: int) -> bool:
        return rope_dim % 2 == 0 and self.head_dim % rope_dim == 0


def budget(text: str) -> Budget:
    part, separator, ropes = text.partition(":")
    try:
        out = float(part), [int(rope) for rope in ropes.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0.5:80,64") from None
    if not separator or not 0 < out[0] <= 1 or min(out[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0.5:80,64")
    return out


def single_budget(text: str) -> tuple[float, int]:
    part, ropes = budget(text)
    if len(ropes) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0.5:64")
    return part, ropes[0]


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--cells",
        type=budget,
        nargs="+",
        metavar="BUDGET:ROPE,...",
        help="cache budgets, with the rotary sizes to try for relatent "
        "(default: 0.5 with 5/4 and 1 of the head size, 0.375 with 3/4, 0.25 with 1/2, 0.125 with "
        "1/4; none when --ablate is given)",
    )
    parser.add_argument(
        "--transmla-cells",
        type=budget,
        nargs="+",
        metavar="BUDGET:ROPE,...",
        help="likewise for transmla (default: the same budgets, those of 16, 32, 64 that fit)",
    )
    parser.add_argument(
        "--engine", nargs="+", default=["transformers"], help="of relatent; transmla has one"
    )
    parser.add_argument(
        "--also-calibration", action="store_true", help="verify on the calibration tokens, too"
    )
    parser.add_argument("--extra", default="", help="more options for --method relatent")
    parser.add_argument(
        "--transmla-extra",
        action="append",
        help="more options for --method transmla; again for another set, the best is reported",
    )
    parser.add_argument(
        "--ablate", type=single_budget, metavar="BUDGET:ROPE", help="one row per stage"
    )
    parser.add_argument(
        "--json", type=Path, help="write every figure here; what it already holds is not run again"
    )
    parser.add_argument("--keep", type=Path, help="folder for calibration and conversions, kept")
    return parser.parse_args()


def sizes_of(model: Path) -> Sizes:
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return Sizes(head_dim, 2 * (config.get("num_key_value_heads") or heads) * head_dim)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def nats(row: Row, tokens: str = "validation") -> float:
    return row["verify"][tokens]["nats"]


def best(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=nats, default=None)


class Bench(Runner):
    """Runs cells and keeps what is known of them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        super().__init__(options)
        self.folder = folder
        self.model = options.model.resolve().name
        self.sizes = sizes_of(options.model)
        self.calibration: Row | None = None
        self.failed = False
        self.results: dict[str, Any] = {
            "settings": {
                "calibration_tokens": options.calibration_tokens.name,
                "sequences": self.tokens["calibration"][1],
                "validation_tokens": options.validation_tokens.name,
                "validation_sequences": self.tokens["validation"][1],
                "length": options.length,
            },
            "cells": [],
        }
        if options.json and options.json.exists():
            self.take_up(json.loads(options.json.read_text()))

    def take_up(self, earlier: dict[str, Any]) -> None:
        for name, value in self.results["settings"].items():
            found = earlier["settings"].get(name)
            if found != value:
                sys.exit(f"{self.options.json} is for {name} {found}, not {value}: name another")
        self.results = earlier

    def save(self) -> None:
        if self.options.json:
            # In one step, so that an interruption leaves the old file or the new one.
            new = self.options.json.with_name(self.options.json.name + ".new")
            new.write_text(json.dumps(self.results, indent=1) + "\n")
            new.replace(self.options.json)

    def calibrated(self) -> tuple[Path, Row]:
        file = self.folder / f"{self.model}-calibration.h5"
        if self.calibration is None:
            self.calibration = self.calibrate(file)
            say(f"calibrate {self.model}: {self.calibration['seconds']:.1f} s")
        return file, self.calibration

    def known(self, cell: Cell) -> Row | None:
        wanted = {"model": self.model, **asdict(cell)}
        for row in self.results["cells"]:
            if all(row[name] == value for name, value in wanted.items()):
                return row
        return None

    def measure(self, cell: Cell, in_table: bool) -> Row | None:
        """The cell's figures, from earlier where they are all there; None when it failed."""
        row = self.known(cell)
        wanted = ["validation", *(["calibration"] if self.options.also_calibration else [])]
        if row is None or any(which not in row["verify"] for which in wanted):
            try:
                new = self.run(cell, wanted)
            except Failure as failure:
                # A usage error is a cell that this method or engine does not have.
                skipped = failure.code == 2
                self.failed = self.failed or not skipped
                say(f"{self.name(cell)}: {'skipped' if skipped else 'FAILED'}: {failure}")
                return None
            if row is None:
                row = new
                self.results["cells"].append(row)
            else:
                row.update(new)
        row["in_table"] = row.get("in_table", False) or in_table
        self.save()
        return row

    def name(self, cell: Cell) -> str:
        words = [self.model, cell.method, cell.engine, f"{cell.budget:g}", f"{cell.rope_dim}"]
        return " ".join([*words, *cell.extra.split()])

    def run(self, cell: Cell, wanted: list[str]) -> Row:
        rank = self.sizes.rank(cell.budget, cell.rope_dim)
        if rank <= 0:
            raise Failure(2, f"no room for a latent beside a rotary key of {cell.rope_dim}")
        calibration, calibrate = self.calibrated()
        folder = self.folder / re.sub(r"[^\w.]+", "-", self.name(cell))
        # Left over from a run that was interrupted, or for other settings.
        for left in (folder, Path(f"{folder}.partial")):
            shutil.rmtree(left, ignore_errors=True)
        words: list[object] = ["convert", self.options.model, "-o", folder]
        words += ["--method", cell.method, "--engine", cell.engine, "--calibration", calibration]
        words += ["--rope-dim", cell.rope_dim, "--rank", rank, *cell.extra.split()]
        convert = self.relatent(*words)
        verify = {which: self.verify(folder, which) for which in wanted}
        if not self.options.keep:
            shutil.rmtree(folder)
        row = {
            "model": self.model,
            **asdict(cell),
            "rank": rank,
            "calibrate": calibrate,
            "convert": convert,
            "convert_over_calibrate": convert["seconds"] / calibrate["seconds"],
            "verify": verify,
        }
        say(f"{self.name(cell)}: {nats(row):.4f} nats, converted in {convert['seconds']:.1f} s")
        return row

    def measured(self, cells: Iterable[Cell], in_table: bool) -> list[Row]:
        rows = [self.measure(cell, in_table) for cell in cells]
        return [row for row in rows if row]


def default_cells(sizes: Sizes) -> list[Budget]:
    d = sizes.head_dim
    parts = ((0.5, (5, 4)), (0.375, (3,)), (0.25, (2,)), (0.125, (1,)))
    return [(part, [2 * (d * quarters // 8) for quarters in tries]) for part, tries in parts]


def default_transmla_cells(cells: list[Budget], sizes: Sizes) -> list[Budget]:
    return [
        (part, [r for r in (64, 32, 16) if sizes.divides(r) and sizes.rank(part, r) > 0])
        for part, _ in cells
    ]


def markdown(columns: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def shape_words(row: Row | None) -> str:
    return f"{row['rope_dim']} + {row['rank']}" if row else "–"


def nats_words(bench: Bench, row: Row | None) -> list[str]:
    tokens = ["validation", *(["calibration"] if bench.options.also_calibration else [])]
    return [f"{nats(row, which):.4f}" if row else "–" for which in tokens]


def nats_columns(bench: Bench, of: str) -> list[str]:
    both = bench.options.also_calibration
    return [f"{of}nats lost", *([f"{of}on the calibration tokens"] if both else [])]


def ratio(ours: Row | None, theirs: Row | None) -> float | None:
    return nats(ours) / nats(theirs) if ours and theirs and nats(theirs) > 0 else None


def ratio_words(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def option_words(row: Row) -> str:
    fold = row["convert"].get("fold")
    words = [f"fold {fold}" if fold else "", row["extra"]]
    return ", ".join(word for word in words if word)


def print_title(bench: Bench, rows: list[Row]) -> None:
    settings = bench.results["settings"]
    print(
        f"{bench.model}: source perplexity {rows[0]['verify']['validation']['source_ppl']:.3f}, "
        f"calibrated on {settings['sequences']} and verified on "
        f"{settings['validation_sequences']} sequences of {settings['length']}\n"
    )


def run_table(bench: Bench) -> None:
    options = bench.options
    cells = options.cells or default_cells(bench.sizes)
    transmla_cells = options.transmla_cells or default_transmla_cells(cells, bench.sizes)
    rows: list[Row] = []
    for part, ropes in transmla_cells:
        for extra in options.transmla_extra or [""]:
            tries = [Cell("transmla", "transformers", part, rope, extra) for rope in ropes]
            rows += bench.measured(tries, in_table=True)
    for engine in options.engine:
        for part, ropes in cells:
            tries = [Cell("relatent", engine, part, rope, options.extra) for rope in ropes]
            rows += bench.measured(tries, in_table=True)
    if not rows:
        sys.exit("nothing was measured")
    # Sizes that one method does not have are no failure; having none of them is.
    bench.failed = bench.failed or len({row["method"] for row in rows}) < 2

    table = []
    summary = []
    parts = sorted({part for part, _ in [*cells, *transmla_cells]}, reverse=True)
    for engine in options.engine:
        for part in parts:
            here = [row for row in rows if row["budget"] == part]
            ours = best(r for r in here if r["method"] == "relatent" and r["engine"] == engine)
            theirs = best(r for r in here if r["method"] == "transmla")
            value = ratio(ours, theirs)
            name = shape_words(ours) + ("" if engine == "transformers" else f", {engine}")
            table.append(
                [f"{100 * part:g} %", name, *nats_words(bench, ours), shape_words(theirs)]
                + [*nats_words(bench, theirs), ratio_words(value)]
            )
            summary.append(
                {
                    "engine": engine,
                    "budget": part,
                    "relatent": ours and {"rope_dim": ours["rope_dim"], "nats": nats(ours)},
                    "transmla": theirs and {"rope_dim": theirs["rope_dim"], "nats": nats(theirs)},
                    "ratio": value,
                }
            )
    bench.results.setdefault("tables", {})[bench.model] = summary
    bench.save()

    print_title(bench, rows)
    markdown(
        ["cache", "relatent, rotary + rank", *nats_columns(bench, "")]
        + ["transmla, rotary + rank", *nats_columns(bench, ""), "ratio of nats"],
        table,
    )
    print("Every cell tried:\n")
    markdown(
        ["cache", "method", "engine", "rotary + rank", "options", "perplexity"]
        + [*nats_columns(bench, ""), "mean KL", "top-1", "convert s", "convert / calibrate"],
        [
            [f"{100 * row['budget']:g} %", row["method"], row["engine"], shape_words(row)]
            + [option_words(row), f"{row['verify']['validation']['converted_ppl']:.3f}"]
            + [*nats_words(bench, row), f"{row['verify']['validation']['mean_kl']:.4f}"]
            + [f"{100 * row['verify']['validation']['top1_agreement']:.1f} %"]
            + [f"{row['convert']['seconds']:.1f}", f"{row['convert_over_calibrate']:.1f}"]
            for row in sorted(rows, key=lambda row: -row["budget"])
        ],
    )


def run_ablation(bench: Bench) -> None:
    part, rope = bench.options.ablate
    sizes = bench.sizes
    transmla_rope = max((r for r in range(2, rope + 1) if sizes.divides(r)), default=2)
    tries = [
        Cell("transmla", "transformers", part, transmla_rope, extra)
        for extra in bench.options.transmla_extra or [""]
    ]
    transmla = best(bench.measured(tries, in_table=False))
    stages = [("transmla", transmla)]

    out = list(ALL_OUT)
    names = [("closed forms", ""), *STAGES]
    for name, flag in names:
        out = [other for other in out if other != flag]
        extra = " ".join([*out, *bench.options.extra.split()])
        cell = Cell("relatent", "transformers", part, rope, extra)
        # A geometric list holds no more frequencies than one head has.
        if "--plain-list" in out:
            cell = replace(cell, rope_dim=min(rope, sizes.head_dim))
        stages.append((name, bench.measure(cell, in_table=False)))
    rows = [row for _, row in stages if row]
    if not rows:
        sys.exit("nothing was measured")
    ablation = [
        {"stage": name, "rope_dim": row["rope_dim"], "nats": nats(row)}
        for name, row in stages
        if row
    ]
    ablations = bench.results.setdefault("ablations", {})
    ablations[f"{bench.model} {part:g}:{rope} {bench.options.extra}".strip()] = ablation
    bench.save()

    print_title(bench, rows)
    print(f"Stage by stage, each with those above it, at {100 * part:g} % of the cache:\n")
    markdown(
        ["stage", "rotary + rank", "perplexity", *nats_columns(bench, "")]
        + ["of transmla's", "convert s", "convert / calibrate"],
        [
            [name, shape_words(row)]
            + [f"{row['verify']['validation']['converted_ppl']:.3f}" if row else "–"]
            + [*nats_words(bench, row), ratio_words(ratio(row, transmla))]
            + [f"{row['convert']['seconds']:.1f}" if row else "–"]
            + [f"{row['convert_over_calibrate']:.1f}" if row else "–"]
            for name, row in stages
        ],
    )


def main() -> None:
    options = arguments()
    with contextlib.ExitStack() as stack:
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            folder = options.keep
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(options, folder)
        try:
            if options.cells or not options.ablate:
                run_table(bench)
            if options.ablate:
                run_ablation(bench)
        except Failure as failure:
            sys.exit(str(failure))
        except KeyboardInterrupt:
            sys.exit("interrupted")
    if bench.failed:
        sys.exit("some cells failed")


if __name__ == "__main__":
    main()
