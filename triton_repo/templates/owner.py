"""The complete model: its code is installed, ``config.pbtxt`` has the path of the engines."""

from triton_repo.owner import Owner as TritonPythonModel

__all__ = ["TritonPythonModel"]
