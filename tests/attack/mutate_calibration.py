"""Damages calibration files in every way and converts with them.

    tests/attack/mutate_calibration.py               # a minute
    tests/attack/mutate_calibration.py --count 5000
    tests/attack/mutate_calibration.py --case 1234   # one of them again

`convert --calibration` must refuse a file that is not what `calibrate` wrote (exit 3 and a sentence
that names it), or write the bytes that it writes from the undamaged one, where the damage is in a
place that means nothing. Never may it die, hang, blame itself or write something else.

The kinds are numbers that are changed under their checksum, the structure of the file, its
attributes, its raw bytes, and forgeries. A forgery has checksums that are right, so it may be taken
for another calibration: then the output must have finite numbers.
"""

import random
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import harness
from calibration_attributes import ATTRIBUTES
from calibration_forgeries import FORGERIES
from calibration_numbers import numbers, numbers_of_others
from calibration_places import Edit
from calibration_structure import STRUCTURE
from harness import INPUT, Outcome, Table, Tiny

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
