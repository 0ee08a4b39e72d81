"""The results of one case of a validation."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from validate.ladder.metrics import difference_per_frame
from validate.ladder.row import Row
from validate.plots import Filmstrip, Picture, filmstrip, frame_picture
from validate.report.cache_report import CacheReport

if TYPE_CHECKING:
    from validate.cases import Case
    from validate.ladder.comparison import Comparison


@dataclass(frozen=True)
class CaseReport:
    """Rows in the ladder's order; ``command`` repeats this case alone. Pictures exist only if both runs finished."""

    rows: tuple[Row, ...]
    number: int = 1
    prompt: str = ""
    seed: int = 0
    command: str = ""
    filmstrip: Filmstrip | None = None
    worst_frame: Picture | None = None
    cache: CacheReport | None = None  # of a run with a step cache

    @classmethod
    def of(cls, case: "Case", comparison: "Comparison", rows: tuple[Row, ...]) -> Self:
        request, ours, theirs = comparison.request, comparison.our_frames, comparison.reference_frames
        strip = None if ours is None else filmstrip(ours, theirs)
        worst = None
        if ours is not None and strip is not None:
            index = int(np.argmax(difference_per_frame(ours, theirs)))
            worst = frame_picture(ours, theirs, index, strip.amplification)
        cached = CacheReport.of(comparison)
        return cls(rows, case.number, request.prompt, request.seed, case.command, strip, worst, cached)

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @property
    def steps(self) -> list[Row]:
        """The rows of the denoising steps, in order."""
        return [row for row in self.rows if row.step is not None]

    def found(self, subject: str, measure: str) -> float:
        """The value of ``measure`` in the last row about ``subject`` that has one, else NaN."""
        values = [getattr(row.metrics, measure) for row in self.rows if row.subject == subject]
        stated = [value for value in values if value is not None]
        return float(stated[-1]) if stated else math.nan

    @property
    def badness(self) -> tuple[int, float]:
        """A sort key, larger is worse: failed checks, then the error of the video. A missing video is the worst."""
        psnr = self.found("frames", "psnr_db")
        return len(self.failed), math.inf if math.isnan(psnr) else -psnr
