"""Damages what interrupted runs leave and resumes them.

    tests/attack/mutate_resume.py               # a minute
    tests/attack/mutate_resume.py --count 5000
    tests/attack/mutate_resume.py --case 1234   # one of them again

`--resume` must end with the bytes of an undisturbed run, or refuse with one sentence and leave
nothing under the final name. Never may it die, hang, blame itself or end with other bytes.

Damaged are the journal (lines changed, torn, doubled, in another order), the weights so far, their
headers, the saved streams and layers, and the files themselves: deleted, cut, longer, in each
other's place. Forgeries have checksums that are right: they may say of a run what is not true, so
that other bytes are no finding, and everything else still is.
"""

import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import INPUT, LAYERS, MACHINE, REFUSALS, USAGE, Outcome, Table, Tiny, partial

TIMEOUT = 30
STATES = ("streams", "stream", *(f"layer-{i}" for i in range(LAYERS)))

Edit = Callable[[Path, random.Random], str]


@dataclass
class LeftOver:
    """What a run left, how it is continued, and what then must come of it."""

    name: str
    folder: Path
    make: Callable[[Path], tuple[Any, ...]]
    expected: dict[str, bytes]


class NothingToChange(Exception):
    """A kind of damage that this left-over has no place for."""


# Raw bytes


def change_bytes(data: bytearray, chance: random.Random) -> str:
    """Damages bytes in place, mostly few; what was done to them."""
    size = len(data)
    if size == 0:
        raise NothingToChange
    at = chance.randrange(size)
    length = chance.choice((1, 4, 16, 64, 512, 4096))
    way = chance.choice(("bit", "bit", "byte", "zeros", "noise", "moved", "bits"))
    piece = len(data[at : at + length])
    if way == "bit":
        data[at] ^= 1 << chance.randrange(8)
    elif way == "bits":
        for _ in range(chance.randrange(2, 40)):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif way == "byte":
        data[at] = chance.randrange(256)
    elif way == "zeros":
        data[at : at + length] = bytes(piece)
    elif way == "noise":
        data[at : at + length] = chance.randbytes(piece)
    else:
        to = chance.randrange(size)
        copied = data[at : at + length][: size - to]
        data[to : to + len(copied)] = copied
    return way


def files_of(left: Path, wanted: Callable[[str], bool]) -> list[Path]:
    names = {p.relative_to(left).as_posix(): p for p in left.rglob("*") if p.is_file()}
    return [names[name] for name in sorted(names) if wanted(name)]


def any_file(left: Path, chance: random.Random, wanted: Callable[[str], bool]) -> Path:
    files = files_of(left, wanted)
    if not files:
        raise NothingToChange
    return chance.choice(files)


def damage_file(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    way = change_bytes(data, chance)
    path.write_bytes(data)
    return way


# The journal


def journal_bytes(left: Path, chance: random.Random) -> str:
    return damage_file(any_file(left, chance, lambda name: name == "journal"), chance)


def journal_lines(left: Path, chance: random.Random) -> str:
    """Lines as they were written, but not where or how often."""
    path = any_file(left, chance, lambda name: name == "journal")
    lines = path.read_bytes().splitlines(keepends=True)
    # The beginning says what was asked for; what was done is of more interest.
    begun = next(i for i, line in enumerate(lines) if line.endswith(b" begun\n"))
    first = begun + 1 if chance.random() < 0.7 and begun + 1 < len(lines) else 0
    at = chance.randrange(first, len(lines))
    way = chance.choice(
        ("gone", "doubled", "swapped", "turned round", "torn", "cut behind", "joined", "another")
    )
    if way == "gone":
        del lines[at : at + chance.choice((1, 1, 3))]
    elif way == "doubled":
        lines.insert(at, lines[at])
    elif way == "swapped":
        other = chance.randrange(first, len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif way == "turned round":
        lines[at:] = reversed(lines[at:])
    elif way == "torn":
        lines[at:] = [lines[at][: chance.randrange(len(lines[at]))]]
    elif way == "cut behind":
        del lines[at + 1 :]
    elif way == "joined":
        lines[at] = lines[at].rstrip(b"\n")
    else:
        unsigned = b"0" * 32 + b" copied\t9\n"
        lines[at] = chance.choice((b"\n", b"\0\n", b"x\ty\n", lines[0], unsigned))
    path.write_bytes(b"".join(lines))
    return f"line {way}"


# Weights and states


def is_weight(name: str) -> bool:
    """Also the single file of a GGUF or a calibration."""
    single = name in ("output", "output.partial")
    return single or has_header(name)


def has_header(name: str) -> bool:
    return name.startswith("output/") and "safetensors" in name and "index" not in name


def weight_bytes(left: Path, chance: random.Random) -> str:
    return damage_file(any_file(left, chance, is_weight), chance)


def other_output(left: Path, chance: random.Random) -> str:
    """Files beside the weights: config.json, the index, what goes along."""
    path = any_file(left, chance, lambda n: n.startswith("output/") and not is_weight(n))
    return f"{path.name}: {damage_file(path, chance)}"


def header_bytes(left: Path, chance: random.Random) -> str:
    """The header of a weight file: its length, or something in its text."""
    path = any_file(left, chance, has_header)
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    if chance.random() < 0.3:
        near = (0, 1, size - 1, size + 1, size + 8, len(data), 2**31, 2**63, 2**64 - 1)
        data[:8] = struct.pack("<Q", chance.choice(near))
        way = "length"
    else:
        text = data[8 : 8 + size]
        way = chance.choice(("digit", "bytes", "names", "spaces"))
        if way == "digit":
            digits = [i for i, c in enumerate(text) if chr(c).isdigit()]
            text[chance.choice(digits)] = ord(chance.choice("0123456789"))
        elif way == "names":
            text = text.replace(b"layers.0", b"layers.9").replace(b"layers.1", b"layers.0")
        elif way == "spaces":
            text = text.rstrip()[:-1].ljust(size - 1) + b"}"
        else:
            change_bytes(text, chance)
        data[8 : 8 + size] = text
    path.write_bytes(data)
    return way


def state_bytes(left: Path, chance: random.Random) -> str:
    path = any_file(left, chance, lambda name: name in STATES)
    if chance.random() < 0.3:
        data = bytearray(path.read_bytes())
        at = chance.choice((0, 8, 16, 24))
        near = (0, 1, 2, LAYERS, LAYERS + 1, 2**31, 2**63, 2**64 - 1)
        data[at : at + 8] = struct.pack("<Q", chance.choice(near))
        path.write_bytes(data)
        return f"{path.name}: number"
    return f"{path.name}: {damage_file(path, chance)}"


# Files


def anything(name: str) -> bool:
    return True


def deleted(left: Path, chance: random.Random) -> str:
    path = any_file(left, chance, anything)
    path.unlink()
    return f"{path.name} deleted"


def cut(left: Path, chance: random.Random) -> str:
    path = any_file(left, chance, anything)
    data = path.read_bytes()
    path.write_bytes(data[: chance.choice((0, len(data) - 1, chance.randrange(len(data) + 1)))])
    return f"{path.name} cut"


def longer(left: Path, chance: random.Random) -> str:
    path = any_file(left, chance, anything)
    with path.open("ab") as file:
        file.write(chance.choice((b"\0", bytes(4096), chance.randbytes(33), path.read_bytes())))
    return f"{path.name} longer"


def swapped(left: Path, chance: random.Random) -> str:
    one, other = any_file(left, chance, anything), any_file(left, chance, anything)
    if one == other:
        raise NothingToChange
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"{one.name} and {other.name} swapped"


def renamed(left: Path, chance: random.Random) -> str:
    """A finished file seems unfinished, or the other way round."""
    path = any_file(left, chance, anything)
    name = path.name.removesuffix(".partial")
    if name == path.name:
        name = f"{name}{chance.choice(('.partial', '.partial', 'x'))}"
    path.rename(path.with_name(name))
    return f"{path.name} renamed"


def added(left: Path, chance: random.Random) -> str:
    place = chance.choice(("output", "", "output"))
    if not (left / place).is_dir():
        place = ""
    names = ("more", "model.safetensors", "model-00001-of-00002.safetensors", "config.json")
    more = ("config.json.partial", "pytorch_model.bin", "modeling_relatent.py", "streams", "stream")
    path = left / place / chance.choice((*names, *more))
    if path.exists():
        raise NothingToChange
    path.write_bytes(chance.choice((b"", b"{}", chance.randbytes(100))))
    return f"{place or '.'} has {path.name} too"


def output_gone(left: Path, chance: random.Random) -> str:
    if not (left / "output").is_dir():
        raise NothingToChange
    shutil.rmtree(left / "output")
    return "no output"


# Forgeries


def chained(bodies: list[bytes]) -> bytes:
    """A journal of these lines, with the checksums that belong there."""
    out = b"relatent journal 1\n"
    before = b""
    for body in bodies:
        hashed = b"".join(struct.pack("<Q", len(part)) + part for part in (before, body))
        before = harness.xxh3(hashed).encode()
        out += before + b" " + body + b"\n"
    return out


def journal_bodies(left: Path) -> list[bytes]:
    lines = (left / "journal").read_bytes().splitlines()[1:]
    return [line.partition(b" ")[2] for line in lines]


def forged_journal(left: Path, chance: random.Random) -> str:
    """Says that other things were done, or not, or that are none."""
    bodies = journal_bodies(left)
    if chained(bodies) != (left / "journal").read_bytes():
        raise AssertionError("checksums of the journal are made in another way now")
    begun = bodies.index(b"begun")
    done = bodies[begun + 1 :]
    way = chance.choice(("more done", "numbers", "complete", "gone", "order", "odd", "given"))
    numbers = (*b"0 1 2 3 17 99 -1 9223372036854775807 1e9 x".split(), b"")
    if way == "more done":
        done.append(chance.choice((b"copied\t", b"layers\t")) + chance.choice(numbers))
    elif way == "numbers" and done:
        at = chance.randrange(len(done))
        name, _, value = done[at].partition(b"\t")
        parts = value.split(b" ")
        parts[chance.randrange(len(parts))] = chance.choice(numbers)
        done[at] = name + b"\t" + b" ".join(parts)
    elif way == "complete":
        done.append(b"complete\t" + chance.choice((b"", b"1", b"x" * 32)))
    elif way == "gone" and done:
        del done[chance.randrange(len(done)) :]
    elif way == "order":
        chance.shuffle(done)
    elif way == "odd":
        odd = (b"\t", b"a\tb\tc", b"\\\t\\", b"\xff\t\x00", b"begun", b"given x\ty", b"x" * 9999)
        done.insert(chance.randrange(len(done) + 1), chance.choice(odd))
    else:
        at = chance.randrange(begun)
        bodies[at] = chance.choice((b"given --rank\t99", b"given \t", b"given", bodies[0]))
    if chance.random() < 0.1:
        bodies.pop(begun)
        begun -= 1
    (left / "journal").write_bytes(chained([*bodies[: begun + 1], *done]))
    return f"journal: {way}"


def forged_state(left: Path, chance: random.Random) -> str:
    """Numbers that no run has, under a right checksum."""
    path = any_file(left, chance, lambda name: name in STATES)
    data = bytearray(path.read_bytes())[:-32]
    way = chance.choice(("number", "nan", "huge", "noise", "zeros"))
    blocks = struct.unpack("<Q", data[16:24])[0]
    begin = 24 + 8 * blocks
    if way == "number":
        near = (0, 1, 2, LAYERS, LAYERS + 1, 2**31, 2**63, 2**64 - 1)
        data[8:16] = struct.pack("<Q", chance.choice(near))
    elif way == "noise":
        data[begin:] = chance.randbytes(len(data) - begin)
    elif way == "zeros":
        data[begin:] = bytes(len(data) - begin)
    else:
        number = struct.pack("<f", float("nan") if way == "nan" else 3e38)
        data[begin : begin + 400] = number * 100
    path.write_bytes(bytes(data) + harness.xxh3(bytes(data)).encode())
    return f"{path.name}: {way}"


KINDS: dict[str, tuple[Edit, ...]] = {
    "journal": (journal_bytes, journal_lines),
    "weights": (weight_bytes,),
    "headers": (header_bytes,),
    "states": (state_bytes,),
    "beside the weights": (other_output,),
    "files": (deleted, cut, longer, swapped, renamed, added, output_gone),
    "forgeries": (forged_journal, forged_state),
}


# The attack


def left_overs(tiny: Tiny, folder: Path, table: Table) -> Iterator[LeftOver]:
    """Runs at several stages: barely begun, on their way, and done but for their name."""

    def split(out: Path) -> tuple[Any, ...]:
        return (*tiny.weights_only(out), "--max-shard-size", 80_000)

    def budget(out: Path) -> tuple[Any, ...]:
        fits = ("--calibration", tiny.calibration, "--fit-rounds", 1, "--kv-budget", 0.75)
        return ("convert", tiny.source, "-o", out, *fits, "--quiet")

    def gguf(out: Path) -> tuple[Any, ...]:
        return tiny.fitted(out, "--engine", "gguf", "--pre-tokenizer", "no_vocab")

    makes: dict[str, Callable[[Path], tuple[Any, ...]]] = {
        "fits": tiny.fitted,
        "budget": budget,
        "weights-only": tiny.weights_only,
        "several files": split,
        "gguf": gguf,
        "calibrate": tiny.calibrate,
    }
    for name, make in makes.items():
        out = folder / "made"
        harness.done(*make(out))
        expected = harness.contents(out)
        harness.remove(out)

        def reached(entry: str) -> Callable[[list[str]], bool]:
            return lambda entries: any(e.startswith(entry) for e in entries)

        stages: dict[str, Callable[[], bool]] = {
            "copied": lambda: harness.leave_partial(out, make(out), reached("copied\t")),
            "trial": lambda: harness.leave_partial(out, make(out), reached("trial\t")),
            "layers": lambda: harness.leave_partial(out, make(out), reached("layers\t")),
            "layers 2": lambda: harness.leave_partial(out, make(out), reached("layers\t2")),
            "complete": lambda: harness.leave_complete(out, make(out)),
        }
        wanted = {
            "calibrate": ("layers", "layers 2", "complete"),
            "budget": ("trial", "layers"),
        }.get(name, ("copied", "layers", "layers 2", "complete"))
        for stage in wanted:
            if not stages[stage]():
                table.skip(f"{name}, {stage}: no run was caught there")
                harness.remove(out)
                harness.remove(partial(out))
                continue
            kept = folder / f"left {name} {stage}"
            partial(out).rename(kept)
            yield LeftOver(f"{name}, {stage}", kept, make, expected)


class Attack:
    def __init__(self, folder: Path, table: Table, seed: int) -> None:
        self.table = table
        self.seed = seed
        self.place = folder / "place"
        self.place.mkdir()
        self.out = self.place / "out"
        self.tiny = harness.tiny(folder)
        self.lefts = list(left_overs(self.tiny, folder, table))
        self.kinds = tuple(k for k in KINDS if k != "forgeries" or harness.xxhash_library())
        if len(self.kinds) < len(KINDS):
            table.skip("forgeries: no libxxhash")

    def case(self, number: int, chance: random.Random) -> None:
        left = chance.choice(self.lefts)
        target = partial(self.out)
        kind = what = ""
        while not what:
            kind = chance.choice(self.kinds)
            shutil.copytree(left.folder, target)
            try:
                what = chance.choice(KINDS[kind])(target, chance)
            except NothingToChange:
                shutil.rmtree(target)
        before = self.place.with_name("before")
        harness.remove(before)
        shutil.copytree(target, before)
        command = ("--threads", 1, *left.make(self.out), "--resume")
        outcome = harness.run(*command, timeout=TIMEOUT)
        why, result = self.judge(kind, left, outcome)
        if why:
            case = f"--seed {self.seed} --case {number}"
            stage = left.name
            text = f"{case} {what}"
            self.table.finding(kind, stage, why, text, [outcome], before, self.out, target)
        else:
            self.table.count(kind, result)
        for path in self.place.iterdir():
            harness.remove(path)

    def judge(self, kind: str, left: LeftOver, outcome: Outcome) -> tuple[str, str]:
        """What is wrong, and else what came of it."""
        if outcome.code == 0:
            wrong = harness.not_as(self.out, left.expected)
            if partial(self.out).exists():
                return f"{partial(self.out)} is left after exit 0", ""
            if not wrong:
                return "", "same bytes"
            if kind == "forgeries":
                return "", "believed"
            return f"exit 0 with other bytes: {wrong}", ""
        why = harness.why_no_refusal(outcome, REFUSALS)
        if not why and (self.out.exists() or self.out.is_symlink()) and kind != "forgeries":
            why = f"{self.out} is there after {outcome.words()}"
        names = {USAGE: "refused (2)", INPUT: "refused (3)", MACHINE: "refused (4)"}
        return why, names.get(outcome.code or 0, "")


def main() -> int:
    args = harness.arguments(__doc__)
    table = Table("mutate_resume", args.keep)
    with harness.workplace(memory=True) as folder:
        attack = Attack(folder, table, args.seed)
        for number, chance in harness.cases(args):
            attack.case(number, chance)
    return table.report()


if __name__ == "__main__":
    sys.exit(main())
