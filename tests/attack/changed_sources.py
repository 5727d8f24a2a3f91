"""Sources that change while a command reads them."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import harness
from crash_attack import Attack
from crash_jobs import Changing
from harness import INPUT, MACHINE, REFUSALS, partial


def changes(path: Path, other: Path, chance: random.Random) -> tuple[str, Callable[[], None]]:
    """What becomes of a file while it is read; `other` is a sound one in its place."""
    size = path.stat().st_size
    cut = chance.randrange(size)

    def overwrite() -> None:
        data = other.read_bytes()
        with path.open("r+b") as file:
            begin = chance.choice((0, cut))
            file.seek(begin)
            file.write(data[begin:])
            file.truncate(len(data))

    def replace() -> None:
        beside = path.with_name("beside")
        shutil.copyfile(other, beside)
        beside.replace(path)

    ways: dict[str, Callable[[], None]] = {
        "cut": lambda: os.truncate(path, cut),
        "emptied": lambda: os.truncate(path, 0),
        "rewritten": overwrite,
        "replaced": replace,
        "removed": path.unlink,
    }
    if path.name == "generation_config.json":
        # Nobody reads it: a shorter one, or none, is as good.
        del ways["cut"], ways["emptied"], ways["removed"]
    way = chance.choice(tuple(ways))
    return way, ways[way]


def why_of_neither(attack: Attack, changing: Changing) -> str:
    """What is wrong with an output that is of neither the old input nor of the input as it is now.

    A file rewritten from its middle on is a third one: what becomes of it only a run on it can tell.
    """
    wrong = harness.not_as(attack.out, changing.job.expected)
    if not wrong:
        return ""
    fresh = attack.out.with_name("of the changed input")
    outcome = attack.run(*changing.job.make(fresh))
    if outcome.code == 0:
        wrong = harness.not_as(attack.out, harness.contents(fresh))
    harness.remove(fresh)
    return wrong and f"exit 0 with neither the old nor the new: {wrong}"


def source_changes(attack: Attack, changing: Changing, chance: random.Random) -> None:
    job = changing.job
    name = chance.choice(changing.names)
    path = changing.inputs / name
    way, change = changes(path, changing.others / name, chance)
    moment = chance.uniform(0, 1.1 * job.taken)

    def interfere(process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + moment
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)
        change()

    every = ("--save-every", 0) if job.resumes else ()
    outcome = attack.run(*job.make(attack.out), *every, during=interfere)
    result = "exit 0" if outcome.code == 0 else "refused"
    attack.table.count(f"source changes: {job.name}", result)
    if outcome.code == 0:
        why = why_of_neither(attack, changing)
    else:
        why = harness.why_no_refusal(outcome, (INPUT, MACHINE))
        if os.path.lexists(attack.out):
            why = why or f"{attack.out} is there after {outcome.words()}"
    if not why and outcome.code != 0 and partial(attack.out).exists():
        # What was done belongs to the source as it was.
        again = attack.run(*job.finish(attack.out))
        if again.code != 0:
            why = harness.why_no_refusal(again, REFUSALS)
        else:
            why = why_of_neither(attack, changing)
        why = why and f"resumed on the changed source: {why}"
    if why:
        what = f"{job.name}: {name} {way}"
        left = (attack.out, partial(attack.out))
        attack.table.finding("source changes", what, why, attack.case, attack.history, *left)
    changing.restore()
    attack.clean()
