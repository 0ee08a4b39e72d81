"""Which array library a tensor belongs to, so that one solver serves numpy on the CPU and CuPy on the GPU.

Nothing here imports CuPy: a CuPy array brings its own library with it.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wan22.errors import NonFiniteError

F32 = NDArray[np.float32]


def array_namespace(x: Any) -> Any:
    """The module whose functions work on ``x``: numpy, or the top package of its class (cupy)."""
    return np if isinstance(x, np.ndarray) else sys.modules[type(x).__module__.partition(".")[0]]


def to_numpy(x: Any) -> NDArray[Any]:
    """``x`` itself, or the copy on the host of an array on a device."""
    host: NDArray[Any] = x if isinstance(x, np.ndarray) else x.get()
    return host


def require_finite(x: Any, what: str) -> None:
    """Raises NonFiniteError, with how many of how many values are bad, unless every value of ``x`` is finite."""
    finite = array_namespace(x).isfinite(x)
    if not finite.all():
        bad = x.size - int(finite.sum())
        raise NonFiniteError(f"{what}: {bad} of {x.size} values are NaN or infinite")
