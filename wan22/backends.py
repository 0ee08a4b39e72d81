"""What builds and runs engines: the module of each backend, and the package to install where it is missing."""

from importlib import import_module
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
