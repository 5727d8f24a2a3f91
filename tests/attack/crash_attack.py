"""The folder in which commands are attacked, and what is wrong with what an attack leaves there."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
from crash_jobs import Job
from harness import MACHINE, USAGE, Outcome, Table, partial

TIMEOUT = 60


class Attack:
    """One case after the other, in a folder where nothing else may appear."""

    def __init__(self, folder: Path, table: Table, mounts: bool) -> None:
        self.table = table
        self.folder = folder
        self.mounts = mounts
        self.place = folder / "place"
        self.place.mkdir()
        self.out = self.place / "out"
        self.case = ""
        self.history: list[Outcome] = []

    def run(self, *arguments: Any, **kwargs: Any) -> Outcome:
        outcome = harness.run(*arguments, timeout=TIMEOUT, **kwargs)
        self.history.append(outcome)
        return outcome

    def clean(self) -> None:
        self.history.clear()
        for path in self.place.iterdir():
            harness.remove(path)

    def whole_or_absent(self, job: Job, ended_well: bool) -> str:
        """What is wrong with what lies under the name of the output."""
        strays = {p.name for p in self.place.iterdir()} - {self.out.name, partial(self.out).name}
        if strays:
            return f"left behind: {', '.join(sorted(strays))}"
        if ended_well or os.path.lexists(self.out):
            wrong = harness.not_as(self.out, job.expected)
            if wrong:
                return f"{'after exit 0' if ended_well else 'under the final name'}: {wrong}"
        if ended_well and partial(self.out).exists():
            return f"{partial(self.out)} is left after exit 0"
        return ""

    def brought_to_an_end(self, job: Job, chance: random.Random) -> str:
        """Ends what an attack interrupted; what is wrong with that."""
        left = partial(self.out)
        if self.out.exists() and not left.exists():
            return ""
        if left.exists() and not self.out.exists():
            # Without --resume nobody's work is thrown away.
            bare = job.resumes and not (left / "journal").exists()
            if not bare:
                why = harness.why_no_refusal(self.run(*job.make(self.out)), (USAGE,), left)
                if why:
                    return f"the same command again: {why}"
        if left.exists() and not job.resumes:
            shutil.rmtree(left)
            if self.out.exists():
                return self.whole_or_absent(job, True)
        threads = ("--threads", chance.choice((1, 2)))
        empty = left.exists() and not any(left.iterdir())
        outcome = self.run(*threads, *job.finish(self.out))
        if self.out.exists() and empty and outcome.code == USAGE:
            # Ended before the very last step, with nothing left that tells whose output it is.
            return self.whole_or_absent(job, True)
        if outcome.code != 0:
            return f"could not be ended: {outcome.words()}"
        return self.whole_or_absent(job, True)

    @contextmanager
    def attacked(self, job: Job, kind: str, how: str = "") -> Iterator[Callable[[str], None]]:
        """Compares inputs before and after, and keeps what a finding leaves."""
        before = {path: snapshot(path) for path in job.inputs}
        wrong: list[str] = []
        yield wrong.append
        why = next((w for w in wrong if w), "")
        changed = [path for path in job.inputs if snapshot(path) != before[path]]
        if changed and not why:
            why = f"changed: {', '.join(map(str, changed))}"
        if why:
            left = (self.out, partial(self.out))
            case = f"{self.case} {how}".strip()
            self.table.finding(kind, job.name, why, case, self.history, *left)
        self.clean()


def snapshot(path: Path) -> Any:
    return harness.tree(path) if path.is_dir() else path.read_bytes()


def ending(outcome: Outcome, *named: Path) -> str:
    """What is wrong with how a command ended that the machine let down."""
    if outcome.code == 0:
        return ""
    return harness.why_no_refusal(outcome, (MACHINE,), *named)


def judged(
    attack: Attack, row: str, what: str, why: str, outcome: Outcome, case: str = "listed"
) -> None:
    if why:
        left = (attack.out, partial(attack.out))
        attack.table.finding(row, what, why, case, attack.history, *left)
    else:
        attack.table.count(row, "exit 0" if outcome.code == 0 else "refused")
    attack.clean()
