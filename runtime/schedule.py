"""The noise levels of a run: the lists of sigmas and timesteps (wan22.md §5.2).

Every list is an even grid ``u`` transformed by the shift, ``sigma = s u / (1 + (s - 1) u)``, plus a final 0. The
references differ in the grid and in how a sigma becomes the model's timestep:

========  ===========  =========================================  ===================================
solver    convention   grid (i < N)                               timestep
========  ===========  =========================================  ===================================
unipc     official     ``0.999 (1 - i/N)``                        truncated to an integer
dpm++     official     ``1 - i/N``                                truncated to an integer
euler     official     ``1 - i/N`` (Wan2.2-Lightning)             fractional
renoise   both         same as euler                              fractional
unipc     diffusers    ``1 - 0.999 i/N``, first sigma below 1     truncated to an integer
dpm++     diffusers    ``0.999 (1 - i/N)``                        truncated to an integer
euler     diffusers    even between the shifted bounds, shifted   fractional
                       a second time
========  ===========  =========================================  ===================================

The last row is the behaviour of diffusers' FlowMatchEulerDiscreteScheduler when given only a number of steps. It exists
for parity with pipelines that use it; four-step models are trained with the official row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from runtime.arrays import F32
from wan22.errors import UserError
from wan22.quantities import counted
from wan22.sampling import Convention, SolverName
from wan22.specs import TRAIN_TIMESTEPS

Reals = NDArray[np.floating[Any]]

SIGMA_MAX = float(np.float32(0.999))  # the official grid starts at a float32 value
BELOW_ONE = 1e-6  # diffusers keeps the first sigma of UniPC this far from 1, where log(alpha) is infinite


@dataclass(frozen=True, eq=False)
class Schedule:
    """Sigmas, float32 [N+1], falling to 0; timesteps, float32 [N], on the model's scale of 0…1000."""

    sigmas: F32
    timesteps: F32

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def make_schedule(
    solver: SolverName, steps: int, shift: float, convention: Convention = "official", listed: Sequence[float] = ()
) -> Schedule:
    """The schedule of ``solver`` in the reference named by ``convention``.

    ``listed`` are explicit noise levels without the final 0; they replace those derived from steps and shift.

    Raises:
        UserError: a name is unknown, ``steps`` is below 1 or above the number of timesteps, the shift is not positive,
            or neighbouring sigmas are equal in float32 (too many steps or too strong a shift). Also if ``listed`` does
            not fall strictly from at most 1 to above 0.
    """
    _check(solver, steps, shift, convention)
    if listed:
        return _schedule(solver, _check_levels(solver, listed))
    sigmas = _sigmas(solver, steps, shift, convention)
    single = np.append(sigmas, 0).astype(np.float32)
    if not (np.diff(single) < 0).all():
        raise UserError(
            f"{counted(steps, 'step')} with shift {shift:g}",
            "sigmas that differ in float32",
            "use fewer steps or a shift closer to 1",
        )
    return _schedule(solver, sigmas)


def _check_levels(solver: SolverName, sigmas: Sequence[float]) -> Reals:
    levels = np.array(sigmas, np.float64)
    if not (levels[0] <= 1 and (np.diff(np.append(levels, 0).astype(np.float32)) < 0).all()):
        found = f"noise levels {', '.join(f'{sigma:g}' for sigma in sigmas)}"
        raise UserError(found, "levels that fall from at most 1 to above 0", "sort them and omit the final 0")
    if solver == "unipc" and levels[0] == 1:
        levels[0] -= BELOW_ONE
    return levels


def _schedule(solver: SolverName, sigmas: Reals) -> Schedule:
    timesteps = TRAIN_TIMESTEPS * sigmas
    if solver in ("unipc", "dpm++"):
        timesteps = np.trunc(timesteps)
    return Schedule(np.append(sigmas, 0).astype(np.float32), timesteps.astype(np.float32))


def _check(solver: str, steps: int, shift: float, convention: str) -> None:
    for what, value, known in (("solver", solver, SolverName), ("schedule", convention, Convention)):
        if value not in get_args(known):
            raise UserError(f"{what} {value!r}", f"one of {', '.join(get_args(known))}", "choose one of these")
    if steps < 1:
        raise UserError(f"{steps} steps", "at least 1", "use more steps")
    if steps > TRAIN_TIMESTEPS:
        expected = f"at most {TRAIN_TIMESTEPS}, the models' number of timesteps"
        raise UserError(f"{steps} steps", expected, "use fewer steps")
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"shift {shift}", "a finite number above 0", "the models use 5 or 12")


def _sigmas(solver: SolverName, steps: int, shift: float, convention: Convention) -> Reals:
    """The N sigmas before the final 0, in the reference's arithmetic, because truncation amplifies the last bit."""
    low = 1 / TRAIN_TIMESTEPS
    match "euler" if solver == "renoise" else solver, convention:
        case "unipc", "official":
            return _apply_shift(np.linspace(SIGMA_MAX, 0, steps + 1)[:-1], shift)
        case "dpm++", "official":
            return _apply_shift(np.linspace(1, 0, steps + 1)[:-1], shift)
        case "euler", "official":
            grid = np.linspace(TRAIN_TIMESTEPS, 0, steps + 1, dtype=np.float32)[:-1]
            return _apply_shift(grid / np.float32(TRAIN_TIMESTEPS), shift)
        case "dpm++", "diffusers":
            return _apply_shift(1 - np.linspace(1, low, steps + 1)[:0:-1], shift)
        case "euler", "diffusers":
            bounds = _apply_shift(np.array([1, low]), shift)
            return _apply_shift(np.linspace(bounds[0], bounds[1], steps), shift)
    sigmas = _apply_shift(np.linspace(1, low, steps + 1)[:-1], shift)
    sigmas[0] -= BELOW_ONE
    return sigmas


def _apply_shift(grid: Reals, shift: float) -> Reals:
    return shift * grid / (1 + (shift - 1) * grid)
