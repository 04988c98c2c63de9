from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import command

from stepstream.connectors.base import DeadLetter, Undecodable
from stepstream.connectors.records import Origin, Record
from stepstream.pipeline.dead_letters import DeadLetterLog
from stepstream.pipeline.logs import ALWAYS, KEYS, configure, get_logger, name_pipeline


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    logger = logging.getLogger("stepstream")
    kafka = logging.getLogger("kafka")
    before = [(one, list(one.handlers), one.level, one.propagate) for one in (logger, kafka)]
    yield
    configure()
    for one, handlers, level, propagate in before:
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


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


def letter(reason: str, operator: str = "source", offset: int = 0) -> DeadLetter:
    return DeadLetter(Record("k", 0, Undecodable(b"", reason), Origin("t", 0, offset)), operator, reason)


def test_dead_letters_are_said_once_a_kind_and_then_once_a_minute() -> None:
    out, now = io.StringIO(), [0.0]
    configure("warning", "json", out)
    log = DeadLetterLog(60, lambda: now[0])
    for second in range(150):
        now[0] = float(second)
        log.see(
            [letter(f"time: 'x{second}' is {second}.5 s late", offset=second), letter("no sensor", "align", second)]
        )
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    late = [line for line in lines if line["operator"] == "source"]
    assert len(late) == 3 and len(lines) == 6
    assert (late[0]["level"], late[0]["message"]) == ("warning", "dead letter: time: 'x0' is 0.5 s late")
    assert (late[0]["key"], late[0]["offset"]) == ("k", 0) and "count" not in late[0]
    assert late[1]["message"] == "dead letters: 60 more, the last one: time: 'x60' is 60.5 s late"
    assert (late[1]["count"], late[1]["total"], late[2]["count"], late[2]["total"]) == (60, 61, 60, 121)


def test_endless_kinds_of_dead_letters_do_not_flood() -> None:
    out = io.StringIO()
    configure("warning", "human", out)
    log = DeadLetterLog(60, lambda: 5.0)
    words = [f"{a}{b}" for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    log.see([letter(f"the value {word} is strange") for word in words])
    assert len(out.getvalue().splitlines()) == 101
    log.see([])


def extra_keys() -> dict[str, set[str]]:
    """Every key that stands beside a message anywhere in the packages, and where."""
    root, found = Path(__file__).parents[2], defaultdict(set)
    for package in ("pipeline", "operators", "connectors", "models"):
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "extra" and isinstance(node.value, ast.Dict):
                    for key in node.value.keys:
                        if isinstance(key, ast.Constant):
                            found[str(key.value)].add(path.name)
    return found


def test_the_keys_are_those_that_are_documented() -> None:
    used = extra_keys()
    assert {"reason", "partition", "committed"} <= used.keys()
    assert {key: files for key, files in used.items() if key not in KEYS} == {}
    table = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table[table.index("## Log lines") :], re.MULTILINE))
    assert {key: rows.get(key) for key in KEYS} == KEYS
    assert set(rows) == {*KEYS, *ALWAYS}


def test_json_lines_name_their_pipeline_and_libraries_speak_json_too() -> None:
    out = io.StringIO()
    configure("info", "json", out)
    name_pipeline("la")
    get_logger("x").info("starting", extra={"reason": "y"})
    logging.getLogger("kafka.net.manager").warning("connection to %s failed", "b:1")
    get_logger("x").info("of another", extra={"pipeline": "bay"})
    ours, theirs, other = (json.loads(line) for line in out.getvalue().splitlines())
    assert ours["pipeline"] == theirs["pipeline"] == "la" and other["pipeline"] == "bay"
    assert theirs["logger"] == "kafka.net.manager" and theirs["level"] == "warning"
    assert theirs["message"] == "connection to b:1 failed" and set(theirs) == {*ALWAYS, "pipeline"}


def test_a_run_that_fails_says_so_in_json_too(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.yaml").write_text(
        "name: bad\nsource: {jsonl: {path: empty.jsonl}}\nsink: {files: {path: /dev/null/out}}\n"
    )
    done = command(tmp_path, "run", "bad.yaml", "--log-json", "--log", "info")
    *lines, last = done.err.splitlines()
    told = [json.loads(line) for line in lines]
    assert done.code == 1 and last.startswith("error: ")
    assert (told[-1]["level"], told[-1]["message"], told[-1]["pipeline"]) == ("error", "the run failed", "bad")
    assert told[-1]["reason"] == last.removeprefix("error: ")
    assert all({*ALWAYS} <= set(line) and set(line) <= {*ALWAYS, *KEYS} for line in told)
