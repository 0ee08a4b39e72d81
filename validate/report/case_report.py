"""What one run of a validation found."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from validate.ladder.metrics import difference_per_frame
from validate.ladder.row import Row
from validate.plots import Filmstrip, Picture, filmstrip, frame_picture

if TYPE_CHECKING:
    from validate.cases import Case
    from validate.ladder.comparison import Climb


@dataclass(frozen=True)
class CaseReport:
    """Rows in the ladder's order; ``command`` makes this run alone. Pictures where both sides came to an end."""

    rows: tuple[Row, ...]
    number: int = 1
    prompt: str = ""
    seed: int = 0
    command: str = ""
    filmstrip: Filmstrip | None = None
    worst_frame: Picture | None = None

    @classmethod
    def of(cls, case: "Case", climb: "Climb", rows: tuple[Row, ...]) -> Self:
        request, ours, theirs = climb.request, climb.our_frames, climb.reference_frames
        strip = None if ours is None else filmstrip(ours, theirs)
        worst = None
        if ours is not None and strip is not None:
            index = int(np.argmax(difference_per_frame(ours, theirs)))
            worst = frame_picture(ours, theirs, index, strip.amplification)
        return cls(rows, case.number, request.prompt, request.seed, case.command, strip, worst)

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @property
    def steps(self) -> list[Row]:
        """The rows of the run, in order."""
        return [row for row in self.rows if row.step is not None]

    def found(self, subject: str, measure: str) -> float:
        """Of the last row about ``subject`` that has it; NaN where there is none."""
        values = [getattr(row.metrics, measure) for row in self.rows if row.subject == subject]
        stated = [value for value in values if value is not None]
        return float(stated[-1]) if stated else math.nan

    @property
    def badness(self) -> tuple[int, float]:
        """Larger is worse: failed checks, then the error of the video; one without video is the worst of all."""
        psnr = self.found("frames", "psnr_db")
        return len(self.failed), math.inf if math.isnan(psnr) else -psnr
