from __future__ import annotations

import math
from pathlib import Path

from stepstream.connectors.record_json import record_to_json
from stepstream.connectors.records import Origin, Record, Score
from stepstream.pipeline.scores import LastScores


def score(offset: int, horizon_s: int, mae: float, key: str = "net") -> Record:
    value = Score("m", "w", horizon_s, offset, mae, 2 * mae, 0.1, None, 3600, 0, *[math.nan] * 3, 0.5)
    return Record(key, offset * 10**9, value, Origin("in", 0, offset), (0,))


def test_the_newest_of_each_model_and_horizon_is_kept() -> None:
    last = LastScores()
    last.see([score(1, 900, 3.0), score(1, 300, 1.0), score(1, 300, 9.0, "other")])
    last.see([score(2, 300, 2.0)])
    assert [(row["key"], row["horizon_s"], row["mae"]) for row in last.rows()] == [
        ("net", 300, 2.0),
        ("net", 900, 3.0),
        ("other", 300, 9.0),
    ]


def test_a_finished_run_is_read_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    # More than the tail that is read, so its first line is a torn one.
    records = [score(offset, horizon, 1.0 + offset) for offset in range(1, 600) for horizon in (300, 900)]
    lines = [record_to_json(record) for record in records]
    assert sum(map(len, lines)) > 1 << 18
    path.write_bytes(b"\n".join(lines) + b'\nnot json\n{"key": 1}\n')
    last = LastScores()
    last.fill_from(path)
    assert [(row["horizon_s"], row["count"], row["mae"]) for row in last.rows()] == [
        (300, 599, 600.0),
        (900, 599, 600.0),
    ]
    assert math.isnan(last.rows()[0]["window_mae"])
    seen = LastScores()
    seen.see([score(1, 300, 7.0)])
    seen.fill_from(path)
    assert [row["mae"] for row in seen.rows()] == [7.0], "what was seen passing by is newer"


def test_no_file_is_no_scores(tmp_path: Path) -> None:
    last = LastScores()
    last.fill_from(tmp_path / "scores.jsonl")
    assert last.rows() == []
