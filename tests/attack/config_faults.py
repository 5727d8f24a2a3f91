"""Faults in config.json, of every layout: an edit that finds nothing to change is left out."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

from faults import REFUSED, STRUCTURE, Edit, Fault, Subject, edit_json, setting, without
from folders import Json

CONFIG = "config.json"


def mapped(key: str, change: Callable[[Any], Any]) -> Edit:
    """Changes a value where there is one."""

    def edit(config: Json) -> None:
        if config.get(key) is not None:
            config[key] = change(config[key])

    return edit


def scaled(key: str, factor: float) -> Edit:
    return mapped(key, lambda value: type(value)(value * factor))


def toggled(key: str) -> Edit:
    return mapped(key, lambda value: not value)


def put_for(key: str, value: Any) -> Edit:
    return mapped(key, lambda _: value)


def rope(key: str, change: Callable[[Any], Any]) -> Edit:
    """Of the rotation's settings, wherever a layout has them."""

    def edit(config: Json) -> None:
        for place in (config, config.get("rope_parameters"), config.get("rope_scaling")):
            if place:
                mapped(key, change)(place)

    return edit


def both(first: Edit, second: Edit) -> Edit:
    def edit(config: Json) -> None:
        first(config)
        second(config)

    return edit


def first_branch(key: str, value: int) -> Edit:
    return mapped("latent_branches", lambda all_: [{**all_[0], key: value}, *all_[1:]])


def stretched(factors: list[float]) -> list[float]:
    return [*factors[:-1], factors[-1] * 4]


EDITS: dict[str, dict[str, Edit]] = {
    "architectures": {
        "of another model": setting("architectures", ["LlamaModel"]),
        "of an unknown model": setting("architectures", ["OtherForCausalLM"]),
        "missing": without("architectures"),
    },
    "auto_map": {
        "other code": setting(
            "auto_map", {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
        ),
        "missing": without("auto_map"),
    },
    "model_type": {
        "of another family": setting("model_type", "mistral"),
        "an older one": put_for("model_type", "deepseek_v2"),
        "missing": without("model_type"),
    },
    "num_key_value_heads": {"halved": scaled("num_key_value_heads", 0.5)},
    "num_attention_heads": {
        "halved": both(scaled("num_attention_heads", 0.5), scaled("n_head", 0.5))
    },
    "num_hidden_layers": {"halved": both(scaled("num_hidden_layers", 0.5), scaled("n_layer", 0.5))},
    "hidden_size": {"halved": both(scaled("hidden_size", 0.5), scaled("n_embd", 0.5))},
    "vocab_size": {"halved": scaled("vocab_size", 0.5)},
    "intermediate_size": {"halved": scaled("intermediate_size", 0.5)},
    "head_dim": {"halved": scaled("head_dim", 0.5), "missing": without("head_dim")},
    "qk_rope_head_dim": {"halved": scaled("qk_rope_head_dim", 0.5)},
    "qk_rope_dim": {"halved": scaled("qk_rope_dim", 0.5)},
    "qk_nope_head_dim": {"doubled": scaled("qk_nope_head_dim", 2)},
    "qk_head_dim": {"doubled": scaled("qk_head_dim", 2)},
    "v_head_dim": {"halved": scaled("v_head_dim", 0.5)},
    "kv_lora_rank": {"halved": scaled("kv_lora_rank", 0.5)},
    "q_lora_rank": {"given": setting("q_lora_rank", 64)},
    "mlra_model": {"another": put_for("mlra_model", "mlra_2")},
    "bos_token_id": {"another": setting("bos_token_id", 7), "missing": without("bos_token_id")},
    "eos_token_id": {
        "another": setting("eos_token_id", 9),
        "a list": setting("eos_token_id", [1, 2]),
        "missing": without("eos_token_id"),
    },
    "pad_token_id": {"another": setting("pad_token_id", 5)},
    "max_position_embeddings": {
        "halved": both(scaled("max_position_embeddings", 0.5), scaled("block_size", 0.5)),
        "doubled": both(scaled("max_position_embeddings", 2), scaled("block_size", 2)),
        "missing": both(without("max_position_embeddings"), without("block_size")),
    },
    "rope_theta": {"doubled": rope("rope_theta", lambda theta: theta * 2)},
    "rope factor": {
        "doubled": rope("factor", lambda factor: factor * 2),
        "of attention doubled": rope("attention_factor", lambda factor: factor * 2),
    },
    "rope factors": {
        "one stretched": both(rope("short_factor", stretched), rope("long_factor", stretched)),
        "one of the long ones stretched": rope("long_factor", stretched),
    },
    "rope context": {
        "halved": rope("original_max_position_embeddings", lambda length: length // 2)
    },
    "rope_type": {
        "default": rope("rope_type", lambda _: "default"),
        "linear": rope("rope_type", lambda _: "linear"),
    },
    "rope_parameters": {"missing": without("rope_parameters")},
    "rope_interleave": {"toggled": toggled("rope_interleave")},
    "rms_norm_eps": {
        "a hundred times": scaled("rms_norm_eps", 100),
        "a thousandth": scaled("rms_norm_eps", 1e-3),
    },
    "tie_word_embeddings": {"toggled": toggled("tie_word_embeddings")},
    "dtype": {
        "another": mapped("dtype", lambda old: "float16" if old != "float16" else "bfloat16"),
        "missing": without("dtype"),
    },
    "torch_dtype": {"added": setting("torch_dtype", "float16")},
    "quantization_config": {
        "added": setting("quantization_config", {"quant_method": "fp8", "fmt": "e4m3"})
    },
    "hidden_act": {"another": put_for("hidden_act", "gelu")},
    "attention_bias": {"toggled": toggled("attention_bias")},
    "attention_dropout": {"half": setting("attention_dropout", 0.5)},
    "sliding_window": {"added": setting("sliding_window", 64)},
    "use_cache": {"toggled": toggled("use_cache")},
    "initializer_range": {"doubled": scaled("initializer_range", 2)},
    "first_k_dense_replace": {"one": put_for("first_k_dense_replace", 1)},
    "routed_scaling_factor": {"doubled": scaled("routed_scaling_factor", 2)},
    "layout_version": {"the next": put_for("layout_version", 3)},
    "latent_form": {
        "another": mapped("latent_form", lambda old: "gla" if old != "gla" else "tpla")
    },
    "latent_norm": {"another": put_for("latent_norm", "branch")},
    "latent_features": {"another": put_for("latent_features", "raw")},
    "latent_branches": {
        "fewer heads": first_branch("num_heads", 1),
        "other heads": first_branch("first_head", 1),
        "another rank": first_branch("rank", 8),
    },
    "layers": {"given": setting("layers", [{}])},
    "an unknown key": {"added": setting("logits_scaling", 8.0)},
}


def config_faults(subject: Subject) -> Iterator[Fault]:
    for key, edits in EDITS.items():
        for what, edit in edits.items():
            changed = copy.deepcopy(subject.original.config)
            edit(changed)
            if changed == subject.original.config:
                continue
            # Without a report nothing else but running tells what the config was.
            caught_by = (STRUCTURE, REFUSED, *(() if subject.has_report else subject.running))
            fault = Fault("config", what, f"{CONFIG} {key}", edit_json(CONFIG, edit), caught_by)
            yield fault
            if subject.has_report:
                yield fault.forged(STRUCTURE, REFUSED, *subject.running)
