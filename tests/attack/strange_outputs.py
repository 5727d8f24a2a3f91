"""A standard output that takes nothing, and outputs that are something else already."""

import os
import shutil
import signal
import socket
import stat
from functools import partial as bound
from pathlib import Path
from typing import Any

import harness
from crash_attack import Attack, judged
from crash_jobs import Command, Job
from harness import MACHINE, REFUSALS, partial

# A standard output that takes nothing


def no_output(attack: Attack, name: str, command: Command, job: Job | None) -> None:
    """Every way not to print; what was asked for besides is done or not, never half."""
    read, closed = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, open(os.devnull) as reading:
        ways: dict[str, dict[str, Any]] = {
            "/dev/full": {"stdout": full},
            "closed": {"stdout": None, "preexec_fn": bound(os.close, 1)},
            "open for reading": {"stdout": reading},
            "nobody reads": {"stdout": closed},
        }
        for way, how in ways.items():
            outcome = attack.run(*command, **how)
            if way == "nobody reads" and outcome.code == -signal.SIGPIPE:
                why = ""  # as every program in a pipeline ends
            else:
                why = harness.why_no_refusal(outcome, (MACHINE,))
            if not why and job is not None:
                why = attack.whole_or_absent(job, attack.out.exists())
            judged(attack, "no standard output", name, why, outcome, way)
    os.close(closed)


# Outputs that are something else already


def strange(path: Path, kind: str, precious: Path) -> None:
    """Puts something under a name where an output is to go."""
    file, folder = precious / "file", precious / "folder"
    if kind == "link to a file":
        path.symlink_to(file)
    elif kind == "link to a folder":
        path.symlink_to(folder)
    elif kind == "link to nothing":
        path.symlink_to(precious / "nothing")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "file":
        path.write_bytes(b"here before")
    elif kind == "second name of a file":
        path.hardlink_to(file)
    elif kind == "folder":
        path.mkdir()
    elif kind == "folder with a file":
        path.mkdir()
        (path / "file").write_bytes(b"here before")
    elif kind == "character device":
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "full device":
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    else:
        os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(7, 250))


LINKS = ("link to a file", "link to a folder", "link to nothing", "link to itself")
FILES = ("file", "second name of a file")
FOLDERS = ("folder", "folder with a file")
STRANGE = (*LINKS, "pipe", "socket", *FILES, *FOLDERS)
DEVICES = ("character device", "full device", "block device")


def precious_folder(folder: Path) -> Path:
    """Files that must stay as they are."""
    harness.remove(folder)
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_bytes(b"precious" * 1000)
    (folder / "folder" / "file").write_bytes(b"precious too")
    return folder


def strange_output(attack: Attack, job: Job, at: str, kind: str, resume: bool) -> None:
    """The name of the output, or one beside it, is taken by something else."""
    precious = precious_folder(attack.folder / "precious")
    before = harness.tree(precious)
    path = attack.place / at
    strange(path, kind, precious)
    placed = harness.tree(attack.place)
    command = job.finish(attack.out) if resume and job.resumes else job.make(attack.out)
    outcome = attack.run(*command)
    why = ""
    if outcome.code == 0:
        why = harness.not_as(attack.out, job.expected)
    else:
        why = harness.why_no_refusal(outcome, REFUSALS)
        if not why and harness.tree(attack.place) != placed:
            why = f"refused, but what was there has changed: {outcome.words()}"
    if harness.tree(precious) != before:
        why = "what the output leads to was changed"
    judged(attack, "strange outputs", f"{job.name}: {at}", why, outcome, f"{at} is a {kind}")


def strange_partial(attack: Attack, job: Job, kept: Path, inside: str, kind: str) -> None:
    """In what an unfinished run left, a file is something else now, and the run is resumed."""
    precious = precious_folder(attack.folder / "precious")
    before = harness.tree(precious)
    shutil.copytree(kept, partial(attack.out))
    path = partial(attack.out) / inside
    harness.remove(path)
    strange(path, kind, precious)
    outcome = attack.run(*job.finish(attack.out))
    if outcome.code == 0:
        why = harness.not_as(attack.out, job.expected)
    else:
        why = harness.why_no_refusal(outcome, REFUSALS)
        if os.path.lexists(attack.out):
            why = why or f"{attack.out} is there after {outcome.words()}"
    if harness.tree(precious) != before:
        why = "what the link leads to was changed"
    row = "strange left-overs"
    judged(attack, row, kept.name.removeprefix("kept "), why, outcome, f"{inside} is a {kind}")
