from __future__ import annotations

import gc

import numpy as np

from stepstream.operators.recycled import Recycled


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_only_when_no_view_of_it_is_left() -> None:
    pool = Recycled()
    first = pool.zeros((3, 4), np.float32)
    where = address(first)
    first[2] = 7
    view = first[1:].T[:, 1:]  # a view of a view
    torchlike = memoryview(first)
    del first
    gc.collect()
    second = pool.zeros((3, 4), np.float32)
    assert address(second) != where
    assert (view == 7).all()
    del torchlike, view
    gc.collect()
    assert address(pool.empty((12,), np.float32)) == where  # the same bytes, another shape
    assert address(pool.empty((13,), np.float32)) not in (where, address(second))


def test_what_was_used_before_is_zeroed_and_little_is_kept() -> None:
    pool = Recycled(keep=2)
    held = [pool.zeros((5,), np.int32) for _ in range(4)]
    for one in held:
        one[:] = 9
    del one
    held.clear()
    gc.collect()
    assert len(pool._free) == 2
    assert not pool.zeros((5,), np.int32).any()
    late = pool.zeros((5,), np.int32)
    del pool
    late[:] = 1  # its memory outlives the pool
    assert late.sum() == 5
