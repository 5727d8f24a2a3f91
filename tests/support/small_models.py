"""Small checkpoints of other families and shapes, cut from llama-3m's weights and trained on.

Random weights would not do: their attention is nearly uniform, their keys and values have flat
spectra, and what a conversion loses of them says nothing. So every one begins with three layers of
a trained model, its heads merged, chosen or factored into the shapes wanted, and a dozen steps of
training mend what that broke: biases, norms and ranks are then parts of a model that predicts text.
"""

import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from checkpoints import EXAMPLES

Tensor = torch.Tensor
Tensors = dict[str, Tensor]

TRAINED = EXAMPLES / "llama-3m"
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD = 3, 192, 8, 4, 32
COMMON = {
    "vocab_size": 4096,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# As trained Qwen2 models have them: large on the keys, at every rotary frequency.
BIASES = {"q_proj": 0.1, "k_proj": 0.6, "v_proj": 0.02}
STEPS, BATCH, LENGTH, RATE = 12, 4, 256, 1e-3


class Family(Protocol):
    """What has another shape than llama-3m."""

    def model(self) -> PreTrainedModel: ...

    def attention(self, trained: Tensors) -> Tensors:
        """A layer's weights by name, from those of llama-3m's projections."""


def rope(base: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}


def merged(weight: Tensor) -> Tensor:
    """Heads of 64 from two heads of 32 of neighbouring groups, whose rotary pairs alternate."""
    parts = weight.reshape(KV_HEADS // 2, 2, -1, 2, HEAD // 2, weight.shape[-1])
    return parts.permute(0, 2, 3, 4, 1, 5).flatten(0, 4)


class Llama:
    """Two key/value heads of 64 for four queries: heads wider than the hidden size divides into."""

    def model(self) -> PreTrainedModel:
        return LlamaForCausalLM(
            LlamaConfig(
                **COMMON,
                **rope(10000.0),
                num_attention_heads=HEADS // 2,
                num_key_value_heads=KV_HEADS // 2,
                head_dim=2 * HEAD,
                tie_word_embeddings=True,
            )
        )

    def attention(self, trained: Tensors) -> Tensors:
        return {
            "q_proj": merged(trained["q_proj"]),
            "k_proj": merged(trained["k_proj"]),
            "v_proj": merged(trained["v_proj"]),
            "o_proj": merged(trained["o_proj"].T).T,
        }


def chosen(weight: Tensor, heads: tuple[int, ...]) -> Tensor:
    """The rows of these heads of 32."""
    return weight.view(-1, HEAD, weight.shape[-1])[heads, :].flatten(0, 1)


def plant_biases(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(0, BIASES[name.split(".")[-2]])


@dataclass(frozen=True)
class Qwen2:
    """Two key/value heads for six queries, with biases; the config does not give the head size."""

    tied: bool = False

    queries, keys = (0, 1, 2, 4, 5, 6), (0, 2)

    def model(self) -> PreTrainedModel:
        model = Qwen2ForCausalLM(
            Qwen2Config(
                **COMMON,
                **rope(1000000.0),
                num_attention_heads=len(self.queries),
                num_key_value_heads=len(self.keys),
                tie_word_embeddings=self.tied,
            )
        )
        plant_biases(model)
        return model

    def attention(self, trained: Tensors) -> Tensors:
        return {
            "q_proj": chosen(trained["q_proj"], self.queries),
            "k_proj": chosen(trained["k_proj"], self.keys),
            "v_proj": chosen(trained["v_proj"], self.keys),
            "o_proj": chosen(trained["o_proj"].T.contiguous(), self.queries).T,
        }


class Qwen3(Qwen2):
    """The same heads, normalised before they turn; norms are what makes attention sharp."""

    def model(self) -> PreTrainedModel:
        model = Qwen3ForCausalLM(
            Qwen3Config(
                **COMMON,
                **rope(1000000.0),
                num_attention_heads=len(self.queries),
                num_key_value_heads=len(self.keys),
                head_dim=HEAD,
                tie_word_embeddings=self.tied,
            )
        )
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(1.5 + 0.3 * torch.randn(HEAD))
        return model


def factored(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Down, a norm's weight and up, whose product is nearest to this one.

    What comes down has size one, and the norm's weight is uneven, so that neither goes unnoticed.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    scale = values[:rank].square().mean().sqrt()
    norm = 0.7 + 0.6 * torch.rand(rank)
    return right[:rank] * values[:rank, None] / scale, norm, left[:, :rank] * scale / norm


@dataclass(frozen=True)
class DeepSeek:
    """MLA: a latent for keys, without their four fastest pairs, and values of three heads."""

    q_rank: int | None = None

    heads, nope, rank = 6, HEAD - 8, 128

    def model(self) -> PreTrainedModel:
        return DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **COMMON,
                **rope(10000.0),
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                kv_lora_rank=self.rank,
                q_lora_rank=self.q_rank,
                qk_nope_head_dim=self.nope,
                qk_rope_head_dim=HEAD,
                v_head_dim=HEAD,
                first_k_dense_replace=LAYERS,  # no experts
                n_group=1,
                topk_group=1,
                n_routed_experts=2,
                num_experts_per_tok=1,
                tie_word_embeddings=False,
            )
        )

    def attention(self, trained: Tensors) -> Tensors:
        group = torch.arange(self.heads) // (HEADS // KV_HEADS)
        pairs = torch.arange(HEAD).view(2, -1)
        slow, interleaved = pairs[:, -self.nope // 2 :].flatten(), pairs.T.flatten()
        query = trained["q_proj"].view(HEADS, HEAD, -1)[: self.heads]
        key = trained["k_proj"].view(KV_HEADS, HEAD, -1)
        value = trained["v_proj"].view(KV_HEADS, HEAD, -1)
        queries = torch.cat([query[:, slow], query[:, interleaved]], 1).flatten(0, 1)
        keys_and_values = torch.cat([key[group][:, slow], value[group]], 1).flatten(0, 1)
        down, norm, up = factored(keys_and_values, self.rank)
        attention = {
            "kv_a_proj_with_mqa": torch.cat([down, key[0, interleaved]]),
            "kv_a_layernorm": norm,
            "kv_b_proj": up,
            "o_proj": trained["o_proj"][:, : self.heads * HEAD],
        }
        if self.q_rank is None:
            return attention | {"q_proj": queries}
        down, norm, up = factored(queries, self.q_rank)
        return attention | {"q_a_proj": down, "q_a_layernorm": norm, "q_b_proj": up}


MODELS = {
    "made-llama": Llama(),
    "made-qwen2": Qwen2(),
    "made-qwen2-tied": Qwen2(tied=True),
    "made-qwen3": Qwen3(),
    "made-deepseek": DeepSeek(),
    "made-deepseek-q-rank": DeepSeek(q_rank=96),
}


def train(model: PreTrainedModel) -> None:
    tokens = np.load(EXAMPLES / "tokens" / "calibration.npy").astype(np.int64)
    rows = torch.from_numpy(tokens).view(-1, LENGTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, STEPS)
    for batch in rows[torch.randperm(len(rows))].split(BATCH)[:STEPS]:
        optimizer.zero_grad()
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def begun(family: Family) -> PreTrainedModel:
    """The model before it is trained on."""
    trained = {name: t.float() for name, t in load_file(TRAINED / "model.safetensors").items()}
    trained["lm_head.weight"] = trained["model.embed_tokens.weight"]
    model = family.model()
    for layer in range(LAYERS):
        root = f"model.layers.{layer}.self_attn."
        parts = {f"{p}_proj": trained[f"{root}{p}_proj.weight"] for p in "qkvo"}
        for part, weight in family.attention(parts).items():
            model.get_parameter(f"{root}{part}.weight").copy_(weight)
    for name, parameter in model.named_parameters():
        if "self_attn" not in name:
            parameter.copy_(trained[name])
    return model


@cache
def folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="relatent-models-")


@cache
def make(name: str) -> Path:
    """Writes a model as published ones are: in bfloat16, over several files, with a tokenizer."""
    out = Path(folder().name) / name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = begun(MODELS[name])
        train(model)
    model.to(torch.bfloat16).save_pretrained(out, max_shard_size="2MB")
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copyfile(TRAINED / file, out / file)
    return out
