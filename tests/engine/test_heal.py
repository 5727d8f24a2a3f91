"""examples/heal: a few steps win something, and touch nothing but the converted attention."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import support

HEAL = support.ROOT / "examples" / "heal" / "heal.py"
SOURCE = support.EXAMPLES / "llama-3m"
FEW = ("--length", 128, "--batch", 4, "--steps", 24, "--rate", 1e-2)
REPORTED = ("--validation", support.VALIDATION_TOKENS, "--validation-sequences", 8)


def heal(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HEAL), *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("heal") / "calibration.h5"
    support.relatent(
        *("calibrate", SOURCE, "--tokens", support.CALIBRATION_TOKENS, "-o", out),
        *("--sequences", 16, "--length", 256, "--quiet"),
    )
    return out


@pytest.fixture(scope="module", params=["relatent", "transformers", "tpla"])
def converted(request, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "converted"
    shape = ("--rank", 32, "--rope-dim", 8)
    form = ("--engine", request.param)
    if request.param == "tpla":
        form = ("--to", "tpla", "--branches", 2, "--key-rank", 8, "--engine", "relatent")
    support.relatent(
        *("convert", SOURCE, "-o", out, "--calibration", calibration, "--quiet"),
        *(*shape, *form, "--effort", "low"),
    )
    return out


def test_wins_and_leaves_the_rest(converted: Path) -> None:
    healed = converted.with_name("healed")
    done = heal(
        *(SOURCE, converted, "-o", healed, "--tokens", support.CALIBRATION_TOKENS, *FEW, *REPORTED)
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((healed / "healing_report.json").read_text())
    first, last = report["validation"][0], report["validation"][-1]
    assert last["tokens"] == 24 * 4 * 128
    assert last["nats"] < 0.97 * first["nats"] and last["kl"] < 0.97 * first["kl"]

    before, after = tensors(converted), tensors(healed)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == report["trained_tensors"]
    assert all(".self_attn." in name for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)

    # What verify sees of the files is what the training saw.
    lost = {}
    for folder in (converted, healed):
        span = ("--sequences", 8, "--length", 128, "--quiet", "--json")
        tokens = ("--tokens", support.VALIDATION_TOKENS)
        lost[folder] = json.loads(support.relatent("verify", SOURCE, folder, *tokens, *span))
    assert lost[healed]["nats"] == pytest.approx(last["nats"], abs=2e-3)
    assert lost[converted]["nats"] == pytest.approx(first["nats"], abs=2e-3)
    assert not (healed / "conversion_report.json").exists()


@pytest.mark.parametrize("converted", ["relatent"], indirect=True)
class TestRefuses:
    def refusal(self, *arguments: object) -> str:
        done = heal(*arguments)
        assert done.returncode == 1, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("heal: "), done.stderr
        return last

    def test_output_that_exists(self, converted: Path) -> None:
        said = self.refusal(
            SOURCE, converted, "-o", converted, "--tokens", support.CALIBRATION_TOKENS
        )
        assert "exists already" in said

    def test_tokens_of_another_vocabulary(self, converted: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "tokens.npy", np.full(4096, 5000))
        said = self.refusal(
            *(SOURCE, converted, "-o", tmp_path / "out", "--tokens", tmp_path / "tokens.npy")
        )
        assert "token 5000" in said and not (tmp_path / "out").exists()

    def test_too_few_tokens(self, converted: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "tokens.npy", np.arange(100))
        said = self.refusal(
            *(SOURCE, converted, "-o", tmp_path / "out", "--tokens", tmp_path / "tokens.npy")
        )
        assert "100 tokens" in said

    def test_folder_that_is_no_checkpoint(self, converted: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(converted, broken)
        (broken / "config.json").unlink()
        said = self.refusal(
            SOURCE, broken, "-o", tmp_path / "out", "--tokens", support.CALIBRATION_TOKENS
        )
        assert "config.json" in said
