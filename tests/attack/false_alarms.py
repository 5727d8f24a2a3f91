"""Converts in many ways and verifies what was written, which nobody has touched: no alarm may ring.

Every conversion is made with one number of threads and verified with another, and twice: with no
more than tokens, and with limits that are the figures of the first time.

  tests/attack/run.sh false_alarms                    # llama-3m and small models made on the spot
  RELATENT_MODELS=... tests/attack/run.sh false_alarms --json alarms.json
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from conversions import (
    GLA,
    HALF,
    MLRA,
    OWN,
    QUICK,
    SHARED,
    TPLA,
    Conversion,
    Workshop,
    as_options,
    binary,
    limits_above,
)

LOSSLESS = ("--method", "lossless")
WEIGHTS_ONLY = ("--method", "weights-only", *HALF)
TRANSMLA = ("--method", "transmla", "--fold", 1, *HALF)
GTPLA = ("--to", "gtpla", "--branches", 4)
TPLA4 = ("--to", "tpla", "--branches", 4)
DTYPES = ("float32", "bfloat16", "float16")

# Options by what they are called; those of the second kind need a calibration.
UNCALIBRATED: dict[str, tuple[Any, ...]] = {
    "lossless mla": LOSSLESS,
    "lossless mla, relatent": (*LOSSLESS, *OWN),
    "lossless gla": (*LOSSLESS, *GLA, *OWN),
    "lossless tpla": (*LOSSLESS, *TPLA4, *OWN),
    "lossless mlra": (*LOSSLESS, *MLRA, *OWN),
    "lossless gtpla": (*LOSSLESS, *GTPLA, *OWN),
    "lossless mla, shards": (*LOSSLESS, "--max-shard-size", "1MB"),
    "weights-only mla": WEIGHTS_ONLY,
}
CALIBRATED: dict[str, tuple[Any, ...]] = {
    "mla": (*HALF, *QUICK),
    "mla, a quarter": ("--kv-budget", 0.25, *QUICK),
    "mla, 256+64": ("--shape", "256+64", "--rank", 100, *QUICK),
    "mla, relatent": (*HALF, *OWN, *QUICK),
    "mla, nothing held out": (*HALF, *QUICK, "--held-out", 0),
    "mla, plain": (*HALF, "--no-refit", "--no-key-fit", "--no-query-fit", "--plain-list"),
    "gla": (*GLA, *HALF, *OWN, *QUICK),
    "tpla": (*TPLA, *HALF, *SHARED, *OWN, *QUICK),
    "tpla, hadamard": (*TPLA, *HALF, "--order", "hadamard", *OWN, *QUICK),
    "tpla, pca": (*TPLA, *HALF, "--order", "pca", *OWN, *QUICK),
    "mlra": (*MLRA, *HALF, *SHARED, *OWN, *QUICK),
    "gtpla": (*GTPLA, *HALF, *SHARED, *OWN, *QUICK),
    "deepseek": ("--engine", "deepseek", *HALF, *QUICK),
    "gguf": ("--engine", "gguf", *HALF, *QUICK, "--pre-tokenizer", "no_vocab"),
    "mlra, mlra": (
        *("--engine", "mlra", *MLRA, *SHARED, "--rope-dim", 32, "--per-device", 64, *QUICK),
    ),
    "gla, gla": ("--engine", "gla", *GLA, "--rope-dim", 32, *QUICK),
    "transmla": TRANSMLA,
    "transmla, queries": (*TRANSMLA, "--q-rank", 96),
}
# Of other families: with biases, and latent already.
OTHERS: dict[str, tuple[str, bool, tuple[Any, ...]]] = {
    "qwen2 lossless mla": ("qwen2-13m", False, LOSSLESS),
    "qwen2 lossless tpla": ("qwen2-13m", False, (*LOSSLESS, *TPLA, *OWN)),
    "qwen2 mla": ("qwen2-13m", True, (*HALF, *QUICK)),
    "qwen2 gla": ("qwen2-13m", True, (*GLA, *HALF, *OWN, *QUICK)),
    "qwen2 deepseek": ("qwen2-13m", True, ("--engine", "deepseek", *HALF, *QUICK)),
    "deepseek lossless": ("deepseek-14m", False, (*LOSSLESS, "--engine", "deepseek")),
    "deepseek tpla": ("deepseek-14m", True, (*TPLA, *OWN, *SHARED, "--per-device", 96, *QUICK)),
    "deepseek gla": ("deepseek-14m", True, (*GLA, *OWN, "--per-device", 80, *QUICK)),
    "llama-26m lossless mlra": ("llama-26m", False, (*LOSSLESS, *MLRA, *OWN)),
    "llama-26m mla": ("llama-26m", True, (*HALF, *QUICK)),
}


@dataclass(frozen=True)
class Case:
    """A conversion and with how many threads it is made and verified."""

    conversion: Conversion
    threads: tuple[int, int]


def multiplies_bfloat16() -> bool:
    """Whether this processor can."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cases() -> Iterator[Case]:
    """Every way twice, in two of the three types and with threads the one way and the other."""
    dtypes, threads = cycle(DTYPES), cycle(((1, 2), (2, 1)))
    ways = [
        *(("llama-3m", False, name, options) for name, options in UNCALIBRATED.items()),
        *(("llama-3m", True, name, options) for name, options in CALIBRATED.items()),
        *((source, known, name, options) for name, (source, known, options) in OTHERS.items()),
    ]
    for source, is_calibrated, name, options in ways:
        for _ in range(2):
            dtype = next(dtypes)
            computes = ("float32", "bfloat16") if multiplies_bfloat16() else ("float32",)
            for compute in computes if "--fit-rounds" in options else ("",):
                conversion = Conversion(
                    ", ".join(filter(None, (name, dtype, compute))),
                    (*options, "--dtype", dtype, *(("--compute", compute) if compute else ())),
                    source,
                    is_calibrated,
                )
                yield Case(conversion, next(threads))


def with_threads(number: int, by_environment: bool) -> dict[str, Any]:
    """Either way to say with how many threads the program runs."""
    if by_environment:
        return {"env": {**os.environ, "OMP_NUM_THREADS": str(number)}}
    return {"threads": number}


def check(workshop: Workshop, case: Case, by_environment: bool) -> list[str]:
    """What rang."""
    made, verified = (with_threads(number, by_environment) for number in case.threads)
    source = workshop.source(case.conversion.source)
    try:
        folder = workshop.convert(case.conversion, **made)
    except RuntimeError as error:
        return [f"not converted: {error}"]
    alarms = []
    limits: tuple[Any, ...] = ()
    for how in ("", " with its own figures as limits"):
        outcome = workshop.verify(source, folder, *limits, **verified)
        if outcome.code != 0 or outcome.failed:
            said = [text for layer in outcome.failed for text in outcome.texts(layer)]
            alarms.append(f"exit {outcome.code}{how}: {'; '.join(said[:6]) or outcome.error}")
        if not outcome.report:
            break
        limits = as_options(limits_above(outcome))
    return alarms


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, help="a folder to make (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write what rang there")
    options = parser.parse_args(arguments)
    print(f"program: {binary()}; bfloat16 products: {multiplies_bfloat16()}", flush=True)
    begin = time.perf_counter()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="relatent-alarms-") as folder:
        workshop = Workshop(options.work or Path(folder) / "work")
        for number, case in enumerate(cases()):
            alarms = check(workshop, case, by_environment=number % 4 > 1)
            rows[case.conversion.name] = alarms
            for alarm in alarms:
                print(f"FALSE ALARM: {case.conversion.name}: {alarm}", flush=True)
    alarmed = sum(bool(alarms) for alarms in rows.values())
    print(f"{len(rows)} conversions, {alarmed} with a false alarm")
    print(f"{time.perf_counter() - begin:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if alarmed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
