"""The complete model: its code is installed, ``configs/cpu.pbtxt`` has the path of the engine."""

from triton_repo.component import ComponentModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
