"""MLPs: one, or a mixture of experts of which every token passes a few."""

import math

import torch
from torch import nn
from torch.nn import functional
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from .configuration import RelatentConfig
from .loading import Copy, Place, by_weight_loader, with_prefix


class RelatentMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), its inner numbers divided between devices."""

    def __init__(
        self, config: RelatentConfig, inner: int, prefix: str, reduce_results: bool = True
    ):
        super().__init__()
        self.hidden, self.inner = config.hidden_size, inner
        self.gate_up_proj = MergedColumnParallelLinear(
            self.hidden, [inner, inner], bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner,
            self.hidden,
            bias=False,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.activation(gate_up))
        return out

    def places(self) -> dict[str, Place]:
        up = (self.inner, self.hidden)
        gate_up, down = self.gate_up_proj.weight, self.down_proj.weight
        return {
            "gate_proj.weight": Place(up, [by_weight_loader(gate_up, 0)]),
            "up_proj.weight": Place(up, [by_weight_loader(gate_up, 1)]),
            "down_proj.weight": Place((self.hidden, self.inner), [by_weight_loader(down)]),
        }


class RelatentRouter(nn.Module):
    """Chooses the experts of every token, in float32."""

    def __init__(self, config: RelatentConfig):
        super().__init__()
        self.method = config.topk_method
        self.groups = config.n_group
        self.kept_groups = config.topk_group
        self.normalised = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        count = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size), requires_grad=False)
        if self.method == "noaux_tc":
            # Rounded, it would send tokens to other experts.
            self.e_score_correction_bias = nn.Parameter(
                torch.zeros(count, dtype=torch.float32), requires_grad=False
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> logits [tokens, experts]"""
        return functional.linear(x.float(), self.weight.float())

    def limit_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """Minus infinity for experts outside the best groups."""
        grouped = scores.unflatten(-1, (self.groups, -1))
        # With a bias the two best count, else the best.
        best = grouped.topk(2 if self.method == "noaux_tc" else 1, dim=-1).values.sum(-1)
        kept = best.topk(self.kept_groups, dim=-1, sorted=False).indices
        out = torch.zeros_like(best, dtype=torch.bool).scatter(-1, kept, True)
        return grouped.masked_fill(~out[..., None], -math.inf).flatten(-2)

    def choose(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [tokens, experts] -> weights and numbers of experts, [tokens, experts per token]

        The arguments are those by which vLLM calls a routing function.
        """
        logits = gating_output.float()
        if self.method == "noaux_tc":
            scores = logits.sigmoid()
            for_choice = scores + self.e_score_correction_bias
        else:
            scores = for_choice = logits.softmax(-1)
        if self.method != "greedy":
            for_choice = self.limit_groups(for_choice)
        chosen = for_choice.topk(topk, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def places(self) -> dict[str, Place]:
        out = {"weight": Place(self.weight.shape, [Copy(self.weight)])}
        if self.method == "noaux_tc":
            bias = self.e_score_correction_bias
            out["e_score_correction_bias"] = Place(bias.shape, [Copy(bias)])
        return out


class RelatentMoE(nn.Module):
    """Every token passes the shared experts, where there are some, and a few of the others."""

    def __init__(self, config: RelatentConfig, prefix: str):
        super().__init__()
        self.config = config
        inner = config.moe_intermediate_size
        self.gate = RelatentRouter(config)
        shared = config.shared_size()
        self.shared_experts = (
            RelatentMLP(config, shared, f"{prefix}.shared_experts") if shared else None
        )
        self.shared_expert_gate = (
            nn.Linear(config.hidden_size, 1, bias=False)
            if config.shared_expert_intermediate_size
            else None
        )
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=inner,
            custom_routing_function=self.gate.choose,
            router_logits_dtype=torch.float32,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden]"""
        out = self.experts(hidden_states=x, router_logits=self.gate(x))
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(x)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x).sigmoid() * shared
        return shared + out

    def places(self) -> dict[str, Place]:
        out = with_prefix("gate", self.gate.places())
        if self.shared_experts is not None:
            out |= with_prefix("shared_experts", self.shared_experts.places())
        if self.shared_expert_gate is not None:
            weight = self.shared_expert_gate.weight
            out["shared_expert_gate.weight"] = Place(weight.shape, [Copy(weight)])
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        routed = self.experts.routed_experts

        def expert_loader(parameter: nn.Parameter, expert: int, shard: str):
            def load(tensor: torch.Tensor) -> None:
                parameter.weight_loader(
                    parameter, tensor, "weight", shard_id=shard, expert_id=expert
                )

            return load

        for expert in range(self.config.n_routed_experts):
            for name, shape, parameter, shard in (
                ("gate_proj", (inner, hidden), routed.w13_weight, "w1"),
                ("up_proj", (inner, hidden), routed.w13_weight, "w3"),
                ("down_proj", (hidden, inner), routed.w2_weight, "w2"),
            ):
                loader = expert_loader(parameter, expert, shard)
                out[f"experts.{expert}.{name}.weight"] = Place(shape, [loader])
        return out
