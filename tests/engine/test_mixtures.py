"""Grouped-query models with mixtures of experts: Mixtral, Qwen2-MoE and Qwen3-MoE as sources.

Their weights are random; mixtral-21m, which is trained, takes part where RELATENT_MODELS has it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import checkpoints
import support

# Forward passes with experts differ a little more: routers round too.
FORWARD_TOLERANCE = 2e-5
# No two sizes are equal, save what the architecture wants equal.
COMMON = {
    "vocab_size": 4096,  # that of the tokens
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
QWEN3 = {**COMMON, "num_experts": 10, "moe_intermediate_size": 20}
QWEN = {**QWEN3, "shared_expert_intermediate_size": 28}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**COMMON, "num_local_experts": 7, "head_dim": 10}),
    "mixtral, tied": ("mixtral", {**COMMON, "num_local_experts": 3, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "mlp_only_layers": [2]}),
    "qwen2_moe, normalised": (
        "qwen2_moe",
        {**QWEN, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**QWEN3, "norm_topk_prob": True, "head_dim": 12, "mlp_only_layers": [0, 2]},
    ),
    "qwen3_moe, biases": ("qwen3_moe", {**QWEN3, "attention_bias": True}),
}
FORMS = {
    "gla": ("--to", "gla", "--branches", 2, "--rank", 24),
    "tpla": ("--to", "tpla", "--branches", 2, "--rank", 18, "--key-rank", 8),
    "mlra": ("--to", "mlra", "--branches", 2, "--rank", 30, "--key-rank", 8),
}
# Where the layout has another name for a tensor of the source.
RENAMED = (
    ("block_sparse_moe.", "mlp."),
    (".w1.", ".gate_proj."),
    (".w2.", ".down_proj."),
    (".w3.", ".up_proj."),
    ("mlp.shared_expert.", "mlp.shared_experts."),
)


@torch.no_grad()
def write(folder: Path, model_type: str, changes: dict[str, Any]) -> Path:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.normal_(1, 0.3)
        elif name.endswith("bias"):
            weight.normal_(0, 0.5)
        else:
            weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixtures")
    return {
        name: write(folder / str(index), *source)
        for index, (name, source) in enumerate(SOURCES.items())
    }


@pytest.fixture(params=[*SOURCES, "mixtral-21m"])
def mixture(made: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    if request.param in made:
        return made[request.param]
    return checkpoints.find_model(request.param)


@pytest.fixture(params=SOURCES)
def small(made: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return made[request.param]


def layout_name(name: str) -> str:
    for source, layout in RENAMED:
        name = name.replace(source, layout)
    return name


def mlp_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = support.load_all_tensors(folder)
    return {layout_name(n): t for n, t in tensors.items() if ".mlp." in layout_name(n)}


def code_logits(folder: Path) -> torch.Tensor:
    """Of the code beside the weights."""
    return support.logits_of(support.load(folder, custom_code=True), support.validation_ids())


def test_forward(bench, mixture: Path) -> None:
    error = support.relative_error(bench.our_logits(mixture), bench.their_logits(mixture))
    print(f"relative logit error: {error:.2e}")
    assert error <= FORWARD_TOLERANCE


def test_lossless(bench, mixture: Path) -> None:
    """In transformers, and with the cache on the same text as the source's."""
    converted = bench.convert(mixture, "lossless", "--dtype", "float32")
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "relatent"
    before = support.load(mixture)
    after = support.load(converted, custom_code=True)
    error = support.relative_error(
        support.logits_of(after, support.validation_ids()), bench.their_logits(mixture)
    )
    print(f"relative logit error: {error:.2e}")
    assert error <= support.LOGIT_TOLERANCE
    for prompt in support.prompts()[:2]:
        generated = support.generate(after, prompt)
        assert generated == support.generate(before, prompt)
        assert generated == support.greedy_without_cache(after, prompt, generated)
    assert support.verify(mixture, converted)["rel_logit_error"] <= support.LOGIT_TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_experts_pass_through(bench, small: Path, form: str) -> None:
    converted = bench.convert(small, "weights-only", *FORMS[form])
    error = support.relative_error(bench.our_logits(converted), code_logits(converted))
    print(f"relative logit error, ours: {error:.2e}")
    assert error <= FORWARD_TOLERANCE
    expected, found = mlp_tensors(small), mlp_tensors(converted)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_fitted(bench, mixture: Path) -> None:
    """Calibration, fits and measurements run the experts too."""
    lost = {}
    sizes = ("--to", "mla", "--rank", 16, "--rope-dim", 8)
    for method in ("weights-only", "relatent"):
        converted = bench.convert(mixture, method, *sizes, "--dtype", "float32")
        error = support.relative_error(bench.our_logits(converted), code_logits(converted))
        assert error <= FORWARD_TOLERANCE
        found = support.verify(mixture, converted, "--tp", 2)
        assert found["devices"]["rel_logit_error"] <= support.LOGIT_TOLERANCE
        lost[method] = found["mean_kl"]
    print(lost)
    # Random weights have no structure for the fits to find.
    if mixture.name == "mixtral-21m":
        assert lost["relatent"] < lost["weights-only"]


def test_every_expert_counts(bench, made: dict[str, Path], tmp_path: Path) -> None:
    """Gates, routers and the weights of chosen experts would be missed."""
    for name, changes in (
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen2_moe", {"num_experts_per_tok": 2}),
        ("mixtral", {"num_experts_per_tok": 2}),
    ):
        other = support.copy_checkpoint(made[name], tmp_path / "-".join([name, *changes]))
        support.edit_config(other, changes)
        error = support.relative_error(bench.our_logits(other), bench.our_logits(made[name]))
        assert error > 100 * FORWARD_TOLERANCE
    other = support.copy_checkpoint(made["qwen2_moe"], tmp_path / "gate")
    gate = "model.layers.1.mlp.shared_expert_gate.weight"
    support.edit_tensors(other, lambda tensors: tensors.update({gate: -tensors[gate]}))
    error = support.relative_error(bench.our_logits(other), bench.our_logits(made["qwen2_moe"]))
    assert error > 100 * FORWARD_TOLERANCE


def test_saved_again(bench, small: Path, tmp_path: Path) -> None:
    converted = bench.convert(small, "weights-only", *FORMS["gla"])
    support.load(converted, custom_code=True).save_pretrained(tmp_path / "saved")
    assert torch.equal(bench.our_logits(tmp_path / "saved"), bench.our_logits(converted))


def test_threads(small: Path, tmp_path: Path) -> None:
    one, three = (support.logit_bytes(small, tmp_path / f"{n}.npy", n) for n in (1, 3))
    assert one == three


def test_shards(bench, small: Path, tmp_path: Path) -> None:
    converted = bench.convert(small, "weights-only", *FORMS["tpla"])
    for index, folder in enumerate((small, converted)):
        _, merged = support.split_and_merged(folder, tmp_path / str(index))
        assert support.folder_bytes(merged) == support.folder_bytes(folder)


@pytest.mark.parametrize("engine", ("deepseek", "gguf"))
def test_stock_layouts_are_refused(small: Path, tmp_path: Path, engine: str) -> None:
    complaint = support.refused(
        2, "convert", small, "-o", tmp_path / "out", "--method", "weights-only", "--engine", engine
    )
    assert f"--engine {engine}" in complaint and "mixture of experts" in complaint


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"scoring_func": "sigmoid"}),
        ("mixtral", {"hidden_act": "relu"}),
        ("mixtral", {"num_experts_per_tok": 8}),
        ("qwen2_moe", {"scoring_func": "sigmoid"}),
        ("qwen2_moe", {"num_experts_per_tok": 11}),
        ("qwen2_moe", {"mlp_only_layers": [4]}),
        ("qwen2_moe", {"qkv_bias": False}),
    ],
)
def test_refusals(
    made: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    folder = support.copy_checkpoint(made[name], tmp_path / "bad")
    support.edit_config(folder, changes)
    assert next(iter(changes)) in support.refused(3, "inspect", folder)


def test_inspect(made: dict[str, Path]) -> None:
    found = json.loads(support.relatent("inspect", made["qwen2_moe"], "--json"))
    assert found["experts"] == {
        "count": 10,
        "per_token": 3,
        "intermediate_size": 20,
        "shared_intermediate_size": 28,
        "shared_gate": True,
        "first_layer": 0,
        "layers": 3,
    }
    assert "in 3 of 4 layers" in support.relatent("inspect", made["qwen2_moe"])
