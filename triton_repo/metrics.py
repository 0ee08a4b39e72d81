"""Prometheus metrics that Triton lacks: its own do not change until a job ends, or miss some jobs."""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from runtime.block_stream import NOTHING
from runtime.denoise import Step
from triton_repo.probe import MAX_FAILURES
from triton_repo.served_pipeline import ServedPipeline

Outcome = Literal["done", "refused", "cancelled", "out_of_time", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("done", "refused", "cancelled", "out_of_time", "failed")
Kind = Literal["counter", "gauge"]
NewFamily = Callable[[str, str, Kind], Any]  # name, help, kind → an object with Triton's ``Metric(labels=...)``
HEARTBEAT_S = 5.0
STREAMED = {  # description, and field of Streamed; zero for whole engines
    "wan22_streamed_bytes_total": ("Bytes of weights copied for engines in blocks.", "size_bytes"),
    "wan22_streamed_seconds_total": ("Seconds that these copies took, hidden or not.", "seconds_copied"),
    "wan22_stream_stall_seconds_total": ("Seconds that computations waited for these copies.", "seconds_waited"),
    "wan22_expert_switch_stall_seconds_total": (
        "The part of them in the first forward after a change of expert.", "seconds_waited_at_switches",
    ),
}  # fmt: skip


class Metrics:
    """All series of one model. They start at zero, so that rates and alerts work before the first job.

    Moments are exported twice: in Unix time for people, and on the monotonic clock, which all processes of a machine
    share and which is never set, for probes.
    """

    def __init__(self, new_family: NewFamily, model: str, pipeline: ServedPipeline) -> None:
        self._model, self._pipeline = model, pipeline
        self._running, self._one_at_a_time = 0, threading.RLock()
        self._families: list[Any] = []  # a garbage-collected family would remove its metrics
        self._new_family = new_family
        self.streamed: dict[str, Any] = {}
        self.in_flight = self._one("wan22_in_flight", "Jobs running now.", "gauge")
        self.heartbeat = self._moment("wan22_heartbeat", "Time of the model's last heartbeat")
        self.last_step = self._moment("wan22_last_step", "Time of the last progress of a job")
        self.failures = self._one("wan22_failures_in_a_row", "Failed jobs since the last success.", "gauge")
        self.failures_in_a_row = 0
        self.steps = self._one("wan22_steps_total", "Denoising steps done.", "counter")
        self.step_seconds = self._one("wan22_step_seconds_total", "Seconds spent in denoising steps.", "counter")
        self.cached = self._one("wan22_cached_steps_total", "Denoising steps that a step cache skipped.", "counter")
        late = "Denoising steps whose guidance was extrapolated."
        self.late_cfg = self._one("wan22_late_cfg_steps_total", late, "counter")
        self.swaps = self._one("wan22_expert_swaps_total", "Swaps of one expert for the other.", "counter")
        self.lora_swaps = self._one("wan22_lora_swaps_total", "Changes of the LoRA in use.", "counter")
        for name, (description, _) in STREAMED.items():
            self.streamed[name] = self._one(name, description, "counter")
        self._streamed_seen = pipeline.streamed or NOTHING
        self.requests = self._each("wan22_requests_total", "Jobs ended.", "outcome", OUTCOMES)
        stages = pipeline.spec.components
        self.stages = self._each("wan22_stage_seconds_total", "Seconds inside engines.", "stage", stages)
        self._seen = {stage: pipeline.seconds[stage] for stage in stages}
        self._swaps_seen, self._lora_swaps_seen = pipeline.swaps, pipeline.lora_swaps

    def _one(self, name: str, description: str, kind: Kind) -> Any:
        family = self._new_family(name, description, kind)
        self._families.append(family)
        return family.Metric(labels={"model": self._model})

    def _moment(self, name: str, description: str) -> tuple[Any, Any]:
        unix = self._one(f"{name}_timestamp_seconds", f"{description}, in Unix time.", "gauge")
        return unix, self._one(f"{name}_monotonic_seconds", f"{description}, on the monotonic clock.", "gauge")

    def _each(self, name: str, description: str, label: str, values: tuple[str, ...]) -> dict[str, Any]:
        family = self._new_family(name, description, "counter")
        self._families.append(family)
        return {value: family.Metric(labels={"model": self._model, label: value}) for value in values}

    def step(self, step: Step) -> None:
        with self._one_at_a_time:
            self.steps.increment(1)
            self.step_seconds.increment(step.seconds_total)
            self.cached.increment(int(step.cached))
            self.late_cfg.increment(int(step.late_cfg))
            self._stream()
            self.got_on()

    def _stream(self) -> None:
        """Count the weights of blocks that were copied since the last call."""
        now = self._pipeline.streamed or NOTHING
        more, self._streamed_seen = now.since(self._streamed_seen), now
        for name, (_, field) in STREAMED.items():
            self.streamed[name].increment(getattr(more, field))

    def got_on(self) -> None:
        """Record progress of the running job; a long time without progress means that it hangs."""
        _set_now(self.last_step)

    def beat(self) -> None:
        _set_now(self.heartbeat)

    def began(self) -> None:
        with self._one_at_a_time:
            self.got_on()
            self._running += 1
            self.in_flight.set(self._running)

    def ended(self, outcome: Outcome, *, lost: bool = False) -> None:
        """Count the job, and only then remove it from the jobs in flight.

        If a device is ``lost``, it counts as often as it takes for the server to be replaced.
        """
        with self._one_at_a_time:
            self._count(outcome, MAX_FAILURES if lost else 1)
            self._running -= 1
            self.in_flight.set(self._running)

    def _count(self, outcome: Outcome, failures: int) -> None:
        self.requests[outcome].increment(1)
        if outcome in ("done", "failed"):
            self.failures_in_a_row = self.failures_in_a_row + failures if outcome == "failed" else 0
            self.failures.set(self.failures_in_a_row)
        for stage, metric in self.stages.items():
            seconds = self._pipeline.seconds[stage]
            metric.increment(seconds - self._seen[stage])
            self._seen[stage] = seconds
        self.swaps.increment(self._pipeline.swaps - self._swaps_seen)
        self.lora_swaps.increment(self._pipeline.lora_swaps - self._lora_swaps_seen)
        self._swaps_seen, self._lora_swaps_seen = self._pipeline.swaps, self._pipeline.lora_swaps


def _set_now(moment: tuple[Any, Any]) -> None:
    unix, monotonic = moment
    unix.set(time.time())
    monotonic.set(time.monotonic())


class Heartbeat:
    """A thread that records the time while its process lives; Triton reports "healthy" long after a model's death."""

    def __init__(self, beat: Callable[[], None], every_s: float = HEARTBEAT_S) -> None:
        self._beat, self._every_s = beat, every_s
        self._over, self._end = os.pipe()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        os.close(self._end)
        self._thread.join()
        os.close(self._over)

    def _run(self) -> None:
        while True:
            self._beat()
            # The kernel counts this wait; those of threading are lengthened by whatever shifts a process's clock.
            if select.select([self._over], [], [], self._every_s)[0]:
                return
