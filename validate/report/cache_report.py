"""The run with a step cache against the same run without one, both by the engines."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from validate.ladder.metrics import (
    FRAME_RANGE,
    SMALLEST_SIDE,
    compare,
    difference_per_frame,
    lpips_per_frame,
    ssim_per_frame,
    why_no_lpips,
)
from validate.ladder.video import SSIM_WINDOW
from validate.plots import Filmstrip, filmstrip
from wan22.caching import Caching
from wan22.quantities import counted

if TYPE_CHECKING:
    from validate.ladder.comparison import Comparison

SUBJECT = "step_cache"
MEASURED = ("psnr_db", "ssim", "lpips", "latents_relative_l2", "skipped_steps", "saved_percent")
MORE_IS_BETTER = ("psnr_db", "ssim", "skipped_steps", "saved_percent")


@dataclass(frozen=True)
class CachedStep:
    """One step of both runs; ``relative_l2`` is the distance of the latents after it."""

    number: int  # from 1
    expert: str
    cached: bool
    late_cfg: bool
    error: float  # by which EasyCache decided; NaN where it did not
    gain: float
    relative_l2: float
    seconds: float
    exact_seconds: float


@dataclass(frozen=True)
class CacheReport:
    """Quality and time; NaN where a measure is not available. ``limit`` is the parity limit of the latents."""

    caching: Caching
    steps: tuple[CachedStep, ...]
    limit: float
    psnr_db: float
    worst_psnr_db: float
    worst_frame: int  # from 1
    ssim: float  # of the worst frame
    lpips: float  # of the worst frame
    filmstrip: Filmstrip

    @classmethod
    def of(cls, comparison: "Comparison") -> "CacheReport | None":
        """The report of a run with a step cache; None without one, or if the run stopped early."""
        cached, caching = comparison.our_frames, comparison.decided.cache
        if caching is None or cached is None:
            return None
        exact, each = comparison.exact_frames, []
        for step, other in zip(comparison.our_steps, comparison.exact_steps, strict=True):
            apart = compare(step.latents, other.latents).relative_l2
            decision, times = (step.cache_error, step.cache_gain), (step.seconds_total, other.seconds_total)
            each.append(CachedStep(step.index + 1, step.expert, step.cached, step.late_cfg, *decision, apart, *times))
        worst, sides = int(np.argmax(difference_per_frame(cached, exact))), min(exact.shape[3:])
        of_worst = compare(cached[:, :, worst], exact[:, :, worst], signal_range=FRAME_RANGE).psnr_db
        has_lpips = sides >= SMALLEST_SIDE and not why_no_lpips()
        return cls(
            caching,
            tuple(each),
            comparison.limits["run"].latents.value,
            _number(compare(cached, exact, signal_range=FRAME_RANGE).psnr_db),
            _number(of_worst),
            worst + 1,
            min(ssim_per_frame(cached, exact)) if sides >= SSIM_WINDOW else math.nan,
            max(lpips_per_frame(cached, exact)) if has_lpips else math.nan,
            filmstrip(cached, exact),
        )

    @property
    def skipped(self) -> list[CachedStep]:
        return [step for step in self.steps if step.cached]

    @property
    def late(self) -> list[CachedStep]:
        return [step for step in self.steps if step.late_cfg]

    @property
    def first_diverging_step(self) -> CachedStep | None:
        return next((step for step in self.steps if step.relative_l2 > self.limit), None)

    @property
    def by_expert(self) -> dict[str, tuple[int, int]]:
        """Skipped steps and all steps of every expert."""
        experts = dict.fromkeys(step.expert for step in self.steps)
        own = {name: [step for step in self.steps if step.expert == name] for name in experts}
        return {name: (sum(step.cached for step in steps), len(steps)) for name, steps in own.items()}

    @property
    def exact_s(self) -> float:
        return math.fsum(step.exact_seconds for step in self.steps)

    @property
    def saved_s(self) -> float:
        """Seconds that the cache saved in the steps that it changed; the others take as long in both runs."""
        changed = [*self.skipped, *self.late]
        return math.fsum(step.exact_seconds - step.seconds for step in changed)

    def summary(self) -> str:
        """The result in one line."""
        each = ", ".join(f"{skipped} of {steps} in {name}" for name, (skipped, steps) in self.by_expert.items())
        parts = [f"step cache: {counted(len(self.skipped), 'step')} skipped ({each})"]
        parts += [f"guidance extrapolated in {len(self.late)}"] if self.late else []
        parts.append(f"{self.saved_s:.2f} of {self.exact_s:.2f} s of denoising saved")
        parts.append(f"PSNR {self.psnr_db:.1f} dB and SSIM {self.ssim:.4f} against the exact run")
        first = self.first_diverging_step
        parts.append("no step diverges" if first is None else f"first diverging step {first.number}")
        return "; ".join(parts)

    def measured(self) -> dict[str, float]:
        """The values that gates judge, by :data:`MEASURED`; those that are not available are missing."""
        found = {
            "psnr_db": self.psnr_db,
            "ssim": self.ssim,
            "lpips": self.lpips,
            "latents_relative_l2": self.steps[-1].relative_l2,
            "skipped_steps": float(len(self.skipped)),
            "saved_percent": 100 * self.saved_s / self.exact_s,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def as_json(self) -> dict[str, Any]:
        lists = {"skipped": self.skipped, "late_cfg": self.late}
        first = self.first_diverging_step
        return {
            "settings": vars(self.caching),
            **{name: [step.number - 1 for step in steps] for name, steps in lists.items()},
            "by_expert": {name: {"skipped": of[0], "steps": of[1]} for name, of in self.by_expert.items()},
            "saved_s": self.saved_s,
            "exact_s": self.exact_s,
            **self.measured(),
            "worst_frame": self.worst_frame,
            "worst_frame_psnr_db": self.worst_psnr_db,
            "first_diverging_step": None if first is None else first.number,
            "steps": [vars(step) for step in self.steps],
        }


def worst_of(reports: Iterable["CacheReport | None"]) -> Mapping[str, float]:
    """The worst values over all cases, by the names of gates."""
    found: dict[str, float] = {}
    for report in reports:
        for name, value in report.measured().items() if report else ():
            key, worse = f"{SUBJECT}.{name}", min if name in MORE_IS_BETTER else max
            found[key] = worse(found.get(key, value), value)
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value
