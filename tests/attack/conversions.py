"""The conversions that are attacked, made once for a run, and `verify` of them."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from folders import REPORT, Json

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LENGTH = 256  # tokens that `verify` runs
CALIBRATION = ("--sequences", 8, "--length", 256)
QUICK = ("--fit-rounds", 1, "--fit-stride", 16)

# llama-3m has neither, and most published checkpoints have both.
MORE_FILES = {
    "chat_template.jinja": "{% for message in messages %}{{ message['content'] }}{% endfor %}\n",
    "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
}


@dataclass(frozen=True)
class Conversion:
    """One way to convert one source."""

    name: str
    options: tuple[Any, ...]
    source: str = "llama-3m"
    is_calibrated: bool = True
    has_report: bool = True
    limits_by_hand: bool = False  # `verify` gets limits just above what the conversion loses
    is_quick: bool = False  # a part of the short form


def lossless(name: str, *options: Any, **more: Any) -> Conversion:
    options = ("--method", "lossless", *options)
    return Conversion(f"lossless {name}", options, is_calibrated=False, **more)


def fitted(name: str, *options: Any, **more: Any) -> Conversion:
    return Conversion(name, (*options, *QUICK), **more)


F32 = ("--dtype", "float32")
HALF = ("--kv-budget", 0.5)
OWN = ("--engine", "relatent")
TPLA = ("--to", "tpla", "--branches", 2)
MLRA = ("--to", "mlra", "--branches", 4)
GLA = ("--to", "gla", "--branches", 2)
SHARED = ("--key-rank", 16)

CONVERSIONS = (
    lossless("mla, transformers", *F32, is_quick=True),
    lossless("mla, relatent", *OWN, *F32),
    lossless("gla, relatent", *GLA, *OWN, *F32),
    lossless("tpla, relatent", *TPLA, *OWN, *F32, is_quick=True),
    lossless("mlra, relatent", *MLRA, *OWN, *F32),
    lossless("mla, transformers, bfloat16, shards", "--max-shard-size", "1MB", is_quick=True),
    lossless("mla, no report", *F32, has_report=False, limits_by_hand=True, is_quick=True),
    fitted("mla, transformers", *HALF, is_quick=True),
    fitted("mla, relatent", *HALF, *OWN, *F32),
    fitted("gla, relatent", *GLA, *OWN, *HALF, is_quick=True),
    fitted("tpla, relatent", *TPLA, *OWN, *HALF, *SHARED, is_quick=True),
    fitted("mlra, relatent", *MLRA, *OWN, *HALF, *SHARED, *F32),
    fitted("deepseek", "--engine", "deepseek", *HALF, is_quick=True),
    fitted(
        "mlra, mlra",
        *("--engine", "mlra", *MLRA, *SHARED, "--rope-dim", 32, "--per-device", 64),
    ),
    fitted("gla, gla", "--engine", "gla", *GLA, "--rope-dim", 32),
    fitted("mla, no probe", *HALF, "--held-out", 0, limits_by_hand=True, is_quick=True),
    Conversion(
        "transmla, float16", ("--method", "transmla", *HALF, "--dtype", "float16", "--fold", 1)
    ),
    Conversion(
        "weights-only mla",
        ("--method", "weights-only", *HALF),
        is_calibrated=False,
        limits_by_hand=True,
    ),
)

LARGER = (
    lossless("llama-26m tpla, relatent", *TPLA, *OWN, *F32, source="llama-26m"),
    fitted("llama-26m mla, transformers", *HALF, source="llama-26m"),
    lossless("qwen2-13m mla, transformers", *F32, source="qwen2-13m"),
    fitted("qwen2-13m gla, relatent", *GLA, *OWN, *HALF, source="qwen2-13m"),
    fitted("qwen2-13m deepseek", "--engine", "deepseek", *HALF, source="qwen2-13m"),
    lossless("deepseek-14m deepseek", "--engine", "deepseek", source="deepseek-14m"),
    fitted(
        "deepseek-14m tpla, relatent",
        *(*TPLA, *OWN, *SHARED, "--per-device", 96),
        source="deepseek-14m",
    ),
)


def binary() -> Path:
    return Path(os.environ.get("RELATENT_BIN", ROOT / "build/release/cli/relatent")).resolve()


def run(
    *arguments: Any, threads: int | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    before = () if threads is None else ("--threads", str(threads))
    command = [str(binary()), *before, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def relatent(*arguments: Any, **more: Any) -> str:
    done = run(*arguments, **more)
    if done.returncode != 0:
        raise RuntimeError(f"{done.args} exited {done.returncode}: {done.stderr}")
    return done.stdout


@dataclass
class Outcome:
    """What `verify` said, in the words of this test."""

    code: int
    error: str = ""
    report: Json = field(default_factory=dict)

    @property
    def evidence(self) -> Json:
        return dict(self.report.get("evidence", {}))

    @property
    def failed(self) -> list[str]:
        return [name for name, part in self.evidence.items() if part.get("verdict") == "failed"]

    @property
    def unchecked(self) -> list[str]:
        return [
            name for name, part in self.evidence.items() if part.get("verdict") == "not checked"
        ]

    def texts(self, layer: str) -> list[str]:
        return texts_in(self.evidence.get(layer))

    def figures(self) -> Json:
        layers = [layer["attention_rel_error"] for layer in self.report.get("layers", ())]
        out = {key: self.report.get(key) for key in ("nats", "mean_kl", "rel_logit_error")}
        return {**out, "attention_rel_error": layers} if self.report else {}


def texts_in(value: Any) -> list[str]:
    """All text in a part of a JSON document."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for part in value for text in texts_in(part)] if isinstance(value, list) else []


class Workshop:
    """Makes sources, calibrations and conversions in a folder and hands them out again."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.validation: np.ndarray = np.load(EXAMPLES / "tokens" / "validation.npy")[:LENGTH]
        self.tokens = folder / "tokens.npy"
        np.save(self.tokens, self.validation)
        self.source = cache(self._source)
        self.calibration = cache(self._calibration)
        self.made: dict[Conversion, Path] = {}

    def _source(self, name: str) -> Path:
        if name == "llama-3m":
            out = self.folder / name
            shutil.copytree(EXAMPLES / name, out)
            for file, text in MORE_FILES.items():
                (out / file).write_text(text)
            return out
        models = os.environ.get("RELATENT_MODELS")
        if models:
            return Path(models).resolve() / "models" / name
        sys.path.append(str(ROOT / "tests" / "support"))
        import small_models  # type: ignore[import-not-found]
        from checkpoints import STAND_INS  # type: ignore[import-not-found]

        # Copied, so that files of it can be linked to: it may be made on another disk.
        out = self.folder / str(STAND_INS[name])
        shutil.copytree(small_models.make(STAND_INS[name]), out)
        return out

    def _calibration(self, source: str) -> Path:
        out = self.folder / f"{source}.h5"
        relatent(
            *("calibrate", self.source(source), "-o", out, *CALIBRATION, "--quiet"),
            *("--tokens", EXAMPLES / "tokens" / "calibration.npy"),
        )
        return out

    def convert(self, conversion: Conversion, **settings: Any) -> Path:
        """The folder; `settings` are those of `run` and decide nothing of what is written."""
        if conversion not in self.made:
            self.made[conversion] = self._converted(conversion, **settings)
        return self.made[conversion]

    def _converted(self, conversion: Conversion, **settings: Any) -> Path:
        name = conversion.name.replace(", ", "-").replace(" ", "-")
        out = self.folder / (f"{name}.gguf" if "gguf" in conversion.options else name)
        known = (
            ("--calibration", self.calibration(conversion.source))
            if conversion.is_calibrated
            else ()
        )
        source = self.source(conversion.source)
        relatent(
            *("convert", source, "-o", out, *conversion.options, *known, "--quiet"), **settings
        )
        if not conversion.has_report:
            (out / REPORT).unlink()
        return out

    def verify(self, source: Path, converted: Path, *more: Any, **settings: Any) -> Outcome:
        done = run(
            *("verify", source, converted, "--tokens", self.tokens),
            *("--length", LENGTH, "--json", "--quiet", *more),
            **settings,
        )
        try:
            report = json.loads(done.stdout) if done.stdout.strip() else {}
        except json.JSONDecodeError as error:
            return Outcome(-1, f"stdout is no JSON: {error}")
        return Outcome(done.returncode, done.stderr.strip(), report)


# The limits of `verify`, and how it calls what it compares with them.
LIMITS = {
    "--max-nats": "nats",
    "--max-kl": "mean_kl",
    "--max-rel-error": "rel_logit_error",
    "--max-layer-error": "attention_rel_error",
}


def largest(figure: float | list[float] | None) -> float:
    """The figure, or the largest of a list of them; what is not a number is larger than any."""
    values = figure if isinstance(figure, list) else [figure]
    return max(math.inf if value is None else abs(value) for value in values)


def limits_above(outcome: Outcome) -> dict[str, float]:
    """Limits that a conversion stays within, and little that is worse does."""
    figures = outcome.figures()
    return {flag: largest(figures[name]) * 1.001 + 1e-6 for flag, name in LIMITS.items()}


def as_options(limits: dict[str, float]) -> tuple[str, ...]:
    return tuple(part for flag, limit in limits.items() for part in (flag, repr(limit)))
