"""Prometheus metrics of the server, without any conversation content."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from duplex_jax.serve.events import Spoken
from duplex_jax.serve.live import LiveSession
from duplex_jax.serve.sessions import Sessions

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)


class Metrics(Collector):
    """Counts slices and their lateness; reads gauges from the sessions on demand."""

    def __init__(self, sessions: Sessions):
        self._sessions = sessions
        self._registry = CollectorRegistry()
        self._late = Histogram(
            "duplex_slice_late_seconds", "From a slice's tick to its answer", buckets=_SECONDS, registry=self._registry
        )
        self._slices = Counter("duplex_slices_total", "Slices answered", ["kind"], registry=self._registry)
        self._missed = Counter(
            "duplex_deadlines_missed_total", "Slices answered after the next tick", registry=self._registry
        )
        self._coalesced = Counter(
            "duplex_ticks_coalesced_total", "Ticks passed over because of lateness", registry=self._registry
        )
        self._refused = Counter(
            "duplex_connections_refused_total", "Connections turned away", ["reason"], registry=self._registry
        )
        self._registry.register(self)
        sessions.on_step = self._stepped

    def _stepped(self, session: LiveSession, spoken: Spoken) -> None:
        self._slices.labels("idle" if spoken.assistant is None else "spoken").inc()
        self._late.observe(spoken.late)
        self._coalesced.inc(spoken.missed)
        if spoken.late > session.settings.slice_seconds:
            self._missed.inc()

    def refuse(self, status: int) -> None:
        """Counts a refused request."""
        self._refused.labels("key" if status == 401 else "origin").inc()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges' current values."""
        gauge = GaugeMetricFamily("duplex_sessions", "Sessions by state", labels=["state"])
        for state, count in self._sessions.counts().items():
            gauge.add_metric([state], count)
        yield gauge
        hub = self._sessions.hub
        yield GaugeMetricFamily("duplex_rows", "Rows of the engine", hub.engine.cache.rows)
        yield GaugeMetricFamily("duplex_busy_seconds", "Time spent in batches", hub.busy_seconds)
        yield GaugeMetricFamily("duplex_batches", "Batches so far", hub.steps)

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)
