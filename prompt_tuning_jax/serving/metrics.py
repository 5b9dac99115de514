"""The counters of a server, for Prometheus and for the server's own page."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
_RECENT = 10.0  # seconds that the page's throughput is taken over


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kind: Any = {"registry": self.registry, "namespace": "prompt_tuning"}
        self.requests = Counter(
            "requests", "Requests answered, by path and status", ("path", "status"), **kind
        )
        self.seconds = Histogram(
            "request_seconds",
            "Time from a request to its response",
            ("mode",),
            buckets=_SECONDS,
            **kind,
        )
        self.rows = Counter("rows", "Inputs times prompts computed", ("kind",), **kind)
        self.batch_rows = Histogram(
            "batch_rows", "Rows computed together", ("kind",), buckets=_ROWS, **kind
        )
        self.batch_seconds = Histogram(
            "batch_seconds",
            "Time of one program: score, generate (reads inputs) or decode",
            ("kind",),
            buckets=_SECONDS,
            **kind,
        )
        self.queue_seconds = Histogram(
            "queue_seconds", "Time that rows waited for their batch", buckets=_SECONDS, **kind
        )
        self.tokens = Counter("tokens_written", "Tokens of finished texts", **kind)
        self.failures = Counter("worker_failures", "Programs that failed on the device", **kind)
        self.waiting = Gauge("queue_rows", "Rows that are waiting", **kind)
        self.tasks = Gauge("tasks", "Served tasks", **kind)
        self.cache_hits = Gauge("cache_hits", "Prompts found on the device", **kind)
        self.cache_misses = Gauge("cache_misses", "Prompts copied to the device", **kind)
        self._recent: deque[tuple[float, int]] = deque()

    def batch(self, kind: str, rows: int, seconds: float) -> None:
        self.rows.labels(kind).inc(rows)
        self.batch_rows.labels(kind).observe(rows)
        self.batch_seconds.labels(kind).observe(seconds)
        self._recent.append((time.monotonic(), rows))
        self._forget()

    def waited(self, seconds: Iterable[float]) -> None:
        for one in seconds:
            self.queue_seconds.observe(one)

    def rows_per_second(self) -> float:
        """Returns the mean of the last ten seconds."""
        self._forget()
        return sum(rows for _, rows in self._recent) / _RECENT

    def page(self) -> bytes:
        """Returns Prometheus's text format."""
        return generate_latest(self.registry)

    def _forget(self) -> None:
        before = time.monotonic() - _RECENT
        while self._recent and self._recent[0][0] < before:
            self._recent.popleft()
