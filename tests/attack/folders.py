"""Copies of checkpoint folders that cost nothing until something in them is changed.

Tensors are edited as bytes and as numpy arrays: loading torch would take longer than most checks.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checksums import checksum

Numbers = NDArray[np.float32]
Words = NDArray[np.unsignedinteger[Any]]
Json = dict[str, Any]

REPORT = "conversion_report.json"
INDEX = "model.safetensors.index.json"
WORDS: dict[str, type[np.unsignedinteger[Any]]] = {
    "F32": np.uint32,
    "BF16": np.uint16,
    "F16": np.uint16,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as a weight file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def words(self) -> Words:
        """The bits of every number, to be changed."""
        return np.frombuffer(self.data, WORDS[self.dtype]).reshape(self.shape).copy()

    def with_words(self, words: Words) -> "Tensor":
        return replace(self, shape=words.shape, data=words.tobytes())

    def numbers(self) -> Numbers:
        words = self.words()
        if self.dtype == "BF16":
            return (words.astype(np.uint32) << 16).view(np.float32)
        return words.view(np.float16 if self.dtype == "F16" else np.float32).astype(np.float32)

    def with_numbers(self, numbers: Numbers) -> "Tensor":
        return encoded(self.dtype, numbers)


Tensors = dict[str, Tensor]


def encoded(dtype: str, numbers: Numbers) -> Tensor:
    """Numbers as a tensor of that type, rounded to nearest, ties to even."""
    exact = np.ascontiguousarray(numbers, np.float32)
    if dtype == "BF16":
        bits = exact.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = np.where(np.isnan(exact), 0x7FC0, rounded)
        return Tensor(dtype, exact.shape, rounded.astype(np.uint16).tobytes())
    with np.errstate(over="ignore"):
        stored = exact.astype(np.float16) if dtype == "F16" else exact
    return Tensor(dtype, exact.shape, stored.tobytes())


@dataclass(frozen=True)
class WeightFile:
    """All of a safetensors file, tensors in the order of their bytes."""

    metadata: Json | None
    tensors: Tensors

    @staticmethod
    def read(path: Path) -> "WeightFile":
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        metadata = header.pop("__metadata__", None)
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), raw[begin:end])
        return WeightFile(metadata, tensors)

    def as_bytes(self) -> bytes:
        header: Json = {} if self.metadata is None else {"__metadata__": self.metadata}
        offset = 0
        for name, tensor in self.tensors.items():
            end = offset + len(tensor.data)
            header[name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = b"".join(tensor.data for tensor in self.tensors.values())
        return struct.pack("<Q", len(text)) + text + data


class Original:
    """A folder that is left as it is, with what is in it; read once."""

    def __init__(self, path: Path):
        self.path = path
        self.config: Json = json.loads((path / "config.json").read_text())
        self.report: Json | None = (
            json.loads((path / REPORT).read_text()) if (path / REPORT).exists() else None
        )
        self.weights = {
            file.name: WeightFile.read(file) for file in sorted(path.glob("*.safetensors"))
        }
        self.tensors: Tensors = {}
        self.file_of: dict[str, str] = {}
        for name, file in self.weights.items():
            self.tensors |= file.tensors
            self.file_of |= dict.fromkeys(file.tensors, name)

    def has(self, file: str) -> bool:
        return (self.path / file).exists()


class Damaged:
    """A copy of an original, whose files are links to it until they are changed."""

    def __init__(self, original: Original, path: Path):
        self.original = original
        self.path = path
        path.mkdir(parents=True)
        for file in filter(Path.is_file, original.path.iterdir()):
            try:
                os.link(file, path / file.name)
            except OSError:  # another disk
                shutil.copyfile(file, path / file.name)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes | str) -> None:
        """Never through a link: the original keeps its bytes."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    def delete(self, name: str) -> None:
        (self.path / name).unlink()

    def exchange(self, one: str, other: str) -> None:
        a, b = self.read(one), self.read(other)
        self.write(one, b)
        self.write(other, a)

    def edit_json(self, name: str, edit: Callable[[Json], None]) -> None:
        document = json.loads(self.read(name))
        edit(document)
        self.write(name, json.dumps(document, indent=2))

    def put(self, tensors: Tensors) -> None:
        """Writes these tensors in place of the original's of the same names."""
        tensors = {n: t for n, t in tensors.items() if t != self.original.tensors[n]}
        for file in {self.original.file_of[name] for name in tensors}:
            weights = self.original.weights[file]
            changed = {name: tensors.get(name, old) for name, old in weights.tensors.items()}
            self.write(file, replace(weights, tensors=changed).as_bytes())

    def differs(self) -> bool:
        """Whether anything is not the original's."""
        names = {file.name for file in self.path.iterdir()}
        return names != {file.name for file in self.original.path.iterdir()} or any(
            not os.path.samefile(self.path / name, self.original.path / name)
            and self.read(name) != (self.original.path / name).read_bytes()
            for name in names
        )


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def seal(report: Json) -> None:
    """Gives a report the checksum of itself that it should have."""
    report.pop("checksum", None)
    text = json.dumps(report, separators=(",", ":"), ensure_ascii=False)
    report["checksum"] = checksum(text.encode())


def forge(folder: Damaged) -> None:
    """Makes every checksum of the report that of what now lies there, and the report's own fit.

    As a tool would that edits a converted checkpoint and "repairs" its report. What such a tool
    cannot forge are the figures: it would have to run the model.
    """

    def edit(report: Json) -> None:
        present = {file.name for file in folder.path.iterdir() if file.is_file()} - {REPORT}
        report["files"] = {
            name: checksum(folder.read(name))
            for name in _in_order(present, report["files"])
            if not is_weights(name)
        }
        tensors: Tensors = {}
        for name in sorted(filter(is_weights, present)):
            unchanged = folder.original.has(name) and os.path.samefile(
                folder.path / name, folder.original.path / name
            )
            file = (
                folder.original.weights[name] if unchanged else WeightFile.read(folder.path / name)
            )
            tensors |= file.tensors
        report["tensors"] = {
            name: checksum(tensors[name].data) for name in report["tensors"] if name in tensors
        }
        seal(report)

    folder.edit_json(REPORT, edit)


def _in_order(names: set[str], known: Iterable[str]) -> list[str]:
    """The names, those that are known first and in their order."""
    first = [name for name in known if name in names]
    return first + sorted(names - set(first))


def layer_of(tensor: str) -> int | None:
    parts = tensor.split(".")
    place = next((i for i, part in enumerate(parts[:-1]) if part in ("layers", "h")), None)
    return None if place is None or not parts[place + 1].isdigit() else int(parts[place + 1])


def in_layer(tensor: str, layer: int) -> str:
    """The name of the tensor that is the same in another layer."""
    parts = tensor.split(".")
    place = next(i for i, part in enumerate(parts) if part in ("layers", "h"))
    parts[place + 1] = str(layer)
    return ".".join(parts)
