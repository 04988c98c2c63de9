"""`engine: kafka` on a real one-node broker, measured from outside; beside it other clients and another engine.

uv run --group bench python -m tests.bench.kafka_engine FOLDER [--only NAME]... [--short]

throughput    records/s from a backlog, and p50/p99 from produce to committed output at a fixed rate; operator `null`
transaction   what one transaction costs, by batch size
recovery      seconds from the start of a process to its first live record, by size and age of the state
shares        where the wall time of a process goes
alternatives  the same consume-map-produce with bare kafka-python, confluent-kafka and quixstreams (each run by
              `uv run --isolated --with ...`), same codecs, headers and batch; one picture of it

Records: a reading as JSON of 100 B, frames as Arrow of 10 KB and 1 MB, keyed, round robin over partitions. Those of
1 MB go in two chunks in `throughput` (the sink's default), whole in `alternatives`. Needs Java 17 and Maven.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.bench.kafka_rig import ROOT, SIZES, WHOLE, Bench, Cluster, Started, percentiles
from tests.bench.kafka_rig import unavailable as no_broker

CHUNK = 900_000
BATCH = 512
LIGHT = ("numpy", "pyarrow", "orjson", "pydantic")
"""What our codecs need. pydantic is not pinned: quixstreams asks for one of its own."""
CONFLUENT = "confluent-kafka==2.12.2"
"""The newest that quixstreams 3.28.1 goes with, so that both have the same librdkafka."""
ENVIRONMENTS = {"confluent-kafka": (CONFLUENT,), "quixstreams": ("quixstreams==3.28.1", CONFLUENT)}


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    backlog: dict[str, int]
    rates: dict[str, float]
    stamped: dict[str, int]
    partitions: tuple[int, ...]
    batches: dict[int, int]
    state_mb: tuple[int, ...]
    ages: tuple[int, ...]
    frames: int
    rounds: int


RATES = {"100 B": 200.0, "10 KB": 100.0, "1 MB": 4.0}
FULL = Plan(
    backlog={"100 B": 60_000, "10 KB": 6000, "1 MB": 300},
    rates=RATES,
    stamped={"100 B": 4000, "10 KB": 2000, "1 MB": 120},
    partitions=(1, 4, 16),
    batches={1: 1000, 10: 5000, 100: 30_000, BATCH: 60_000},
    state_mb=(0, 1, 10, 100),
    ages=(1000, 10_000, 100_000),
    frames=2016,
    rounds=3,
)
SHORT = Plan(
    backlog={"100 B": 20_000, "10 KB": 2000, "1 MB": 40},
    rates=RATES,
    stamped={"100 B": 500, "10 KB": 250, "1 MB": 25},
    partitions=(1, 4, 16),
    batches={1: 200, 10: 1000, 100: 8000, BATCH: 20_000},
    state_mb=(0, 10, 100),
    ages=(1000, 20_000),
    frames=500,
    rounds=1,
)


def throughput(bench: Bench, plan: Plan) -> dict[str, Any]:
    """The backlog first, then the latency, by one and the same process."""
    rows: dict[str, Any] = {}
    for size in SIZES:
        for partitions in plan.partitions:
            records = plan.backlog[size]
            topic, parts = bench.backlog(partitions, size, records, CHUNK)
            group, file = bench.pipeline(topic, partitions, chunk_bytes=CHUNK)
            process = bench.run(file)
            row = bench.watch(process, group, topic, partitions, records * parts, parts).summary()
            stamped, rate = plan.stamped[size], plan.rates[size]
            later = bench.latencies(topic, f"{group}.out", partitions, size, rate, stamped, CHUNK)
            process.end()
            bench.forget(topic)
            rows[f"{size}, {partitions} partitions"] = {**row, "latency": later}
            tell(f"throughput, {size}, {partitions} partitions", rows[f"{size}, {partitions} partitions"])
    return {"chunk_bytes": CHUNK, **rows}


def transaction(bench: Bench, plan: Plan) -> dict[str, Any]:
    """`call_ms`: from begin to the answer to the commit; `turn_ms`: from one commit to the next, with poll and step."""
    topic, _ = bench.backlog(1, "100 B", plan.backlog["100 B"])
    rows: dict[str, Any] = {}
    for batch, records in plan.batches.items():
        times, wall_s = timed_run(bench, topic, records, max_batch=batch)
        calls = times["transactions_s"]
        done = wall_s / len(calls)
        rows[str(batch)] = {
            "transactions": len(calls),
            "call_ms": percentiles(1e3 * call for call in calls),
            "turn_ms": round(1e3 * done, 2),
            "us_a_record": round(1e6 * done / batch, 1),
        }
        tell(f"transaction, max_batch {batch}", rows[str(batch)])
    return rows


def timed_run(
    bench: Bench, topic: str, until: int, operators: str = "[null]", **engine: Any
) -> tuple[dict[str, Any], float]:
    """(what `kafka_worker` timed, wall seconds) of a run over a backlog in one partition."""
    group, file = bench.pipeline(topic, 1, operators, **engine)
    path = file.with_suffix(".json")
    process = bench.run(file, timers=path)
    bench.watch(process, group, topic, 1, until)
    process.end()
    times = json.loads(path.read_text())
    return times, times["wall_s"]


def shares(bench: Bench, plan: Plan) -> dict[str, Any]:
    """Of the wall time from the first commit to the last, with a backlog."""
    small, _ = bench.backlog(1, "100 B", plan.backlog["100 B"])
    large, _ = bench.backlog(1, "10 KB", plan.backlog["10 KB"])
    frames = bench.topic("frames", 1)
    recording = str(ROOT / "data" / "metr_la_week.npz")
    command = [Path(sys.executable).with_name("stepstream"), "replay", recording, "--emit", "frames"]
    command += ["--to", f"kafka:{frames}", "--servers", bench.servers]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    forecast = "[{forecast: {model: sttn, weights: sttn-metr-la, timezone: America/Los_Angeles}}]"
    runs: dict[str, tuple[str, int, str, int]] = {
        "null, 100 B": (small, plan.backlog["100 B"], "[null]", BATCH),
        "null, 10 KB": (large, plan.backlog["10 KB"], "[null]", BATCH),
        "sttn-metr-la, METR-LA frames": (frames, plan.frames, forecast, BATCH),
        "sttn-metr-la, METR-LA frames, max_batch 1": (frames, plan.frames, forecast, 1),
    }
    rows = {}
    for name, (topic, records, operators, batch) in runs.items():
        times, wall_s = timed_run(bench, topic, records, operators, max_batch=batch)
        rows[name] = _shares(times, wall_s)
        tell(f"shares, {name}", rows[name])
    return rows


def _shares(times: dict[str, Any], wall_s: float) -> dict[str, Any]:
    calls: dict[str, float] = times["calls_s"]
    producer = "KafkaProducer"
    model = calls.get("Infer.process", 0.0)
    parts = {
        "poll": calls["KafkaConsumer.poll"],
        "decode": calls["MessageReader.records"],
        "model": model,
        "operators": calls["Task.process"] - model,
        "encode": calls["KafkaSink.messages"],
        "send": calls[f"{producer}.send"],
        "acknowledge": calls["KafkaSink.acknowledged"],
        "commit": sum(calls[f"{producer}.{n}_transaction"] for n in ("begin", "send_offsets_to", "commit")),
    }
    parts["engine"] = wall_s - sum(parts.values())
    percent = {name: round(100 * seconds / wall_s, 1) for name, seconds in parts.items()}
    return {"wall_s": round(wall_s, 2), "cores": round(times["cpu_s"] / wall_s, 2), "percent": percent}


# ---- recovery


def recovery(bench: Bench, plan: Plan) -> dict[str, Any]:
    """A process was ended, one record came, and a process is started."""
    rows: dict[str, Any] = {}
    for size in plan.state_mb:
        rows[f"{size} MB, nothing to replay"] = _recovered(bench, size, 0, plan.rounds)
    for age in plan.ages:
        rows[f"1 MB, {age} records to replay"] = _recovered(bench, 1, age, plan.rounds)
    rows["1 MB, started at once after kill -9 (session_timeout_ms 10000)"] = _recovered(bench, 1, 0, 1, at_once=True)
    return rows


def _recovered(bench: Bench, size_mb: int, age: int, rounds: int, *, at_once: bool = False) -> dict[str, Any]:
    topic, keys = bench.topic("recovery", 1), 4
    operators = f"[{{'tests.bench.kafka_operators:Hold': {{bytes: {size_mb * 1_000_000 // keys}}}}}]"
    timeout_ms = 10_000 if at_once else 1500
    options = {"snapshots": bench.folder / topic, "session_timeout_ms": timeout_ms, "instance": "bench"}
    group, file = bench.pipeline(topic, 1, operators if size_mb else "[null]", **options)
    done = 2 * keys
    bench.append(topic, 1, "100 B", done)
    # A graceful stop leaves a snapshot of what is committed, kill -9 leaves none of what comes behind it.
    process = bench.run(file, "snapshot_every_s=100000")
    bench.watch(process, group, topic, 1, done)
    process.end()
    if age or at_once:
        bench.append(topic, 1, "100 B", max(1, age))
        process = bench.run(file, "snapshot_every_s=100000")
        done += max(1, age)
        bench.watch(process, group, topic, 1, done)
    took, restored = [], 0
    for _ in range(rounds):
        process.end(9)
        bench.append(topic, 1, "100 B", 1)
        done += 1
        if not at_once:
            time.sleep(timeout_ms / 1000 + 1)  # the group has forgotten the one before
        process = bench.run(file, "snapshot_every_s=100000")
        seen = bench.watch(process, group, topic, 1, done, every_s=0.01)
        took.append(round(seen.samples[-1][0] - process.at, 2))
        restored = done - 1 - _restored_from(process)
    process.end(9)
    row = {"seconds": took, "replayed": restored}
    tell(f"recovery, {size_mb} MB, age {age}", row)
    return row


def _restored_from(process: Started) -> int:
    return int(re.findall(r" restored .*from=(\d+)", process.log.read_text())[-1])


# ---- alternatives


def alternatives(bench: Bench, plan: Plan) -> dict[str, Any]:
    """One partition; a row a size, the alternatives in turns. One that cannot be had says why."""
    rows: dict[str, Any] = {}
    for size in SIZES:
        topic, _ = bench.backlog(1, size, plan.backlog[size])
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("stepstream", "kafka-python", *ENVIRONMENTS)}
        for _ in range(plan.rounds):
            for name, rounds in found.items():
                try:
                    rounds.append(_alternative(bench, name, topic, plan.backlog[size]))
                except (RuntimeError, TimeoutError) as error:
                    rounds.append({"failed": str(error)[-1500:], "records_a_s": 0.0})
                tell(f"alternatives, {size}, {name}", rounds[-1])
        # The median round; which one failed is not hidden by those that did not.
        rows[size] = {}
        for name, rounds in found.items():
            rates = sorted(row["records_a_s"] for row in rounds)
            median = next(row for row in rounds if row["records_a_s"] == rates[len(rates) // 2])
            rows[size][name] = {**median, "all_records_a_s": rates}
    return {"environments": ENVIRONMENTS, "batch": BATCH, **rows}


def _alternative(bench: Bench, name: str, topic: str, records: int) -> dict[str, float]:
    group, file = bench.pipeline(topic, 1, max_batch=BATCH)
    if name == "stepstream":
        process = bench.run(file)
    else:
        python: list[str] = [sys.executable]
        if name in ENVIRONMENTS:
            wanted = [*ENVIRONMENTS[name], *(f"{n}=={version(n)}" if n != "pydantic" else n for n in LIGHT)]
            python = ["uv", "run", "-q", "--isolated", "--no-project", "--python", platform.python_version()]
            python += [f"--with={each}" for each in wanted] + ["python"]
        script = str(ROOT / "tests" / "bench" / "kafka_loops.py")
        command = [*python, script, name, bench.servers, topic, group, f"{group}.out", str(BATCH)]
        process = bench.start(command, f"{name}-{group}", PYTHONPATH=str(ROOT / ".links"))
    try:
        return bench.watch(process, group, topic, 1, records).summary()
    finally:
        process.end()


def draw(result: dict[str, Any], path: Path) -> None:
    """Records a second of each alternative, a panel a size."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from stepstream.pipeline.report_style import LIGHT as COLOURS

    mpl.rcParams["font.size"] = 10
    figure = Figure(figsize=(10, 2.6), layout="constrained", facecolor=COLOURS["surface"])
    for axes, size in zip(figure.subplots(1, len(SIZES)), SIZES, strict=True):
        rates = {name: row.get("records_a_s", 0.0) for name, row in result[size].items()}
        ours = [COLOURS["sttn" if name == "stepstream" else "outage"] for name in rates]
        bars = axes.barh(list(rates), list(rates.values()), color=ours, height=0.66)
        labels = [f"{rate:,.0f}" if rate else "failed" for rate in rates.values()]
        axes.bar_label(bars, labels, padding=4, color=COLOURS["ink"])
        axes.set_title(f"records of {size}", loc="left", color=COLOURS["ink"], fontsize=11)
        axes.set_xlim(0, 1.25 * max(rates.values()))
        axes.invert_yaxis()
        axes.set_facecolor(COLOURS["surface"])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=COLOURS["muted"], labelleft=axes.get_subplotspec().is_first_col())
        axes.xaxis.set_visible(False)
    figure.suptitle("records a second: consume, decode, encode, produce, exactly once", color=COLOURS["ink"], x=0.5)
    figure.savefig(path, dpi=150)


# ---- all of it

SECTIONS: dict[str, Callable[[Bench, Plan], dict[str, Any]]] = {
    section.__name__: section for section in (throughput, transaction, recovery, shares, alternatives)
}


def tell(what: str, row: Any) -> None:
    """Progress, on stderr: the result is all that stdout gets."""
    print(f"{what}: {json.dumps(row)}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", choices=list(SECTIONS))
    parser.add_argument("--short", action="store_true", help="fewer records")
    given = parser.parse_args(arguments)
    if (reason := no_broker()) is not None:
        sys.exit(f"error: {reason}")
    given.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"short": given.short, "cores": os.cpu_count(), "load_before": os.getloadavg()}
    result |= {"versions": {name: version(name) for name in ("kafka-python", *LIGHT)}, "whole_bytes": WHOLE}
    with (
        tempfile.TemporaryDirectory(prefix="stepstream-bench-") as name,
        Cluster(Path(name) / "cluster", 1) as cluster,
    ):
        bench = Bench(Path(name), cluster)
        for section in given.only or SECTIONS:
            result[section] = SECTIONS[section](bench, SHORT if given.short else FULL)
            result["load_after"] = os.getloadavg()
            (given.folder / "kafka_engine.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if "alternatives" in result:
        draw(result["alternatives"], given.folder / "kafka_engine.png")


if __name__ == "__main__":
    main()
