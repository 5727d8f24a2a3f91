"""`relatent verify` says zero when nothing differs, and says where when something does."""

from pathlib import Path

import pytest
import torch

import support

ZEROS = ("nats", "mean_kl", "max_kl", "max_abs_logit_diff", "rel_logit_error")


def perturb(folder: Path, name: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] += 1

    support.edit_tensors(folder, edit)


def test_self_is_exactly_zero(source: Path) -> None:
    found = support.verify(source, source)
    assert {key: found[key] for key in ZEROS} == dict.fromkeys(ZEROS, 0)
    assert found["top1_agreement"] == 1
    assert found["source_ppl"] == found["converted_ppl"]
    assert all(set(layer.values()) == {0} for layer in found["layers"])
    assert found["tokens"] == support.SEQUENCES * (support.LENGTH - 1)


def test_one_changed_weight_is_seen_where_it_is(llama: Path, tmp_path: Path) -> None:
    other = support.copy_checkpoint(llama, tmp_path / "other")
    perturb(other, "model.layers.2.self_attn.v_proj.weight")
    found = support.verify(llama, other)
    assert all(found[key] != 0 for key in ZEROS)
    layers = [layer["attention_rel_error"] for layer in found["layers"]]
    assert layers[:2] == [0, 0] and layers[2] > 0 and layers[3] > 0


def test_agrees_with_transformers(bench, llama: Path) -> None:
    """The figures themselves, recomputed from the logits that transformers gives."""
    folder = bench.convert(llama, "transmla", "--kv-budget", 0.5, "--dtype", "float32")
    found = support.verify(llama, folder)
    before, after = bench.their_logits(llama), bench.their_logits(folder)
    ids = support.validation_ids()
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    nats = support.negative_log_likelihood(after, ids) - support.negative_log_likelihood(
        before, ids
    )
    assert found["nats"] == pytest.approx(nats, rel=1e-3)
    assert found["mean_kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["max_kl"] == pytest.approx(kl.max().item(), rel=1e-3)
    assert found["rel_logit_error"] == pytest.approx(
        support.relative_error(after, before), rel=1e-3
    )
    agreement = (before.argmax(-1) == after.argmax(-1)).double().mean().item()
    assert found["top1_agreement"] == pytest.approx(agreement, abs=2 / ids.numel())


def test_limits_decide_the_exit_code(bench, llama: Path) -> None:
    folder = bench.convert(llama, "transmla", "--kv-budget", 0.5, "--dtype", "float32")
    command = ("verify", llama, folder, "--tokens", support.VALIDATION_TOKENS, *support.SPAN)
    assert support.run(*command, "--max-kl", 100, "--max-nats", 100).returncode == 0
    assert support.run(*command, "--max-kl", 1e-9).returncode == 1
    assert support.run(*command, "--max-nats", 1e-9).returncode == 1
