"""The pipeline of a server: it checks for cancellation between engine calls, and times every call."""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from runtime.backend import NewEngine
from runtime.block_backend import BLOCKS_AS_FIT, BlockOptions
from runtime.engine import Arrays, BorrowedEngine, Engine
from runtime.pipeline import Pipeline
from runtime.weight_sets import WeightSets
from triton_repo.relay import Relay
from wan22.bundle import Bundle
from wan22.residency import ResidencyChoice

Pause = Callable[[], None]  # raises to end the job


def go_on() -> None:
    """A pause that never ends the job."""


class ServedPipeline(Pipeline):
    """A pipeline whose ``pause`` is called before every engine call; each thread has its own.

    Guided denoising makes two calls per step, and the VAE one per latent frame, so a cancellation waits for one call.
    ``seconds``, ``swaps`` and ``lora_swaps`` never decrease.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        residency: ResidencyChoice = "auto",
        new_engine: NewEngine | None = None,
        weight_sets: Mapping[str, Bundle] | None = None,
        blocks: BlockOptions = BLOCKS_AS_FIT,
    ) -> None:
        super().__init__(bundle, residency=residency, new_engine=new_engine, blocks=blocks)
        self.weight_sets = WeightSets(self.bundle, weight_sets or {})
        self._own, self._opening = threading.local(), threading.RLock()
        self.relay = Relay() if self.split.experts > 1 else None
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by component, inside engines
        self._expert = ""  # the last one used
        self.swaps = 0  # number of times that one expert replaced the other
        self.lora_swaps = 0  # number of times that one weight set replaced another

    @property
    def pause(self) -> Pause:
        found: Pause = getattr(self._own, "pause", go_on)
        return found

    @pause.setter
    def pause(self, pause: Pause) -> None:
        self._own.pause = pause

    def use_weights(self, lora: str | None) -> bool:
        changed = super().use_weights(lora)
        self.lora_swaps += changed
        return changed

    def engine(self, name: str) -> Engine:
        if name in self.spec.experts and self.residency != "all":
            self.swaps += self._expert not in ("", name)
            self._expert = name
        if self.relay is not None and name == self.spec.experts[-1]:
            self.relay.pass_on(self.pause)
        with self._opening:
            return TimedEngine(super().engine(name), name.partition(".")[0], self)


class TimedEngine(BorrowedEngine):
    """An engine that reports its time to the pipeline, which opens and closes it."""

    def __init__(self, engine: Engine, name: str, pipeline: ServedPipeline) -> None:
        self._engine, self._name, self._pipeline = engine, name, pipeline
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def __getattr__(self, name: str) -> Any:
        """What a transformer in blocks or on several devices has beside its call."""
        found = getattr(self._engine, name)
        return partial(self._timed, found) if name == "both" else found

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        outputs: Arrays = self._timed(self._engine, **inputs)
        return outputs

    def _timed(self, work: Callable[..., Any], *given: Any, **inputs: Any) -> Any:
        self._pipeline.pause()
        started = perf_counter()
        outputs = work(*given, **inputs)
        self._pipeline.seconds[self._name] += perf_counter() - started
        return outputs
