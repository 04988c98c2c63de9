from __future__ import annotations

from support import RecordingContext, frame, reading

from stepstream.operators.base import Options
from stepstream.operators.null import Null


def test_every_record_comes_out_as_its_own_consequence() -> None:
    records = [reading(0, 0, "a", 1.0), frame(1, 1, ("a", "b"), (1.0, None)), reading(2, 5, "b", 2.0, key="other")]
    context = RecordingContext()
    out = Null(Options()).process(records, context)
    assert [o.value is r.value for o, r in zip(out, records, strict=True)] == [True] * 3
    assert [(o.key, o.time_ns, o.origin.offset, o.path) for o in out] == [
        ("net", 0, 0, (0,)),
        ("net", 1, 1, (0,)),
        ("other", 5, 2, (0,)),
    ]
    assert not context.counts
    assert not context.dead
