"""What attacks on files and runs share: a tiny checkpoint, the program, a table of findings.

No torch: a checkpoint that small is written by hand, and every run of the program takes some
hundredths of a second.
"""

import argparse
import ctypes
import ctypes.util
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG, filemode
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "examples" / "llama-3m"
TOKENS = ROOT / "examples" / "tokens" / "calibration.npy"

# Lines that may stand before a complaint: warnings, and what a library says before main begins.
BESIDE = ("warning: ", "OpenBLAS blas_thread_init: ")

USAGE, INPUT, MACHINE = 2, 3, 4
REFUSALS = (USAGE, INPUT, MACHINE)

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, VOCABULARY = 3, 64, 4, 2, 16, 64
SIZES = ("--rope-dim", 8, "--rank", 24)


def binary() -> Path:
    return Path(os.environ.get("RELATENT_BIN", ROOT / "build/release/cli/relatent")).resolve()


def require_binary() -> None:
    if not os.access(binary(), os.X_OK):
        sys.exit(f"no program at {binary()}: build it first or set RELATENT_BIN")


# Running


@dataclass
class Outcome:
    """How a run of the program ended; code -N is death by signal N, None a hang that was ended."""

    command: list[str]
    code: int | None
    stdout: str
    stderr: str

    def words(self) -> str:
        ending = "hung" if self.code is None else f"exit {self.code}"
        if self.code is not None and self.code < 0:
            ending = f"died of {signal.Signals(-self.code).name}"
        said = self.stderr.strip() or "(nothing on stderr)"
        return f"{ending}: {said[:600]}"


def run(
    *arguments: Any,
    timeout: float = 60,
    during: Callable[[subprocess.Popen[bytes]], None] | None = None,
    **kwargs: Any,
) -> Outcome:
    """Runs the program whatever comes of it; `during` may interfere while it runs."""
    command = [str(binary()), *map(str, arguments)]
    # Pipes rather than files, which a limit on file sizes would touch too.
    streams: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    with subprocess.Popen(command, **{**streams, **kwargs}) as process:
        if during is not None:
            during(process)
        code: int | None = None
        # Twice: where all of this was stopped for a while, the time may be over at once.
        for _ in range(2):
            with suppress(subprocess.TimeoutExpired):
                texts = process.communicate(timeout=timeout)
                code = process.returncode
                break
        else:
            process.kill()
            texts = process.communicate()
    printed, complaint = ((text or b"").decode(errors="replace") for text in texts)
    return Outcome(command, code, printed, complaint)


def done(*arguments: Any, **kwargs: Any) -> Outcome:
    """Runs the program, which must succeed."""
    outcome = run(*arguments, **kwargs)
    if outcome.code != 0:
        sys.exit(f"{' '.join(outcome.command)}\n{outcome.words()}")
    return outcome


def why_no_refusal(outcome: Outcome, codes: tuple[int, ...], *named: Path) -> str:
    """What is wrong with a refusal: the code, or not one sentence, or none of the files in it."""
    if outcome.code not in codes:
        return f"expected exit {' or '.join(map(str, codes))}, got {outcome.words()}"
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith(BESIDE)]
    if len(lines) != 1 or not lines[0].startswith("relatent: "):
        return f"expected one sentence, got {len(lines)} lines: {outcome.stderr[:600]!r}"
    if named and not any(str(path) in lines[0] for path in named):
        return f"the sentence names no file: {lines[0]}"
    return ""


def leave_partial(
    out: Path, command: tuple[Any, ...], enough: Callable[[list[str]], bool], tries: int = 200
) -> bool:
    """Kills runs of a command until one has left so much of a journal; whether one has."""
    journal = partial(out) / "journal"

    def kill(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            if enough(entries(journal)):
                process.kill()

    for _ in range(tries):
        outcome = run(*command, "--save-every", 0, during=kill)
        if outcome.code == -signal.SIGKILL and not out.exists() and enough(entries(journal)):
            return True
        remove(out)
        remove(partial(out))
    return False


# Files


def leave_complete(out: Path, command: tuple[Any, ...]) -> bool:
    """Leaves a run behind that is done but for the last rename, since its name was taken."""

    def take_name(process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None and not partial(out).exists():
            pass
        out.mkdir()

    outcome = run(*command, "--save-every", 0, during=take_name)
    out.rmdir()
    return outcome.code in REFUSALS and "complete\t" in entries(partial(out) / "journal")


def entries(journal: Path) -> list[str]:
    """What a run has done, without what it was asked for."""
    try:
        lines = journal.read_text(errors="replace").splitlines()[1:]
    except FileNotFoundError:
        return []
    bodies = [line.partition(" ")[2] for line in lines]
    return [body for body in bodies if not body.startswith("given ") and body != "begun"]


def partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a folder, or one file under the name ''; of links and the like their kind."""

    def read(file: Path) -> bytes:
        mode = file.lstat().st_mode
        return file.read_bytes() if S_ISREG(mode) else f"no file: {filemode(mode)}".encode()

    if not path.is_dir():
        return {"": read(path)}
    files = sorted(p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
    return {p.relative_to(path).as_posix(): read(p) for p in files}


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    """Where two folders differ, in words; empty where they do not."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is there and should not be"
        if found[name] != expected[name]:
            a, b = found[name], expected[name]
            if len(a) != len(b):
                return f"{name or 'the file'} has {len(a)} bytes instead of {len(b)}"
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            return f"{name or 'the file'} differs from byte {at} on"
    return ""


def not_as(out: Path, expected: dict[str, bytes]) -> str:
    """Why what lies under a name is not what is expected there; empty where it is."""
    if out.is_symlink() or not out.exists():
        return f"there is no {out}"
    return difference(contents(out), expected)


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Names, kinds, permissions and contents of all below a folder, links not followed."""
    out: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        what: Any = None
        if S_ISLNK(status.st_mode):
            what = os.readlink(path)
        elif S_ISREG(status.st_mode):
            what = path.read_bytes()
        out[path.relative_to(folder).as_posix()] = (status.st_mode, what)
    return out


# The checkpoint


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Arrays of uint16 are taken for bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind = {"<u2": "BF16", "<f4": "F32"}[tensor.dtype.str]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def tiny_checkpoint(folder: Path, seed: int = 7) -> Path:
    """A llama of three layers with random weights, 200 kB."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(seed)
    config = json.loads((LLAMA / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text('{"bos_token_id": 0}\n')
    keys = KV_HEADS * HEAD
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (2 * HIDDEN, HIDDEN),
        "mlp.up_proj": (2 * HIDDEN, HIDDEN),
        "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
    }
    tensors = {"model.embed_tokens.weight": chance.normal(size=(VOCABULARY, HIDDEN))}
    for layer in range(LAYERS):
        root = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{root}{name}.weight"] = chance.uniform(0.5, 1.5, HIDDEN)
        for name, shape in shapes.items():
            weight = chance.normal(size=shape) / np.sqrt(shape[1])
            # As in trained models: keys and values have spectra that fall.
            if name.endswith(("k_proj", "v_proj")):
                weight *= 0.8 ** np.arange(shape[0])[:, None]
            tensors[f"{root}{name}.weight"] = weight
    tensors["model.norm.weight"] = chance.uniform(0.5, 1.5, HIDDEN)
    stored = {name: bfloat16(tensor) for name, tensor in tensors.items()}
    write_safetensors(folder / "model.safetensors", stored)
    return folder


def tiny_tokens(path: Path, seed: int = 8) -> Path:
    np.save(path, np.random.default_rng(seed).integers(0, VOCABULARY, 640).astype(np.uint16))
    return path


@dataclass(frozen=True)
class Tiny:
    """The tiny checkpoint, its calibration, and commands on them that want an output."""

    source: Path
    tokens: Path
    calibration: Path

    def calibrate(self, out: Path) -> tuple[Any, ...]:
        span = ("--sequences", 9, "--length", 64)
        return ("calibrate", self.source, "--tokens", self.tokens, "-o", out, *span, "--quiet")

    def convert(self, out: Path, *options: Any) -> tuple[Any, ...]:
        return ("convert", self.source, "-o", out, *SIZES, "--quiet", *options)

    def weights_only(self, out: Path) -> tuple[Any, ...]:
        return self.convert(out, "--method", "weights-only")

    def fitted(self, out: Path, *options: Any) -> tuple[Any, ...]:
        fits = ("--calibration", self.calibration, "--fit-rounds", 1, "--fit-stride", 4)
        return self.convert(out, *fits, *options)


def tiny(folder: Path) -> Tiny:
    out = Tiny(
        tiny_checkpoint(folder / "tiny"), tiny_tokens(folder / "tokens.npy"), folder / "moments.h5"
    )
    done(*out.calibrate(out.calibration))
    return out


# Checksums


class Digest128(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


@cache
def xxhash_library() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("xxhash")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.XXH3_128bits.restype = Digest128
    library.XXH3_128bits.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    return library


def xxh3(data: bytes) -> str:
    """XXH3-128 as the program writes it."""
    library = xxhash_library()
    assert library is not None
    digest = library.XXH3_128bits(data, len(data))
    return f"{digest.high:016x}{digest.low:016x}"


# Findings


def no_plain_files(folder: str, names: list[str]) -> list[str]:
    """What cannot be copied: pipes, sockets and devices."""
    modes = {name: Path(folder, name).lstat().st_mode for name in names}
    return [n for n, m in modes.items() if not (S_ISREG(m) or S_ISDIR(m) or S_ISLNK(m))]


@dataclass
class Table:
    """What came of each kind of attack, and what should not have come of it."""

    name: str
    keep: Path | None = None
    rows: dict[str, Counter[str]] = field(default_factory=dict)
    findings: dict[str, Counter[str]] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    # Reproducers of every further finding of a kind would only fill the disk.
    kept_of_a_kind = 3

    def count(self, kind: str, result: str, number: int = 1) -> None:
        self.rows.setdefault(kind, Counter())[result] += number

    def skip(self, what: str) -> None:
        self.skipped.append(what)
        print(f"SKIPPED: {what}", file=sys.stderr, flush=True)

    def finding(
        self, kind: str, what: str, why: str, case: str, outcomes: list[Outcome], *files: Path
    ) -> None:
        """Something that must not be: told at once, and kept with the files that show it."""
        self.count(kind, "FINDING")
        of_kind = self.findings.setdefault(kind, Counter())
        of_kind[what] += 1
        if of_kind[what] > self.kept_of_a_kind:
            return
        print(f"FINDING {kind}, {what} ({case}): {why}", file=sys.stderr, flush=True)
        if self.keep is None:
            self.keep = Path(tempfile.mkdtemp(prefix=f"relatent-{self.name}-"))
        words = "".join(c if c.isalnum() else "-" for c in f"{kind}-{what}-{case}")
        folder = self.keep / words[:120]
        remove(folder)
        folder.mkdir(parents=True)
        text = f"{kind}, {what}\n{case}\n{why}\n"
        for outcome in outcomes:
            text += f"\n{' '.join(outcome.command)}\n{outcome.words()}\n"
        (folder / "finding.txt").write_text(text)
        for file in files:
            if file.is_symlink() or not file.exists():
                continue
            if file.is_dir():
                shutil.copytree(file, folder / file.name, symlinks=True, ignore=no_plain_files)
            elif file.is_file():
                shutil.copy2(file, folder / file.name)
        self.kept.append(folder)

    def report(self) -> int:
        """Prints the table; the exit code."""
        results = sorted({result for row in self.rows.values() for result in row})
        width = max((len(kind) for kind in self.rows), default=0)
        columns = [max(len(result), 5) for result in results]
        print(f"\n{self.name}: {self.total()} attacks in {time.monotonic() - self.begun:.0f} s")
        heads = "  ".join(r.rjust(w) for r, w in zip(results, columns, strict=True))
        print(f"{'':{width}}  {heads}")
        for kind, row in self.rows.items():
            cells = (str(row[r] or ".").rjust(w) for r, w in zip(results, columns, strict=True))
            print(f"{kind:{width}}  {'  '.join(cells)}")
        for what in self.skipped:
            print(f"SKIPPED: {what}")
        for kind, of_kind in self.findings.items():
            for what, number in of_kind.items():
                print(f"FINDING, {number} times: {kind}, {what}")
        for folder in self.kept:
            print(f"reproducer: {folder}")
        return 1 if self.findings else 0

    def total(self) -> int:
        return sum(sum(row.values()) for row in self.rows.values())


@contextmanager
def workplace(memory: bool) -> Iterator[Path]:
    """A temporary folder, in memory where files are many and what a disk does is not the point."""
    shared = Path("/dev/shm")
    where = shared if memory and os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="relatent-attack-", dir=where) as folder:
        yield Path(folder)


# Command lines


def arguments(text: str, seconds: float = 60) -> argparse.Namespace:
    """The options of every script; without a count it goes on for so many seconds in all."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, help="so many cases, however long that takes")
    parser.add_argument("--seconds", type=float, default=seconds, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="other seeds, other cases")
    parser.add_argument("--case", type=int, help="only the case of this number")
    parser.add_argument("--keep", type=Path, help="folder for what reproduces findings")
    args = parser.parse_args()
    require_binary()
    args.end = time.monotonic() + args.seconds
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A shell's background jobs ignore the keyboard, and so would what is interrupted here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return args


def cases(args: argparse.Namespace) -> Iterator[tuple[int, random.Random]]:
    """Numbers of cases with the chance that belongs to each, until there were enough."""
    numbers = itertools.count() if args.case is None else [args.case]
    for number in numbers:
        if args.count is not None and number >= args.count and args.case is None:
            return
        if args.count is None and args.case is None and time.monotonic() >= args.end:
            return
        yield number, random.Random(f"{args.seed} {number}")
