"""One claim of the parity ladder, with what was found."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from validate.ladder.metrics import Metrics, incomparable, of_one_number
from validate.ladder.thresholds import Limit
from wan22.specs import Precision


@dataclass(frozen=True)
class InPrecision:
    """What a low precision costs by itself: the reference computed in it as well, beside ours."""

    precision: Precision
    alone: Metrics  # the reference in this precision against the reference in float32
    between: Metrics  # ours against the reference in this precision


@dataclass(frozen=True)
class Row:
    """``component`` is a graph of the model, "tokenizer", "image", "sampler" or "video"."""

    name: str
    component: str
    metrics: Metrics  # ours against the reference in float32
    limit: Limit
    note: str = ""
    step: int | None = None  # of the run, from 1
    timestep: float | None = None
    in_precision: InPrecision | None = None  # where ours is not float32
    # what the ladder knows of all rows of a rung
    subject: str = ""  # "velocity": what is measured, for gates
    case: int = 1  # of several runs
    made: str = ""  # how the numbers of ours were made, where there is more than one way
    seconds: float = 0.0  # until it was there; what rows share is computed for the first of them

    @property
    def passed(self) -> bool:
        return self.limit.accepts(self.metrics)


def excess(rows: Sequence[Row], limit: Limit) -> Row | None:
    """The error of ``rows`` over what the reference loses in the same precision; None where all is float32."""
    pairs = [(row.metrics, row.in_precision) for row in rows if row.in_precision is not None]
    if not pairs:
        return None
    precision = pairs[0][1].precision
    ours = _root_mean_square([total.relative_l2 for total, _ in pairs])
    theirs = _root_mean_square([found.alone.relative_l2 for _, found in pairs])
    problems = [m.problem for total, found in pairs for m in (total, found.alone) if m.problem]
    metrics = incomparable(problems[0]) if problems else of_one_number("excess", ours / theirs if theirs else math.inf)
    note = f"rel L2 {ours:.1e} of ours, {theirs:.1e} of PyTorch in {precision}"
    return Row(f"error over PyTorch's own in {precision}", rows[0].component, metrics, limit, note)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
