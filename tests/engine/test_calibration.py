"""The calibration file: its layout as documented, its numbers against torch."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import support


def calibrated(source: Path, out: Path, compute: str) -> Path:
    support.relatent(
        *("calibrate", source, "--tokens", support.VALIDATION_TOKENS, *support.SPAN),
        *("-o", out, "--compute", compute, "--quiet"),
    )
    return out


@pytest.fixture(scope="module")
def calibration(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(source, tmp_path_factory.mktemp("calibration") / "stats.h5", "float32")


def text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def check_dataset(
    node: h5py.Dataset, dtype: str, shape: tuple[int, ...], names: list[str], unit: str
):
    assert node.dtype == np.dtype(dtype)
    assert node.shape == shape
    assert node.chunks is None
    assert [text(n) for n in node.attrs["dimensions"]] == names
    assert text(node.attrs["unit"]) == unit


def test_layout(source: Path, calibration: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    with h5py.File(calibration) as file:
        attributes = dict(file.attrs)
        assert text(attributes["format"]) == "relatent-calibration"
        assert attributes["format_version"] == 3
        assert text(attributes["creator"]).startswith("relatent")
        assert text(attributes["source_fingerprint"])
        assert text(attributes["compute"]) == "float32"
        assert json.loads(text(attributes["source_config"])) == config
        assert text(attributes["model_type"]) == config["model_type"]
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            assert attributes[key] == config[key]
        span = (support.SEQUENCES, support.LENGTH)
        check_dataset(file["tokens"], "<i4", span, ["sequence", "position"], "token id")
        np.testing.assert_array_equal(file["tokens"], support.validation_ids().numpy())
        assert list(file["layers"]) == [f"{i:05}" for i in range(config["num_hidden_layers"])]
        for layer in file["layers"].values():
            assert layer.attrs["tokens"] == support.SEQUENCES * support.LENGTH
            assert set(layer) == {"second_moment", "mean", "distance_mass"}
            check_dataset(
                *(layer["second_moment"], "<f8", (hidden, hidden), ["hidden", "hidden"]),
                "square of the normed input",
            )
            check_dataset(layer["mean"], "<f8", (hidden,), ["hidden"], "normed input")
            check_dataset(
                *(layer["distance_mass"], "<f8", (heads, support.LENGTH), ["head", "distance"]),
                "probability",
            )


def relative_errors(source: Path, calibration: Path) -> dict[str, float]:
    """Of the worst layer, against transformers in float32."""
    model = support.load(source, attention="eager")
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _m, _i, out: inputs.append(out.double()))
    with torch.no_grad():
        attentions = model(
            support.validation_ids(), output_attentions=True, use_cache=False
        ).attentions
    assert len(inputs) == len(attentions) == len(model.model.layers)

    worst = {"second_moment": 0.0, "mean": 0.0, "distance_mass": 0.0}
    with h5py.File(calibration) as file:
        for i, (x, attention) in enumerate(zip(inputs, attentions, strict=True)):
            rows = x.flatten(0, 1)
            # Attention to the key Δ positions back is the diagonal Δ below the main one.
            together = attention.double().sum(0)
            mass = torch.stack(
                [together.diagonal(-back, -2, -1).sum(-1) for back in range(support.LENGTH)], -1
            )
            expected = {
                "second_moment": rows.T @ rows / len(rows),
                "mean": rows.mean(0),
                "distance_mass": mass / len(rows),
            }
            for key, value in expected.items():
                found = torch.from_numpy(file[f"layers/{i:05}/{key}"][()])
                worst[key] = max(worst[key], support.relative_error(found, value))
            sums = file[f"layers/{i:05}/distance_mass"][()].sum(1)
            np.testing.assert_allclose(sums, 1, rtol=1e-5)
    print("relative errors: " + ", ".join(f"{key} {error:.2e}" for key, error in worst.items()))
    return worst


def test_numbers(source: Path, calibration: Path) -> None:
    assert max(relative_errors(source, calibration).values()) <= 1e-4


def test_numbers_as_chosen_for_the_processor(source: Path, tmp_path: Path) -> None:
    calibration = calibrated(source, tmp_path / "stats.h5", "auto")
    with h5py.File(calibration) as file:
        compute = text(file.attrs["compute"])
    # Activations rounded to eight bits: errors of 2^-9 that mostly average out.
    bound = {"float32": 1e-4, "bfloat16": 4e-3}[compute]
    assert max(relative_errors(source, calibration).values()) <= bound
