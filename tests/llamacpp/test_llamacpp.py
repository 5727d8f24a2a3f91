"""Conversions in llama.cpp: files of `--engine gguf`, and folders of `--engine deepseek` by their converter.

Their engine, our logits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Their reader of such files comes with their converter.
sys.path.insert(0, str(Path(sys.prefix, "share/llama.cpp/gguf-py")))

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from tokenizers import Tokenizer

import checkpoints
import support

TO_GGUF = Path(__file__).with_name("to_gguf.py")
MODELS = {
    "llama-3m": ("--rope-dim", 32, "--rank", 96),
    "llama-26m": ("--rope-dim", 64, "--rank", 192),
    "qwen2-13m": ("--rope-dim", 32, "--rank", 96),
    "made-llama": ("--rope-dim", 32, "--rank", 96),
    "made-qwen2": ("--rope-dim", 16, "--rank", 48),
}
IN_FULL_SET = ("qwen2-13m",)
# What the folder's config says for other readers: YaRN of factor 1, experts that no layer has.
NOT_READ = ("GGUF.", "general.", "deepseek2.expert_", "deepseek2.rope.scaling.")
# MLA already, and only written in another layout.
RELAID = "deepseek-14m"
# A request for every position, so fewer positions than in other comparisons.
SEQUENCES, LENGTH = 2, 48
TOLERANCE = 1e-3
# Single tokens through small models: threads that wait for each other cost more than they bring.
THREADS = 1
torch.set_num_threads(THREADS)


def calibrate(source: Path, folder: Path) -> Path:
    out = folder / "calibration.h5"
    tokens = ("--tokens", support.CALIBRATION_TOKENS, "--sequences", 8, "--length", 256)
    support.relatent("calibrate", source, *tokens, "-o", out, "--quiet")
    return out


def convert(source: Path, calibration: Path, out: Path, *options: Any) -> Path:
    """In float32, calibrated, without the fits that take long."""
    fits = ("--no-query-fit", "--no-key-fit", "--dtype", "float32", "--quiet")
    support.relatent("convert", source, "-o", out, "--calibration", calibration, *options, *fits)
    return out


def to_gguf(folder: Path, scratch: Path) -> Path:
    """A GGUF file of a copy whose config.json says 0 where there is no query latent.

    transformers wants null there, which the converter leaves out and llama.cpp then misses.
    """
    copy, out = support.copy_checkpoint(folder, scratch / "copy"), scratch / "model.gguf"
    config = json.loads((copy / "config.json").read_text())
    assert config["q_lora_rank"] is None
    support.edit_config(copy, {"q_lora_rank": 0})
    command = [sys.executable, TO_GGUF, copy, "--outtype", "f32", "--outfile", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


class Engine:
    """llama.cpp's server in this process, with a float32 cache and exact attention."""

    def __init__(self, path: Path, vocabulary: int):
        self.vocabulary = vocabulary
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 1024
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention rounds keys and values to 16 bits.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = False
        params.fit_params = False
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: str | list[int], tokens: int, alternatives: int) -> dict[str, Any]:
        request = {"prompt": prompt, "n_predict": tokens, "n_probs": alternatives}
        answer = self.server.handle_completions({**request, "temperature": 0, "cache_prompt": True})
        return answer["choices"][0] | answer["usage"]

    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """Of every token after each position; all but the last position come from the cache."""
        out = torch.full((len(ids), self.vocabulary), float("nan"), dtype=torch.float64)
        for position, row in enumerate(out):
            answer = self.complete(ids[: position + 1], 1, self.vocabulary)
            for entry in answer["logprobs"]["content"][0]["top_logprobs"]:
                row[entry["id"]] = entry["logprob"]
        assert not out.isnan().any()
        return out


@pytest.fixture(scope="module", params=checkpoints.present("llama-3m", "llama-26m", "qwen2-13m", RELAID))
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same conversion as a folder, and as files by their converter and by us."""
    if request.param in IN_FULL_SET and os.environ.get("RELATENT_FULL") != "1":
        pytest.skip(f"{request.param} NOT TESTED in the small set: set RELATENT_FULL=1")
    source = checkpoints.find_model(request.param)
    scratch = tmp_path_factory.mktemp(request.param)
    ours = scratch / "ours.gguf"
    pre = ("--engine", "gguf", "--pre-tokenizer", "gpt-2")
    if request.param in checkpoints.present(RELAID):
        exact = ("--method", "lossless", "--dtype", "float32", "--quiet")
        support.relatent("convert", source, "-o", ours, *exact, *pre)
        return {"folder": source, "converter": to_gguf(source, scratch), "gguf": ours}
    calibration = calibrate(source, scratch)
    sizes = MODELS[request.param]
    folder = convert(source, calibration, scratch / "folder", "--engine", "deepseek", *sizes)
    convert(source, calibration, ours, *pre, *sizes)
    return {"folder": folder, "converter": to_gguf(folder, scratch), "gguf": ours}


@pytest.fixture(scope="module")
def folder(converted: dict[str, Path]) -> Path:
    return converted["folder"]


@pytest.fixture(scope="module", params=("converter", "gguf"))
def engine(request: pytest.FixtureRequest, converted: dict[str, Path]) -> Engine:
    vocabulary = json.loads((converted["folder"] / "config.json").read_text())["vocab_size"]
    return Engine(converted[request.param], vocabulary)


def test_the_same_file(converted: dict[str, Path]) -> None:
    """As their converter makes it of the folder: every tensor, and every key that it has."""
    theirs, ours = (gguf.GGUFReader(converted[kind]) for kind in ("converter", "gguf"))
    found = {tensor.name: tensor for tensor in ours.tensors}
    for tensor in theirs.tensors:
        if tensor.name == "output.weight" and tensor.name not in found:
            # The folder has a head of its own; the file leaves out one that is the embedding.
            assert np.array_equal(tensor.data, found["token_embd.weight"].data)
            continue
        same = found.pop(tensor.name) if tensor.name != "token_embd.weight" else found[tensor.name]
        assert same.tensor_type == tensor.tensor_type
        assert np.array_equal(same.data, tensor.data), tensor.name
    assert set(found) <= {"token_embd.weight"}
    for key, field in theirs.fields.items():
        if key.startswith(NOT_READ):
            continue
        assert key in ours.fields, key
        assert ours.fields[key].contents() == field.contents(), key
        assert ours.fields[key].types == field.types, key


def test_verify_reads_it(converted: dict[str, Path]) -> None:
    tokens = ("--tokens", support.VALIDATION_TOKENS, "--sequences", 2, "--length", 128)
    report = json.loads(
        support.relatent("verify", converted["folder"], converted["gguf"], *tokens, "--json")
    )
    assert report["rel_logit_error"] < 1e-5
    assert report["top1_agreement"] == 1


def test_logits(folder: Path, engine: Engine, tmp_path: Path) -> None:
    """What llama.cpp answers are log-probabilities: logits up to one number per position."""
    out, tokens = tmp_path / "logits.npy", ("--tokens", support.VALIDATION_TOKENS)
    span = ("--sequences", SEQUENCES, "--length", LENGTH)
    support.relatent("logits", folder, *tokens, *span, "-o", out)
    ours = torch.from_numpy(np.load(out)).double().log_softmax(-1)
    rows = support.validation_ids(SEQUENCES, LENGTH).tolist()
    theirs = torch.stack([engine.log_probabilities(row) for row in rows])
    error = support.relative_error(theirs, ours)
    print(f"relative error of the log-probabilities: {error:.2e}")
    assert error <= TOLERANCE
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_greedy_text(folder: Path, engine: Engine) -> None:
    """The prompt as text, through llama.cpp's tokenizer, and its own batch of prompt positions."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = support.load(folder)
    for prompt in support.prompts():
        text = tokenizer.decode(prompt.tolist(), skip_special_tokens=False)
        ids = torch.tensor(tokenizer.encode(text).ids)
        answer = engine.complete(text, 32, 1)
        assert answer["prompt_tokens"] == len(ids)
        found = [entry["id"] for entry in answer["logprobs"]["content"]]
        # The end token ends llama.cpp's text.
        assert len(found) == 32 or found[-1] == model.config.eos_token_id
        assert found == support.generate(model, ids)[: len(found)]
        assert tokenizer.decode(found).startswith(answer["text"])
        print(repr(answer["text"]))
