"""README.md and docs/: commands run, print what is shown, and links lead somewhere.

A block of sh behind a line `<!-- run -->` is run, one after the other for each document, in a
temporary copy of what the repository offers a reader, with `relatent` on the path. It must exit
with 0.

A block behind `<!-- output -->` is what the block before it prints. Its lines must be printed in
that order; others may stand between them, such as progress, and a line `...` says that some do.
Words are compared exactly. Numbers may differ by 2 % of themselves or by 0.002, since processors
round differently, and by anything where they are times, speeds, amounts of memory or checksums.
Spaces do not count.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

import families_table
import support

DOCUMENTS = [support.ROOT / "README.md", *sorted((support.ROOT / "docs").glob("*.md"))]
RUNNABLE = ("README.md", "docs/tutorial.md")

RELATIVE, ABSOLUTE = 2e-2, 2e-3

# Of vLLM, SGLang and CMake.
FOREIGN_OPTIONS = {
    *("--model-impl", "--tensor-parallel-size", "--dcp-size"),
    *("--preset", "--build", "--install", "--prefix", "--target"),
}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)

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
            lines = body.splitlines()
            steps[-1].output = [line for line in lines if line.strip() not in ("", "...")]
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
    shutil.copytree(support.EXAMPLES, copy / "examples", ignore=shutil.ignore_patterns("out"))
    shutil.copyfile(support.ROOT / "LICENSE", copy / "LICENSE")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "relatent").symlink_to(support.binary())
    # python3 is the one that runs this, with its packages.
    folders = (str(programs), str(Path(sys.executable).parent), os.environ["PATH"])
    return copy, {**os.environ, "PATH": os.pathsep.join(folders)}


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


@cache
def command_options() -> dict[str, set[str]]:
    """The options of every command, as its help names them, and those that stand before any."""
    general = support.relatent("--help")
    commands = re.findall(r"^  ([a-z]+)  ", general.split("Subcommands:")[1], re.MULTILINE)
    return {
        command: {*OPTION.findall(general), *OPTION.findall(support.relatent(command, "--help"))}
        for command in commands
    }


@cache
def script_options() -> set[str]:
    folders = (support.ROOT / name for name in ("tests/bench", "tests/attack", "examples/heal"))
    files = (file for folder in folders for file in folder.glob("*.py"))
    added = re.compile(r'add_argument\(\s*"(--[a-z-]+)"')
    return {option for file in files for option in added.findall(file.read_text())}


def command_lines(text: str) -> Iterator[str]:
    """Lines of blocks of sh without their comments, and code within sentences."""
    for _, language, body in BLOCK.findall(text):
        if language == "sh":
            for line in body.replace("\\\n", " ").splitlines():
                yield line.split(" #")[0].strip()
    for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text)):
        yield " ".join(code.split())


@each_document
def test_commands_and_options_exist(document: Path) -> None:
    text = document.read_text()
    commands = command_options()
    own = set().union(*commands.values())
    unknown = set(OPTION.findall(text)) - own - script_options() - FOREIGN_OPTIONS
    assert not unknown, f"no program has these options: {unknown}"
    for line in command_lines(text):
        named = re.match(r"relatent (?:--threads \w+ )?([a-z]\w*)(?=\s|$)", line)
        if named is not None:
            assert named[1] in commands, f"no such command: {line}"
        # A sentence may leave out the program's name.
        command = named[1] if named else line.split(" ")[0]
        if command in commands:
            unknown = set(OPTION.findall(line)) - commands[command]
            assert not unknown, f"relatent {command} has no {unknown}: {line}"


def anchor_of(heading: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_document
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


def test_families_are_those_of_the_program() -> None:
    families = json.loads(support.relatent("families", "--json"))
    assert families_table.shown() == families_table.table(families), (
        "python3 tests/support/families_table.py writes the table anew"
    )


def test_output_is_compared_as_the_docstring_says() -> None:
    assert agrees("lost 0.0739 nats in 1.9 s", "lost  0.0741 nats in 20.3 s")
    assert agrees("60 MB, 8476 tokens/s", "60.2 MB, 90 tokens/s")
    assert not agrees("lost 0.0739 nats", "lost 0.0839 nats")
    assert not agrees("lost 0.0739 nats", "won 0.0739 nats")
    assert not agrees("cache 129 of 256", "cache 139 of 256")
    assert first_missing(["a 1", "b 2"], ["a 1", "x", "b 2"]) is None
    assert first_missing(["b 2", "a 1"], ["a 1", "x", "b 2"]) == "a 1"
