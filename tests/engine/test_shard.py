"""Shards: every rank's file is a safetensors file of its own, and merging returns every byte."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import support

USAGE, INPUT = 2, 3
FORMS = {
    "tpla 4": ("--to", "tpla", "--branches", 4),
    "gla 2": ("--to", "gla", "--branches", 2),
    "mlra 2": ("--to", "mlra", "--branches", 2),
    "mla": ("--to", "mla"),
}
RANKS = (1, 2, 4, 8)


def shard(source: Path, out: Path, tp: int) -> Path:
    support.relatent("shard", source, "-o", out, "--tp", tp, "--quiet")
    return out


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"model-rank-{rank}.safetensors"


def put_together(shards: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors from the ranks' files by what the manifest says of them."""
    manifest = json.loads((shards / "relatent_shards.json").read_text())
    ranks = [load_file(rank_file(shards, k)) for k in range(manifest["tp"])]
    tensors = {}
    for entry in manifest["tensors"]:
        name, parts = entry["name"], entry["ranks"]
        assert [name in rank for rank in ranks] == [part is not None for part in parts]
        whole = torch.zeros(entry["shape"], dtype=next(r[name].dtype for r in ranks if name in r))
        seen = torch.zeros(entry["shape"], dtype=torch.bool)
        for rank, part in zip(ranks, parts, strict=True):
            if part is not None:
                axis = 1 if entry["split"] == "columns" else 0
                whole.narrow(axis, *part).copy_(rank[name])
                seen.narrow(axis, *part).fill_(True)
        assert seen.all(), name
        tensors[name] = whole
    return tensors


def assert_round_trip(source: Path, folder: Path, tp: int) -> None:
    shards = shard(source, folder / f"shards-{tp}", tp)
    for k in range(tp):
        with safe_open(rank_file(shards, k), "pt") as file:
            metadata = file.metadata()
            assert (metadata["relatent_rank"], metadata["relatent_tp"]) == (str(k), str(tp))
    expected = support.load_all_tensors(source)
    found = put_together(shards)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    merged = folder / f"merged-{tp}"
    support.relatent("shard", "--merge", shards, "-o", merged, "--quiet")
    assert support.folder_bytes(merged) == support.folder_bytes(source)


@pytest.mark.parametrize("tp", RANKS)
@pytest.mark.parametrize("form", FORMS)
def test_converted(bench, llama: Path, tmp_path: Path, form: str, tp: int) -> None:
    assert_round_trip(bench.convert(llama, "lossless", *FORMS[form]), tmp_path, tp)


def test_converted_in_pieces(bench, llama: Path, tmp_path: Path) -> None:
    """Several weight files with an index, and latents that share coordinates."""
    options = ("--to", "tpla", "--branches", 2, "--rank", 48, "--rope-dim", 32, "--key-rank", 16)
    folder = bench.convert(llama, "weights-only", *options, "--max-shard-size", "1MB")
    assert (folder / "model.safetensors.index.json").exists()
    for tp in RANKS:
        assert_round_trip(folder, tmp_path, tp)


def test_source(source: Path, tmp_path: Path) -> None:
    """Grouped queries as they are, key/value heads repeated where there are fewer than ranks."""
    config = json.loads((source / "config.json").read_text())
    for tp in RANKS:
        if config["num_attention_heads"] % tp == 0 and config["intermediate_size"] % tp == 0:
            assert_round_trip(source, tmp_path, tp)


def test_rank_holds_its_heads(bench, llama: Path, tmp_path: Path) -> None:
    """One latent for each of four ranks, which together cache each coordinate once."""
    folder = bench.convert(llama, "lossless", *FORMS["tpla 4"])
    whole = support.load_all_tensors(folder)
    attention = "model.layers.1.self_attn"
    for k in range(4):
        mine = load_file(rank_file(shard(folder, tmp_path / str(k), 4), k))
        latents = [name for name in mine if f"{attention}.kv_a_proj." in name]
        assert latents == [f"{attention}.kv_a_proj.{k}.weight"]
        for name in (latents[0], f"{attention}.kv_b_proj.{k}.weight", f"{attention}.q_proj.weight"):
            assert torch.equal(mine[name], whole[name])


def test_report(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    report = json.loads(support.relatent("shard", llama, "-o", out, "--tp", 2, "--json", "--quiet"))
    manifest = json.loads((out / "relatent_shards.json").read_text())
    assert (report["tp"], report["run"]) == (2, manifest["run"])
    assert {entry["file"]: entry["bytes"] for entry in report["files"]} == {
        rank_file(out, k).name: rank_file(out, k).stat().st_size for k in range(2)
    }


def test_same_bytes_every_time(llama: Path, tmp_path: Path) -> None:
    found = [support.folder_bytes(shard(llama, tmp_path / str(i), 4)) for i in range(2)]
    assert found[0] == found[1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where nothing may be left; kept apart so that stray files show."""
    (tmp_path / "target").mkdir()
    return tmp_path / "target" / "out"


@pytest.mark.parametrize(
    ("options", "named"),
    (
        (("--tp", 3), "num_attention_heads 8 does not divide by 3"),
        (("--tp", 16), "--tp 16"),
        (("--tp", 0), "--tp"),
        ((), "--tp is missing"),
        (("--tp", 2, "--layout", "fancy"), "--layout fancy is not one of: plain"),
        (("--tp", 2, "--merge", "elsewhere"), "either"),
    ),
)
def test_options_that_make_no_sense(llama: Path, out: Path, options: tuple, named: str) -> None:
    assert named in support.refused(USAGE, "shard", llama, "-o", out, *options)
    assert list(out.parent.iterdir()) == []


def test_sizes_that_do_not_divide(bench, llama: Path, tmp_path: Path, out: Path) -> None:
    converted = bench.convert(llama, "lossless", *FORMS["tpla 4"])
    line = support.refused(USAGE, "shard", converted, "-o", out, "--tp", 3)
    assert "3 devices do not divide 4 latents" in line
    copy = support.copy_checkpoint(llama, tmp_path / "narrow")
    support.edit_config(copy, {"intermediate_size": 508})

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if ".mlp." in name:
                tensors[name] = tensor.narrow(int("down" in name), 0, 508).contiguous()

    support.edit_tensors(copy, edit)
    line = support.refused(USAGE, "shard", copy, "-o", out, "--tp", 8)
    assert "intermediate_size 508 does not divide by 8" in line
    assert list(out.parent.iterdir()) == []


def drop(shards: Path) -> None:
    rank_file(shards, 2).unlink()


def truncate(shards: Path) -> None:
    os.truncate(rank_file(shards, 2), rank_file(shards, 2).stat().st_size - 1)


def scribble(shards: Path) -> None:
    rank_file(shards, 2).write_text("no safetensors")


def repeat_rank(shards: Path) -> None:
    shutil.copyfile(rank_file(shards, 1), rank_file(shards, 2))


def other_run(shards: Path) -> None:
    other = shard(shards.parent / "other source", shards.parent / "other", 4)
    shutil.copyfile(rank_file(other, 2), rank_file(shards, 2))


def other_tp(shards: Path) -> None:
    other = shard(shards.parent / "source", shards.parent / "other", 8)
    shutil.copyfile(rank_file(other, 2), rank_file(shards, 2))


def reshape(shards: Path) -> None:
    path = rank_file(shards, 2)
    header, data = support.read_header(path)
    header["model.layers.0.self_attn.k_proj.weight"]["shape"] = [192, 32]
    support.write_header(path, header, data)


def retype(shards: Path) -> None:
    path = rank_file(shards, 2)
    header, data = support.read_header(path)
    header["model.layers.0.self_attn.k_proj.weight"]["dtype"] = "F16"
    support.write_header(path, header, data)


def flip(name: str) -> Callable[[Path], None]:
    def damage(shards: Path) -> None:
        path = rank_file(shards, 2)
        header, data = support.read_header(path)
        at = header[name]["data_offsets"][0]
        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        support.write_header(path, header, data)

    return damage


def change_manifest(shards: Path) -> None:
    path = shards / "relatent_shards.json"
    path.write_text(path.read_text().replace('"tp":4', '"tp":2'))


def change_config(shards: Path) -> None:
    support.edit_config(shards, {"vocab_size": 17})


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing file": (drop, ("model-rank-2.safetensors", "no such file")),
    "truncated file": (truncate, ("model-rank-2.safetensors", "truncated")),
    "no safetensors": (scribble, ("model-rank-2.safetensors", "not a safetensors file")),
    "another rank": (repeat_rank, ("model-rank-2.safetensors", "rank 2", "found 1")),
    "another run": (other_run, ("model-rank-2.safetensors", "relatent_run")),
    "another number of ranks": (other_tp, ("model-rank-2.safetensors", "relatent_run")),
    "another shape": (reshape, ("k_proj.weight", "BF16 [32, 192]", "found BF16 [192, 32]")),
    "another dtype": (retype, ("k_proj.weight", "BF16 [32, 192]", "found F16 [32, 192]")),
    "a copy that differs": (
        flip("model.norm.weight"),
        ("model-rank-2", "model.norm.weight", "model-rank-0"),
    ),
    "a weight that differs": (flip("model.layers.0.mlp.up_proj.weight"), ("fingerprint",)),
    "another manifest": (change_manifest, ("relatent_shards.json", "changed")),
    "another config": (change_config, ("config.json", "changed")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_shards(llama: Path, tmp_path: Path, out: Path, name: str) -> None:
    damage, named = DAMAGES[name]
    source = support.copy_checkpoint(llama, tmp_path / "source")
    other = support.copy_checkpoint(llama, tmp_path / "other source")
    support.edit_tensors(other, lambda tensors: tensors["model.norm.weight"].add_(1))
    shards = shard(source, tmp_path / "shards", 4)
    damage(shards)
    line = support.refused(INPUT, "shard", "--merge", shards, "-o", out, "--quiet")
    assert all(part in line for part in named)
    assert list(out.parent.iterdir()) == []


def test_merge_of_something_else(llama: Path, tmp_path: Path, out: Path) -> None:
    line = support.refused(INPUT, "shard", "--merge", llama, "-o", out)
    assert "relatent_shards.json" in line
    line = support.refused(USAGE, "shard", "--merge", llama, "-o", out, "--tp", 2)
    assert "--tp" in line
    assert list(out.parent.iterdir()) == []


def test_existing_output_is_untouched(llama: Path, tmp_path: Path, out: Path) -> None:
    shards = shard(llama, tmp_path / "shards", 2)
    out.mkdir()
    (out / "precious").write_text("here before")
    for command in (("shard", llama, "--tp", 2), ("shard", "--merge", shards)):
        assert str(out) in support.refused(USAGE, *command, "-o", out)
    assert support.folder_bytes(out.parent) == {"out/precious": b"here before"}
