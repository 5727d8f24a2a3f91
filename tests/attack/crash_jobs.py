"""The commands under attack, and what each of them makes when left alone."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from harness import Tiny

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


@dataclass
class Changing:
    """A job whose inputs are copies that may be changed, with others to put in their place."""

    job: Job
    originals: Path
    others: Path
    inputs: Path
    names: tuple[str, ...]

    def restore(self) -> None:
        for name in self.names:
            harness.remove(self.inputs / name)
            shutil.copy2(self.originals / name, self.inputs / name)


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
