"""The layouts of the MLRA and the GLA authors, each as a model that transformers loads.

Written from their formulas (SongtaoLiu0823/MLRA `model/*.py`, Dao-AILab/grouped-latent-attention
`modeling_llama_GLA.py`), whose own files need a Hopper kernel: the parameters have the authors'
names and shapes, and attention is spelled out.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Tensor = torch.Tensor


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def rotated(x: Tensor, base: float) -> Tensor:
    """Halves (j, j + p/2) of the last dimension, by position along the second; [b, t, heads, p]."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequency)[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal, scaled by the query's size to the power -1/2; [b, t, heads, size]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def heads_of(up: Tensor, rotary_key: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values of heads from [b, t, heads * 2 size], every key with the rotary key."""
    content, value = up.unflatten(-1, (-1, 2 * size)).split(size, -1)
    shape = (*content.shape[:-1], rotary_key.shape[-1])
    return torch.cat([content, rotary_key.expand(shape)], -1), value


class MlraConfig(PretrainedConfig):
    model_type = "gpt2"


class MlraAttention(nn.Module):
    eps = 1e-6
    base = 10000.0

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.kind, number = c.mlra_model.split("_")
        self.number = int(number)
        self.latents = 2 if c.mlra_model == "gla_2" else 4
        self.size, self.p, self.heads = c.qk_nope_head_dim, c.qk_rope_head_dim, c.n_head
        # Which heads a latent feeds: all of them (mlra_4), a half (mlra_2, gla_2) or a quarter.
        self.groups = self.latents // self.number if self.kind == "mlra" else self.latents
        rank = c.kv_lora_rank // self.latents
        rows = c.n_head // self.groups * 2 * self.size
        self.q_a_proj = nn.Linear(c.n_embd, c.q_lora_rank, bias=False)
        self.q_a_layernorm = Norm(c.q_lora_rank, self.eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.n_head * (self.size + self.p), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.n_embd, c.kv_lora_rank + self.p, bias=False)
        if self.latents == 2:
            self.kv_a_layernorm_1 = Norm(rank, self.eps)
            self.kv_a_layernorm_2 = Norm(rank, self.eps)
            self.kv_b_proj_1 = nn.Linear(rank, rows, bias=False)
            self.kv_b_proj_2 = nn.Linear(rank, rows, bias=False)
        else:
            self.kv_a_layernorms = nn.ModuleList(Norm(rank, self.eps) for _ in range(4))
            self.kv_b_proj = nn.Parameter(torch.zeros(4, rank, rows))
        self.c_proj = nn.Linear(c.n_head * self.size, c.n_embd, bias=False)
        self.q_scale = (c.n_embd / c.q_lora_rank) ** 0.5
        self.kv_scale = (c.n_embd / rank) ** 0.5
        self.out_scale = self.number**-0.5 if self.kind == "mlra" else 1.0

    def expanded(self, latent: Tensor, i: int) -> Tensor:
        if self.latents == 2:
            norm = (self.kv_a_layernorm_1, self.kv_a_layernorm_2)[i]
            return (self.kv_b_proj_1, self.kv_b_proj_2)[i](norm(latent) * self.kv_scale)
        return self.kv_a_layernorms[i](latent) * self.kv_scale @ self.kv_b_proj[i]

    def forward(self, x: Tensor) -> Tensor:
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)) * self.q_scale)
        content, rotary = query.unflatten(-1, (self.heads, -1)).split([self.size, self.p], -1)
        query = torch.cat([content, rotated(rotary, self.base)], -1)
        latents = self.kv_a_proj_with_mqa(x)
        rotary_key = rotated(latents[..., None, -self.p :], self.base)
        per_group = self.heads // self.groups
        out = torch.zeros_like(content)
        for i, latent in enumerate(latents[..., : -self.p].chunk(self.latents, -1)):
            group = i % self.groups
            served = slice(group * per_group, (group + 1) * per_group)
            key, value = heads_of(self.expanded(latent, i), rotary_key, self.size)
            out[:, :, served] += attend(query[:, :, served], key, value) * self.out_scale
        return self.c_proj(out.flatten(-2))


class MlraMlp(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c_fc1 = nn.Linear(c.n_embd, c.intermediate_size, bias=False)
        self.c_fc2 = nn.Linear(c.n_embd, c.intermediate_size, bias=False)
        self.c_proj = nn.Linear(c.intermediate_size, c.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_fc1(x)) * self.c_fc2(x))


class MlraBlock(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.attn = MlraAttention(c)
        self.mlp = MlraMlp(c)
        self.input_layernorm = Norm(c.n_embd, MlraAttention.eps)
        self.post_attention_layernorm = Norm(c.n_embd, MlraAttention.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class MlraModel(PreTrainedModel):
    config_class = MlraConfig
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: MlraConfig) -> None:
        super().__init__(config)
        blocks = nn.ModuleList(MlraBlock(config) for _ in range(config.n_layer))
        embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict({"wte": embedding, "h": blocks})
        self.layernorm = Norm(config.n_embd, MlraAttention.eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x)
        return CausalLMOutput(logits=self.lm_head(self.layernorm(x)))


class GlaConfig(PretrainedConfig):
    model_type = "llama"


class GlaAttention(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        d, self.p, self.heads = c.head_dim, c.qk_rope_dim, c.num_attention_heads
        self.size, self.rank, self.base = d, 2 * d, c.rope_theta
        self.W_dQ = nn.Linear(c.hidden_size, 8 * d)
        self.q_norm = Norm(8 * d, c.rms_norm_eps)
        self.W_uQ_rope = nn.Linear(8 * d, self.heads * (d + self.p))
        self.W_dKV = nn.Linear(c.hidden_size, 4 * d + self.p)
        self.kv_norm_1 = Norm(2 * d, c.rms_norm_eps)
        self.kv_norm_2 = Norm(2 * d, c.rms_norm_eps)
        self.W_ukv_1 = nn.Linear(2 * d, self.heads * d)
        self.W_ukv_2 = nn.Linear(2 * d, self.heads * d)
        self.o_proj = nn.Linear(self.heads * d, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor) -> Tensor:
        query = self.W_uQ_rope(self.q_norm(self.W_dQ(x)))
        content, rotary = query.unflatten(-1, (self.heads, -1)).split([self.size, self.p], -1)
        query = torch.cat([content, rotated(rotary, self.base)], -1)
        first, second, rotary_key = self.W_dKV(x).split([self.rank, self.rank, self.p], -1)
        rotary_key = rotated(rotary_key[..., None, :], self.base)
        half = self.heads // 2
        ups = (self.W_ukv_1(self.kv_norm_1(first)), self.W_ukv_2(self.kv_norm_2(second)))
        halves = [
            attend(query[:, :, served], *heads_of(up, rotary_key, self.size))
            for up, served in zip(ups, (slice(0, half), slice(half, None)), strict=True)
        ]
        return self.o_proj(torch.cat(halves, 2).flatten(-2))


class GlaMlp(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GlaLayer(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.self_attn = GlaAttention(c)
        self.mlp = GlaMlp(c)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class GlaModel(PreTrainedModel):
    config_class = GlaConfig

    def __init__(self, config: GlaConfig) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            GlaLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.model.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.lm_head(self.model.norm(x)))
