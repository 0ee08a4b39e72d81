"""Find the array library of a tensor, so that one solver works with numpy on the CPU and CuPy on the GPU.

Nothing here imports CuPy: a CuPy array implies that CuPy is loaded.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wan22.errors import NonFiniteError

F32 = NDArray[np.float32]


def array_namespace(x: Any) -> Any:
    """The module for ``x``: numpy, or the top-level package of its class (cupy)."""
    return np if isinstance(x, np.ndarray) else sys.modules[type(x).__module__.partition(".")[0]]


def to_numpy(x: Any) -> NDArray[Any]:
    """``x`` itself, or a host copy of a device array."""
    host: NDArray[Any] = x if isinstance(x, np.ndarray) else x.get()
    return host


def require_finite(x: Any, what: str) -> None:
    """Require that every value of ``x``, called ``what`` in the message, is finite.

    Raises:
        NonFiniteError: it is not; the message counts the bad values.
    """
    finite = array_namespace(x).isfinite(x)
    if not finite.all():
        bad = x.size - int(finite.sum())
        raise NonFiniteError(f"{what}: {bad} of {x.size} values are NaN or infinite")
