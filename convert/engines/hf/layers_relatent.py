"""The parts of a decoder beside its attention: norms, embeddings, rotary angles, MLPs, experts."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from .configuration_relatent import RelatentConfig


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, in float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)


def rope_frequencies(
    rope: dict[str, Any], size: int, max_position_embeddings: int
) -> tuple[torch.Tensor, float]:
    """Angle per position of every rotary pair, in float32, and the factor on cosines and sines."""
    # Models are put together on the meta device, where numbers have no values.
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    periods = rope["rope_theta"] ** exponents
    if rope["rope_type"] == "default":
        return 1.0 / periods, 1.0
    if rope["rope_type"] != "longrope":
        raise ValueError(f"rope_type must be default or longrope, not {rope['rope_type']!r}")
    if rope["short_factor"] != rope["long_factor"]:
        raise ValueError("short_factor and long_factor must be equal")
    stretch = torch.tensor(rope["short_factor"], dtype=torch.float32, device="cpu")
    factor = rope.get("attention_factor")
    if factor is None:
        original = rope["original_max_position_embeddings"]
        longer = rope.get("factor") or max_position_embeddings / original
        factor = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    return 1.0 / (stretch * periods), factor


class RelatentRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x.float() * inverse_rms(x, self.eps)).to(x.dtype)


class RelatentUnitOffsetRMSNorm(RelatentRMSNorm):
    """Multiplies by 1 + weight, in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.float() * inverse_rms(x, self.eps) * (1.0 + self.weight.float())
        return out.to(x.dtype)


def make_norm(config: RelatentConfig, size: int | None = None) -> RelatentRMSNorm:
    """A norm of the residual stream or of what is added to it; of another size of heads."""
    kind = RelatentUnitOffsetRMSNorm if config.norm_unit_offset else RelatentRMSNorm
    return kind(config.hidden_size if size is None else size, config.rms_norm_eps)


def normed_runs(norm: RelatentRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalises every run of the norm's size."""
    return norm(x.unflatten(-1, (-1, norm.weight.shape[0]))).flatten(-2)


def capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else torch.tanh(x / cap) * cap


class RelatentEmbedding(nn.Embedding):
    """Embeddings times a number, which is rounded to their type."""

    multiplier = 1.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = super().forward(ids)
        if self.multiplier == 1:
            return out
        return out * torch.tensor(self.multiplier, dtype=out.dtype, device=out.device)


class RelatentRotaryEmbedding(nn.Module):
    """Cosines and sines, in float32 whatever the type of the model."""

    def __init__(self, rope: dict[str, Any], size: int, max_position_embeddings: int):
        super().__init__()
        frequencies, self.factor = rope_frequencies(rope, size, max_position_embeddings)
        # Not a buffer: those change type with the model.
        self.frequencies: list[float] = frequencies.tolist()

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, length] -> twice [batch, length, pairs]"""
        frequencies = torch.tensor(
            self.frequencies, dtype=torch.float32, device=position_ids.device
        )
        angles = position_ids[..., None].float() * frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor


class RelatentMLP(nn.Module):
    def __init__(self, config: RelatentConfig, inner: int):
        super().__init__()
        hidden = config.hidden_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.activation = ACT2FN[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class RelatentRouter(nn.Linear):
    """Chooses the experts of every token, in float32."""

    def __init__(self, config: RelatentConfig):
        super().__init__(config.hidden_size, config.n_routed_experts, bias=False)
        self.method = config.topk_method
        self.groups = config.n_group
        self.kept_groups = config.topk_group
        self.per_token = config.num_experts_per_tok
        self.normalised = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        if self.method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(self.out_features))

    def limit_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """Minus infinity for experts outside the best groups."""
        grouped = scores.unflatten(-1, (self.groups, -1))
        # With a bias the two best count, else the best.
        best = grouped.topk(2 if self.method == "noaux_tc" else 1, dim=-1).values.sum(-1)
        kept = best.topk(self.kept_groups, dim=-1, sorted=False).indices
        out = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
        return grouped.masked_fill(~out[..., None], -math.inf).flatten(-2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, hidden] -> experts and their weights, [tokens, experts per token]"""
        logits = functional.linear(x.float(), self.weight.float())
        if self.method == "noaux_tc":
            scores = logits.sigmoid()
            for_choice = scores + self.e_score_correction_bias
        else:
            scores = for_choice = logits.softmax(-1)
        if self.method != "greedy":
            for_choice = self.limit_groups(for_choice)
        chosen = for_choice.topk(self.per_token, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale


class RelatentMoE(nn.Module):
    """Every token passes the shared experts, where there are some, and a few of the others."""

    def __init__(self, config: RelatentConfig):
        super().__init__()
        inner = config.moe_intermediate_size
        self.gate = RelatentRouter(config)
        self.experts = nn.ModuleList(
            RelatentMLP(config, inner) for _ in range(config.n_routed_experts)
        )
        shared = config.shared_size()
        self.shared_experts = RelatentMLP(config, shared) if shared else None
        self.shared_expert_gate = (
            nn.Linear(config.hidden_size, 1, bias=False)
            if config.shared_expert_intermediate_size
            else None
        )

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """What the shared experts add: [..., hidden] -> [..., hidden]"""
        out = self.shared_experts(x)
        if self.shared_expert_gate is not None:
            out = self.shared_expert_gate(x).sigmoid() * out
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        chosen, weights = self.gate(tokens)
        out = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            rows, places = torch.where(chosen == index)
            added = self.experts[index](tokens[rows]) * weights[rows, places, None]
            out.index_add_(0, rows, added.to(out.dtype))
        out = out.view_as(x)
        return out if self.shared_experts is None else self.shared(x) + out
