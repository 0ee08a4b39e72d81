"""Where PyTorch's side computes: on the GPU where engines do and PyTorch sees one, else on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from wan22.bundle import Manifest
from wan22.errors import UserError

Choice = Literal["auto", "cpu", "cuda"]
Device = Literal["cpu", "cuda"]


def reference_device(choice: Choice, manifest: Manifest) -> Device:
    """What ``choice`` means beside the engines, or graphs, of ``manifest``.

    Raises:
        UserError: CUDA, where PyTorch has none.
    """
    if choice == "cpu" or (choice == "auto" and not _run_on_gpu(manifest)):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if choice == "auto":
        return "cpu"
    remedy = "leave it out, or install a PyTorch with CUDA"
    raise UserError("--reference-device cuda, but PyTorch sees no GPU", "one that PyTorch can use", remedy)


def _run_on_gpu(manifest: Manifest) -> bool:
    build = manifest.build
    if build is None:
        return False
    if build.backend != "onnxruntime":
        return True
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


class Residence:
    """Keeps one module on the device at a time, the others in host memory: together they may not fit a GPU.

    On a GPU float32 is made exact for the whole process: by default convolutions there round to TF32.
    """

    def __init__(self, device: Device = "cpu") -> None:
        self.device = device
        self._module: Any = None
        if device == "cuda":
            import torch

            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def place(self, module: Any) -> Any:
        """``module``, on the device; whatever was there is in host memory again."""
        if self.device != "cpu" and module is not self._module:
            if self._module is not None:
                self._module.to("cpu")
            self._module = module.to(self.device)
        return module

    def release(self, module: Any) -> None:
        """``module`` is not needed any more."""
        if module is self._module:
            self._module = None


@contextmanager
def catch_out_of_memory() -> Iterator[None]:
    """Inside, a GPU that is too small for PyTorch's side is bad input. Raises UserError."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        found = f"PyTorch's side: {str(error).splitlines()[0]}"
        raise UserError(found, "room beside the engines", "add --reference-device cpu") from error
