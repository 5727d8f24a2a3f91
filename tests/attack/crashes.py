"""Kills, starves and misleads every command, and looks at what that leaves behind.

    tests/attack/crashes.py               # a minute
    tests/attack/crashes.py --count 400   # some 200 of them kills

Each time: the exit code and one sentence, or death by the very signal that was sent; nothing but
the whole output under its name; inputs as they were; and what --resume (or the same command again)
makes of it has the same bytes as an undisturbed run.

Listed attacks come first, each in its turn: outputs that are links, pipes, sockets or devices, and
a standard output that takes nothing. Then, at random moments: SIGTERM, SIGINT and SIGKILL, limits
on file sizes, memory and open files, full file systems, and sources that are changed while they
are read. Full file systems and devices are made in a mount namespace of our own; where that is not
permitted, they are left out, which is said.
"""

import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial as bound
from pathlib import Path

import harness
from changed_sources import source_changes
from crash_attack import Attack
from crash_jobs import Job, Jobs
from harness import Table, partial
from interruptions import address_space, file_size, full_disk, killed, least, open_files
from strange_outputs import DEVICES, STRANGE, no_output, strange_output, strange_partial

OWN_MOUNTS = "RELATENT_OWN_MOUNTS"


def mount_own() -> bool:
    """Starts this script again with mounts of its own; whether it has them."""
    if os.environ.get(OWN_MOUNTS):
        return True
    probe = "mount -t tmpfs none /mnt && mknod /mnt/probe c 1 3"
    unshare = ["unshare", "--mount", "--propagation", "private"]
    try:
        tried = subprocess.run([*unshare, "sh", "-c", probe], capture_output=True)
    except FileNotFoundError:
        return False
    if tried.returncode != 0:
        return False
    os.environ[OWN_MOUNTS] = "yes"
    os.execvp(unshare[0], [*unshare, sys.executable, *sys.argv])


def listed(attack: Attack, jobs: Jobs) -> Iterator[Callable[[], None]]:
    """Every attack that needs no chance."""
    for name, command, job in jobs.printing(attack.out):
        yield bound(no_output, attack, name, command, job)
    kinds = (*STRANGE, *(DEVICES if attack.mounts else ()))
    for job in (*jobs.small, jobs.small_shard, jobs.small_merge):
        for kind in kinds:
            for at in ("out", "out.partial"):
                for resume in (False, True) if job.resumes else (False,):
                    yield bound(strange_output, attack, job, at, kind, resume)
    for job in jobs.small:
        for kept in left_overs(attack, job):
            insides = {p.relative_to(kept).as_posix() for p in kept.rglob("*")}
            insides |= {"journal.partial", "output", "output.partial", "streams.partial", "stream"}
            for inside in sorted(insides):
                # A second name is the very file that the run made, for all that a program can see.
                for kind in (k for k in kinds if k != "second name of a file"):
                    yield bound(strange_partial, attack, job, kept, inside, kind)


def left_overs(attack: Attack, job: Job) -> Iterator[Path]:
    """What a run leaves that is killed on its way, and one that only lacks its name."""
    command = job.make(attack.out)
    makes: dict[str, Callable[[], bool]] = {
        "begun": lambda: harness.leave_partial(
            attack.out, command, lambda done: any("layers\t" in entry for entry in done)
        ),
        "complete": lambda: harness.leave_complete(attack.out, command),
    }
    for stage, make in makes.items():
        kept = attack.folder / f"kept {job.name} {stage}"
        if make():
            partial(attack.out).rename(kept)
            yield kept
        else:
            attack.table.skip(f"strange left-overs of {job.name}, {stage}: none was left")
        attack.clean()


def main() -> int:
    args = harness.arguments(__doc__)
    table = Table("crashes", args.keep)
    mounts = mount_own()
    if not mounts:
        table.skip("full file systems and devices: no mount namespace of our own")
    with harness.workplace(memory=False) as folder:
        attack = Attack(folder, table, mounts)
        jobs = Jobs(folder)
        changing = list(jobs.changing(folder / "changing"))
        for each in changing:
            each.job.rehearse(folder / "changing")
        if args.case is None:
            attacks = list(listed(attack, jobs))
            random.Random(args.seed).shuffle(attacks)
            # Without a count a part of the time, and what there is no time for is left out.
            end = time.monotonic() + (math.inf if args.count else 0.4 * args.seconds)
            done = 0
            while attacks and time.monotonic() < end:
                attacks.pop()()
                done += 1
            print(f"{done} listed attacks, {len(attacks)} left out for time", flush=True)
        memory = least(resource.RLIMIT_AS, 1 << 20, 4 << 30)
        files = least(resource.RLIMIT_NOFILE, 3, 64)
        ways: dict[str, tuple[int, Callable[[random.Random], None]]] = {
            "kill": (20, lambda chance: killed(attack, chance.choice(jobs.all), chance)),
            "size": (3, lambda chance: file_size(attack, chance.choice(jobs.all), chance)),
            "memory": (3, lambda c: address_space(attack, c.choice(jobs.all), c, memory)),
            "files": (2, lambda c: open_files(attack, c.choice(jobs.all), c, files)),
            "changes": (6, lambda c: source_changes(attack, c.choice(changing), c)),
        }
        if mounts:
            ways["disk"] = (4, lambda chance: full_disk(attack, chance.choice(jobs.all), chance))
        for number, chance in harness.cases(args):
            attack.case = f"--seed {args.seed} --case {number}"
            way = chance.choices(tuple(ways), [weight for weight, _ in ways.values()])[0]
            ways[way][1](chance)
    return table.report()


if __name__ == "__main__":
    sys.exit(main())
