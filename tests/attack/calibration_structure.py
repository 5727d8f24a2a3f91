"""Damage to the structure of a calibration file: its groups, datasets and links."""

import random
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

from calibration_places import MOMENTS, Edit, any_dataset, any_layer, generator, replaced
from harness import LAYERS


def rename(file: h5py.File, chance: random.Random) -> str:
    name = chance.choice((any_dataset(chance), any_layer(chance), "/layers", "/tokens"))
    to = chance.choice((name + "x", name[:-1], "/other", name.upper(), "/layers/00003"))
    if to == "/" or to == name or to in file:
        to = "/elsewhere"
    file.move(name, to)
    return "rename"


def delete(file: h5py.File, chance: random.Random) -> str:
    del file[chance.choice((any_dataset(chance), any_layer(chance), "/layers", "/tokens"))]
    return "delete"


def retype(file: h5py.File, chance: random.Random) -> str:
    name = any_dataset(chance)
    kind = chance.choice(("<f4", ">f8", "<f8", ">i4", "<i8", "<i4", "<u4", "<f2", "<c16", "S8"))
    with np.errstate(over="ignore"):
        replaced(file, name, file[name][...].astype(kind))
    return f"type {kind}"


def reshape(file: h5py.File, chance: random.Random) -> str:
    name = any_dataset(chance)
    values = file[name][...]
    ways: dict[str, Callable[[], np.ndarray]] = {
        "flat": lambda: values.reshape(-1),
        "one more dimension": lambda: values[None],
        "transposed": lambda: values.T.copy(),
        "fewer": lambda: values[: max(1, len(values) - chance.randrange(1, 4))],
        "more": lambda: np.concatenate([values, values[: chance.randrange(1, 4)]]),
        "none": lambda: values[:0],
        "narrower": lambda: values[..., :-1].copy(),
        "a scalar": lambda: values.reshape(-1)[0],
        "many dimensions": lambda: values.reshape(-1, *([1] * 30)),
    }
    way = chance.choice(tuple(ways))
    replaced(file, name, ways[way]())
    return way


def store_otherwise(file: h5py.File, chance: random.Random) -> str:
    name = any_dataset(chance)
    values = file[name][...]
    ways: dict[str, dict[str, Any]] = {
        "chunked": {"chunks": True},
        "compressed": {"compression": "gzip"},
        "shuffled bytes": {"chunks": True, "shuffle": True},
        "with fletcher32": {"chunks": True, "fletcher32": True},
        "resizable": {"maxshape": (None,) * values.ndim, "chunks": True},
        "filled": {"fillvalue": values.dtype.type(3)},
        "just so": {},
    }
    way = chance.choice(tuple(ways))
    replaced(file, name, values, **ways[way])
    return way


def declare(file: h5py.File, chance: random.Random) -> str:
    """A dataset of which nothing or too little is stored."""
    name = any_dataset(chance)
    shape = file[name].shape
    huge = chance.choice((2**20, 2**31, 2**40))
    wanted = chance.choice((shape, (huge,), (huge, huge), (huge, 1)))
    kind = file[name].dtype
    attributes = dict(file[name].attrs)
    del file[name]
    if chance.random() < 0.5:
        space = h5py.h5s.create_simple(wanted)
        kinds = h5py.h5t.py_create(kind)
        h5py.h5d.create(file.id, name.encode(), kinds, space)  # contiguous, allocated late
    else:
        chunks = tuple(min(n, 16) for n in wanted)
        file.create_dataset(name, shape=wanted, dtype=kind, chunks=chunks)
    for key, value in attributes.items():
        file[name].attrs[key] = value
    return "declared only"


def link(file: h5py.File, chance: random.Random) -> str:
    name = any_dataset(chance)
    other = chance.choice((any_dataset(chance), name, "/nowhere", "/"))
    kind = chance.choice(("soft", "external", "itself", "device"))
    del file[name]
    if kind == "soft":
        file[name] = h5py.SoftLink(other)
    elif kind == "itself":
        file[name] = h5py.ExternalLink(file.filename, other)
    elif kind == "device":
        file[name] = h5py.ExternalLink("/dev/zero", other)
    else:
        file[name] = h5py.ExternalLink("moments.h5", other)
    return f"{kind} link"


def store_outside(file: h5py.File, chance: random.Random) -> str:
    name = any_dataset(chance)
    values = file[name][...]
    attributes = dict(file[name].attrs)
    outside = chance.choice(("/dev/zero", "/etc/passwd", file.filename))
    del file[name]
    space = h5py.h5s.create_simple(values.shape)
    how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    how.set_external(outside.encode(), 0, values.nbytes)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(values.dtype), space, how)
    for key, value in attributes.items():
        file[name].attrs[key] = value
    return "stored outside"


def group_or_dataset(file: h5py.File, chance: random.Random) -> str:
    """One where the other is expected."""
    name = chance.choice((any_dataset(chance), any_layer(chance), "/layers", "/tokens"))
    is_group = isinstance(file[name], h5py.Group)
    del file[name]
    if is_group:
        file[name] = np.zeros(3)
    elif chance.random() < 0.5:
        file.create_group(name)
    else:
        file[name] = np.dtype("<f8")
    return "another kind of object"


def add(file: h5py.File, chance: random.Random) -> str:
    """What is not looked at: the output stays the same."""
    root = chance.choice(("/", "/layers/", any_layer(chance) + "/"))
    way = chance.randrange(3)
    if way == 0:
        file[root + "more"] = generator(chance).normal(size=20)
    elif way == 1:
        for i in range(chance.choice((1, 40))):
            file.create_group(f"{root}more{i}")
    else:
        file[root + "loop"] = h5py.SoftLink("/")
    return "something more"


def layers_swapped(file: h5py.File, chance: random.Random) -> str:
    """Whole layers, or datasets, in each other's place: every checksum still fits its numbers."""
    a, b = (f"/layers/{i:05}" for i in chance.sample(range(LAYERS), 2))
    if chance.random() < 0.5:
        kind = chance.choice(MOMENTS)
        a, b = f"{a}/{kind}", f"{b}/{kind}"
    file.move(a, "/aside")
    file.move(b, a)
    file.move("/aside", b)
    return "layers swapped"


def shared_object(file: h5py.File, chance: random.Random) -> str:
    """A second name for another layer's numbers."""
    kind = chance.choice(MOMENTS)
    a, b = (f"/layers/{i:05}/{kind}" for i in chance.sample(range(LAYERS), 2))
    del file[a]
    file[a] = file[b]
    return "one object for two layers"


STRUCTURE: tuple[Edit, ...] = (
    *(rename, delete, retype, reshape, store_otherwise, declare, link, store_outside),
    *(group_or_dataset, add, layers_swapped, shared_object),
)
