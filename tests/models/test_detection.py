from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.detection_scenes import CLASSES, TINY, street, targets_of, tiny
from torch import nn

from stepstream.models.detection.center_head import HeadMaps, MapGrid, Targets, decode, encode, head_loss
from stepstream.models.detection.detector import PUBLISHED, Detector, DetectorConfig, fold_norms
from stepstream.models.detection.dsvt import DSVT, partition
from stepstream.models.detection.pillars import PillarEncoder, PillarGrid, to_pillars
from stepstream.models.weights import WeightsError

GRID = MapGrid((-20.0, -10.0), (50, 25), 0.8, 3, 1)


def cells_of(count: int, shape: tuple[int, int], sweeps: int, seed: int) -> torch.Tensor:
    total = sweeps * shape[0] * shape[1]
    flat = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    return torch.from_numpy(np.column_stack(np.unravel_index(flat, (sweeps, *shape))).astype(np.int64))


def naive_sets(cells: Any, window: int, shift: int, size: int, axis: str) -> list[list[int]]:
    """The sets of the paper, window by window."""
    windows: dict[Any, list[int]] = {}
    for row, (sweep, x, y) in enumerate(cells.tolist()):
        windows.setdefault((sweep, (x + shift) // window, (y + shift) // window), []).append(row)
    found = []
    for key in sorted(windows):
        rows = sorted(windows[key], key=lambda row: (cells[row, 1 if axis == "x" else 2], cells[row, 1], cells[row, 2]))
        many = math.ceil(len(rows) / size)
        edges = [s * len(rows) // many for s in range(many + 1)]
        found += [rows[start:stop] for start, stop in itertools.pairwise(edges)]
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 120),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 8),
    st.integers(1, 12),
    st.sampled_from(["x", "y"]),
)
def test_every_pillar_is_in_exactly_one_set_of_its_window(
    count: int, shape: tuple[int, int], sweeps: int, window: int, shift: int, size: int, axis: Any
) -> None:
    cells = cells_of(count, shape, sweeps, count)
    shift = min(shift, window)
    sets = partition(cells, shape, window, shift, size, axis)
    rows = [[row for row in members if row < len(cells)] for members in sets.members.tolist()]
    assert sorted(itertools.chain(*rows)) == list(range(len(cells)))
    assert rows == naive_sets(cells, window, shift, size, axis)
    assert torch.equal(sets.members.flatten()[sets.place], torch.arange(len(cells)))


def test_sets_are_rotated_and_windows_move() -> None:
    model = DSVT(8, (24, 24), heads=2, window=6, set_size=5)
    cells = cells_of(300, (24, 24), 1, 0)
    (first, sets), (second, moved) = model.sets(cells)
    assert not torch.equal(sets[0].members, sets[1].members)
    assert first.max() == 5 and second.max() == 11 and not torch.equal(first, second % 6)
    x = cells[:, 1][sets[0].members[0][sets[0].members[0] < 300]]
    y = cells[:, 2][sets[1].members[0][sets[1].members[0] < 300]]
    assert x.max() - x.min() <= 2 and y.max() - y.min() <= 2
    assert len(moved[0].members) < len(sets[0].members)


def test_where_a_pillar_comes_in_the_list_does_not_matter() -> None:
    torch.manual_seed(0)
    model = DSVT(16, (30, 20), heads=4, window=5, set_size=7).eval()
    cells, features = cells_of(200, (30, 20), 2, 1), torch.randn(200, 16)
    order = torch.randperm(200)
    expected, found = model(features, cells, 2), model(features[order], cells[order], 2)
    assert expected.shape == (2, 16, 30, 20)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected.abs().sum(1) > 0).sum() == 200
    changed = features.clone()
    changed[cells[:, 0] == 1] += 1
    torch.testing.assert_close(model(changed, cells, 2)[0], expected[0], atol=1e-5, rtol=1e-5)
    assert (model(changed, cells, 2)[1] - expected[1]).abs().max() > 1e-2


def test_attention_stays_in_windows_and_the_second_kind_joins_them() -> None:
    torch.manual_seed(0)
    cells = torch.tensor([[0, 2, 2], [0, 4, 4], [0, 30, 30]])
    features = torch.randn(3, 8)
    other = features.clone()
    other[0] += 1
    one = DSVT(8, (40, 40), blocks=1, heads=2, window=4, set_size=4).eval()
    both = DSVT(8, (40, 40), blocks=2, heads=2, window=4, set_size=4).eval()
    for model, joined in ((one, False), (both, True)):
        change = (model(other, cells, 1) - model(features, cells, 1))[0].abs().sum(0)
        assert bool(change[4, 4] > 1e-4) is joined and change[30, 30] < 1e-6 < change[2, 2]


def test_pillars_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-6, 6, (300, 4)).astype(np.float32)
    points[:5] = [[np.nan, 0, 0, 0], [4, 0, 0, 0], [0, 0, 3, 0], [-4, -4, -1, 0], [0, np.inf, 0, 0]]
    grid = PillarGrid((-4.0, -4.0, -1.0), (8, 8), 1.0, 4.0, 1000)
    found = to_pillars(grid, torch.from_numpy(points), torch.zeros(300, dtype=torch.int64), 1)
    inside = ((points[:, :2] >= -4) & (points[:, :2] < 4)).all(1) & (points[:, 2] >= -1) & (points[:, 2] < 3)
    assert int(found.outside) == 300 - inside.sum() and int(found.dropped) == 0
    cells = np.floor(points[inside, :2] + 4).astype(int)
    assert found.cells[:, 1:].tolist() == np.unique(cells, axis=0).tolist()
    encoder = PillarEncoder(grid, (6, 8)).eval()
    rows = encoder._point_features(found, len(found.cells))
    for number, cell in enumerate(found.cells[:, 1:].numpy()):
        mine = points[inside][(cells == cell).all(1)]
        got = rows[found.pillar == number].numpy()
        assert sorted(map(tuple, got[:, :4])) == sorted(map(tuple, mine))
        np.testing.assert_allclose(got[:, 4:7], got[:, :3] - mine[:, :3].mean(0), atol=3e-5)
        np.testing.assert_allclose(got[:, 7:], got[:, :3] - [*(cell - 3.5), 1.0], atol=1e-5)
    assert encoder(found).shape == (len(found.cells), 8)


def test_the_nearest_pillars_are_kept_and_the_others_counted() -> None:
    rng = np.random.default_rng(1)
    points = torch.from_numpy(np.column_stack([rng.uniform(-8, 8, (900, 2)), np.zeros((900, 2))]).astype(np.float32))
    sweep = torch.arange(900) % 2
    whole = PillarGrid((-8.0, -8.0, -1.0), (16, 16), 1.0, 4.0, 1000)
    everything = to_pillars(whole, points, sweep, 2)
    few = to_pillars(replace(whole, max_pillars=40), points, sweep, 2)
    assert len(few.cells) == 80 and int(few.dropped) == len(everything.cells) - 80
    for number in range(2):
        far = ((everything.cells[everything.cells[:, 0] == number, 1:] - 7.5) ** 2).sum(1).sort().values
        kept = ((few.cells[few.cells[:, 0] == number, 1:] - 7.5) ** 2).sum(1).sort().values
        assert torch.equal(kept, far[:40])
    assert few.pillar.max() == 79 and len(few.pillar.unique()) == 80
    at = torch.floor(few.points[:, :2] + 8).to(torch.int64)
    assert torch.equal(few.cells[few.pillar][:, 1:], at)


def test_the_order_of_points_does_not_change_a_bit() -> None:
    points = street()[0]
    points[:50, 3] = torch.rand(50)
    points = torch.cat([points, points[:10], torch.full((3, 4), torch.nan)])
    for changes in ({}, {"max_pillars": 200, "filters": (8, 16)}):
        model = tiny(**changes).eval()
        expected, seen = model.detect(points)
        assert seen.pillars == min(seen.pillars, changes.get("max_pillars", 10**9)) and seen.outside > 0
        assert (seen.dropped > 0) is bool(changes)
        for seed in range(3):
            torch.manual_seed(seed)
            found, again = model.detect(points[torch.randperm(len(points))])
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert torch.equal(again.maps.heat, seen.maps.heat)


def test_a_sweep_in_a_batch_is_what_it_is_alone() -> None:
    model = tiny().eval()
    sweeps = [street(n)[0] for n in range(2)] + [torch.zeros(0, 4)]
    of = torch.arange(3).repeat_interleave(torch.tensor([len(points) for points in sweeps]))
    together = model(torch.cat(sweeps), of, 3).maps
    for number, points in enumerate(sweeps):
        alone = model(points, torch.zeros(len(points), dtype=torch.int64), 1).maps
        torch.testing.assert_close(alone.heat[0], together.heat[number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.fields[0], together.fields[number], atol=1e-5, rtol=1e-5)


def loss_of(model: Detector, points: torch.Tensor, targets: Targets) -> torch.Tensor:
    seen = model(points, torch.zeros(len(points), dtype=torch.int64), 1)
    return head_loss(seen.maps, [targets], torch.ones(1, *model.map_grid.cells))["total"]


def test_the_gradient_reaches_every_parameter() -> None:
    points, boxes, classes = street()
    points[:, 3] = torch.rand(len(points))
    model = tiny(filters=(8, 16)).train()
    loss_of(model, points, targets_of(model, boxes, classes)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


def test_three_boxes_of_a_street_are_learned() -> None:
    points, boxes, classes = street(seed=6)
    assert len(boxes) == 3
    model = tiny().train()
    targets = targets_of(model, boxes, classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss_of(model, points, targets).backward()
        optimizer.step()
    model.eval()
    raised = points + torch.tensor([0, 0, model.config.ground, 0])
    found, _ = model.detect(raised)
    sure = found.scores > 0.3
    assert int(sure.sum()) == 3 and found.scores[2] > 3 * found.scores[3]
    truth = boxes + torch.tensor([0, 0, model.config.ground, 0, 0, 0, 0])
    for box, kind in zip(found.boxes[:3], found.classes[:3], strict=True):
        nearest = int((truth[:, :2] - box[:2]).norm(dim=1).argmin())
        assert kind == classes[nearest]
        torch.testing.assert_close(box[:3], truth[nearest, :3], atol=0.5, rtol=0)
        torch.testing.assert_close(box[3:6], truth[nearest, 3:6], atol=0.5, rtol=0.2)
        assert abs(math.remainder(float(box[6] - truth[nearest, 6]), 2 * math.pi)) < 0.3


spots = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 11)), max_size=6, unique=True)


@settings(deadline=None, max_examples=40)
@given(spots, st.integers(0, 2**31))
def test_boxes_come_back_from_their_targets(places: list[tuple[int, int]], seed: int) -> None:
    """Two cells apart, so that every one is a peak."""
    rng = np.random.default_rng(seed)
    count = len(places)
    at = (np.array(places).reshape(-1, 2) * 2 + rng.uniform(0.01, 0.99, (count, 2))) * GRID.size + np.array(GRID.low)
    boxes = np.column_stack([at, rng.uniform(-2, 2, count), rng.uniform(0.3, 12, (count, 3)),
                             rng.uniform(-math.pi, math.pi, count)]).astype(np.float32)  # fmt: skip
    classes = rng.integers(0, 3, count)
    wanted = encode(GRID, torch.from_numpy(boxes), torch.from_numpy(classes))
    assert wanted.outside == 0 and int((wanted.heat == 1).sum()) == count
    fields = torch.zeros(1, 8, *GRID.cells)
    fields[0][:, wanted.cells[:, 0], wanted.cells[:, 1]] = wanted.fields.T
    maps = HeadMaps(torch.logit(wanted.heat, 1e-4)[None], fields)
    found = decode(GRID, maps, 50)[0]
    best = found.scores > 0.99
    assert int(best.sum()) == count
    order, expected = np.lexsort(found.boxes[best].numpy().T[:2]), np.lexsort(boxes.T[:2])
    np.testing.assert_allclose(found.boxes[best].numpy()[order], boxes[expected], atol=2e-5, rtol=1e-5)
    assert found.classes[best].numpy()[order].tolist() == classes[expected].tolist()
    loss, worse = (
        head_loss(HeadMaps(maps.heat, of), [wanted], torch.ones(1, *GRID.cells)) for of in (fields, fields + 1)
    )
    assert float(loss["box"]) == 0 and float(worse["box"]) == pytest.approx(8.0 if count else 0, rel=1e-5)


def test_boxes_off_the_map_are_counted_and_what_nobody_looked_at_costs_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1, 0], [-20.1, 0, 0, 4, 2, 1, 0], [0, 10, 0, 4, 2, 1, 0]])
    targets = encode(GRID, boxes, torch.tensor([0, 1, 2]))
    assert targets.outside == 2 and targets.cells.tolist() == [[25, 12]]
    nothing = encode(GRID, boxes[:0], torch.zeros(0, dtype=torch.int64))
    sure = HeadMaps(torch.full((1, 3, *GRID.cells), 5.0), torch.zeros(1, 8, *GRID.cells))
    looked = torch.zeros(1, *GRID.cells)
    assert float(head_loss(sure, [nothing], looked)["total"]) == 0
    looked[0, 3, 4] = 1
    expected = 3 * 5.0067 / (1 + math.exp(-5)) ** 2
    assert float(head_loss(sure, [nothing], looked)["total"]) == pytest.approx(expected, rel=1e-3)


def test_equal_peaks_are_in_order_and_at_most_so_many() -> None:
    maps = HeadMaps(torch.full((2, 3, *GRID.cells), -3.0), torch.zeros(2, 8, *GRID.cells))
    found = decode(GRID, maps, 5)
    assert [len(boxes.scores) for boxes in found] == [5, 5]
    assert found[0].classes.tolist() == [0] * 5
    np.testing.assert_allclose(found[1].boxes[:, 1], np.arange(5) * 0.8 - 10, atol=1e-5)


def test_the_published_sizes() -> None:
    """Its widths on a grid of 36 x 36, and the shapes of all of it on the whole one, without memory."""
    small = Detector(replace(PUBLISHED, low=(-5.76, -5.76, -2.0), cells=(36, 36))).eval()
    assert sum(p.numel() for p in small.parameters()) == 8_609_483
    points = torch.rand(60, 4) * torch.tensor([11, 11, 4, 1]) - torch.tensor([5.5, 5.5, 1, 0])
    with torch.no_grad():
        seen = small(points, torch.zeros(60, dtype=torch.int64), 1)
    assert seen.maps.heat.shape == (1, 3, 36, 36) and seen.maps.fields.shape == (1, 8, 36, 36)
    assert small.backbone.windows == ((12, 0), (24, 6)) and len(small.backbone.blocks) == 4
    with torch.device("meta"):
        whole = Detector(PUBLISHED)
        maps = whole.head(whole.neck(torch.zeros(1, 192, 468, 468)))
    assert maps.heat.shape == (1, 3, 468, 468) and whole.map_grid.size == 0.32


def test_folded_norms_are_the_same_function() -> None:
    model = tiny(filters=(8, 16))
    points = street()[0]
    of = torch.zeros(len(points), dtype=torch.int64)
    with torch.no_grad():
        for _ in range(3):
            model.train()(points, of, 1)  # so that the norms have something to do
        expected = model.eval()(points, of, 1).maps
        fold_norms(model)
        found = model(points, of, 1).maps
    assert not [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    torch.testing.assert_close(found.heat, expected.heat, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.fields, expected.fields, atol=1e-4, rtol=1e-4)


def test_a_new_backbone_is_a_class_by_name() -> None:
    name = "tests.models.detection_scenes:Squares"
    model = tiny(backbone=name, sizes={"width": 4}).eval()
    found, seen = model.detect(street()[0])
    assert seen.maps.heat.shape == (1, 3, 24, 12) and model.map_grid.size == 2.0 and len(found.scores) == 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": ()}, "classes: expected different names"),
        ({"cells": (95, 48)}, "expected multiples of 4"),
        ({"cells": (2**13, 2**13)}, "at most 16777216"),
        ({"width": 5000}, "at most 4096 channels"),
        ({"size": math.nan}, "finite numbers"),
        ({"low": (0, 0)}, "3 numbers"),
        ({"sizes": {"heads": 3}}, "heads: expected a divisor of the 16 channels"),
        ({"sizes": {"window": 0}}, "window: expected a whole number from 1 to 1024"),
        ({"sizes": {"blocks": 10**9}}, "blocks: expected a whole number from 1 to 64"),
        ({"sizes": {"shift": -1}}, "shift: expected a whole number from 0 to 15"),
        ({"neck": [[2, 10**3, 8, 8]]}, "at most 16 levels and blocks"),
        ({"most": 10**6}, "65536 boxes"),
        ({"sizes": {"heds": 3}}, "heds"),
        ({"backbone": "dsvd"}, "did you mean 'dsvt'"),
        ({"backbone": "sttn"}, "a detection backbone was expected"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises((ValueError, WeightsError), match=reason):
        Detector(DetectorConfig(**{**TINY, **changes}))


def test_a_config_comes_back_from_json() -> None:
    import json
    from dataclasses import asdict

    config = DetectorConfig(**TINY)
    assert DetectorConfig(**json.loads(json.dumps(asdict(config)))) == config and config.classes == CLASSES
