"""Memory over a replay of all four months of METR-LA through the whole pipeline: it must be flat.

uv run python -m tests.bench.memory [FOLDER] [RECORDING]

Resident memory is read after every hundredth of the replay; reported are its slope over the second half and the
largest value, beside that after the first tenth.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tests.bench.common import report
from tests.support import DATA

from stepstream.pipeline.pipeline import Pipeline


def resident_mb() -> float:
    """Resident set of this process (proc(5), statm: second field, in pages of 4 KiB)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    recording = Path(sys.argv[2]) if len(sys.argv) > 2 else DATA / "traffic" / "metr_la.npz"
    if not recording.exists():
        sys.exit(f"error: {recording} is not there: give a recording, as in `memory FOLDER metr_la.npz`")
    samples: list[tuple[int, float]] = []

    def sample(done: int, total: int | None) -> None:
        if total and done >= (len(samples) + 1) * total // 100:
            samples.append((done, resident_mb()))
            print(f"{done:>9,} of {total:,} readings, {samples[-1][1]:.0f} MB", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline.from_dict(
            {
                "name": "four-months",
                "source": {"replay": {"path": str(recording)}},
                "operators": [
                    {"align": {"every": "5min"}},
                    {"forecast": {"model": "sttn", "weights": "sttn-metr-la"}},
                    {"score": {"horizons": [3, 6, 12]}},
                ],
                "sink": {"files": {"path": folder, "formats": ["jsonl"]}},
            }
        )
        start = time.monotonic()
        pipeline.run(on_progress=sample)
        wall_s = time.monotonic() - start
    done = np.array([s[0] for s in samples], dtype=float)
    memory = np.array([s[1] for s in samples])
    half = len(samples) // 2
    slope = np.polyfit(done[half:] / done[-1], memory[half:], 1)[0]
    report(
        "memory",
        {
            "readings": int(done[-1]),
            "wall_s": round(wall_s, 1),
            "mb_after_a_tenth": round(float(memory[9]), 1),
            "mb_largest": round(float(memory.max()), 1),
            "mb_at_the_end": round(float(memory[-1]), 1),
            "mb_growth_over_a_whole_replay_from_the_second_half": round(float(slope), 1),
        },
    )


if __name__ == "__main__":
    main()
