"""UniPC, DPM++ 2M, Euler and re-noising in closed form (wan22.md §5.4, §5.5), independent of the model.

With ``x = (1 - sigma) x0 + sigma noise`` a velocity ``v`` predicts the clean latents ``m = x - sigma v``. Each step is
then a weighted sum of the latents and the last two or three predictions. The weights depend on the schedule alone and
are computed once, in float32 from the float32 sigmas like in the references (UniPC: Zhao et al. 2023, order 2,
B(h) = e^h - 1; DPM-Solver++: Lu et al. 2022, two steps, midpoint). Steps are identified by index, not by timestep,
because two steps may have the same timestep.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtime.arrays import F32, array_namespace
from runtime.noise import SEED_LIMIT, NormalStream
from runtime.schedule import Schedule
from wan22.sampling import SolverName


class Solver(Protocol):
    """Move latents along one schedule; a solver serves one run."""

    def step(self, velocity: F32, latents: F32) -> F32:
        """The latents at the next noise level, a new array. The number of previous calls determines the step.

        Both arrays are float32 of one shape, numpy or CuPy. The caller must not change them afterwards.
        """


def make_solver(name: SolverName, schedule: Schedule, seed: int = 0) -> Solver:
    """A new solver for one run. ``seed`` is the run's seed; only ``renoise`` draws noise."""
    if name == "renoise":
        return Renoise(schedule, seed)
    solvers: dict[str, Callable[[Schedule], Solver]] = {"unipc": UniPC, "dpm++": DpmPlusPlus, "euler": Euler}
    return solvers[name](schedule)


@dataclass(frozen=True, eq=False)
class Levels:
    """The noise levels of a schedule as float32 [N+1]: sigma, alpha = 1 - sigma, half log-SNR lambda."""

    sigma: F32
    alpha: F32
    lam: F32  # -inf at sigma 1, +inf at sigma 0

    @classmethod
    def of(cls, schedule: Schedule) -> "Levels":
        sigma = schedule.sigmas
        alpha = np.float32(1) - sigma
        with np.errstate(divide="ignore"):
            return cls(sigma, alpha, np.log(alpha) - np.log(sigma))

    def move(self, start: int) -> tuple[Any, Any, Any]:
        """The weights of the latents and of the clean prediction for a step to the next level, and the gap h."""
        gap = self.lam[start + 1] - self.lam[start]
        keep = self.sigma[start + 1] / self.sigma[start]
        return keep, -self.alpha[start + 1] * np.expm1(-gap), gap

    def ratio(self, start: int, gap: Any) -> Any:
        """The position of the level before ``start`` in units of the gap after it: negative, -inf at sigma 1."""
        return (self.lam[start - 1] - self.lam[start]) / gap


class Euler:
    """``x + (sigma' - sigma) v``."""

    def __init__(self, schedule: Schedule) -> None:
        self._gaps = np.diff(schedule.sigmas).tolist()
        self._index = 0

    def step(self, velocity: F32, latents: F32) -> F32:
        gap = self._gaps[self._index]
        self._index += 1
        return _sum((1.0, latents), (gap, velocity))


class Renoise:
    """``(1 - sigma') m + sigma' noise``: every step predicts the clean latents and adds fresh noise to them.

    Models distilled by distribution matching or consistency are sampled this way; the last step returns ``m``. The
    noise is that of a second torch generator, seeded with the run's seed plus one.
    """

    def __init__(self, schedule: Schedule, seed: int) -> None:
        self._sigmas = schedule.sigmas.tolist()
        self._noise = NormalStream((seed + 1) % SEED_LIMIT)
        self._index = 0

    def step(self, velocity: F32, latents: F32) -> F32:
        now, following = self._sigmas[self._index : self._index + 2]
        self._index += 1
        clean = _sum((1.0, latents), (-now, velocity))
        if following == 0:
            return clean
        noise = array_namespace(latents).asarray(self._noise.draw(latents.shape))
        return _sum((1.0 - following, clean), (following, noise))


class DpmPlusPlus:
    """DPM++ 2M: second order from the last two predictions, first order in the first and the last step."""

    def __init__(self, schedule: Schedule) -> None:
        levels = Levels.of(schedule)
        self._sigmas = schedule.sigmas.tolist()
        last = schedule.steps - 1
        self._weights = [_predictor(levels, i, second_order=0 < i < last) for i in range(schedule.steps)]
        self._index = 0
        self._before: F32 | None = None

    def step(self, velocity: F32, latents: F32) -> F32:
        i, self._index = self._index, self._index + 1
        clean = _sum((1.0, latents), (-self._sigmas[i], velocity))
        keep, now, before = self._weights[i]
        moved = _sum((keep, latents), (now, clean), (before, self._before))
        self._before = clean
        return moved


class UniPC:
    """UniPC of order 2, B2(h), predicting clean latents: every velocity first corrects the step before it."""

    def __init__(self, schedule: Schedule) -> None:
        levels, steps = Levels.of(schedule), schedule.steps
        second_order = [0 < i < steps - 1 for i in range(steps)]
        self._sigmas = schedule.sigmas.tolist()
        self._predict = [_predictor(levels, i, second_order=second_order[i]) for i in range(steps)]
        self._correct = [_corrector(levels, i, second_order=second_order[i]) for i in range(steps - 1)]
        self._index = 0
        self._sample: F32 | None = None  # corrected latents of the previous step
        # predictions of the previous two steps, newest first
        self._clean: tuple[F32 | None, F32 | None] = (None, None)

    def step(self, velocity: F32, latents: F32) -> F32:
        i, self._index = self._index, self._index + 1
        last, before = self._clean
        clean = _sum((1.0, latents), (-self._sigmas[i], velocity))
        if i > 0:
            keep, *weights = self._correct[i - 1]
            latents = _sum((keep, self._sample), *zip(weights, (clean, last, before), strict=True))
        keep, *weights = self._predict[i]
        self._sample, self._clean = latents, (clean, last)
        return _sum((keep, latents), *zip(weights, self._clean, strict=True))


def _predictor(levels: Levels, start: int, *, second_order: bool) -> tuple[float, float, float]:
    """Weights of the latents, of the prediction at ``start`` and of the one before it.

    Both solvers extrapolate with ``m_i + (m_{i-1} - m_i) / 2r``; UniPC's order 2 also has a fixed 1/2.
    """
    keep, weight, gap = levels.move(start)
    share = np.float32(0.5) / levels.ratio(start, gap) if second_order else np.float32(0)
    return float(keep), float(weight * (1 - share)), float(weight * share)


def _corrector(levels: Levels, start: int, *, second_order: bool) -> tuple[float, float, float, float]:
    """Weights that repeat the step from ``start`` once the prediction at its end is known.

    Returns:
        The weights of the latents at ``start`` and of the predictions at the end, at ``start`` and one level earlier.
    """
    keep, weight, gap = levels.move(start)
    if not second_order:
        return float(keep), float(weight / 2), float(weight / 2), 0.0
    ratio, grow = levels.ratio(start, gap), np.expm1(-gap)
    first = grow / -gap - np.float32(1)
    second = first / -gap - np.float32(0.5)
    outer = (first - 2 * second) / grow / (1 - ratio)
    end, before = first / grow - outer, outer / ratio
    return float(keep), float(weight * end), float(weight * (1 - end - before)), float(weight * before)


def _sum(*terms: tuple[float, F32 | None]) -> F32:
    """The weighted sum as a new array. Terms of weight 0 are skipped and may have no array."""
    total: F32 | None = None
    for weight, values in terms:
        if weight == 0 or values is None:
            continue
        part = values * weight
        if total is None:
            total = part
        else:
            total += part
    assert total is not None
    return total
