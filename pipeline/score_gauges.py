"""The last scores that went out, as Prometheus gauges: forecast error by horizon, and what the intervals cover."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Gauge

from stepstream.connectors.records import Record, Score

__all__ = ["ScoreGauges"]

MOST = 2000
"""(network, model, horizon): of more the newcomers are left out, so that a scrape stays small."""


class ScoreGauges:
    """`see` takes outputs. `span` is "window" (the scorer's window) or "all" (since the beginning)."""

    def __init__(self, pipeline: str, registry: CollectorRegistry) -> None:
        self._pipeline = pipeline
        self._registry = registry
        self._known: set[tuple[str, str, int]] = set()
        labels = ("pipeline", "key", "model", "horizon_seconds", "span")

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"stepstream_{name}", text, labels, registry=registry)

        self._mae = gauge("forecast_mae", "Mean absolute error of forecasts, in the network's unit.")
        self._rmse = gauge("forecast_rmse", "Root mean square error of forecasts, in the network's unit.")
        self._mape = gauge("forecast_mape_ratio", "Mean absolute percentage error of forecasts, as a fraction.")
        self._covered = gauge("interval_coverage_ratio", "Fraction of truths inside the prediction interval.")
        self._values = gauge("forecast_scored_values", "Forecast values behind the errors of this span.")

    def target(self, operator: str, coverage: float) -> None:
        """What the intervals of an operator are to cover."""
        text = "Fraction of truths that prediction intervals are to cover."
        Gauge(
            "stepstream_interval_coverage_target_ratio", text, ("pipeline", "operator"), registry=self._registry
        ).labels(self._pipeline, operator).set(coverage)

    def see(self, records: Sequence[Record]) -> None:
        """The scores among outputs."""
        for record in records:
            score = record.value
            if not isinstance(score, Score):
                continue
            place = (record.key, score.model, score.horizon_s)
            if place in self._known or len(self._known) < MOST:
                self._known.add(place)
                self._show(record.key, score)

    def _show(self, key: str, score: Score) -> None:
        spans = {
            "all": (score.mae, score.rmse, score.mape, score.covered, score.count),
            "window": (
                score.window_mae,
                score.window_rmse,
                score.window_mape,
                score.window_covered,
                score.window_count,
            ),
        }
        for span, values in spans.items():
            labels = (self._pipeline, key, score.model, str(score.horizon_s), span)
            for gauge, value in zip(
                (self._mae, self._rmse, self._mape, self._covered, self._values), values, strict=True
            ):
                if value is None or math.isnan(value):
                    if labels in gauge._metrics:  # noqa: SLF001 - it has no way to ask
                        gauge.remove(*labels)
                else:
                    gauge.labels(*labels).set(value)
