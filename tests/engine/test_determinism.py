"""The same bytes come out for any number of threads, and every time."""

from pathlib import Path

import pytest

import support

RUNS = (("--threads", 1), ("--threads", 2), ("--threads", 2))


def test_calibration(source: Path, tmp_path: Path) -> None:
    found = []
    for i, threads in enumerate(RUNS):
        out = tmp_path / f"{i}.h5"
        support.relatent(
            *(*threads, "calibrate", source, "--tokens", support.CALIBRATION_TOKENS),
            *("-o", out, *support.SPAN, "--quiet"),
        )
        found.append(out.read_bytes())
    assert all(bytes_ == found[0] for bytes_ in found)


@pytest.mark.parametrize("method", ("lossless", "transmla", "weights-only"))
def test_conversion(bench, source: Path, tmp_path: Path, method: str) -> None:
    options: tuple = () if method == "lossless" else ("--kv-budget", 0.5)
    if method == "transmla":
        options += ("--calibration", bench.calibration(source), "--q-rank", 96)
    found = []
    for i, threads in enumerate(RUNS):
        out = tmp_path / str(i)
        support.relatent(
            *(*threads, "convert", source, "-o", out, "--method", method), *options, "--quiet"
        )
        found.append(support.folder_bytes(out))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert [name for name in other if other[name] != found[0][name]] == []
