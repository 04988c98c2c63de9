from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pydantic import ValidationError
from support import RecordingContext, plain

from stepstream.connectors.records import Origin, Record, Sweep
from stepstream.operators.grid import Grid
from stepstream.operators.voxelize import Voxelize

SMALL: dict[str, Any] = {"x": (-2, 6), "y": (-4, 4), "z": (0.5, 2.5), "cell": (0.5, 0.25), "ground": -1.75}
MAPS = ("binary", "height", "volume")


def record(points: Any, offset: int = 0, **columns: Any) -> Record:
    sweep = Sweep(np.array(points, np.float32).reshape(-1, 3), **columns)
    return Record("car", offset * 10**8, sweep, Origin("in", 0, offset))


def voxelize(**options: Any) -> Voxelize:
    return Voxelize(Voxelize.Options(**(SMALL | options)))


def only(operator: Voxelize, points: Any, context: RecordingContext | None = None) -> Grid:
    out = operator.process([record(points)], context or RecordingContext())
    assert len(out) == 1 and isinstance(out[0].value, Grid)
    return out[0].value


def reference(options: Voxelize.Options, points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A point at a time, as the words of the contract say."""
    cells = np.zeros(options.shape, np.float32 if options.map == "height" else np.uint8)
    low = (options.x[0], options.y[0], options.z[0] + options.ground)
    levels = options.shape[2] if options.map == "volume" else 1
    for point in points.astype(np.float64):
        at = [np.floor((c - o) * (1 / s)) for c, o, s in zip(point, low, options.sizes, strict=True)]
        if all(0 <= i < n for i, n in zip(at, (*options.shape[:2], levels), strict=True)):
            where = tuple(int(i) for i in at[: cells.ndim])
            cells[where] = max(cells[where], np.float32(point[2] - low[2])) if options.map == "height" else 1
    return cells


coordinates = st.one_of(
    st.sampled_from([-2, 6, -4, 4, -1.25, 0.75, 0.5, 0, np.nan, np.inf, -np.inf, 1e30, -1e-30]),
    st.floats(-8, 8, width=32),
)
clouds = npst.arrays(np.float32, st.tuples(st.integers(0, 60), st.just(3)), elements=coordinates.map(np.float32))


@settings(deadline=None)  # the first call compiles
@given(clouds, st.sampled_from(MAPS), st.randoms(use_true_random=False))
def test_the_order_of_points_does_not_matter_and_repeats_change_nothing(points: Any, kind: str, random: Any) -> None:
    operator = voxelize(map=kind)
    order = list(range(len(points)))
    random.shuffle(order)
    found = only(operator, points)
    assert plain(found) == plain(only(operator, points[order]))
    assert found.cells.tobytes() == only(operator, np.concatenate([points, points[::2]])).cells.tobytes()


@settings(deadline=None)  # the first call compiles
@given(clouds, st.sampled_from(MAPS))
def test_every_point_is_where_the_contract_says(points: Any, kind: str) -> None:
    operator = voxelize(map=kind)
    context = RecordingContext()
    grid = only(operator, points, context)
    expected = reference(operator.options, points)
    assert (grid.cells.dtype, grid.cells.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(grid.cells, expected)
    finite = int(np.isfinite(points).all(axis=1).sum())
    assert context.counts["no_return"] == len(points) - finite
    assert context.counts["outside"] == finite - grid.points
    assert context.counts["empty"] == (finite == 0)


def test_edges_belong_to_the_cell_above_and_z_counts_from_the_ground() -> None:
    # The ground is at -1.75: the range of z is -1.25 to 0.75 in the sensor's frame.
    inside = [[-2, -4, -1.25], [5.75, 3.75, 0.5]]
    outside = [[6, 0, 0], [0, 4, 0], [0, 0, 0.75], [0, 0, -1.5], [-2.25, 0, 0]]
    grid = only(voxelize(map="volume"), inside + outside)
    assert np.argwhere(grid.cells).tolist() == [[0, 0, 0], [15, 15, 7]]
    assert (grid.points, grid.low, grid.size) == (2, (-2, -4, -1.25), (0.5, 0.5, 0.25))
    heights = only(voxelize(map="height"), [*inside, [-2, -4, -0.25]]).cells
    assert (heights[0, 0], heights[15, 15]) == (1.0, 1.75)
    assert only(voxelize(ground=0.0), [[0, 0, 0.4], [0, 0, 0.5]]).points == 1


def test_a_grid_knows_its_sweep_and_is_read_only() -> None:
    pose = np.eye(4)
    out = voxelize().process([record([[0, 0, 0]], 7, pose=pose, frame="top")], RecordingContext())
    grid = out[0].value
    assert (out[0].key, out[0].time_ns, out[0].path, out[0].origin.offset) == ("car", 7 * 10**8, (0,), 7)
    assert (grid.frame, grid.pose is pose) == ("top", True)
    assert not grid.cells.flags.writeable


def test_a_view_of_a_wider_table_is_taken() -> None:
    table = np.arange(40, dtype=np.float32).reshape(10, 4) / 10
    points = table[:, :3]
    out = voxelize().process([Record("car", 0, Sweep(points), Origin("in", 0, 0))], RecordingContext())
    np.testing.assert_array_equal(out[0].value.cells, reference(voxelize().options, points))


def test_bad_sweeps_are_dead_letters_and_the_others_go_on() -> None:
    context = RecordingContext()
    bad = dataclasses.replace(record([[0, 0, 0]], 1), value=Sweep(np.zeros((2, 4), np.float32)))
    out = voxelize().process([record([[0, 0, 0]]), bad, record([], 2), record([[np.nan] * 3], 3)], context)
    assert [r.origin.offset for r in out] == [0, 2, 3]
    assert context.reasons == ["points: expected float32 [N, 3], got float32 [2, 4]"]
    assert context.counts == {"empty": 2, "no_return": 1}
    assert not out[1].value.cells.any()


@pytest.mark.parametrize(
    ("options", "shape", "sizes"),
    [
        ({}, (16, 16), (0.5, 0.5, 2.0)),
        ({"map": "volume"}, (16, 16, 8), (0.5, 0.5, 0.25)),
        ({"map": "volume", "cell": 0.5}, (16, 16, 4), (0.5, 0.5, 0.5)),
        ({"cell": (0.5, 0.25, 1)}, (16, 32), (0.5, 0.25, 2.0)),
        ({"x": (-51.2, 51.2), "y": (-51.2, 51.2), "z": (0.3, 4.2), "cell": (0.4, 0.3), "map": "volume"},
         (256, 256, 13), (0.4, 0.4, 0.3)),
        ({"x": (0, 70.4), "y": (-40, 40), "cell": 0.1}, (704, 800), (0.1, 0.1, 2.0)),
    ],
)  # fmt: skip
def test_shapes(options: dict[str, Any], shape: tuple[int, ...], sizes: tuple[float, ...]) -> None:
    operator = voxelize(**options)
    assert operator.options.shape == shape
    assert operator.describe()["shape"] == list(shape)
    assert operator.options.sizes == sizes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"x": (5, 5)}, "expected two ascending numbers of metres"),
        ({"x": (0, float("nan"))}, "expected two ascending numbers of metres"),
        ({"cell": 0}, "expected metres from 0.001 on, got 0"),
        ({"cell": 0.3}, "x: -2 to 6 m is 26.6667 cells of 0.3 m, expected a whole number"),
        ({"map": "volume", "cell": (0.5, 0.3)}, "z: 0.5 to 2.5 m is 6.66667 cells of 0.3 m"),
        ({"x": (0, 1000), "y": (0, 1000), "cell": 0.01}, "100000 x 100000 cells, at most 268435456"),
        ({"map": "sparse"}, "'binary', 'height' or 'volume'"),
        ({"sell": 1}, "Extra inputs are not permitted"),
    ],
)
def test_options_that_make_no_grid_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        voxelize(**options)


def test_it_is_in_the_registry() -> None:
    from stepstream.pipeline import registry

    assert registry.load("operator", "voxelize") is Voxelize


def test_an_estimated_ground_is_level_in_the_grid() -> None:
    rng = np.random.default_rng(0)
    ground = rng.uniform(-4, 4, (4000, 3)) * [10, 10, 0]
    ground[:, 2] = 0.1 * ground[:, 0] - 2
    pole = np.array([[30, 3, 0.1 * 30 - 2 + z] for z in (0.05, 1.0, 1.9)])
    context = RecordingContext()
    options: dict[str, Any] = {"x": (-40, 40), "y": (-40, 40), "z": (0.5, 2.5), "cell": 1, "ground": "estimate"}
    operator = Voxelize(Voxelize.Options(**options, map="height"))
    grid = only(operator, np.concatenate([ground, pole]), context)
    assert np.argwhere(grid.cells).tolist() == [[70, 43]] and not context.counts["ground_unsure"]
    assert grid.cells[70, 43] == pytest.approx(1.4, abs=0.1) and grid.low[2] == pytest.approx(-1.5, abs=0.1)
    assert operator.describe()["ground"] == "estimate"
    assert plain(operator.grid(record(np.concatenate([ground, pole])).value)) == plain(grid)
    only(operator, pole, context)
    assert context.counts["ground_unsure"] == 1
