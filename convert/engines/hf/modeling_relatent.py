"""Decoders with latent attention: the cache holds latents that every head reads its own way.

Of each token a layer caches one rotary key, which all heads share, and latents. A branch serves a
range of heads: from its latent c, a head forms content keys and values by two matrices of its own,

    score = (n + p)^-1/2 (rotary query . rotary key + content query . (key matrix) c)
    output = softmax(scores) (value matrix) c

Heads that several branches serve add up their outputs. For a single new token the matrices move to
the query and to the mixed latents, so nothing is expanded per head and cached position.

Layers that a conversion left as they were are grouped-query attention, with a sliding window or
without, and cache keys and values.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_relatent import RelatentConfig

LATENT_NORM_EPS = 1e-6
# Newer versions of transformers call the cache among arguments and outputs `cache`.
CACHE = (
    "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
)


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


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (i, i + size / 2) of the last dimension; in float32, returned as x's type."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Of queries that are the first positions: [queries, keys], true where a key is seen."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def attention_weights(
    scores: torch.Tensor, mask: torch.Tensor | None, cap: float | None
) -> torch.Tensor:
    """The softmax of scaled scores, formed in float32."""
    scores = capped(scores, cap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


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


class RelatentAttention(nn.Module):
    def __init__(self, config: RelatentConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.scaling = (self.nope_dim + self.rope_dim) ** -0.5
        self.branches = config.latent_branches
        shared_ranks = config.latent_shared_ranks
        # Of the latent numbers in the cache.
        self.split_sizes = shared_ranks + [branch["rank"] for branch in self.branches]

        hidden, bias = config.hidden_size, config.attention_bias
        query_size = self.num_heads * (self.nope_dim + self.rope_dim)
        # What latents and rotary keys are projections of.
        inputs = hidden
        self.normed_heads = config.latent_features == "normed_heads"
        if self.normed_heads:
            head, eps = config.normed_head_dim, config.rms_norm_eps
            queries, keys = self.num_heads * head, config.num_key_value_heads * head
            inputs = 2 * keys
            self.q_proj = nn.Linear(hidden, queries, bias=config.normed_bias)
            self.k_proj = nn.Linear(hidden, keys, bias=config.normed_bias)
            self.v_proj = nn.Linear(hidden, keys, bias=config.normed_bias)
            wide = config.qk_norm == "width"
            self.q_norm = make_norm(config, queries if wide else head)
            self.k_norm = make_norm(config, keys if wide else head)
            # The map of every head's own normalised query.
            self.q_b_proj = nn.Linear(head, query_size, bias=bias)
        elif config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_size, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RelatentRMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        self.k_rope_proj = nn.Linear(inputs, self.rope_dim, bias=bias)
        if config.latent_norm == "replicated":
            self.kv_norm_proj = nn.Linear(hidden, config.latent_norm_rank, bias=False)
        self.kv_shared_proj = nn.ModuleList(
            nn.Linear(inputs, rank, bias=bias) for rank in shared_ranks
        )
        self.kv_a_proj = nn.ModuleList(
            nn.Linear(inputs, branch["rank"], bias=bias) for branch in self.branches
        )
        ranks = [
            branch["rank"] + (0 if branch.get("shared") is None else shared_ranks[branch["shared"]])
            for branch in self.branches
        ]
        if config.latent_norm == "branch":
            self.kv_a_layernorm = nn.ModuleList(
                RelatentRMSNorm(rank, LATENT_NORM_EPS) for rank in ranks
            )
        self.kv_b_proj = nn.ModuleList(
            nn.Linear(rank, branch["num_heads"] * (self.nope_dim + self.v_dim), bias=False)
            for branch, rank in zip(self.branches, ranks, strict=True)
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_dim, hidden, bias=bias)

    def query(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden] -> [batch, heads, length, n + p]"""
        if self.normed_heads:
            maps = self.q_b_proj.weight.unflatten(0, (self.num_heads, -1))
            heads = normed_runs(self.q_norm, self.q_proj(x)).unflatten(-1, (self.num_heads, -1))
            query = torch.einsum("blhd,hsd->blhs", heads, maps).flatten(2)
            if self.q_b_proj.bias is not None:
                query = query + self.q_b_proj.bias
        elif self.config.q_lora_rank is None:
            query = self.q_proj(x)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        content, rotary = query.split((self.nope_dim, self.rope_dim), dim=-1)
        return torch.cat((content, rotate(rotary, cos[:, None], sin[:, None])), dim=-1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What latents and rotary keys are projections of: [batch, length, inputs]"""
        if not self.normed_heads:
            return x
        return torch.cat((normed_runs(self.k_norm, self.k_proj(x)), self.v_proj(x)), dim=-1)

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """The latent numbers that the cache holds: [batch, length, sum of split_sizes]

        They are normalised, save for those that several branches normalise in their own way.
        """
        parts = [project(x) for project in self.kv_shared_proj]
        for index, project in enumerate(self.kv_a_proj):
            own = project(x)
            if self.config.latent_norm == "branch" and self.branches[index].get("shared") is None:
                own = self.kv_a_layernorm[index](own)
            parts.append(own)
        latents = torch.cat(parts, dim=-1)
        if self.config.latent_norm == "replicated":
            shrink = inverse_rms(self.kv_norm_proj(x), LATENT_NORM_EPS)
            latents = (latents.float() * shrink).to(latents.dtype)
        return latents

    def branch_latent(self, cached: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        """What the heads of a branch read, from the parts of the cached latents."""
        shared = self.branches[index].get("shared")
        own = cached[len(self.kv_shared_proj) + index]
        if shared is None:
            return own
        latent = torch.cat((cached[shared], own), dim=-1)
        return self.kv_a_layernorm[index](latent) if self.config.latent_norm == "branch" else latent

    def attend_expanded(
        self,
        query: torch.Tensor,
        rotary_key: torch.Tensor,
        latent: torch.Tensor,
        up: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """With keys and values per head: cheap for many queries at once.

        query [batch, heads, queries, n + p], rotary_key [batch, keys, p],
        latent [batch, keys, rank], up [heads, n + w, rank] -> [batch, heads, queries, w]
        """
        if mask is None:
            # The queries are the first positions; what a static cache holds beyond is empty.
            length = query.shape[2]
            rotary_key, latent = rotary_key[:, :length], latent[:, :length]
        heads = up.shape[0]
        expanded = functional.linear(latent, up.flatten(0, 1)).unflatten(-1, (heads, -1))
        content_key, value = expanded.transpose(1, 2).split((self.nope_dim, self.v_dim), dim=-1)
        rotary_key = rotary_key[:, None].expand(-1, heads, -1, -1)
        # Kernels that do not keep all scores want values of the keys' size.
        padding = max(0, query.shape[-1] - self.v_dim)
        out = functional.scaled_dot_product_attention(
            query,
            torch.cat((content_key, rotary_key), dim=-1),
            functional.pad(value, (0, padding)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
        )
        return out[..., : self.v_dim]

    def attend_absorbed(
        self,
        query: torch.Tensor,
        rotary_key: torch.Tensor,
        latent: torch.Tensor,
        up: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same with queries moved into the latent space: reads the cache as it is.

        Without a mask every query sees every key.
        """
        heads, queries = query.shape[1:3]
        content, rotary = query.split((self.nope_dim, self.rope_dim), dim=-1)
        key_map, value_map = up.split((self.nope_dim, self.v_dim), dim=1)
        content = torch.matmul(content, key_map)  # [batch, heads, queries, rank]
        # All heads read the same keys, so they are as good as further queries.
        scores = torch.matmul(content.flatten(1, 2), latent.transpose(1, 2))
        scores = scores + torch.matmul(rotary.flatten(1, 2), rotary_key.transpose(1, 2))
        scores = scores.unflatten(1, (heads, queries)) * self.scaling
        weights = attention_weights(scores, mask, self.config.attn_logit_softcapping)
        mixed = torch.matmul(weights.flatten(1, 2), latent).unflatten(1, (heads, queries))
        return torch.matmul(mixed, value_map.transpose(1, 2))

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        cos, sin = position_embeddings
        query = self.query(x, cos, sin)
        features = self.features(x)
        rotary_key = rotate(self.k_rope_proj(features), cos, sin)
        latents = self.latents(features)
        if cache is not None:
            # One head whose keys are the latents and whose values are the rotary keys.
            latents, rotary_key = cache.update(
                latents[:, None], rotary_key[:, None], self.layer_idx
            )
            latents, rotary_key = latents[:, 0], rotary_key[:, 0]
        cached = latents.split(self.split_sizes, dim=-1)

        # What caps scores needs all of them, as eager attention does.
        absorb = (
            query.shape[2] == 1
            or self.config._attn_implementation == "eager"
            or self.config.attn_logit_softcapping is not None
        )
        if absorb and attention_mask is None and query.shape[2] > 1:
            attention_mask = causal_mask(query.shape[2], latents.shape[1], query.device)
        attend = self.attend_absorbed if absorb else self.attend_expanded
        out = query.new_zeros(*query.shape[:3], self.v_dim)
        for index, branch in enumerate(self.branches):
            first, count = branch["first_head"], branch["num_heads"]
            out[:, first : first + count] += attend(
                query[:, first : first + count],
                rotary_key,
                self.branch_latent(cached, index),
                self.kv_b_proj[index].weight.unflatten(0, (count, -1)),
                attention_mask,
            )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class RelatentGroupedQueryAttention(nn.Module):
    """A layer's attention as it was before the conversion."""

    def __init__(self, config: RelatentConfig, layer_idx: int):
        super().__init__()
        layer = config.layers[layer_idx]
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = layer["num_key_value_heads"]
        self.scaling = layer["scaling"]
        hidden, head_dim = config.hidden_size, layer["head_dim"]
        queries, keys = self.num_heads * head_dim, self.num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=layer["qkv_bias"])
        self.k_proj = nn.Linear(hidden, keys, bias=layer["qkv_bias"])
        self.v_proj = nn.Linear(hidden, keys, bias=layer["qkv_bias"])
        self.o_proj = nn.Linear(queries, hidden, bias=layer["o_bias"])
        self.q_norm, self.k_norm = None, None
        if layer["qk_norm"] != "none":
            wide = layer["qk_norm"] == "width"
            self.q_norm = make_norm(config, queries if wide else head_dim)
            self.k_norm = make_norm(config, keys if wide else head_dim)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """query [batch, heads, queries, d], key, value [batch, heads, keys, d] -> as query"""
        length = query.shape[2]
        if mask is None and length > 1:
            # The queries are the first positions; what a static cache holds beyond is empty.
            key, value = key[:, :, :length], value[:, :, :length]
        cap = self.config.attn_logit_softcapping
        if cap is None and self.config._attn_implementation != "eager":
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None and length > 1,
                scale=self.scaling,
            )
        if mask is None and length > 1:
            mask = causal_mask(length, length, query.device)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        return torch.matmul(attention_weights(scores, mask, cap), value)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        cos, sin = (table[:, None] for table in position_embeddings)

        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None:
            query, key = normed_runs(self.q_norm, query), normed_runs(self.k_norm, key)

        def heads(numbers: torch.Tensor, count: int) -> torch.Tensor:
            return numbers.unflatten(-1, (count, -1)).transpose(1, 2)

        query = rotate(heads(query, self.num_heads), cos, sin)
        key = rotate(heads(key, self.num_key_value_heads), cos, sin)
        value = heads(value, self.num_key_value_heads)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        readers = self.num_heads // self.num_key_value_heads
        key, value = (t.repeat_interleave(readers, dim=1) for t in (key, value))
        out = self.attend(query, key, value, attention_mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class RelatentDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RelatentConfig, layer_idx: int):
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        carried = config.carried_layer(layer_idx)
        kind = RelatentAttention if carried is None else RelatentGroupedQueryAttention
        self.self_attn = kind(config, layer_idx)
        self.mlp = (
            RelatentMoE(config)
            if config.has_experts(layer_idx)
            else RelatentMLP(config, config.intermediate_size)
        )
        before, behind = config.norm_placement != "behind", config.norm_placement != "before"
        self.input_layernorm = make_norm(config) if before else nn.Identity()
        self.post_attention_layernorm = make_norm(config) if before else nn.Identity()
        self.attention_output_layernorm = make_norm(config) if behind else nn.Identity()
        self.mlp_output_layernorm = make_norm(config) if behind else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Cache | None,
    ) -> torch.Tensor:
        added = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings,
            attention_mask=attention_mask,
            cache=kwargs.get(CACHE),
        )
        added = self.attention_output_layernorm(added)
        hidden_states = hidden_states + added * self.residual_multiplier
        added = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + self.mlp_output_layernorm(added) * self.residual_multiplier


class RelatentPreTrainedModel(PreTrainedModel):
    config_class = RelatentConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RelatentDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    # Rounded, it would send tokens to other experts.
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]


class RelatentModel(RelatentPreTrainedModel):
    def __init__(self, config: RelatentConfig):
        super().__init__(config)
        self.embed_tokens = RelatentEmbedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.embed_tokens.multiplier = config.embedding_multiplier
        self.layers = nn.ModuleList(
            RelatentDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config)
        longest = config.max_position_embeddings
        self.rotary_emb = RelatentRotaryEmbedding(
            config.rope_parameters, config.qk_rope_head_dim, longest
        )
        # Layers of latents have one size of rotary keys, the others one of heads.
        carried = next(filter(None, config.layers or []), None)
        of_latents = set(config.latent_rope_lists or [])
        self.rotary_embs = nn.ModuleList(
            RelatentRotaryEmbedding(
                rope,
                config.qk_rope_head_dim if index in of_latents else carried["head_dim"],
                longest,
            )
            for index, rope in enumerate(config.rope_lists)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        position_ids: torch.Tensor,
        cache: Cache | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of layers that see every position, and of those with a sliding window."""
        # generate() makes them itself for caches of a fixed size.
        if isinstance(attention_mask, dict):
            return attention_mask.get("full_attention"), attention_mask.get("sliding_attention")
        given = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
        }
        sliding = getattr(self.config, "sliding_window", None) is not None
        return (
            create_causal_mask(**given),
            create_sliding_window_causal_mask(**given) if sliding else None,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is None:
            cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (positions + seen)[None]

        full_mask, sliding_mask = self.masks(inputs_embeds, attention_mask, position_ids, cache)
        latent_positions = self.rotary_emb(position_ids)
        # Multiplied by 1 + 0i.
        unrotated = tuple(map(torch.full_like, latent_positions, (1.0, 0.0)))
        listed_positions = [rotary(position_ids) for rotary in self.rotary_embs]
        hidden_states = inputs_embeds
        all_hidden_states = [hidden_states]
        for layer_idx, layer in enumerate(self.layers):
            carried = self.config.carried_layer(layer_idx)
            sliding = carried is not None and carried["sliding_window"] is not None
            if carried is not None:
                positions = listed_positions[carried["rope_list"]]
            elif not self.config.rotates(layer_idx):
                positions = unrotated
            elif self.config.latent_rope_lists is not None:
                positions = listed_positions[self.config.latent_rope_lists[layer_idx]]
            else:
                positions = latent_positions
            hidden_states = layer(
                hidden_states,
                positions,
                attention_mask=sliding_mask if sliding else full_mask,
                **{CACHE: cache},
            )
            all_hidden_states.append(hidden_states)
        hidden_states = self.norm(hidden_states)
        all_hidden_states[-1] = hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            **{CACHE: cache},
        )


class RelatentForCausalLM(RelatentPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RelatentConfig):
        super().__init__(config)
        self.model = RelatentModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        # 0 keeps all positions, for -0 is 0.
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :]) / self.config.logits_scaling
        logits = capped(logits, self.config.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["RelatentForCausalLM", "RelatentModel", "RelatentPreTrainedModel"]
