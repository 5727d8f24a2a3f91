"""Plants faults in converted checkpoints, one at a time, and sees whether `verify` finds each.

A row is one fault in one conversion: an edit of a copy, the layers of evidence that must notice it,
and what they said. A fault that nothing noticed fails the run unless KNOWN_MISSES says why it
cannot matter or cannot be noticed. An untouched conversion must verify without alarm.

  tests/attack/run.sh planted_faults --short               # a sample, in about a minute
  tests/attack/run.sh planted_faults --json rows.json      # everything; RELATENT_MODELS adds models
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import config_faults
import file_faults
import report_faults
import tensor_faults
from conversions import (
    CONVERSIONS,
    LARGER,
    LIMITS,
    Conversion,
    Outcome,
    Workshop,
    as_options,
    binary,
    largest,
    limits_above,
)
from faults import FINITENESS, FUNCTION, PREDICTION, REFUSED, SAID, STRUCTURE, Fault, Subject
from folders import REPORT, Damaged, Json, Original, forge

GENERATORS = (
    tensor_faults.whole_tensor_faults,
    tensor_faults.untouched_row_faults,
    file_faults.weight_file_faults,
    config_faults.config_faults,
    file_faults.side_file_faults,
    file_faults.stray_file_faults,
    report_faults.report_faults,
    report_faults.source_faults,
)
COLUMNS = (STRUCTURE, FINITENESS, FUNCTION, PREDICTION, REFUSED, SAID)

SHORT = 16  # faults that the short form plants in each conversion


# What `verify` allows a lossless conversion without being told, by the type of its weights.
LOSSLESS_LIMITS = {"F32": 1e-5, "BF16": 1e-2, "F16": 1e-3}
# Figures that differ by no more than this, and this part of themselves, are taken for the same:
# twice what `verify` grants to another machine's sums.
NOISE, RELATIVE_NOISE = 2e-4, 1e-2


@dataclass(frozen=True)
class KnownMiss:
    """Faults that may go unnoticed, by patterns of their conversion and name, and why."""

    conversion: str
    fault: str
    why: str
    felt: bool = False  # also where running the model gives other figures

    def covers(self, conversion: str, fault: str, same_figures: bool) -> bool:
        return (
            (self.felt or same_figures)
            and fnmatchcase(conversion, self.conversion)
            and fnmatchcase(fault, self.fault)
        )


FORGED_CONFIG = (
    "the report vouches for this config.json, and no figure depends on the key: a checksum guards"
    " against accidents, not against someone who makes it anew"
)
FORGED_CODE = (
    "the report vouches for this code, which `verify` does not run: a checksum guards against"
    " accidents, not against someone who makes it anew"
)
FORGED_ENTRY = (
    "a report with a new checksum of itself says what its forger likes; this entry has nothing in"
    " the folder that it would have to agree with"
)
COMPARED = "the file is compared with the source's, whatever the report says of it"
SAME_NUMBERS = "engines cast what they load, and no figure depends on the type it is stored in"
NO_REPORT = "without a report nobody knows what was written, and the verdict says so"
TOO_SMALL = "changes no figure by more than noise may: a figure of the report is not that sharp"
WITHIN_LIMITS = "stays within the limits, and `convert` measured nothing to compare with"
KNOWN_MISSES: tuple[KnownMiss, ...] = (
    KnownMiss("*", "config.json *, checksums forged", FORGED_CONFIG),
    KnownMiss("*", "*_relatent.py: *, checksums forged", FORGED_CODE),
    *(
        KnownMiss("*", f"{entry}: *, checksums forged", FORGED_ENTRY, felt=True)
        for entry in ("written_by", "method", "form", "engine", "dtype")
    ),
    *(
        KnownMiss("*", f"files {file}: *, checksums forged", COMPARED)
        for file in ("README.md", "chat_template.jinja", "generation_config.json", "tokenizer*")
    ),
    KnownMiss(
        "*",
        "files model.safetensors.index.json: *, checksums forged",
        "the index is compared with the weight files, whatever the report says of it",
    ),
    *(
        KnownMiss("*, no report", f"*: {what}", SAME_NUMBERS)
        for what in ("in another type", "in float16")
    ),
    KnownMiss("*, no report", "config.json *", NO_REPORT),
    KnownMiss("*, no report", "*: added", NO_REPORT),
    KnownMiss(
        "*",
        "*.safetensors: *metadata*",
        "no engine reads more of it than that it is there, and those that miss it say so",
    ),
    *(
        KnownMiss("*", f"{file}: added", why)
        for file, why in {
            "notes.md": "nobody reads it as a part of the model",
            ".gitattributes": "nobody reads it as a part of the model",
            "merges.txt": "tokenizer.json goes before it",
            "tf_model.h5": "no engine that reads these layouts reads it",
            "flax_model.msgpack": "no engine that reads these layouts reads it",
        }.items()
    ),
)


@dataclass
class Row:
    """One fault in one conversion and what became of it."""

    conversion: str
    group: str
    fault: str
    expected: list[str]
    code: int
    verdict: str
    noticed_by: list[str]
    said: str
    status: str
    why: str
    figures: Json
    effect: float  # of the figures: above 1 they are not those of the untouched conversion
    seconds: float


# What a row's status may be; the last four fail the run.
CAUGHT, KNOWN = "caught", "known miss"
MISSED, ELSEWHERE, UNNAMED, BROKEN = "MISSED", "CAUGHT ELSEWHERE", "NOT NAMED", "BROKEN"
FAILURES = (MISSED, ELSEWHERE, UNNAMED, BROKEN)


def noticed(outcome: Outcome) -> list[str]:
    if outcome.code == 3:
        return [REFUSED]
    if outcome.code == 1:
        return outcome.failed
    return [SAID] if outcome.unchecked and outcome.report.get("why") else []


def broken(outcome: Outcome) -> str:
    """What is wrong with how the program ended, whatever it found; empty when nothing is."""
    if outcome.code not in (0, 1, 3):
        return f"exit code {outcome.code}: {outcome.error[:300]}"
    if outcome.code == 3:
        lines = outcome.error.splitlines()
        is_one_sentence = len(lines) == 1 and lines[0].startswith("relatent: ")
        return "" if is_one_sentence else f"no single sentence: {outcome.error[:300]}"
    if bool(outcome.failed) != (outcome.code == 1):
        return f"exit code {outcome.code}, failed: {', '.join(outcome.failed) or 'nothing'}"
    return ""


def effect_of(before: Json, after: Json) -> float:
    """By how many times what counts as noise the figure has changed that has changed most."""

    def change(old: float | None, new: float | None) -> float:
        if old is None or new is None:
            return 0.0 if old is new else math.inf
        return abs(new - old) / (NOISE + RELATIVE_NOISE * abs(old))

    changes = [change(before[key], after[key]) for key in ("nats", "mean_kl", "rel_logit_error")]
    layers = zip(before["attention_rel_error"], after["attention_rel_error"], strict=True)
    return max([*changes, *(change(*layer) for layer in layers)])


@dataclass(frozen=True)
class Untouched:
    """What `verify` says of a conversion before anything is done to it."""

    conversion: Conversion
    subject: Subject
    figures: Json
    limits: dict[str, float]  # given by hand

    @property
    def all_limits(self) -> dict[str, float]:
        """With what a lossless conversion is held to without being told."""
        report = self.subject.original.report
        if report is None or report["method"] != "lossless":
            return self.limits
        return {"--max-rel-error": LOSSLESS_LIMITS[report["dtype"]], **self.limits}

    def excuse(self, fault: Fault, figures: Json) -> str:
        """Why a fault may go unnoticed that gives these figures; empty when it may not."""
        effect = effect_of(self.figures, figures)
        for known in KNOWN_MISSES:
            if known.covers(self.conversion.name, fault.name, effect <= 1):
                return known.why
        if not set(fault.caught_by) & {FUNCTION, PREDICTION}:
            return ""
        if self.subject.has_probe:
            return TOO_SMALL if effect <= 1 else ""
        limits = self.all_limits
        within = all(largest(figures[LIMITS[flag]]) <= limit for flag, limit in limits.items())
        return WITHIN_LIMITS if limits and within else ""


def judge(untouched: Untouched, fault: Fault, outcome: Outcome) -> tuple[str, str]:
    """The status of a row and why."""
    problem = broken(outcome)
    if problem:
        return BROKEN, problem
    found = noticed(outcome)
    as_expected = [layer for layer in found if layer in fault.caught_by]
    if as_expected:
        named = [layer for layer in as_expected if layer in (STRUCTURE, FINITENESS, REFUSED)]
        texts = [outcome.error, *(text for layer in named for text in outcome.texts(layer))]
        if fault.mentions and named and not any(fault.mentions in text for text in texts):
            return UNNAMED, f"nothing that was said names {fault.mentions}"
        return CAUGHT, ""
    if found and found != [SAID]:
        return ELSEWHERE, f"by {', '.join(found)}, not by {' or '.join(fault.caught_by)}"
    why = untouched.excuse(fault, outcome.figures())
    return (KNOWN, why) if why else (MISSED, "")


def sentence(outcome: Outcome) -> str:
    """The first thing that was said of what is wrong."""
    texts = [text for layer in outcome.failed for text in outcome.texts(layer) if text != "failed"]
    return next(iter(texts), outcome.error or outcome.report.get("why", ""))


class Sample:
    """Some faults of every conversion, all of different kinds as long as there are any."""

    def __init__(self, size: int):
        self.size = size
        self.seen: set[tuple[str, str, bool]] = set()

    def of(self, faults: list[Fault]) -> list[Fault]:
        random.Random(len(self.seen)).shuffle(faults)
        # Half of them are such as only running the model can find.
        felt = [
            fault
            for fault in faults
            if STRUCTURE not in fault.caught_by and {FUNCTION, PREDICTION} & set(fault.caught_by)
        ]
        return self.take(felt, self.size // 2) + self.take(faults, self.size - self.size // 2)

    def take(self, faults: list[Fault], count: int) -> list[Fault]:
        out: list[Fault] = []
        for fault in faults:
            kind = (fault.group, fault.what, fault.is_forged)
            if len(out) < count and kind not in self.seen:
                self.seen.add(kind)
                out.append(fault)
        return out


class Matrix:
    """Runs the faults of one conversion after the other."""

    def __init__(self, workshop: Workshop, pattern: str, sample: Sample | None, every: int):
        self.workshop = workshop
        self.pattern = pattern
        self.sample = sample
        self.every = every
        self.rows: list[Row] = []
        self.false_alarms: list[str] = []
        self.unchanged = 0
        self.sources: dict[str, Original] = {}

    def subject(self, conversion: Conversion, other: Conversion | None) -> Subject:
        source = self.sources.setdefault(
            conversion.source, Original(self.workshop.source(conversion.source))
        )
        original = Original(self.workshop.convert(conversion))
        report = original.report
        probe = report["probe"] if report else None
        layers = original.config.get("num_hidden_layers") or original.config["n_layer"]
        is_lossless = report is not None and report["method"] == "lossless"
        return Subject(
            original,
            source,
            Original(self.workshop.convert(other)) if other else None,
            has_limits=is_lossless or conversion.limits_by_hand,
            touched=frozenset(self.workshop.validation.tolist())
            | frozenset(probe["tokens"] if probe else ()),
            layers=(0, layers - 1),
        )

    def verify(self, subject: Subject, fault: Fault, limits: dict[str, float]) -> Outcome | None:
        """None when the edit changed nothing."""
        damaged = Damaged(
            subject.source if fault.on_source else subject.original,
            self.workshop.folder / "damaged",
        )
        try:
            fault.change(damaged)
            if not damaged.differs():
                return None
            source = damaged.path if fault.on_source else subject.source.path
            converted = subject.original.path if fault.on_source else damaged.path
            return self.workshop.verify(source, converted, *as_options(limits))
        finally:
            shutil.rmtree(damaged.path)

    def plant(self, conversion: Conversion, other: Conversion | None) -> None:
        subject = self.subject(conversion, other)
        untouched = self.check_untouched(conversion, subject)
        for fault in self.faults_in(subject):
            begin = time.perf_counter()
            outcome = self.verify(subject, fault, untouched.limits)
            if outcome is None:
                self.unchanged += 1
                continue
            status, why = judge(untouched, fault, outcome)
            figures = outcome.figures()
            row = Row(
                conversion.name,
                fault.group + ", forged" * fault.is_forged,
                fault.name,
                list(fault.caught_by),
                outcome.code,
                outcome.report.get("verdict", ""),
                noticed(outcome),
                sentence(outcome),
                status,
                why,
                figures,
                effect_of(untouched.figures, figures) if figures else math.inf,
                round(time.perf_counter() - begin, 3),
            )
            self.rows.append(row)
            if status in FAILURES:
                print(f"{status}: {row.conversion}: {row.fault} {why}", flush=True)

    def as_json(self) -> str:
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"rows": rows, "false_alarms": self.false_alarms}, indent=1)

    def faults_in(self, subject: Subject) -> Iterator[Fault]:
        faults = (fault for generate in GENERATORS for fault in generate(subject))
        matching = (fault for fault in faults if fnmatchcase(fault.name, self.pattern))
        if self.sample is not None:
            return iter(self.sample.of(list(matching)))
        return islice(matching, len(self.rows) % self.every, None, self.every)

    def check_untouched(self, conversion: Conversion, subject: Subject) -> Untouched:
        """Nothing may be said against a conversion before anything is done to it."""
        limits: dict[str, float] = {}
        outcome = self.workshop.verify(subject.source.path, subject.original.path)
        if conversion.limits_by_hand:
            limits = limits_above(outcome)
            outcome = self.workshop.verify(
                subject.source.path, subject.original.path, *as_options(limits)
            )
        if outcome.code != 0 or outcome.failed or broken(outcome):
            self.false_alarms.append(f"{conversion.name}: exit {outcome.code}, {sentence(outcome)}")
            print(f"FALSE ALARM: {self.false_alarms[-1]}", flush=True)
        if subject.has_report:
            # Otherwise a fault would be found by a forgery that is none.
            copy = Damaged(subject.original, self.workshop.folder / "damaged")
            forge(copy)
            assert json.loads(copy.read(REPORT)) == subject.original.report
            shutil.rmtree(copy.path)
        return Untouched(conversion, subject, outcome.figures(), limits)


def neighbours(
    conversions: tuple[Conversion, ...],
) -> Iterator[tuple[Conversion, Conversion | None]]:
    """Every conversion and another of the same source, which has a report."""
    for conversion in conversions:
        others = [
            other
            for other in conversions
            if other.source == conversion.source
            and other.has_report
            and other.is_calibrated == conversion.is_calibrated
            and other is not conversion
        ]
        yield conversion, next(iter(others), None)


def table(rows: list[Row]) -> str:
    """Faults by conversion and layer of evidence, each counted for every layer that noticed it."""
    lines: list[tuple[str, ...]] = [("conversion", "faults", *COLUMNS, "known miss", "failures")]
    for conversion in dict.fromkeys(row.conversion for row in rows):
        here = [row for row in rows if row.conversion == conversion]
        counts = Counter(layer for row in here for layer in row.noticed_by)
        status = Counter("failures" if row.status in FAILURES else row.status for row in here)
        numbers = [
            len(here),
            *(counts[column] for column in COLUMNS),
            status[KNOWN],
            status["failures"],
        ]
        lines.append((conversion, *map(str, numbers)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def summary(matrix: Matrix) -> str:
    rows = matrix.rows
    parts = [table(rows)]
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        if row.status == KNOWN:
            by_reason.setdefault(row.why, []).append(row)
    for why, known in by_reason.items():
        parts.append(f"not noticed, {len(known)}: {why}")
        parts += [f"  {row.conversion}: {row.fault}" for row in known]
    for status in FAILURES:
        parts += [
            f"{status}: {row.conversion}: {row.fault} {row.why}"
            for row in rows
            if row.status == status
        ]
    parts += [f"FALSE ALARM: {alarm}" for alarm in matrix.false_alarms]
    counts = Counter(row.status for row in rows)
    parts.append(
        f"{len(rows)} faults: {counts[CAUGHT]} caught, {counts[KNOWN]} known misses,"
        f" {sum(counts[status] for status in FAILURES)} failures,"
        f" {len(matrix.false_alarms)} false alarms"
    )
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a sample of all faults")
    parser.add_argument("--every", type=int, default=1, help="only every n-th fault")
    parser.add_argument("--conversions", default="*", help="a pattern of their names")
    parser.add_argument("--faults", default="*", help="a pattern of their names")
    parser.add_argument("--work", type=Path, help="a folder to make (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write all rows there")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    print(f"program: {binary()}")
    with tempfile.TemporaryDirectory(prefix="relatent-faults-") as folder:
        workshop = Workshop(options.work or Path(folder) / "work")
        sample = Sample(SHORT) if options.short else None
        matrix = Matrix(workshop, options.faults, sample, options.every)
        conversions = CONVERSIONS + (LARGER if os.environ.get("RELATENT_MODELS") else ())
        if options.short:
            conversions = tuple(conversion for conversion in CONVERSIONS if conversion.is_quick)
        for conversion, other in neighbours(conversions):
            if fnmatchcase(conversion.name, options.conversions):
                matrix.plant(conversion, other)
                if options.json:
                    options.json.write_text(matrix.as_json())
    print(summary(matrix))
    print(f"{time.perf_counter() - begin:.0f} s")
    return 1 if matrix.false_alarms or any(r.status in FAILURES for r in matrix.rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
