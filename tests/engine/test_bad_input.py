"""Whatever is wrong: one line that says so, the right exit code, and nothing left behind."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import support

USAGE, INPUT, MACHINE = 2, 3, 4
Damage = Callable[[Path], None]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def cut_inside_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def point_outside(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = support.read_header(path)
    last = max(
        (v for k, v in header.items() if k != "__metadata__"), key=lambda v: v["data_offsets"]
    )
    last["data_offsets"] = [offset + 4096 for offset in last["data_offsets"]]
    support.write_header(path, header, data)


def overlap(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = support.read_header(path)
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
    header[second]["data_offsets"] = header[first]["data_offsets"]
    support.write_header(path, header, data)


def unknown_family(folder: Path) -> None:
    support.edit_config(folder, {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]})


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def odd_head_size(folder: Path) -> None:
    support.edit_config(folder, {"head_dim": 33})


def sliding_window(folder: Path) -> None:
    changes = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 64,
    }
    support.edit_config(folder, changes)


def norm_on_queries(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(32, dtype=torch.bfloat16)

    support.edit_tensors(folder, edit)


def missing_tensor(folder: Path) -> None:
    support.edit_tensors(
        folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight")
    )


def not_a_number(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][2, 3] = float("nan")

    support.edit_tensors(folder, edit)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated shard": (truncate, "model.safetensors"),
    "truncated header": (cut_inside_header, "model.safetensors"),
    "header points outside": (point_outside, "model.safetensors"),
    "overlapping tensors": (overlap, ".mlp.up_proj.weight"),
    "unknown family": (unknown_family, "gemma2"),
    "broken config": (broken_config, "config.json"),
    "odd head size": (odd_head_size, "config.json"),
    "sliding window": (sliding_window, "sliding_window"),
    "norm on the queries": (norm_on_queries, "model.layers.0.self_attn.q_norm.weight"),
    "missing tensor": (missing_tensor, "model.layers.1.self_attn.k_proj.weight"),
    "not a number": (not_a_number, "model.layers.1.self_attn."),
}


def words(options: tuple) -> str:
    return " ".join(map(str, options)) or "none"


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return support.copy_checkpoint(llama, tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where nothing may be left; kept apart so that stray files show."""
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / "out"


def assert_nothing_left(out: Path) -> None:
    assert list(out.parent.iterdir()) == []


def convert(source: Path, out: Path, method: str = "lossless") -> tuple:
    return ("convert", source, "-o", out, "--method", method, "--quiet")


def calibrate(source: Path, out: Path, tokens: Path = support.VALIDATION_TOKENS) -> tuple:
    return ("calibrate", source, "--tokens", tokens, "-o", out, *support.SPAN, "--quiet")


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint(copy: Path, out: Path, name: str) -> None:
    damage, named = DAMAGES[name]
    damage(copy)
    assert named in support.refused(INPUT, *convert(copy, out))
    assert_nothing_left(out)


@pytest.mark.parametrize("name", ("truncated shard", "overlapping tensors", "unknown family"))
def test_damaged_checkpoint_is_not_calibrated(copy: Path, out: Path, name: str) -> None:
    DAMAGES[name][0](copy)
    support.refused(INPUT, *calibrate(copy, out))
    assert_nothing_left(out)


def test_missing_shard(llama: Path, tmp_path: Path, out: Path) -> None:
    split = support.split_checkpoint(llama, tmp_path / "split", 2)
    (split / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in support.refused(INPUT, *convert(split, out))
    assert_nothing_left(out)


def test_no_checkpoint(tmp_path: Path, out: Path) -> None:
    support.refused(INPUT, *convert(tmp_path / "nowhere", out))
    assert_nothing_left(out)


@pytest.mark.parametrize(
    "options",
    (
        ("--rope-dim", 24, "--rank", 64),  # does not divide the head size of 32
        ("--rope-dim", 31, "--rank", 64),
        ("--rope-dim", 32, "--rank", 225),  # full rank is 2 * 4 * 32 - 32
        ("--rank", 0),
        ("--kv-budget", 1.5),
        ("--kv-budget", 0.5, "--rank", 64),
        ("--kv-budget", 0.5, "--q-rank", 193),
        (),
    ),
    ids=words,
)
def test_sizes_that_cannot_be(bench, llama: Path, out: Path, options: tuple) -> None:
    calibration = bench.calibration(llama)
    command = (*convert(llama, out, "transmla"), "--calibration", calibration, *options)
    support.refused(USAGE, *command)
    assert_nothing_left(out)


@pytest.mark.parametrize(
    "options",
    (
        ("--method", "lossless", "--rank", 64),
        ("--method", "weights-only", "--kv-budget", 0.5, "--q-rank", 64),
        ("--method", "transmla", "--kv-budget", 0.5),  # without a calibration
        ("--method", "guesswork"),
        ("--method", "lossless", "--no-such-option"),
        ("--method", "lossless", "--dtype", "int8"),
    ),
    ids=words,
)
def test_options_that_make_no_sense(llama: Path, out: Path, options: tuple) -> None:
    support.refused(USAGE, "convert", llama, "-o", out, *options)
    assert_nothing_left(out)


def test_existing_output_is_untouched(llama: Path, out: Path) -> None:
    out.mkdir()
    (out / "precious").write_text("here before")
    assert str(out) in support.refused(USAGE, *convert(llama, out))
    assert support.folder_bytes(out.parent) == {"out/precious": b"here before"}


def test_missing_parent_of_output(llama: Path, out: Path) -> None:
    support.refused(USAGE, *convert(llama, out / "deeper"))
    assert_nothing_left(out)


def test_tokens_beyond_the_vocabulary(llama: Path, tmp_path: Path, out: Path) -> None:
    tokens = np.load(support.VALIDATION_TOKENS)
    tokens[700] = 4096
    np.save(tmp_path / "tokens.npy", tokens)
    commands = (
        calibrate(llama, out, tmp_path / "tokens.npy"),
        ("verify", llama, llama, "--tokens", tmp_path / "tokens.npy", *support.SPAN, "--quiet"),
        ("logits", llama, "--tokens", tmp_path / "tokens.npy", *support.SPAN, "-o", out),
    )
    for command in commands:
        line = support.refused(INPUT, *command)
        assert "4096" in line and "700" in line
    assert_nothing_left(out)


@pytest.mark.parametrize(
    "tokens",
    (
        np.arange(2048, dtype=np.float32),
        np.arange(2048, dtype=">u2"),
        np.arange(2048, dtype=np.uint16).reshape(2, 1024),
        -np.arange(2048, dtype=np.int32),
    ),
    ids=("float", "big-endian", "two dimensions", "negative"),
)
def test_tokens_of_another_kind(llama: Path, tmp_path: Path, out: Path, tokens: np.ndarray) -> None:
    np.save(tmp_path / "tokens.npy", tokens)
    support.refused(INPUT, *calibrate(llama, out, tmp_path / "tokens.npy"))
    assert_nothing_left(out)


def test_truncated_tokens(llama: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "tokens.npy").write_bytes(support.VALIDATION_TOKENS.read_bytes()[:5001])
    support.refused(INPUT, *calibrate(llama, out, tmp_path / "tokens.npy"))
    assert_nothing_left(out)


def test_more_sequences_than_there_are(llama: Path, out: Path) -> None:
    command = ("calibrate", llama, "--tokens", support.VALIDATION_TOKENS, "-o", out)
    support.refused(USAGE, *command, "--sequences", 1000, "--length", 1024)
    assert_nothing_left(out)


@pytest.mark.parametrize("part", (0.0, 0.001, 0.3, 0.5, 0.9, 0.999))
def test_truncated_calibration(bench, llama: Path, tmp_path: Path, out: Path, part: float) -> None:
    whole = bench.calibration(llama).read_bytes()
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(whole[: int(part * len(whole))])
    command = (*convert(llama, out, "transmla"), "--kv-budget", 0.5, "--calibration", damaged)
    assert str(damaged) in support.refused(INPUT, *command)
    assert_nothing_left(out)


def test_calibration_of_another_model(bench, llama: Path, copy: Path, out: Path) -> None:
    """Sizes and names are the same; one weight is not."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1

    support.edit_tensors(copy, edit)
    calibration = bench.calibration(llama)
    command = (*convert(copy, out, "transmla"), "--kv-budget", 0.5, "--calibration", calibration)
    assert str(calibration) in support.refused(INPUT, *command)
    assert_nothing_left(out)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.parametrize("make", (convert, calibrate))
def test_full_disk(llama: Path, out: Path, make: Callable) -> None:
    """A limit on file sizes stands in for a full disk.

    Python ignores the limit's signal and the child inherits that, so writing fails instead.
    """
    line = support.refused(
        MACHINE, *make(llama, out), preexec_fn=limit_file_size, restore_signals=False
    )
    assert str(out) in line
    assert_nothing_left(out)
