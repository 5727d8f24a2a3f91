"""transformers shares a model among processes by the plan that its code declares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import support
import test_experts

PROCESSES = 2
WORKER = Path(__file__).with_name("tensor_parallel.py")
SPLIT = ("gate_proj", "up_proj", "down_proj", "lm_head")
# Tied to the head it is split; else some versions of transformers split it of their own accord.
MAY_BE_SPLIT = "embed_tokens"


def run_shared(folder: Path, out: Path) -> list[dict[str, float]]:
    """The part of every parameter that each process holds; the logits are in `out`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(PROCESSES), str(WORKER), str(folder), str(out)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    # Rules of the plan that match nothing.
    assert "will not be applied" not in done.stderr
    # Processes may finish each other's lines.
    decoder, rest, found = json.JSONDecoder(), done.stdout, []
    while "{" in rest:
        rest = rest[rest.index("{") :]
        part, end = decoder.raw_decode(rest)
        found.append(part)
        rest = rest[end:]
    return found


@pytest.fixture(params=("dense, tied", "experts, untied"))
def folder(bench, llama: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "dense, tied":
        options = ("--to", "tpla", "--branches", 4, "--dtype", "float32")
        return bench.convert(llama, "lossless", *options)
    source = test_experts.write(
        tmp_path / "source", *test_experts.SOURCES["v3, groups, query rank"]
    )
    return bench.convert(source, "weights-only", *test_experts.WHOLE, "--dtype", "float32")


def test_two_processes(folder: Path, tmp_path: Path) -> None:
    held = run_shared(folder, tmp_path / "logits.npy")
    assert len(held) == PROCESSES
    for parts in held:
        for name, part in parts.items():
            if MAY_BE_SPLIT not in name:
                split = name.split(".")[-2] in SPLIT
                assert part == (1 / PROCESSES if split else 1), name
    alone = support.logits_of(support.load(folder, custom_code=True), support.validation_ids(1))
    error = support.relative_error(torch.from_numpy(np.load(tmp_path / "logits.npy")), alone)
    print(f"relative logit error: {error:.2e}")
    assert error <= 1e-5
