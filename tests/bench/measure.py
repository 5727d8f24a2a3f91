"""Runs a command and says what it took: time, memory by kind, disk traffic. Linux only.

Resident memory is told apart into anonymous pages, which only this command has and which must fit
into the machine's memory, and pages mapped from files, which the kernel may drop whenever it likes
and which a run over mapped weights collects while there is room. The command's children count, too.

  tests/bench/measure.py [--json F.json] -- relatent convert MODEL -o OUT ...
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

INTERVAL = 0.02
# smaps_rollup walks the page tables under a lock of the process: exact, but not for every sample.
ROLLUP_INTERVAL = 0.5


@dataclass
class Usage:
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # user and system
    peak_anonymous_bytes: int = 0
    peak_mapped_bytes: int = 0  # pages of files, those of libraries included
    peak_resident_bytes: int = 0  # the two at one time
    disk_read_bytes: int = 0  # what really came from the disk; 0 when it was cached
    disk_written_bytes: int = 0  # what went into the cache to be written
    samples: int = 0


class CommandError(RuntimeError):
    """A measured command that did not end well; says how and its last words."""


def fields(text: str) -> dict[str, int]:
    """The numeric lines `Name: value [kB]` of a file of /proc, in its own unit."""
    out = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            out[name] = int(words[0])
    return out


def read_fields(process: int, file: str) -> dict[str, int]:
    """Nothing for a process that is gone."""
    try:
        return fields(Path(f"/proc/{process}/{file}").read_text())
    except OSError:
        return {}


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    out = [root]
    for process in out:
        try:
            threads = os.listdir(f"/proc/{process}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                text = Path(f"/proc/{process}/task/{thread}/children").read_text()
            except OSError:
                continue
            out += map(int, text.split())
    return out


class Sampler(threading.Thread):
    """Watches a process and its children until stopped."""

    def __init__(self, root: int, usage: Usage, interval: float) -> None:
        super().__init__(daemon=True)
        self.root = root
        self.usage = usage
        self.interval = interval
        self.done = threading.Event()
        self.next_rollup = 0.0
        self.input_output: dict[int, dict[str, int]] = {}

    def run(self) -> None:
        while True:
            self.sample()
            if self.done.wait(self.interval):
                return

    def sample(self) -> None:
        anonymous = mapped = high = 0
        exact = time.perf_counter() >= self.next_rollup
        if exact:
            self.next_rollup = time.perf_counter() + ROLLUP_INTERVAL
        processes = family(self.root)
        for process in processes:
            status = read_fields(process, "status")
            own = 1024 * (status.get("RssAnon", 0) + status.get("RssShmem", 0))
            files = 1024 * status.get("RssFile", 0)
            if exact:
                # The kernel gathers status's counters in batches; these are counted.
                rollup = read_fields(process, "smaps_rollup")
                own = max(own, 1024 * rollup.get("Anonymous", 0))
            anonymous += own
            mapped += files
            # Knows peaks between samples; those of several processes need not be of one time.
            high = max(high, 1024 * status.get("VmHWM", 0))
        usage = self.usage
        usage.peak_anonymous_bytes = max(usage.peak_anonymous_bytes, anonymous)
        usage.peak_mapped_bytes = max(usage.peak_mapped_bytes, mapped)
        usage.peak_resident_bytes = max(usage.peak_resident_bytes, anonymous + mapped, high)
        usage.samples += 1

    def finish(self) -> None:
        """To be called between the end of the process and its burial."""
        self.done.set()
        self.join()
        # Includes the children that it has waited for.
        total = read_fields(self.root, "io")
        self.usage.disk_read_bytes = total.get("read_bytes", 0)
        self.usage.disk_written_bytes = total.get("write_bytes", 0)


def measure(
    command: list[str], capture: bool = False, interval: float = INTERVAL, **environment: str
) -> tuple[Usage, str]:
    """Runs a command to its end: what it took, and its stdout if captured.

    Throws CommandError when it fails; its stderr is then part of the message if captured.
    """
    usage = Usage()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=out if capture else None,
            stderr=err if capture else None,
            env={**os.environ, **environment},
        )
        sampler = Sampler(process.pid, usage, interval)
        sampler.start()
        try:
            # The process stays a zombie until wait4, so that its counters can still be read.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        except BaseException:
            process.kill()
            process.wait()
            sampler.done.set()
            raise
        usage.seconds = time.perf_counter() - start
        sampler.finish()
        _, status, spent = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        # Not its ru_maxrss, which knows the fork of this process from before the command took over.
        usage.cpu_seconds = spent.ru_utime + spent.ru_stime
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            how = f"exited {process.returncode}"
            if process.returncode < 0:
                how = f"was ended by {signal.Signals(-process.returncode).name}"
            words = err.read().strip().splitlines() if capture else []
            raise CommandError(": ".join([f"{command[0]} {how}", *words[-1:]]))
        return usage, out.read() if capture else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--interval", type=float, default=INTERVAL, help="seconds between samples")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[options.command[:1] == ["--"] :]
    if not command:
        parser.error("no command")
    try:
        usage, _ = measure(command, interval=options.interval)
    except (CommandError, OSError) as error:
        sys.exit(str(error))
    if options.json:
        options.json.write_text(json.dumps(asdict(usage), indent=2) + "\n")
    print(
        f"{usage.seconds:.2f} s, {usage.cpu_seconds:.2f} s of processor; "
        f"peak anonymous {usage.peak_anonymous_bytes / 1e6:.0f} MB, "
        f"mapped {usage.peak_mapped_bytes / 1e6:.0f} MB, "
        f"resident {usage.peak_resident_bytes / 1e6:.0f} MB; "
        f"disk read {usage.disk_read_bytes / 1e6:.0f} MB, "
        f"written {usage.disk_written_bytes / 1e6:.0f} MB",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
