"""Forms whose latents devices can split: lossless ones, fitted ones, and MLA as the source."""

import json
from pathlib import Path
from typing import Any

import pytest

import support
from checkpoints import find_model, present

LOSSLESS = [
    *(("tpla", n) for n in (2, 4)),
    *(("gla", n) for n in (2, 4)),
    *(("mlra", n) for n in (2, 4)),
]
LOSSLESS_ERROR = 1e-5
DEVICE_ERROR = 1e-5


def devices(source: Path, converted: Path, tp: int) -> dict[str, Any] | None:
    """The converted model run by so many devices; None where they cannot share it."""
    head = ("verify", source, converted, "--tokens", support.VALIDATION_TOKENS)
    done = support.run(*head, "--sequences", 1, "--length", 64, "--tp", tp, "--json", "--quiet")
    if done.returncode == 2:
        assert f"--tp {tp} does not fit this model" in done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["devices"]


def check_devices(source: Path, converted: Path) -> None:
    inspected = json.loads(support.relatent("inspect", converted, "--json"))
    per_device = inspected["cache_bytes_per_token_per_device"]
    for tp in (1, 2, 4, 8):
        found = devices(source, converted, tp)
        if found is None:
            assert per_device[str(tp)] is None
            continue
        assert found["rel_logit_error"] <= DEVICE_ERROR
        assert len(found["kv_bytes_per_token"]) == tp
        assert max(found["kv_bytes_per_token"]) == per_device[str(tp)]


@pytest.mark.parametrize(("form", "branches"), LOSSLESS)
def test_lossless(bench, source: Path, form: str, branches: int) -> None:
    converted = bench.convert(
        source, "lossless", "--to", form, "--branches", branches, "--dtype", "float32"
    )
    assert support.verify(source, converted)["rel_logit_error"] <= LOSSLESS_ERROR
    check_devices(source, converted)


SHARED = ("--to", "tpla", "--branches", 4, "--per-device", 48, "--rope-dim", 16, "--key-rank", 16)
SLICED = ("--to", "tpla", "--branches", 4, "--rope-dim", 16, "--rank", 128)
GROUPED = ("--to", "gla", "--branches", 4, "--per-device", 48, "--rope-dim", 16)
TWO_BY_TWO = ("--to", "mlra", "--branches", 2, "--per-device", 48, "--rope-dim", 16)
FITTED = ("--dtype", "float32", "--fit-rounds", 1)


def test_shared_key_loses_least(bench, llama: Path) -> None:
    """All with the same cache on each of four devices."""
    nats = {
        "shared": support.verify(llama, bench.convert(llama, "relatent", *SHARED, *FITTED))["nats"]
    }
    for order in ("pca", "hadamard"):
        sliced = bench.convert(llama, "relatent", *SLICED, "--order", order, "--dtype", "float32")
        nats[order] = support.verify(llama, sliced)["nats"]
    closed = bench.convert(llama, "weights-only", *SHARED, "--dtype", "float32")
    nats["weights only"] = support.verify(llama, closed)["nats"]
    print(nats)
    assert nats["shared"] < 0.6 * min(nats["pca"], nats["hadamard"])
    assert nats["shared"] < 0.6 * nats["weights only"]


@pytest.mark.parametrize(
    "options",
    (SHARED, GROUPED, (*TWO_BY_TWO, "--key-rank", 16), (*SLICED, "--order", "hadamard")),
    ids=("tpla", "gla", "mlra-2", "hadamard"),
)
def test_fitted_forms_run_everywhere(bench, llama: Path, options: tuple) -> None:
    fits = FITTED if "--order" not in options else ("--dtype", "float32")
    converted = bench.convert(llama, "relatent", *options, *fits)
    check_devices(llama, converted)
    theirs = support.logits_of(
        support.load(converted, custom_code=True), support.validation_ids()
    )
    error = support.relative_error(bench.our_logits(converted), theirs)
    assert error <= support.LOGIT_TOLERANCE


def test_split_is_chosen_on_held_out_tokens(bench, llama: Path, tmp_path: Path) -> None:
    report = json.loads(
        support.relatent(
            *("convert", llama, "-o", tmp_path / "out", "--calibration", bench.calibration(llama)),
            *("--to", "tpla", "--branches", 2, "--per-device", 48, "--no-key-fit", "--json"),
            "--quiet",
        )
    )
    best = min(report["trials"], key=lambda trial: trial["nats"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert len(report["trials"]) >= 3
    assert config["qk_rope_head_dim"] == best["rope_dim"]
    assert config["latent_shared_ranks"] == [best["key_rank"]]
    for trial in report["trials"]:
        own = 48 - trial["rope_dim"] - trial["key_rank"]
        assert trial["kv_rank"] == trial["key_rank"] + 2 * own


def test_form_is_chosen_on_held_out_tokens(bench, llama: Path, tmp_path: Path) -> None:
    options = ("--calibration", bench.calibration(llama), "--to", "auto", "--devices", 4)
    few = ("--per-device", 40, "--no-key-fit", "--no-query-fit")
    out = tmp_path / "out"
    ended = support.run("convert", llama, "-o", out, *options, *few, "--json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    forms = report["forms"]
    assert sorted(f"{form['form']}-{form['branches']}" for form in forms) == [
        *("gla-4", "mlra-2", "tpla-4")
    ]
    best = min(forms, key=lambda form: form["nats"])
    assert forms[0] == best
    assert [form["searched"] for form in forms] == [True, True, False]
    assert (report["form"], report["branches"]) == (best["form"], 4)
    assert json.loads((out / "conversion_report.json").read_text())["form"] == best["form"]
    assert f"{best['form']}-{best['branches']} for 4 devices of 40 elements each" in ended.stderr
    # Which forms there are a dry run says; which is best, trials do.
    said = support.refused(2, "convert", llama, "-o", tmp_path / "dry", *options, *few, "--dry-run")
    for form in forms:
        assert f"--to {form['form']} --branches {form['branches']}" in said


MLA = {
    "tpla": ("--to", "tpla", "--branches", 2, "--per-device", 96, "--key-rank", 32),
    "gla": ("--to", "gla", "--branches", 2, "--per-device", 128),
    "mlra": ("--to", "mlra", "--branches", 4, "--per-device", 80, "--key-rank", 24),
    "pca": ("--to", "tpla", "--branches", 2, "--rank", 128, "--order", "pca"),
    "hadamard": ("--to", "tpla", "--branches", 2, "--rank", 128, "--order", "hadamard"),
}
MLA_MODELS = (*present("deepseek-14m"), "made-deepseek-q-rank")


@pytest.fixture(scope="session", params=MLA_MODELS)
def mla(request: pytest.FixtureRequest) -> Path:
    """MLA from the start, with queries of their own and with a latent for them."""
    return find_model(request.param)


@pytest.mark.parametrize("case", MLA)
def test_mla_as_the_source(bench, mla: Path, case: str) -> None:
    converted = bench.convert(mla, "weights-only", *MLA[case], "--dtype", "float32")
    check_devices(mla, converted)
    theirs = support.logits_of(
        support.load(converted, custom_code=True), support.validation_ids()
    )
    error = support.relative_error(bench.our_logits(converted), theirs)
    loss = support.verify(mla, converted)["nats"]
    print(f"relative logit error {error:.2e}, nats lost {loss:.4f}")
    assert error <= support.LOGIT_TOLERANCE
    assert 0 < loss < 2


def test_mla_source_fitted(bench, mla: Path) -> None:
    """The same cache on each of two devices."""
    nats = {}
    for case in ("tpla", "hadamard"):
        more = ("--fit-rounds", 1) if case == "tpla" else ()
        converted = bench.convert(mla, "relatent", *MLA[case], "--dtype", "float32", *more)
        nats[case] = support.verify(mla, converted)["nats"]
    print(nats)
    assert nats["tpla"] < nats["hadamard"] / 2
