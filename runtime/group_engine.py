"""Engines on several devices, called like one: an expert whose members share a forward, and whatever runs on any."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from runtime.arrays import F32
from runtime.engine import Arrays, Engine
from runtime.engine_onnxruntime import threads_of_sessions
from runtime.group import Group
from wan22.component import Component
from wan22.errors import UserError

Opened = tuple[tuple[str, int, int, int], ...]  # path, inode, size and time of change of every file


class EngineOnMembers:
    """An engine of its own on each of several members; a call runs on the member that makes it, or on the first."""

    def __init__(self, group: Group, folder: Path, component: Component, threads: int = 0) -> None:
        """``threads`` are those of a session on a CPU; 0 for all."""
        self.inputs, self.outputs, self.name = component.inputs, component.outputs, component.name
        self._group, self._folder, self._component, self._threads = group, folder, component, threads
        self._engines: dict[int, Engine] = {}
        self._open: dict[int, ExitStack] = {}

    def on(self, members: Sequence[int], new_engine: Callable[[int, Component], Engine]) -> Self:
        """Make the engine of each of ``members`` in its thread, without opening it."""
        self._engines = self._group.run({m: partial(new_engine, m, self._component) for m in members})
        return self

    def __enter__(self) -> Self:
        try:
            found = self._group.run({member: partial(self._enter, member) for member in self._engines})
            self._require_same(found)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._group.closed:  # else a device may not answer
            self._group.run({member: stack.close for member, stack in self._open.items()})
        self._open = {}

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        here = self._group.here
        member = here if here in self._engines else next(iter(self._engines))
        return self._group.call(member, partial(self._engines[member], **inputs))

    def _enter(self, member: int) -> Opened:
        stack = self._open[member] = ExitStack()
        with threads_of_sessions(self._threads):
            stack.enter_context(self._engines[member])
        return self._files()

    def _files(self) -> Opened:
        whole = self._component
        files = (whole.graph, *whole.halves, *whole.weights, *(stage.graph for stage in whole.stages))
        stats = [(file.path, (self._folder / file.path).stat()) for file in files]
        return tuple((path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats)

    def _require_same(self, opened: Mapping[int, Opened]) -> None:
        """Refuse members whose plans or weights differ, as those of files that changed while they were opened."""
        first, *others = opened
        for other in others:
            if differing := [path[0] for path, its in zip(opened[first], opened[other], strict=True) if path != its]:
                found = f"{differing[0]} of {self._group.names[other]} is not that of {self._group.names[first]}"
                raise UserError(found, "the same plans and weights on all devices", "open them when no command writes")


class GroupExpert(EngineOnMembers):
    """An expert. Each of its units computes one forward at a time, of one prompt, with all of its members."""

    def __init__(
        self, group: Group, folder: Path, component: Component, units: Sequence[Sequence[int]], threads: int = 0
    ) -> None:
        super().__init__(group, folder, component, threads)
        self._units, self._following = units, self.name
        self.alone = False  # on its members: no other expert follows

    def prepare(self, time_features: F32) -> None:
        """See :meth:`runtime.block_transformer.BlockTransformer.prepare`."""
        able = {m: engine.prepare for m, engine in self._engines.items() if hasattr(engine, "prepare")}
        self._group.run({member: partial(prepare, time_features) for member, prepare in able.items()})

    def follow(self, expert: str) -> None:
        """See :meth:`runtime.block_transformer.BlockTransformer.follow`."""
        self._following = self.name if self.alone else expert

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        (velocity,) = self._forwards([inputs])
        return velocity

    def _forwards(self, each: Sequence[Mapping[str, np.ndarray]]) -> list[Arrays]:
        """A forward on every unit that has inputs, all at once."""
        following, self._following = self._following, self.name
        work = {
            member: partial(self._forward, member, following, inputs)
            for unit, inputs in zip(self._units, each, strict=False)
            for member in unit
        }
        results = self._group.run(work)
        return [results[unit[0]] for unit in self._units[: len(each)]]

    def _forward(self, member: int, following: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
        engine = self._engines[member]
        if hasattr(engine, "follow"):
            engine.follow(following)
        return engine(**inputs)


class GuidedExpert(GroupExpert):
    """An expert with two units, one for each branch of guidance."""

    def both(self, inputs: Mapping[str, np.ndarray], positive: F32, negative: F32) -> tuple[F32, F32]:
        """The conditional and the unconditional velocity, computed at once; ``inputs`` are those but the text."""
        conditional, unconditional = self._forwards([{**inputs, "text": text} for text in (positive, negative)])
        assert isinstance(conditional, np.ndarray)
        assert isinstance(unconditional, np.ndarray)
        return conditional, unconditional
