"""What the benchmarks of conversions share: their command line and how relatent is run."""

import argparse
import ast
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]  # figures of one run, or of a few


class Failure(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--relatent", type=Path, default=ROOT / "build/release/cli/relatent")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/llama-3m")
    tokens = ROOT / "examples/tokens"
    parser.add_argument("--calibration-tokens", type=Path, default=tokens / "calibration.npy")
    parser.add_argument("--validation-tokens", type=Path, default=tokens / "validation.npy")
    parser.add_argument(
        "--sequences", type=int, default=64, help="at most so many to calibrate on; 0 = all"
    )
    parser.add_argument(
        "--validation-sequences", type=int, default=96, help="at most so many; 0 = all"
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    return parser


def sequences_to_use(tokens: Path, length: int, wanted: int) -> int:
    with tokens.open("rb") as file:
        version = file.read(8)[6]
        size = int.from_bytes(file.read(2 if version == 1 else 4), "little")
        header = ast.literal_eval(file.read(size).decode("latin-1"))
    fit = header["shape"][0] // length
    return min(wanted, fit) if wanted > 0 else fit


class Runner:
    """Runs relatent on one model and the tokens of a benchmark."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        wanted = {
            "validation": (options.validation_tokens, options.validation_sequences),
            "calibration": (options.calibration_tokens, options.sequences),
        }
        self.tokens = {
            which: (tokens, sequences_to_use(tokens, options.length, sequences))
            for which, (tokens, sequences) in wanted.items()
        }

    def relatent(self, *words: object) -> Row:
        command = [str(self.options.relatent), *map(str, words), "--json", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failure(done.returncode, done.stderr.strip() or f"exited {done.returncode}")
        return json.loads(done.stdout)

    def span(self, which: str) -> list[object]:
        tokens, sequences = self.tokens[which]
        return [
            *("--tokens", tokens),
            *("--sequences", sequences),
            *("--length", self.options.length),
        ]

    def calibrate(self, file: Path) -> Row:
        words = ["calibrate", self.options.model, *self.span("calibration"), "-o", file]
        return self.relatent(*words)

    def verify(self, folder: Path, which: str = "validation") -> Row:
        return self.relatent("verify", self.options.model, folder, *self.span(which))
