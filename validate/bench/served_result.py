"""The result of a server bench, for people and for programs, and its targets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from validate.bench.samples import Samples
from validate.bench.two_sides import TwoSides
from validate.gate import Gate

DIRECT, SERVED = "in process", "served"
OVERHEAD, BEYOND_STEP = "triton.overhead_percent", "triton.cancel_beyond_step_ms"
KNOWN = (OVERHEAD, BEYOND_STEP)
TARGETS = (Gate(OVERHEAD, "max", 10), Gate(BEYOND_STEP, "max", 100))


@dataclass(frozen=True)
class Cancel:
    """The times of one cancelled job, in seconds."""

    latency: float  # from the client's cancel until the model is free
    step: float  # the median step of that job


@dataclass(frozen=True)
class ServedBench(TwoSides):
    """True if every gate holds."""

    SIDES = DIRECT, SERVED
    facts: dict[str, Any]
    samples: Mapping[str, Samples]  # end-to-end runs by side
    inside_s: tuple[float, ...]  # times of the served runs that the model itself reports
    cancels: tuple[Cancel, ...]
    same_latents: bool  # bitwise, which requires the same numpy on both sides
    gates: tuple[Gate, ...] = TARGETS

    def measurements(self) -> dict[str, float]:
        beyond = max(cancel.latency - cancel.step for cancel in self.cancels)
        return {OVERHEAD: 100 * (self.ratio.median - 1), BEYOND_STEP: 1000 * beyond}

    def as_json(self) -> dict[str, Any]:
        return self.facts | {
            "in_process": self.samples[DIRECT].as_json(),
            "served": self.samples[SERVED].as_json(),
            "served_inside_model_median_ms": 1000 * float(np.median(self.inside_s)),
            "cancels": [{"latency_ms": 1000 * c.latency, "step_ms": 1000 * c.step} for c in self.cancels],
            "same_latents": self.same_latents,
            **self.judged(),
        }

    def as_text(self) -> Iterator[RenderableType]:
        """Yield the output for a terminal."""
        table = Table("one job, ms", "median", "p90", title=self.title)
        for side in (DIRECT, SERVED):
            table.add_row(side, *(f"{1000 * s:.1f}" for s in (self.samples[side].median, self.samples[side].p90)))
        table.add_row("inside the model", f"{1000 * float(np.median(self.inside_s)):.1f}", "")
        yield table
        yield self.ratio_line()
        latencies = [1000 * cancel.latency for cancel in self.cancels]
        step_ms = 1000 * float(np.median([cancel.step for cancel in self.cancels]))
        yield f"cancel: {np.median(latencies):.0f} ms, {max(latencies):.0f} at most; a step is {step_ms:.0f} ms"
        yield from self.verdict_lines()
