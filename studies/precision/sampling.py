"""The runs of a study: the float32 run with all its forwards, and the variants' runs on the same inputs."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export.precisions import LINEARS
from export.quantise.measure import GRID_FOR_FP4, forwards_of_noise, measure_inputs
from runtime.arrays import F32
from runtime.schedule import Schedule
from studies.precision.result import VariantResult
from studies.precision.twin import Forward, Inputs, Twin, sample
from studies.precision.variants import Calibration, Variant, inputs_of, open_reference, open_variant
from validate.ladder.metrics import compare
from wan22.errors import NonFiniteError


@dataclass(frozen=True, eq=False)
class Call:
    """One forward of a float32 run."""

    expert: str
    inputs: dict[str, F32]
    velocity: F32


class ReferenceRun:
    """A float32 run: all its forwards, its final latents, and statistics of its linears' inputs."""

    def __init__(self, twin: Twin, given: Inputs, schedule: Schedule) -> None:
        self.calls: list[Call] = []
        self._positive = given.positive
        self._tapped = {expert: open_reference(twin.spec.dit, weights) for expert, weights in twin.weights.items()}
        experts = {expert: self._record(expert) for expert in self._tapped}
        self.latents = sample(twin.spec, given, schedule, experts)

    def _record(self, expert: str) -> Forward:
        def forward(**inputs: F32) -> F32:
            velocity: F32 = self._tapped[expert](**inputs)
            self.calls.append(Call(expert, inputs, velocity))
            return velocity

        return forward

    @property
    def prompted_calls(self) -> list[Call]:
        """The forwards with the prompt, one per step."""
        return [call for call in self.calls if call.inputs["text"] is self._positive]

    def largest(self, expert: str) -> dict[str, float]:
        """The largest input of every linear."""
        return self._tapped[expert].largest

    def calibration(self, twin: Twin, expert: str) -> Calibration:
        """What this run and an export measure on the inputs of the twin's linears."""
        tapped, weights = self._tapped[expert], twin.weights[expert]
        for_fp4 = forwards_of_noise(twin.spec, expert, GRID_FOR_FP4)
        without_data, without_data_for_fp4, of_the_run = (
            measure_inputs(weights.__getitem__, twin.spec, expert, keep=kept, given=given)
            for kept, given in (((), None), (LINEARS, for_fp4), (LINEARS, tapped.forwards))
        )
        by_run = inputs_of(tapped, weights, of_the_run)
        return Calibration(tapped.largest, by_run, without_data, without_data_for_fp4)


@dataclass(frozen=True, eq=False)
class VariantComparison:
    """Compares variants with the float32 run on the twin's judged inputs."""

    twin: Twin
    schedule: Schedule
    reference: ReferenceRun
    measured: Mapping[str, Calibration]  # by expert, from another run

    def open_experts(self, variant: Variant) -> dict[str, Forward]:
        """The variant's forwards by expert."""
        dit = self.twin.spec.dit
        return {
            expert: open_variant(variant, dit, weights, self.measured[expert])
            for expert, weights in self.twin.weights.items()
        }

    def result(self, variant: Variant, experts: Mapping[str, Forward] | None = None) -> VariantResult:
        """Errors of single velocities, then an end-to-end run of the variant; ``experts`` are its forwards if open."""
        experts, calls = experts or self.open_experts(variant), self.reference.prompted_calls
        started = time.perf_counter()
        errors = tuple(compare(experts[call.expert](**call.inputs), call.velocity).relative_l2 for call in calls)
        seconds = (time.perf_counter() - started) / len(errors)
        try:
            latents = sample(self.twin.spec, self.twin.judged, self.schedule, experts)
        except NonFiniteError as error:
            return VariantResult(variant, errors, math.nan, seconds, str(error))
        exact = self.reference.latents
        psnr_db = compare(latents, exact, signal_range=float(np.ptp(exact))).psnr_db
        return VariantResult(variant, errors, math.nan if psnr_db is None else psnr_db, seconds)

    def first_error(self, variant: Variant) -> float:
        """The error of the first step's velocity."""
        call = self.reference.prompted_calls[0]
        return compare(self.open_experts(variant)[call.expert](**call.inputs), call.velocity).relative_l2
