"""The image of stepstream for tests, built from the shipped Dockerfile."""

from __future__ import annotations

import subprocess
from pathlib import Path

from engine import Engine
from stand_ins import PYTHON, stand_in
from torch_without_cuda import cpu_wheel, index_of

__all__ = ["IMAGE", "build_image"]

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
IMAGE = "stepstream:test"


def build_image(engine: Engine, name: str = IMAGE) -> str | None:
    """Builds deploy/Dockerfile under this name; why that cannot be done, or None. What is built already is used again.

    On the machine's own engine with the defaults. On one that was started by us with a stand-in for the base image, and
    torch from an index on loopback (`torch_without_cuda`) instead of the index of CPU wheels; all else is PyPI's.
    """
    build = ("build", "--file", str(DOCKERFILE), "--tag", name)
    if not engine.own:
        engine.docker(*build, str(ROOT), timeout_s=1800)
        return None
    with engine.alone("image"):
        if (reason := stand_in(engine, PYTHON)) is not None:
            return reason
        try:
            wheel = cpu_wheel()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no torch without CUDA can be made here: {error}"
        with index_of(wheel) as url:
            arguments = ("--network", "host", "--build-arg", f"TORCH_INDEX={url}")
            engine.docker(*build, *arguments, str(ROOT), timeout_s=1800)
        return None
