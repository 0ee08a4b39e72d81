"""The whole model: the code is installed, the engine is where ``configs/cpu.pbtxt`` says."""

from triton_repo.component import ComponentModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
