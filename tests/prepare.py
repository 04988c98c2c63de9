"""What tests of deploy/ need that takes minutes to build: Helm, compose v2, the image. Builds it ahead of them.

uv run python tests/prepare.py

`.ci/run` starts it beside lint and types. Tests that come first wait for it, or build what they need themselves. What
cannot be had is said, and is no error: the tests that need it skip with the reason.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / name) for name in ("docker", "kubernetes")]


def compose_and_image() -> str | None:
    """Why they cannot be built, or None."""
    from engine import Engine, unavailable
    from images import IMAGE, build_image

    if (reason := unavailable()) is not None:
        return reason
    with Engine() as engine:
        return build_image(engine, IMAGE)


def helm() -> str | None:
    """Why it cannot be built, or None."""
    from programs import build_helm

    build_helm()
    return None


def main() -> None:
    # A SIGTERM unwinds, so that an engine that was started here does not stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Helm first: its tests wait for a build that has begun; those of the image begin it if need be.
    steps: tuple[Callable[[], str | None], ...] = (helm, compose_and_image)
    for step in steps:
        began = time.monotonic()
        try:
            reason = step()
        except (RuntimeError, OSError) as error:
            reason = str(error)
        took = f"built in {time.monotonic() - began:.0f} s"
        print(f"{step.__name__.replace('_', ' ')}: {reason or took}", flush=True)


if __name__ == "__main__":
    main()
