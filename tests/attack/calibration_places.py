"""Where a calibration file can be damaged, and what an edit of one is."""

import random
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from harness import LAYERS

MOMENTS = (
    *("second_moment", "mean", "received_moment", "received_mean"),
    *("distance_mass", "mass_square", "score_effect"),
)
Edit = Callable[[h5py.File, random.Random], str]


def any_layer(chance: random.Random) -> str:
    return f"/layers/{chance.randrange(LAYERS):05}"


def any_dataset(chance: random.Random, tokens: bool = True) -> str:
    if tokens and chance.random() < 0.15:
        return "/tokens"
    return f"{any_layer(chance)}/{chance.choice(MOMENTS)}"


def any_owner(chance: random.Random) -> str:
    return chance.choice(("/", "/", "/layers", any_layer(chance), any_dataset(chance)))


def generator(chance: random.Random) -> np.random.Generator:
    return np.random.default_rng(chance.getrandbits(64))


def replaced(file: h5py.File, name: str, values: Any, **how: Any) -> None:
    """Another dataset under the name, with the attributes of the old one."""
    attributes = dict(file[name].attrs)
    del file[name]
    made = file.create_dataset(name, data=values, **how)
    for key, value in attributes.items():
        made.attrs[key] = value
