"""Every family that `relatent` reads as a source, against transformers' own class of it.

Each row of FAMILIES makes a small checkpoint with random weights. They are larger than those that
transformers begins training with: attention would be flat, and what a family does to its scores
would not show. Norms and biases are random too.

What holds for trained models of some of these families is in test_forward.py and test_lossless.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import support

LENGTH = 96
SPAN = ("--sequences", 2, "--length", LENGTH)

# Float32 in another order of summation; routers choose the same experts all the same.
FORWARD, WITH_EXPERTS = 1e-5, 2e-5
LOSSLESS = 1e-5

# No two sizes are equal, save what an architecture wants equal.
SIZES = {
    "vocab_size": 311,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEAD = {"head_dim": 16}
GEMMA = {
    **HEAD,
    "query_pre_attn_scalar": 20,
    "sliding_window": 24,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
# A part of the cache would be too little to choose sizes from.
OF_HEADS_OF_8 = ("--rank", 8, "--rope-dim", 8)
QWEN_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
MLA = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "first_k_dense_replace": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}


def longrope(short: list[float], long: list[float] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": short,
        "long_factor": long or short,
        "original_max_position_embeddings": 64,
        **more,
    }


@dataclass(frozen=True)
class Family:
    """A checkpoint, and one key of its config.json with a value that must be refused by name."""

    config: str  # a class of transformers
    more: dict[str, Any]
    refused: tuple[str, Any]
    experts: bool = False
    # Where the grouped-query forms do not apply: what lossless and compressed conversions are.
    lossless: tuple[Any, ...] = ()
    half: tuple[Any, ...] = ("--kv-budget", 0.5)
    # Numbers per token and layer that lossless takes less than the source.
    saved: int = 0


FAMILIES = {
    "llama": Family("LlamaConfig", HEAD, ("hidden_act", "gelu")),
    "mistral": Family("MistralConfig", {**HEAD, "sliding_window": None}, ("hidden_act", "gelu")),
    "qwen2": Family(
        "Qwen2Config",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        half=OF_HEADS_OF_8,
    ),
    "qwen3": Family("Qwen3Config", HEAD, ("hidden_act", "gelu")),
    "seed_oss": Family("SeedOssConfig", {**HEAD, "attention_out_bias": False}, ("mlp_bias", True)),
    # As many keys as queries, of which a part rotates: lossless saves what the input has no room for.
    "phi3": Family(
        "Phi3Config",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": longrope(
                [1.0 + 0.3 * i for i in range(6)], partial_rotary_factor=0.75
            ),
            "original_max_position_embeddings": 64,
        },
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        saved=12,
    ),
    # Half of a head rotates, in pairs side by side.
    "glm4": Family("Glm4Config", HEAD, ("hidden_act", "gelu")),
    # The second layer does not rotate.
    "smollm3": Family(
        "SmolLM3Config",
        {"no_rope_layers": [1, 0, 1]},
        ("no_rope_layers", [1, 2, 0]),
        half=OF_HEADS_OF_8,
    ),
    "granite": Family(
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "attention_bias": True,
        },
        ("logits_scaling", 0),
        half=OF_HEADS_OF_8,
    ),
    "olmo2": Family("Olmo2Config", {}, ("hidden_act", "gelu"), half=OF_HEADS_OF_8),
    "mixtral": Family(
        "MixtralConfig",
        {**HEAD, "num_local_experts": 5, "num_experts_per_tok": 2},
        ("scoring_func", "sigmoid"),
        experts=True,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {**QWEN_EXPERTS, "shared_expert_intermediate_size": 28, "mlp_only_layers": [1]},
        ("decoder_sparse_step", 0),
        experts=True,
        half=OF_HEADS_OF_8,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {**HEAD, **QWEN_EXPERTS, "norm_topk_prob": True},
        ("num_experts_per_tok", 9),
        experts=True,
    ),
    # The other layers slide, and stay as they are.
    "gemma2": Family(
        "Gemma2Config",
        {**GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0},
        ("hidden_activation", "relu"),
    ),
    "gemma3_text": Family(
        "Gemma3TextConfig",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        ("use_bidirectional_attention", True),
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        MLA,
        ("hidden_act", "gelu"),
        lossless=("--engine", "deepseek"),
        half=("--to", "tpla", "--branches", 2, "--rank", 24, "--key-rank", 8),
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        MLA,
        ("hidden_act", "gelu"),
        lossless=("--engine", "deepseek"),
        half=("--to", "tpla", "--branches", 2, "--rank", 24, "--key-rank", 8),
    ),
}

SOURCES = [f for f in json.loads(support.relatent("families", "--json")) if f["use"] == "source"]

each_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Weights that keep the size of what they multiply; queries and keys are larger."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3)
        elif parameter.ndim == 1:  # norms, some of them stored as what is added to 1
            of_scores = 0.5 if "q_norm" in name or "k_norm" in name else 0.0
            parameter.copy_(parameter.mean().round() + 0.2 * torch.randn_like(parameter) + of_scores)
        elif "embed" in name:
            parameter.normal_(0, 0.5)
        else:
            larger = 1.5 if any(part in name for part in ("q_", "k_", "qkv", "kv_")) else 1.0
            parameter.normal_(0, larger * parameter.shape[-1] ** -0.5)


class Sources:
    """The checkpoints and what transformers makes of them, each once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokens = folder / "tokens.npy"
        draw = np.random.default_rng(7)
        np.save(self.tokens, draw.integers(2, SIZES["vocab_size"], 4 * LENGTH, dtype=np.uint16))
        self.made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def ids(self) -> torch.Tensor:
        return torch.from_numpy(np.load(self.tokens).astype(np.int64)).view(4, LENGTH)[:2]

    def make(self, name: str) -> tuple[Path, torch.nn.Module]:
        if name not in self.made:
            family = FAMILIES[name]
            config = getattr(transformers, family.config)(**{**SIZES, **family.more})
            assert config.model_type == name
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(11)
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                draw_weights(model)
            model.save_pretrained(self.folder / name)
            self.made[name] = self.folder / name, support.load(
                self.folder / name, attention="eager"
            )
        return self.made[name]

    def our_logits(self, folder: Path) -> torch.Tensor:
        out = folder.with_suffix(".npy")
        support.relatent("logits", folder, "--tokens", self.tokens, *SPAN, "-o", out)
        return torch.from_numpy(np.load(out))

    def convert(self, name: str, method: str, *options: Any) -> Path:
        source, _ = self.make(name)
        out = self.folder / f"{name}-{method}"
        support.relatent(
            *("convert", source, "-o", out, "--method", method, "--dtype", "float32"),
            *options,
            "--quiet",
        )
        return out


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    yield Sources(tmp_path_factory.mktemp("families"))


def with_custom_code(folder: Path) -> bool:
    return "auto_map" in json.loads((folder / "config.json").read_text())


def attention_entropy(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Of the last queries, as a part of what flat attention would have."""
    with torch.no_grad():
        layers = model(ids, output_attentions=True, use_cache=False).attentions
    weights = torch.cat([layer[:, :, -1].flatten(0, 1) for layer in layers]).double()
    seen = (weights > 0).sum(-1).clamp(min=2)
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    return (entropy / seen.log()).mean().item()


def test_every_source_has_a_row() -> None:
    assert set(FAMILIES) == {family["family"] for family in SOURCES}


@each_family
def test_forward(sources: Sources, family: str) -> None:
    folder, model = sources.make(family)
    assert attention_entropy(model, sources.ids()) < 0.9
    error = support.relative_error(
        sources.our_logits(folder), support.logits_of(model, sources.ids())
    )
    print(f"{family}: relative logit error {error:.2e}")
    assert error <= (WITH_EXPERTS if FAMILIES[family].experts else FORWARD)


@each_family
def test_lossless(sources: Sources, family: str) -> None:
    folder, before = sources.make(family)
    converted = sources.convert(family, "lossless", *FAMILIES[family].lossless)
    report = json.loads(
        support.relatent(
            *("verify", folder, converted, "--tokens", sources.tokens, *SPAN),
            *("--json", "--quiet"),
        )
    )
    print(f"{family}: {report['rel_logit_error']:.2e} by verify")
    assert report["rel_logit_error"] <= LOSSLESS
    if not FAMILIES[family].lossless:
        per_layer = [
            json.loads(support.relatent("inspect", kind, "--json"))["cache_bytes_per_token"] // 12
            for kind in (folder, converted)
        ]
        own = per_layer[1] - per_layer[0] + FAMILIES[family].saved
        assert own in (0, 1), per_layer  # a layout may need a coordinate for itself
    after = support.load(converted, custom_code=with_custom_code(converted))
    ids = sources.ids()
    error = support.relative_error(support.logits_of(after, ids), support.logits_of(before, ids))
    print(f"{family}: {error:.2e} in transformers, as {type(after).__name__}")
    assert error <= support.LOGIT_TOLERANCE
    for length in (5, 70):
        assert support.generate(after, ids[0, :length]) == support.generate(before, ids[0, :length])


@each_family
def test_half_of_the_cache(sources: Sources, family: str) -> None:
    folder, _ = sources.make(family)
    statistics = sources.folder / f"{family}.h5"
    support.relatent(
        *("calibrate", folder, "--tokens", sources.tokens, "-o", statistics, "--quiet"),
        *("--sequences", 4, "--length", LENGTH),
    )
    for method, more in (("weights-only", ()), ("relatent", ("--calibration", statistics))):
        converted = sources.convert(family, method, *FAMILIES[family].half, *more)
        ours = sources.our_logits(converted)
        theirs = support.logits_of(
            support.load(converted, custom_code=with_custom_code(converted)), sources.ids()
        )
        error = support.relative_error(theirs, ours)
        print(f"{family}, {method}: {error:.2e} between transformers and ours")
        assert error <= support.LOGIT_TOLERANCE


def test_longrope_of_one_context(sources: Sources, tmp_path: Path) -> None:
    """Of two lists the one that transformers takes for sequences of that length."""
    source, _ = sources.make("phi3")
    changed = support.copy_checkpoint(source, tmp_path / "changed")
    two = longrope([1.0] * 6, [1.0 + 0.5 * i for i in range(6)], partial_rotary_factor=0.75)
    support.edit_config(changed, {"rope_parameters": two})
    assert "--context" in support.refused(3, "inspect", changed)
    ids = sources.ids()
    for length in (64, LENGTH):
        out = tmp_path / f"{length}.npy"
        converted = tmp_path / f"lossless-{length}"
        span = ("--tokens", sources.tokens, "--sequences", 1, "--length", length)
        support.relatent("logits", changed, *span, "--context", length, "-o", out)
        theirs = support.logits_of(support.load(changed), ids[:1, :length])
        assert support.relative_error(torch.from_numpy(np.load(out)), theirs) <= FORWARD
        said = support.run(
            *("convert", changed, "-o", converted, "--method", "lossless", "--dtype", "float32"),
            *("--context", length),
        )
        assert said.returncode == 0 and f"--context {length}" in said.stderr
        after = support.logits_of(support.load(converted), ids[:1, :length])
        assert support.relative_error(after, theirs) <= support.LOGIT_TOLERANCE


@each_family
def test_unsupported_key(sources: Sources, family: str, tmp_path: Path) -> None:
    folder, _ = sources.make(family)
    key, value = FAMILIES[family].refused
    changed = support.copy_checkpoint(folder, tmp_path / "changed")
    drop = ("rope_parameters",) if key == "rope_scaling" else ()
    support.edit_config(changed, {key: value}, drop=drop)
    said = support.refused(3, "convert", changed, "-o", tmp_path / "out", "--method", "lossless")
    assert (value["rope_type"] if isinstance(value, dict) else key) in said
    assert "config.json" in said
