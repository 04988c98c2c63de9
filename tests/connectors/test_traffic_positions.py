"""Graphs from where the sensors are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.connectors.traffic_network import read_network
from stepstream.connectors.traffic_positions import NEIGHBOURS, position_graph

# As in DCRNN's graph_sensor_locations_bay.csv: no header, and more sensors than a recording has.
BAY = "400001,37.364085,-121.901149\n400017,37.253303,-121.945440\n400030,37.359087,-121.906538\n9,37.3,-121.9\n"
SENSORS = ("400030", "400001", "400017")


def haversine_km(one: Any, other: Any) -> float:
    (a, b), (c, d) = np.radians(one), np.radians(other)
    half = math.sin((c - a) / 2) ** 2 + math.cos(a) * math.cos(c) * math.sin((d - b) / 2) ** 2
    return 2 * 6371.0088 * math.asin(min(1.0, math.sqrt(half)))


def naive(positions: Any) -> dict[tuple[int, int], float]:
    """The rule written out, sensor by sensor; the positions are such that no two distances of a sensor are equal."""
    distances = {}
    for i, here in enumerate(positions):
        far = [(haversine_km(here, there), j) for j, there in enumerate(positions)]
        distances |= {(i, j): d for d, j in sorted(far)[: NEIGHBOURS + 1]}
    sigma = np.std(list(distances.values()))
    weights = {pair: math.exp(-((d / sigma) ** 2)) if sigma else 1.0 for pair, d in distances.items()}
    return {pair: weight for pair, weight in weights.items() if weight >= 0.1}


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([0.05, 1.0, 60.0]))
def test_it_is_the_kernel_over_great_circle_distances_to_the_nearest(seed: int, count: int, spread: float) -> None:
    positions = np.array([[10.0, 20.0]]) + np.random.default_rng(seed).uniform(-spread, spread, (count, 2))
    graph = position_graph(positions)
    assert graph is not None
    row, col, weight = graph
    expected = naive(positions)
    assert set(zip(row.tolist(), col.tolist(), strict=True)) == set(expected)
    np.testing.assert_allclose(weight, [expected[pair] for pair in zip(row.tolist(), col.tolist(), strict=True)], 1e-4)


def test_what_is_no_place_makes_no_graph() -> None:
    for wrong in (math.nan, 91.0, -1000.0):
        assert position_graph(np.array([[37.0, -121.0], [wrong, -121.0]])) is None
    assert position_graph(np.zeros((20_001, 2))) is None
    same = position_graph(np.full((3, 2), 5.0))
    assert same is not None
    assert same[2].tolist() == [1.0] * 9


@pytest.mark.skipif(not (DATA / "traffic/metr_la.npz").exists(), reason="needs ../shared/data/traffic/metr_la.npz")
def test_metr_la_roads_are_mostly_among_the_edges_that_positions_give() -> None:
    recording = open_recording(DATA / "traffic" / "metr_la.npz")
    graph = position_graph(recording.positions)
    assert graph is not None
    near = set(zip(graph[0].tolist(), graph[1].tolist(), strict=True))
    near = {(i, j) for i, j in near | {(j, i) for i, j in near} if i != j}
    road = set(zip(recording.graph[0].tolist(), recording.graph[1].tolist(), strict=True))
    road = {(i, j) for i, j in road | {(j, i) for i, j in road} if i != j}
    assert recording.graph_from == "recording"
    assert 0.6 < len(near & road) / len(road) < 0.7
    assert 0.7 < len(near & road) / len(near) < 0.8


@pytest.mark.parametrize(
    "text",
    [
        BAY,
        "index,sensor_id,latitude,longitude\n" + "".join(f"{i},{line}\n" for i, line in enumerate(BAY.splitlines())),
        "lon,lat,id\n" + "".join(",".join(line.split(",")[::-1]) + "\n" for line in BAY.splitlines()),
    ],
)
def test_positions_are_known_by_their_content(tmp_path: Path, text: str) -> None:
    path = tmp_path / "somewhere.csv"
    path.write_text(text)
    graph, positions = read_network(path, SENSORS)
    assert graph is None
    assert positions is not None
    assert positions.tolist() == [[37.359087, -121.906538], [37.364085, -121.901149], [37.253303, -121.945440]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BAY.replace("400017", "400018"), "1 of the recording's 3 sensors are not in it, the first is '400017'"),
        ("sensor_id,latitude,longitude\n400001,north,-121\n", "line 2: expected a latitude .* got 'north' and '-121'"),
        ("sensor_id,latitude,longitude\n400001,37\n", "line 2: expected 3 fields, got 2"),
    ],
)
def test_what_is_wrong_with_positions_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "somewhere.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=reason):
        read_network(path, SENSORS)


def recorded(folder: Path, **arrays: Any) -> Path:
    path = folder / "bay.npz"
    values = np.arange(1, 31, dtype=np.float32).reshape(10, 3)
    np.savez(path, values=values, sensors=np.array(SENSORS), start="2017-01-01", step_s=300, **arrays)
    return path


def test_a_recording_without_edges_has_them_from_positions_wherever_they_are(tmp_path: Path) -> None:
    bare = open_recording(recorded(tmp_path))
    assert (bare.graph, bare.graph_from, bare.positions) == (None, "", None)
    given = tmp_path / "where.csv"
    given.write_text(BAY)
    named = open_recording(recorded(tmp_path), options={"graph": given})
    assert named.graph_from == "positions in where.csv"
    own = open_recording(recorded(tmp_path, latlon=named.positions))
    assert own.graph_from == "positions"
    assert own.summary()["edges"] == 5  # 400017 is 12 km from the others, which are 0.7 km apart
    # Files as DCRNN names them; the first is of another network, the second not what its name says.
    (tmp_path / "graph_sensor_locations.csv").write_text("index,sensor_id,latitude,longitude\n0,773869,34.15,-118.3\n")
    (tmp_path / "graph_sensor_locations_a.csv").write_bytes(b"\xff\xfe\x00nothing")
    assert open_recording(recorded(tmp_path)).graph_from == ""
    (tmp_path / "graph_sensor_locations_bay.csv").write_text(BAY)
    beside = open_recording(recorded(tmp_path))
    assert beside.graph_from == "positions in graph_sensor_locations_bay.csv"
    for recording in (named, own, beside):
        assert [part.tolist() for part in recording.graph] == [part.tolist() for part in own.graph]
        assert recording.positions.tolist() == named.positions.tolist()
    # Edges of its own are better.
    edges = {"adj_row": [0], "adj_col": [1], "adj_w": [0.5]}
    assert open_recording(recorded(tmp_path, latlon=named.positions, **edges)).graph_from == "recording"
