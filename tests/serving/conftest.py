"""Fixtures of the serving tests, which run folders in vLLM.

By default a small set runs. RELATENT_FULL=1 runs all.
"""

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import support

FULL = os.environ.get("RELATENT_FULL") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if not os.access(support.binary(), os.X_OK):
        pytest.exit(f"no program at {support.binary()}: build it first or set RELATENT_BIN", 2)


def pytest_report_header() -> list[str]:
    extent = "the full set" if FULL else "the SMALL set: RELATENT_FULL=1 runs the rest"
    return [f"relatent: {support.binary()}", checkpoints.report(), extent]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if FULL:
        return
    skip = pytest.mark.skip(reason="NOT TESTED in the small set: set RELATENT_FULL=1")
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.write_line("left out (RELATENT_FULL=1 and RELATENT_PUBLISHED run them):")
    for report in skipped:
        terminalreporter.write_line(f"  {report.nodeid}")


class Workbench:
    """Makes conversions and calibrations once per session and hands them out again."""

    def __init__(self, folder: Path, site: Path):
        self.folder = folder
        self.site = site
        self._made: dict[Hashable, Path] = {}

    def new_path(self, suffix: str = "") -> Path:
        return self.folder / f"{len(list(self.folder.iterdir())):03}{suffix}"

    def new_folder(self) -> Path:
        folder = self.new_path()
        folder.mkdir()
        return folder

    def calibration(self, source: Path, sequences: int) -> Path:
        key = ("calibration", source, sequences)
        if key not in self._made:
            out = self.new_path(".h5")
            support.relatent(
                *("calibrate", source, "--tokens", support.CALIBRATION_TOKENS, "-o", out),
                *("--sequences", sequences, "--length", 256, "--quiet"),
            )
            self._made[key] = out
        return self._made[key]

    def convert(self, source: Path, *options: Any, sequences: int = 8) -> Path:
        """In float32, calibrated, without the fits that take long."""
        key = (source, sequences, *options)
        if key not in self._made:
            out = self.new_path()
            calibrated = "--method" not in options
            support.relatent(
                *("convert", source, "-o", out, *options, "--dtype", "float32", "--quiet"),
                *(("--calibration", self.calibration(source, sequences)) if calibrated else ()),
                *(("--no-query-fit", "--no-key-fit") if calibrated else ()),
            )
            self._made[key] = out
        return self._made[key]

    def score(
        self,
        folder: Path,
        *options: Any,
        plugin: bool = True,
        environment: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """What comes out of vLLM, with the plug-in or stock."""
        paths = {"PYTHONPATH": str(self.site) if plugin else ""}
        return support.score(folder, self.new_folder(), {**paths, **(environment or {})}, *options)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    site = support.install_plugin(tmp_path_factory.mktemp("plugin"))
    return Workbench(tmp_path_factory.mktemp("bench"), site)
