"""Strict loading: every tensor of a checkpoint has a place, and every place gets its tensor."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

Index = tuple[slice, ...]
Loader = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Copy:
    """Copies part of a checkpoint tensor into part of a parameter."""

    parameter: nn.Parameter
    target: Index = ()
    source: Index = ()

    def __call__(self, tensor: torch.Tensor) -> None:
        self.parameter.data[self.target].copy_(tensor[self.source])


@dataclass(frozen=True)
class Place:
    """What a checkpoint must hold under one name, and what this device does with it."""

    shape: Sequence[int]
    loaders: Sequence[Loader] = ()

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) != tuple(self.shape):
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but the config asks for {list(self.shape)}"
            )
        for loader in self.loaders:
            loader(tensor)


def by_weight_loader(parameter: nn.Parameter, *shard: int) -> Loader:
    """Leaves the division between devices to the layer of vLLM that owns the parameter."""

    def load(tensor: torch.Tensor) -> None:
        parameter.weight_loader(parameter, tensor, *shard)

    return load


def with_prefix(prefix: str, places: dict[str, Place]) -> dict[str, Place]:
    return {f"{prefix}.{name}": place for name, place in places.items()}


def load_all(
    weights: Iterable[tuple[str, torch.Tensor]],
    places: dict[str, Place],
    elsewhere: Callable[[str], bool],
) -> None:
    """Puts every tensor in its place.

    Raises ValueError with the names of tensors that have no place, neither here nor `elsewhere`
    (on another pipeline stage), and of places that got no tensor.
    """
    missing = set(places)
    for name, tensor in weights:
        if name in places:
            places[name].load(name, tensor)
            missing.discard(name)
        elif not elsewhere(name):
            raise ValueError(f"the checkpoint holds {name}, which has no place in this model")
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(f"the checkpoint lacks {', '.join(names[:8])}{more}")
