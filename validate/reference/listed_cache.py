"""The reference's own step cache: fixed lists, both branches of guidance kept and estimated separately.

It follows EasyCache's and Model-Connect's code, which treat every branch by itself. It shares no code with the runtime,
which works on the guided velocity. Both follow one rule of what is kept in 16 bits: guidance residuals, and for
``taylor1`` the change of the guided velocity, each in units of a 32,767th of its largest magnitude.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from validate.reference.parts import F32
from wan22.caching import Caching


@dataclass(frozen=True)
class Branches:
    """A computed step: latents before it, velocities with the prompt and, under guidance, without it."""

    sigma: float
    latents: F32
    conditional: F32
    unconditional: F32 | None
    scale: float  # of the guidance

    @property
    def guided(self) -> F32:
        if self.unconditional is None:
            return self.conditional
        return self.unconditional + np.float32(self.scale) * (self.conditional - self.unconditional)


class ListedCache:
    """The cache of one run. The lists come from the engines' run or from the user.

    ``sigmas`` holds the noise level of every step.
    """

    def __init__(self, caching: Caching, sigmas: Sequence[float]) -> None:
        assert not isinstance(caching.skip_steps, str)
        assert not isinstance(caching.late_cfg, str)
        self._skipped, self._late = set(caching.skip_steps or ()), set(caching.late_cfg or ())
        self._reuse, self._sigmas = caching.reuse, sigmas
        self._expert = ""
        self._computed: list[Branches] = []  # the last two
        self._residuals: list[tuple[float, F32]] = []  # sigma, (scale - 1) (c - u); the last two computed ones

    def skipped(self, index: int, expert: str, latents: F32) -> tuple[F32, F32 | None] | None:
        """Estimates in a skipped step: of both branches, or of the guided velocity and None. None in a computed step.

        Called once in every step.
        """
        if expert != self._expert:
            self._expert, self._computed, self._residuals = expert, [], []
        if index not in self._skipped:
            return None
        if self._reuse == "taylor1":
            return self._line(index), None
        unconditional = None
        if self._computed[-1].unconditional is not None:
            unconditional = self._estimate("unconditional", latents)
        return self._estimate("conditional", latents), unconditional

    def _estimate(self, branch: str, latents: F32) -> F32:
        last = self._computed[-1]
        velocity: F32 = getattr(last, branch)
        if self._reuse == "hold":
            return velocity
        return latents + (velocity - last.latents)

    def _line(self, index: int) -> F32:
        """The line through the last two guided velocities."""
        before, last = self._computed
        change = _in_16_bits(last.guided - before.guided)
        gaps = (self._sigmas[index] - last.sigma) / (last.sigma - before.sigma)
        return last.guided + change * np.float32(gaps)

    def unconditional(self, index: int, conditional: F32, scale: float) -> F32 | None:
        """The unconditional velocity that follows from the extrapolated residual; None where it is computed."""
        if index not in self._late:
            return None
        (first, before), (second, last) = self._residuals
        factor = (self._sigmas[index] - second) / (second - first)
        residual: F32 = last + np.float32(factor) * (last - before)
        return conditional - residual / np.float32(scale - 1)

    def keep(self, index: int, latents: F32, conditional: F32, unconditional: F32 | None, scale: float) -> None:
        """Remember a computed step."""
        sigma = self._sigmas[index]
        self._computed = [*self._computed[-1:], Branches(sigma, latents, conditional, unconditional, scale)]
        if unconditional is not None and index not in self._late:
            residual = np.float32(scale - 1) * (conditional - unconditional)
            self._residuals = [*self._residuals[-1:], (sigma, _in_16_bits(residual))]


def _in_16_bits(values: F32) -> F32:
    """What is left of float32 values when each is one of 65,535 numbers at equal distances, zero in their middle."""
    most = 2**15 - 1
    distance = float(np.linalg.norm(values.ravel(), np.inf)) / most
    stored = np.round(values.astype(np.float64) / (distance or 1.0))
    return (stored * distance).astype(np.float32)
