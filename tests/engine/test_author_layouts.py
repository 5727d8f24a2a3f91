"""--engine mlra and --engine gla: the authors' layouts compute what our forward pass does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import support
from authors import GlaModel, MlraModel

QUICK = ("--dtype", "float32", "--fit-rounds", 1, "--fit-stride", 16)
# Rotary sizes by model: divisors of its head size, as a list of base 10000 wants them.
MLRA = {
    ("mlra", 2): ("--key-rank", 8, "--per-device"),
    ("mlra", 4): ("--key-rank", 8, "--per-device"),
    ("gla", 2): ("--per-device",),
    ("gla", 4): ("--per-device",),
}


def load(kind: type[PreTrainedModel], folder: Path) -> torch.nn.Module:
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for found in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(found), f"{found}: {info[found]}"
    return model.eval()


def check(bench: Any, kind: type[PreTrainedModel], source: Path, converted: Path) -> float:
    theirs = support.logits_of(load(kind, converted), support.validation_ids())
    error = support.relative_error(bench.our_logits(converted), theirs)
    nats = support.verify(source, converted)["nats"]
    print(f"{converted.name}: relative logit error {error:.2e}, nats lost {nats:.4f}")
    assert error <= support.LOGIT_TOLERANCE
    return nats


@pytest.mark.parametrize("form, branches", MLRA)
def test_mlra_layout(bench, llama: Path, form: str, branches: int) -> None:
    options = MLRA[form, branches]
    head_dim = json.loads((llama / "config.json").read_text())["head_dim"]
    converted = bench.convert(
        llama,
        "relatent",
        *("--engine", "mlra", "--to", form, "--branches", branches),
        *("--rope-dim", head_dim, *options, 2 * head_dim + 4),
        *("--norm-coordinates", 4, *QUICK),
    )
    config = json.loads((converted / "config.json").read_text())
    assert config["mlra_model"] == f"{form}_{branches}"
    # Stored latents hold the coordinates of their norms too.
    latents = 2 if (form, branches) == ("gla", 2) else 4
    assert config["kv_lora_rank"] == latents * (head_dim + 4)
    assert 0 < check(bench, MlraModel, llama, converted) < 2


def test_gla_layout(bench, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    converted = bench.convert(
        source,
        "relatent",
        *("--engine", "gla", "--to", "gla", "--branches", 2, "--rope-dim", head_dim, *QUICK),
    )
    written = json.loads((converted / "config.json").read_text())
    assert written["qk_rope_dim"] == head_dim
    assert 0 < check(bench, GlaModel, source, converted) < 1


def test_a_narrower_query(bench, llama: Path) -> None:
    """Fewer coordinates than the latents may have: what is left over is zero."""
    converted = bench.convert(
        llama,
        "relatent",
        *("--engine", "gla", "--to", "gla", "--branches", 2, "--rope-dim", 16, "--rank", 64),
        *QUICK,
    )
    assert 0 < check(bench, GlaModel, llama, converted) < 3


def refusal(source: Path, bench: Any, *options: Any) -> str:
    out = bench.new_path()
    line = support.refused(
        2,
        *("convert", source, "-o", out, "--method", "relatent"),
        *("--calibration", bench.calibration(source), *options, "--quiet"),
    )
    assert not out.exists()
    return line


def test_refusals(bench, llama: Path) -> None:
    mlra = ("--engine", "mlra", "--to", "mlra", "--branches", 4)
    line = refusal(llama, bench, *mlra, "--rope-dim", 24, "--key-rank", 8, "--per-device", 48)
    assert "base 10000" in line and "divisor of 32" in line
    gla = ("--engine", "gla", "--to", "gla")
    assert "--branches 2" in refusal(llama, bench, *gla, "--branches", 4, "--rank", 64)
    line = refusal(llama, bench, *gla, "--branches", 2, "--rank", 128)
    assert "at most 126" in line
    line = refusal(llama, bench, "--engine", "gla", "--to", "mlra", "--branches", 2, "--rank", 64)
    assert "no layout" in line
