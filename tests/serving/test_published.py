"""A published model in vLLM: SmolLM2-135M, as tests/bench/smollm2.py fetches it.

It has nine heads, so that three devices share it and two cannot. Its vocabulary of 49152 tokens is
large enough for vLLM's log-softmax in float32 to be off by more than the forward pass is: what it
makes of our own logits is what it must make of its own.
"""

import math
import os
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import support
import torch

pytestmark = pytest.mark.full

SPAN = ("--sequences", 2, "--length", 512)
# 384 numbers in the source: half of them for one device, a quarter for each of several.
FORMS = {
    "mla": ("--to", "mla", "--engine", "relatent", "--rope-dim", 48, "--rank", 144),
    "gla-3": ("--to", "gla", "--branches", 3, "--per-device", 96, "--rope-dim", 32),
    **{
        f"{form}-{branches}": (
            *("--to", form, "--branches", branches),
            *("--per-device", 96, "--rope-dim", 32, "--key-rank", 32),
        )
        for form in ("tpla", "mlra")
        for branches in (2, 4)
    },
}
STOCK = {
    "transformers": ("--engine", "transformers", "--shape", "512+64"),
    "deepseek": ("--engine", "deepseek", "--shape", "512+64"),
}


@pytest.fixture(scope="module")
def published() -> Path:
    """The folder with model and tokens."""
    name = os.environ.get("RELATENT_PUBLISHED")
    if not name:
        pytest.skip(
            "SmolLM2 NOT TESTED: RELATENT_PUBLISHED must name a folder made by "
            "`python tests/bench/smollm2.py FOLDER`"
        )
    return Path(name).resolve()


@pytest.fixture(scope="module")
def convert(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Converts by the closed forms: what is compared is two readers of the same weights."""
    folder = tmp_path_factory.mktemp("published")
    calibration = folder / "calibration.h5"
    source = published / "SmolLM2-135M"
    support.relatent(
        *("calibrate", source, "--tokens", published / "calibration.npy", "-o", calibration),
        *("--sequences", 16, "--length", 512, "--quiet"),
    )
    made: dict[tuple, Path] = {}

    def once(options: tuple) -> Path:
        if options not in made:
            out = folder / str(len(made))
            support.relatent(
                *("convert", source, "-o", out, *options, "--calibration", calibration, "--quiet"),
                *("--dtype", "float32", "--no-query-fit", "--no-key-fit", "--no-refit"),
                *("--held-out", 0),
            )
            made[options] = out
        return made[options]

    return once


def perplexities_of_logits(folder: Path, tokens: Path, work: Path) -> tuple[float, float]:
    """From `relatent logits`, with the log-softmax in float64 and in float32, as vLLM has it."""
    out = work / "logits.npy"
    support.relatent("logits", folder, "--tokens", tokens, *SPAN, "-o", out)
    logits = torch.from_numpy(np.load(out))
    out.unlink()
    count, length, _ = logits.shape
    ids = torch.from_numpy(np.load(tokens)[: count * length].astype(np.int64)).view(count, length)
    nll = {torch.float64: 0.0, torch.float32: 0.0}
    for sequence, targets in zip(logits[:, :-1], ids[:, 1:, None], strict=True):
        for dtype in nll:
            chosen = sequence.log_softmax(-1, dtype=dtype).gather(-1, targets)
            nll[dtype] -= math.fsum(chosen.flatten().tolist())
    predicted = count * (length - 1)
    return math.exp(nll[torch.float64] / predicted), math.exp(nll[torch.float32] / predicted)


@pytest.mark.parametrize(
    ("case", "tp"),
    [
        (case, tp)
        for case in (*FORMS, *STOCK)
        for tp in (1, 3)
        # Branches and devices must divide one another.
        if tp == 1 or not case.endswith(("-2", "-4"))
    ],
    ids=str,
)
def test_smollm2(bench, published: Path, convert: Any, tmp_path: Path, case: str, tp: int) -> None:
    options = {**FORMS, **STOCK}[case]
    converted = convert(options)
    tokens = published / "validation.npy"
    span = ("--tokens", tokens, *SPAN)
    backend = ("--model-impl", "transformers") if case == "transformers" else ()
    found = support.score(
        *(converted, bench.new_folder()),
        {"PYTHONPATH": "" if case in STOCK else str(bench.site)},
        *("--tp", tp, *backend),
        span=span,
    )
    said = support.perplexity(published / "SmolLM2-135M", converted, span)
    exact, as_vllm = perplexities_of_logits(converted, tokens, tmp_path)
    print(f"vLLM {found['perplexity']:.8f}, verify {said:.8f}, {exact:.8f} {as_vllm:.8f}")
    assert abs(exact / said - 1) <= 1e-6
    assert abs(found["perplexity"] / as_vllm - 1) <= support.PERPLEXITY_TOLERANCE
    promised = support.inspect(converted)["cache_bytes_per_token_per_device"]
    held = [device["bytes_per_token"] for device in found["cache"]]
    if str(tp) in promised:
        assert held == [promised[str(tp)]] * tp
    support.check_text(converted, found, tmp_path)
