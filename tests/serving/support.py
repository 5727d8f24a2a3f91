"""What the serving tests share: the program, conversions, and vLLM in processes of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PLUGIN = ROOT / "convert/engines/vllm"
SCORE = Path(__file__).with_name("score.py")
CALIBRATION_TOKENS = EXAMPLES / "tokens" / "calibration.npy"
VALIDATION_TOKENS = EXAMPLES / "tokens" / "validation.npy"

# Few and short: comparisons are exact up to rounding, so more tokens would show nothing new.
SEQUENCES = 4
LENGTH = 256
MEASURED = ("--tokens", VALIDATION_TOKENS, "--sequences", SEQUENCES, "--length", LENGTH)

PERPLEXITY_TOLERANCE = 1e-5  # relative, float32
SHARED_MEMORY = Path("/dev/shm")


def binary() -> Path:
    return Path(os.environ.get("RELATENT_BIN", ROOT / "build/release/cli/relatent")).resolve()


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Runs the program whatever comes of it."""
    command = [str(binary()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def relatent(*arguments: Any) -> str:
    """Runs the program, which must succeed; its stdout."""
    done = run(*arguments)
    assert done.returncode == 0, f"{done.args} exited {done.returncode}: {done.stderr}"
    return done.stdout


def inspect(folder: Path) -> dict[str, Any]:
    return json.loads(relatent("inspect", folder, "--json"))


def perplexity(source: Path, converted: Path, span: tuple = MEASURED) -> float:
    """What `verify` says of the converted folder."""
    said = relatent("verify", source, converted, *span, "--json", "--quiet")
    return json.loads(said)["converted_ppl"]


def greedy_choices(
    folder: Path, prompt: list[int], continuation: list[int], work: Path
) -> list[int]:
    """What our forward pass finds most likely at every step of a continuation.

    It is the continuation itself exactly when greedy generation would produce that.
    """
    ids = np.array([*prompt, *continuation], dtype=np.int32)[:-1]
    tokens, out = work / "prompt.npy", work / "logits.npy"
    np.save(tokens, ids)
    span = ("--sequences", 1, "--length", len(ids))
    relatent("logits", folder, "--tokens", tokens, *span, "-o", out)
    logits = np.load(out)[0, len(prompt) - 1 :]
    out.unlink()
    return logits.argmax(-1).tolist()


def check_text(converted: Path, found: dict[str, Any], work: Path) -> None:
    """Every token of the text is what our forward pass finds most likely after those before it."""
    for prompt, continuation in zip(found["prompts"], found["greedy"], strict=True):
        assert continuation == greedy_choices(converted, prompt, continuation, work)


def install_plugin(folder: Path) -> Path:
    """The plug-in as pip installs it, entry point included; where to find it."""
    source, target = folder / "source", folder / "site"
    # pip builds where the sources are, and the checkout is to stay clean.
    shutil.copytree(PLUGIN, source)
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", target)
    command = [sys.executable, "-m", "pip", "install", *map(str, options), str(source)]
    subprocess.run(command, check=True)
    return target


class Failed(Exception):
    """vLLM ended with an error; the text is what it wrote."""


def score(
    folder: Path,
    work: Path,
    environment: dict[str, str],
    *options: Any,
    span: tuple = MEASURED,
) -> dict[str, Any]:
    """Runs score.py on a folder in a process of its own."""
    output = work / "score.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, SCORE, folder, *span]
    before = set(SHARED_MEMORY.glob("*"))
    with (work / "log.txt").open("w+") as log:
        process = subprocess.Popen(
            [*map(str, command), *map(str, options), "-o", str(output)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=900)
        finally:
            stop(process.pid)
            clean_shared_memory(before)
        log.seek(0)
        text = log.read()
    if code != 0 or not output.is_file():
        raise Failed(text[-20000:])
    result = json.loads(output.read_text())
    print({**result["seconds"], "perplexity": result["perplexity"]})
    return result


def stop(group: int) -> None:
    """Ends what is left of a process and those that it started; devices end with their parent."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def clean_shared_memory(before: set[Path]) -> None:
    """Removes what vLLM's devices left there when they did not end in order."""
    for path in set(SHARED_MEMORY.glob("*cpushm*")) - before:
        path.unlink(missing_ok=True)


def copy_with(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """A copy of a folder, with changes to its config.json."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))
    return target
