"""Models with mixtures of experts, of random weights: no small published ones exist.

Sizes are multiples of 32, as vLLM's kernel for experts on CPUs wants them.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 4096,  # that of the tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 2048,
}
DEEPSEEK = {
    **COMMON,
    "moe_intermediate_size": 64,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
}
GROUPED = {"n_group": 4, "topk_group": 2}
QWEN = {
    **COMMON,
    "num_key_value_heads": 2,
    "num_experts": 12,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [1],
}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (
        "deepseek_v2",
        {**DEEPSEEK, "topk_method": "greedy", "routed_scaling_factor": 1.7},
    ),
    "group_limited_greedy": (
        "deepseek_v2",
        {
            **DEEPSEEK,
            **GROUPED,
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 0,
        },
    ),
    "noaux_tc": ("deepseek_v3", {**DEEPSEEK, **GROUPED, "q_lora_rank": 22}),
    "mixtral": (
        "mixtral",
        {**COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "num_local_experts": 8},
    ),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "norm_topk_prob": False}),
    "qwen2_moe, normalised": ("qwen2_moe", {**QWEN, "norm_topk_prob": True}),
}


@torch.no_grad()
def write_experts(folder: Path, model_type: str, changes: dict[str, Any]) -> Path:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))
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
