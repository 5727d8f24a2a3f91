"""README.md and docs/: their commands run, their output is what the program prints, their links lead somewhere.

A block of sh behind a line `<!-- run -->` is run, one after the other for each document, in a temporary copy of
what the repository offers a reader, with `relatent` on the path. It must exit with 0.

A block behind `<!-- output -->` is what the block before it prints. Its lines must be printed in that order;
others may stand between them, such as progress, and a line `...` says that some do. Words are compared
exactly. Numbers may differ by 2 % of themselves or 0.002, since processors round differently, and by
anything where they are times, speeds, amounts of memory or checksums. Spaces do not count.
"""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import support

DOCUMENTS = [support.ROOT / "README.md", *sorted((support.ROOT / "docs").glob("*.md"))]
RUNNABLE = ("README.md", "docs/tutorial.md")

RELATIVE, ABSOLUTE = 2e-2, 2e-3

# Where `relatent` does not stand for itself: options of other programs.
FOREIGN_OPTIONS = {
    "vLLM": {"--model-impl", "--tensor-parallel-size", "--trust-remote-code", "--dcp-size"},
    "CMake": {"--preset", "--build"},
}
# Of scripts of this repository, by the folder in which they are defined.
SCRIPTS = ("tests/bench",)

BLOCK = re.compile(r"(?:^<!-- (run|output) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z0-9-]*")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

FREE = re.compile(
    r"\b\d[\d.]*(?:e[+-]?\d+)? ?(?:s|ms|min|h|[kKMGT]?i?B|bytes|tokens/s)(?![\w/])|\b[0-9a-f]{32}\b"
)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass
class Step:
    script: str
    output: list[str] = field(default_factory=list)


def steps_of(text: str) -> list[Step]:
    """The blocks that are run, with what they print."""
    steps: list[Step] = []
    for mark, language, body in BLOCK.findall(text):
        if mark == "run":
            assert language == "sh", f"only sh can be run, not {language!r}:\n{body}"
            steps.append(Step(body))
        elif mark == "output":
            assert steps, f"an output with nothing before it:\n{body}"
            steps[-1].output = [line for line in body.splitlines() if line.strip() not in ("", "...")]
    return steps


def agrees(shown: str, printed: str) -> bool:
    """Whether a line that a document shows stands for one that was printed."""
    shown, printed = (FREE.sub("<free>", line) for line in (shown, printed))
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(
        math.isclose(float(a), float(b), rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in pairs
    )


def first_missing(shown: list[str], printed: list[str]) -> str | None:
    """The first line of a document that was not printed, or not in its place."""
    rest: Iterator[str] = iter(printed)
    return next((s for s in shown if not any(agrees(s, line) for line in rest)), None)


@pytest.fixture
def reader(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder as a reader has it, and an environment with `relatent` on the path."""
    copy = tmp_path / "copy"
    shutil.copytree(
        support.EXAMPLES, copy / "examples", ignore=shutil.ignore_patterns("out")
    )
    shutil.copyfile(support.ROOT / "LICENSE", copy / "LICENSE")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "relatent").symlink_to(support.binary())
    (programs / "python3").symlink_to(sys.executable)
    # The interpreter's own folder, for a link alone would not find its packages.
    python = str(Path(sys.executable).parent)
    path = os.pathsep.join((str(programs), python, os.environ["PATH"]))
    return copy, {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("name", RUNNABLE)
def test_commands_do_what_is_shown(name: str, reader: tuple[Path, dict[str, str]]) -> None:
    folder, environment = reader
    steps = steps_of((support.ROOT / name).read_text())
    assert steps, f"{name} has no blocks to run"
    for step in steps:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", step.script],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{step.script}\nexited {done.returncode}:\n{done.stdout}"
        printed = done.stdout.replace("\r", "\n").splitlines()
        missing = first_missing(step.output, printed)
        assert missing is None, f"not printed: {missing}\nby\n{step.script}\nbut\n{done.stdout}"


def help_of(*command: str) -> str:
    return support.relatent(*command, "--help")


def known_options() -> set[str]:
    commands = re.findall(r"^  ([a-z]+)  ", help_of().split("Subcommands:")[1], re.MULTILINE)
    texts = [help_of(), *(help_of(command) for command in commands)]
    return {option for text in texts for option in OPTION.findall(text)} | {"--help"}


def script_options() -> set[str]:
    files = [f for folder in SCRIPTS for f in (support.ROOT / folder).glob("*.py")]
    return {
        option for f in files for option in re.findall(r'add_argument\(\s*"(--[a-z-]+)"', f.read_text())
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_exist(document: Path) -> None:
    text = document.read_text()
    known = known_options()
    anywhere = known | script_options() | set().union(*FOREIGN_OPTIONS.values())
    assert not (unknown := set(OPTION.findall(text)) - anywhere), f"no such options: {unknown}"
    # A command line of relatent has options of that command only.
    for line in re.findall(r"\brelatent [a-z]+ .*--.*", text.replace("\\\n", " ")):
        found = re.match(r"relatent ([a-z]+)\s+(?:[^#`]|`(?!,))*", line)
        if found and found[1] in COMMANDS:
            options = set(OPTION.findall(found[0].split("`")[0]))
            unknown = options - set(OPTION.findall(help_of(found[1])))
            assert not unknown, f"relatent {found[1]} has no {unknown}: {line}"


COMMANDS = ("inspect", "calibrate", "convert", "verify", "shard", "logits")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    """In blocks of sh, what follows `relatent` at the beginning of a line is a command."""
    for _, language, body in BLOCK.findall(document.read_text()):
        if language == "sh":
            named = set(re.findall(r"^relatent (?:--threads \w+ )?(\w+)", body, re.MULTILINE))
            assert named <= set(COMMANDS), f"no such commands: {named - set(COMMANDS)}"
    for command in COMMANDS:
        help_of(command)


def anchor_of(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link} leads nowhere"
        if anchor:
            headings = {anchor_of(h) for h in HEADING.findall(target.read_text())}
            assert anchor in headings, f"{document.name}: {link}: no such heading"


def test_output_is_compared_as_the_docstring_says() -> None:
    assert agrees("lost 0.0739 nats in 1.9 s", "lost  0.0741 nats in 20.3 s")
    assert agrees("60 MB, 8476 tokens/s", "60.2 MB, 90 tokens/s")
    assert not agrees("lost 0.0739 nats", "lost 0.0839 nats")
    assert not agrees("lost 0.0739 nats", "won 0.0739 nats")
    assert not agrees("cache 129 of 256", "cache 139 of 256")
    assert first_missing(["a 1", "b 2"], ["a 1", "x", "b 2"]) is None
    assert first_missing(["b 2", "a 1"], ["a 1", "x", "b 2"]) == "a 1"
