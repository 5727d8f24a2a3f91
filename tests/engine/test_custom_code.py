"""Forms that no engine knows: the code beside the weights computes what our forward pass does."""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import support

CODE = support.ROOT / "convert/engines/hf"
LOSSLESS = {
    f"{form}-{branches}": ("--to", form, "--branches", branches)
    for form in ("tpla", "mlra", "gla")
    for branches in (2, 4)
}
LOSSLESS["mla"] = ("--to", "mla", "--engine", "relatent")
COMPRESSED = {
    "mla": ("--to", "mla", "--engine", "relatent", "--rope-dim", 16, "--rank", 64),
    "tpla": ("--to", "tpla", "--branches", 4, "--rope-dim", 16, "--key-rank", 8, "--rank", 40),
    "mlra": ("--to", "mlra", "--branches", 2, "--rope-dim", 16, "--key-rank", 8, "--rank", 40),
    "gla": ("--to", "gla", "--branches", 2, "--rope-dim", 16, "--rank", 64),
}

BEFORE_LATENT_NORM = re.compile(r"kv_(a|shared|norm)_proj")

Branch = dict[str, int | None]


def branch(first_head: int, num_heads: int, rank: int, shared: int | None = None) -> Branch:
    return {"first_head": first_head, "num_heads": num_heads, "shared": shared, "rank": rank}


@dataclass(frozen=True)
class Sizes:
    """A model of random weights; heads, ranks and sizes are all different on purpose."""

    branches: list[Branch]
    shared_ranks: list[int] = field(default_factory=list)
    norm: str = "none"
    q_rank: int | None = None
    bias: bool = False
    nope: int = 10
    tied: bool = False
    qk_norm: str | None = None
    rope: dict[str, Any] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0}
    )
    rope_lists: list[dict[str, Any]] = field(default_factory=list)  # the last for the first layer

    layers = 2
    hidden = 48
    inner = 80
    vocabulary = 4096  # that of the tokens
    heads = 6
    rotary = 8
    value = 14
    norm_rank = 20
    kv_heads = 2
    normed_head = 12

    def config(self) -> dict[str, Any]:
        lists = {
            "rope_lists": self.rope_lists,
            "latent_rope_lists": [*reversed(range(self.layers))],
            "layout_version": 2,
        }
        return self.plain_config() | (lists if self.rope_lists else {})

    def plain_config(self) -> dict[str, Any]:
        return {
            "architectures": ["RelatentForCausalLM"],
            "model_type": "relatent",
            "auto_map": {
                "AutoConfig": "configuration_relatent.RelatentConfig",
                "AutoModel": "modeling_relatent.RelatentModel",
                "AutoModelForCausalLM": "modeling_relatent.RelatentForCausalLM",
            },
            "attention_bias": self.bias,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "float32",
            "head_dim": self.rotary,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "kv_lora_rank": sum(self.shared_ranks) + sum(b["rank"] for b in self.branches),
            "latent_branches": self.branches,
            "latent_features": "hidden" if self.qk_norm is None else "normed_heads",
            "latent_form": "mlra",
            "latent_norm": self.norm,
            "latent_norm_rank": self.norm_rank if self.norm == "replicated" else None,
            "latent_shared_ranks": self.shared_ranks,
            "layout_version": 1,
            "max_position_embeddings": 2048,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "normed_bias": self.bias,
            "normed_head_dim": self.normed_head,
            "qk_norm": self.qk_norm,
            "q_lora_rank": self.q_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rotary,
            "rms_norm_eps": 1e-5,
            "rope_parameters": self.rope,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "v_head_dim": self.value,
            "vocab_size": self.vocabulary,
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor as engines/relatent.h lists it."""
        hidden = self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            root = f"model.layers.{layer}."
            yield root + "input_layernorm.weight", (hidden,)
            yield root + "post_attention_layernorm.weight", (hidden,)
            yield root + "mlp.gate_proj.weight", (self.inner, hidden)
            yield root + "mlp.up_proj.weight", (self.inner, hidden)
            yield root + "mlp.down_proj.weight", (hidden, self.inner)
            for name, shape in self.attention_shapes():
                yield f"{root}self_attn.{name}", shape

    def attention_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
            yield name + ".weight", (rows, columns)
            if self.bias:
                yield name + ".bias", (rows,)

        queries = self.heads * (self.nope + self.rotary)
        inputs = self.hidden
        if self.qk_norm is not None:
            head, keys = self.normed_head, self.kv_heads * self.normed_head
            inputs = 2 * keys
            yield from linear("q_proj", self.heads * head, self.hidden)
            yield from linear("k_proj", keys, self.hidden)
            yield from linear("v_proj", keys, self.hidden)
            yield "q_norm.weight", (self.heads * head if self.qk_norm == "width" else head,)
            yield "k_norm.weight", (keys if self.qk_norm == "width" else head,)
            yield from linear("q_b_proj", queries, head)
        elif self.q_rank is None:
            yield from linear("q_proj", queries, self.hidden)
        else:
            yield from linear("q_a_proj", self.q_rank, self.hidden)
            yield "q_a_layernorm.weight", (self.q_rank,)
            yield "q_b_proj.weight", (queries, self.q_rank)
        yield from linear("k_rope_proj", self.rotary, inputs)
        if self.norm == "replicated":
            yield "kv_norm_proj.weight", (self.norm_rank, self.hidden)
        for index, rank in enumerate(self.shared_ranks):
            yield from linear(f"kv_shared_proj.{index}", rank, inputs)
        for index, part in enumerate(self.branches):
            shared = 0 if part["shared"] is None else self.shared_ranks[part["shared"]]
            rank = shared + part["rank"]
            yield from linear(f"kv_a_proj.{index}", part["rank"], inputs)
            if self.norm == "branch":
                yield f"kv_a_layernorm.{index}.weight", (rank,)
            yield (
                f"kv_b_proj.{index}.weight",
                (part["num_heads"] * (self.nope + self.value), rank),
            )
        yield from linear("o_proj", self.hidden, self.heads * self.value)

    def write(self, folder: Path) -> Path:
        random = torch.Generator().manual_seed(7)
        tensors = {}
        for name, shape in self.shapes():
            values = torch.randn(shape, generator=random)
            if len(shape) == 2:
                values *= 1.5 / shape[-1] ** 0.5
            elif name.endswith(".bias"):
                values *= 0.5
            else:
                values = 1 + 0.3 * values
            # Small before a norm, so that its epsilon counts.
            if "q_a_proj" in name or (self.norm != "none" and BEFORE_LATENT_NORM.search(name)):
                values *= 0.005
            tensors[name] = values
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        for file in CODE.glob("*.py"):
            (folder / file.name).write_bytes(file.read_bytes())
        return folder


STRETCHED = {
    "rope_type": "longrope",
    "rope_theta": 1.0,
    "factor": 1.0,
    "attention_factor": 1.25,
    "original_max_position_embeddings": 2048,
    "short_factor": [1.0, 2.5, 7.0, 300.0],
    "long_factor": [1.0, 2.5, 7.0, 300.0],
}
UNEVEN = [branch(0, 4, 12), branch(4, 2, 9)]
SHARING = [branch(0, 4, 5, 0), branch(4, 2, 6, 1), branch(0, 4, 7, 0), branch(4, 2, 4, 1)]
RANDOM = {
    "uneven groups": Sizes(UNEVEN, tied=True),
    "uneven groups, biases, longrope": Sizes(UNEVEN, bias=True, rope=STRETCHED),
    "overlapping heads": Sizes([branch(0, 6, 8), branch(1, 3, 5), branch(2, 4, 3)], bias=True),
    "norm": Sizes(UNEVEN, norm="branch"),
    "norm, query rank, biases": Sizes(UNEVEN, norm="branch", q_rank=22, bias=True),
    "norm over shared": Sizes(SHARING, [3, 8], norm="branch", bias=True, rope=STRETCHED),
    "norm over shared and not": Sizes([*SHARING, branch(1, 2, 6)], [3, 8], norm="branch"),
    "replicated norm": Sizes(UNEVEN, norm="replicated", bias=True),
    "replicated norm over shared": Sizes(SHARING, [3, 8], norm="replicated", q_rank=22, bias=True),
    "normed heads": Sizes(SHARING, [3, 8], bias=True, qk_norm="head"),
    "normed width": Sizes(UNEVEN, qk_norm="width", tied=True, rope=STRETCHED),
    "frequencies by layer": Sizes(UNEVEN, rope_lists=[STRETCHED, {**STRETCHED, "rope_theta": 9.0}]),
    "rotary keys alone": Sizes(SHARING, [3, 8], norm="replicated", nope=0),
}


def relative_error(found: torch.Tensor, expected: torch.Tensor, what: str) -> float:
    error = support.relative_error(found, expected)
    print(f"relative logit error, {what}: {error:.2e}")
    return error


def cached_bytes(cache: Any) -> int:
    """Of every tensor that the cache holds, whatever its name."""
    tensors = [t for layer in cache.layers for t in vars(layer).values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


class Checks:
    """What any folder must pass; a class below says which folders there are."""

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, folder: Path) -> torch.nn.Module:
        return support.load(folder, custom_code=True)

    @pytest.fixture(scope="class")
    @classmethod
    def logits(cls, model: torch.nn.Module) -> torch.Tensor:
        return support.logits_of(model, support.validation_ids())

    def test_logits(self, bench, folder: Path, logits: torch.Tensor) -> None:
        error = relative_error(bench.our_logits(folder), logits, "ours")
        assert error <= support.LOGIT_TOLERANCE

    def test_eager_attention(self, folder: Path, logits: torch.Tensor) -> None:
        eager = support.load(folder, attention="eager", custom_code=True)
        found = support.logits_of(eager, support.validation_ids(1))
        assert relative_error(found, logits[:1], "eager") <= support.LOGIT_TOLERANCE

    @torch.no_grad()
    def test_cached_logits(self, model: torch.nn.Module, logits: torch.Tensor) -> None:
        """A prefill, a second chunk behind it, and then token by token."""
        ids = support.validation_ids(2)
        steps = [0, 40, 63, *range(64, 81)]
        cache = None
        for start, stop in itertools.pairwise(steps):
            out = model(ids[:, start:stop], use_cache=True, **{support.CACHE: cache})
            cache = out[support.CACHE]
            expected = logits[:2, start:stop]
            assert support.relative_error(out.logits, expected) <= support.LOGIT_TOLERANCE, start

    def test_cached_generation(self, model: torch.nn.Module) -> None:
        for prompt in support.prompts():
            generated = support.generate(model, prompt)
            assert len(generated) == 32
            assert generated == support.greedy_without_cache(model, prompt, generated)

    @torch.no_grad()
    def test_left_padding(self, model: torch.nn.Module) -> None:
        prompts = support.prompts()
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        found = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for row, prompt in enumerate(prompts):
            expected = support.logits_of(model, prompt[None])[0]
            error = support.relative_error(found[row, longest - len(prompt) :], expected)
            assert error <= support.LOGIT_TOLERANCE
        generated = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        for row, prompt in enumerate(prompts):
            assert generated[row, longest:].tolist() == support.generate(model, prompt)

    @torch.no_grad()
    def test_cache_bytes(self, folder: Path, model: torch.nn.Module) -> None:
        expected = json.loads(support.relatent("inspect", folder, "--json"))
        per_token = expected["cache_bytes_per_token"]
        assert expected["cache_bytes_per_token_per_device"]["1"] == per_token
        ids = support.validation_ids(2)
        cache = model(ids[:, :50], use_cache=True)[support.CACHE]
        assert cached_bytes(cache) == per_token * 100
        model(ids[:, 50:51], **{support.CACHE: cache})
        assert cached_bytes(cache) == per_token * 102


class TestLossless(Checks):
    @pytest.fixture(scope="class", params=LOSSLESS)
    @classmethod
    def folder(cls, bench, source: Path, request: pytest.FixtureRequest) -> Path:
        return bench.convert(source, "lossless", *LOSSLESS[request.param], "--dtype", "float32")

    def test_nothing_is_lost(self, bench, source: Path, logits: torch.Tensor) -> None:
        error = relative_error(logits, bench.their_logits(source), "to the source")
        assert error <= support.LOGIT_TOLERANCE


class TestCompressed(Checks):
    @pytest.fixture(scope="class", params=COMPRESSED)
    @classmethod
    def folder(cls, bench, source: Path, request: pytest.FixtureRequest) -> Path:
        return bench.convert(
            source, "weights-only", *COMPRESSED[request.param], "--dtype", "float32"
        )


class TestRandom(Checks):
    """Norms and query ranks, which conversions of grouped-query checkpoints do not have."""

    @pytest.fixture(scope="class", params=RANDOM)
    @classmethod
    def folder(
        cls, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
    ) -> Path:
        return RANDOM[request.param].write(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def tpla(bench, llama: Path) -> Path:
    """One folder for what does not depend on the form."""
    return bench.convert(llama, "lossless", "--to", "tpla", "--branches", 4, "--dtype", "float32")


def test_files(llama: Path, tpla: Path) -> None:
    for file in CODE.glob("*.py"):
        assert (tpla / file.name).read_bytes() == file.read_bytes()
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tpla / name).read_bytes() == (llama / name).read_bytes()
    model = support.load(tpla, custom_code=True)
    assert type(model).__name__ == "RelatentForCausalLM"
    assert type(model.config).__name__ == "RelatentConfig"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tpla, trust_remote_code=False)


@torch.no_grad()
def test_base_model(tpla: Path) -> None:
    base, info = AutoModel.from_pretrained(
        tpla, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert type(base).__name__ == "RelatentModel"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = support.validation_ids(1, 64)
    whole = support.load(tpla, custom_code=True)(ids, output_hidden_states=True)
    found = base.eval()(ids, output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, whole.hidden_states[-1])
    assert len(found.hidden_states) == base.config.num_hidden_layers + 1


def test_saved_again(bench, tpla: Path, tmp_path: Path) -> None:
    """What transformers saves is again a folder for both."""
    model = support.load(tpla, custom_code=True)
    model.save_pretrained(tmp_path / "saved")
    again = support.load(tmp_path / "saved", custom_code=True)
    ids = support.validation_ids(1)
    assert torch.equal(support.logits_of(again, ids), support.logits_of(model, ids))
    assert torch.equal(bench.our_logits(tmp_path / "saved"), bench.our_logits(tpla))


def test_static_cache(tpla: Path) -> None:
    model = support.load(tpla, custom_code=True)
    for prompt in support.prompts():
        found = support.generate(model, prompt, cache_implementation="static")
        assert found == support.generate(model, prompt)


def test_bfloat16(bench, source: Path) -> None:
    """Rounding to bfloat16 may cost the converted model little more than it costs the source."""
    folder = bench.convert(source, "lossless", "--to", "tpla", "--branches", 2)
    expected = bench.their_logits(source)
    of_source = support.relative_error(bench.their_logits(source, torch.bfloat16), expected)
    model = support.load(folder, torch.bfloat16, custom_code=True)
    found = support.logits_of(model, support.validation_ids())
    of_converted = support.relative_error(found, expected)
    print(f"relative logit error in bfloat16: source {of_source:.2e}, converted {of_converted:.2e}")
    assert of_converted <= 1.5 * of_source


def test_gradients(tmp_path: Path) -> None:
    """Every weight receives a gradient, the same with gradient checkpointing."""
    folder = RANDOM["norm over shared and not"].write(tmp_path)
    ids = support.validation_ids(2, 32)
    gradients = []
    for checkpointing in (False, True):
        model = support.load(folder, custom_code=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kv_lora_rank": 20}, "have 21 numbers, not 20"),
        ({"latent_branches": [branch(0, 5, 21)]}, "every head"),
        ({"latent_branches": [branch(0, 6, 21, 0)]}, "no shared latent 0"),
        ({"latent_norm": "layer"}, "latent_norm"),
        ({"latent_norm": "replicated"}, "latent_norm_rank"),
        ({"layout_version": 3}, r"layout_version is 3, and this code reads \(1, 2\)"),
        ({"latent_features": "nested"}, "latent_features must be one of .*, not 'nested'"),
        ({"latent_rope_lists": [0, 0]}, "latent_rope_lists must name one of rope_lists"),
        ({"rope_lists": [STRETCHED], "latent_rope_lists": [0]}, "for each layer of latents"),
        ({"rope_lists": [STRETCHED], "latent_rope_lists": [0, None]}, "for each layer of latents"),
        ({"layers": [None]}, "layers has 1 entries for 2 layers"),
        ({"layers": [None, {"kv_lora_rank": 21}]}, "an entry of layers must be null or grouped-query"),
    ],
    ids=[
        *("rank", "heads", "shared", "norm", "norm rank", "version", "features"),
        *("no lists", "few lists", "no list", "layers", "layer"),
    ],
)
def test_bad_config(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    folder = RANDOM["uneven groups"].write(tmp_path)
    support.edit_config(folder, changes)
    with pytest.raises(ValueError, match=complaint):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_layout_is_version_1_where_it_does_not_say(tmp_path: Path) -> None:
    folder = RANDOM["uneven groups"].write(tmp_path)
    support.edit_config(folder, {"layers": None}, drop=("layout_version", "latent_features"))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.layout_version, config.latent_features, config.layers) == (1, "hidden", None)


@pytest.mark.parametrize("change", [{"long_factor": [1.0] * 4}, {"rope_type": "yarn"}])
def test_bad_rope(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = RANDOM["uneven groups, biases, longrope"].write(tmp_path)
    support.edit_config(folder, {"rope_parameters": {**STRETCHED, **change}})
    with pytest.raises(ValueError, match="long_factor|rope_type"):
        support.load(folder, custom_code=True)
