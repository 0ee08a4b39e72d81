"""Step caches: estimates in place of transformer calls, decided and made outside the engines.

A skipped step costs no forward. Its guided velocity is estimated from the last computed steps; because guidance is
linear and constant within an expert, this equals estimating both branches. Which steps are skipped is either a fixed
list or decided by EasyCache (Zhou et al. 2025, arXiv 2507.02860), which accumulates the expected relative change of the
conditional velocity. Late guidance saves the unconditional forward alone: it extrapolates the guidance residual in
sigma.

Nothing passes from one expert to the other: each starts with two computed steps.

Between steps a cache keeps at most three arrays in the shape of the latents: one for ``rescale`` and ``hold``, one and
a half for ``taylor1``, one more for late guidance, and EasyCache's samples. The change of the velocity and the guidance
residuals, which are small beside the velocity, are kept in 16 bits.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.arrays import F32, array_namespace
from wan22.caching import Caching, Reuse, computed_steps

FLOOR = 1e-8  # of norms that divide
LATE_FROM = 0.4  # share of the run after which "auto" extrapolates the residual
FARTHEST = 2.0  # extrapolation in units of the last gap between residuals
# EasyCache measures every third row and column of latents with at least so many positions; patches are of 2 x 2, so all
# places in a patch take turns. Smaller latents are measured whole, or at every fifth position where the whole would
# take more than three latents of memory.
SAMPLED_FROM, EVERY, EVERY_OF_SMALL = 1024, 3, 5


class Rounded:
    """Values as 16-bit integers, of which the largest magnitude is 32767: an error of 1.5e-5 of it.

    The conversion to float16 takes numpy seven times as long.
    """

    def __init__(self, values: F32) -> None:
        """Round ``values``, which this changes."""
        xp = array_namespace(values)
        self._unit = xp.maximum(xp.maximum(values.max(), -values.min()), np.float32(1e-30)) / np.float32(32767)
        values /= self._unit
        xp.rint(values, out=values)
        self.integers = values.astype(np.int16)

    def __call__(self) -> F32:
        values: F32 = self.integers * self._unit
        return values


@dataclass(frozen=True, eq=False)
class Computed:
    """A computed step: its guided velocity, for ``rescale`` less the latents before the step.

    For ``taylor1`` it also has the change of sigma and velocity since the computed step before it.
    """

    sigma: float
    kept: F32
    change: tuple[float, Rounded] | None = None


Strategy = Callable[[Computed, float, F32], F32]


def rescale(last: Computed, _sigma: float, latents: F32) -> F32:
    """EasyCache's estimate: the last difference of velocity and latents, ``x + (v_last - x_last)``."""
    return last.kept + latents


def hold(last: Computed, _sigma: float, _latents: F32) -> F32:
    """The last velocity."""
    return last.kept


def taylor1(last: Computed, sigma: float, _latents: F32) -> F32:
    """Linear extrapolation of the last two velocities in sigma."""
    assert last.change is not None
    gap, change = last.change
    estimate = change()
    estimate *= np.float32((sigma - last.sigma) / gap)
    estimate += last.kept
    return estimate


STRATEGIES: dict[Reuse, Strategy] = {"rescale": rescale, "hold": hold, "taylor1": taylor1}


class StepCache:
    """The cache of one run: ``skips``, then ``estimate`` or ``observe``, then ``moved`` for every step in order."""

    def __init__(
        self,
        settings: Caching,
        sigmas: Sequence[float],
        experts: Sequence[str],
        *,
        unguided: Collection[str] = (),
        clean_first_frame: bool = False,
    ) -> None:
        """Create the cache of a run.

        Args:
            settings: checked with :meth:`Caching.check`.
            sigmas: the noise level of every step.
            experts: the expert of every step.
            unguided: experts with guidance 1, whose steps have no guidance to extrapolate.
            clean_first_frame: latent frame 0 is an image that never changes; EasyCache does not measure it.
        """
        self._settings, self._sigmas, self._strategy = settings, sigmas, STRATEGIES[settings.reuse]
        self._first = {experts.index(name) for name in experts}
        self._listed = None if settings.skip_steps is None else set(settings.skip_steps)
        decides = settings.easy and self._listed is None
        self.easy = EasyGate(settings, experts, clean_first_frame=clean_first_frame) if decides else None
        late = settings.late_cfg
        self._late = None if late is None else LateGuidance(late, sigmas, experts, unguided)
        self._skips_any = self.easy is not None or bool(self._listed)
        self._last: Computed | None = None

    def skips(self, step: int) -> bool:
        """True if ``step`` needs no forward."""
        if step in self._first:
            self._last = None
        return self.easy.skips(step) if self.easy else self._listed is not None and step in self._listed

    def estimate(self, step: int, latents: F32) -> F32:
        """The velocity of a skipped step at ``latents``; the caller must not change it."""
        assert self._last is not None
        return self._strategy(self._last, self._sigmas[step], latents)

    def residual(self, step: int) -> F32 | None:
        """The estimate of guided minus conditional velocity in a computed step; None if it has to be computed."""
        return self._late.residual(step) if self._late else None

    def observe(self, step: int, latents: F32, conditional: F32, velocity: F32) -> None:
        """Remember a computed step; ``latents`` are those before it, ``velocity`` is the guided one."""
        if self.easy:
            self.easy.observe(latents, conditional)
        if self._late:
            self._late.observe(step, conditional, velocity)
        if self._skips_any:
            sigma, change = self._sigmas[step], None
            if self._strategy is taylor1 and self._last is not None:
                change = sigma - self._last.sigma, Rounded(velocity - self._last.kept)
            self._last = Computed(sigma, velocity - latents if self._strategy is rescale else velocity, change)

    def moved(self, before: F32, after: F32) -> None:
        """Measure the solver's step from ``before`` to ``after``."""
        if self.easy:
            self.easy.moved(before, after)

    @property
    def held_bytes(self) -> int:
        """Bytes of all arrays that are kept for later steps."""
        arrays: list[Any] = [*(self.easy.arrays if self.easy else ()), *(self._late.arrays if self._late else ())]
        if self._last is not None:
            arrays += [self._last.kept, *([self._last.change[1].integers] if self._last.change else ())]
        return sum({id(array): array.nbytes for array in arrays}.values())


class EasyGate:
    """EasyCache's decision. ``error`` and ``gain`` are those of the last decision, NaN where none was made."""

    def __init__(self, settings: Caching, experts: Sequence[str], *, clean_first_frame: bool) -> None:
        steps = len(experts)
        self._exact = computed_steps(experts) | set(range(settings.first_exact))
        self._exact |= set(range(steps - settings.last_exact, steps))
        self._first = {experts.index(name) for name in experts}
        self._threshold, self._most_in_a_row = settings.threshold, settings.max_consecutive
        self._first_measured = 1 if clean_first_frame else 0
        self._whole = settings.reuse != "taylor1" and settings.late_cfg is None  # which leave room for two latents
        self.error, self.gain = math.nan, math.nan
        self.arrays: tuple[F32, ...] = ()  # samples of latents and conditional velocity, of the last computed step
        self._sum, self._in_a_row, self._size, self._move = 0.0, 0, 0.0, 0.0

    def skips(self, step: int) -> bool:
        """Add the change that the last move suggests; skip while the sum is below the threshold."""
        if step in self._first:
            self.gain, self.arrays = math.nan, ()
        free = step not in self._exact and self._in_a_row < self._most_in_a_row and not math.isnan(self.gain)
        self.error = self._sum + self.gain * self._move / max(self._size, FLOOR) if free else math.nan
        skip = free and self.error < self._threshold
        self._sum, self._in_a_row = (self.error, self._in_a_row + 1) if skip else (0.0, 0)
        return skip

    def observe(self, latents: F32, conditional: F32) -> None:
        """Measure how the velocity follows the latents from the last computed step to this one."""
        sampled = (self._sample(latents), self._sample(conditional))
        if self.arrays:
            moved, changed = map(self._distance, sampled, self.arrays)
            self.gain = changed / max(moved, FLOOR)
        self._size = _mean_abs(sampled[1][:, :, self._first_measured :])
        self.arrays = sampled

    def moved(self, before: F32, after: F32) -> None:
        self._move = self._distance(self._sample(after), self._sample(before))

    def _sample(self, values: F32) -> F32:
        """What is measured of ``[1, z, T, h, w]``: two of these arrays are kept."""
        positions = values.shape[-2] * values.shape[-1]
        if positions >= SAMPLED_FROM:
            sampled = values[..., ::EVERY, ::EVERY]
        elif self._whole:
            return values
        else:
            sampled = values.reshape(*values.shape[:3], 1, positions)[..., ::EVERY_OF_SMALL]
        alone: F32 = sampled.copy()  # a view would keep all of them
        return alone

    def _distance(self, one: F32, other: F32) -> float:
        return _mean_abs(one[:, :, self._first_measured :] - other[:, :, self._first_measured :])


class LateGuidance:
    """Linear extrapolation of the guidance residual from the last two computed ones of the expert.

    ``steps`` are those that extrapolate; "auto" takes every second computed step between 40 % of the run and its last
    two steps. A step without two residuals, or too far from them, is computed all the same. Steps of ``unguided``
    experts have no residual.
    """

    def __init__(
        self, steps: Sequence[int] | str, sigmas: Sequence[float], experts: Sequence[str], unguided: Collection[str]
    ) -> None:
        self._sigmas, self._first = sigmas, {experts.index(name) for name in experts}
        self._alternates = isinstance(steps, str)
        self._steps = set(range(math.ceil(LATE_FROM * len(experts)), len(experts) - 2)) - computed_steps(experts)
        if not isinstance(steps, str):
            self._steps = set(steps)
        self._unguided = {step for step, name in enumerate(experts) if name in unguided}
        self._steps -= self._unguided
        self._computed: list[tuple[float, Rounded]] = []  # sigma and residual
        self._extrapolated = False  # in the step before

    @property
    def arrays(self) -> tuple[Any, ...]:
        return tuple(residual.integers for _, residual in self._computed)

    def residual(self, step: int) -> F32 | None:
        if step in self._first:
            self._computed = []
        wanted = step in self._steps and not (self._alternates and self._extrapolated)
        self._extrapolated = False
        if not wanted or len(self._computed) < 2:
            return None
        (sigma, before), (last_sigma, last) = self._computed
        share = (self._sigmas[step] - last_sigma) / (last_sigma - sigma)
        if abs(share) > FARTHEST:
            return None
        self._extrapolated = True
        latest = last()
        estimate: F32 = latest - before()
        estimate *= np.float32(share)
        estimate += latest
        return estimate

    def observe(self, step: int, conditional: F32, velocity: F32) -> None:
        if not self._extrapolated and step not in self._unguided:
            self._computed = [*self._computed[-1:], (self._sigmas[step], Rounded(velocity - conditional))]


def _mean_abs(values: F32) -> float:
    """The mean of the absolute values, accumulated in float64."""
    xp = array_namespace(values)
    return float(xp.abs(values).mean(dtype=np.float64))
