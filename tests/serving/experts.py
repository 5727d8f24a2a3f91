"""DeepSeek models with mixtures of experts, of random weights: no small published ones exist.

Sizes are multiples of 32, as vLLM's kernel for experts on CPUs wants them.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

COMMON = {
    "vocab_size": 4096,  # that of the tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
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
GROUPED = {"n_group": 4, "topk_group": 2}
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (2, {"topk_method": "greedy", "routed_scaling_factor": 1.7}),
    "group_limited_greedy": (
        2,
        {**GROUPED, "topk_method": "group_limited_greedy", "first_k_dense_replace": 0},
    ),
    "noaux_tc": (3, {**GROUPED, "q_lora_rank": 22}),
}


@torch.no_grad()
def write_experts(folder: Path, version: int, changes: dict[str, Any]) -> Path:
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
        elif "inv_freq" not in name:
            weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder
