"""The decoder as vLLM runs it: tensor and pipeline parallel."""

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from .attention import RelatentAttention
from .configuration import RelatentConfig, check_layout
from .experts import RelatentMLP, RelatentMoE
from .loading import Copy, Place, by_weight_loader, load_all, with_prefix
from .rotary import RelatentRotaryEmbedding


class RelatentDecoderLayer(nn.Module):
    def __init__(self, config: RelatentConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = RelatentAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = (
            RelatentMoE(config, f"{prefix}.mlp")
            if config.has_experts(extract_layer_index(prefix))
            else RelatentMLP(config, config.intermediate_size, f"{prefix}.mlp")
        )
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer adds to the residual stream, and the stream before that.

        All [tokens, hidden], but cos and sin [tokens, p / 2].
        """
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(hidden_states, cos, sin)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual

    def places(self) -> dict[str, Place]:
        out = with_prefix("self_attn", self.self_attn.places())
        out |= with_prefix("mlp", self.mlp.places())
        for name in ("input_layernorm", "post_attention_layernorm"):
            weight = getattr(self, name).weight
            out[f"{name}.weight"] = Place(weight.shape, [Copy(weight)])
        return out


@support_torch_compile
class RelatentModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        group = get_pp_group()
        self.embed_tokens = (
            VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
            if group.is_first_rank or (config.tie_word_embeddings and group.is_last_rank)
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: RelatentDecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if group.is_last_rank
            else PPMissingLayer()
        )
        # One list of frequencies for all layers, or one for each of them.
        named = config.latent_rope_lists
        lists = [config.rope_parameters] if named is None else config.rope_lists
        self.rotary_embs = nn.ModuleList(RelatentRotaryEmbedding(config, rope) for rope in lists)
        self.list_of_layer = [0] * config.num_hidden_layers if named is None else named
        self.lists_here = sorted(set(self.list_of_layer[self.start_layer : self.end_layer]))
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]"""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """[tokens] -> [tokens, hidden], or what the next pipeline stage goes on with"""
        if get_pp_group().is_first_rank:
            hidden_states = (
                self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            )
            residual = None
        else:
            hidden_states = intermediate_tensors["hidden_states"]
            residual = intermediate_tensors["residual"]
        turns = {index: self.rotary_embs[index](positions) for index in self.lists_here}
        lists = islice(self.list_of_layer, self.start_layer, self.end_layer)
        for layer, index in zip(islice(self.layers, self.start_layer, self.end_layer), lists):
            hidden_states, residual = layer(hidden_states, residual, *turns[index])
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states

    def places(self) -> dict[str, Place]:
        config = self.config
        out: dict[str, Place] = {}
        if not isinstance(self.embed_tokens, PPMissingLayer):
            shape = (config.vocab_size, config.hidden_size)
            out["embed_tokens.weight"] = Place(shape, [by_weight_loader(self.embed_tokens.weight)])
        if not isinstance(self.norm, PPMissingLayer):
            out["norm.weight"] = Place((config.hidden_size,), [Copy(self.norm.weight)])
        for index in range(self.start_layer, self.end_layer):
            out |= with_prefix(f"layers.{index}", self.layers[index].places())
        return out


class RelatentForCausalLM(nn.Module, SupportsPP):
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "gate_up_proj": ["gate_proj", "up_proj"]
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        check_layout(config)
        if vllm_config.quant_config is not None:
            raise ValueError(
                f"quantization {vllm_config.quant_config.get_name()!r} was asked for, and relatent "
                "folders are served with unquantised weights only"
            )
        self.config = config
        self.model = RelatentModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]"""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """[tokens] -> [tokens, hidden], or what the next pipeline stage goes on with"""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[tokens, hidden] -> [tokens, vocabulary]"""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fills every parameter, strictly; the names of those filled."""
        places = with_prefix("model", self.model.places())
        has_head = not isinstance(self.lm_head, PPMissingLayer)
        if has_head and not self.config.tie_word_embeddings:
            shape = (self.config.vocab_size, self.config.hidden_size)
            places["lm_head.weight"] = Place(shape, [by_weight_loader(self.lm_head.weight)])
        load_all(weights, places, self._is_elsewhere)
        return {name for name, _ in self.named_parameters()}

    def _is_elsewhere(self, name: str) -> bool:
        """Whether another pipeline stage holds a tensor, or the embedding stands for it."""
        if name == "lm_head.weight":
            return self.config.tie_word_embeddings or isinstance(self.lm_head, PPMissingLayer)
        if name == "model.embed_tokens.weight":
            return isinstance(self.model.embed_tokens, PPMissingLayer)
        if name == "model.norm.weight":
            return isinstance(self.model.norm, PPMissingLayer)
        parts = name.split(".")
        if parts[:2] != ["model", "layers"] or not parts[2].isdecimal():
            return False
        layer = int(parts[2])
        here = range(self.model.start_layer, self.model.end_layer)
        return layer < self.config.num_hidden_layers and layer not in here
