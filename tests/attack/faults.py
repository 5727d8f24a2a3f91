"""What a planted fault is: one edit of a copy of a converted checkpoint, and who must notice."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from folders import Damaged, Json, Original, Tensors, forge

# What can catch a fault: the layers of evidence of `verify`; its refusal to read the folder (exit
# code 3); or a verdict that says what could not be checked, where that is all there is to say.
STRUCTURE, FINITENESS, FUNCTION, PREDICTION = "structure", "finiteness", "function", "prediction"
REFUSED, SAID = "refused", "said"

Change = Callable[[Damaged], None]
Edit = Callable[[Json], Any]


@dataclass(frozen=True)
class Fault:
    """One edit and who must notice."""

    group: str
    what: str
    where: str
    change: Change
    caught_by: tuple[str, ...]  # any of these is enough
    mentions: str = ""  # what `structure` and `finiteness`, if they notice, must name
    on_source: bool = False  # the source is edited after the conversion, not its result
    is_forged: bool = False

    @property
    def name(self) -> str:
        return f"{self.where}: {self.what}" + ", checksums forged" * self.is_forged

    def forged(self, *caught_by: str) -> "Fault":
        """The same with the report's checksums made to fit."""

        def change(folder: Damaged) -> None:
            self.change(folder)
            if folder.differs():
                forge(folder)

        return replace(self, change=change, caught_by=caught_by, is_forged=True)


@dataclass(frozen=True)
class Subject:
    """An untouched conversion, and what the faults in it are chosen by."""

    original: Original
    source: Original
    other: Original | None  # another conversion of the same source
    has_limits: bool  # whether `function` has limits
    touched: frozenset[int]  # token ids that are run
    layers: tuple[int, ...]  # those that are damaged

    @property
    def has_report(self) -> bool:
        return self.original.report is not None

    @property
    def has_probe(self) -> bool:
        report = self.original.report
        return report is not None and report["probe"] is not None

    @property
    def running(self) -> tuple[str, ...]:
        """The layers of evidence that come from running the model."""
        return (FUNCTION,) * self.has_limits + (PREDICTION,) * self.has_probe


def put(tensors: Callable[[], Tensors]) -> Change:
    """Tensors that are made when they are needed, since all of them would not fit in memory."""
    return lambda folder: folder.put(tensors())


def write(file: str, data: bytes | str) -> Change:
    return lambda folder: folder.write(file, data)


def delete(file: str) -> Change:
    return lambda folder: folder.delete(file)


def edit_json(file: str, edit: Edit) -> Change:
    return lambda folder: folder.edit_json(file, edit)


def change_one_byte(file: str) -> Change:
    def change(folder: Damaged) -> None:
        data = bytearray(folder.read(file))
        data[len(data) // 2] ^= 1
        folder.write(file, bytes(data))

    return change


def setting(key: str, value: Any) -> Edit:
    return lambda document: document.update({key: value})


def without(key: str) -> Edit:
    return lambda document: document.pop(key, None)


def in_part(part: str, edit: Edit) -> Edit:
    return lambda document: edit(document[part])


def is_attention(tensor: str) -> bool:
    return ".self_attn." in tensor or ".attn." in tensor
