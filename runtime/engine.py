"""The interface of engines, which replace modules: ``velocity = engine(latents=..., time_features=..., ...)``.

Every backend checks names, types and shapes here before it touches a device.

An output ``next_x`` with an input ``x`` is state for the next call. A call consumes its input state: afterwards the
array may hold the next state, so callers that still need the old one must copy it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

import numpy as np

from wan22.component import Tensor
from wan22.shapes import Profile, fitting_profile, sizes_of

Arrays = np.ndarray | tuple[np.ndarray, ...]
NEXT = "next_"  # prefix of outputs that are state


class Engine(Protocol):
    """A compiled graph, used as a context manager: it holds its weights inside the block."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """The output, or a tuple of several outputs in graph order."""


class BorrowedEngine:
    """An engine that its owner opens and closes: entering and leaving it does nothing. Subclasses define the call."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the owner closes it."""


class OnCall(BorrowedEngine):
    """An engine that ``opened`` returns, which is asked when it is called."""

    def __init__(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], opened: Callable[[], Engine]) -> None:
        self.inputs, self.outputs, self._opened = inputs, outputs, opened

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        return self._opened()(**inputs)


def check_inputs(
    name: str, expected: Sequence[Tensor], given: Mapping[str, np.ndarray], profiles: Sequence[Profile]
) -> int:
    """The index of the shape profile that fits a call, 0 if the engine has no profiles.

    Raises:
        ValueError: names, types or shapes differ from the graph's (a bug in the caller).
        UserError: the shapes are outside all profiles of the engine.
    """
    if given.keys() != {tensor.name for tensor in expected}:
        raise ValueError(f"{name} takes {sorted(t.name for t in expected)}, not {sorted(given)}")
    for tensor in expected:
        if str(given[tensor.name].dtype) != tensor.dtype:
            raise ValueError(f"{name}: {tensor.name} is {given[tensor.name].dtype}, expected {tensor.dtype}")
    sizes = sizes_of(expected, {key: array.shape for key, array in given.items()})
    return fitting_profile(sizes, profiles)
