"""Kills at random moments, limits on what a command may have, and full file systems."""

import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
from crash_attack import Attack, ending
from crash_jobs import Job
from harness import BESIDE, MACHINE, partial

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
MOST_KILLS = 4

# Kills


def moment_of(job: Job, out: Path, chance: random.Random) -> tuple[str, Callable[[], bool]]:
    """A moment of a run, in words and as a test whether it has come."""
    end = time.monotonic() + chance.uniform(0, job.taken)
    at_time: tuple[str, Callable[[], bool]] = ("any time", lambda: time.monotonic() >= end)
    if chance.random() < 0.5:
        return at_time
    journal = partial(out) / "journal"
    if not job.resumes:
        count = chance.randrange(1, len(job.expected) + 1)
        left = partial(out)
        return f"{count} files", lambda: left.exists() and len(list(left.iterdir())) >= count
    if chance.random() < 0.3:
        last = chance.choice((b" measured\t", b" complete\t"))
        return last.decode().strip(), lambda: journal.exists() and last in journal.read_bytes()
    if chance.random() < 0.3:
        return "its name", lambda: out.exists()
    size = chance.randrange(4500)
    return "journal", lambda: journal.exists() and journal.stat().st_size >= size


def killed(attack: Attack, job: Job, chance: random.Random) -> None:
    out = attack.out
    every = chance.choice(((), ("--save-every", 0), ("--save-every", 0.1))) if job.resumes else ()
    kills = 0
    name = ""
    with attack.attacked(job, "killed") as wrong:
        for _ in range(chance.choice((1, 1, 2, MOST_KILLS))):
            number = chance.choice(SIGNALS)
            name, has_come = moment_of(job, out, chance)
            late = chance.choice((0, 0, 0.001, 0.003))

            def kill(process: subprocess.Popen[bytes]) -> None:
                # A file that was there a moment ago may be gone.
                with suppress(FileNotFoundError):
                    while process.poll() is None and not has_come():
                        time.sleep(0.0005)
                time.sleep(late)
                process.send_signal(number)

            command = (*(job.finish(out) if kills else job.make(out)), *every)
            outcome = attack.run("--threads", chance.choice((1, 2)), *command, during=kill)
            if outcome.code == -number:
                kills += 1
                attack.table.count(f"killed: {job.name}", number.name)
                said = [s for s in outcome.stderr.splitlines() if not s.startswith(BESIDE)]
                wrong(" ".join(said))
            elif outcome.code == 0:
                attack.table.count(f"killed: {job.name}", "ended first")
            else:
                wrong(f"at {name}: {outcome.words()}")
            wrong(attack.whole_or_absent(job, outcome.code == 0))
            if outcome.code == 0 or out.exists() or (not job.resumes and partial(out).exists()):
                break
        wrong(attack.brought_to_an_end(job, chance))


# Limits


def limited(limit: int, value: int) -> Callable[[], None]:
    """For the child, which has the usual action for SIGXFSZ, as from a shell."""
    return lambda: resource.setrlimit(limit, (value, value))


def let_down(
    attack: Attack, job: Job, kind: str, chance: random.Random, limit: int, value: int
) -> None:
    """A run under a limit, and then one without it."""
    every = chance.choice(((), ("--save-every", 0))) if job.resumes else ()
    with attack.attacked(job, kind, f"limit {value}") as wrong:
        threads = ("--threads", chance.choice((1, 2)))
        how = limited(limit, value)
        outcome = attack.run(*threads, *job.make(attack.out), *every, preexec_fn=how)
        wrong(ending(outcome))
        wrong(attack.whole_or_absent(job, outcome.code == 0))
        kept = partial(attack.out).exists()
        if outcome.code != 0 and kept != ("--resume" in outcome.stderr):
            wrong(f"{'something' if kept else 'nothing'} is kept: {outcome.stderr}")
        attack.table.count(f"{kind}: {job.name}", "exit 0" if outcome.code == 0 else "refused")
        wrong(attack.brought_to_an_end(job, chance))


def file_size(attack: Attack, job: Job, chance: random.Random) -> None:
    limit = int(max(map(len, job.expected.values())) ** chance.uniform(0, 1.02))
    let_down(attack, job, "file size", chance, resource.RLIMIT_FSIZE, limit)


def least(limit: int, low: int, high: int) -> int:
    """The smallest limit with which the program begins: below, the loader or the kernel speak."""
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        outcome = harness.run("--threads", 1, "--version", preexec_fn=limited(limit, middle))
        starts = outcome.code in (0, MACHINE) and "shared libraries" not in outcome.stderr
        low, high = (low, middle) if starts else (middle, high)
    return high


def address_space(attack: Attack, job: Job, chance: random.Random, floor: int) -> None:
    limit = int(floor * chance.uniform(1.02, 6) ** chance.choice((0.3, 1)))
    let_down(attack, job, "memory", chance, resource.RLIMIT_AS, limit)


def open_files(attack: Attack, job: Job, chance: random.Random, floor: int) -> None:
    limit = floor + chance.randrange(12)
    let_down(attack, job, "open files", chance, resource.RLIMIT_NOFILE, limit)


def full_disk(attack: Attack, job: Job, chance: random.Random) -> None:
    """A file system of some pages, or of some files."""
    disk = attack.folder / "disk"
    disk.mkdir(exist_ok=True)
    pages = max(1, int(chance.uniform(0, 2.2) * job.size() / 4096))
    few = chance.random() < 0.2
    options = f"nr_inodes={chance.randrange(2, 12)}" if few else f"size={pages * 4096}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
    before, attack.place, attack.out = attack.place, disk, disk / "out"

    def make_room(*_: Any) -> None:
        room = "remount,size=1g,nr_inodes=1000"
        subprocess.run(["mount", "-o", room, "none", disk], check=True)

    try:
        kind = "full disk"
        every = chance.choice(((), ("--save-every", 0))) if job.resumes else ()
        with attack.attacked(job, kind, options) as wrong:
            outcome = attack.run(*job.make(attack.out), *every)
            wrong(ending(outcome, disk))
            wrong(attack.whole_or_absent(job, outcome.code == 0))
            attack.table.count(f"{kind}: {job.name}", "exit 0" if outcome.code == 0 else "refused")
            make_room()
            wrong(attack.brought_to_an_end(job, chance))
    finally:
        attack.place, attack.out = before, before / "out"
        subprocess.run(["umount", disk], check=True)
