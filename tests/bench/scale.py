"""What conversions cost at the shapes of published models: time, memory, growth.

Weights are random (make_shapes.py): time and memory only. Runs that are compared are made in turn,
round by round, and every ratio is of runs of one round. The parts:

  convert    `convert --method weights-only` to MLA beside `cp -r` of the same checkpoint, both from
             a warm page cache and to the same disk, and beside the bare algebra of floor.py
  calibrate  `calibrate` beside transformers' forward pass over the same tokens, float32 and
             bfloat16; as in calibrate_vs_transformers.py the whole command against the pass alone
  refit      `calibrate` and `convert` with all fits; by the difference between two numbers of
             layers, what the whole model would take
  growth     conversions at several numbers of layers and at several ranks

  tests/bench/scale.py --parts convert --layers 2 --json bench.json
"""

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import calibrate_vs_transformers
import floor
import make_shapes
from measure import CommandError, measure
from scale_report import (
    DTYPES,
    Run,
    Runs,
    median,
    ratio,
    text_calibrate,
    text_convert,
    text_growth,
    text_refit,
)

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("convert", "calibrate", "refit", "growth")
NEEDS = {"convert": ["scipy"], "calibrate": ["torch", "transformers"]}
# A run that read no more from the disk than this part of its source and this much, for programs and
# their libraries, had the source in the page cache.
COLD = 0.01
PROGRAMS = 16_000_000


def numbers(text: str) -> list[int]:
    return sorted({int(word) for word in text.split(",")})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = sorted(make_shapes.SHAPES)
    parser.add_argument("--relatent", type=Path, default=ROOT / "build/release/cli/relatent")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--shape", choices=shapes, default="llama-3-8b", help="convert, refit")
    parser.add_argument("--layers", type=int, default=2, help="convert, refit")
    parser.add_argument("--rank", type=int, default=448)
    parser.add_argument("--rope-dim", type=int, default=64)
    small = "llama-3.2-1b"
    parser.add_argument("--small-shape", choices=shapes, default=small, help="calibrate, growth")
    parser.add_argument("--small-layers", type=numbers, default=[1, 2, 4])
    parser.add_argument("--ranks", type=numbers, default=[64, 128, 256, 448], help="growth")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--batch", type=int, default=4, help="sequences of one transformers forward"
    )
    parser.add_argument("--refit-rounds", type=int, default=1, help="refit, and growth with fits")
    parser.add_argument("--fit-options", default="", help="further options of convert with fits")
    parser.add_argument("--no-fits", action="store_true", help="growth: weights-only alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary, for quick trials")
    parser.add_argument("--work", type=Path, help="where the checkpoints go (default: TMPDIR)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def forward_worker(given: dict[str, Any]) -> None:
    """transformers' side in a process of its own, in the type that is asked for."""
    import torch
    import transformers

    auto = transformers.AutoModelForCausalLM

    class InType:
        @staticmethod
        def from_pretrained(path: str, **options: Any) -> Any:
            return auto.from_pretrained(
                path, **{**options, "dtype": getattr(torch, given["dtype"])}
            )

    # The forward pass of calibrate_vs_transformers.py, which asks for float32.
    transformers.AutoModelForCausalLM = InType
    calibrate_vs_transformers.forward(argparse.Namespace(**given, head=False))


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.tokens = folder / "tokens.npy"
        vocab = options.vocab or min(s["vocab_size"] for s in make_shapes.SHAPES.values())
        count = options.sequences * options.length
        np.save(
            self.tokens, np.random.default_rng(options.seed).integers(vocab, size=count, dtype="i4")
        )

    def config(self, shape: str, layers: int | None = None) -> dict[str, Any]:
        return make_shapes.config_of(shape, layers, self.options.vocab)

    @contextlib.contextmanager
    def checkpoint(self, shape: str, layers: int) -> Iterator[Path]:
        """Made for a while; there must be room for it and for what is made of it."""
        path = self.folder / f"{shape}-{layers}"
        wanted = sum(t.size for t in make_shapes.tensors_of(self.config(shape, layers)))
        free = shutil.disk_usage(self.folder).free
        if free < 2.2 * wanted:
            sys.exit(f"{self.folder}: {2.2 * wanted / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        say(f"make {path.name}, {wanted / 1e9:.2f} GB")
        make_shapes.make(shape, path, layers, self.options.seed, vocab=self.options.vocab)
        try:
            yield path
        finally:
            shutil.rmtree(path)

    @staticmethod
    def settle(source: Path) -> int:
        """Reads the source into the page cache and writes back what other runs left; its bytes."""
        os.sync()
        size = 0
        buffer = bytearray(1 << 24)
        for file in sorted(source.iterdir()):
            with file.open("rb", buffering=0) as stream:
                while read := stream.readinto(buffer):
                    size += read
        return size

    def timed(self, command: list[Any], source: Path) -> tuple[Run, str]:
        size = self.settle(source)
        usage, out = measure([str(word) for word in command], capture=True)
        run = asdict(usage) | {"warm": usage.disk_read_bytes <= COLD * size + PROGRAMS}
        say(f"  {Path(str(command[0])).name} {usage.seconds:.2f} s")
        return run, out

    def tool(self, *command: Any) -> list[Any]:
        return [self.options.relatent, "--threads", self.options.threads, *command]

    def copy(self, source: Path) -> Run:
        out = self.folder / "copy"
        # A clone of the blocks would be no copy.
        run, _ = self.timed(["cp", "-r", "--reflink=never", source, out], source)
        shutil.rmtree(out)
        return run

    def calibrate(self, source: Path, out: Path) -> Run:
        command = self.tool("calibrate", source, "--tokens", self.tokens, "--quiet", "-o", out)
        command += ["--sequences", self.options.sequences, "--length", self.options.length]
        out.unlink(missing_ok=True)
        run, _ = self.timed(command, source)
        return run

    def convert(self, source: Path, rank: int, calibration: Path | None = None) -> Run:
        out = self.folder / "converted"
        command = self.tool("convert", source, "-o", out, "--to", "mla", "--rank", rank)
        command += ["--rope-dim", self.options.rope_dim, "--json", "--quiet", "--method"]
        if calibration is None:
            command.append("weights-only")
        else:
            command += ["relatent", "--calibration", calibration]
            command += shlex.split(self.options.fit_options)
        planned = subprocess.run(
            [*map(str, command), "--dry-run"], capture_output=True, text=True, check=False
        )
        if planned.returncode != 0:
            raise CommandError(planned.stderr.strip().splitlines()[-1])
        estimate = json.loads(planned.stdout)["memory_bytes_estimate"]
        run, _ = self.timed(command, source)
        shutil.rmtree(out)
        return run | {"memory_bytes_estimate": estimate}

    def forward(self, source: Path, dtype: str) -> Run:
        given = {"model": str(source), "tokens": str(self.tokens), "dtype": dtype}
        for name in ("sequences", "length", "threads", "batch"):
            given[name] = getattr(self.options, name)
        run, out = self.timed([sys.executable, __file__, "--worker", json.dumps(given)], source)
        # Of the command only its forward pass counts.
        return run | {"seconds": json.loads(out)["seconds"], "command_seconds": run["seconds"]}

    def rounds(self, count: int, contenders: dict[str, Callable[[], Run]]) -> Runs:
        runs: Runs = {name: [] for name in contenders}
        for _ in range(count):
            for name, run in contenders.items():
                runs[name].append(run())
        return runs


def part_convert(bench: Bench) -> dict[str, Any]:
    options = bench.options
    layers = options.layers
    layer = floor.Layer.of(bench.config(options.shape), options.rank)
    tensors = make_shapes.tensors_of(bench.config(options.shape, layers))
    with bench.checkpoint(options.shape, layers) as source:
        runs = bench.rounds(
            options.rounds,
            {
                "cp -r": lambda: bench.copy(source),
                "convert": lambda: bench.convert(source, options.rank),
                "floor": lambda: floor.run_floor(layer, layers, options.threads),
            },
        )
    both = [
        {"seconds": a["seconds"] + b["seconds"]}
        for a, b in zip(runs["cp -r"], runs["floor"], strict=True)
    ]
    whole = bench.config(options.shape)
    return {
        "shape": options.shape,
        "layers": layers,
        "rank": options.rank,
        "rope_dim": options.rope_dim,
        "bytes": sum(t.size for t in tensors),
        "bytes_in_layers": sum(t.size for t in tensors if ".layers." in t.name),
        "bytes_of_the_whole": sum(t.size for t in make_shapes.tensors_of(whole)),
        "floor_flops_per_layer": floor.flops(layer),
        "runs": runs,
        "warm": all(run["warm"] for name in ("cp -r", "convert") for run in runs[name]),
        "convert_to_copy": ratio(runs["convert"], runs["cp -r"]),
        "convert_to_floor": ratio(runs["convert"], runs["floor"]),
        "convert_to_copy_and_floor": ratio(runs["convert"], both),
        "floor_to_copy": ratio(runs["floor"], runs["cp -r"]),
        "processor_convert_to_floor": ratio(runs["convert"], runs["floor"], "cpu_seconds"),
    }


def part_calibrate(bench: Bench) -> dict[str, Any]:
    options = bench.options
    by_layers = []
    for layers in options.small_layers:
        with bench.checkpoint(options.small_shape, layers) as source:
            runs = bench.rounds(
                options.rounds,
                {
                    "relatent calibrate": lambda: bench.calibrate(source, bench.folder / "c.h5"),
                    "transformers float32": lambda: bench.forward(source, "float32"),
                    "transformers bfloat16": lambda: bench.forward(source, "bfloat16"),
                },
            )
        ours = runs["relatent calibrate"]
        row: dict[str, Any] = {"layers": layers, "runs": runs}
        for dtype in DTYPES:
            theirs = runs[f"transformers {dtype}"]
            row[f"to_{dtype}"] = ratio(ours, theirs)
            row[f"memory_to_{dtype}"] = ratio(ours, theirs, "peak_anonymous_bytes")
        by_layers.append(row)
    return {
        "shape": options.small_shape,
        "sequences": options.sequences,
        "length": options.length,
        "by_layers": by_layers,
    }


def part_refit(bench: Bench) -> dict[str, Any]:
    options = bench.options
    whole = bench.config(options.shape)["num_hidden_layers"]
    counts = sorted({max(1, options.layers // 2), options.layers})
    calibration = bench.folder / "calibration.h5"
    runs: dict[int, Runs] = {count: {"calibrate": [], "convert": []} for count in counts}
    with contextlib.ExitStack() as stack:
        sources = {n: stack.enter_context(bench.checkpoint(options.shape, n)) for n in counts}
        for _ in range(options.refit_rounds):
            for count, source in sources.items():
                runs[count]["calibrate"].append(bench.calibrate(source, calibration))
                runs[count]["convert"].append(bench.convert(source, options.rank, calibration))
    calibration.unlink()
    most = runs[counts[-1]]
    out: dict[str, Any] = {
        "shape": options.shape,
        "rank": options.rank,
        "rope_dim": options.rope_dim,
        "sequences": options.sequences,
        "length": options.length,
        "fit_options": options.fit_options,
        "layers_of_the_whole": whole,
        "by_layers": [{"layers": n, "runs": runs[n]} for n in counts],
        "convert_to_calibrate": ratio(most["convert"], most["calibrate"]),
    }
    if len(counts) == 1:
        # One layer: what does not grow with layers cannot be told from what does.
        counts.insert(0, 0)
    fewer, more = counts
    for command in ("calibrate", "convert"):
        found = []
        for i, run in enumerate(runs[more][command]):
            less = runs[fewer][command][i]["seconds"] if fewer else 0.0
            per_layer = (run["seconds"] - less) / (more - fewer)
            found.append({"layer": per_layer, "whole": run["seconds"] + (whole - more) * per_layer})
        out[f"{command}_seconds_per_layer"] = median(found, "layer")
        out[f"{command}_seconds_of_the_whole"] = median(found, "whole")
    return out


def part_growth(bench: Bench) -> dict[str, Any]:
    options = bench.options
    shape, counts, ranks = options.small_shape, options.small_layers, options.ranks
    methods = ["weights-only"] if options.no_fits else ["weights-only", "relatent"]
    middle = counts[len(counts) // 2]
    # Layers at the rank of --rank, ranks at the middle number of layers.
    cells = [("layers", n, n, options.rank) for n in counts]
    cells += [("rank", rank, middle, rank) for rank in ranks]
    found: dict[tuple[str, str, int], list[Run]] = {}
    with contextlib.ExitStack() as stack:
        sources = {n: stack.enter_context(bench.checkpoint(shape, n)) for n in counts}
        calibrations = {n: bench.folder / f"calibration-{n}.h5" for n in counts}
        for method in methods:
            fits = method == "relatent"
            if fits:
                for n, source in sources.items():
                    bench.calibrate(source, calibrations[n])
            for _ in range(options.refit_rounds if fits else options.rounds):
                for axis, value, layers, rank in cells:
                    run = bench.convert(
                        sources[layers], rank, calibrations[layers] if fits else None
                    )
                    found.setdefault((method, axis, value), []).append(run)
        for file in calibrations.values():
            file.unlink(missing_ok=True)
    lines = []
    for method in methods:
        for axis in ("layers", "rank"):
            values = [value for name, value, _, _ in cells if name == axis]
            first = found[method, axis, values[0]]
            points = []
            for value in values:
                runs = found[method, axis, value]
                points.append({"value": value, "runs": runs, "to_first": ratio(runs, first)})
            lines.append({"method": method, "axis": axis, "points": points})
    return {
        "shape": shape,
        "rope_dim": options.rope_dim,
        "rank_along_layers": options.rank,
        "layers_along_rank": middle,
        "sequences": options.sequences,
        "length": options.length,
        "lines": lines,
    }


def machine() -> dict[str, Any]:
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
    }


def main() -> None:
    options = arguments()
    if options.worker:
        forward_worker(json.loads(options.worker))
        return
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"no such part: {', '.join(sorted(unknown))}")
    for part in parts:
        if missing := [name for name in NEEDS.get(part, []) if find_spec(name) is None]:
            sys.exit(f"part {part} needs {', '.join(missing)}: see tests/bench/requirements.txt")
    if not options.relatent.exists():
        sys.exit(f"{options.relatent} is missing: build it or name it with --relatent")
    # So that what was made goes, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    version = subprocess.run(
        [options.relatent, "--version"], capture_output=True, text=True, check=True
    )
    result: dict[str, Any] = {
        "relatent": version.stdout.strip(),
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "seed": options.seed,
        "vocab": options.vocab,
        "load_before": os.getloadavg()[0],
        "parts": {},
    }
    measured = dict(
        zip(PARTS, (part_convert, part_calibrate, part_refit, part_growth), strict=True)
    )
    told = dict(zip(PARTS, (text_convert, text_calibrate, text_refit, text_growth), strict=True))
    start = time.perf_counter()
    print(f"# Benchmark of scale: {result['relatent']}\n")
    print(
        f"{result['machine']['processor']}, {options.threads} of {os.cpu_count()} cores, load "
        f"{result['load_before']:.1f} before; random weights, {options.rounds} rounds; ratios are "
        "medians over rounds, range in brackets.\n",
        flush=True,
    )
    if options.vocab:
        print(f"A trial: the vocabulary is cut to {options.vocab}.\n")
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scale-", dir=options.work) as folder:
        bench = Bench(options, Path(folder))
        for name in parts:
            say(f"part {name}")
            try:
                part = measured[name](bench)
            except CommandError as error:
                sys.exit(f"part {name}: {error}")
            result["parts"][name] = part
            result["seconds"] = time.perf_counter() - start
            print(told[name](part), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
