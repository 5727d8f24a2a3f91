"""What the engine tests share: the program, transformers, and editing checkpoints."""

import json
import os
import shutil
import struct
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CALIBRATION_TOKENS = EXAMPLES / "tokens" / "calibration.npy"
VALIDATION_TOKENS = EXAMPLES / "tokens" / "validation.npy"

# Few and short: comparisons are exact up to rounding, so more tokens would show nothing new.
SEQUENCES = 4
LENGTH = 256
SPAN = ("--sequences", SEQUENCES, "--length", LENGTH)

# Two float32 forward passes that sum in different orders agree far better than this.
LOGIT_TOLERANCE = 1e-4


# Newer versions of transformers call the cache among arguments and outputs `cache`.
CACHE = (
    "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
)


def binary() -> Path:
    return Path(os.environ.get("RELATENT_BIN", ROOT / "build/release/cli/relatent")).resolve()


def run(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs the program whatever comes of it."""
    command = [str(binary()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def relatent(*arguments: Any) -> str:
    """Runs the program, which must succeed; its stdout."""
    done = run(*arguments)
    assert done.returncode == 0, f"{done.args} exited {done.returncode}: {done.stderr}"
    return done.stdout


def refused(code: int, *arguments: Any, **kwargs: Any) -> str:
    """Runs the program, which must exit with `code` and complain in exactly one line; that line."""
    done = run(*arguments, **kwargs)
    assert done.returncode == code, f"exit {done.returncode}, expected {code}: {done.stderr}"
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("relatent: "), done.stderr
    assert done.stdout == ""
    print(lines[0])
    return lines[0]


def verify(source: Path, converted: Path, *more: Any) -> dict[str, Any]:
    return json.loads(
        relatent(
            "verify",
            source,
            converted,
            "--tokens",
            VALIDATION_TOKENS,
            *SPAN,
            *more,
            "--json",
            "--quiet",
        )
    )


def validation_ids(count: int = SEQUENCES, length: int = LENGTH) -> torch.Tensor:
    tokens = np.load(VALIDATION_TOKENS)[: count * length]
    return torch.from_numpy(tokens.astype(np.int64)).reshape(count, length)


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    custom_code: bool = False,
    **more: Any,
) -> torch.nn.Module:
    """The checkpoint as transformers loads it; every weight must find its place.

    Stock transformers, unless the code beside the weights is asked for.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=custom_code,
        **more,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(kind), f"{kind}: {info[kind]}"
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(row[None], use_cache=False).logits for row in ids]).float()


@torch.no_grad()
def generate(model: torch.nn.Module, prompt: torch.Tensor, **more: Any) -> list[int]:
    """32 greedy tokens with the cache on; the end token is no reason to stop. More: of generate."""
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        max_new_tokens=32,
        do_sample=False,
        use_cache=True,
        eos_token_id=-1,
        pad_token_id=0,
        **more,
    )
    return out[0, prompt.numel() :].tolist()


def greedy_without_cache(
    model: torch.nn.Module, prompt: torch.Tensor, continuation: list[int]
) -> list[int]:
    """What greedy generation without a cache chooses at every step of a continuation.

    It is the continuation itself exactly when uncached generation would produce that, and costs
    one forward pass.
    """
    ids = torch.cat([prompt, torch.tensor(continuation)])[None, :-1]
    return logits_of(model, ids)[0, prompt.numel() - 1 :].argmax(-1).tolist()


def prompts() -> list[torch.Tensor]:
    """Real text of several lengths, from beyond the sequences that logits are compared on."""
    tokens = torch.from_numpy(np.load(VALIDATION_TOKENS).astype(np.int64))
    return [
        tokens[start : start + length] for start, length in ((8192, 8), (16384, 45), (32768, 130))
    ]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error, accumulated in float64."""
    difference = found.double() - expected.double()
    return (
        torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected.double())
    ).item()


def negative_log_likelihood(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean over predicted tokens, in float64."""
    log_probabilities = logits[:, :-1].double().log_softmax(-1)
    return -log_probabilities.gather(-1, ids[:, 1:, None]).mean().item()


def copy_checkpoint(source: Path, target: Path) -> Path:
    """A writable copy, even of a read-only folder."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    return target


def edit_config(folder: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **changes}, indent=2))


def edit_tensors(folder: Path, edit: Any) -> None:
    """Lets `edit` change the dictionary of tensors of a single-file checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def split_checkpoint(source: Path, target: Path, shards: int) -> Path:
    """The same checkpoint over several shards with an index."""
    copy_checkpoint(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, target / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def load_all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file as its header and the bytes behind it."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def split_and_merged(folder: Path, work: Path) -> tuple[Path, Path]:
    """A checkpoint as shards for two devices, and what these merge to."""
    work.mkdir()
    shards, merged = work / "shards", work / "merged"
    relatent("shard", folder, "-o", shards, "--tp", 2, "--quiet")
    relatent("shard", "--merge", shards, "-o", merged, "--quiet")
    return shards, merged


def logit_bytes(folder: Path, out: Path, threads: int) -> bytes:
    """What our forward pass writes of some short sequences."""
    relatent(
        *("--threads", threads, "logits", folder, "--tokens", VALIDATION_TOKENS),
        *("--sequences", 3, "--length", 64, "-o", out),
    )
    return out.read_bytes()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }
