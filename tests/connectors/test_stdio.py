from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

READ = """
import sys
from stepstream.connectors.stdio import Stdin, Stdout
source, sink = Stdin(Stdin.Options(key="la")), Stdout(Stdout.Options())
{before}
sink.open(None)
while not source.ended:
    sink.write(source.poll(3, 0.05), [])
    assert sink.prepare() == {{}}
print(source.progress(), file=sys.stderr)
"""
LINES = b"".join(b'{"sensor": %d, "time": %d, "value": 1.5}\n' % (i, i) for i in range(5))


def run(lines: bytes | IO[bytes], before: str = "") -> subprocess.CompletedProcess[bytes]:
    feed = {"input": lines} if isinstance(lines, bytes) else {"stdin": lines}
    return subprocess.run([sys.executable, "-c", READ.format(before=before)], capture_output=True, timeout=60, **feed)


def test_lines_go_through(tmp_path: Path) -> None:
    done = run(LINES + b"\n")
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["key"], line["sensor"], line["origin"]["offset"]) for line in out] == [
        ("la", str(i), i) for i in range(5)
    ]
    assert done.stderr.split() == [b"(6,", b"None)"]
    (tmp_path / "f").write_bytes(LINES)
    with (tmp_path / "f").open("rb") as file:
        assert run(file).stdout == done.stdout


def test_seek_forward_skips_and_backward_is_an_error() -> None:
    skipped = run(LINES, 'source.seek({("stdin", 0): 3})')
    assert [json.loads(line)["sensor"] for line in skipped.stdout.splitlines()] == ["3", "4"]
    back = run(LINES, 'source.poll(2, 1); source.seek({("stdin", 0): 1})')
    assert b"InputError: stdin: cannot go back to line 1, 2 lines were read already" in back.stderr


def test_poll_returns_when_nothing_comes() -> None:
    code = (
        "import time\nfrom stepstream.connectors.stdio import Stdin\ns = Stdin(Stdin.Options())\nb = time.monotonic()\n"
        "assert s.poll(5, 0.05) == [] and not s.ended\nprint(0.04 < time.monotonic() - b < 2)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"True\n"


@pytest.mark.parametrize(
    ("rest", "given", "left", "said"),
    [
        (b'ue": 1}\n{"next', ["0", "1"], b'{"next', b""),  # the line that was taken in half, and not a byte more
        (b"", ["0"], b"", b"what came of it is lost"),
    ],
)
def test_a_drained_pipe_keeps_what_follows(rest: bytes, given: list[str], left: bytes, said: bytes) -> None:
    code = f"""
import os, sys
from stepstream.connectors import stdio
stdio._CHUNK = 80
source = stdio.Stdin(stdio.Stdin.Options(key="la", resume="continue"))
source.seek({{("stdin", 0): 7}})
first = source.poll(1, 10)
source.drain()
records = first + source.poll(100, 10)
assert source.poll(100, 0) == [] and source.proof({{("stdin", 0): 7}}) is None and not source.repeatable
print([r.value.sensor for r in records], [r.origin.offset for r in records])
os.set_blocking(0, False)
sys.stdout.flush()
os.write(1, os.read(0, 100) if {bool(left)} else b"")
"""
    whole = b'{"sensor": "0", "time": 0, "value": 1.0}\n{"sensor": "1", "time": 1, "val'
    half = whole + b" " * (80 - len(whole))  # all of the first read
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(half if not rest else half.rstrip() + rest)
        process.stdin.flush()
        out, err = process.stdout.read(), process.stderr.read()
    assert out == f"{given} {list(range(7, 7 + len(given)))}\n".encode() + left, err
    assert said in err and bool(said) == bool(err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_one_clear_line() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", READ.format(before="")], input=LINES, stdout=full, stderr=subprocess.PIPE, timeout=60
        )
    assert b"OutputError: cannot write standard output: No space left on device" in done.stderr
