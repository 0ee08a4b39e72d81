"""The result of a gateway bench, for people and for programs, and its targets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from validate.bench.machine import usable_cores
from validate.bench.samples import Samples
from validate.bench.two_sides import TwoSides
from validate.gate import Gate

DIRECT, GATEWAY = "Triton", "gateway"
STATUS, JOB, GROWTH = "gateway.status_ms", "gateway.job_overhead_percent", "gateway.growth_mib_per_1000_jobs"
KNOWN = (STATUS, JOB, GROWTH)
TARGETS = (Gate(STATUS, "max", 5), Gate(JOB, "max", 2), Gate(GROWTH, "max", 8))
MIB = 2**20
FITTED = 0.5  # share of the jobs, the last ones, whose memory is fitted: the first fill caches


@dataclass(frozen=True)
class GatewayBench(TwoSides):
    """True if every gate holds, and the videos are the same."""

    SIDES = DIRECT, GATEWAY
    facts: dict[str, Any]
    samples: Mapping[str, Samples]  # whole jobs by side
    floor_s: Sequence[float]  # answers of /health under the same load
    status_s: Sequence[float]  # answers about a video
    rss: Sequence[tuple[int, int]]  # jobs so far, resident bytes of the gateway
    same_video: bool  # bitwise
    gates: tuple[Gate, ...] = TARGETS

    @property
    def growth_mib(self) -> float:
        """MiB per 1000 jobs, by a line through the last half."""
        jobs, resident = np.array(self.rss[int(len(self.rss) * (1 - FITTED)) :], dtype=float).T
        return float(np.polyfit(jobs, resident, 1)[0] * 1000 / MIB) if len(jobs) > 1 else 0.0

    def measurements(self) -> dict[str, float]:
        status_ms = 1000 * float(np.median(self.status_s))
        return {STATUS: status_ms, JOB: 100 * (self.ratio.median - 1), GROWTH: self.growth_mib}

    def __bool__(self) -> bool:
        return super().__bool__() and self.same_video

    def as_json(self) -> dict[str, Any]:
        first, last = self.rss[0][1], self.rss[-1][1]
        return self.facts | {
            "triton": self.samples[DIRECT].as_json(),
            "gateway": self.samples[GATEWAY].as_json(),
            "health_ms": _percentiles(self.floor_s),
            "status_ms": _percentiles(self.status_s),
            "resident_mib": {"first": first / MIB, "last": last / MIB, "most": max(r for _, r in self.rss) / MIB},
            "same_video": self.same_video,
            **self.judged(),
        }

    def as_text(self) -> Iterator[RenderableType]:
        """Yield the output for a terminal."""
        table = Table("ms", "median", "p90", "p99", title=self.title)
        for side in (DIRECT, GATEWAY):
            shown = self.samples[side]
            table.add_row(f"job, {side}", f"{1000 * shown.median:.1f}", f"{1000 * shown.p90:.1f}", "")
        for name, taken in (("alive", self.floor_s), ("status", self.status_s)):
            table.add_row(
                f"{name}, {self.facts['rate_per_s']}/s", *(f"{ms:.1f}" for ms in _percentiles(taken).values())
            )
        yield table
        yield self.ratio_line()
        first, last = self.rss[0][1] / MIB, self.rss[-1][1] / MIB
        yield f"memory of the gateway: {first:.0f} MiB after the first job, {last:.0f} after {len(self.rss)}"
        status_ms, job_ms = self.facts["processor_ms_per_status"], self.facts["processor_ms_per_job"]
        yield f"processor time of the gateway: {status_ms:.2f} ms for a status, {job_ms:.0f} ms for a job"
        if not self.same_video:
            yield Text("the gateway's video is another than Triton's", "red")
        before, after = self.facts["load_average"], self.facts["load_average_after"]
        yield f"load average {before:.1f} before, {after:.1f} after, on {usable_cores()} cores"
        yield from self.verdict_lines()


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    median, p90, p99 = np.percentile(seconds, [50, 90, 99])
    return {"median": 1000 * float(median), "p90": 1000 * float(p90), "p99": 1000 * float(p99)}
