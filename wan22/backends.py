"""The Python module and the package of each backend that builds and runs engines."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from wan22.errors import UserError

Backend = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-gpu"]  # also the name of its package
MODULES: dict[str, str] = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}


def runs_graphs(backend: str) -> bool:
    """True if the engines of ``backend`` are ONNX graphs, which take every size and are compiled when loaded."""
    return MODULES[backend] == "onnxruntime"


def require_module(module: str, package: str, why: str) -> ModuleType:
    """Import ``module``.

    Raises:
        UserError: it is missing or does not load; the message gives its purpose ``why`` and the ``package`` to install.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        raise UserError(f"cannot import {module} ({error})", why, f"pip install {package}") from None


@contextmanager
def loading(graph: Path) -> Iterator[None]:
    """A block in which ONNX Runtime loads ``graph``; disk errors inside the library are raised as such.

    Raises:
        OSError: a file cannot be read.
        UserError: the file does not hold a graph.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "onnxruntime.capi.onnxruntime_pybind11_state":
            raise
        if system := re.search(r"(?:SystemError : |system error number )(\d+)", str(error)):
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(graph)) from error
        if "INVALID_PROTOBUF" in str(error):
            raise UserError(f"{graph} is damaged", "a graph", "check the disk, then make the bundle again") from error
        raise
