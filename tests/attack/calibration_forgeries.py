"""Forged calibration files: other numbers or tokens, with the checksums that belong to them."""

import random
from collections.abc import Callable

import h5py
import numpy as np

import harness
from calibration_numbers import change_numbers
from calibration_places import MOMENTS, Edit, any_dataset, any_layer, generator, replaced
from harness import HEADS, HIDDEN, LAYERS


def stamped(file: h5py.File, name: str) -> None:
    """The checksum that belongs to the numbers."""
    text = harness.xxh3(np.ascontiguousarray(file[name][...]).tobytes())
    file[name].attrs.create("checksum", np.bytes_(text.encode()), dtype="S32")


def bound(file: h5py.File) -> None:
    """The checksum of the whole that belongs to the checksums of its parts."""
    parts = bytearray()

    def add_text(text: bytes) -> None:
        parts.extend(len(text).to_bytes(8, "little") + text)

    for name in ("source_fingerprint", "source_config", "model_type", "compute"):
        add_text(bytes(file.attrs[name]))
    for name in (
        *("hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim"),
    ):
        parts.extend(int(file.attrs[name]).to_bytes(8, "little"))
    add_text(bytes(file["/tokens"].attrs["checksum"]))
    for i in range(LAYERS):
        layer = file[f"/layers/{i:05}"]
        parts.extend(int(layer.attrs["tokens"]).to_bytes(8, "little"))
        for kind in MOMENTS:
            add_text(bytes(layer[kind].attrs["checksum"]))
    file.attrs.create("checksum", np.bytes_(harness.xxh3(bytes(parts)).encode()), dtype="S32")


def forged_moments(file: h5py.File, chance: random.Random) -> str:
    """A moment and a mean that could be those of some tokens, and need not be sound."""
    layer = any_layer(chance)
    which = chance.choice(("", "received_"))
    second = file[f"{layer}/{which or 'second_'}moment"]
    mean = file[f"{layer}/{which}mean"]
    way = chance.choice(
        ("large", "small", "rank 1", "zero", "dead inputs", "point masses", "effects")
    )
    if way in ("large", "small"):
        factor = 10.0 ** chance.uniform(1, 30) if way == "large" else 10.0 ** -chance.uniform(1, 30)
        second[...] = second[...] * factor**2
        mean[...] = mean[...] * factor
    elif way == "rank 1":
        direction = generator(chance).normal(size=HIDDEN)
        product = np.outer(direction, direction)
        second[...] = (product + product.T) / 2
        mean[...] = 0
    elif way == "zero":
        second[...] = 0
        mean[...] = 0
    elif way == "dead inputs":
        dead = chance.sample(range(HIDDEN), chance.randrange(1, HIDDEN))
        values, means = second[...], mean[...]
        values[dead] = 0
        values[:, dead] = 0
        means[dead] = 0
        second[...], mean[...] = values, means
    mass = file[f"{layer}/distance_mass"]
    if way == "point masses":
        point = np.zeros(mass.shape)
        point[:, chance.randrange(mass.shape[1])] = 1
        mass[...] = point
    if way == "effects":
        effect = file[f"{layer}/score_effect"]
        effect[...] = chance.choice((0.0, 1e-30, 1e30)) * np.ones(effect.shape)
        file[f"{layer}/mass_square"][...] = 10.0 ** -chance.uniform(0, 30)
    for name in MOMENTS:
        stamped(file, f"{layer}/{name}")
    bound(file)
    return f"moments: {way}"


def forged_numbers(file: h5py.File, chance: random.Random) -> str:
    name = any_dataset(chance)
    what = change_numbers(file, name, chance)
    stamped(file, name)
    bound(file)
    return f"numbers: {what}"


def forged_tokens(file: h5py.File, chance: random.Random) -> str:
    """Other sequences, or as many of another length, with masses that do not fit them."""
    tokens = file["/tokens"][...]
    count, length = tokens.shape
    ways: dict[str, Callable[[], np.ndarray]] = {
        "fewer": lambda: tokens[: chance.randrange(1, count)],
        "one": lambda: tokens[:1],
        "shorter": lambda: tokens[:, : chance.randrange(1, length)].copy(),
        "repeated": lambda: np.concatenate([tokens] * 3),
        "all alike": lambda: np.full_like(tokens, chance.randrange(harness.VOCABULARY)),
        "turned": lambda: tokens.T.copy(),
        "outside": lambda: np.full_like(tokens, harness.VOCABULARY),
        "length 1": lambda: tokens.reshape(-1, 1).copy(),
    }
    way = chance.choice(tuple(ways))
    replaced(file, "/tokens", ways[way]())
    stamped(file, "/tokens")
    if chance.random() < 0.7:
        wanted = file["/tokens"].shape[1]
        for layer in range(LAYERS):
            name = f"/layers/{layer:05}/distance_mass"
            replaced(file, name, np.full((HEADS, wanted), 1 / wanted))
            stamped(file, name)
    bound(file)
    return f"tokens: {way}"


FORGERIES: tuple[Edit, ...] = (forged_moments, forged_numbers, forged_tokens)
