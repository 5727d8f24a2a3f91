"""--method transmla against the published method written down a second time, on PyTorch.

RoRoPE with FreqFold and balanced key-value PCA (Meng et al. 2025, arXiv 2502.07864, sections 4.2 and 4.3), and
what the authors' code adds: the latent comes from a second calibration, of the model whose layers have the
rotary key; the mean norm of the values leaves out the first coordinates, as many as the rotary key has.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import support

CALIBRATION = (8, 256)  # of conftest.Workbench


@dataclass
class Key:
    """Rows of an orthogonal matrix: the rotary key, half-split, and what loses its rotation."""

    read: torch.Tensor  # [p, K d]
    left: torch.Tensor  # [K d - p, K d]
    frequencies: torch.Tensor  # [p / 2]


def rotary_key(keys: torch.Tensor, heads: int, rope_dim: int, fold: int, theta: float) -> Key:
    """keys [tokens, K d], not rotated."""
    size = keys.shape[1] // heads
    half, collapse = size // 2, size // rope_dim
    by_half = keys.view(-1, heads, 2, half)
    rows: dict[str, list[torch.Tensor]] = {"real": [], "imaginary": [], "left": []}
    frequencies = []
    for first in range(0, half, fold):
        pairs = by_half[..., first : first + fold].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        vectors = torch.linalg.eigh(pairs.T @ pairs).eigenvectors.flip(1)
        for index, vector in enumerate(vectors.T):
            row = torch.zeros(2, 2, heads, half, dtype=keys.dtype)
            for part in (0, 1):
                row[part, part, :, first : first + fold] = vector.view(heads, fold)
            # Heads, then halves: as the keys are stacked.
            real, imaginary = row.transpose(1, 2).flatten(1)
            if index < fold // collapse:
                rows["real"].append(real)
                rows["imaginary"].append(imaginary)
                kept = len(frequencies) * collapse
                frequencies.append(theta ** (-2 * kept / size))
            else:
                rows["left"] += [real, imaginary]
    read = torch.stack(rows["real"] + rows["imaginary"])
    return Key(read, torch.stack(rows["left"]), torch.tensor(frequencies, dtype=keys.dtype))


def turned(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """[..., positions, p], pairs (i, i + p / 2)"""
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Published(nn.Module):
    """Attention with such a key; what is left of keys, and values, go through `project` if there is one."""

    def __init__(self, attention: nn.Module, config: Any, key: Key):
        super().__init__()
        self.attention, self.key = attention, key
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.ratio = 1.0
        self.basis: torch.Tensor | None = None
        self.seen: list[torch.Tensor] = []

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        count, length, _ = hidden_states.shape
        keys = self.attention.k_proj(hidden_states)
        joint = torch.cat((keys @ self.key.left.T, self.attention.v_proj(hidden_states)), -1)
        self.seen.append(joint.flatten(0, 1))
        if self.basis is not None:
            scale = torch.ones(joint.shape[-1], dtype=joint.dtype)
            scale[: len(self.key.left)] = self.ratio
            joint = (joint / scale) @ self.basis @ self.basis.T * scale
        left, values = joint.split([len(self.key.left), keys.shape[-1]], -1)
        rotary = turned(keys @ self.key.read.T, self.key.frequencies)
        size = keys.shape[-1] // self.groups
        queries = self.attention.q_proj(hidden_states).view(count, length, self.heads, size)
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs = []
        for head in range(self.heads):
            group = slice(head * self.groups // self.heads * size, None)
            group = slice(group.start, group.start + size)
            query = queries[:, :, head]
            scores = turned(query @ self.key.read[:, group].T, self.key.frequencies) @ rotary.mT
            scores = (scores + query @ self.key.left[:, group].T @ left.mT) * size**-0.5
            outputs.append(scores.masked_fill(mask, -torch.inf).softmax(-1) @ values[..., group])
        return self.attention.o_proj(torch.cat(outputs, -1)), None

    def compress(self, rank: int) -> None:
        joint = torch.cat(self.seen)
        keys = len(self.key.left)
        norms = joint.norm(dim=0)
        self.ratio = float(norms[:keys].mean() / norms[keys + len(self.key.read) :].mean())
        joint[:, :keys] /= self.ratio
        self.basis = torch.linalg.eigh(joint.T @ joint).eigenvectors[:, -rank:]


def published(source: Path, rope_dim: int, rank: int, fold: int) -> torch.nn.Module:
    model = support.load(source, torch.float64)
    config = model.config
    tokens = np.load(support.CALIBRATION_TOKENS)[: CALIBRATION[0] * CALIBRATION[1]]
    ids = torch.from_numpy(tokens.astype(np.int64)).view(CALIBRATION)
    keys: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _m, _i, out: keys.append(out))
    with torch.no_grad():
        model(ids, use_cache=False)
        for layer, found in zip(model.model.layers, list(keys), strict=True):
            key = rotary_key(
                found.flatten(0, 1),
                config.num_key_value_heads,
                rope_dim,
                fold,
                config.rope_parameters["rope_theta"],
            )
            layer.self_attn = Published(layer.self_attn, config, key)
        model(ids, use_cache=False)
        for layer in model.model.layers:
            layer.self_attn.compress(rank)
    return model


@pytest.mark.parametrize(("rope_dim", "rank", "fold"), [(32, 96, 1), (32, 32, 4), (16, 48, 2)])
def test_is_the_published_method(bench, llama: Path, rope_dim: int, rank: int, fold: int) -> None:
    sizes = ("--rope-dim", rope_dim, "--rank", rank, "--fold", fold, "--dtype", "float32")
    folder = bench.convert(llama, "transmla", *sizes)
    ids = support.validation_ids()
    with torch.no_grad():
        expected = published(llama, rope_dim, rank, fold)(ids, use_cache=False).logits
    error = support.relative_error(support.logits_of(support.load(folder), ids), expected)
    print(f"relative logit error: {error:.2e}")
    assert error <= 1e-3
