"""The change that a LoRA makes to a weight, by kind of decomposition. Matrices are read from the file when needed.

PyTorch computes everything in float32. ``strength`` 1 gives the trained weight, 0 the checkpoint's.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.files.tensor_file import Stored

F32 = npt.NDArray[np.float32]


class Delta(Protocol):
    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the changed weight; [out, all inputs] if the file does not say more."""

    @property
    def shown(self) -> str:
        """The shapes in the file."""

    def merged(self, weight: F32, strength: float) -> F32:
        """``weight`` with the change at ``strength``."""


class _Added:
    """A delta that is added to the weight."""

    def times(self, strength: float) -> F32:
        raise NotImplementedError

    def merged(self, weight: F32, strength: float) -> F32:
        change = self.times(strength).reshape(weight.shape)
        return np.add(weight, change, out=change)


@dataclass(frozen=True)
class LowRank(_Added):
    """``scale``·(up·down): ``down`` is [rank, in], ``up`` [out, rank], ``scale`` alpha/rank."""

    down: Stored
    up: Stored
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return _product_shape(self.up, self.down)

    @property
    def shown(self) -> str:
        return f"{list(self.up.shape)}·{list(self.down.shape)}"

    def times(self, strength: float) -> F32:
        product: F32 = (_matrix(self.up) @ _matrix(self.down)).mul_(strength * self.scale).numpy()
        return product

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self, strength: float) -> tuple[F32, F32]:
        """``down`` and ``up``, whose product is the change at ``strength``."""
        up: F32 = _matrix(self.up).mul_(strength * self.scale).numpy()
        return _matrix(self.down).numpy(), up


@dataclass(frozen=True)
class Full(_Added):
    """A difference as large as the tensor it changes."""

    stored: Stored
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def shown(self) -> str:
        return f"{list(self.stored.shape)}"

    def times(self, strength: float) -> F32:
        return _float32(self.stored) * np.float32(strength * self.scale)


@dataclass(frozen=True)
class Hadamard(_Added):
    """LoHa: ``scale``·(w1_a·w1_b) ∘ (w2_a·w2_b); each ``_a`` is [out, rank], each ``_b`` [rank, in]."""

    w1: tuple[Stored, Stored]
    w2: tuple[Stored, Stored]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = _product_shape(*self.w1), _product_shape(*self.w2)
        return first if first == second else ()

    @property
    def shown(self) -> str:
        return " ∘ ".join(f"{list(a.shape)}·{list(b.shape)}" for a, b in (self.w1, self.w2))

    def times(self, strength: float) -> F32:
        first, second = (_matrix(a) @ _matrix(b) for a, b in (self.w1, self.w2))
        product: F32 = (first * second).mul_(strength * self.scale).numpy()
        return product


@dataclass(frozen=True)
class Kronecker(_Added):
    """LoKr: ``scale``·kron(w1, w2), where each side is one matrix or the product of two."""

    w1: tuple[Stored, ...]
    w2: tuple[Stored, ...]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        sides = [_product_shape(*side) if len(side) > 1 else _flat_shape(side[0]) for side in (self.w1, self.w2)]
        if () in sides:
            return ()
        return sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]

    @property
    def shown(self) -> str:
        return " ⊗ ".join("·".join(str(list(stored.shape)) for stored in side) for side in (self.w1, self.w2))

    def times(self, strength: float) -> F32:
        import torch

        first, second = (
            _matrix(side[0]) @ _matrix(side[1]) if len(side) > 1 else _matrix(side[0]) for side in (self.w1, self.w2)
        )
        product: F32 = torch.kron(first, second).mul_(strength * self.scale).numpy()
        return product


@dataclass(frozen=True)
class Whole:
    """A tensor that replaces the checkpoint's."""

    stored: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def shown(self) -> str:
        return f"{list(self.stored.shape)}"

    def merged(self, weight: F32, strength: float) -> F32:
        whole = _float32(self.stored)
        return whole if strength == 1 else weight + np.float32(strength) * (whole - weight)


@dataclass(frozen=True)
class Decomposed:
    """DoRA: weight plus difference, with rows (magnitude [out] or [out, 1]) or columns ([1, in]) scaled to the length
    in ``magnitude``.
    """

    difference: LowRank | Hadamard | Kronecker
    magnitude: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.difference.shape or (0, 0)
        fits = self.magnitude.shape in {(rows,), (rows, 1), (1, columns)}
        return self.difference.shape if fits else ()

    @property
    def shown(self) -> str:
        return f"{self.difference.shown} with magnitudes {list(self.magnitude.shape)}"

    def merged(self, weight: F32, strength: float) -> F32:
        import torch

        base = torch.from_numpy(weight).flatten(1)
        direction = base + torch.from_numpy(self.difference.times(1.0))
        rows = self.magnitude.shape[0] == len(base)
        length = torch.linalg.vector_norm(direction, dim=1 if rows else 0, keepdim=True)
        magnitude = torch.from_numpy(_float32(self.magnitude)).reshape(length.shape)
        trained = direction * (magnitude / length)
        result = trained if strength == 1 else base + strength * (trained - base)
        array: F32 = result.numpy().reshape(weight.shape)
        return array


def fits(delta: Delta, expected: tuple[int, ...]) -> bool:
    """True if ``delta`` has the shape of the tensor; products have its flat shape [out, all inputs]."""
    if isinstance(delta, (Full, Whole)):
        return delta.shape == expected
    return len(expected) > 1 and delta.shape == (expected[0], prod(expected[1:]))


def _product_shape(left: Stored, right: Stored) -> tuple[int, ...]:
    """The shape of ``left``·``right``, both flattened; () if they do not match."""
    whole = min(len(left.shape), len(right.shape)) >= 2 and prod(left.shape[1:]) == right.shape[0]
    return (left.shape[0], prod(right.shape[1:])) if whole else ()


def _flat_shape(stored: Stored) -> tuple[int, ...]:
    return (stored.shape[0], prod(stored.shape[1:])) if len(stored.shape) > 1 else ()


def _matrix(stored: Stored) -> Any:
    import torch

    return torch.from_numpy(_float32(stored)).flatten(1)


def _float32(stored: Stored) -> F32:
    """A writable copy."""
    return stored.read().astype(np.float32)
