"""Lossless conversions: stock transformers computes what it computes with the source."""

import json
from pathlib import Path

import torch

import support


def test_folder_is_stock_deepseek(bench, source: Path) -> None:
    folder = bench.convert(source, "lossless", "--dtype", "float32")
    model = support.load(folder)  # complains about missing, unexpected and mismatched keys
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert type(model).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert not list(folder.rglob("*.py"))
    assert {t.dtype for t in support.load_all_tensors(folder).values()} == {torch.float32}
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_logits(bench, source: Path) -> None:
    folder = bench.convert(source, "lossless", "--dtype", "float32")
    theirs = bench.their_logits(folder)
    to_source = support.relative_error(theirs, bench.their_logits(source))
    to_ours = support.relative_error(bench.our_logits(folder), theirs)
    print(f"relative logit error: {to_source:.2e} to the source, {to_ours:.2e} to ours")
    assert to_source <= support.LOGIT_TOLERANCE
    assert to_ours <= support.LOGIT_TOLERANCE


def test_cached_generation(bench, source: Path) -> None:
    before = support.load(source)
    after = support.load(bench.convert(source, "lossless", "--dtype", "float32"))
    for prompt in support.prompts():
        assert support.generate(after, prompt) == support.generate(before, prompt)


def test_bfloat16(bench, source: Path) -> None:
    """Rounding to bfloat16 may cost the converted model little more than it costs the source."""
    folder = bench.convert(source, "lossless")
    assert {t.dtype for t in support.load_all_tensors(folder).values()} == {torch.bfloat16}
    expected = bench.their_logits(source)
    of_source = support.relative_error(bench.their_logits(source, torch.bfloat16), expected)
    of_converted = support.relative_error(bench.their_logits(folder, torch.bfloat16), expected)
    print(f"relative logit error in bfloat16: source {of_source:.2e}, converted {of_converted:.2e}")
    assert of_converted <= 1.5 * of_source
