"""Whether two builds of relatent write the same bytes.

    python tests/bench/same_bytes.py OLD NEW [--models FOLDER]

Converts with both programs by every method, to every form and for every engine, and compares every file
that is written. The example checkpoint is always there; --models names a folder with models/ and tokens/ of
others. For changes of the code that are not to change a result. Exit status 1 names what differs.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TPLA = ("--to", "tpla", "--branches", "2", "--key-rank", "16", "--rope-dim", "16", "--rank", "80")
MLRA = ("--to", "mlra", "--branches", "4", "--key-rank", "16", "--rope-dim", "16", "--rank", "80")
GLA = ("--to", "gla", "--branches", "2", "--rope-dim", "16", "--rank", "64")
SMALL = ("--rope-dim", "32", "--rank", "96")
CLOSED = ("--no-query-fit", "--no-key-fit", "--no-refit")

# Of grouped-query checkpoints; a name and options.
GQA = {
    "lossless": ("--method", "lossless"),
    **{
        f"lossless {form}-{count}": ("--method", "lossless", "--to", form, "--branches", count)
        for form, count in (("gla", "2"), ("tpla", "2"), ("tpla", "4"), ("mlra", "2"), ("mlra", "4"))
    },
    "transmla": ("--method", "transmla", "--rope-dim", "16", "--rank", "96"),
    "transmla, query": ("--method", "transmla", *SMALL, "--fold", "1", "--q-rank", "48"),
    "weights-only": ("--method", "weights-only", *SMALL),
    "weights-only tpla": ("--method", "weights-only", *TPLA),
    "relatent": (*SMALL, "--dtype", "float32"),
    "relatent, own layout": (*SMALL, "--engine", "relatent", *CLOSED),
    "relatent for deepseek": (*SMALL, "--engine", "deepseek"),
    "512+64": ("--shape", "512+64", "--engine", "deepseek", *CLOSED),
    "192+32": ("--shape", "192+32", *CLOSED),
    "budget": ("--kv-budget", "0.5", "--no-key-fit"),
    "gla": (*GLA, "--no-key-fit"),
    "gla of its authors": (*GLA, "--engine", "gla", *CLOSED),
    "tpla": TPLA,
    "tpla, sizes by trials": ("--to", "tpla", "--branches", "2", "--per-device", "64", *CLOSED),
    "tpla, pca": (*TPLA[:4], "--rope-dim", "16", "--rank", "80", "--order", "pca", *CLOSED),
    "mlra": (*MLRA, *CLOSED),
}
# Of an MLA checkpoint.
MLA = {
    "weights-only": ("--method", "weights-only", "--to", "gla", "--branches", "2", "--rank", "128"),
    "tpla": ("--to", "tpla", "--branches", "2", "--per-device", "96", "--key-rank", "32"),
    "hadamard": ("--to", "tpla", "--branches", "2", "--rank", "128", "--order", "hadamard"),
}


def run(program: Path, *arguments: object) -> str:
    """What went wrong, or nothing."""
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def differing(old: Path, new: Path) -> list[str]:
    names = sorted({p.name for folder in (old, new) for p in folder.iterdir()})
    return [
        name
        for name in names
        if not ((old / name).exists() and (new / name).exists())
        or not filecmp.cmp(old / name, new / name, shallow=False)
    ]


def compare(programs: list[Path], model: Path, tokens: Path, work: Path) -> int:
    mla = "deepseek" in model.name
    calibrations = []
    for i, program in enumerate(programs):
        folder = work / f"calibration-{i}"
        folder.mkdir()
        calibrations.append(folder / "calibration.h5")
        span = ("--sequences", 12, "--length", 256, "-o", calibrations[-1], "--quiet")
        said = run(program, "calibrate", model, "--tokens", tokens, *span)
        if said:
            sys.exit(f"{program} calibrate: {said}")
    wrong = differing(*(path.parent for path in calibrations))
    print(f"{'DIFFERENT ' if wrong else ''}{model.name}, calibration: {', '.join(wrong) or 'the same'}")
    count = len(wrong)
    for name, options in (MLA if mla else GQA).items():
        given = "weights-only" not in options and "lossless" not in options
        said, outputs = [], []
        for i, program in enumerate(programs):
            calibration = ("--calibration", calibrations[0]) if given else ()
            outputs.append(work / f"{i}-{name}".replace(" ", "_"))
            said.append(run(program, "convert", model, "-o", outputs[-1], *options, *calibration, "--quiet"))
        if said[0] != said[1]:
            result = f"{said}"
        elif said[0]:
            result = f"refused alike: {said[0]}"
        else:
            result = ", ".join(differing(*outputs)) or "the same"
        wrong = not (result == "the same" or result.startswith("refused alike"))
        print(f"{'DIFFERENT ' if wrong else ''}{model.name}, {name}: {result}", flush=True)
        count += wrong
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--only", nargs="+", default=["llama-3m", "qwen2-13m", "deepseek-14m"])
    options = parser.parse_args()
    programs = [options.old.resolve(), options.new.resolve()]
    wrong = 0
    for name in options.only:
        own = name == "llama-3m"
        if not own and not options.models:
            print(f"{name} NOT COMPARED: --models names no folder", file=sys.stderr)
            continue
        base = EXAMPLES if own else options.models
        model = base / name if own else base / "models" / name
        with tempfile.TemporaryDirectory() as work:
            wrong += compare(programs, model, base / "tokens" / "calibration.npy", Path(work))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
