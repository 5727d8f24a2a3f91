"""Damage to the numbers of a calibration file, under their checksums."""

import random
from typing import Any

import h5py
import numpy as np

import harness
from calibration_places import MOMENTS, any_dataset, generator
from harness import LAYERS


def zeroed(values: np.ndarray, chance: random.Random) -> None:
    values[...] = 0


def negated(values: np.ndarray, chance: random.Random) -> None:
    values *= -1


def asymmetric(values: np.ndarray, chance: random.Random) -> None:
    where = tuple(chance.randrange(n) for n in values.shape)
    values[where] += values.dtype.type(chance.choice((1, 2)))


def barely(values: np.ndarray, chance: random.Random) -> None:
    """The last bit of one number."""
    flat = values.reshape(-1).view(np.uint32 if values.itemsize == 4 else np.uint64)
    flat[chance.randrange(flat.size)] ^= 1


def scaled(values: np.ndarray, chance: random.Random) -> None:
    factor = chance.choice((1e30, 1e-30, 1e300, 1e-300, 2.0, 0.5, 1 + 1e-9))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        values[...] = (values.astype(np.float64) * factor).astype(values.dtype)


def special(values: np.ndarray, chance: random.Random) -> None:
    what: tuple[Any, ...] = (np.nan, np.inf, -np.inf, 5e-324, np.finfo(np.float64).max)
    if values.dtype.kind == "i":
        what = (-1, np.iinfo(np.int32).max, np.iinfo(np.int32).min, harness.VOCABULARY)
    for _ in range(chance.choice((1, 1, 5, values.size))):
        values.reshape(-1)[chance.randrange(values.size)] = chance.choice(what)


def block(values: np.ndarray, chance: random.Random) -> None:
    flat = values.reshape(-1)
    begin = chance.randrange(flat.size)
    part = flat[begin : begin + chance.choice((1, 8, 64, flat.size))]
    raw = generator(chance).integers(0, 256, part.nbytes, dtype=np.uint8)
    part[...] = raw.view(values.dtype)


def shuffled(values: np.ndarray, chance: random.Random) -> None:
    generator(chance).shuffle(values)


def tied(values: np.ndarray, chance: random.Random) -> None:
    """One direction only: a matrix of rank 1, a vector and a distribution of one value."""
    values[...] = np.broadcast_to(values.reshape(-1)[:1], values.shape)


NUMBERS = (zeroed, negated, asymmetric, barely, scaled, special, block, shuffled, tied)


def change_numbers(file: h5py.File, name: str, chance: random.Random) -> str:
    change = chance.choice(NUMBERS)
    values = file[name][...]
    change(values, chance)
    file[name][...] = values
    return change.__name__


def numbers(file: h5py.File, chance: random.Random) -> str:
    return change_numbers(file, any_dataset(chance), chance)


def numbers_of_others(file: h5py.File, chance: random.Random) -> str:
    """Two datasets of one shape change their contents, but not their checksums."""
    kind = chance.choice(MOMENTS)
    a, b = (f"/layers/{i:05}/{kind}" for i in chance.sample(range(LAYERS), 2))
    file[a][...], file[b][...] = file[b][...], file[a][...]
    return "swapped numbers"
