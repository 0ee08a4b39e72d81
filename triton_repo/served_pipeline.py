"""The pipeline of a server: it looks up between engine calls, where a job can be given up, and times every call."""

from collections import defaultdict
from collections.abc import Callable
from time import perf_counter

import numpy as np

from runtime.engine import Arrays, BorrowedEngine, Engine
from runtime.pipeline import NewEngine, Pipeline
from wan22.bundle import Bundle
from wan22.residency import ResidencyChoice

Pause = Callable[[], None]  # raises to give the job up


def go_on() -> None:
    """The pause of work that nothing interrupts."""


class ServedPipeline(Pipeline):
    """A pipeline whose ``pause`` is called before every engine call.

    Denoising with guidance makes two calls per step, and the VAE one per latent frame, so whoever gives a job up waits
    for one call. ``seconds`` and ``swaps`` only ever grow.
    """

    def __init__(
        self, bundle: Bundle, *, residency: ResidencyChoice = "auto", new_engine: NewEngine | None = None
    ) -> None:
        super().__init__(bundle, residency=residency, new_engine=new_engine)
        self.pause: Pause = go_on
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by component, inside engines
        self._expert = ""  # the last that was asked for
        self.swaps = 0  # how often an expert made room for the other

    def engine(self, name: str) -> Engine:
        if name in self.spec.experts and self.residency != "all":
            self.swaps += self._expert not in ("", name)
            self._expert = name
        return TimedEngine(super().engine(name), name, self)


class TimedEngine(BorrowedEngine):
    """An engine that reports to its pipeline; opened and closed by the pipeline, not through this."""

    def __init__(self, engine: Engine, name: str, pipeline: ServedPipeline) -> None:
        self._engine, self._name, self._pipeline = engine, name, pipeline
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        self._pipeline.pause()
        started = perf_counter()
        outputs = self._engine(**inputs)
        self._pipeline.seconds[self._name] += perf_counter() - started
        return outputs
