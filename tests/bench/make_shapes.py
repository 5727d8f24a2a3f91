"""Writes a checkpoint of a published model's shapes with random weights, for measuring only.

Names, shapes, types, configuration and files are those of the published repository, at any number
of layers; the weights are independent normal numbers. That is enough for time and memory, which
hardly depend on the values, and for nothing else: such a model has no structure to compress, and
what a conversion loses on it says nothing about any real checkpoint.

Every tensor is a function of the seed and its own name, the same on every machine and at every
number of layers, and is written block by block.

  tests/bench/make_shapes.py llama-3-8b --layers 2 -o /tmp/llama-3-8b-2
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
# config.json as published.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **LLAMA,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_hidden_layers": 16,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
    "llama-3-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 32,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.40.0.dev0",
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen1.5-moe-a2.7b": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
# Families whose queries, keys and values have biases.
BIASED = ("qwen2", "qwen2_moe")
WEIGHT_SCALE = 0.02
GAIN_SPREAD = 0.05  # norm gains are 1 and so much
BLOCK = 1 << 18  # values written at once; a multiple of the four values of one draw
SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def size(self) -> int:
        return 2 * self.count


def size(text: str) -> int:
    """A size such as 5GB."""
    for unit, factor in sorted(SIZES.items(), key=lambda pair: -len(pair[0])):
        if text.upper().endswith(unit):
            return round(float(text[: -len(unit)]) * factor)
    return int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--layers", type=int, help="as published unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard-size", type=size, default=size("5GB"))
    parser.add_argument("--vocab", type=int, help="a smaller vocabulary, for quick trials")
    return parser.parse_args()


def config_of(shape: str, layers: int | None = None, vocab: int | None = None) -> dict[str, Any]:
    config = dict(SHAPES[shape])
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    if vocab is not None:
        config["vocab_size"] = vocab
        config["bos_token_id"] = config["eos_token_id"] = 0
    return dict(sorted(config.items()))


def mlp_tensors(name: str, hidden: int, inner: int) -> list[Tensor]:
    return [
        Tensor(f"{name}.gate_proj.weight", (inner, hidden)),
        Tensor(f"{name}.up_proj.weight", (inner, hidden)),
        Tensor(f"{name}.down_proj.weight", (hidden, inner)),
    ]


def feed_forward(config: dict[str, Any], name: str) -> list[Tensor]:
    """The MLP of a layer, or its experts: all shapes here have them in every layer or in none."""
    hidden = config["hidden_size"]
    experts = config.get("num_experts", 0)
    if not experts:
        return mlp_tensors(name, hidden, config["intermediate_size"])
    out = [Tensor(f"{name}.gate.weight", (experts, hidden))]
    for expert in range(experts):
        out += mlp_tensors(f"{name}.experts.{expert}", hidden, config["moe_intermediate_size"])
    if shared := config.get("shared_expert_intermediate_size", 0):
        out += mlp_tensors(f"{name}.shared_expert", hidden, shared)
        out.append(Tensor(f"{name}.shared_expert_gate.weight", (1, hidden)))
    return out


def tensors_of(config: dict[str, Any]) -> list[Tensor]:
    """All weights in the order of the published model's state, which decides on the shards."""
    hidden = config["hidden_size"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    vocab = config["vocab_size"]
    out = [Tensor("model.embed_tokens.weight", (vocab, hidden))]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part, rows in (("q", heads * head), ("k", key_heads * head), ("v", key_heads * head)):
            out.append(Tensor(f"{layer}.self_attn.{part}_proj.weight", (rows, hidden)))
            if config["model_type"] in BIASED:
                out.append(Tensor(f"{layer}.self_attn.{part}_proj.bias", (rows,)))
        out.append(Tensor(f"{layer}.self_attn.o_proj.weight", (hidden, heads * head)))
        if config["model_type"] == "qwen3_moe":
            out.append(Tensor(f"{layer}.self_attn.q_norm.weight", (head,)))
            out.append(Tensor(f"{layer}.self_attn.k_norm.weight", (head,)))
        out += feed_forward(config, f"{layer}.mlp")
        out.append(Tensor(f"{layer}.input_layernorm.weight", (hidden,)))
        out.append(Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,)))
    out.append(Tensor("model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        out.append(Tensor("lm_head.weight", (vocab, hidden)))
    return out


def shards_of(tensors: list[Tensor], largest: int) -> list[list[Tensor]]:
    """Filled in order; a tensor that is too large has a shard of its own."""
    out: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if out[-1] and filled + tensor.size > largest:
            out.append([])
            filled = 0
        out[-1].append(tensor)
        filled += tensor.size
    return out


@cache
def quantiles(mean: float, spread: float) -> np.ndarray:
    """For each 16-bit number the normal number of its place in the order, as bfloat16."""
    normal = statistics.NormalDist(mean, spread)
    # One half and its mirror image, so that the mean is exact.
    upper = [normal.inv_cdf((i + 0.5) / 65536) - mean for i in range(32768, 65536)]
    values = np.array([-value for value in reversed(upper)] + upper) + mean
    bits = values.astype("<f4").view("<u4").astype(np.uint64)
    # To nearest, ties to even.
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def blocks(tensor: Tensor, seed: int) -> Iterator[np.ndarray]:
    """The tensor's bfloat16 numbers, some at a time; what they are does not depend on how many."""
    table = quantiles(1.0, GAIN_SPREAD) if "norm" in tensor.name else quantiles(0.0, WEIGHT_SCALE)
    key = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
    # numpy promises the same stream from the same key in every version.
    generator = np.random.PCG64DXSM(np.random.SeedSequence(int.from_bytes(key, "little")))
    for first in range(0, tensor.count, BLOCK):
        count = min(BLOCK, tensor.count - first)
        draws = generator.random_raw((count + 3) // 4).astype("<u8", copy=False).view("<u2")[:count]
        out = np.empty(count, "<u2")
        # In pieces that stay in the cache, for take widens its indices; clip, as raise is slower.
        for i in range(0, count, 1 << 15):
            np.take(table, draws[i : i + (1 << 15)], out=out[i : i + (1 << 15)], mode="clip")
        yield out


def write_shard(file: BinaryIO, tensors: list[Tensor], seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    tensors = sorted(tensors, key=lambda tensor: tensor.name)
    for tensor in tensors:
        place = [offset, offset + tensor.size]
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": place}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        for block in blocks(tensor, seed):
            file.write(block.data)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


def make(
    shape: str,
    output: Path,
    layers: int | None = None,
    seed: int = 0,
    max_shard_size: int = SIZES["GB"] * 5,
    vocab: int | None = None,
) -> int:
    """Writes the checkpoint, whole or not at all; returns the bytes of its weights."""
    if output.exists():
        raise FileExistsError(f"{output} exists")
    config = config_of(shape, layers, vocab)
    tensors = tensors_of(config)
    shards = shards_of(tensors, max_shard_size)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        write_json(partial / "config.json", config)
        weight_map: dict[str, str] = {}
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) == 1:
                name = "model.safetensors"
            with (partial / name).open("wb") as file:
                write_shard(file, shard, seed)
            weight_map |= {tensor.name: name for tensor in shard}
        total = sum(tensor.size for tensor in tensors)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(partial / "model.safetensors.index.json", index)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return total


def main() -> None:
    options = arguments()
    if options.layers is not None and options.layers < 1:
        sys.exit("--layers must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    start = time.perf_counter()
    try:
        total = make(
            options.shape,
            options.output,
            options.layers,
            options.seed,
            options.max_shard_size,
            options.vocab,
        )
    except OSError as error:
        sys.exit(str(error))
    seconds = time.perf_counter() - start
    print(f"{options.output}: {total / 1e6:.0f} MB of weights, {total / seconds / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
