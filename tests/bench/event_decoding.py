"""How fast event-camera words are decoded, one thread: EVT3 beside the PyPI package evt3, EVT2, EVT2.1, DAT.

OMP_NUM_THREADS=1 uv run --with evt3 python -m tests.bench.event_decoding [FOLDER]

The EVT3 and EVT2 recordings of ../shared/data/event, repeated in memory to at least 2 million events (time goes back at
each repeat, which costs a decoder nothing), else events made here. "feed" decodes chunks of 64 KiB as a stream; "file"
is opening the recording, with all counts and slices; the package evt3 reads a file as a whole.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import events as files
from support import DATA
from tests.bench.common import cpu_seconds, report

from stepstream.connectors.events import CHUNK_BYTES
from stepstream.connectors.events_prophesee import evt_decoder, read_header
from stepstream.connectors.recording import open_recording

MADE = {"evt3": files.evt3_file, "evt2": files.evt2_file, "evt21": files.evt21_file}


def words_of(encoding: str) -> tuple[bytes, bytes, str]:
    """Header, words and where they are from."""
    path = DATA / "event" / f"{encoding}_sample.raw"
    if path.exists():
        data, source = path.read_bytes(), path.name
    else:
        data, source = MADE[encoding](files.random_events(200_000, 640, 480)), "made"
    size = read_header(data).size
    return data[:size], data[size:], source


def feed(encoding: str, words: bytes) -> int:
    decoder = evt_decoder(encoding)
    return sum(len(decoder.feed(words[at : at + CHUNK_BYTES]).t) for at in range(0, len(words), CHUNK_BYTES))


def main() -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}
        for encoding in MADE:
            header, words, source = words_of(encoding)
            once = feed(encoding, words)
            repeats = -(-2_000_000 // once)
            words *= repeats
            path = Path(folder) / f"{encoding}.raw"
            path.write_bytes(header + words)
            calls[f"{encoding} feed"] = lambda encoding=encoding, words=words: feed(encoding, words)
            calls[f"{encoding} file"] = lambda path=path: open_recording(path)
            counts |= dict.fromkeys([f"{encoding} feed", f"{encoding} file"], feed(encoding, words))
            results[f"{encoding} words"] = {"source": source, "events": counts[f"{encoding} feed"], "bytes": len(words)}
        try:
            import evt3
        except ModuleNotFoundError:
            print("the package evt3 is not installed: run it with `--with evt3`", file=sys.stderr)
        else:
            calls["evt3 package"] = lambda: evt3.decode_file(str(Path(folder) / "evt3.raw"))
            counts["evt3 package"] = counts["evt3 feed"]
        seconds = cpu_seconds(calls, rounds=7, warmup=2)
    results |= {name: round(counts[name] / taken / 1e6, 1) for name, taken in seconds.items()}
    report("event_decoding", results | {"unit": "million events a second of CPU time"})


if __name__ == "__main__":
    main()
