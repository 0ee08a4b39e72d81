"""3D convolutions in oneDNN, whatever their size.

For small float32 convolutions (channels times frames times rows up to 20480) torch's dispatcher takes its own im2col
kernel, which is right for a tiny tensor and takes most of the time of a validation on small videos. oneDNN's kernel is
the one that the same call reaches for videos of ordinary size. The formula is the same, the order of additions is not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class OneDnnConvolutions(TorchFunctionMode):
    """Inside its ``with`` block, ``torch.conv3d`` of float32 tensors on the CPU is oneDNN's, where torch has it."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv3d and not kwargs and _fits(args):
            inputs, weight, bias, stride, padding, dilation, groups = args
            return torch.mkldnn_convolution(inputs, weight, bias, padding, stride, dilation, groups)
        return func(*args, **(kwargs or {}))


def _fits(args: tuple[Any, ...]) -> bool:
    if len(args) != 7 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    inputs, weight = args[:2]
    return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.ndim == 5 for t in (inputs, weight))
