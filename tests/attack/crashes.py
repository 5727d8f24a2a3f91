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
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path
from typing import Any

import harness
from harness import INPUT, MACHINE, REFUSALS, USAGE, Outcome, Table, Tiny, partial

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
OWN_MOUNTS = "RELATENT_OWN_MOUNTS"
TIMEOUT = 60
MOST_KILLS = 4

Command = tuple[Any, ...]


@dataclass
class Job:
    """A command that makes something, and what it makes when left alone."""

    name: str
    make: Callable[[Path], Command]
    inputs: tuple[Path, ...]
    resumes: bool = True
    expected: dict[str, bytes] = field(default_factory=dict)
    taken: float = 0

    def rehearse(self, folder: Path) -> Path:
        out = folder / f"whole {self.name}"
        begin = time.monotonic()
        harness.done(*self.make(out))
        self.taken = time.monotonic() - begin
        self.expected = harness.contents(out)
        return out

    def size(self) -> int:
        return sum(map(len, self.expected.values()))

    def finish(self, out: Path) -> Command:
        """The command that ends what was begun."""
        return (*self.make(out), "--resume") if self.resumes else self.make(out)


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
                said = [s for s in outcome.stderr.splitlines() if not s.startswith("warning: ")]
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


# Sources that change


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


@dataclass
class Changing:
    """A job whose inputs are copies that may be changed, with others to put in their place."""

    job: Job
    originals: Path
    others: Path
    inputs: Path
    names: tuple[str, ...]
    of_others: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def restore(self) -> None:
        for name in self.names:
            harness.remove(self.inputs / name)
            shutil.copy2(self.originals / name, self.inputs / name)

    def rehearse(self, folder: Path) -> None:
        """What each of the others leads to, where it is a file that goes with the rest."""
        self.job.rehearse(folder)
        for name in self.names:
            shutil.copy2(self.others / name, self.inputs / name)
            out = folder / f"other {self.job.name} {Path(name).name}"
            if harness.run(*self.job.make(out)).code == 0:
                self.of_others[name] = harness.contents(out)
            self.restore()


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
    why = ""
    if outcome.code == 0:
        wrong = harness.not_as(attack.out, job.expected)
        of_other = changing.of_others.get(name)
        if wrong and of_other is not None and way in ("rewritten", "replaced"):
            wrong = wrong and harness.not_as(attack.out, of_other)
        why = wrong and f"exit 0 with neither the old nor the new: {wrong}"
    else:
        why = harness.why_no_refusal(outcome, (INPUT, MACHINE))
        if os.path.lexists(attack.out):
            why = why or f"{attack.out} is there after {outcome.words()}"
    result = "exit 0" if outcome.code == 0 else "refused"
    attack.table.count(f"source changes: {job.name}", result)
    if not why and outcome.code != 0 and partial(attack.out).exists():
        # What was done belongs to the source as it was.
        again = attack.run(*job.finish(attack.out))
        if again.code != 0:
            why = harness.why_no_refusal(again, REFUSALS)
        elif name not in changing.of_others or way not in ("rewritten", "replaced"):
            why = harness.not_as(attack.out, job.expected)
        else:
            why = harness.not_as(attack.out, changing.of_others[name])
        why = why and f"resumed on the changed source: {why}"
    if why:
        what = f"{job.name}: {name} {way}"
        left = (attack.out, partial(attack.out))
        attack.table.finding("source changes", what, why, attack.case, attack.history, *left)
    changing.restore()
    attack.clean()


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


def judged(
    attack: Attack, row: str, what: str, why: str, outcome: Outcome, case: str = "listed"
) -> None:
    if why:
        left = (attack.out, partial(attack.out))
        attack.table.finding(row, what, why, case, attack.history, *left)
    else:
        attack.table.count(row, "exit 0" if outcome.code == 0 else "refused")
    attack.clean()


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


# All of them


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


def shard_job(source: Path, ranks: int) -> Job:
    how = ("--tp", ranks, "--quiet")
    return Job("shard", lambda out: ("shard", source, "-o", out, *how), (source,), False)


def merge_job(shards: Path) -> Job:
    how = ("shard", "--merge", shards, "--quiet")
    return Job("merge", lambda out: (*how, "-o", out), (shards,), False)


class Jobs:
    """The commands under attack: on llama-3m to be killed, on the tiny checkpoint to be refused."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "llama"
        shutil.copytree(harness.LLAMA, self.source)
        moments = folder / "llama.h5"
        tokens = harness.TOKENS
        span = ("--sequences", 9, "--length", 128, "--quiet")
        sizes = ("--rope-dim", 32, "--rank", 96, "--quiet")

        def calibrate(out: Path) -> Command:
            return ("calibrate", self.source, "--tokens", tokens, "-o", out, *span)

        def fits(out: Path) -> Command:
            how = ("--calibration", moments, "--fit-rounds", 1)
            return ("convert", self.source, "-o", out, *how, *sizes)

        def weights_only(out: Path) -> Command:
            how = ("--method", "weights-only", "--max-shard-size", 2_000_000)
            return ("convert", self.source, "-o", out, *how, *sizes)

        self.calibrate = Job("calibrate", calibrate, (self.source, tokens))
        harness.done(*calibrate(moments))
        self.fits = Job("fits", fits, (self.source, tokens, moments))
        self.weights_only = Job("weights-only", weights_only, (self.source,))
        self.calibrate.rehearse(folder)
        self.fits.rehearse(folder)
        converted = self.weights_only.rehearse(folder)
        self.shard = shard_job(converted, 4)
        self.merge = merge_job(self.shard.rehearse(folder))
        self.merge.rehearse(folder)
        self.all = (self.calibrate, self.fits, self.weights_only, self.shard, self.merge)

        self.tiny = harness.tiny(folder)
        tiny = self.tiny
        inputs = (tiny.source, tiny.tokens, tiny.calibration)
        gguf = ("--engine", "gguf", "--pre-tokenizer", "no_vocab")
        self.small = (
            Job("calibrate", tiny.calibrate, inputs),
            Job("fits", tiny.fitted, inputs),
            Job("weights-only", tiny.weights_only, inputs),
            Job("gguf", lambda out: tiny.fitted(out, *gguf), inputs),
        )
        small = folder / "small"
        small.mkdir()
        for job in self.small:
            job.rehearse(small)
        self.small_shard = shard_job(tiny.source, 2)
        self.small_merge = merge_job(self.small_shard.rehearse(small))
        self.small_merge.rehearse(small)

    def printing(self, out: Path) -> Iterator[tuple[str, Command, Job | None]]:
        """Every command that prints, and what it makes besides."""
        tiny = self.tiny
        for job in (*self.small, self.small_shard, self.small_merge):
            yield job.name, (*job.make(out), "--json"), job
        tokens = ("--tokens", tiny.tokens, "--length", 64)
        yield "inspect", ("inspect", tiny.source), None
        yield "inspect --json", ("inspect", tiny.source, "--json"), None
        verify = ("verify", tiny.source, tiny.source, *tokens, "--quiet")
        yield "verify", verify, None
        yield "verify --json", (*verify, "--json"), None
        yield "dry run", (*self.small[2].make(out), "--dry-run"), None
        yield "dry run --json", (*self.small[2].make(out), "--dry-run", "--json"), None
        yield "version", ("--version",), None
        yield "help", ("convert", "--help"), None

    def changing(self, folder: Path) -> Iterator[Changing]:
        """The same commands on copies of their inputs."""
        tiny = self.tiny
        originals, others, inputs = (folder / n for n in ("originals", "others", "inputs"))
        originals.mkdir(parents=True)
        shutil.copytree(tiny.source, originals / "tiny")
        other = Tiny(
            harness.tiny_checkpoint(others / "tiny", seed=17),
            harness.tiny_tokens(others / "tokens.npy", seed=18),
            others / "moments.h5",
        )
        # Another calibration of the same checkpoint: one of another would be refused anyway.
        same = Tiny(tiny.source, other.tokens, other.calibration)
        harness.done(*same.calibrate(other.calibration))
        config = (others / "tiny" / "config.json").read_text().replace("1e-05", "1e-03")
        (others / "tiny" / "config.json").write_text(config)
        for path in (tiny.tokens, tiny.calibration):
            shutil.copy2(path, originals / path.name)
        shutil.copytree(originals, inputs)
        copy = Tiny(inputs / "tiny", inputs / tiny.tokens.name, inputs / tiny.calibration.name)
        source = ("tiny/model.safetensors", "tiny/config.json", "tiny/generation_config.json")
        made = (
            (Job("calibrate", copy.calibrate, ()), (*source, "tokens.npy")),
            (Job("fits", copy.fitted, ()), (*source, "moments.h5")),
            (Job("weights-only", copy.weights_only, ()), source),
        )
        for job, names in made:
            yield Changing(job, originals, others, inputs, names)
        yield Changing(shard_job(copy.source, 2), originals, others, inputs, source)


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
            each.rehearse(folder / "changing")
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
