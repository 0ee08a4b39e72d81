"""An engine stands where the module stood: ``velocity = engine(latents=..., time_features=..., ...)``.

Every backend checks names, types and shapes here before it touches a device.

An output ``next_x`` beside an input ``x`` is state on its way to the next call. A call uses up the state that it is
given: afterwards the array may hold the next state. Who needs it as it was keeps a copy.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from wan22.bundle import Tensor
from wan22.shapes import Profile, fitting_profile, sizes_of

Arrays = np.ndarray | tuple[np.ndarray, ...]
NEXT = "next_"  # begins the names of outputs that are state


class Engine(Protocol):
    """A compiled graph. Opened as a context manager, it holds its weights until it is left."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        """The output, or the outputs in graph order where there are several."""
        ...


class BorrowedEngine:
    """An engine that others open and close: entering and leaving it does nothing. Subclasses say what a call does."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing: the owner closes it."""


def check_inputs(
    name: str, expected: Sequence[Tensor], given: Mapping[str, np.ndarray], profiles: Sequence[Profile]
) -> int:
    """The index of the shape profile that fits a call, 0 where there is none.

    Raises:
        ValueError: names, types or shapes that are not the graph's (a caller's bug).
        UserError: shapes outside every profile that the engine was built for.
    """
    if given.keys() != {tensor.name for tensor in expected}:
        raise ValueError(f"{name} takes {sorted(t.name for t in expected)}, not {sorted(given)}")
    for tensor in expected:
        if str(given[tensor.name].dtype) != tensor.dtype:
            raise ValueError(f"{name}: {tensor.name} is {given[tensor.name].dtype}, expected {tensor.dtype}")
    sizes = sizes_of(expected, {key: array.shape for key, array in given.items()})
    return fitting_profile(sizes, profiles)
