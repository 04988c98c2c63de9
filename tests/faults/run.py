"""The fault run: every fault against a real three-node cluster, with a table of what held.

uv run python -m tests.faults.run [--seed N] [--only NAME]... [--scale X] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integration")]

from catalogue import FAULTS, left_out  # noqa: E402
from cluster import Cluster, unavailable  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rig import Verdict  # noqa: E402
from scenarios import Scenario  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=sorted(FAULTS))
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each fault happens")
    parser.add_argument("--out", type=Path, help="a folder that keeps logs and results.json")
    arguments = parser.parse_args()
    if (reason := unavailable()) is not None:
        sys.exit(reason)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="stepstream-faults-"))
    console: Console = Console()
    if not console.is_terminal:
        console.width = 150
    rows: list[dict[str, object]] = []
    table = Table(title=f"faults, seed {arguments.seed}", header_style="bold")
    for column in ("fault", "times", "records", "missing", "repeated", "wrong", "largest difference", "", "seconds"):
        table.add_column(column)
    with Cluster(folder / "cluster", 3) as cluster:
        for name in arguments.only or FAULTS:
            if (reason := left_out(name)) is not None:
                console.print(f"{name}: left out, {reason}")
                continue
            times = max(1, round(FAULTS[name].long * arguments.scale))
            console.print(f"{name}: {times} times")
            began = time.monotonic()
            scenario = Scenario(cluster, folder / name, random.Random(f"{arguments.seed}/{name}"), times)
            try:
                verdict = scenario.run(FAULTS[name].run)
            except Exception as error:  # noqa: BLE001 the other faults are worth their run
                console.print_exception(extra_lines=0)
                verdict = Verdict(0, 0, 0, 0, 0, 0, float("nan"), counts={f"ended by {type(error).__name__}": 1})
            took = time.monotonic() - began
            rows.append({"fault": name, "times": times, "exact": verdict.exact, **asdict(verdict), "took_s": took})
            measured = {**{k: f"{v:.1f} s" for k, v in verdict.seconds.items()}, **verdict.counts}
            table.add_row(
                name,
                str(times),
                str(verdict.expected),
                str(verdict.missing + verdict.unexpected),
                str(verdict.repeated),
                str(verdict.wrong),
                f"{verdict.largest_difference:.2g} mph",
                ", ".join(f"{k} {v}" for k, v in measured.items()),
                f"{took:.0f}",
            )
            console.print(f"  {'exactly once' if verdict.exact else 'NOT exactly once'} in {took:.0f} s")
            (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    console.print(table)
    console.print(f"logs and results.json: {folder}")
    sys.exit(0 if all(row["exact"] for row in rows) else 1)


if __name__ == "__main__":
    main()
