"""One claim of the parity ladder and its result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from validate.ladder.metrics import Metrics, incomparable, single_metric
from validate.ladder.thresholds import Limit
from wan22.precision import Precision


@dataclass(frozen=True)
class InPrecision:
    """The error that a low precision causes by itself, from the reference computed in it."""

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
    step: int | None = None  # denoising step, from 1
    timestep: float | None = None
    in_precision: InPrecision | None = None  # None if ours is float32
    # set by the ladder, not by the rung
    subject: str = ""  # the name that gates use, such as "velocity"
    case: int = 1  # from 1
    made: str = ""  # how our numbers were made, see :mod:`validate.ladder.onnx_side`
    seconds: float = 0.0  # to compute; shared work counts toward the first row that needs it

    @property
    def passed(self) -> bool:
        return self.limit.accepts(self.metrics)


def excess(rows: Sequence[Row], limit: Limit) -> Row | None:
    """Our error in ``rows`` over the reference's error in the same precision; None if all are float32."""
    pairs = [(row.metrics, row.in_precision) for row in rows if row.in_precision is not None]
    if not pairs:
        return None
    precision = pairs[0][1].precision
    ours = _root_mean_square([total.relative_l2 for total, _ in pairs])
    theirs = _root_mean_square([found.alone.relative_l2 for _, found in pairs])
    problems = [m.problem for total, found in pairs for m in (total, found.alone) if m.problem]
    metrics = incomparable(problems[0]) if problems else single_metric("excess", ours / theirs if theirs else math.inf)
    note = f"rel L2 {ours:.1e} of ours, {theirs:.1e} of PyTorch in {precision}"
    return Row(f"error over PyTorch's own in {precision}", rows[0].component, metrics, limit, note)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
