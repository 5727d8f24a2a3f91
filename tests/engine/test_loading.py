"""Loading a written folder warns of nothing and asks nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOADING = Path(__file__).with_name("loading.py")
FLOAT32 = ("--dtype", "float32")
# Without the fits that take long.
DEEPSEEK = ("--rope-dim", 32, "--rank", 96, "--no-query-fit", "--no-key-fit")
STOCK = {
    "transformers": ("lossless",),
    "deepseek": ("relatent", "--engine", "deepseek", *DEEPSEEK),
}
RELATENT = {
    "mla": ("lossless", "--to", "mla", "--engine", "relatent"),
    "tpla": ("lossless", "--to", "tpla", "--branches", 4),
    "gla": ("lossless", "--to", "gla", "--branches", 2),
}
WAYS = {
    **{("stock", name): STOCK[name] for name in STOCK},
    **{(way, name): RELATENT[name] for name in RELATENT for way in ("trusted", "untrusted")},
    ("tokenizer", "transformers"): STOCK["transformers"],
    ("tokenizer", "tpla"): RELATENT["tpla"],
    # The last, for it changes what the others would find.
    ("registered", "tpla"): RELATENT["tpla"],
}
# How transformers itself says that it does not know a model type.
UNKNOWN = "You are using a model of type `relatent` to instantiate a model of type ``."


@pytest.fixture(scope="module")
def said(bench, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Lines of stderr by their heading, of a process as a user starts it, who says yes to all."""
    answers = tmp_path_factory.mktemp("loading") / "answers"
    answers.write_text("y\n" * 100)
    command = [sys.executable, str(LOADING)]
    for (way, name), options in WAYS.items():
        command += [way, name, str(bench.convert(llama, *options, *FLOAT32))]
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    with answers.open() as stdin:
        done = subprocess.run(
            command, stdin=stdin, capture_output=True, text=True, check=False, env=environment
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found: dict[str, list[str]] = {}
    for line in done.stderr.splitlines():
        if line.startswith("== "):
            found[line] = lines = []
        else:
            lines.append(line)
    return found


@pytest.mark.parametrize(("way", "name"), WAYS)
def test_nothing_is_said(said: dict[str, list[str]], way: str, name: str) -> None:
    lines = said[f"== {way} {name}"]
    if way == "untrusted":
        lines = [line for line in lines if UNKNOWN not in line]
    assert lines == []
