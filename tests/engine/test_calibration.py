"""The calibration file: its layout as documented, its numbers against torch."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import support

DATASETS = (
    *("second_moment", "mean", "received_moment", "received_mean"),
    *("distance_mass", "mass_square", "score_effect"),
)


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
        assert attributes["format_version"] == 5
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
            assert set(layer) == set(DATASETS)
            for name in ("second_moment", "received_moment"):
                check_dataset(
                    *(layer[name], "<f8", (hidden, hidden), ["hidden", "hidden"]),
                    "square of the normed input",
                )
            for name in ("mean", "received_mean"):
                check_dataset(layer[name], "<f8", (hidden,), ["hidden"], "normed input")
            check_dataset(
                layer["mass_square"], "<f8", (heads,), ["head"], "square of a probability"
            )
            check_dataset(layer["score_effect"], "<f8", (heads,), ["head"], "square of an output")
            check_dataset(
                *(layer["distance_mass"], "<f8", (heads, support.LENGTH), ["head", "distance"]),
                "probability",
            )


def moments_of(
    attention: torch.nn.Module, x: torch.Tensor, weights: torch.Tensor, values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What a layer leaves behind: x [sequences, length, hidden], weights [sequences, heads, queries, keys]
    and values [sequences, heads, keys, head size], all of them float64."""
    rows = x.flatten(0, 1)
    tokens = len(rows)
    received = weights.sum((1, 2)).sqrt()
    weighed = (0.1 + 0.9 * received / received.mean(-1, keepdim=True)).flatten()[:, None] * rows
    # Attention to the key Δ positions back is the diagonal Δ below the main one; the first key is left out.
    others = weights.clone()
    others[..., 0] = 0
    mass = torch.stack(
        [others.sum(0).diagonal(-back, -2, -1).sum(-1) for back in range(weights.shape[-1])], -1
    )
    size = values.shape[-1]
    effects = []
    for h, through in enumerate(attention.o_proj.weight.double().split(size, 1)):
        seen = values[:, h] @ through.T
        mixed = weights[:, h] @ seen
        apart = (seen[:, None] - mixed[:, :, None]).square().sum(-1)
        effects.append((weights[:, h].square() * apart).sum() / tokens)
    return {
        "second_moment": rows.T @ rows / tokens,
        "mean": rows.mean(0),
        "received_moment": weighed.T @ rows / tokens,
        "received_mean": weighed.mean(0),
        "distance_mass": mass / tokens,
        "mass_square": weights.square().sum((0, 2, 3)) / tokens,
        "score_effect": torch.stack(effects),
    }


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

    worst = dict.fromkeys(DATASETS, 0.0)
    with h5py.File(calibration) as file, torch.no_grad():
        for i, (x, weights) in enumerate(zip(inputs, attentions, strict=True)):
            attention = model.model.layers[i].self_attn
            values = attention.v_proj(x.float()).double().unflatten(-1, (-1, attention.head_dim))
            repeated = values.transpose(1, 2).repeat_interleave(attention.num_key_value_groups, 1)
            expected = moments_of(attention, x, weights.double(), repeated)
            for key, value in expected.items():
                found = torch.from_numpy(file[f"layers/{i:05}/{key}"][()])
                worst[key] = max(worst[key], support.relative_error(found, value))
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
