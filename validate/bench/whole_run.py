"""An end-to-end run, from the prompt to the last frame, as timed events; and the figures derived from them.

The sides take turns event by event: a step of ours, a step of PyTorch's. So every step is a pair of neighbours, and one
run yields a ratio with a spread. Loading is reported separately; the totals exclude it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from runtime.block_stream import Streamed
from validate.bench.samples import Ratio, settle

Kind = Literal["open", "swap", "text", "image", "step", "decode"]
LOADING = ("open", "swap")


@dataclass(frozen=True)
class Event:
    kind: Kind
    component: str
    seconds: float
    engine_seconds: float = 0.0  # for a step: the part inside forwards
    streamed: Streamed | None = None  # for a step of engines in blocks: weights copied, and their cost


@dataclass(frozen=True)
class Run:
    """The events of one run of one side, in order."""

    events: tuple[Event, ...]

    def seconds(self, *kinds: Kind) -> float:
        return sum(event.seconds for event in self.events if event.kind in kinds)

    @property
    def steps(self) -> list[Event]:
        return [event for event in self.events if event.kind == "step"]

    @property
    def total_s(self) -> float:
        return sum(event.seconds for event in self.events if event.kind not in LOADING)

    @property
    def first_frame_s(self) -> float:
        """The time until the first frames can be shown."""
        kinds = [event.kind for event in self.events]
        until = kinds.index("decode") + 1
        return sum(event.seconds for event in self.events[:until] if event.kind not in LOADING)

    @property
    def host_overhead_ms(self) -> float:
        """The median time of a step outside its forwards: guidance, solver, inputs. The first step is warm-up."""
        steps = self.steps[1:] or self.steps
        return float(np.median([1000 * (step.seconds - step.engine_seconds) for step in steps]))

    @property
    def host_overhead_percent(self) -> float:
        steps = self.steps[1:] or self.steps
        return float(np.median([100 * (1 - step.engine_seconds / step.seconds) for step in steps]))

    def figures(self) -> dict[str, float]:
        """All figures, by their names in gates and JSON."""
        figures = {
            "total_s": self.total_s,
            "first_frame_s": self.first_frame_s,
            "text_s": self.seconds("text"),
            "image_s": self.seconds("image"),
            "denoise_s": self.seconds("step"),
            "decode_s": self.seconds("decode"),
            "vae_share_percent": 100 * self.seconds("image", "decode") / self.total_s,
            "open_s": self.seconds("open"),
            "host_overhead_ms": self.host_overhead_ms,
            "host_overhead_percent": self.host_overhead_percent,
        }
        swaps = [event.seconds for event in self.events if event.kind == "swap"]
        return figures | ({"expert_swap_s": float(np.median(swaps))} if swaps else {}) | self._streamed()

    def _streamed(self) -> dict[str, float]:
        """Medians of the steps, the first of which also brings what stays resident; the stall of the whole run."""
        steps = [step.streamed for step in self.steps if step.streamed is not None]
        if not steps:
            return {}
        usual = steps[1:] or steps
        return {
            "streamed_step_bytes": float(np.median([step.size_bytes for step in usual])),
            "stream_hidden_step_ms": float(np.median([1000 * step.seconds_hidden for step in usual])),
            "stream_stall_step_ms": float(np.median([1000 * step.seconds_waited for step in usual])),
            "switch_stall_ms": 1000 * sum(step.seconds_waited_at_switches for step in steps),
        }


@dataclass(frozen=True)
class Runs:
    """Repeated runs of one side, with the same events in each."""

    each: tuple[Run, ...]

    @property
    def totals_s(self) -> list[float]:
        return [run.total_s for run in self.each]

    @property
    def steps(self) -> list[Event]:
        """Every step as the median over the runs."""
        steps = []
        for same in zip(*(run.steps for run in self.each), strict=True):
            times = np.median([(step.seconds, step.engine_seconds) for step in same], axis=0)
            steps.append(Event("step", same[0].component, *times.tolist()))
        return steps

    def figures(self) -> dict[str, float]:
        """The figures of a run as medians over the runs, and the p90 of the total."""
        each = [run.figures() for run in self.each]
        medians = {name: float(np.median([found[name] for found in each])) for name in each[0]}
        return medians | {"total_p90_s": float(np.percentile(self.totals_s, 90))}

    def as_json(self) -> dict[str, Any]:
        steps = [
            {"expert": s.component, "ms": 1000 * s.seconds, "engine_ms": 1000 * s.engine_seconds} for s in self.steps
        ]
        opens = {event.component: event.seconds for event in self.each[0].events if event.kind == "open"}
        return self.figures() | {"totals_s": self.totals_s, "steps": steps, "open_by_component_s": opens}


def in_turns(sides: Mapping[str, Iterator[Event]], after_event: Callable[[], None]) -> dict[str, Run]:
    """Advance one run of every side, event by event; ``after_event`` is called after each round."""
    events: dict[str, list[Event]] = {name: [] for name in sides}
    for row in zip_longest(*map(_settle_before_each, sides.values())):
        for name, event in zip(sides, row, strict=True):
            if event is not None:
                events[name].append(event)
        after_event()
    return {name: Run(tuple(found)) for name, found in events.items()}


def _settle_before_each(events: Iterator[Event]) -> Iterator[Event]:
    """Yield the events, each started when the other side's threads are asleep."""
    while True:
        settle()
        try:
            yield next(events)
        except StopIteration:
            return


def step_ratio(other: Runs, ours: Runs) -> Ratio:
    """The time of the other side's steps over ours."""
    return Ratio.of(*([step.seconds for run in side.each for step in run.steps] for side in (other, ours)))


def total_ratio(other: Runs, ours: Runs) -> Ratio:
    """The time of the other side's runs over ours."""
    return Ratio.of(other.totals_s, ours.totals_s)
