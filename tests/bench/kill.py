"""Kills calibrate and convert at random moments and lets --resume finish them.

Every run of the program is killed (SIGKILL) at a moment drawn from the time that an undisturbed
one takes, one in three once more while it is resumed, and must end with the bytes of that one.

  tests/bench/kill.py models/llama-26m --tokens models/tokens/calibration.npy --runs 20
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--tokens", type=Path, default=ROOT / "examples/tokens/calibration.npy")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--convert",
        default="--kv-budget 0.25 --fit-rounds 1",
        help="options of convert (default: %(default)s)",
    )
    parser.add_argument("--save-every", default="0.2", help="seconds (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="kills of each command")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where outputs go (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser.parse_args()


def binary() -> str:
    return os.environ.get("RELATENT_BIN", str(ROOT / "build/release/cli/relatent"))


def digest(path: Path) -> str:
    """Names and bytes of a file or of all files of a folder."""
    out = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        out.update(f"{file.name if path.is_dir() else ''}\0{file.stat().st_size}\0".encode())
        out.update(file.read_bytes())
    return out.hexdigest()


def run(command: list[str], limit: float | None = None) -> int | None:
    """The exit code, or None when the run was killed after `limit` seconds."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            complaint = process.communicate(timeout=limit)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
    if process.returncode != 0:
        print(complaint, file=sys.stderr, end="")
    return process.returncode


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def kill(name: str, make: list[str], out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Kills and resumes args.runs times; what came of it."""
    partial = out.with_name(out.name + ".partial")
    start = time.monotonic()
    if run(make) != 0:
        sys.exit(f"{name} failed undisturbed")
    taken = time.monotonic() - start
    expected = digest(out)
    chance = random.Random(f"{args.seed} {name}")
    rows = []
    for i in range(args.runs):
        remove(out)
        moment = chance.uniform(0, taken)
        again = chance.uniform(0, taken) if chance.random() < 1 / 3 else None
        kills = int(run(make, moment) is None)
        row: dict[str, Any] = {"killed_after": round(moment, 3)}
        row["under_its_name"] = kills == 1 and out.exists()
        row["journal"] = journal_of(partial)
        if kills and again is not None:
            kills += run([*make, "--resume"], again) is None
        start = time.monotonic()
        code = 0 if out.exists() and not partial.exists() else run([*make, "--resume"])
        row |= {
            "kills": kills,
            "resumed_in": round(time.monotonic() - start, 3),
            "exit": code,
            "same_bytes": out.exists() and digest(out) == expected,
            "left_over": partial.exists(),
        }
        row["good"] = code == 0 and row["same_bytes"] and not row["left_over"]
        rows.append(row)
        print(f"{name} {i + 1}: {row}")
    remove(out)
    return {
        "command": " ".join(make),
        "undisturbed_s": round(taken, 3),
        "runs": len(rows),
        "kills": sum(row["kills"] for row in rows),
        "good": sum(row["good"] for row in rows),
        "rows": rows,
    }


def journal_of(partial: Path) -> list[str]:
    """What the run had done, without what it was asked for."""
    journal = partial / "journal"
    if not journal.exists():
        return []
    lines = (line.partition(" ")[2] for line in journal.read_text().splitlines()[1:])
    return [line.replace("\t", " ") for line in lines if not line.startswith(("given", "begun"))]


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="relatent-kill-", dir=args.work) as folder:
        work = Path(folder)
        common = ["--quiet", "--save-every", args.save_every]
        moments = work / "moments.h5"
        calibrate = [binary(), "calibrate", str(args.model), "--tokens", str(args.tokens)]
        calibrate += ["--sequences", str(args.sequences), "--length", str(args.length), *common]
        results = {"calibrate": kill("calibrate", [*calibrate, "-o", str(moments)], moments, args)}
        if run([*calibrate, "-o", str(moments)]) != 0:
            sys.exit("calibrate failed")
        convert = [binary(), "convert", str(args.model), "--calibration", str(moments), *common]
        convert += [*args.convert.split(), "-o", str(work / "out")]
        results["convert"] = kill("convert", convert, work / "out", args)
    for name, result in results.items():
        print(
            f"{name}: {result['good']} of {result['runs']} runs ended with the same bytes, "
            f"{result['kills']} kills, {result['undisturbed_s']} s undisturbed"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(result["good"] == result["runs"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
