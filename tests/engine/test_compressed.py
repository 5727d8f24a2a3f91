"""Conversions that lose something: transformers loses what our own forward pass says."""

import json
from pathlib import Path

import pytest

import support

BUDGETS = (0.375, 0.5, 0.75)
HALF = ("--kv-budget", 0.5, "--dtype", "float32")


def convert(bench, source: Path, case: str) -> Path:
    if case == "transmla with a query rank":
        hidden = json.loads((source / "config.json").read_text())["hidden_size"]
        return bench.convert(source, "transmla", *HALF, "--q-rank", hidden // 2)
    if case.startswith("relatent"):
        before = json.loads((source / "config.json").read_text())
        head = before.get("head_dim", before["hidden_size"] // before["num_attention_heads"])
        sizes = ("--rope-dim", head, "--rank", before["num_key_value_heads"] * head - head)
        engine = case.removeprefix("relatent for ") if " for " in case else "transformers"
        return bench.convert(
            source, "relatent", *sizes, "--engine", engine, "--dtype", "float32", "--fit-rounds", 1
        )
    return bench.convert(source, case, *HALF)


CASES = (
    "transmla",
    "transmla with a query rank",
    "weights-only",
    "relatent",
    "relatent for deepseek",
)


@pytest.fixture(params=CASES)
def converted(bench, source: Path, request: pytest.FixtureRequest) -> Path:
    return convert(bench, source, request.param)


def test_logits(bench, source: Path, converted: Path) -> None:
    theirs = bench.their_logits(converted)
    error = support.relative_error(bench.our_logits(converted), theirs)
    loss = support.relative_error(theirs, bench.their_logits(source))
    print(f"relative logit error: {error:.2e}; lost by the conversion: {loss:.2e}")
    assert error <= support.LOGIT_TOLERANCE
    assert loss > 1e-3  # half a cache cannot hold everything


def test_cached_generation(converted: Path) -> None:
    model = support.load(converted)
    for prompt in support.prompts():
        generated = support.generate(model, prompt)
        assert len(generated) == 32
        assert generated == support.greedy_without_cache(model, prompt, generated)


def test_sizes_are_as_asked(bench, source: Path) -> None:
    before = json.loads((source / "config.json").read_text())
    head = before.get("head_dim", before["hidden_size"] // before["num_attention_heads"])
    config = json.loads((convert(bench, source, "transmla") / "config.json").read_text())
    assert config["qk_rope_head_dim"] == head
    # Half of the cache, the coordinate that keeps the latent's norm constant included.
    assert config["kv_lora_rank"] == before["num_key_value_heads"] * head - head
    with_rank = convert(bench, source, "transmla with a query rank")
    q_rank = json.loads((with_rank / "config.json").read_text())["q_lora_rank"]
    assert q_rank == before["hidden_size"] // 2 + 1


def test_larger_rank_loses_less(bench, source: Path) -> None:
    found = []
    for budget in BUDGETS:
        folder = bench.convert(source, "transmla", "--kv-budget", budget, "--dtype", "float32")
        found.append(support.verify(source, folder))
    nats = [v["nats"] for v in found]
    print("nats lost: " + ", ".join(f"{n:.4f} at {b}" for n, b in zip(nats, BUDGETS, strict=True)))
    assert nats[0] > nats[1] > nats[2]
    assert found[0]["mean_kl"] > found[1]["mean_kl"] > found[2]["mean_kl"]


def test_relatent_loses_less_than_transmla(bench, source: Path) -> None:
    ours = support.verify(source, convert(bench, source, "relatent"))["nats"]
    theirs = support.verify(source, convert(bench, source, "transmla"))["nats"]
    print(f"nats lost: {ours:.4f}, transmla {theirs:.4f}")
    assert ours < theirs


def test_deepseek_layout_is_plain(bench, source: Path) -> None:
    folder = convert(bench, source, "relatent for deepseek")
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_bias"] is False
    assert config["q_lora_rank"] is None
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 1.0)  # the plain list, as YaRN
    assert config["tie_word_embeddings"] is False
    names = support.load(folder).state_dict()
    assert "lm_head.weight" in names
    assert not [name for name in names if name.endswith(".bias")]
