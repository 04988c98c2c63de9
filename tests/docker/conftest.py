"""An engine and the image, once for all tests here; or they skip with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The machine's own Docker engine, or one that is started for these tests."""
    from engine import Engine, unavailable

    if (reason := unavailable()) is not None:
        pytest.skip(reason)
    try:
        found = Engine().__enter__()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield found
    found.close()


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The name of the image, built from deploy/Dockerfile; or `$STEPSTREAM_TEST_IMAGE`, which is there."""
    from images import IMAGE, build_image

    if given := os.environ.get("STEPSTREAM_TEST_IMAGE"):
        return given
    if (reason := build_image(engine, IMAGE)) is not None:
        pytest.skip(reason)
    return IMAGE
