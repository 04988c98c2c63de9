from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from stepstream.connectors.base import DeadLetter, InputError, Undecodable
from stepstream.connectors.files import Files
from stepstream.connectors.forecast_table import ROW_GROUP, forecast_table
from stepstream.connectors.record_json import record_from_json
from stepstream.connectors.records import Forecast, Origin, Reading, Record, Score

SENSORS = ("a", "b", "c")


def forecast(i: int, sensors: tuple[str, ...] = SENSORS, horizons: int = 2, bounds: bool = True) -> Record:
    values = np.random.default_rng(i).uniform(0, 70, (horizons, len(sensors))).astype(np.float32)
    age = np.linspace(0, 1, len(sensors), dtype=np.float32)
    age[-1] = np.inf
    lower, upper = (values - 1, values + 1) if bounds else (None, None)
    steps = tuple(300 * (h + 1) for h in range(horizons))
    value = Forecast(sensors, steps, values, age, "sttn", "ab12", i % 2 == 0, lower, upper, 0.9 if bounds else None)
    return Record(f"net{i % 2}", i * 10**9, value, Origin("t", 0, i), (0, i % 3))


def score(i: int) -> Record:
    value = Score("sttn", "", 300, i, 1.23456789, 2.0, float("nan"), None, 60, 0, 1.0, 1.0, 1.0, 0.5)
    return Record("net0", i, value, Origin("t", 0, i), (0, 0, 1))


def bad(i: int) -> DeadLetter:
    return DeadLetter(Record("", 0, Undecodable(b"\xff", "no"), Origin("t", 0, i)), "source", "no")


def write(sink: Files, i: int) -> None:
    """The outputs of the i-th input: sometimes none, sometimes several."""
    sink.write([forecast(i, bounds=i % 5 != 0), score(i)] if i % 4 else [], [bad(i)] if i % 7 == 3 else [])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sink_in(folder: Path, **options: Any) -> Files:
    return Files(Files.Options.model_validate({"path": folder, **options}))


def whole_run(folder: Path, inputs: int, every: int = 5) -> dict[str, bytes]:
    sink = sink_in(folder)
    sink.open(None)
    for i in range(inputs):
        write(sink, i)
        if i % every == every - 1:
            sink.prepare()
    sink.prepare()
    sink.finish()
    sink.close()
    return content(folder)


def test_what_is_written(tmp_path: Path) -> None:
    files = whole_run(tmp_path / "out", 20)
    assert set(files) == {"forecasts.jsonl", "scores.jsonl", "dead_letters.jsonl", "forecasts.parquet"}
    lines = files["forecasts.jsonl"].splitlines()
    records = [record_from_json(line) for line in lines]
    expected = [forecast(i, bounds=i % 5 != 0) for i in range(20) if i % 4]
    assert [(r.key, r.time_ns, r.origin, r.path) for r in records] == [
        (r.key, r.time_ns, r.origin, r.path) for r in expected
    ]
    for record, original in zip(records, expected, strict=True):
        np.testing.assert_allclose(record.value.values, original.value.values, atol=0.00051)
        assert (record.value.lower is None) == (original.value.lower is None)
        assert record.value.age_s[-1] == np.inf
    first = json.loads(files["scores.jsonl"].splitlines()[0])
    assert (first["mae"], first["mape"], first["covered"]) == (1.234568, None, None)
    assert [json.loads(line)["raw"] for line in files["dead_letters.jsonl"].splitlines()] == ["/w=="] * 3


def test_the_parquet_file_says_the_same_as_the_lines(tmp_path: Path) -> None:
    files = whole_run(tmp_path / "out", 20)
    table = parquet.read_table(tmp_path / "out/forecasts.parquet").to_pandas()
    rows = []
    for line in files["forecasts.jsonl"].splitlines():
        r = json.loads(line)
        for h, horizon in enumerate(r["horizons_s"]):
            for n, sensor in enumerate(r["sensors"]):
                bounds = [None if r[b] is None else r[b][h][n] for b in ("lower", "upper")]
                rows.append((r["key"], sensor, horizon, r["values"][h][n], *bounds, r["blind"], r["origin"]["offset"]))
    columns = ["network", "sensor", "horizon_s", "value", "lower", "upper", "blind", "offset"]
    found = [
        tuple(None if isinstance(x, float) and np.isnan(x) else x for x in row)
        for row in table[columns].itertuples(index=False)
    ]
    assert len(found) == len(rows) == 15 * 6
    for a, b in zip(found, rows, strict=True):
        assert a[:3] == b[:3]
        assert a[6:] == b[6:]
        assert [None if x is None else np.float32(x) for x in b[3:6]] == list(a[3:6])
    assert str(table["time"].dtype) == "datetime64[ns, UTC]"
    assert set(table["index"]) == {"0.0", "0.1", "0.2"}
    assert np.isinf(table["age_s"][table["sensor"] == "c"]).all()
    assert set(table["weights"]) == {"ab12"}


@settings(max_examples=12)
@given(st.randoms(use_true_random=False), st.booleans())
def test_a_run_killed_anywhere_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, random: random.Random, garbage: bool
) -> None:
    """Commits at fixed inputs; between them the process is lost, with what it wrote on disk or not."""
    base = tmp_path_factory.mktemp("killed")
    expected = whole_run(base / "whole", 30)
    folder, committed, position = base / "out", 0, None
    for _ in range(60):
        sink = sink_in(folder)
        sink.open(position)
        i = committed
        alive = True
        while i < 30 and alive:
            write(sink, i)
            i += 1
            if i % 5 == 0:
                prepared = sink.prepare()
                if random.random() < 0.8:
                    position, committed = json.loads(json.dumps(prepared)), i
                else:
                    alive = False  # killed between prepare and the engine's commit
            alive = alive and random.random() < 0.9
        if alive:
            sink.finish()
            if random.random() < 0.5:
                sink.close()
                break
        if random.random() < 0.5:
            for file in sink._files.values():
                file.flush()  # what the system had taken when the process was lost
        sink.close()
        if garbage and position is not None:
            with (folder / "forecasts.jsonl").open("ab") as stream:
                stream.write(b'{"torn')
            (folder / ".parts").mkdir(exist_ok=True)
            (folder / ".parts/forecasts-000099.parquet").write_bytes(b"PAR1")
    else:
        sink = sink_in(folder)
        sink.open(position)
        for i in range(committed, 30):
            write(sink, i)
            if i % 5 == 4:
                position = sink.prepare()
        sink.finish()
        sink.close()
    assert content(folder) == expected
    shutil.rmtree(base)


def test_the_merged_bytes_do_not_depend_on_the_parts(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / str(every), 60, every) for every in (1, 7, 60)]
    assert runs[0] == runs[1] == runs[2]


def test_row_groups_are_cut_at_fixed_rows(tmp_path: Path) -> None:
    names = tuple(f"s{i}" for i in range(1000))
    found = []
    for every in (3, 100):
        sink = sink_in(tmp_path / str(every), formats=["parquet"])
        sink.open(None)
        for i in range(15):
            sink.write([forecast(i, names[i:], horizons=12)], [])
            if i % every == 0:
                sink.prepare()
        sink.prepare()
        sink.finish()
        sink.close()
        path = tmp_path / str(every) / "forecasts.parquet"
        meta = parquet.read_metadata(path)
        assert [meta.row_group(g).num_rows for g in range(meta.num_row_groups)] == [
            ROW_GROUP,
            meta.num_rows - ROW_GROUP,
        ]
        found.append(path.read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("lost", range(5))
def test_finish_is_safe_to_repeat_wherever_it_stopped(tmp_path: Path, lost: int) -> None:
    expected = whole_run(tmp_path / "whole", 20)
    sink = sink_in(tmp_path / "out")
    sink.open(None)
    for i in range(20):
        write(sink, i)
        if i % 5 == 4:
            position = sink.prepare()
    parts = {p.name: p.read_bytes() for p in (tmp_path / "out/.parts").glob("*.parquet")}
    assert len(parts) == 4
    sink.finish()
    sink.finish()
    sink.close()
    # As if the process was lost after the merged file was in place and `lost` parts were deleted.
    (tmp_path / "out/.parts").mkdir()
    for name in sorted(parts)[lost:]:
        (tmp_path / "out/.parts" / name).write_bytes(parts[name])
    (tmp_path / "out/.parts/merging").write_bytes(b"half")
    again = sink_in(tmp_path / "out")
    again.open(position)
    again.finish()
    again.close()
    assert content(tmp_path / "out") == expected


def test_a_finished_run_goes_on_when_there_is_more_input(tmp_path: Path) -> None:
    expected = whole_run(tmp_path / "whole", 20)
    whole_run(tmp_path / "out", 10)
    sink = sink_in(tmp_path / "out")
    sink.open(_position_after(tmp_path / "other", 10))
    for i in range(10, 20):
        write(sink, i)
        if i % 5 == 4:
            sink.prepare()
    sink.finish()
    sink.close()
    assert content(tmp_path / "out") == expected


def _position_after(folder: Path, inputs: int) -> dict[str, Any]:
    sink = sink_in(folder)
    sink.open(None)
    for i in range(inputs):
        write(sink, i)
        if i % 5 == 4:
            position = sink.prepare()
    sink.close()
    return position


def test_outputs_of_another_run_are_not_touched_unless_told_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = whole_run(out, 10)
    (out / "mine.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"holds dead_letters\.jsonl of another run; .* overwrite: true"):
        sink_in(out).open(None)
    assert content(out) == before | {"mine.jsonl": b"mine"}
    sink = sink_in(out, overwrite=True)
    sink.open(None)
    write(sink, 1)
    sink.prepare()
    sink.finish()
    sink.close()
    assert set(content(out)) == {"forecasts.jsonl", "scores.jsonl", "forecasts.parquet", "mine.jsonl"}
    assert len((out / "scores.jsonl").read_bytes().splitlines()) == 1


def test_a_run_lost_before_its_first_commit_starts_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        sink = sink_in(out)
        sink.open(None)
        write(sink, 1)
        sink.prepare()
        sink.close()
    assert len((out / "scores.jsonl").read_bytes().splitlines()) == 1
    sink = sink_in(out)
    sink.open(None)
    sink.prepare()
    write(sink, 2)  # the engine writes on: it has committed
    sink.prepare()
    sink.close()
    with pytest.raises(InputError, match="of another run"):
        sink_in(out).open(None)


def test_other_payloads_have_files_of_their_own_and_no_other_file_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reading = Record("k", 5, Reading("s", 1.23456), Origin("t", 0, 0), (0,))
    sink = sink_in(out)
    sink.open(None)
    sink.write([reading], [])
    position = sink.prepare()
    assert position["files"] == {"readings.jsonl": (out / "readings.jsonl").stat().st_size}
    assert record_from_json((out / "readings.jsonl").read_bytes()) == reading
    sink.close()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/readings.jsonl").write_text("the input of somebody")
    sink = sink_in(tmp_path / "in")
    sink.open(None)
    with pytest.raises(InputError, match=r"readings\.jsonl is in the way"):
        sink.write([reading], [])
    sink.close()
    assert (tmp_path / "in/readings.jsonl").read_text() == "the input of somebody"


def test_committed_outputs_that_were_changed_are_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    position = _position_after(out, 10)
    for spoil, reason in (
        (
            lambda: (out / ".parts/forecasts-000000.parquet").unlink(),
            "expected 42 committed rows .* found 24 in 1 of 2 parts",
        ),
        (lambda: (out / "forecasts.jsonl").write_bytes(b"{}\n"), r"forecasts\.jsonl has 3 bytes, expected at least"),
    ):
        spoil()
        with pytest.raises(InputError, match=reason):
            sink_in(out).open(position)
    with pytest.raises(InputError, match="formats: this run was begun with"):
        sink_in(out, formats=["jsonl"]).open(position)
    with pytest.raises(InputError, match="sink position: version None"):
        sink_in(out).open({})
    with pytest.raises(InputError, match="sink position: expected files"):
        sink_in(out).open(position | {"files": {"../etc/passwd": 3}})


def test_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = sink_in(tmp_path), sink_in(tmp_path)
    first.open(None)
    with pytest.raises(InputError, match="another run is writing here"):
        second.open(None)
    first.close()
    first.close()
    second.open(None)
    second.close()


@pytest.mark.parametrize("formats", [["jsonl"], ["parquet"], []])
def test_formats_are_of_forecasts(tmp_path: Path, formats: list[str]) -> None:
    sink = sink_in(tmp_path, formats=formats)
    sink.open(None)
    for i in range(5):
        write(sink, i)
    sink.prepare()
    sink.finish()
    sink.close()
    assert set(content(tmp_path)) == {"scores.jsonl", "dead_letters.jsonl"} | {f"forecasts.{f}" for f in formats}


def test_all_digits_if_wanted_and_large_values_survive_rounding() -> None:
    record = forecast(1)
    assert forecast_table([record], None)["value"].to_numpy().tolist() == record.value.values.ravel().tolist()
    big = Record(
        "k",
        0,
        Forecast(("a",), (1,), np.array([[3e38]], np.float32), np.zeros(1, np.float32), "m", ""),
        Origin("t", 0, 0),
    )
    assert forecast_table([big], 3)["value"].to_numpy()[0] == np.float32(3e38)


LIMITED = """
import json, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_files as t
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sink = t.sink_in(Path({out!r}), formats={formats!r})
sink.open(None)
names = tuple(f"s{{i}}" for i in range(200))
position = None
for i in range(10_000):
    try:
        sink.write([t.forecast(i, names, 12)], [])
        if i % 3 == 2:
            position = sink.prepare()
    except OSError as error:
        try:
            sink.prepare()
        except type(error) as again:
            assert str(again) == str(error)
        sink.close()
        print(json.dumps([type(error).__name__, str(error), i, position]))
        break
"""


@pytest.mark.parametrize(("formats", "file"), [(["jsonl"], "forecasts.jsonl"), (["parquet"], "forecasts-0")])
def test_a_file_that_cannot_grow_is_one_clear_error_and_what_was_committed_stays(
    tmp_path: Path, formats: list[str], file: str
) -> None:
    """The limit on the size of a file stands for a full disk: the same write fails half-way."""
    out = tmp_path / "out"
    limit = 400_000 if formats == ["jsonl"] else 20_000
    code = LIMITED.format(tests=str(Path(__file__).parent), limit=limit, out=str(out), formats=formats)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    name, message, written, position = json.loads(done.stdout)
    assert name == "OutputError"
    assert message.startswith(f"cannot write {out}")
    assert file in message
    assert message.endswith(": File too large")
    if formats == ["jsonl"]:
        lines = (out / "forecasts.jsonl").read_bytes().splitlines()
        assert [record_from_json(line).origin.offset for line in lines] == list(range(written // 3 * 3))
    again = sink_in(out, formats=formats)
    again.open(position)
    again.finish()
    again.close()
    if formats == ["parquet"]:
        rows = 0 if position is None else parquet.read_metadata(out / "forecasts.parquet").num_rows
        assert rows == written // 3 * 3 * 2400


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^cannot write .*file/out: Not a directory$"):
        sink_in(tmp_path / "file/out").open(None)
