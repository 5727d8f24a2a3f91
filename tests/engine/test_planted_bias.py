"""Key biases as published Qwen2.5 models have them: huge, and where the softmax forgets them.

Their first layers have biases of norm 150 to 390 on the keys, nearly all of it at the slowest rotary
frequencies, where a constant adds the same to every score of a query. Folding such a bias into the
weights for an engine without biases would write token noise into every score.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import support
from checkpoints import find_model, present

NORM = 300
SLOWEST = 4  # of every 16
# The fits want more than the short sequences of the other tests.
CALIBRATION = ("--sequences", 16, "--length", 512)


def plant_biases(source: Path, target: Path) -> Path:
    """A copy whose k_proj biases have norm 300, for each head, at the slowest frequencies."""
    support.copy_checkpoint(source, target)
    config = json.loads((target / "config.json").read_text())
    heads = config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("k_proj.bias"):
                # Halves: pair f of a head is (f, f + d / 2).
                bias = tensors[name].float().view(heads, 2, -1).clone()
                slowest = bias.shape[-1] * SLOWEST // 16
                planted = torch.randn(heads, 2, slowest, generator=generator)
                planted *= NORM / planted.flatten(1).norm(dim=1)[:, None, None]
                bias[:, :, -slowest:] += planted
                tensors[name] = bias.view(-1).to(tensors[name].dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def nats_lost(source: Path, folder: Path) -> float:
    """Of half the cache, for an engine without biases; on validation tokens, as `verify` says."""
    moments, out = folder / "moments.h5", folder / "out"
    config = json.loads((source / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    support.relatent(
        *("calibrate", source, "--tokens", support.CALIBRATION_TOKENS, "-o", moments),
        *(*CALIBRATION, "--quiet"),
    )
    support.relatent(
        *("convert", source, "-o", out, "--calibration", moments, "--engine", "deepseek"),
        *("--rope-dim", head // 2, "--rank", head // 2 * 3, "--quiet"),
    )
    found = support.verify(source, out)
    assert found["kv_bytes_per_token"]["converted"] < found["kv_bytes_per_token"]["source"]
    return found["nats"]


@pytest.mark.parametrize("model", present("qwen2-13m"))
def test_what_the_softmax_forgets_costs_nothing(tmp_path: Path, model: str) -> None:
    source = find_model(model)
    planted = plant_biases(source, tmp_path / "planted")
    (tmp_path / "plain").mkdir()
    (tmp_path / "with").mkdir()
    plain = nats_lost(source, tmp_path / "plain")
    with_biases = nats_lost(planted, tmp_path / "with")
    print(f"{plain:.4f} nats, {with_biases:.4f} with biases of norm {NORM}")
    assert with_biases <= plain + 0.03
