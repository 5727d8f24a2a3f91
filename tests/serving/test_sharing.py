"""What the plug-in decides without an engine: sharing between devices, refusals, loading."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoints
import conftest
import pytest
import support
import torch

LOSSLESS = ("--method", "lossless")
FORMS = {
    "mla": ("--to", "mla", "--engine", "relatent", *LOSSLESS),
    **{
        f"{form}-{count}": ("--to", form, "--branches", count, *LOSSLESS)
        for form in ("gla", "tpla", "mlra")
        for count in (2, 4)
    },
}


@pytest.fixture(scope="module")
def plugin(bench: conftest.Workbench) -> Iterator[ModuleType]:
    """The installed package, without vLLM as far as that goes."""
    sys.path.insert(0, str(bench.site))
    yield importlib.import_module("relatent_vllm")
    sys.path.remove(str(bench.site))


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_devices_share_as_inspect_says(bench, plugin: ModuleType, form: str) -> None:
    sharing = importlib.import_module("relatent_vllm.sharing")
    folder = bench.convert(checkpoints.find_model("llama-3m"), *FORMS[form])
    config = read_config(folder)
    branches, shared_ranks = config["latent_branches"], config["latent_shared_ranks"]
    inspected = support.inspect(folder)
    for tp in (1, 2, 4, 8):
        expected = inspected["cache_bytes_per_token_per_device"][str(tp)]
        if expected is None:
            assert sharing.why_not_shared(branches, tp) is not None
            continue
        shares = sharing.device_shares(branches, tp)
        most = max(share.latent_numbers(branches, shared_ranks) for share in shares)
        numbers = most + config["qk_rope_head_dim"]
        assert 4 * config["num_hidden_layers"] * numbers == expected
        computed = [
            (part.branch, head)
            for share in shares
            for part in share.branches
            for head in range(part.first_head, part.first_head + part.num_heads)
        ]
        assert len(computed) == len(set(computed))
        assert len(computed) == sum(branch["num_heads"] for branch in branches)


@pytest.mark.parametrize("form", ("mla", "gla-2", "tpla-4"))
def test_the_same_devices_are_refused(bench, plugin: ModuleType, form: str) -> None:
    sharing = importlib.import_module("relatent_vllm.sharing")
    source = checkpoints.find_model("llama-3m")
    folder = bench.convert(source, *FORMS[form])
    branches = read_config(folder)["latent_branches"]
    for tp in (3, 6, 64):
        reason = sharing.why_not_shared(branches, tp)
        span = ("--tokens", support.VALIDATION_TOKENS, "--sequences", 1, "--length", 8)
        done = support.run("verify", source, folder, *span, "--tp", tp, "--quiet")
        assert done.returncode == 2, done.stderr
        assert reason is not None and reason in done.stderr, (reason, done.stderr)
        with pytest.raises(ValueError, match="does not fit this model"):
            sharing.device_shares(branches, tp)


REFUSED = {
    "layout_version": ({"layout_version": 3}, "layout_version 3"),
    "latent_features": ({"latent_features": "squares"}, "latent_features 'squares'"),
    "layers": ({"layers": [{}, {}]}, "lists layers"),
    "rope lists": ({"latent_rope_lists": [0, 1]}, "latent_rope_lists must name one of rope_lists"),
    "no_rope_layers": ({"no_rope_layers": [0, 1]}, "no_rope_layers"),
    "residual_multiplier": ({"residual_multiplier": 0.22}, "residual_multiplier 0.22"),
    "logits_scaling": ({"logits_scaling": 8.0}, "logits_scaling 8.0"),
    "embedding_multiplier": ({"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
    "norm_placement": ({"norm_placement": "both"}, "norm_placement 'both'"),
    "softcapping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config (fp8)"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
    "heads": ({"num_attention_heads": 9}, "must serve every head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_configs(bench, plugin: ModuleType, case: str) -> None:
    configuration = importlib.import_module("relatent_vllm.configuration")
    changes, words = REFUSED[case]
    folder = bench.convert(checkpoints.find_model("llama-3m"), *FORMS["tpla-2"])
    config = read_config(folder)
    configuration.RelatentConfig(**config)
    with pytest.raises(ValueError) as caught:
        configuration.RelatentConfig(**{**config, **changes})
    message = str(caught.value)
    assert words in message and "\n" not in message and ". " not in message


def test_registered_config_needs_no_trust(bench, plugin: ModuleType) -> None:
    """config.json names code beside the weights, which is not run."""
    from transformers import AutoConfig

    folder = bench.convert(checkpoints.find_model("llama-3m"), *FORMS["tpla-2"])
    assert "auto_map" in read_config(folder)
    plugin.register()
    plugin.register()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert type(config).__module__ == "relatent_vllm.configuration"


def test_loading_is_strict(plugin: ModuleType) -> None:
    loading = importlib.import_module("relatent_vllm.loading")
    filled = torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False)
    rows = (slice(1, 3),)
    places = {
        "a": loading.Place((2, 3), [loading.Copy(filled, rows)]),
        "b": loading.Place((5,)),
    }
    good = {"a": torch.ones(2, 3), "b": torch.ones(5)}

    def load(tensors: dict[str, torch.Tensor]) -> None:
        loading.load_all(tensors.items(), places, lambda name: name == "elsewhere")

    load({**good, "elsewhere": torch.ones(1)})
    assert filled.sum() == 6 and filled[1:3].sum() == 6
    with pytest.raises(ValueError, match="holds surplus, which has no place"):
        load({**good, "surplus": torch.ones(1)})
    with pytest.raises(ValueError, match="lacks b"):
        load({"a": good["a"]})
    with pytest.raises(ValueError, match=r"a has shape \[3, 2\]"):
        load({**good, "a": torch.ones(3, 2)})


def test_same_config_as_the_code_beside_the_weights(plugin: ModuleType) -> None:
    """Both readers of the layout know the same keys, with the same values where they are absent."""
    import inspect as python

    configuration = importlib.import_module("relatent_vllm.configuration")
    path = support.ROOT / "convert/engines/hf/configuration_relatent.py"
    spec = importlib.util.spec_from_file_location("configuration_relatent", path)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    ours = python.signature(configuration.RelatentConfig.__init__).parameters
    theirs = python.signature(other.RelatentConfig.__init__).parameters
    for name, parameter in theirs.items():
        assert name in ours and ours[name].default == parameter.default, name
