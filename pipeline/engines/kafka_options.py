"""The options of the Kafka engine."""

from __future__ import annotations

from pydantic import Field

from stepstream.pipeline.engines import base

__all__ = ["KafkaOptions"]


class KafkaOptions(base.Options):
    """`max_batch`: records of one transaction at most, for which a poll that found some waits up to `max_wait_ms` more;
    with slow models fewer, so that one takes about a fifth of `session_timeout_ms` and the group waits for nobody.
    `snapshots`: a folder or URL (s3://...) that all processes see; without one a start replays the whole log.
    `snapshot_every_s`: for each partition. `standby`: also follows the partitions that others have, to take them
    over warm; costs their state's memory, and the model's time once more. `instance`: this process's name, the
    same after a restart and no other's (a StatefulSet's pod name), so that a start ends at once what the one
    before had left open; else that takes up to `transaction_timeout_ms`. `session_timeout_ms`: after so long
    without a sign of life others take over. `max_poll_interval_ms`: after so long with one batch, too.
    `stop_within_s`: for last snapshots at a graceful stop. `from_partial_state`: goes on, with a warning, where
    the log no longer holds all that the state is made from.
    """

    max_batch: int = Field(512, ge=1, le=1 << 20)
    max_wait_ms: float = Field(0, ge=0, le=60_000)
    snapshots: str | None = None
    snapshot_every_s: float = Field(30, ge=0)
    instance: str | None = Field(None, pattern=r"^[a-zA-Z0-9._-]{1,200}$")
    session_timeout_ms: int = Field(10_000, ge=1000)
    transaction_timeout_ms: int = Field(15_000, ge=1000)
    max_poll_interval_ms: int = Field(120_000, ge=1000)
    stop_within_s: float = Field(10, ge=0)
    standby: bool = False
    from_partial_state: bool = False
