"""Layers of two kinds in one model, sliding windows, and what Gemma has beyond Llama."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedModel,
)

import support
from checkpoints import find_model

WINDOW = 64
# The norm of what differs in two float32 forward passes of random models.
FORWARD_TOLERANCE = 1e-5
GEMMA = {
    "vocab_size": 4096,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 2048,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@torch.no_grad()
def write_random(model: PreTrainedModel, folder: Path) -> Path:
    """With norms that are uneven, so that none goes unnoticed."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


def make_gemma2(folder: Path) -> Path:
    torch.manual_seed(5)
    config = Gemma2Config(**GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=6.0)
    return write_random(Gemma2ForCausalLM(config), folder)


def make_gemma3(folder: Path) -> Path:
    torch.manual_seed(6)
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 2.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    config = Gemma3TextConfig(**GEMMA, layer_types=kinds, rope_parameters=rope)
    return write_random(Gemma3ForCausalLM(config), folder)


def make_qwen2(folder: Path) -> Path:
    """Sliding from the second layer on but for the last."""
    support.copy_checkpoint(find_model("made-qwen2"), folder)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    changes = {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": kinds}
    support.edit_config(folder, changes)
    return folder


def make_llama(folder: Path) -> Path:
    return support.copy_checkpoint(find_model("llama-3m"), folder)


# How each is made, which layers are converted, and which then stay.
MODELS: dict[str, tuple[Callable[[Path], Path], tuple[Any, ...], list[int]]] = {
    "gemma2": (make_gemma2, (), [0, 2]),
    "gemma2 in part": (make_gemma2, ("--layers", "3"), [0, 1, 2]),
    "gemma3": (make_gemma3, (), [0, 1]),
    "gemma3 in part": (make_gemma3, ("--layers", "3"), [0, 1, 2]),
    "qwen2": (make_qwen2, (), [1]),
    "llama": (make_llama, ("--layers", "0,2"), [1, 3]),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, tuple, list[int]]:
    make, options, carried = MODELS[request.param]
    return make(tmp_path_factory.mktemp("models") / "model"), options, carried


def source_model(folder: Path) -> torch.nn.Module:
    """Where scores are capped, only eager attention of transformers does it."""
    return support.load(folder, attention="eager")


def lossless(bench, folder: Path, options: tuple, *more: Any) -> Path:
    return bench.convert(folder, "lossless", "--dtype", "float32", *options, *more)


def test_forward(bench, made) -> None:
    folder, _, _ = made
    expected = support.logits_of(source_model(folder), support.validation_ids())
    error = support.relative_error(bench.our_logits(folder), expected)
    print(f"relative logit error: {error:.2e}")
    assert error <= FORWARD_TOLERANCE


@pytest.mark.parametrize("change", ["window", "layer types"])
def test_windows_matter(bench, tmp_path: Path, change: str) -> None:
    folder = make_qwen2(tmp_path / "qwen2")
    before = bench.our_logits(folder)
    other = support.copy_checkpoint(folder, tmp_path / "other")
    changes = {"window": {"sliding_window": 32}, "layer types": {"layer_types": None}}[change]
    support.edit_config(other, {"max_window_layers": 0, **changes})
    expected = support.logits_of(source_model(other), support.validation_ids())
    assert support.relative_error(bench.our_logits(other), expected) <= FORWARD_TOLERANCE
    assert support.relative_error(expected, before) > 1e-3


@pytest.mark.parametrize("form", ["mla", "tpla", "gla"])
def test_lossless(bench, made, form: str) -> None:
    folder, options, carried = made
    branches = () if form == "mla" else ("--branches", 2)
    out = lossless(bench, folder, options, "--to", form, *branches)
    layers = json.loads((out / "config.json").read_text())["layers"]
    assert [i for i, layer in enumerate(layers) if layer is not None] == carried
    found = support.verify(folder, out)
    assert found["rel_logit_error"] <= 1e-5
    assert found["verdict"] == "proved"
    expected = support.logits_of(source_model(folder), support.validation_ids())
    for attention in ("sdpa", "eager"):
        model = support.load(out, attention=attention, custom_code=True)
        error = support.relative_error(
            support.logits_of(model, support.validation_ids()), expected
        )
        print(f"relative logit error with {attention} attention: {error:.2e}")
        assert error <= support.LOGIT_TOLERANCE


def test_carried_tensors(bench, made) -> None:
    folder, options, carried = made
    out = bench.convert(folder, "lossless", *options)
    before, after = support.load_all_tensors(folder), support.load_all_tensors(out)
    names = [
        name
        for name in before
        if "self_attn" in name and int(name.split(".")[2]) in carried
    ]
    assert len(names) >= 4 * len(carried)
    for name in names:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_text(bench, made, attention: str) -> None:
    """With the cache as without, and as the source."""
    folder, options, _ = made
    out = lossless(bench, folder, options)
    before = source_model(folder)
    after = support.load(out, attention=attention, custom_code=True)
    for prompt in support.prompts():
        text = support.generate(before, prompt)
        assert support.generate(after, prompt) == text
        assert support.greedy_without_cache(after, prompt, text) == text


def test_static_cache(bench, made) -> None:
    folder, options, _ = made
    model = support.load(lossless(bench, folder, options), custom_code=True)
    for prompt in support.prompts():
        found = support.generate(model, prompt, cache_implementation="static")
        assert found == support.generate(model, prompt)


def test_padded_batch(bench, made) -> None:
    """Left padding changes nothing, in sliding layers too."""
    folder, options, _ = made
    model = support.load(lossless(bench, folder, options), custom_code=True)
    prompts = support.prompts()
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    for row, prompt in enumerate(prompts):
        assert out[row, longest:].tolist() == support.generate(model, prompt)[:8]


@torch.no_grad()
def test_cache_holds_what_inspect_says(bench, made) -> None:
    folder, options, carried = made
    out = lossless(bench, folder, options)
    model = support.load(out, custom_code=True)
    cache = DynamicCache(config=model.config)
    ids = support.validation_ids(1, 200)
    model(ids, past_key_values=cache) if support.CACHE != "cache" else model(ids, cache=cache)
    inspected = json.loads(support.relatent("inspect", out, "--json"))
    assert inspected["layers"]["grouped_query"] == carried
    numbers = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    for i, count in enumerate(numbers):
        kept = WINDOW - 1 if i in inspected["layers"]["sliding"] else 200
        assert count % kept == 0
        numbers[i] = count // kept
    assert 4 * sum(numbers) == inspected["cache_bytes_per_token"]
    full = [n for i, n in enumerate(numbers) if i not in inspected["layers"]["sliding"]]
    sliding = [n for i, n in enumerate(numbers) if i in inspected["layers"]["sliding"]]
    for context in (4096, 32768, 131072):
        expected = 4 * (context * sum(full) + WINDOW * sum(sliding))
        assert inspected["cache_bytes_at_context"][str(context)] == expected


def test_saved_again(bench, made, tmp_path: Path) -> None:
    folder, options, _ = made
    out = lossless(bench, folder, options)
    model = support.load(out, custom_code=True)
    model.save_pretrained(tmp_path / "saved")
    again = support.load(tmp_path / "saved", custom_code=True)
    ids = support.validation_ids(1)
    assert torch.equal(support.logits_of(again, ids), support.logits_of(model, ids))
    assert torch.equal(bench.our_logits(tmp_path / "saved"), bench.our_logits(out))


@pytest.mark.parametrize("method", ["weights-only", "transmla", "relatent"])
def test_half_of_the_cache(bench, made, method: str) -> None:
    """The first layer that is converted has an error, and none before it."""
    folder, options, carried = made
    if method == "transmla" and (folder / "config.json").read_text().count("gemma3"):
        pytest.skip("no place for norms on queries and keys")
    out = bench.convert(
        *(folder, method, "--dtype", "float32", *options),
        *("--kv-budget", 0.5, "--rope-dim", 8),
    )
    found = support.verify(folder, out)
    errors = [layer["attention_rel_error"] for layer in found["layers"]]
    first = next(i for i in range(len(errors)) if i not in carried)
    assert all(error == 0 for error in errors[:first])
    assert 0 < errors[first] < 1
    assert found["verdict"] == "close as measured"
    model = support.load(out, custom_code=True)
    theirs = support.logits_of(model, support.validation_ids())
    assert support.relative_error(bench.our_logits(out), theirs) <= support.LOGIT_TOLERANCE


def test_cache_as_a_function_of_the_context(bench, tmp_path: Path) -> None:
    folder = make_gemma2(tmp_path / "gemma2")
    out = bench.convert(folder, "weights-only", "--kv-budget", 0.5, "--rope-dim", 16)
    found = support.verify(folder, out)["kv_bytes_at_context"]
    for context in (4096, 32768, 131072):
        source = 4 * 2 * 2 * 24 * (2 * context + 2 * WINDOW)
        converted = 4 * (2 * context * 48 + 2 * WINDOW * 2 * 2 * 24)
        assert found[str(context)] == {"source": source, "converted": converted}


def test_nothing_to_convert(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "mistral")
    drop = ("attention_bias", "mlp_bias", "pretraining_tp")
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    support.edit_config(folder, {**changes, "sliding_window": 64}, drop=drop)
    line = support.refused(
        3, "convert", folder, "-o", tmp_path / "out", "--method", "lossless", "--quiet"
    )
    assert "sliding_window" in line and "window of 64 in every layer" in line


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--layers", "9"), ("--layers", "layer 9")),
        (("--layers", "0-1"), ("--layers", "layer 0", "window of 64")),
        (("--layers", "one"), ("--layers", "0-5,8")),
        (("--engine", "deepseek"), ("--engine deepseek",)),
        (("--engine", "gguf"), ("--engine gguf",)),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    folder = make_gemma2(tmp_path / "gemma2")
    line = support.refused(
        2, "convert", folder, "-o", tmp_path / "out", "--method", "lossless", "--quiet", *options
    )
    assert all(part in line for part in parts)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"attn_logit_softcapping": "50"}, "attn_logit_softcapping"),
    ],
)
def test_refused_keys(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    folder = make_gemma2(tmp_path / "gemma2")
    support.edit_config(folder, changes)
    assert part in support.refused(3, "inspect", folder)


def test_code_refuses_what_it_does_not_know(bench, tmp_path: Path) -> None:
    out = lossless(bench, make_gemma2(tmp_path / "gemma2"), ())
    layers = json.loads((out / "config.json").read_text())["layers"]
    for changes, complaint in (
        ({"layers": [*layers[:3], {**layers[2], "sinks": 1}]}, "an entry of layers"),
        ({"layers": [*layers[:3], {**layers[2], "sliding_window": 8}]}, "windows must be equal"),
        ({"rope_lists": []}, "no rope list 0"),
        ({"norm_placement": "above"}, "norm_placement"),
        ({"hidden_activation": "relu"}, "activation"),
    ):
        copy = support.copy_checkpoint(out, tmp_path / complaint.replace(" ", "-"))
        support.edit_config(copy, changes)
        with pytest.raises(ValueError, match=complaint):
            AutoConfig.from_pretrained(copy, trust_remote_code=True)
