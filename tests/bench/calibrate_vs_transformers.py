"""How long `relatent calibrate` takes beside transformers' own forward pass over the same tokens.

Both in float32 with the same number of threads on the same machine, in alternation, so that
whatever else the machine does falls on both. The two clocks favour transformers: of relatent the
whole command is timed, of transformers the forward pass alone, warmed up, without imports and
loading, and without the output head, which calibration does not need either (--head adds it).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--relatent", type=Path, default=ROOT / "build/release/cli/relatent")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/llama-3m")
    parser.add_argument("--tokens", type=Path, default=ROOT / "examples/tokens/calibration.npy")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--batch", type=int, default=4, help="sequences per forward of transformers"
    )
    parser.add_argument("--head", action="store_true", help="transformers forms the logits, too")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def forward(options: argparse.Namespace) -> None:
    """The transformers side, in a process of its own; prints its seconds."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(options.threads)
    whole = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32, local_files_only=True
    ).eval()
    model = whole if options.head else whole.model
    tokens = np.load(options.tokens)[: options.sequences * options.length].astype(np.int64)
    ids = torch.from_numpy(tokens).reshape(options.sequences, options.length)
    with torch.no_grad():
        model(ids[:1, :64], use_cache=False)
        start = time.perf_counter()
        for batch in ids.split(options.batch):
            model(batch, use_cache=False)
    print(json.dumps({"seconds": time.perf_counter() - start}))


def timed(command: list[str]) -> tuple[float, int, str]:
    """Runs a command: wall seconds, peak resident bytes, stdout."""
    start = time.perf_counter()
    # Not subprocess.run: only wait4 gives the memory of this one child.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"{command[0]} exited {process.returncode}")
    return seconds, usage.ru_maxrss * 1024, out


def run_relatent(options: argparse.Namespace, folder: str) -> dict[str, float]:
    command = [str(options.relatent), "--threads", str(options.threads), "calibrate"]
    command += [str(options.model), "--tokens", str(options.tokens), "--quiet"]
    command += ["--sequences", str(options.sequences), "--length", str(options.length)]
    seconds, peak, _ = timed([*command, "-o", f"{folder}/calibration.h5"])
    return {"seconds": seconds, "peak_rss_bytes": peak}


def run_transformers() -> dict[str, float]:
    _, peak, out = timed([sys.executable, *sys.argv, "--worker"])
    return {"seconds": json.loads(out)["seconds"], "peak_rss_bytes": peak}


def row(name: str, runs: list[dict[str, float]], tokens: int) -> str:
    seconds = sorted(run["seconds"] for run in runs)
    median = statistics.median(seconds)
    peak = max(run["peak_rss_bytes"] for run in runs)
    spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
    return f"| {name} | {median:.2f} | {spread} | {tokens / median:.0f} | {peak / 1e6:.0f} MB |"


def main() -> None:
    options = arguments()
    if options.worker:
        forward(options)
        return
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            ours.append(run_relatent(options, folder))
            theirs.append(run_transformers())
    tokens = options.sequences * options.length
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    what = "forward with logits" if options.head else "forward"
    print(
        f"{options.model.name}: {options.sequences} sequences of {options.length}, float32, "
        f"{options.threads} threads, {options.repeats} runs each, {platform.machine()}\n"
    )
    print("| | median s | range s | tokens/s | peak memory |")
    print("|---|---|---|---|---|")
    print(row("relatent calibrate", ours, tokens))
    print(row(f"transformers {what}", theirs, tokens))
    print(f"\nratio of the pairs: median {ratio:.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    if options.json:
        result: dict[str, Any] = {
            "model": options.model.name,
            "sequences": options.sequences,
            "length": options.length,
            "threads": options.threads,
            "head": options.head,
            "relatent": ours,
            "transformers": theirs,
            "median_ratio": ratio,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
