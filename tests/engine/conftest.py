"""Fixtures of the engine tests."""

import os
import tempfile
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Code beside weights is copied somewhere before it runs; never into the user's own cache.
_modules = tempfile.TemporaryDirectory(prefix="relatent-modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name

import numpy as np
import pytest
import torch

import checkpoints
import support
from checkpoints import find_model

# Single tokens through small models: threads that wait for each other cost more than they bring.
torch.set_num_threads(1)

MODELS = checkpoints.present("llama-3m", "llama-26m", "qwen2-13m")


def pytest_configure(config: pytest.Config) -> None:
    if not os.access(support.binary(), os.X_OK):
        pytest.exit(f"no program at {support.binary()}: build it first or set RELATENT_BIN", 2)


def pytest_report_header() -> list[str]:
    return [f"relatent: {support.binary()}", checkpoints.report()]


class Workbench:
    """Makes conversions, calibrations and logits once per session and hands them out again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._made: dict[Hashable, Path] = {}

    def new_path(self, suffix: str = "") -> Path:
        return self.folder / f"{len(list(self.folder.iterdir())):03}{suffix}"

    def calibration(self, source: Path) -> Path:
        key = ("calibration", source)
        if key not in self._made:
            out = self.new_path(".h5")
            support.relatent(
                *("calibrate", source, "--tokens", support.CALIBRATION_TOKENS, "-o", out),
                *("--sequences", 8, "--length", 256, "--quiet"),
            )
            self._made[key] = out
        return self._made[key]

    def convert(self, source: Path, method: str, *options: Any) -> Path:
        key = (source, method, *options)
        if key not in self._made:
            calibration = (
                ("--calibration", self.calibration(source))
                if method in ("transmla", "relatent")
                else ()
            )
            out = self.new_path()
            support.relatent(
                *("convert", source, "-o", out, "--method", method),
                *calibration,
                *options,
                "--quiet",
            )
            self._made[key] = out
        return self._made[key]

    @cache
    def our_logits(self, folder: Path) -> torch.Tensor:
        out = self.new_path(".npy")
        support.relatent(
            *("logits", folder, "--tokens", support.VALIDATION_TOKENS, *support.SPAN, "-o", out)
        )
        logits = np.load(out)
        out.unlink()
        assert logits.dtype == np.float32
        assert logits.shape[:2] == (support.SEQUENCES, support.LENGTH)
        return torch.from_numpy(logits)

    @cache
    def their_logits(self, folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return support.logits_of(support.load(folder, dtype), support.validation_ids())


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session", params=MODELS)
def source(request: pytest.FixtureRequest) -> Path:
    """Every model in turn."""
    return find_model(request.param)


@pytest.fixture(scope="session")
def llama() -> Path:
    """The one model that is always there, for what does not depend on the model."""
    return find_model("llama-3m")
