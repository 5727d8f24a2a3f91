"""Folders in vLLM: by the plug-in, by its own DeepSeek class, and by its transformers backend.

Perplexity is that of `relatent verify`, greedy text is what our forward pass finds most likely at
every step, and the cache takes the bytes that `relatent inspect` promises each device.
"""

from pathlib import Path
from typing import Any

import checkpoints
import conftest
import pytest
import support
import torch
from experts import EXPERTS, write_experts

full = pytest.mark.full
NATIVE = "DeepseekV3ForCausalLM"
# One without biases and one with.
LARGER = checkpoints.present("llama-26m", "qwen2-13m")
WIDE = checkpoints.present("llama-26m")
(MLA,) = checkpoints.present("deepseek-14m")

# Sizes for heads of 32 with four keys and values; of a head of 64 everything is twice that.
FORMS = {
    "mla": ("--to", "mla", "--engine", "relatent", "--rope-dim", 32, "--rank", 96),
    "gla-2": ("--to", "gla", "--branches", 2, "--per-device", 64, "--rope-dim", 16),
    "tpla-2": (
        *("--to", "tpla", "--branches", 2),
        *("--per-device", 64, "--rope-dim", 16, "--key-rank", 16),
    ),
    "tpla-4": (
        *("--to", "tpla", "--branches", 4),
        *("--per-device", 48, "--rope-dim", 16, "--key-rank", 16),
    ),
    "mlra-2": (
        *("--to", "mlra", "--branches", 2),
        *("--per-device", 48, "--rope-dim", 16, "--key-rank", 16),
    ),
    "mlra-4": (
        *("--to", "mlra", "--branches", 4),
        *("--per-device", 48, "--rope-dim", 16, "--key-rank", 16),
    ),
}
SMALL = {("mla", 1), ("mlra-2", 1), ("tpla-4", 2), ("gla-2", 2)}


def in_small_set(form: str, tp: int) -> Any:
    return pytest.param(form, tp, marks=() if (form, tp) in SMALL else full)


def twice(options: tuple) -> tuple:
    sized = ("--rope-dim", "--rank", "--per-device", "--key-rank")
    return tuple(
        2 * option if index and options[index - 1] in sized else option
        for index, option in enumerate(options)
    )


def check(
    source: Path, converted: Path, found: dict[str, Any], work: Path, tp: int, cache: bool = True
) -> None:
    """Perplexity, greedy text and cache bytes."""
    expected = support.perplexity(source, converted)
    promised = support.inspect(converted)["cache_bytes_per_token_per_device"][str(tp)]
    held = [device["bytes_per_token"] for device in found["cache"]]
    print(f"perplexity {found['perplexity']:.10f}, verify says {expected:.10f}; bytes {held}")
    assert found["predicted_tokens"] == support.SEQUENCES * (support.LENGTH - 1)
    assert abs(found["perplexity"] / expected - 1) <= support.PERPLEXITY_TOLERANCE
    if cache:
        assert held == [promised] * tp
    support.check_text(converted, found, work)


@pytest.mark.parametrize(("form", "tp"), [in_small_set(f, tp) for f in FORMS for tp in (1, 2)])
def test_forms(bench, tmp_path: Path, form: str, tp: int) -> None:
    source = checkpoints.find_model("llama-3m")
    converted = bench.convert(source, *FORMS[form])
    found = bench.score(converted, "--tp", tp)
    assert found["architecture"] == "RelatentForCausalLM"
    check(source, converted, found, tmp_path, tp)


@full
@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", LARGER)
def test_forms_of_larger_models(bench, tmp_path: Path, model: str, form: str, tp: int) -> None:
    source = checkpoints.find_model(model)
    options = twice(FORMS[form]) if model in WIDE else FORMS[form]
    converted = bench.convert(source, *options)
    check(source, converted, bench.score(converted, "--tp", tp), tmp_path, tp)


# The stand-in's heads are half as wide as the larger model's.
NORMED = {
    "made-qwen3": ("--rope-dim", 8, "--per-device", 40, "--key-rank", 12),
    "qwen3-13m": ("--rope-dim", 16, "--per-device", 80, "--key-rank", 24),
}


@pytest.mark.parametrize("tp", (1, pytest.param(2, marks=full)))
@pytest.mark.parametrize("model", checkpoints.present("qwen3-13m"))
def test_normed_heads(bench, tmp_path: Path, model: str, tp: int) -> None:
    """Norms on queries and keys: the latents read what they leave."""
    source = checkpoints.find_model(model)
    converted = bench.convert(source, "--to", "tpla", "--branches", 2, *NORMED[model])
    check(source, converted, bench.score(converted, "--tp", tp), tmp_path, tp)


@full
@pytest.mark.parametrize(("form", "tp"), (("tpla-4", 4), ("gla-2", 4)))
def test_four_devices(bench, tmp_path: Path, form: str, tp: int) -> None:
    """A latent for each, and a latent for each two."""
    source = checkpoints.find_model("llama-3m")
    converted = bench.convert(source, *FORMS[form])
    found = bench.score(converted, "--tp", tp)
    check(source, converted, found, tmp_path, tp)
    whole = bench.score(converted)["weight_bytes"][0]
    assert max(found["weight_bytes"]) < 0.6 * whole


@full
@pytest.mark.parametrize("tp", (1, 2))
def test_mla_source(bench, tmp_path: Path, tp: int) -> None:
    """Its norm is formed on every device of rows that no device caches."""
    source = checkpoints.find_model(MLA)
    sizes = ("--to", "tpla", "--branches", 2, "--per-device", 96, "--key-rank", 32)
    converted = bench.convert(source, "--method", "weights-only", *sizes)
    check(source, converted, bench.score(converted, "--tp", tp), tmp_path, tp)


@full
def test_published_slices(bench, tmp_path: Path) -> None:
    """Every latent has a norm of its own."""
    source = checkpoints.find_model(MLA)
    sizes = ("--to", "tpla", "--branches", 2, "--rank", 128, "--order", "pca")
    converted = bench.convert(source, "--method", "weights-only", *sizes)
    check(source, converted, bench.score(converted), tmp_path, 1)


@full
@pytest.mark.parametrize(
    ("case", "tp"),
    [(case, 1) for case in EXPERTS] + [("noaux_tc", 2), ("mixtral", 2), ("qwen2_moe", 2)],
    ids=str,
)
def test_experts(bench, tmp_path: Path, case: str, tp: int) -> None:
    source = write_experts(tmp_path / "source", *EXPERTS[case])
    sizes = ("--to", "gla", "--branches", 2, "--rank", 48)
    converted = bench.convert(source, "--method", "weights-only", *sizes)
    check(source, converted, bench.score(converted, "--tp", tp), tmp_path, tp)


@full
def test_pipeline_stages(bench, tmp_path: Path) -> None:
    source = checkpoints.find_model("llama-3m")
    converted = bench.convert(source, *FORMS["tpla-2"])
    found = bench.score(converted, "--pp", 2, "--compile")
    promised = support.inspect(converted)["cache_bytes_per_token"]
    assert [device["bytes_per_token"] for device in found["cache"]] == [promised / 2] * 2
    support.check_text(converted, found, tmp_path)


@full
def test_compiled(bench, tmp_path: Path) -> None:
    source = checkpoints.find_model("llama-3m")
    converted = bench.convert(source, *FORMS["tpla-4"])
    check(source, converted, bench.score(converted, "--compile"), tmp_path, 1)


@full
def test_bfloat16(bench) -> None:
    """As close to float32 as the types allow."""
    source = checkpoints.find_model("llama-3m")
    converted = bench.convert(source, *FORMS["tpla-4"])
    found = bench.score(converted, "--dtype", "bfloat16")
    assert abs(found["perplexity"] / support.perplexity(source, converted) - 1) < 0.01
    promised = support.inspect(converted)["cache_bytes_per_token"]
    assert found["cache"][0]["bytes_per_token"] == promised / 2


def with_changes(bench: conftest.Workbench, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy with another config.json."""
    return support.copy_with(folder, bench.new_path(), changes)


@full
@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"layout_version": 3}, "layout_version 3"),
        ({"quantization_config": {"quant_method": "fp8"}}, "unquantised"),
    ),
    ids=("layout", "quantised"),
)
def test_refused_configs_do_not_start(bench, changes: dict[str, Any], words: str) -> None:
    folder = bench.convert(checkpoints.find_model("llama-3m"), *FORMS["mla"])
    with pytest.raises(support.Failed) as caught:
        bench.score(with_changes(bench, folder, changes))
    assert words in str(caught.value)


@full
def test_refused_tensors_do_not_start(bench) -> None:
    from safetensors.torch import load_file, save_file

    folder = bench.convert(checkpoints.find_model("llama-3m"), *FORMS["mla"])
    other = with_changes(bench, folder, {})
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.self_attn.surplus.weight"] = torch.zeros(2)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(support.Failed) as caught:
        bench.score(other)
    assert "model.layers.0.self_attn.surplus.weight, which has no place" in str(caught.value)


def kernel_sized(bench: conftest.Workbench, source: Path, engine: str) -> Path:
    """MLA of 512 + 64, the size that vLLM's kernel for CPUs has."""
    # A latent as large as this needs more tokens than it has numbers.
    return bench.convert(source, "--engine", engine, "--shape", "512+64", sequences=32)


@pytest.mark.parametrize(
    ("model", "tp"),
    [
        pytest.param(model, tp, marks=() if (model, tp) == ("llama-3m", 1) else full)
        for model in ("llama-3m", *LARGER)
        for tp in (1, 2)
    ],
)
def test_stock_transformers_backend(bench, tmp_path: Path, model: str, tp: int) -> None:
    source = checkpoints.find_model(model)
    converted = kernel_sized(bench, source, "transformers")
    found = bench.score(converted, "--tp", tp, "--model-impl", "transformers", plugin=False)
    assert "Transformers" in found["architecture"]
    check(source, converted, found, tmp_path, tp)


def test_native_class_without_its_kernel(bench, tmp_path: Path) -> None:
    """The names, norms and rotation of the folder; the class caches whole keys and values here."""
    source = checkpoints.find_model("llama-3m")
    converted = bench.convert(source, "--engine", "deepseek", "--rope-dim", 32, "--rank", 96)
    found = bench.score(converted, plugin=False, environment={"VLLM_MLA_DISABLE": "1"})
    assert found["architecture"] == NATIVE
    check(source, converted, found, tmp_path, 1, cache=False)


@full
@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("model", (*WIDE, "qwen2-13m"))  # a rotary key of 64 wants heads of 64
def test_native_class(bench, tmp_path: Path, model: str, tp: int) -> None:
    source = checkpoints.find_model(model)
    converted = kernel_sized(bench, source, "deepseek")
    found = bench.score(converted, "--tp", tp, plugin=False)
    assert found["architecture"] == NATIVE
    check(source, converted, found, tmp_path, tp)


PRETENCE = """
import torch

torch.cpu._is_amx_tile_supported = lambda: True
"""


@full
def test_chunked_prefill_and_prefix_caching(bench, tmp_path: Path) -> None:
    """vLLM turns both off for MLA on CPUs without AMX, which the plug-in's kernels do not use."""
    (tmp_path / "sitecustomize.py").write_text(PRETENCE)
    source = checkpoints.find_model("llama-3m")
    converted = bench.convert(source, *FORMS["tpla-4"])
    paths = {"PYTHONPATH": f"{tmp_path}:{bench.site}"}
    found = bench.score(converted, "--chunk", 64, "--prefix-caching", environment=paths)
    assert found["chunked_prefill"] and found["prefix_caching"]
    check(source, converted, found, tmp_path, 1)
