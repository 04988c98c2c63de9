"""The wheel holds what the main job needs, owns no name but `stepstream`, and runs the demo from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("connectors", "data", "models", "operators", "pipeline", "weights")
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that nothing is left in it."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


def test_the_wheel_owns_only_stepstream(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"stepstream"}
    for needed in (
        "stepstream/data/metr_la_week.npz",
        "stepstream/data/la-traffic.yaml",
        "stepstream/data/ika-lidar.yaml",
        "stepstream/data/ika_vlp32/1603960640813255310.npz",
        "stepstream/data/ika_vlp32/README.md",
        "stepstream/models/py.typed",
        "stepstream/pipeline/engines/local.py",
        "stepstream/weights/sttn-metr-la/model.safetensors",
        "stepstream/weights/weekly-average-metr-la/card.json",
        "stepstream/weights/nat-wikipedia/model.safetensors",
    ):
        assert needed in names
    modules = [p for part in PARTS for p in (ROOT / part).rglob("*.py")]
    assert not [p for p in modules if f"stepstream/{p.relative_to(ROOT)}" not in names]


def test_the_wheel_runs_the_demo_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(site)
    empty.mkdir()
    code = (
        "import sys, stepstream.pipeline.cli as cli, stepstream.weights as w\n"
        f"assert cli.__file__.startswith({str(site)!r}) and w.__file__.startswith({str(site)!r}), cli.__file__\n"
        "sys.argv = ['stepstream', 'demo', '--out', 'here', '--days', '0.25', '--json']\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["forecasts"] == 72
    assert (empty / "here" / "report.html").stat().st_size > 10_000
