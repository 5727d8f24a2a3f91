"""Our forward pass of a source checkpoint against transformers in float32."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import support
from checkpoints import find_model

LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp")

# The spelling of rope that checkpoints from before transformers 5 have.
OLD_ROPE: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-mscale": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}


def make_mistral(llama: Path, folder: Path, window: int | None) -> Path:
    """Mistral differs from Llama by its config alone."""
    support.copy_checkpoint(llama, folder)
    changes = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": window,
    }
    support.edit_config(folder, changes, drop=LLAMA_ONLY)
    return folder


def assert_same_logits(bench, folder: Path, expected: torch.Tensor) -> None:
    error = support.relative_error(bench.our_logits(folder), expected)
    print(f"relative logit error: {error:.2e}")
    assert error <= support.LOGIT_TOLERANCE


def assert_lossless(bench, folder: Path) -> None:
    converted = bench.convert(folder, "lossless", "--dtype", "float32")
    error = support.relative_error(bench.their_logits(converted), bench.their_logits(folder))
    print(f"relative logit error of the lossless conversion: {error:.2e}")
    assert error <= support.LOGIT_TOLERANCE
    assert_same_logits(bench, converted, bench.their_logits(folder))


def test_logits(bench, source: Path) -> None:
    assert_same_logits(bench, source, bench.their_logits(source))


def test_perplexity(bench, source: Path) -> None:
    theirs = support.negative_log_likelihood(bench.their_logits(source), support.validation_ids())
    ours = support.verify(source, source)["source_ppl"]
    print(f"perplexity: ours {ours:.7f}, transformers {math.exp(theirs):.7f}")
    assert ours == pytest.approx(math.exp(theirs), rel=1e-5)
    assert math.log(ours) == pytest.approx(theirs, rel=1e-5)


def test_long_sequence(llama: Path, tmp_path: Path) -> None:
    """Rotation angles grow with the position, and with them what their rounding can do."""
    length = 2048
    out = tmp_path / "logits.npy"
    support.relatent(
        *("logits", llama, "--tokens", support.VALIDATION_TOKENS, "-o", out),
        *("--sequences", 1, "--length", length),
    )
    expected = support.logits_of(support.load(llama), support.validation_ids(1, length))
    error = support.relative_error(torch.from_numpy(np.load(out)), expected)
    print(f"relative logit error over {length} tokens: {error:.2e}")
    assert error <= support.LOGIT_TOLERANCE


@pytest.mark.parametrize("kind", OLD_ROPE)
def test_old_rope_spelling(bench, llama: Path, tmp_path: Path, kind: str) -> None:
    folder = support.copy_checkpoint(llama, tmp_path / kind)
    changes = {"rope_theta": 10000.0, "rope_scaling": OLD_ROPE[kind]}
    support.edit_config(folder, changes, drop=("rope_parameters",))
    if kind != "default":
        # Were the scaling ignored on both sides, the comparison below would mean nothing.
        assert support.relative_error(bench.their_logits(folder), bench.their_logits(llama)) > 1e-3
    assert_same_logits(bench, folder, bench.their_logits(folder))
    assert_lossless(bench, folder)


def test_tied_embeddings_beside_biases(bench) -> None:
    """As the smaller published Qwen2 models have them."""
    folder = find_model("made-qwen2-tied")
    assert_same_logits(bench, folder, bench.their_logits(folder))
    assert_lossless(bench, folder)


def test_seed_oss(bench, tmp_path: Path) -> None:
    """Biases on queries, keys and values, as Qwen2 has them."""
    folder = support.copy_checkpoint(find_model("made-qwen2"), tmp_path / "seed_oss")
    changes = {
        "model_type": "seed_oss",
        "architectures": ["SeedOssForCausalLM"],
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "head_dim": 32,
    }
    support.edit_config(folder, changes, drop=("use_sliding_window", "sliding_window", "layer_types"))
    assert type(support.load(folder)).__name__ == "SeedOssForCausalLM"
    assert_same_logits(bench, folder, bench.their_logits(folder))
    assert_lossless(bench, folder)


def test_mistral(bench, llama: Path, tmp_path: Path) -> None:
    folder = make_mistral(llama, tmp_path / "mistral", None)
    assert type(support.load(folder)).__name__ == "MistralForCausalLM"
    assert_same_logits(bench, folder, bench.their_logits(folder))
    assert_lossless(bench, folder)


def test_mistral_with_sliding_window(bench, llama: Path, tmp_path: Path) -> None:
    folder = make_mistral(llama, tmp_path / "mistral", 64)
    assert support.relative_error(bench.their_logits(folder), bench.their_logits(llama)) > 1e-3
    assert_same_logits(bench, folder, bench.their_logits(folder))


def test_shards_do_not_matter(bench, llama: Path, tmp_path: Path) -> None:
    split = support.split_checkpoint(llama, tmp_path / "split", 3)
    assert torch.equal(bench.our_logits(split), bench.our_logits(llama))
    whole_out = bench.convert(llama, "lossless")
    split_out = bench.convert(split, "lossless", "--max-shard-size", "1MB")
    assert len(list(split_out.glob("*.safetensors"))) > 1
    whole, parts = support.load_all_tensors(whole_out), support.load_all_tensors(split_out)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert torch.equal(bench.their_logits(split_out), bench.their_logits(whole_out))
