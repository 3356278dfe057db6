"""Metrics: what a server did, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from h1export.serve.problems import for_operator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        where = {"registry": self._registry}
        self._requests = Counter("h1export_requests", "Answers by path and status.", ["path", "status"], **where)
        self._failures = Counter("h1export_failures", "Requests that failed here.", ["model"], **where)
        tokens = ("Tokens of prompts (computed or reused) and of answers.", ["model", "kind"])
        self._tokens = Counter("h1export_tokens", *tokens, **where)
        self._first = Histogram(
            "h1export_first_token_seconds", "From a request to its first token.", ["model"], buckets=SECONDS, **where
        )
        self._next = Histogram(
            "h1export_next_token_seconds", "Between two tokens of a text.", ["model"], buckets=SECONDS, **where
        )

    def answered(self, path: str, status: int) -> None:
        """Count an answer; ``path`` is that of a route, so that their number has an end."""
        self._requests.labels(path, str(status)).inc()

    def watch(self, model: str, report: Callable[[str], None]) -> ModelWatch:
        """Return what the scheduler of ``model`` is watched by; ``report`` is called with a line for each failure."""
        return ModelWatch(self, model, report)

    def gauges(self, name: str, text: str, values: Callable[[], Iterable[tuple[str, float]]]) -> None:
        """Show (model, value) pairs, as they are at the time of asking."""
        self._registry.register(_Gauges(name, text, values))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return bytes(generate_latest(self._registry))


class ModelWatch:
    """Counts the work of one model; it implements ``scheduler.Watch``."""

    def __init__(self, metrics: Metrics, model: str, report: Callable[[str], None]) -> None:
        self._model = model
        self._report = report
        self._failed = metrics._failures.labels(model)
        self._computed = metrics._tokens.labels(model, "computed")
        self._reused = metrics._tokens.labels(model, "reused")
        self._generated = metrics._tokens.labels(model, "generated")
        self._first = metrics._first.labels(model)
        self._next = metrics._next.labels(model)

    def began(self, waited: float, tokens: int, reused: int, *, texts: int) -> None:
        self._generated.inc(texts)
        self._computed.inc(tokens - reused)
        self._reused.inc(reused)
        self._first.observe(waited)

    def token(self, seconds: float) -> None:
        self._generated.inc()
        self._next.observe(seconds)

    def failed(self, error: BaseException) -> None:
        self._failed.inc()
        self._report(for_operator(self._model, error))


class _Gauges:
    """A collector of prometheus-client's, over a function."""

    def __init__(self, name: str, text: str, values: Callable[[], Iterable[tuple[str, float]]]) -> None:
        self._name, self._text, self._values = name, text, values

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        family = GaugeMetricFamily(self._name, self._text, labels=["model"])
        for model, value in self._values():
            family.add_metric([model], value)
        yield family
