"""The reference in lower precision. It shows the precision's own error, without any of our code.

16-bit precisions are those of diffusers and transformers: weights, activations and the residual stream use that dtype,
and the modules that the libraries keep in float32 stay there. PyTorch has no FP8 or INT8 transformer to compare with,
so those modules get a plain recipe: one scale per token, one per matrix of a block in FP8 and one per row of it in
INT8, and 16 bits elsewhere. FP8 attention follows SageAttention (arXiv 2410.02367) with one scale per tensor. Means,
factors and branches of low rank that a bundle has are not here, and what it keeps in higher precision by choice is not
kept higher.

Convolutions on the CPU can use oneDNN. This changes their speed, not the formula.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from wan22.precision import Number, Precision

FLOAT8 = torch.float8_e4m3fn
DTYPES = {Number.FP32: torch.float32, Number.BF16: torch.bfloat16, Number.FP16: torch.float16}
CODES = (FLOAT8, torch.int8)
LARGEST, LARGEST_INT8 = torch.finfo(FLOAT8).max, 127.0
SMALLEST_SCALE = 1e-12
QUERIES_AT_ONCE = 1024  # rows of the attention matrix held in memory at once
ONLY_FOR_FP16 = frozenset({"wo"})  # transformers keeps UMT5's "wo" in float32 only because float16 would overflow


def dtype_of(precision: Precision) -> torch.dtype:
    """The dtype of everything that is not quantised."""
    return DTYPES[precision.wide.linears]


def lower_precision(module: Any, precision: Precision) -> Any:
    """Convert the float32 ``module`` to ``precision`` in place, and return it."""
    dtype = dtype_of(precision)
    kept = set(module._keep_in_fp32_modules or ()) - (ONLY_FOR_FP16 if dtype == torch.bfloat16 else set())
    if precision.quantised:
        for parent in [parent for block in module.blocks for parent in block.modules()]:
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, LINEARS[precision.linears](child.weight, child.bias))
    for name, parameter in module.named_parameters():
        if parameter.dtype not in CODES and not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return module


class Fp8Linear(torch.nn.Module):
    """A linear layer that multiplies FP8 values exactly, with one scale for the matrix and one per token."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.scale = _scale(weight, None)
        self.weight = torch.nn.Parameter((weight / self.scale).to(FLOAT8), requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` → ``[..., out]`` in the dtype of ``x``."""
        values, scale = _through_fp8(x.float(), -1)
        product = functional.linear(values, self.weight.float()) * (scale * self.scale)
        return (product + self.bias.float()).to(x.dtype)


class Int8Linear(torch.nn.Module):
    """A linear layer that multiplies integers exactly, with one scale for each row of the matrix and one per token."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        values, self.scale = _through_int8(weight)
        self.weight = torch.nn.Parameter(values.to(torch.int8), requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` → ``[..., out]`` in the dtype of ``x``."""
        values, scale = _through_int8(x.float())
        product = functional.linear(values, self.weight.float()) * scale * self.scale.squeeze(-1)
        return (product + self.bias.float()).to(x.dtype)


class Nvfp4Linear(torch.nn.Module):
    """A linear layer that multiplies NVFP4 values, rounded to the nearest, with one more scale for every row."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(_through_nvfp4(weight).to(torch.bfloat16), requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` → ``[..., out]`` in the dtype of ``x``."""
        product = functional.linear(_through_nvfp4(x.float()), self.weight.float())
        return (product + self.bias.float()).to(x.dtype)


def _through_nvfp4(x: torch.Tensor) -> torch.Tensor:
    """``x [..., in]`` rounded to NVFP4: E2M1, an E4M3 scale for 16 numbers, a scale for every row."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_SCALE)
    groups = (x / largest).reshape(*x.shape[:-1], -1, 16)
    scales = (groups.abs().amax(-1, keepdim=True) / 6 * LARGEST).to(FLOAT8).float() / LARGEST
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scaled = groups / torch.where(scales > 0, scales, 1.0)
    distance, nearest = torch.full_like(scaled, torch.inf), torch.zeros_like(scaled)
    for value in magnitudes:
        closer = (scaled.abs() - value).abs() < distance
        nearest = torch.where(closer, value, nearest)
        distance = torch.where(closer, (scaled.abs() - value).abs(), distance)
    rounded: torch.Tensor = (nearest * scaled.sign() * scales).flatten(-2) * largest
    return rounded


LINEARS = {Number.FP8: Fp8Linear, Number.INT8: Int8Linear, Number.NVFP4: Nvfp4Linear}


def attention_of(precision: Precision) -> AbstractContextManager[Any]:
    """A context in which attention is computed in ``precision``."""
    if precision.attention is not Number.FP8:
        return nullcontext()
    return _Instead(functional.scaled_dot_product_attention, _fp8_attention)


def onednn_convolutions() -> AbstractContextManager[Any]:
    """A context in which ``torch.conv3d`` of float32 tensors on the CPU uses oneDNN, if torch has it.

    For small float32 convolutions (channels × frames × rows up to 20480) torch's dispatcher picks its own im2col
    kernel, which is slow enough to dominate a validation on small videos. For videos of ordinary size the same call
    reaches oneDNN's kernel. The formula is the same; only the order of additions differs.
    """
    return _Instead(torch.conv3d, _convolution)


class _Instead(TorchFunctionMode):
    """A context in which calls of ``function`` go to ``instead``."""

    def __init__(self, function: Callable[..., Any], instead: Callable[..., Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._function, self._instead = function, instead

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (self._instead if func is self._function else func)(*args, **(kwargs or {}))


def _convolution(*args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 7 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return torch.conv3d(*args, **kwargs)
    inputs, weight, bias, stride, padding, dilation, groups = args
    if all(t.device.type == "cpu" and t.dtype == torch.float32 and t.ndim == 5 for t in (inputs, weight)):
        return torch.mkldnn_convolution(inputs, weight, bias, padding, stride, dilation, groups)
    return torch.conv3d(*args)


def _fp8_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    """Unmasked ``scaled_dot_product_attention`` of values rounded to FP8; tensors are ``[B, heads, L, head]``.

    K loses its mean over the tokens; V has one scale per channel.
    """
    centred = key.float() - key.float().mean(dim=-2, keepdim=True)
    q, q_scale = _through_fp8(query.float(), None)
    k, k_scale = _through_fp8(centred, None)
    v, v_scale = _through_fp8(value.float(), -2)
    factor = q_scale * k_scale * query.shape[-1] ** -0.5
    rows = [
        (torch.softmax(part @ k.transpose(-1, -2) * factor, dim=-1) * LARGEST).to(FLOAT8).float() @ v
        for part in torch.split(q, QUERIES_AT_ONCE, dim=-2)
    ]
    return (torch.cat(rows, dim=-2) * (v_scale / LARGEST)).to(query.dtype)


def _through_fp8(x: torch.Tensor, axis: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` divided by its scale and rounded to FP8, as float32, and the scale: one for ``x`` or one along ``axis``."""
    scale = _scale(x, axis)
    return (x / scale).clamp(-LARGEST, LARGEST).to(FLOAT8).float(), scale


def _through_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of ``x`` divided by their scale and rounded to integers, as float32, and the scales."""
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_SCALE) / LARGEST_INT8
    return (x / scale).round(), scale


def _scale(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    largest = x.abs().amax() if axis is None else x.abs().amax(dim=axis, keepdim=True)
    return largest.clamp_min(SMALLEST_SCALE) / LARGEST
