from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepstream.connectors.base import InputError
from stepstream.connectors.traffic_graph import Graph, gaussian_graph
from stepstream.connectors.traffic_network import read_network

SENSORS = ("10", "20", "30")


def read_graph(path: Path, sensors: tuple[str, ...]) -> Graph:
    graph, positions = read_network(path, sensors)
    assert graph is not None
    assert positions is None
    return graph


def written(folder: Path, text: str) -> Path:
    path = folder / "graph"
    path.write_text(text)
    return path


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=20))
def test_the_kernel_is_dcrnns(distances: list[float]) -> None:
    """Against gen_adj_mx.py written out: a matrix of infinity, filled, normalised by its standard deviation."""
    count = len(distances)
    matrix = np.full((count, count), np.inf)
    matrix[0, :] = distances
    sigma = matrix[~np.isinf(matrix)].std()
    row, col, weight = gaussian_graph(np.zeros(count, np.int64), np.arange(count), np.array(distances))
    if sigma == 0:
        assert weight.tolist() == [1.0] * count
        return
    adjacency = np.exp(-np.square(matrix / sigma))
    adjacency[adjacency < 0.1] = 0
    assert col.tolist() == np.flatnonzero(adjacency[0]).tolist()
    assert not row.any()
    np.testing.assert_array_equal(weight, adjacency[0, col].astype(np.float32))


def test_distances_keep_their_direction_and_other_networks_sensors_are_left_out(tmp_path: Path) -> None:
    text = "from,to,cost\n10,10,0\n10,20,100\n20,30,400\n99,10,1\n"
    row, col, weight = read_graph(written(tmp_path, text), SENSORS)
    sigma = np.std([0, 100, 400])
    assert row.tolist() == [0, 0]
    assert col.tolist() == [0, 1]
    np.testing.assert_allclose(weight, [1, np.exp(-((100 / sigma) ** 2))], rtol=1e-6)


def test_distances_without_a_header_as_dcrnns_file_for_pems_bay(tmp_path: Path) -> None:
    sensors = ("400001", "400017", "400030", "400040")
    rows = "400001,400001,0.0\n400001,400017,100.5\n400017,400030,400.0\n401000,400001,1.0\n"
    headed = read_graph(written(tmp_path, "from,to,cost\n" + rows), sensors)
    bare = read_graph(written(tmp_path, rows), sensors)
    assert bare[0].tolist() == [0, 0]
    assert [part.tolist() for part in bare] == [part.tolist() for part in headed]
    # The first line may be about sensors that the recording has not.
    behind = read_graph(written(tmp_path, "1,2,3\n" + rows), sensors)
    assert [part.tolist() for part in behind] == [part.tolist() for part in headed]
    with pytest.raises(InputError, match="line 5: expected a number, got 'far'"):
        read_graph(written(tmp_path, rows + "400001,400030,far\n"), sensors)
    with pytest.raises(InputError, match="line 5: expected 3 fields"):
        read_graph(written(tmp_path, rows + "400001,400030\n"), sensors)


def test_three_rows_that_could_be_distances_or_a_matrix_are_not_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="could be distances or a matrix"):
        read_graph(written(tmp_path, "10,10,0\n10,20,100\n20,30,400\n"), SENSORS)


def test_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    row, col, weight = read_graph(written(tmp_path, "from,to,weight\n10,20,0.25\n30,10,0\n"), SENSORS)
    assert (row.tolist(), col.tolist(), weight.tolist()) == ([0], [1], [0.25])


def test_a_matrix_without_a_header(tmp_path: Path) -> None:
    row, col, weight = read_graph(written(tmp_path, "0,1,0\n0,0,0.5\n0,0,0\n"), SENSORS)
    assert (row.tolist(), col.tolist(), weight.tolist()) == ([0, 1], [1, 2], [1.0, 0.5])


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "adj.npz"
    np.savez(path, adj_row=[0], adj_col=[2], adj_w=[0.5])
    assert [part.tolist() for part in read_graph(path, SENSORS)] == [[0], [2], [0.5]]
    np.savez(path, other=[0])
    with pytest.raises(InputError, match=r"expected adj_row.* it holds other"):
        read_graph(path, SENSORS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file is empty"),
        ("from,to,cost\n1,2,3\n", "names none of the recording's sensors"),
        ("from,to,cost\n10,20,far\n", "line 2: expected a number, got 'far'"),
        ("from,to,cost\n10,20\n", "line 2: expected 3 fields"),
        ("0,1\n1,0\n", "3 rows of 3 weights; got 2 rows of 2 to 2 fields"),
        ("1,2,3\n", r"name the recording's sensors \('10' ..\), or 3 rows.*; got 1 rows of 3 to 3 fields"),
        ("0,1,0\n0,0,nan\n0,0,0\n", "line 2: expected a number"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_graph(written(tmp_path, text), SENSORS)


def test_npy_is_told_from_a_broken_text(tmp_path: Path) -> None:
    path = tmp_path / "adj.npy"
    np.save(path, np.eye(3))
    with pytest.raises(InputError, match=r"npy is not read; give npz .* or csv"):
        read_graph(path, SENSORS)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "adj_mx.pkl"
    path.write_bytes(pickle.dumps([["10"], {"10": 0}, np.eye(1)], protocol=2))
    with pytest.raises(InputError, match="a pickle is never read"):
        read_graph(path, SENSORS)
    with pytest.raises(InputError, match="No such file"):
        read_graph(tmp_path / "absent", SENSORS)
