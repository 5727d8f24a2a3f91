"""What the figures of scale.py come to, and how they read."""

import statistics
from typing import Any

DTYPES = ("float32", "bfloat16")

Run = dict[str, Any]
Runs = dict[str, list[Run]]


def median(runs: list[Run], key: str = "seconds") -> float:
    return statistics.median(run[key] for run in runs)


def ratio(these: list[Run], those: list[Run], key: str = "seconds") -> dict[str, float]:
    """Of the runs of each round."""
    all_of_them = [a[key] / b[key] for a, b in zip(these, those, strict=True)]
    return {
        "median": statistics.median(all_of_them),
        "least": min(all_of_them),
        "most": max(all_of_them),
    }


def ratio_text(of: dict[str, float]) -> str:
    return f"{of['median']:.2f} ({of['least']:.2f} to {of['most']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def run_row(name: str, runs: list[Run]) -> list[str]:
    seconds = sorted(run["seconds"] for run in runs)
    out = [name, f"{median(runs):.2f}", f"{seconds[0]:.2f} to {seconds[-1]:.2f}"]
    out.append(f"{median(runs, 'cpu_seconds'):.2f}")
    if "peak_anonymous_bytes" not in runs[0]:
        return [*out, "", ""]
    peaks = (max(run[f"peak_{kind}_bytes"] for run in runs) for kind in ("anonymous", "mapped"))
    return [*out, *(f"{peak / 1e6:.0f}" for peak in peaks)]


RUN_HEAD = ["", "median s", "range s", "processor s", "peak anonymous MB", "peak mapped MB"]


def text_convert(part: dict[str, Any]) -> str:
    runs = part["runs"]
    cache = "warm" if part["warm"] else "not warm in every run"
    share = part["bytes_in_layers"] / part["bytes"]
    rows = [run_row(name, runs[name]) for name in ("cp -r", "convert", "floor")]
    lines = [
        f"## convert: weights-only, {part['shape']}, {part['layers']} layers, "
        f"rank {part['rank']} + rotary {part['rope_dim']}\n",
        f"{part['bytes'] / 1e9:.2f} GB, {100 * share:.0f} % of them in layers; "
        f"page cache {cache}.\n",
        table(RUN_HEAD, rows),
        f"convert / cp: {ratio_text(part['convert_to_copy'])}; "
        f"convert / floor: {ratio_text(part['convert_to_floor'])}; "
        f"convert / (cp + floor): {ratio_text(part['convert_to_copy_and_floor'])}; "
        f"floor / cp: {ratio_text(part['floor_to_copy'])}.\n",
        "Processor seconds, which other work on the machine hardly changes: convert / floor "
        f"{ratio_text(part['processor_convert_to_floor'])}.\n",
    ]
    flops = part["floor_flops_per_layer"]
    items = []
    for name, count in flops.items():
        seconds = statistics.median(run["items"][name] for run in runs["floor"]) / part["layers"]
        items.append([name, f"{count / 1e9:.2f}", f"{seconds:.3f}"])
    return "\n".join([*lines, table(["floor, one layer", "Gflop", "processor s"], items)])


def text_calibrate(part: dict[str, Any]) -> str:
    out = [
        f"## calibrate: {part['shape']}, {part['sequences']} sequences of {part['length']}\n",
        "transformers: seconds of the forward pass alone, warmed up, without the output head; "
        "processor and memory of the whole process.\n",
    ]
    rows = []
    ratios = []
    for row in part["by_layers"]:
        rows += [
            run_row(f"{name}, {row['layers']} layers", runs) for name, runs in row["runs"].items()
        ]
        ratios.append(
            [str(row["layers"])]
            + [
                ratio_text(row[f"{kind}{dtype}"])
                for kind in ("to_", "memory_to_")
                for dtype in DTYPES
            ]
        )
    head = [f"{what} / {dtype}" for what in ("time", "anonymous memory") for dtype in DTYPES]
    return "\n".join([*out, table(RUN_HEAD, rows), table(["layers", *head], ratios)])


def text_refit(part: dict[str, Any]) -> str:
    rows = []
    for row in part["by_layers"]:
        for command, runs in row["runs"].items():
            rows.append(run_row(f"{command}, {row['layers']} layers", runs))
    converted = part["by_layers"][-1]["runs"]["convert"]
    estimate = converted[0]["memory_bytes_estimate"] / 1e6
    peak = max(run["peak_anonymous_bytes"] for run in converted) / 1e6
    lines = [
        f"## refit: relatent, {part['shape']}, rank {part['rank']} + rotary {part['rope_dim']}, "
        f"{part['sequences']} sequences of {part['length']}\n",
        table(RUN_HEAD, rows),
        f"convert / calibrate: {ratio_text(part['convert_to_calibrate'])}. "
        f"Memory of convert: {peak:.0f} MB anonymous, foretold {estimate:.0f} MB.\n",
    ]
    for command in ("calibrate", "convert"):
        layer = part[f"{command}_seconds_per_layer"]
        whole = part[f"{command}_seconds_of_the_whole"]
        lines.append(
            f"{command}: {layer:.1f} s for each further layer; extrapolated to "
            f"{part['layers_of_the_whole']} layers {whole / 60:.1f} min.\n"
        )
    return "\n".join(lines)


def text_growth(part: dict[str, Any]) -> str:
    out = [f"## growth: {part['shape']}, rotary {part['rope_dim']}\n"]
    for line in part["lines"]:
        fixed = f"rank {part['rank_along_layers']}"
        if line["axis"] == "rank":
            fixed = f"{part['layers_along_rank']} layers"
        head = [f"{line['method']}, {fixed}; {line['axis']}", *RUN_HEAD[1:], "time to the first"]
        rows = [
            [*run_row(str(point["value"]), point["runs"]), ratio_text(point["to_first"])]
            for point in line["points"]
        ]
        out.append(table(head, rows))
    return "\n".join(out)
