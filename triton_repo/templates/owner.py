"""The whole model: the code is installed, the engines are where ``config.pbtxt`` says."""

from triton_repo.owner import Owner as TritonPythonModel

__all__ = ["TritonPythonModel"]
