"""Prometheus metrics of the gateway. No label has a prompt, a key or the id of a job."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

JOB_S = (1, 5, 15, 30, 60, 120, 300, 600, 1200, 2400, 3600)
CANCEL_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10)
Values = dict[tuple[str, ...], float]  # by labels
State = Mapping[str, tuple[tuple[str, ...], str, Values]]  # name → names of labels, help, values


class GatewayMetrics:
    """``state`` is asked at every scrape for what the database knows."""

    def __init__(self, state: Callable[[], State]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(state))
        own = self.registry
        self._ended = Counter("wan_gateway_jobs_ended", "Jobs ended here.", ("model", "outcome"), registry=own)
        says = "Seconds of a job."
        self._seconds = Histogram("wan_gateway_job_seconds", says, ("model",), buckets=JOB_S, registry=own)
        says = "Seconds of a phase."
        self._phases = Histogram("wan_gateway_phase_seconds", says, ("model", "phase"), buckets=JOB_S, registry=own)
        says = "From a cancellation until the server is free."
        self._cancels = Histogram("wan_gateway_cancel_seconds", says, buckets=CANCEL_S, registry=own)

    def ended(self, model: str, outcome: str, seconds: float) -> None:
        self._ended.labels(model, outcome).inc()
        if outcome == "completed":
            self._seconds.labels(model).observe(seconds)

    def phase(self, model: str, phase: str, seconds: float) -> None:
        self._phases.labels(model, phase).observe(seconds)

    def cancelled(self, seconds: float) -> None:
        self._cancels.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State:
    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for name, (labels, says, values) in self._state().items():
            family = GaugeMetricFamily(name, says, labels=labels)
            for label, value in values.items():
                family.add_metric(label, value)
            yield family
