"""Hypothesis strategies for records and payloads, and an equality that looks into arrays."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from stepstream.connectors.records import (
    Activity,
    Detections,
    Forecast,
    Interaction,
    LinkScores,
    NodeMemory,
    Origin,
    Reading,
    Record,
    Score,
    SensorFrame,
)

# Lone surrogates have no UTF-8 form, so no wire can carry them.
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
times_ns = st.integers(-(2**63), 2**63 - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
fractions = st.none() | st.floats(0, 1)
sensor_names = st.lists(texts, unique=True, max_size=6).map(tuple)


def float32s(shape: tuple[int, ...], finite_only: bool = False) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    """float32 arrays; unless `finite_only`, with NaN and infinities."""
    odd = not finite_only
    return npst.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=odd, allow_infinity=odd))


readings = st.builds(Reading, texts, finite)


@st.composite
def frames(draw: st.DrawFn, finite_only: bool = False) -> SensorFrame:
    """Frames of 0 to 6 sensors."""
    sensors = draw(sensor_names)
    values = draw(float32s((len(sensors),), finite_only))
    return SensorFrame(sensors, values, draw(npst.arrays(bool, len(sensors))), draw(st.booleans()))


@st.composite
def forecasts(draw: st.DrawFn, finite_only: bool = False) -> Forecast:
    """Forecasts of 0 to 6 sensors at 1 to 4 horizons, with or without intervals; ages are 0 or more, or infinite."""
    sensors = draw(sensor_names)
    horizons = tuple(sorted(draw(st.sets(st.integers(1, 86_400), min_size=1, max_size=4))))
    shape = (len(horizons), len(sensors))
    bounds = draw(st.booleans())
    ages = npst.arrays(np.float32, len(sensors), elements=st.floats(0, width=32))
    return Forecast(
        sensors,
        horizons,
        draw(float32s(shape, finite_only)),
        draw(ages),
        draw(texts),
        draw(texts),
        draw(st.booleans()),
        draw(float32s(shape, finite_only)) if bounds else None,
        draw(float32s(shape, finite_only)) if bounds else None,
        draw(st.floats(0, 1)) if bounds else None,
    )


def _errors() -> st.SearchStrategy[float]:
    return st.floats(0, 1e6) | st.just(float("nan"))


scores = st.builds(
    Score,
    model=texts,
    weights=texts,
    horizon_s=st.integers(0, 86_400),
    count=st.integers(0, 2**53),
    mae=_errors(),
    rmse=_errors(),
    mape=_errors(),
    covered=fractions,
    window_s=st.integers(0, 10**9),
    window_count=st.integers(0, 2**53),
    window_mae=_errors(),
    window_rmse=_errors(),
    window_mape=_errors(),
    window_covered=fractions,
)

names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
node_ids = st.integers(-(2**63), 2**63 - 1) | names
edge_features = st.integers(0, 5).flatmap(lambda width: float32s((width,), finite_only=True))
interactions = st.builds(Interaction, node_ids, node_ids, st.none() | edge_features, st.none() | names)


@st.composite
def link_scores(draw: st.DrawFn, finite_only: bool = False) -> LinkScores:
    """Scores of 0 to 6 destinations."""
    nodes = tuple(draw(st.lists(node_ids, max_size=6)))
    freshness = draw(st.sampled_from(["per_event", "batch"]))
    values = draw(float32s((len(nodes),), finite_only))
    return LinkScores(draw(node_ids), nodes, values, freshness, draw(texts), draw(texts))


@st.composite
def detections(draw: st.DrawFn, finite_only: bool = False) -> Detections:
    """0 to 5 boxes of 1 to 3 classes; a velocity may be NaN, a track none, the pose None."""
    count = draw(st.integers(0, 5))
    classes = tuple(draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    within = partial(st.floats, width=32)
    column = partial(npst.arrays, np.float32)
    pose = np.eye(4)
    pose[:3, 3] = draw(st.tuples(finite, finite, finite))
    speeds = within(-100, 100) if finite_only else within(-100, 100) | st.just(np.nan)
    tracks = draw(st.lists(st.integers(-1, 2**63 - 1), min_size=count, max_size=count, unique=True))
    return Detections(
        draw(float32s((count, 3), finite_only=True)),
        draw(column((count, 3), elements=within(0, 50))),
        draw(column(count, elements=within(-3.125, 3.125))),
        draw(column(count, elements=within(0, 1))),
        classes,
        draw(npst.arrays(np.uint8, count, elements=st.integers(0, len(classes) - 1))),
        np.array(tracks, np.int64),
        draw(column((count, 3), elements=speeds)),
        draw(names),
        draw(texts),
        draw(texts),
        draw(st.none() | st.just(pose)),
    )


leaf_shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
leaf_arrays = leaf_shapes.flatmap(
    lambda shape: (
        float32s(shape, finite_only=True)
        | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=math.prod(shape), max_size=math.prod(shape)).map(
            lambda values: np.array(values, np.int64).reshape(shape)
        )
    )
)
node_memories = st.builds(
    NodeMemory,
    node_ids,
    st.integers(0, 4095),
    st.integers(1, 2**63 - 1),
    st.booleans(),
    texts,
    texts,
    st.dictionaries(names, leaf_arrays, min_size=1, max_size=4),
)


@st.composite
def activities(draw: st.DrawFn, finite_only: bool = False) -> Activity:
    """Activities of 1 to 5 classes."""
    classes = tuple(draw(st.lists(names, min_size=1, max_size=5, unique=True)))
    onset, until = sorted(draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2)))
    values = draw(float32s((len(classes),), finite_only))
    label, ongoing = draw(st.sampled_from(classes)), draw(st.booleans())
    return Activity(label, draw(st.floats(0, 1)), onset, until, ongoing, classes, values, draw(texts), draw(texts))


payloads = readings | frames() | forecasts() | scores | interactions | link_scores() | detections() | activities()
json_payloads = (
    readings
    | frames(finite_only=True)
    | forecasts(finite_only=True)
    | scores
    | interactions
    | link_scores(finite_only=True)
    | detections(finite_only=True)
    | activities(finite_only=True)
)
origins = st.builds(Origin, texts, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1))
paths = st.lists(st.integers(0, 2**31), max_size=3).map(tuple)


def records(values: st.SearchStrategy[Any] = json_payloads) -> st.SearchStrategy[Record]:
    """Records with payloads from `values`."""
    return st.builds(Record, texts, times_ns, values, origins, paths)


def same(a: Any, b: Any) -> bool:
    """Whether two records or payloads are equal in type and every field; arrays bit for bit, NaN equal to NaN."""
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b or (a != a and b != b))
