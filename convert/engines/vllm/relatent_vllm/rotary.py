"""Rotation by explicit frequencies, in float32 whatever the type of the model."""

import math
from typing import Any

import torch
from torch import nn

from .configuration import RelatentConfig


def rope_frequencies(config: RelatentConfig, rope: dict[str, Any]) -> tuple[list[float], float]:
    """Angle per position of every rotary pair, and the factor on cosines and sines."""
    size = config.qk_rope_head_dim
    # Models are put together on other devices, where the arithmetic may differ.
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    periods = rope["rope_theta"] ** exponents
    if rope["rope_type"] == "default":
        return (1.0 / periods).tolist(), 1.0
    stretch = torch.tensor(rope["short_factor"], dtype=torch.float32, device="cpu")
    factor = rope.get("attention_factor")
    if factor is None:
        original = rope["original_max_position_embeddings"]
        longer = rope.get("factor") or config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
    return (1.0 / (stretch * periods)).tolist(), factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (i, i + p / 2) of the last dimension; in float32, returned as x's type.

    x [..., p], cos and sin broadcast to [..., p / 2] -> [..., p]
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class RelatentRotaryEmbedding(nn.Module):
    """Cosines and sines of positions, by one list of frequencies."""

    def __init__(self, config: RelatentConfig, rope: dict[str, Any]):
        super().__init__()
        frequencies, self.factor = rope_frequencies(config, rope)
        self.register_buffer(
            "frequencies", torch.tensor(frequencies, dtype=torch.float32), persistent=False
        )

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens] -> twice [tokens, p / 2]"""
        angles = positions[:, None].float() * self.frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor
