"""What `convert --dry-run` says without reading a weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import support

BUDGET = ("--kv-budget", 0.5)
LIMIT = ("--kv-budget", "auto", "--max-nats", 0.5)
SPLIT = ("--to", "tpla", "--branches", 2, "--per-device", 64)


@pytest.fixture
def unreadable(llama: Path, tmp_path: Path) -> Path:
    """Every weight is NaN, which whoever reads it refuses."""
    source = support.copy_checkpoint(llama, tmp_path / "source")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.fill_(float("nan"))

    support.edit_tensors(source, spoil)
    return source


def dry(source: Path, out: Path, *options: Any) -> tuple[dict[str, Any], str]:
    """The plan as JSON, and as it is printed."""
    command = ("convert", source, "-o", out, *options, "--dry-run")
    done = support.run(*command)
    assert done.returncode == 0, done.stderr
    assert "tried" not in done.stderr
    plan = json.loads(support.relatent(*command, "--json"))
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return plan, done.stdout


@pytest.mark.parametrize("options", [BUDGET, LIMIT, SPLIT, (*SPLIT, "--rope-dim", 16)])
def test_nothing_is_tried(
    bench, llama: Path, unreadable: Path, tmp_path: Path, options: tuple
) -> None:
    given = (*options, "--calibration", bench.calibration(llama))
    plan, printed = dry(unreadable, tmp_path / "out", *given)
    left = plan["open_sizes"]
    assert "a dry run makes none" in left["not_chosen_yet"]
    for key, name in (
        ("not_chosen_yet", "not chosen yet"),
        ("settled", "settled"),
        ("to_be_tried", "to be tried"),
        ("planned_here", "planned here"),
    ):
        assert f"{name}: {left[key]}\n" in printed
    assert left["rope_dim"]["least"] <= plan["rope_dim"] <= left["rope_dim"]["most"]
    assert left["kv_rank"]["least"] <= plan["kv_rank"] <= left["kv_rank"]["most"]
    elements = plan["cache_elements_per_token_and_layer"]
    assert f"cache per token and layer: {elements['converted']} elements, source 256" in printed
    assert plan["cache_bytes_per_token"] == {"source": 2048, "converted": 8 * elements["converted"]}
    assert plan["memory_bytes_estimate"] > 0 and plan["disk_bytes"] > 0 and plan["tensors"]


def test_a_budget_names_its_candidates(bench, llama: Path, tmp_path: Path) -> None:
    given = (*BUDGET, "--calibration", bench.calibration(llama))
    plan, _ = dry(llama, tmp_path / "out", *given)
    candidates = plan["open_sizes"]["candidates"]
    assert (plan["rope_dim"], plan["kv_rank"]) == (32, 95)
    assert plan["open_sizes"]["planned_here"].startswith("rotary 32 + latents 95, ")
    report = json.loads(
        support.relatent(
            *("convert", llama, "-o", tmp_path / "out", *given, "--no-query-fit", "--no-key-fit"),
            *("--no-refit", "--json", "--quiet"),
        )
    )
    sizes = ("rope_dim", "kv_rank", "key_rank")
    assert [{key: trial[key] for key in sizes} for trial in report["trials"]] == candidates


def test_settled_sizes_leave_nothing_open(bench, llama: Path, tmp_path: Path) -> None:
    """The method that nobody names is relatent with a calibration, and weights-only without."""
    sizes = ("--rope-dim", 32, "--rank", 96)
    plan, printed = dry(llama, tmp_path / "out", *sizes)
    assert plan["method"] == "weights-only"
    assert plan["open_sizes"] is None and "not chosen yet" not in printed
    plan, _ = dry(llama, tmp_path / "out", *sizes, "--calibration", bench.calibration(llama))
    assert plan["method"] == "relatent" and plan["open_sizes"] is None
