"""The complete model: its code is installed, the engines are other models of this repository."""

from triton_repo.bls import BlsPipeline as TritonPythonModel

__all__ = ["TritonPythonModel"]
