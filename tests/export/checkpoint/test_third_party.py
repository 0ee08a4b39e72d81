"""Codes written by the publishers' libraries, comfy-kitchen and ModelOpt, are read as these libraries decode them."""

import json

import numpy as np
import pytest
import torch

from export.checkpoint.quantised import apply_scales
from export.files.safetensors_file import read_safetensors
from tests.export.checkpoint.forms import save

NAME = "blocks.0.ffn.0"
# Of the tiles of 128 x 4 blocks: whole, cut in rows, cut in columns.
SHAPES = [(256, 512), (144, 256), (128, 160), (336, 1088)]


def kitchen():
    reason = "pip install --no-deps comfy-kitchen"
    return pytest.importorskip("comfy_kitchen.backends.eager.quantization", reason=reason)


def weight(shape):
    """Rows of very different size, and zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-3, 1, len(values))[:, None]
    values[3] = 0
    values[:, 16:32] = 0
    return values


def read(tmp_path, described, **tensors):
    if described:
        tensors["comfy_quant"] = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    path = save(tmp_path / "x.safetensors", {f"{NAME}.{key}": tensor for key, tensor in tensors.items()})
    return apply_scales("high_noise", read_safetensors(path), {})[f"{NAME}.weight"].read()


@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_of_comfyui(tmp_path, shape):
    library, values = kitchen(), weight(shape)
    world = values.abs().max() / (448 * 6)
    codes, blocks = library.quantize_nvfp4(values, world)
    expected = library.dequantize_nvfp4(codes, world, blocks, torch.float32)
    found = read(tmp_path, {"format": "nvfp4"}, weight=codes, weight_scale=blocks, weight_scale_2=world)
    np.testing.assert_array_equal(found, expected.numpy())
    assert 0.01 < (expected - values).norm() / values.norm() < 0.2  # they are these codes' values


@pytest.mark.parametrize("shape", SHAPES)
def test_mxfp8_of_comfyui(tmp_path, shape):
    library, values = kitchen(), weight(shape)
    codes, powers = library.quantize_mxfp8(values)
    expected = library.dequantize_mxfp8(codes, powers, torch.float32)
    found = read(tmp_path, {"format": "mxfp8"}, weight=codes, weight_scale=powers)
    np.testing.assert_array_equal(found, expected.numpy())


def test_fp8_of_comfyui(tmp_path):
    library, values = kitchen(), weight((64, 96))
    scale = values.abs().max() / 448
    codes = library.quantize_per_tensor_fp8(values, scale)
    expected = library.dequantize_per_tensor_fp8(codes, scale, torch.float32)
    found = read(tmp_path, {"format": "float8_e4m3fn"}, weight=codes, weight_scale=scale)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("group", [16, 64, 256])
def test_rotated_int8_of_comfyui(tmp_path, group):
    library, values = kitchen(), weight((96, 512))
    codes, scale = library.quantize_int8_convrot_weight(values, group)
    expected = library.dequantize_int8_convrot_weight(codes, scale, group)
    told = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    found = read(tmp_path, told, weight=codes, weight_scale=scale)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6 * float(values.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
def test_nvfp4_of_modelopt(tmp_path, shape):
    reason = "pip install nvidia-modelopt"
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", reason=reason).NVFP4QTensor
    coded, blocks, world = tensor.quantize(weight(shape), 16)
    expected = coded.dequantize(torch.float32, scale=blocks, double_scale=world, block_sizes={-1: 16})
    found = read(tmp_path, None, weight=coded._quantized_data, weight_scale=blocks, weight_scale_2=world)
    np.testing.assert_array_equal(found, expected.numpy())
