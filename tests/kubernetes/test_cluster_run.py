"""The whole cluster run as one test: minutes, root, and half an hour of building before the first; see README.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("kafka")
sys.path.insert(0, str(Path(__file__).parent))

from cluster import unavailable
from programs import missing
from rendering import CHART_VALUES, OVERLAYS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.environ.get("STEPSTREAM_KUBERNETES") != "1", reason="takes minutes: STEPSTREAM_KUBERNETES=1"),
]


def test_a_deployment_lives_through_everything_exactly_once(tmp_path: Path) -> None:
    """With `$STEPSTREAM_IMAGE` and `$STEPSTREAM_IMAGE_TAR` the image of these, else a stand-in."""
    if (reason := missing() or unavailable()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.kubernetes.run", "--out", str(tmp_path)]
    if (image := os.environ.get("STEPSTREAM_IMAGE")) is not None:
        command += ["--image", image, "--image-tar", os.environ["STEPSTREAM_IMAGE_TAR"]]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert results["exact"], results
    assert {*OVERLAYS, "examples"} <= results["applied"].keys()
    assert len(results["applied"]) in {len(OVERLAYS) + 1, len(OVERLAYS) + 1 + len(CHART_VALUES)}
    assert not [name for name, measured in results["phases"].items() if "failed" in measured]
