from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support import RecordingContext, plain

from stepstream.connectors.detection_checks import detections_fault
from stepstream.connectors.records import Detections, Origin, Record, Sweep
from stepstream.operators.cluster import Cluster
from stepstream.operators.perception import Perception

CLASSES = ("none", "road", "Passenger Car", "person")


def record(value: Any, offset: int = 0) -> Record:
    return Record("car", offset * 10**8, value, Origin("in", 0, offset))


def sides(x: float, y: float, length: float, width: float, yaw: float, top: float = 1.5, bottom: float = 0.4) -> Any:
    """Points on the two sides of a box that a sensor at 0 0 sees, on a grid of 10 cm by 30 cm."""
    corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * [length / 2, width / 2]
    turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    corners = corners @ turn.T + [x, y]
    near = int(np.hypot(*corners.T).argmin())
    points = []
    for other in (corners[near - 1], corners[(near + 1) % 4]):
        steps = np.linspace(0, 1, max(2, int(np.hypot(*(other - corners[near])) / 0.1)))
        line = corners[near] + steps[:, None] * (other - corners[near])
        points += [[*at, z] for at in line for z in np.linspace(bottom, top, 5)]
    return np.array(points, np.float32)


def find(points: Any, context: RecordingContext | None = None, **options: Any) -> Detections:
    sweep = Sweep(np.asarray(points, np.float32).reshape(-1, 3))
    out = Cluster(Cluster.Options(**options)).process([record(sweep)], context or RecordingContext())
    assert len(out) == 1 and isinstance(out[0].value, Detections)
    assert detections_fault(out[0].value) is None
    return out[0].value


@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 89, -30, -60])
def test_a_box_is_fitted_to_two_sides(degrees: int) -> None:
    found = find(sides(12, 5, 4.4, 1.8, math.radians(degrees)))
    assert found.classes == ("unknown",) and len(found.scores) == 1
    np.testing.assert_allclose(found.centres[0], [12, 5, 0.75], atol=0.06)
    np.testing.assert_allclose(found.sizes[0], [4.4, 1.8, 1.5], atol=0.08)
    off = (math.degrees(found.yaws[0]) - degrees + 90) % 180 - 90
    assert abs(off) <= 1.0
    assert -math.pi / 2 <= found.yaws[0] < math.pi / 2


def test_boxes_of_a_street_in_order_of_x_and_what_is_none_is_counted() -> None:
    car, person = sides(10, 4, 4, 1.8, 0.3), sides(8, -5, 0.5, 0.5, 0, top=1.7)
    wall = np.array([[x, 20, 1] for x in np.arange(-15, 15, 0.05)])
    ground = np.array([[x, y, 0.05] for x in range(-20, 20) for y in range(-10, 10)])
    speck, far = [[30, 30, 1]] * 3, [[500, 0, 1], [0, -61, 1]]
    context = RecordingContext()
    found = find(np.concatenate([wall, car, ground, person, speck, far, [[np.nan] * 3]]), context)
    np.testing.assert_allclose(found.centres[:, 0], [8, 10], atol=0.1)
    assert context.counts == {"objects": 2, "split": 2, "few_points": 1, "too_large": 1, "no_return": 1, "outside": 2}
    assert find(wall, max_extent=40, split=50).sizes[0][0] == pytest.approx(29.95, abs=0.01)
    assert found.scores[0] < found.scores[1] < 1


def test_two_objects_that_touch_in_coarse_cells_are_split() -> None:
    bush = np.array([[x, 6.0, 1] for x in np.arange(0, 6.25, 0.05)])
    both = np.concatenate([sides(8.5, 6, 4, 1.8, 0), bush])
    assert len(find(both, splits=0, max_extent=20).scores) == 1
    assert len(find(both, splits=2, max_extent=20).scores) == 2


coordinates = st.one_of(st.sampled_from([-60, 60, 0, 0.4, np.nan, np.inf, 1e30]), st.floats(-5, 5, width=32))
clouds = st.lists(st.tuples(coordinates, coordinates, st.floats(0, 2, width=32)), max_size=60)


@settings(deadline=None, max_examples=40)  # the first call compiles
@given(clouds, st.randoms(use_true_random=False), st.sampled_from([0.0, "estimate"]))
def test_the_order_of_points_does_not_matter(points: Any, random: Any, ground: Any) -> None:
    array = np.array(points, np.float32).reshape(-1, 3)
    order = list(range(len(array)))
    random.shuffle(order)
    options = {"ground": ground, "min_points": 1, "split": 2.0}
    assert plain(find(array, **options)) == plain(find(array[order], **options))


def test_an_object_stands_on_the_ground_of_its_sweep() -> None:
    rng = np.random.default_rng(0)
    ground = rng.uniform(-40, 40, (5000, 3))
    ground[:, 2] = -1.7 + 0.05 * ground[:, 0]
    car = sides(20, 4, 4, 1.8, 0.3) + np.float32([0, 0, -1.7])
    car[:, 2] += 0.05 * car[:, 0]
    floating = sides(-10, 4, 2, 2, 0, bottom=1.5, top=2.3) + np.float32([0, 0, -2.2])
    context = RecordingContext()
    found = find(np.concatenate([ground, car, floating]), context, ground="estimate")
    assert len(found.scores) == 2 and not context.counts["ground_unsure"]
    np.testing.assert_allclose(found.sizes[:, 2], [0.85, 1.5], atol=0.15)
    np.testing.assert_allclose(found.centres[:, 2], [-0.3, -1.7 + 1 + 0.75], atol=0.15)


def seen(points: Any, classes: Any, scores: Any = None, names: tuple[str, ...] = CLASSES) -> Perception:
    sweep = Sweep(np.asarray(points, np.float32), pose=np.eye(4), frame="top")
    given = np.ones(len(classes)) if scores is None else scores
    return Perception(sweep, names, np.array(classes, np.uint8), np.array(given, np.float32), "ppn", "abc")


def test_the_points_of_objects_vote_for_the_class() -> None:
    car, person, road = sides(10, 4, 4, 1.8, 0.3), sides(8, -5, 0.5, 0.5, 0), sides(20, 0, 4, 4, 0)
    classes = [2] * len(car) + [3] * len(person) + [1] * len(road)
    classes[0] = classes[5] = 3  # two points of the car are taken for a person's
    scores = np.full(len(classes), 0.75)
    out = (
        Cluster(Cluster.Options())
        .process([record(seen(np.concatenate([car, person, road]), classes, scores))], RecordingContext())[0]
        .value
    )
    assert detections_fault(out) is None
    assert (out.classes, out.class_ids.tolist()) == (("Passenger Car", "person"), [1, 0])
    assert (out.model, out.weights, out.frame, out.pose is not None) == ("ppn", "abc", "top", True)
    np.testing.assert_allclose(out.scores, [0.75, 0.75 * (1 - 2 / len(car))], atol=1e-6)


def test_heights_of_a_sweep_do_not_bind_what_a_network_has_seen() -> None:
    low = sides(10, 4, 1, 1, 0, bottom=0.05, top=0.25)
    assert not len(find(low).scores)
    out = Cluster(Cluster.Options()).process([record(seen(low, [3] * len(low)))], RecordingContext())
    assert len(out[0].value.scores) == 1


def test_bad_input_is_a_dead_letter_and_the_stream_goes_on() -> None:
    car = sides(10, 4, 4, 1.8, 0.3)
    values: list[Any] = [
        Sweep(np.zeros((2, 4), np.float32)),
        seen(car, [2] * 3),
        seen(car, [1] * len(car), names=("none", "road")),
        seen(car, [9] * len(car)),
        Sweep(np.zeros((0, 3), np.float32)),
        Sweep(np.full((4, 3), np.nan, np.float32)),
        seen(car, [2] * len(car)),
    ]
    context = RecordingContext()
    out = Cluster(Cluster.Options()).process([record(value, i) for i, value in enumerate(values)], context)
    assert [(o.origin.offset, len(o.value.scores)) for o in out] == [(4, 0), (5, 0), (6, 1)]
    assert [reason.split(":")[0] for reason in context.reasons] == [
        "points", "point_classes", "classes", "point_classes"
    ]  # fmt: skip
    assert "none of none, road is among the objects" in context.reasons[2]
    assert context.counts == {"empty": 2, "no_return": 4, "objects": 1}


def test_sweeps_are_not_clustered_twice_where_a_network_looks_at_them() -> None:
    class Sees:
        emits = (Perception,)

    behind, alone = Cluster(Cluster.Options()), Cluster(Cluster.Options())
    behind.connect([Sees()], [])  # type: ignore[list-item]
    alone.connect([], [])
    assert behind.consumes == (Perception,) and alone.consumes == (Sweep, Perception)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"x": (5, -5)}, "two ascending numbers"),
        ({"above": 3.0}, "below: expected more than above, 3, got 2.5"),
        ({"ground": "flat"}, "ground"),
        ({"cell": 0.02, "splits": 4}, "cells of 0.00125 m in the range"),
        ({"min_points": 0}, "min_points"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Cluster.Options(**options)
