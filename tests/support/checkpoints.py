"""Where the tests find checkpoints by name, whatever engine they run them in.

llama-3m is in the repository. Larger ones, each trained as its family is, take part when
RELATENT_MODELS names a folder that has them; where it names none, small ones that are made on the
spot stand in for them (small_models.py), so that no family goes untested.
"""

import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STAND_INS = {
    "llama-26m": "made-llama",
    "qwen2-13m": "made-qwen2",
    "qwen3-13m": "made-qwen3",
    "deepseek-14m": "made-deepseek",
}


def present(*names: str) -> tuple[str, ...]:
    """Models as there are: without RELATENT_MODELS those that stand in for the larger ones."""
    if os.environ.get("RELATENT_MODELS"):
        return names
    return tuple(STAND_INS.get(name, name) for name in names)


def find_model(name: str) -> Path:
    if name == "llama-3m":
        return EXAMPLES / name
    if name.startswith("made-"):
        import small_models  # takes seconds, which not every session needs

        return small_models.make(name)
    models = os.environ.get("RELATENT_MODELS")
    if not models:
        pytest.skip(
            f"{name} NOT TESTED: RELATENT_MODELS must name a folder that holds models/{name}"
        )
    folder = Path(models).resolve() / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{name} NOT TESTED: there is no {folder}")
    return folder


def report() -> str:
    """A line for the head of a session."""
    models = os.environ.get("RELATENT_MODELS")
    if models:
        return f"larger models from {models}"
    made = ", ".join(f"{there} for {name}" for name, there in STAND_INS.items())
    return f"RELATENT_MODELS is not set: NO LARGER MODEL, small ones stand in ({made})"
