"""Decoders with latent attention, as transformers loads them: the cache holds latents that every
head reads its own way (attention_relatent.py)."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention_relatent import RelatentAttention, RelatentGroupedQueryAttention
from .configuration_relatent import RelatentConfig
from .layers_relatent import (
    RelatentEmbedding,
    RelatentMLP,
    RelatentMoE,
    RelatentRotaryEmbedding,
    capped,
    make_norm,
)

# Newer versions of transformers call the cache among arguments and outputs `cache`.
CACHE = (
    "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
)


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
