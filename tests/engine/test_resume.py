"""Killed, out of room, or continued by another command: what is whole stays whole.

Every kill is a SIGKILL at a moment of the run, spread over the time that an undisturbed one takes.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import support

USAGE, MACHINE = 2, 4
SPAN = ("--sequences", 9, "--length", 256)
# Of the time that an undisturbed run takes; the last ones fall into the end of it or miss it.
MOMENTS = (0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
# Options that decide nothing of the result, or stand for others.
SILENT = {
    *("--help", "--output", "--threads", "--calibration", "--resume", "--save-every", "--dry-run"),
    *("--json", "--quiet", "--version", "--effort"),
}

Make = Callable[[Path], tuple]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    path = tmp_path_factory.mktemp("resume") / "moments.h5"
    support.relatent(*calibrate(llama)(path))
    return path


def calibrate(source: Path) -> Make:
    tokens = ("--tokens", support.CALIBRATION_TOKENS)
    return lambda out: ("calibrate", source, *tokens, "-o", out, *SPAN, "--quiet")


def convert(source: Path, *options: Any) -> Make:
    return lambda out: ("convert", source, "-o", out, *options, "--quiet")


def fitted(source: Path, calibration: Path, *options: Any) -> Make:
    return convert(source, "--calibration", calibration, "--fit-rounds", 1, *options)


def makes(source: Path, calibration: Path) -> dict[str, Make]:
    return {
        "calibrate": calibrate(source),
        "weights-only": convert(
            source,
            *("--method", "weights-only", "--rope-dim", 32, "--rank", 96),
            *("--max-shard-size", 2_000_000),
        ),
        "mla": fitted(source, calibration, "--method", "relatent", "--rope-dim", 32, "--rank", 96),
        "tpla": fitted(source, calibration, "--to", "tpla", "--branches", 2, "--per-device", 48),
    }


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def unfinished_work(out: Path) -> bool:
    """Whether there is something for --resume to do; with no journal, nothing says whose output OUT is."""
    return not out.exists() or (partial(out) / "journal").exists()


def contents(out: Path) -> Any:
    return support.folder_bytes(out) if out.is_dir() else out.read_bytes()


def kill_after(seconds: float, *arguments: Any) -> bool:
    """Kills a run, with all it started, unless it ends before; whether it was killed."""
    command = [str(support.binary()), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            complaint = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:
            assert process.returncode == 0, complaint
    return process.returncode != 0


def unfinished(make: Make, out: Path, entry: str = "") -> None:
    """Leaves a run behind that is killed as soon as its journal has (such) an entry."""
    command = [str(support.binary()), *map(str, make(out)), "--save-every", "0"]
    journal = partial(out) / "journal"
    for _ in range(50):
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if journal.exists() and f" {entry}" in journal.read_text().partition("begun\n")[2]:
                    break
            process.kill()
        if journal.exists():
            return
        # It ended first.
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    pytest.fail("every run ended before it could be killed")


@pytest.mark.parametrize("save_every", (0, None), ids=("every layer", "rarely"))
@pytest.mark.parametrize("kind", ("calibrate", "weights-only", "mla", "tpla"))
def test_killed(
    tmp_path: Path, llama: Path, calibration: Path, kind: str, save_every: int | None
) -> None:
    make = makes(llama, calibration)[kind]
    start = time.monotonic()
    support.relatent(*make(tmp_path / "whole"))
    taken = time.monotonic() - start
    expected = contents(tmp_path / "whole")
    every = () if save_every is None else ("--save-every", save_every)
    moments = MOMENTS if save_every == 0 else MOMENTS[::4]
    killed = 0
    for i, moment in enumerate(moments):
        out = tmp_path / f"out{i}"
        if kill_after(moment * taken, *make(out), *every):
            killed += 1
            assert not out.exists() or contents(out) == expected
            # Once more, on the way, unless the kill came when all was done.
            if i % 2 == 1 and unfinished_work(out):
                kill_after(taken / 4, *make(out), *every, "--resume")
        if unfinished_work(out):
            support.relatent(*make(out), *every, "--resume")
        elif partial(out).exists():
            # Killed between the last two steps: the journal is gone, its folder was not yet. Refused and tidied.
            support.refused(USAGE, *make(out), *every, "--resume")
        assert contents(out) == expected
        assert not partial(out).exists()
    assert killed >= len(moments) // 2
    print(f"{killed} of {len(moments)} killed, {taken:.2f} s undisturbed")


def test_work_is_kept(tmp_path: Path, llama: Path, calibration: Path) -> None:
    """What the journal says is done is not done again: trials, tensors and layers."""
    make = makes(llama, calibration)["tpla"]
    unfinished(make, tmp_path / "out", "trial")
    before = (partial(tmp_path / "out") / "journal").read_text()
    trials = before.count(" trial\t")
    assert trials > 0
    done = support.run(*(a for a in make(tmp_path / "out") if a != "--quiet"), "--resume")
    assert done.returncode == 0
    assert done.stderr.startswith("continuing an unfinished run\n")
    whole = support.run(*(a for a in make(tmp_path / "again") if a != "--quiet"))
    assert done.stderr.count("tried") == whole.stderr.count("tried") - trials


def test_refusals(tmp_path: Path, llama: Path, calibration: Path) -> None:
    source = support.copy_checkpoint(llama, tmp_path / "source")
    moments = tmp_path / "moments.h5"
    shutil.copy2(calibration, moments)
    out = tmp_path / "out"
    make = fitted(source, moments, "--rope-dim", 32, "--rank", 96)
    unfinished(make, out, "layers")
    kept = contents(partial(out))

    def refused(*arguments: Any) -> str:
        line = support.refused(USAGE, *arguments)
        assert str(partial(out)) in line
        assert contents(partial(out)) == kept
        return line

    line = refused(*make(out))
    assert "--resume" in line and "delete it" in line
    other = fitted(source, moments, "--rope-dim", 32, "--rank", 112)
    assert "--rank was 96 and is 112 now" in refused(*other(out), "--resume")
    assert "--dtype was not given" in refused(*make(out), "--dtype", "float16", "--resume")
    for path, name in (
        (moments, "the calibration was"),
        (source / "model.safetensors", "the source's model.safetensors was"),
        (source / "config.json", "the source's config.json was"),
    ):
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert name in refused(*make(out), "--resume")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    support.relatent(*make(tmp_path / "whole"))
    support.relatent(*make(out), "--resume")
    assert contents(out) == contents(tmp_path / "whole")


def test_refusals_of_calibrate(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "moments.h5"
    make = calibrate(llama)
    unfinished(make, out, "layers")
    line = support.refused(USAGE, *make(out))
    assert str(partial(out)) in line and "--resume" in line
    fewer = [7 if a == 9 else a for a in make(out)]
    line = support.refused(USAGE, *fewer, "--resume")
    assert "--sequences was 9 and is 7 now" in line
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.load(support.CALIBRATION_TOKENS)[1:])
    swapped = [tokens if a == support.CALIBRATION_TOKENS else a for a in make(out)]
    assert "tokens" in support.refused(USAGE, *swapped, "--resume")
    support.relatent(*make(out), "--resume")
    support.relatent(*make(tmp_path / "whole.h5"))
    assert contents(out) == contents(tmp_path / "whole.h5")


def test_nothing_to_resume_just_starts(tmp_path: Path, llama: Path, calibration: Path) -> None:
    for kind, make in makes(llama, calibration).items():
        if kind != "tpla":
            support.relatent(*make(tmp_path / kind), "--resume")
            support.relatent(*make(tmp_path / "whole"))
            assert contents(tmp_path / kind) == contents(tmp_path / "whole")
            whole = tmp_path / "whole"
            shutil.rmtree(whole) if whole.is_dir() else whole.unlink()


def heed_interrupts() -> None:
    """What a shell starts in the background is told to ignore the keyboard, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupted_from_the_keyboard(tmp_path: Path, llama: Path, calibration: Path) -> None:
    make = makes(llama, calibration)["mla"]
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        command = [str(support.binary()), *map(str, make(out)), "--save-every", "0"]
        for _ in range(50):
            with subprocess.Popen(
                command, stderr=subprocess.DEVNULL, preexec_fn=heed_interrupts
            ) as process:
                while process.poll() is None and not (partial(out) / "streams").exists():
                    time.sleep(0.005)
                process.send_signal(number)
            if process.returncode != 0:
                break
            # On a busy machine the run can be over before the signal is sent.
            shutil.rmtree(out)
        assert process.returncode == -number
        support.relatent(*make(out), "--resume")
    assert contents(tmp_path / "SIGINT") == contents(tmp_path / "SIGTERM")


def test_store_without_room(tmp_path: Path, llama: Path) -> None:
    """A limit on file sizes stands in for a full disk, as in test_bad_input."""
    make = calibrate(llama)
    support.relatent(*make(tmp_path / "whole.h5"))
    size = (tmp_path / "whole.h5").stat().st_size
    limit = int(0.7 * size)
    out = tmp_path / "out.h5"
    line = support.refused(
        MACHINE,
        *make(out),
        *("--save-every", 0),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        restore_signals=False,
    )
    assert str(out) in line
    assert not out.exists()
    if partial(out).exists():
        assert "--resume" in line
    support.relatent(*make(out), "--resume")
    assert contents(out) == contents(tmp_path / "whole.h5")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"FULL DISK NOT TESTED: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Takes all room but so much."""
    ballast = folder / "ballast"
    status = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)
    return ballast


@pytest.mark.parametrize("kind", ("calibrate", "weights-only", "mla"))
def test_full_disk(
    small_disk: Path, tmp_path: Path, llama: Path, calibration: Path, kind: str
) -> None:
    """At every amount of room: one sentence and exit 4, or the whole output."""
    make = makes(llama, calibration)[kind]
    support.relatent(*make(tmp_path / "whole"))
    expected = contents(tmp_path / "whole")
    size = (
        len(expected) if isinstance(expected, bytes) else sum(len(b) for b in expected.values())
    )
    out = small_disk / "out"
    resumable = 0
    room = range(size * 3 // 4, size * 5 // 2, size // 9)
    for leave in (0, 4096, size // 4, *room):
        ballast = fill(small_disk, leave)
        done = support.run(*make(out), "--save-every", 0)
        if done.returncode != 0:
            assert done.returncode == MACHINE, done.stderr
            assert done.stderr.count("\n") == 1 and done.stderr.startswith("relatent: ")
            assert not out.exists()
            assert partial(out).exists() == ("--resume" in done.stderr)
            resumable += partial(out).exists()
            ballast.unlink()
            support.relatent(*make(out), "--resume")
        assert contents(out) == expected
        assert not partial(out).exists()
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        ballast.unlink(missing_ok=True)
    assert resumable > 0


def test_every_option_is_in_the_journal(tmp_path: Path, llama: Path, calibration: Path) -> None:
    """An option that is added must not be forgotten when runs are compared."""
    out = tmp_path / "out"
    unfinished(fitted(llama, calibration, "--rope-dim", 32, "--rank", 96), out)
    journal = (partial(out) / "journal").read_text()
    names = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", support.relatent("convert", "--help")))
    assert len(names) > 20
    assert [n for n in names - SILENT if f" given {n}\t" not in journal] == []
