"""Damages calibration files in every way and converts with them.

    tests/attack/mutate_calibration.py               # a minute
    tests/attack/mutate_calibration.py --count 5000
    tests/attack/mutate_calibration.py --case 1234   # one of them again

`convert --calibration` must refuse a file that is not what `calibrate` wrote (exit 3 and a sentence
that names it), or write the bytes that it writes from the undamaged one, where the damage is in a
place that means nothing. Never may it die, hang, blame itself or write something else.

The kinds are numbers that are changed under their checksum, the structure of the file, its
attributes, its raw bytes, and forgeries. A forgery has checksums that are right, so it may be taken for
another calibration: then the output must have finite numbers.
"""

import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import harness
from harness import HEADS, HIDDEN, INPUT, LAYERS, Outcome, Table, Tiny

MOMENTS = (
    *("second_moment", "mean", "received_moment", "received_mean"),
    *("distance_mass", "mass_square", "score_effect"),
)
Edit = Callable[[h5py.File, random.Random], str]

# A file must not make the program ask for more than its own few kB would excuse.
MOST_MEMORY = 4 << 30
TIMEOUT = 30

MODES: dict[str, tuple[Any, ...]] = {
    "fits": (),
    "closed": ("--no-query-fit", "--no-key-fit", "--no-refit"),
    "transmla": ("--method", "transmla", "--fold", 2),
}


def modes(tiny: Tiny, calibration: Path, mode: str, out: Path) -> tuple[Any, ...]:
    sizes = tiny.convert(out, "--calibration", calibration)
    if mode == "transmla":
        return (*sizes, *MODES[mode])
    return (*sizes, "--fit-rounds", 1, "--fit-stride", 4, *MODES[mode])


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


# Numbers


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


# Structure


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


def replaced(file: h5py.File, name: str, values: Any, **how: Any) -> None:
    """Another dataset under the name, with the attributes of the old one."""
    attributes = dict(file[name].attrs)
    del file[name]
    made = file.create_dataset(name, data=values, **how)
    for key, value in attributes.items():
        made.attrs[key] = value


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

# Attributes

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

# Forgeries


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

# Raw bytes


def raw(whole: bytes, other: bytes, chance: random.Random) -> tuple[bytes, str]:
    data = bytearray(whole)
    size = len(data)
    at = chance.randrange(size)
    # Most of the file is numbers; what HDF5 keeps about them is of more interest.
    if chance.random() < 0.5:
        at = chance.randrange(min(size, 4096))
    way = chance.choice(
        (
            *("bit", "bit", "bits", "byte", "zeros", "ones", "noise", "cut", "longer", "moved"),
            *("missing", "inserted", "spliced", "user block", "number"),
        )
    )
    length = chance.choice((1, 2, 4, 8, 16, 64, 512, 4096))
    if way == "bit":
        data[at] ^= 1 << chance.randrange(8)
    elif way == "bits":
        for _ in range(chance.randrange(2, 64)):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif way == "byte":
        data[at] = chance.randrange(256)
    elif way == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif way == "ones":
        data[at : at + length] = b"\xff" * len(data[at : at + length])
    elif way == "noise":
        data[at : at + length] = chance.randbytes(len(data[at : at + length]))
    elif way == "cut":
        del data[at:]
    elif way == "longer":
        data += chance.choice((bytes(length), chance.randbytes(length), whole))
    elif way == "moved":
        to = chance.randrange(size)
        piece = data[at : at + length]
        data[to : to + len(piece)] = piece
    elif way == "missing":
        del data[at : at + length]
    elif way == "inserted":
        data[at:at] = chance.randbytes(length)
    elif way == "spliced":
        # Something of both: a whole other file is a calibration like any.
        while whole[:at] == other[:at] or whole[at:] == other[at:]:
            at = chance.randrange(size)
        data[at:] = other[at:]
    elif way == "user block":
        data[:0] = chance.choice((bytes(512), chance.randbytes(512), chance.randbytes(1024)))
    elif way == "number":
        near = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, size, size - 1)
        data[at : at + 8] = chance.choice(near).to_bytes(8, "little")
    return bytes(data[: 2 * size + 4096]), way


# The attack


def not_finite(out: Path) -> str:
    """The first tensor of a folder with a number that is not finite."""
    for path in sorted(out.glob("*.safetensors")):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        if (np.frombuffer(data[begin:], "<u2") & 0x7F80 == 0x7F80).any():
            return f"{path.name} has numbers that are not finite"
    return ""


KINDS: dict[str, tuple[Edit, ...]] = {
    "numbers": (numbers, numbers, numbers, numbers_of_others),
    "structure": STRUCTURE,
    "attributes": ATTRIBUTES,
    "forgeries": FORGERIES,
}


class Attack:
    def __init__(self, tiny: Tiny, folder: Path, table: Table, seed: int) -> None:
        self.tiny = tiny
        self.folder = folder
        self.table = table
        self.seed = seed
        self.target = folder / "case.h5"
        self.out = folder / "out"
        self.whole = tiny.calibration.read_bytes()
        self.kinds = tuple(k for k in KINDS if k != "forgeries" or harness.xxhash_library())
        if len(self.kinds) < len(KINDS):
            table.skip("forgeries: no libxxhash")
        self.expected = {}
        for mode in MODES:
            harness.done(*modes(tiny, tiny.calibration, mode, self.out))
            self.expected[mode] = harness.contents(self.out)
            harness.remove(self.out)
        other = folder / "other.h5"
        tokens = harness.tiny_tokens(folder / "other.npy", seed=9)
        harness.done(*(tokens if a == tiny.tokens else a for a in tiny.calibrate(other)))
        self.other = other.read_bytes()

    def damage(self, chance: random.Random) -> tuple[str, str]:
        kind = chance.choice((*self.kinds, "raw", "raw"))
        if kind == "raw":
            data, what = raw(self.whole, self.other, chance)
            self.target.write_bytes(data)
            return kind, what
        shutil.copyfile(self.tiny.calibration, self.target)
        with h5py.File(self.target, "r+") as file:
            what = chance.choice(KINDS[kind])(file, chance)
        return kind, what

    def case(self, number: int, chance: random.Random) -> None:
        name = f"--seed {self.seed} --case {number}"
        try:
            kind, what = self.damage(chance)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            self.table.count("not made", type(error).__name__)
            return
        mode = chance.choices(tuple(MODES), (4, 1, 1))[0]
        before = self.target.read_bytes()
        command = modes(self.tiny, self.target, mode, self.out)
        outcome = harness.run("--threads", 1, *command, timeout=TIMEOUT)
        why, result = self.judge(kind, mode, outcome)
        if not why and self.target.read_bytes() != before:
            why = "the calibration was changed"
        if why:
            files = (self.target, self.tiny.source, self.out, harness.partial(self.out))
            self.table.finding(kind, what, why, f"{name} {mode}", [outcome], *files)
        else:
            self.table.count(kind, result)
        harness.remove(self.out)
        harness.remove(harness.partial(self.out))

    def judge(self, kind: str, mode: str, outcome: Outcome) -> tuple[str, str]:
        """What is wrong, and else what came of it."""
        if outcome.code == 0:
            differs = harness.not_as(self.out, self.expected[mode])
            if not differs:
                return "", "same bytes"
            if kind != "forgeries":
                return f"exit 0 with other bytes: {differs}", ""
            return not_finite(self.out), "taken for another"
        # A forgery may have numbers that no fit can work with, which is told of the layer.
        named = (self.target,) if kind != "forgeries" else ()
        why = harness.why_no_refusal(outcome, (INPUT,), *named)
        for left in (self.out, harness.partial(self.out)):
            if left.exists():
                why = why or f"{left} is left behind"
        return why, "refused"


def main() -> int:
    args = harness.arguments(__doc__)
    table = Table("mutate_calibration", args.keep)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    with harness.workplace(memory=True) as folder:
        attack = Attack(harness.tiny(folder), folder, table, args.seed)
        for number, chance in harness.cases(args):
            attack.case(number, chance)
    return table.report()


if __name__ == "__main__":
    sys.exit(main())
