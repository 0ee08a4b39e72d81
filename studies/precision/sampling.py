"""The runs of a study: the float32 one with everything that it computed, and what other precisions make of the same."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from runtime.arrays import F32
from runtime.schedule import Schedule
from studies.precision.result import Result
from studies.precision.twin import Forward, Inputs, Twin, sampled
from studies.precision.variants import Measured, Variant, open_reference, open_variant
from validate.ladder.metrics import compare
from wan22.errors import NonFiniteError


@dataclass(frozen=True, eq=False)
class Call:
    """One forward of a float32 run."""

    expert: str
    inputs: dict[str, F32]
    velocity: F32


class Reference:
    """A float32 run: every forward of it, where it ended, and what entered its linears."""

    def __init__(self, twin: Twin, given: Inputs, schedule: Schedule) -> None:
        self.calls: list[Call] = []
        self._positive = given.positive
        self._tapped = {expert: open_reference(twin.spec.dit, weights) for expert, weights in twin.weights.items()}
        experts = {expert: self._recorded(expert) for expert in self._tapped}
        self.latents = sampled(twin.spec, given, schedule, experts)

    def _recorded(self, expert: str) -> Forward:
        def forward(**inputs: F32) -> F32:
            velocity: F32 = self._tapped[expert](**inputs)
            self.calls.append(Call(expert, inputs, velocity))
            return velocity

        return forward

    @property
    def prompted(self) -> list[Call]:
        """The forwards with the prompt, one a step."""
        return [call for call in self.calls if call.inputs["text"] is self._positive]

    def measured(self, expert: str) -> Measured:
        return Measured(self._tapped[expert].largest, self._tapped[expert].means)


class Comparison:
    """Variants beside the float32 run on the twin's judged inputs; ``beforehand`` is what they may have measured, and
    ``untold`` what there was to measure without data.
    """

    def __init__(
        self, twin: Twin, schedule: Schedule, reference: Reference, beforehand: Reference, untold: Reference
    ) -> None:
        self.twin, self.schedule = twin, schedule
        self.reference, self.beforehand, self.untold = reference, beforehand, untold

    def opened(self, variant: Variant) -> dict[str, Forward]:
        """The variant's forwards by expert."""
        dit, measured = self.twin.spec.dit, self.untold if variant.untold else self.beforehand
        return {
            expert: open_variant(variant, dit, weights, measured.measured(expert))
            for expert, weights in self.twin.weights.items()
        }

    def result(self, variant: Variant, experts: Mapping[str, Forward] | None = None) -> Result:
        """Errors of single velocities, then a run of its own; ``experts`` where they are open already."""
        experts, calls = experts or self.opened(variant), self.reference.prompted
        started = time.perf_counter()
        errors = tuple(compare(experts[call.expert](**call.inputs), call.velocity).relative_l2 for call in calls)
        seconds = (time.perf_counter() - started) / len(errors)
        try:
            latents = sampled(self.twin.spec, self.twin.judged, self.schedule, experts)
        except NonFiniteError as error:
            return Result(variant, errors, math.nan, seconds, str(error))
        exact = self.reference.latents
        psnr_db = compare(latents, exact, signal_range=float(np.ptp(exact))).psnr_db
        return Result(variant, errors, math.nan if psnr_db is None else psnr_db, seconds)

    def first_error(self, variant: Variant) -> float:
        """Of the first step's velocity."""
        call = self.reference.prompted[0]
        return compare(self.opened(variant)[call.expert](**call.inputs), call.velocity).relative_l2
