from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepstream.connectors.base import InputError
from stepstream.pipeline.compare import compare
from stepstream.pipeline.config import PipelineConfig, from_values


def pipeline(folder: Path, name: str, scores: list[dict[str, Any]]) -> PipelineConfig:
    """A pipeline whose outputs are files, with these scores among them."""
    (folder / name).mkdir()
    (folder / name / "scores.jsonl").write_text("".join(json.dumps(score) + "\n" for score in scores))
    (folder / "in.jsonl").touch()
    return from_values(
        {
            "name": name,
            "source": {"jsonl": {"path": str(folder / "in.jsonl")}},
            "sink": {"files": {"path": str(folder / name)}},
        }
    )


def score(hour: int, mae: float | None, model: str = "sttn", horizon_s: int = 900, key: str = "la") -> dict[str, Any]:
    window = {"window_s": 3600, "window_count": 10, "window_mae": mae, "window_rmse": mae, "window_mape": 0.1}
    return {
        "type": "score", "key": key, "time": f"2026-01-01T{hour:02d}:00:00Z", "model": model, "weights": "",
        "horizon_s": horizon_s, "count": 10, "mae": 9.0, "rmse": 9.0, "mape": 9.0, "covered": None, **window,
        "window_covered": None if mae is None else 0.9,
    }  # fmt: skip


def test_only_moments_that_both_have_scored_count(tmp_path: Path) -> None:
    # Hour 1 has only the one, 4 only the other, and at 5 one had nothing to score: none of them may tip the scales.
    one = pipeline(tmp_path, "one", [score(1, 90), score(2, 2), score(3, 4), score(5, None)])
    two = pipeline(tmp_path, "two", [score(2, 1), score(3, 5), score(4, 0.1), score(5, 1), score(3, 7, horizon_s=1800)])
    (row,) = compare(one, two)
    assert (row["key"], row["horizon_s"], row["models"], row["scores"]) == ("la", 900, ["sttn", "sttn"], 2)
    assert row["mae"] == [3.0, 3.0] and row["difference"] == 0.0 and row["better"] == 1
    assert row["covered"] == [0.9, 0.9]
    (late,) = compare(one, two, since_ns=1_767_236_400_000_000_000)
    assert late["mae"] == [4.0, 5.0] and late["difference"] == pytest.approx(0.25)


def test_a_moment_that_came_twice_counts_once_with_its_last_score(tmp_path: Path) -> None:
    one = pipeline(tmp_path, "one", [score(2, 100), score(2, 2)])
    two = pipeline(tmp_path, "two", [score(2, 1, model="dcrnn")])
    (row,) = compare(one, two)
    assert row["mae"] == [2.0, 1.0] and row["models"] == ["sttn", "dcrnn"] and row["scores"] == 1


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one, none = pipeline(tmp_path, "one", [score(2, 1)]), pipeline(tmp_path, "none", [])
    elsewhere = pipeline(tmp_path, "elsewhere", [score(2, 1, key="bay")])
    with pytest.raises(InputError, match="none has published no scores"):
        compare(one, none)
    with pytest.raises(InputError, match="no scores of the same network, horizon and moment"):
        compare(one, elsewhere)
    (tmp_path / "none" / "scores.jsonl").unlink()
    with pytest.raises(InputError, match="expected a kafka sink, or a files sink"):
        compare(one, none)
