from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from stepstream.pipeline.logs import configure, get_logger


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    logger = logging.getLogger("stepstream")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_a_json_line_has_the_fields() -> None:
    out = io.StringIO()
    configure("info", "json", out)
    get_logger("mine").info("committed %d", 3, extra={"offset": 50, "level": "kept apart"})
    get_logger("mine").debug("not this")
    (line,) = out.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "info",
        "logger": "stepstream.mine",
        "message": "committed 3",
        "offset": 50,
        "level_": "kept apart",
    }


def test_an_error_is_one_json_line_too() -> None:
    out = io.StringIO()
    configure("info", "json", out)
    try:
        raise ValueError("why")
    except ValueError:
        get_logger("stepstream.x").exception("failed")
    (line,) = out.getvalue().splitlines()
    assert "ValueError: why" in json.loads(line)["error"]


def test_a_person_reads_one_line() -> None:
    out = io.StringIO()
    configure("debug", "human", out)
    configure("debug", "human", out)
    get_logger("x").warning("passing over", extra={"reason": "damaged"})
    (line,) = out.getvalue().splitlines()
    assert line[8:] == " warning: passing over reason=damaged"


def test_stdout_stays_clean() -> None:
    code = "from stepstream.pipeline.logs import *; configure(); get_logger('x').warning('hello')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "" and "hello" in done.stderr


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        configure("loud")
