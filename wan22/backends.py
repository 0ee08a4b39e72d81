"""The Python module and the package of each backend that builds and runs engines."""

from importlib import import_module
from types import ModuleType
from typing import Literal

from wan22.errors import UserError

Backend = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]  # also the name of its package
MODULES: dict[str, str] = {"onnxruntime": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def require_module(module: str, package: str, why: str) -> ModuleType:
    """Import ``module``.

    Raises:
        UserError: it is missing or does not load; the message gives its purpose ``why`` and the ``package`` to install.
    """
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        raise UserError(f"cannot import {module} ({error})", why, f"pip install {package}") from None
