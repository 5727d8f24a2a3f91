"""DeepSeek-V2 and V3 with mixture-of-experts layers as sources.

Their weights are random: small published checkpoints of this kind do not exist.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

import support

# No two sizes are equal, save what the architecture wants equal.
COMMON = {
    "vocab_size": 4096,  # that of the tokens
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "max_position_embeddings": 2048,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40,
    "original_max_position_embeddings": 64,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "beta_fast": 32,
    "beta_slow": 1,
}
GROUPED = {"n_group": 4, "topk_group": 2}
SOURCES = {
    "v2, yarn": (
        2,
        {"rope_parameters": YARN, "topk_method": "greedy", "routed_scaling_factor": 1.7},
    ),
    "v2, groups, query rank": (
        2,
        {
            **GROUPED,
            "topk_method": "group_limited_greedy",
            "q_lora_rank": 22,
            "first_k_dense_replace": 0,
        },
    ),
    "v3, groups, query rank": (3, {**GROUPED, "q_lora_rank": 22, "rope_parameters": YARN}),
    "v3, scores as they are": (3, {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
}
BIASES = {"topk_method": "greedy", "q_lora_rank": 22, "attention_bias": True}
# Each group of heads keeps the whole latent, so that nothing is lost.
WHOLE = ("--to", "gla", "--branches", 2, "--rank", 48)
FORMS = {
    "gla": ("--to", "gla", "--branches", 2, "--rank", 40),
    "tpla": ("--to", "tpla", "--branches", 2, "--rank", 22, "--key-rank", 10),
    "pca": ("--to", "tpla", "--branches", 2, "--rank", 24, "--order", "pca"),
    "hadamard": ("--to", "tpla", "--branches", 2, "--rank", 24, "--order", "hadamard"),
}


@torch.no_grad()
def write(folder: Path, version: int, changes: dict[str, Any]) -> Path:
    torch.manual_seed(11)
    configuration, model_class = {
        2: (DeepseekV2Config, DeepseekV2ForCausalLM),
        3: (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[version]
    model = model_class(configuration(**{**COMMON, **changes}))
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("norm.weight"):
            weight.normal_(1, 0.3)
        elif name.endswith("e_score_correction_bias"):
            weight.normal_(0, 0.2)
        elif name.endswith("bias"):
            weight.normal_(0, 0.5)
        elif "inv_freq" not in name:
            weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    return {
        name: write(folder / str(index), *source)
        for index, (name, source) in enumerate(SOURCES.items())
    }


@pytest.fixture(params=SOURCES)
def experts(made: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return made[request.param]


@pytest.fixture
def v3(made: dict[str, Path]) -> Path:
    return made["v3, groups, query rank"]


def expert_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = support.load_all_tensors(folder)
    return {name: tensor for name, tensor in tensors.items() if ".mlp." in name}


def check_engines(bench, converted: Path) -> torch.Tensor:
    """Our forward pass against the code beside the weights, whose logits it returns."""
    theirs = support.logits_of(
        support.load(converted, custom_code=True), support.validation_ids()
    )
    error = support.relative_error(bench.our_logits(converted), theirs)
    print(f"relative logit error, ours: {error:.2e}")
    assert error <= support.LOGIT_TOLERANCE
    return theirs


def test_forward(bench, experts: Path) -> None:
    error = support.relative_error(bench.our_logits(experts), bench.their_logits(experts))
    print(f"relative logit error: {error:.2e}")
    assert error <= support.LOGIT_TOLERANCE


def test_attention_biases(bench, tmp_path: Path) -> None:
    source = write(tmp_path / "source", 2, BIASES)
    test_forward(bench, source)
    complaint = support.refused(
        3, "convert", source, "-o", tmp_path / "out", "--method", "weights-only", *WHOLE
    )
    assert "attention_bias" in complaint


def test_experts_matter(bench, v3: Path, tmp_path: Path) -> None:
    """Another choice of experts would have been noticed."""
    other = support.copy_checkpoint(v3, tmp_path / "other")
    support.edit_tensors(
        other,
        lambda tensors: tensors.update(
            {name: t.flip(0) for name, t in tensors.items() if name.endswith("correction_bias")}
        ),
    )
    error = support.relative_error(bench.our_logits(other), bench.our_logits(v3))
    assert error > 100 * support.LOGIT_TOLERANCE


def test_whole_latents_lose_nothing(bench, experts: Path) -> None:
    converted = bench.convert(experts, "weights-only", *WHOLE)
    error = support.relative_error(check_engines(bench, converted), bench.their_logits(experts))
    print(f"relative logit error against the source: {error:.2e}")
    assert error <= support.LOGIT_TOLERANCE
    assert support.verify(experts, converted)["rel_logit_error"] <= support.LOGIT_TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_experts_pass_through(bench, experts: Path, form: str) -> None:
    converted = bench.convert(experts, "weights-only", *FORMS[form])
    check_engines(bench, converted)
    expected = expert_tensors(experts)
    found = expert_tensors(converted)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_fitted(bench, experts: Path) -> None:
    """Fits, calibration and measurements run the experts too."""
    nats = {}
    for method in ("weights-only", "relatent"):
        converted = bench.convert(experts, method, *FORMS["tpla"])
        check_engines(bench, converted)
        found = support.verify(experts, converted, "--tp", 2)
        nats[method] = found["mean_kl"]
        assert found["devices"]["rel_logit_error"] <= support.LOGIT_TOLERANCE
    print(nats)
    assert nats["relatent"] < nats["weights-only"]


def test_cached_generation(bench, experts: Path) -> None:
    model = support.load(bench.convert(experts, "weights-only", *WHOLE), custom_code=True)
    for prompt in support.prompts()[:2]:
        generated = support.generate(model, prompt)
        assert generated == support.greedy_without_cache(model, prompt, generated)


def test_saved_again(bench, experts: Path, tmp_path: Path) -> None:
    converted = bench.convert(experts, "weights-only", *WHOLE)
    support.load(converted, custom_code=True).save_pretrained(tmp_path / "saved")
    assert torch.equal(bench.our_logits(tmp_path / "saved"), bench.our_logits(converted))


def test_threads(experts: Path, tmp_path: Path) -> None:
    one, three = (support.logit_bytes(experts, tmp_path / f"{n}.npy", n) for n in (1, 3))
    assert one == three


def test_shards(bench, experts: Path, tmp_path: Path) -> None:
    converted = bench.convert(experts, "weights-only", *FORMS["tpla"])
    for index, folder in enumerate((experts, converted)):
        shards, merged = support.split_and_merged(folder, tmp_path / str(index))
        assert support.folder_bytes(merged) == support.folder_bytes(folder)
        whole = expert_tensors(folder)
        parts = []
        for rank in sorted(shards.glob("*.safetensors")):
            with safe_open(rank, "pt") as file:
                parts.append({n: file.get_tensor(n) for n in file.keys() if ".mlp." in n})
        for name, tensor in whole.items():
            if ".mlp.gate." in name:
                assert all(torch.equal(part[name], tensor) for part in parts), name
                continue
            axis = 1 if "down_proj" in name else 0
            assert torch.equal(torch.cat([part[name] for part in parts], axis), tensor), name


def test_bfloat16_keeps_the_routers_bias(bench, v3: Path) -> None:
    converted = bench.convert(v3, "weights-only", *WHOLE, "--dtype", "bfloat16")
    tensors = expert_tensors(converted)
    for name, tensor in expert_tensors(v3).items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensors[name], tensor), name
        else:
            assert torch.equal(tensors[name], tensor.bfloat16()), name
    model = support.load(converted, torch.bfloat16, custom_code=True)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
    assert torch.isfinite(support.logits_of(model, support.validation_ids(1))).all()


def test_published_spelling(bench, made: dict[str, Path], tmp_path: Path) -> None:
    """config.json as DeepSeek writes it."""
    for name, more in (
        ("v2, yarn", {"topk_method": "greedy", "scoring_func": "softmax"}),
        ("v3, groups, query rank", {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    ):
        folder = support.copy_checkpoint(made[name], tmp_path / name[:2])
        scaling = {k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}
        changes = {
            **more,
            "rope_scaling": {**scaling, "type": "yarn"},
            "rope_theta": 10000,
            "moe_layer_freq": 1,
            "torch_dtype": "float32",
        }
        support.edit_config(folder, changes, drop=("rope_parameters", "dtype", "rope_interleave"))
        assert torch.equal(bench.our_logits(folder), bench.our_logits(made[name]))


def test_prediction_layers_are_left_out(v3: Path, tmp_path: Path) -> None:
    source = support.copy_checkpoint(v3, tmp_path / "source")
    support.edit_tensors(
        source,
        lambda tensors: tensors.update(
            {
                "model.layers.3.eh_proj.weight": torch.ones(48, 96),
                "model.layers.3.enorm.weight": torch.ones(48),
                "model.layers.3.mlp.experts.0.up_proj.weight": torch.ones(20, 48),
            }
        ),
    )
    done = support.run(
        *("convert", source, "-o", tmp_path / "out", "--method", "weights-only", *WHOLE, "--quiet")
    )
    assert done.returncode == 0, done.stderr
    assert "predict further tokens are left out (model.layers.3)" in done.stderr
    plan = json.loads(
        support.relatent(
            *("convert", source, "-o", tmp_path / "no", "--method", "weights-only", *WHOLE),
            *("--dry-run", "--json", "--quiet"),
        )
    )
    assert len(plan["left_out"]) == 1 and "model.layers.3.*: 3 tensors" in plan["left_out"][0]
    assert not [n for n in support.load_all_tensors(tmp_path / "out") if ".layers.3." in n]
    support.load(tmp_path / "out", custom_code=True)


def test_quantised_sources_are_refused(v3: Path, tmp_path: Path) -> None:
    source = support.copy_checkpoint(v3, tmp_path / "source")
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    support.edit_tensors(source, lambda tensors: tensors.update({name: torch.ones(1, 1)}))
    complaint = support.refused(3, "inspect", source)
    assert name in complaint and "FP8" in complaint and "bfloat16" in complaint
    support.edit_config(source, {"quantization_config": {"quant_method": "fp8"}})
    complaint = support.refused(3, "inspect", source)
    assert "quantization_config" in complaint and "bfloat16" in complaint


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"topk_method": "noaux_td"}, "topk_method"),
        ({"topk_group": None}, "needs topk_group"),
        ({"n_shared_experts": None}, "needs n_shared_experts"),
        ({"num_experts_per_tok": 13}, "num_experts_per_tok"),
    ],
)
def test_bad_config(
    bench, v3: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    converted = bench.convert(v3, "weights-only", *WHOLE)
    folder = support.copy_checkpoint(converted, tmp_path / "bad")
    support.edit_config(folder, changes)
    with pytest.raises(ValueError, match=complaint):
        support.load(folder, custom_code=True)
    assert next(iter(changes)) in support.refused(3, "inspect", folder)
