"""Our side of a bench: the engines of a bundle through the runtime, as ``wan-trt generate`` runs them."""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import numpy as np

from runtime.arrays import F32, require_finite, to_numpy
from runtime.block_stream import Streamed
from runtime.denoise import Conditions, denoise
from runtime.engine import Engine
from runtime.forward_inputs import forward_inputs
from runtime.pipeline import Pipeline
from validate.bench.samples import measure_time
from validate.bench.whole_run import Event
from validate.bench.work import DECODER, ENCODER, TEXT, TIMESTEPS, Work, components_of


class OurSide:
    """The pieces, computed by the engines of ``pipeline``, which keeps one expert at a time."""

    def __init__(self, pipeline: Pipeline, work: Work) -> None:
        self._pipeline, self._work = pipeline, work
        self._text = work.text.copy()
        self._text.flags.writeable = False  # as in a pipeline, where read-only text is cached
        self.graph_seconds: dict[str, list[float]] = {}  # of the decoder's calls, by component

    def open(self, piece: str) -> None:
        needed = components_of(piece, self._work)
        for component in set(self._pipeline.spec.components) - set(needed):
            self._pipeline.release(component)
        for component in needed:
            self._pipeline.load(component)

    def chunks(self, piece: str) -> Iterator[Any]:
        if piece == DECODER:
            yield from self._decode(self._work.latents)
        elif piece == ENCODER:
            assert self._work.video is not None
            yield self._pipeline.encode(self._work.video)
        elif piece == TEXT:
            yield self._pipeline.engine(TEXT)(input_ids=self._work.token_ids)
        else:
            yield self._pipeline.engine(piece)(**self._inputs(piece))

    def new_prompt(self, piece: str) -> Callable[[], object] | None:
        """A forward with text that the engine has not cached; None if the engine caches none."""
        if not any(self._pipeline.bundle.component(name).halves for name in components_of(piece, self._work)):
            return None
        return partial(self._pipeline.engine(piece), **self._inputs(piece) | {"text": self._work.text})

    def join(self, chunks: list[Any]) -> F32:
        return np.concatenate(list(map(to_numpy, chunks)), axis=2) if len(chunks) > 1 else to_numpy(chunks[0])

    def close(self) -> None:
        for component in self._pipeline.spec.components:
            self._pipeline.release(component)

    def run(self) -> Iterator[Event]:
        return _run(self._pipeline, self._work)

    def device_tensors(self) -> None:
        """None: engines allocate memory in several places, so it is unknown."""

    def _decode(self, latents: F32) -> Iterator[F32]:
        chunks = self._pipeline.decode(latents)
        for index in range(latents.shape[2]):
            chunk, seconds = measure_time(lambda: next(chunks))
            self.graph_seconds.setdefault(f"{DECODER}_{'next' if index else 'first'}", []).append(seconds)
            yield chunk

    def _inputs(self, expert: str) -> dict[str, F32]:
        work, clean = self._work, self._work.first_frame is not None
        inputs = (work.spec.dit, work.latents, TIMESTEPS[expert], self._text, work.condition)
        return forward_inputs(*inputs, clean_first_frame=clean)


# -- the whole run


def _run(pipeline: Pipeline, work: Work) -> Iterator[Event]:
    """Yield the events of an end-to-end run. The first expert is opened before it; frames are discarded."""
    spec, request = pipeline.spec, work.request
    at_once = pipeline.residency != "one-component"
    for component in spec.components:
        if at_once and component not in spec.experts[1:]:
            yield Event("open", component, _open_seconds(pipeline, component))
    if not at_once:
        yield Event("open", TEXT, _open_seconds(pipeline, TEXT))
    positive, seconds = measure_time(lambda: pipeline.text(request.prompt))
    yield Event("text", TEXT, seconds)
    negative = None
    if request.guided:
        negative, seconds = measure_time(lambda: pipeline.text(request.negative_prompt, allow_empty=True))
        yield Event("text", TEXT, seconds)
    given, seconds = measure_time(lambda: pipeline.image_condition(request))
    if given:
        yield Event("image", ENCODER, seconds)
    latents = yield from _denoise(pipeline, work, Conditions(positive, negative, **given))
    chunks = pipeline.decode(latents)
    for index in range(latents.shape[2]):
        frames, seconds = measure_time(lambda: next(chunks))
        require_finite(frames, f"frames of latent {index + 1} of {latents.shape[2]}")
        yield Event("decode", DECODER, seconds)


def _open_seconds(pipeline: Pipeline, component: str) -> float:
    return measure_time(lambda: pipeline.load(component))[1]


def _denoise(pipeline: Pipeline, work: Work, given: Conditions) -> Generator[Event, None, F32]:
    """Yield steps and swaps of experts; return the final latents."""
    request, opened, before = work.request, list[Event](), pipeline.streamed

    def expert(name: str) -> Engine:
        engine, seconds = measure_time(lambda: pipeline.engine(name))
        opened.append(Event("swap", name, seconds))
        return engine

    spec, sampler = request.with_switch(pipeline.spec), request.sampler(pipeline.spec)
    for step in denoise(spec, expert, request.initial_noise(), given, sampler):
        if step.index and opened:
            yield opened[-1]
        opened.clear()
        streamed, before = _since(pipeline, before)
        yield Event("step", step.expert, step.seconds_total, step.seconds_engine, streamed)
        latents = step.latents
    return latents


def _since(pipeline: Pipeline, before: Streamed | None) -> tuple[Streamed | None, Streamed | None]:
    """What was streamed since ``before``, and in all; None for whole engines."""
    now = pipeline.streamed
    return None if now is None or before is None else now.since(before), now
