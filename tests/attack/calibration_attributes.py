"""Damage to the attributes of a calibration file."""

import random
from typing import Any

import h5py
import numpy as np

from calibration_places import Edit, any_dataset, any_layer, any_owner

NAMES = {
    "/": (
        *("format", "format_version", "creator", "source_fingerprint", "source_config"),
        *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "compute"),
    ),
    "layer": ("tokens",),
    "dataset": ("checksum", "dimensions", "unit"),
}


def any_attribute(file: h5py.File, chance: random.Random) -> tuple[Any, str]:
    where = chance.choice(("/", "/", "layer", "dataset", "dataset"))
    path = {"/": "/", "layer": any_layer(chance), "dataset": any_dataset(chance)}[where]
    return file[path].attrs, chance.choice(NAMES[where])


def attribute_deleted(file: h5py.File, chance: random.Random) -> str:
    owner, name = any_attribute(file, chance)
    del owner[name]
    return f"without {name}"


def attribute_value(file: h5py.File, chance: random.Random) -> str:
    owner, name = any_attribute(file, chance)
    old = owner[name]
    if isinstance(old, (bytes, np.bytes_, str)):
        text = old.decode() if isinstance(old, bytes) else str(old)
        texts: tuple[str, ...] = (
            *("", text + "x", text[:-1], text.upper(), "\0" + text, text * 50, "float32"),
            *("bfloat16", "\n\n", "\x1b[2J", "0" * 32, "'; DROP", "ä" * 9, "a" * 40_000),
        )
        new = chance.choice(texts)
        owner.create(name, np.bytes_(new.encode()), dtype=f"S{max(1, len(new.encode()))}")
    elif np.ndim(old) == 0:
        values = (0, -1, 1, 2, 3, 7, old + 1, old - 1, old * 2, 2**31, 2**62, -(2**63), 2**63 - 1)
        owner.create(name, np.int64(chance.choice([int(v) for v in values])))
    else:
        owner.create(name, np.array([b"other"] * chance.choice((1, 2, 5))))
    return f"another {name}"


def attribute_type(file: h5py.File, chance: random.Random) -> str:
    owner, name = any_attribute(file, chance)
    value = owner[name]
    whole = isinstance(value, np.integer)
    others: tuple[Any, ...] = (
        np.float64(1.5),
        np.float64("nan"),
        np.int8(3),
        np.array([1, 2, 3]),
        np.array([], dtype=np.int64),
        h5py.Empty("f"),
        "text of variable length",
        np.bytes_(b"3"),
        np.uint64(2**64 - 1),
        np.int64(5),
        np.array(value)[None] if np.ndim(value) == 0 else value[:1],
        np.array(value).astype(">i8" if whole else "S64"),
        np.array(value).astype("<i2" if whole else "S3"),
        np.complex128(1),
        np.bool_(True),
    )
    other = chance.choice(others)
    del owner[name]
    owner[name] = other
    return f"another type of {name}"


def attributes_more(file: h5py.File, chance: random.Random) -> str:
    owner = file[any_owner(chance)].attrs
    for i in range(chance.choice((1, 20))):
        owner[f"more{i}"] = chance.choice((1.5, "text", np.arange(4)))
    return "more attributes"


def attributes_swapped(file: h5py.File, chance: random.Random) -> str:
    """Checksums of two datasets in each other's place."""
    a, b = any_dataset(chance), any_dataset(chance)
    one, other = file[a].attrs["checksum"], file[b].attrs["checksum"]
    file[a].attrs["checksum"], file[b].attrs["checksum"] = other, one
    return "checksums swapped"


ATTRIBUTES: tuple[Edit, ...] = (
    *(attribute_deleted, attribute_value, attribute_value, attribute_type),
    *(attributes_more, attributes_swapped),
)
