"""What conversions of a published model lose: SmolLM2-135M, every engine layout, four budgets.

The model comes from the package index and the tokens from this machine's documentation (smollm2.py).
Each row is one `relatent convert` and one `relatent verify`; TransMLA's method stands beside them with
the same calibration and cache. A served shape is a row of its own.

    python tests/bench/published.py --work FOLDER --json F.json

FOLDER keeps the model, the tokens and the calibration, and is used again. With --model, another
checkpoint and its token files take the place of SmolLM2.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = (0.5, 0.375, 0.28, 0.25)
STEP = 8


@dataclass
class Row:
    name: str
    budget: float | None
    options: list[str]
    result: dict[str, Any] = field(default_factory=dict)


class Bench:
    def __init__(self, options: argparse.Namespace, model: Path, calibration: Path, tokens: Path):
        self.binary = options.relatent
        self.threads = max(1, (os.cpu_count() or 1) // options.jobs)
        self.options = options
        self.model, self.calibration, self.tokens = model, calibration, tokens

    def relatent(self, *arguments: Any) -> dict[str, Any]:
        command = [self.binary, "--threads", self.threads, *arguments, "--json", "--quiet"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip())
        return json.loads(done.stdout)

    def run(self, row: Row) -> Row:
        with tempfile.TemporaryDirectory(dir=self.options.work) as scratch:
            out = Path(scratch) / "converted"
            made = self.relatent(
                *("convert", self.model, "-o", out, "--calibration", self.calibration),
                *row.options,
            )
            found = self.relatent(
                *("verify", self.model, out, "--tokens", self.tokens),
                *("--sequences", self.options.validation_sequences),
            )
        cache = found["kv_bytes_per_token"]
        row.result = {
            "rope_dim": made["rope_dim"],
            "kv_rank": made["kv_rank"],
            "cache_part": cache["converted"] / cache["source"],
            "source_ppl": found["source_ppl"],
            "converted_ppl": found["converted_ppl"],
            "nats": found["nats"],
            "nats_foretold": (made["measured"] or {}).get("nats"),
            "mean_kl": found["mean_kl"],
            "top1_agreement": found["top1_agreement"],
            "seconds": made["seconds"],
            "peak_rss_bytes": made["peak_rss_bytes"],
            "warnings": made["warnings"],
        }
        print(f"{row.name}: {row.result['nats']:.4f} nats", file=sys.stderr, flush=True)
        return row


def sizes(model: Path, budget: float, part: float, plain: bool) -> list[str]:
    """Rotary size and rank: `part` of the budget turns, or of a plain list the head size at most."""
    config = json.loads((model / "config.json").read_text())
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    total = int(budget * 2 * config["num_key_value_heads"] * head_dim)
    rotary = max(STEP, round(part * total / STEP) * STEP)
    if plain:
        rotary = min(head_dim, rotary)
    return ["--rope-dim", str(rotary), "--rank", str(total - rotary)]


def rows_of(model: Path, budgets: list[float]) -> list[Row]:
    rows = []
    for budget in budgets:
        free = sizes(model, budget, 0.25 if budget >= 0.3 else 0.3, plain=False)
        plain = sizes(model, budget, 0.29 if budget >= 0.5 else 0.4, plain=True)
        rows += [
            Row(f"relatent {budget:.3g}", budget, ["--engine", "relatent", *free]),
            Row(f"deepseek {budget:.3g}", budget, ["--engine", "deepseek", *plain]),
            Row(f"transmla {budget:.3g}", budget, ["--method", "transmla", "--kv-budget", f"{budget}"]),
        ]
    for engine in ("transformers", "deepseek"):
        for shape in ("512+64", "256+64"):
            rows.append(Row(f"{engine} {shape}", None, ["--engine", engine, "--shape", shape]))
    return rows


def table(rows: list[Row]) -> str:
    head = "| layout | cache | rotary + rank | perplexity | nats lost | KL | top-1 | s | memory |"
    lines = [head, "|" + "---|" * 9]
    for row in rows:
        r = row.result
        if not r:
            continue
        if "error" in r:
            lines.append(f"| {row.name} | | | | {r['error']} | | | | |")
            continue
        lines.append(
            f"| {row.name} | {100 * r['cache_part']:.0f} % | {r['rope_dim']} + {r['kv_rank']} "
            f"| {r['converted_ppl']:.2f} | {r['nats']:.3f} | {r['mean_kl']:.3f} "
            f"| {100 * r['top1_agreement']:.1f} % | {r['seconds']:.0f} "
            f"| {r['peak_rss_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for model and results")
    parser.add_argument("--json", type=Path, help="where the rows go in full")
    parser.add_argument("--relatent", default=str(ROOT / "build/release/cli/relatent"))
    parser.add_argument("--model", type=Path, help="a checkpoint folder in place of SmolLM2")
    parser.add_argument("--calibration-tokens", type=Path)
    parser.add_argument("--validation-tokens", type=Path)
    parser.add_argument("--sequences", type=int, default=64, help="to calibrate on, of 1024 tokens")
    parser.add_argument("--validation-sequences", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=1, help="conversions at a time")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--only", default="", help="rows whose name begins so")
    return parser.parse_args()


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.model:
        model = options.model
        calibration_tokens, tokens = options.calibration_tokens, options.validation_tokens
    else:
        import smollm2

        model, calibration_tokens, tokens = smollm2.prepare(options.work)
    calibration = options.work / f"{model.name}-{options.sequences}.h5"
    if not calibration.exists():
        subprocess.run(
            [options.relatent, "calibrate", model, "--tokens", calibration_tokens, "-o", calibration]
            + ["--sequences", str(options.sequences), "--quiet"],
            check=True,
        )
    rows = [row for row in rows_of(model, options.budgets) if row.name.startswith(options.only)]
    bench = Bench(options, model, calibration, tokens)

    def attempt(row: Row) -> Row:
        try:
            return bench.run(row)
        except RuntimeError as error:
            row.result = {"error": str(error)}
            return row
        finally:
            if options.json:
                partial = options.json.with_suffix(".partial")
                partial.write_text(json.dumps([asdict(r) for r in rows], indent=1))
                shutil.move(partial, options.json)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(attempt, rows))
    source = next((r.result["source_ppl"] for r in rows if "source_ppl" in r.result), None)
    print(f"{model.name}, source perplexity {source:.3f}\n" if source else model.name)
    print(table(rows))


if __name__ == "__main__":
    main()
