from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from support import RecordingContext, plain

from stepstream.connectors.base import InputError
from stepstream.connectors.detection_checks import detections_fault
from stepstream.connectors.simulated_lidar import SimulatedLidar
from stepstream.connectors.simulated_scene import HEIGHT, Scene
from stepstream.connectors.sweep_checks import sweep_fault
from stepstream.operators.cluster import Cluster
from stepstream.operators.track import Track

SMALL: dict[str, Any] = {"beams": 32, "columns": 900, "sweeps": 12}


def source(**options: Any) -> SimulatedLidar:
    return SimulatedLidar(SimulatedLidar.Options(**(SMALL | options)))


def all_of(simulated: SimulatedLidar) -> list[Any]:
    records = []
    while not simulated.ended:
        records += simulated.poll(5, 0.0)
    return records


def test_sweeps_are_valid_and_a_function_of_the_options() -> None:
    records, truth = all_of(source()), source()
    assert [(r.time_ns, r.origin.offset) for r in records] == [(i * 10**8, i) for i in range(12)]
    assert all(sweep_fault(r.value) is None and detections_fault(truth.truth(i)) is None for i, r in enumerate(records))
    again = source()
    again.seek({("simulated-lidar", 0): 7})
    assert plain(all_of(again)) == plain(records[7:])
    assert plain(all_of(source(seed=1))[0]) != plain(records[0])
    with pytest.raises(InputError, match="at 13 is not in this simulation of 12 sweeps"):
        again.seek({("simulated-lidar", 0): 13})


def test_every_point_lies_on_the_ground_or_on_a_box() -> None:
    scene = Scene.make(3, 24, 8.0)
    points, boxes = scene.sweep(1.5, 32, 900, 0, 0).points, scene.truth(1.5)
    on_ground = np.abs(points[:, 2] + HEIGHT) < 0.1
    off = np.abs(points[:, None] - boxes.centres[None]) - boxes.sizes[None] / 2
    on_box = (off.max(axis=2).min(axis=1) < 0.12) & (off.max(axis=2).min(axis=1) > -0.3)
    assert (on_ground | on_box).all() and on_box.sum() > 300 and on_ground.sum() > 3000
    # Nothing is seen behind a box: no ray passes through one before it ends.
    for share in (0.5, 0.8, 0.95):
        deep = np.abs(points[:, None] * share - boxes.centres[None]) - (boxes.sizes[None] / 2 - 0.15)
        assert (deep.max(axis=2) > 0).all()


def test_boxes_move_as_they_say_and_another_one_has_another_number() -> None:
    scene = Scene.make(0, 24, 8.0)
    places: dict[int, tuple[float, float]] = {}
    for i in range(400):
        seen = scene.truth(i / 10)
        for track, centre, velocity in zip(seen.track_ids.tolist(), seen.centres, seen.velocities, strict=True):
            assert abs(centre[0]) <= 80.001
            if track in places:
                expected = places[track][0] + (places[track][1] - 8.0) / 10
                assert centre[0] == pytest.approx(expected, abs=1e-3)
            places[track] = (float(centre[0]), float(velocity[0]))
    assert len(places) > 30


def test_clusters_and_tracks_find_the_truth() -> None:
    simulated = source(beams=64, sweeps=15, objects=15)
    operators = [Cluster(Cluster.Options(ground=-HEIGHT)), Track(Track.Options())]
    near, found, speeds = 0, 0, []
    for record in all_of(simulated):
        flowing = [record]
        for operator in operators:
            flowing = operator.process(flowing, RecordingContext())
        seen, truth = flowing[0].value, simulated.truth(record.origin.offset)
        for centre, velocity in zip(truth.centres, truth.velocities, strict=True):
            if not 4 < np.hypot(*centre[:2]) < 25:
                continue
            apart = np.hypot(*(seen.centres[:, :2] - centre[:2]).T)
            near, found = near + 1, found + bool(apart.min() < 1.5)
            if apart.min() < 1.5 and record.origin.offset > 9 and seen.track_ids[apart.argmin()] >= 0:
                speeds.append(abs(float(seen.velocities[apart.argmin()][0] - velocity[0])))
    assert near > 20 and found / near > 0.75
    assert len(speeds) > 8 and np.median(speeds) < 1.0


def test_a_pace_is_kept() -> None:
    slow = source(speed=0.001)
    assert len(slow.poll(5, 0.0)) == 1 and slow.poll(5, 0.01) == [] and not slow.ended
    caught = source(speed=0.001)
    caught.pace_from({("simulated-lidar", 0): 4})
    assert len(caught.poll(10, 0.0)) == 5
    with pytest.raises(ValidationError, match="speed"):
        SimulatedLidar.Options(speed=0)


def test_an_empty_street_is_ground() -> None:
    simulated = source(objects=0)
    assert (np.abs(simulated.poll(1, 0)[0].value.points[:, 2] + HEIGHT) < 0.1).all()
    assert len(simulated.truth(0).scores) == 0
