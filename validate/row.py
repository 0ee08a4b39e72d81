"""One claim of the parity ladder, with what was found."""

from dataclasses import dataclass

from validate.metrics import Metrics
from validate.thresholds import Limit


@dataclass(frozen=True)
class Row:
    """``component`` is a graph of the model, "tokenizer", "image", "sampler" or "video"."""

    name: str
    component: str
    metrics: Metrics
    limit: Limit
    note: str = ""
    step: int | None = None  # of the run, from 1
    timestep: float | None = None

    @property
    def passed(self) -> bool:
        return self.limit.accepts(self.metrics)
