"""Step caches: which transformer calls of a run are replaced by estimates, decided outside the engines."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from wan22.errors import UserError, shortened, some_of

Reuse = Literal["rescale", "hold", "taylor1"]
LEAST_STEPS = 10  # shorter runs have no steps to spare
FIRST_OF_EXPERT = 2  # computed steps that every expert needs: the estimates use the last two


@dataclass(frozen=True)
class Caching:
    """The step cache of a request. Steps count from 0, as in the published lists.

    ``easy`` decides during the run (EasyCache, Zhou et al. 2025), ``skip_steps`` is a fixed list. The list goes before
    ``easy``: that is how a recorded run is repeated.
    """

    easy: bool = False
    threshold: float = 0.05  # accumulated relative change of the velocity up to which easy skips
    first_exact: int = 10  # steps that easy always computes at the start ...
    last_exact: int = 2  # ... and at the end
    max_consecutive: int = 2  # skipped steps in a row
    skip_steps: tuple[int, ...] | Literal["magcache"] | None = None
    reuse: Reuse = "rescale"  # the estimate of a skipped velocity
    late_cfg: tuple[int, ...] | Literal["auto"] | None = None  # steps whose unconditional forward is extrapolated

    @property
    def skips(self) -> bool:
        """True if it may skip steps."""
        return self.easy or self.skip_steps is not None

    @property
    def is_on(self) -> bool:
        return self.skips or self.late_cfg is not None

    def check(self, experts: Sequence[str], guidance: Mapping[str, float]) -> None:
        """Check the settings for a run.

        Args:
            experts: the expert of every step.
            guidance: the scale of every expert.

        Raises:
            UserError: the run is too short, a word is unknown, a number is out of range, a listed step has to be
                computed or is in both lists, or late guidance has no guidance to extrapolate.
        """
        steps = len(experts)
        if steps < LEAST_STEPS:
            expected = f"at least {LEAST_STEPS}, of which some can be skipped"
            raise UserError(f"a step cache with {steps} steps", expected, "use more steps or no cache")
        self._check_words()
        if self.easy:
            self._check_easy(steps)
        for what, listed in (("skip step", self.skip_steps), ("late-cfg step", self.late_cfg)):
            for step in () if listed is None or isinstance(listed, str) else listed:
                _check_listed(what, step, experts)
        if self.late_cfg is not None:
            self._check_late(self.late_cfg, experts, guidance)

    def _check_words(self) -> None:
        """Refuse what a program may pass in the place of a word or a list."""
        if self.reuse not in get_args(Reuse):
            raise UserError(f"reuse {self.reuse!r}", f"one of {', '.join(get_args(Reuse))}", "choose one of these")
        for what, listed, word in (("skip steps", self.skip_steps, "magcache"), ("late cfg", self.late_cfg, "auto")):
            if isinstance(listed, str) and listed != word:
                raise UserError(f"{what} {listed!r}", f"numbers of steps, or {word!r}", "pass a tuple of them")

    def _check_late(
        self, late_cfg: tuple[int, ...] | Literal["auto"], experts: Sequence[str], guidance: Mapping[str, float]
    ) -> None:
        if all(guidance[expert] == 1 for expert in experts):
            raise UserError("late cfg without guidance", "guidance other than 1", "leave it out: nothing is saved")
        listed = () if isinstance(late_cfg, str) else late_cfg
        for step in listed:
            if guidance[experts[step]] == 1:
                expected = f"a step of an expert with guidance, not of {experts[step]}"
                raise UserError(f"late-cfg step {step}", expected, "leave it out: nothing is saved")
        skipped = () if self.skip_steps is None or isinstance(self.skip_steps, str) else self.skip_steps
        if both := sorted({*skipped} & {*listed}):
            found = f"skip and late-cfg step {some_of([*map(str, both)], 8)}"
            raise UserError(found, "each step in one list", "leave it out of one: a skipped step has no guidance")

    def _check_easy(self, steps: int) -> None:
        if not (math.isfinite(self.threshold) and self.threshold > 0):
            raise UserError(f"cache threshold {self.threshold:g}", "a finite number above 0", "try 0.05")
        least = {"first_exact": FIRST_OF_EXPERT, "last_exact": 1, "max_consecutive": 1}
        for name, smallest in least.items():
            if (value := getattr(self, name)) < smallest:
                raise UserError(f"{name.replace('_', ' ')} {value}", f"at least {smallest}", "raise it")
        if (exact := self.first_exact + self.last_exact) >= steps:
            found = f"{self.first_exact} exact steps at the start and {self.last_exact} at the end of {steps}"
            raise UserError(found, f"fewer than {steps} together, not {exact}", "use more steps or fewer exact ones")


def computed_steps(experts: Sequence[str]) -> set[int]:
    """The steps that every cache computes: the first two of each expert and the last of the run."""
    return _first_of_experts(experts) | {len(experts) - 1}


def parse_steps(what: str, text: str) -> tuple[int, ...]:
    """``"11, 12,14"`` → (11, 12, 14), rising. ``what`` names the list in the error.

    Raises:
        UserError: it is not a list of step numbers, or one occurs twice.
    """
    words = [word.strip() for word in text.split(",")]
    shown = repr(shortened(text))
    if not all(word.isascii() and word.isdigit() and len(word) <= 4 for word in words):
        raise UserError(f"{what} {shown}", "step numbers from 0, such as 11,12,14", "separate them by commas")
    steps = sorted(map(int, words))
    if len(set(steps)) < len(steps):
        raise UserError(f"{what} {shown}", "each step once", "remove the duplicates")
    return tuple(steps)


def _first_of_experts(experts: Sequence[str]) -> set[int]:
    first, steps = {experts.index(name) for name in experts}, len(experts)
    return {step for start in first for step in range(start, min(start + FIRST_OF_EXPERT, steps))}


def _check_listed(what: str, step: int, experts: Sequence[str]) -> None:
    if not 0 <= step < len(experts):
        expected = f"a step from 0 to {len(experts) - 1}"
        raise UserError(f"{what} {step} in a run of {len(experts)} steps", expected, "count from 0")
    if step in computed_steps(experts):
        first = ", ".join(map(str, sorted(_first_of_experts(experts))))
        expected = f"none of steps {first}: the first two of each expert"
        if step not in _first_of_experts(experts):
            expected = f"a step before {step}, the last of the run"
        raise UserError(f"{what} {step}", expected, "leave it out: it is always computed")
