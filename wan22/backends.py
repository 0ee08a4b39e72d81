"""What builds and runs engines: the module of each backend, and the package to install where it is missing."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from wan22.errors import UserError

Backend = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]  # the name of its package as well
MODULES: dict[str, str] = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def imported(module: str, package: str, why: str) -> ModuleType:
    """The module called ``module``.

    Raises:
        UserError: it is not there or does not load; ``why`` says what it is for, ``package`` what brings it.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        raise UserError(f"no module {module} ({error})", why, f"pip install {package}") from None


@contextmanager
def loading(graph: Path) -> Iterator[None]:
    """A block in which ONNX Runtime loads ``graph``; an error of the disk inside its library is raised as one.

    Raises:
        OSError: a file cannot be read.
        UserError: what was read is no graph.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "onnxruntime.capi.onnxruntime_pybind11_state":
            raise
        if system := re.search(r"SystemError : (\d+)", str(error)):
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(graph)) from error
        if "INVALID_PROTOBUF" in str(error):
            raise UserError(f"{graph} is damaged", "a graph", "check the disk, then make the bundle again") from error
        raise
