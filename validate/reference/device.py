"""The device of the PyTorch side: the GPU if the engines use it and PyTorch sees it, else the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from wan22.bundle import Manifest
from wan22.errors import UserError

Choice = Literal["auto", "cpu", "cuda"]
Device = Literal["cpu", "cuda"]


def reference_device(choice: Choice, manifest: Manifest) -> Device:
    """Resolve ``choice`` for the engines or graphs of ``manifest``.

    Raises:
        UserError: ``choice`` is CUDA and PyTorch sees no GPU.
    """
    if choice == "cpu" or (choice == "auto" and not _run_on_gpu(manifest)):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if choice == "auto":
        return "cpu"
    remedy = "omit the option or install PyTorch with CUDA"
    raise UserError("--reference-device cuda, but PyTorch sees no GPU", "a GPU that PyTorch can use", remedy)


def _run_on_gpu(manifest: Manifest) -> bool:
    build = manifest.build
    if build is None:
        return False
    if build.backend != "onnxruntime":
        return True
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


class Residence:
    """Keep one module at a time on the device and the others in host memory, since a GPU may not hold all.

    On a GPU, this disables TF32 for the process: by default float32 convolutions round to it.
    """

    def __init__(self, device: Device = "cpu") -> None:
        self.device = device
        self._module: Any = None
        if device == "cuda":
            import torch

            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def place(self, module: Any) -> Any:
        """Move ``module`` to the device, the previous one back to host memory, and return ``module``."""
        if self.device != "cpu" and module is not self._module:
            if self._module is not None:
                self._module.to("cpu")
            self._module = module.to(self.device)
        return module

    def release(self, module: Any) -> None:
        """Forget ``module``, which is no longer needed."""
        if module is self._module:
            self._module = None


@contextmanager
def catch_out_of_memory() -> Iterator[None]:
    """Turn out-of-memory errors of PyTorch's side on the GPU into UserError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        found = f"PyTorch's side: {str(error).splitlines()[0]}"
        raise UserError(found, "GPU memory for both PyTorch and the engines", "add --reference-device cpu") from error
