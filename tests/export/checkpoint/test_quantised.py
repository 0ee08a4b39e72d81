"""Every published form of quantised weights is read as the values that it stands for, bit for bit but for rotations."""

import json

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from export.checkpoint.quantised import apply_scales
from export.files.decoded import PIECE_BYTES, untile
from export.files.gguf_reader import read_gguf
from export.files.safetensors_file import read_metadata, read_safetensors
from export.files.weights_files import read_weights
from wan22.errors import UserError

NAME, OUT, IN = "blocks.0.ffn.0", 256, 512
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(dtype, *shape, seed=0):
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    return random(*shape, seed=seed).to(dtype)


def as_bytes(content):
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def read(tmp_path, tensors, metadata=None):
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata)
    path = tmp_path / "x.safetensors"
    return apply_scales("high_noise", read_safetensors(path), read_metadata(path))


def check(tmp_path, tensors, expected, metadata=None):
    found = read(tmp_path, tensors, metadata)
    assert set(found) == {f"{NAME}.weight"}
    weight = found[f"{NAME}.weight"]
    assert (weight.dtype, weight.shape) == (np.float32, tuple(expected.shape))
    np.testing.assert_array_equal(weight.read(), expected.numpy())
    np.testing.assert_array_equal(np.concatenate([*weight.pieces()]), expected.numpy().ravel())


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (OUT, 1)])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_fp8_with_a_scale_or_one_for_every_row(tmp_path, dtype, shape, suffix):
    weight, scale = codes(dtype, OUT, IN), random(*shape).abs() + 0.01
    tensors = {f"{NAME}.weight": weight, f"{NAME}.{suffix}": scale, f"{NAME}.scale_input": torch.tensor(7.0)}
    marker = {"scaled_fp8": torch.empty(2, dtype=dtype)} if suffix == "scale_weight" else {}
    by_row = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    check(tmp_path, tensors | marker, weight.float() * by_row)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fp8_without_any_scale_is_a_plain_cast(tmp_path, dtype):
    weight = codes(dtype, OUT, IN)
    check(tmp_path, {f"{NAME}.weight": weight}, weight.float())


def test_scales_for_blocks_of_inputs(tmp_path):
    weight, scale = codes(E4M3, OUT, IN), random(OUT, 8, 1).abs() + 0.01
    expected = (weight.float().reshape(OUT, 8, -1) * scale).reshape(OUT, IN)
    check(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.scale_weight": scale}, expected)


def test_scales_for_blocks_of_128(tmp_path):
    weight, scale = codes(torch.int8, OUT, IN), random(OUT // 128, IN // 128).abs() + 0.01
    expected = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    check(tmp_path, {f"{NAME}.int8_weight": weight, f"{NAME}.scale": scale}, expected)


def test_quanto(tmp_path):
    weight, scale = codes(torch.int8, OUT, IN), (random(OUT, 1).abs() + 0.01).bfloat16()
    tensors = {f"{NAME}.weight._data": weight, f"{NAME}.weight._scale": scale}
    extra = {f"{NAME}.input_scale": torch.tensor(1.0), f"{NAME}.output_scale": torch.tensor(1.0)}
    check(tmp_path, tensors | extra, weight.float() * scale.float())


def test_input_channels_are_scaled_where_the_file_says_so(tmp_path):
    weight, columns = codes(E4M3, OUT, IN), random(IN).abs()
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": torch.tensor(0.5), f"{NAME}.pre_quant_scale": columns}
    check(tmp_path, tensors, weight.float() * 0.5 * columns)


def hadamard(size):
    matrix = first = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    while len(matrix) < size:
        matrix = torch.kron(matrix, first)
    return matrix / size**0.5


@pytest.mark.parametrize("in_header", [False, True])
def test_rotated_int8_is_turned_back(tmp_path, in_header):
    weight, scale = codes(torch.int8, OUT, IN), random(OUT, 1).abs() + 0.01
    told = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale}
    layers = {"format_version": "1.0", "layers": {f"model.diffusion_model.{NAME}": told}}
    found = read(
        tmp_path,
        tensors if in_header else tensors | {f"{NAME}.comfy_quant": as_bytes(told)},
        {"_quantization_metadata": json.dumps(layers)} if in_header else None,
    )[f"{NAME}.weight"]
    expected = ((weight.double() * scale.double()).reshape(OUT, -1, 64) @ hadamard(64).double().T).reshape(OUT, IN)
    largest = float(expected.abs().max())
    np.testing.assert_allclose(found.read(), expected.numpy(), rtol=0, atol=1e-6 * largest)


def tiled(scales):
    """As cuBLAS wants block scales: row r, column c of a tile of 128 x 4 at (r mod 32)·16 + (r div 32)·4 + c."""
    rows, columns = scales.shape
    tall, wide = -(-rows // 128), -(-columns // 4)
    flat = torch.zeros(tall * wide * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * wide + c // 4
            flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
    return flat.reshape(tall * 128, wide * 4)


def test_tiles_are_taken_apart():
    scales = torch.randint(0, 256, (200, 9), dtype=torch.uint8)
    np.testing.assert_array_equal(untile(tiled(scales).numpy(), 200, 9), scales.numpy())


@pytest.mark.parametrize("publisher", ["ComfyUI", "ModelOpt", "LightX2V", "LightX2V alpha"])
def test_nvfp4(tmp_path, publisher):
    """Nibbles, tiles and the second scale differ between publishers; the values do not."""
    rows, inputs = 130, 160
    code = torch.randint(0, 16, (rows, inputs), dtype=torch.uint8)
    block, world = (random(rows, inputs // 16).abs() + 0.1).to(E4M3), torch.tensor(0.03125)
    expected = (E2M1[code.long()].reshape(rows, -1, 16) * (block.float() * world)[..., None]).reshape(rows, inputs)
    even, odd = code[:, 0::2], code[:, 1::2]
    packed = even << 4 | odd if publisher == "ComfyUI" else odd << 4 | even
    scales = block if publisher == "ModelOpt" else tiled(block.view(torch.uint8)).view(E4M3)
    tensors = {f"{NAME}.weight": packed, f"{NAME}.weight_scale": scales, f"{NAME}.input_scale": torch.tensor(1.0)}
    if publisher == "ComfyUI":
        tensors |= {f"{NAME}.weight_scale_2": world, f"{NAME}.comfy_quant": as_bytes({"format": "nvfp4"})}
    elif publisher == "ModelOpt":
        tensors |= {f"{NAME}.weight_scale_2": world}
    elif publisher == "LightX2V":
        tensors |= {f"{NAME}.weight_global_scale": 1 / world}
    else:
        tensors |= {f"{NAME}.alpha": world / 4, f"{NAME}.input_global_scale": torch.tensor(4.0)}
    check(tmp_path, tensors, expected)


def test_mxfp8(tmp_path):
    weight = codes(E4M3, 130, 64)
    powers = torch.randint(120, 134, (130, 2), dtype=torch.uint8)
    expected = (weight.float().reshape(130, 2, 32) * 2.0 ** (powers.float() - 127)[..., None]).reshape(130, 64)
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": tiled(powers)}
    check(tmp_path, tensors | {f"{NAME}.comfy_quant": as_bytes({"format": "mxfp8"})}, expected)


def test_large_matrices_come_in_small_pieces(tmp_path):
    rows = 3 * PIECE_BYTES // (4 * IN)
    weight, scale = codes(E4M3, rows, IN), random(rows, 1).abs() + 0.01
    found = read(tmp_path, {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scale})[f"{NAME}.weight"]
    pieces = [*found.pieces()]
    assert [piece.nbytes for piece in pieces] == [PIECE_BYTES] * 3
    np.testing.assert_array_equal(np.concatenate(pieces), (weight.float() * scale).numpy().ravel())


NIBBLES = {"weight": torch.zeros(OUT, IN // 2, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": codes(torch.int8, OUT, IN)}, "is int8 without a scale"),
        ({"weight": codes(E4M3, OUT, IN), "scaled_fp8": torch.empty(0, dtype=E4M3)}, "scaled FP8 without its scale"),
        *(
            ({"weight": codes(E4M3, OUT, IN), "weight_scale": torch.tensor(value)}, f"holds the scale {value:g}")
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ),
        ({"weight": codes(E4M3, OUT, IN), "weight_scale": torch.ones(3)}, r"weight_scale has shape \[3\]"),
        (
            {"weight": codes(E4M3, OUT, IN), "weight_scale": torch.ones(1), "scale_weight": torch.ones(1)},
            "one scale of",
        ),
        ({"weight": random(OUT, IN), "weight_scale": torch.ones(1)}, "weight_scale, a scaled FP8 repack"),
        (NIBBLES, "without block scales"),
        (
            {
                "weight": torch.zeros(OUT, IN // 2, dtype=torch.uint8),
                "weight_scale": (random(OUT, IN // 16).abs() + 0.1).to(E4M3),
            },
            "without its second scale",
        ),
        (
            {
                "weight": torch.zeros(OUT, IN // 2, dtype=torch.uint8),
                "weight_scale": (random(OUT, 3).abs() + 0.1).to(E4M3),
            },
            "768 block scales",
        ),
        (
            {"weight": codes(torch.int8, OUT, IN), "comfy_quant": as_bytes({"format": "convrot_w4a4"})},
            "is convrot_w4a4",
        ),
        ({"weight": codes(torch.int8, OUT, IN), "comfy_quant": as_bytes([1])}, "a description of quantised layers"),
        ({"weight": torch.zeros(8, 1, dtype=torch.uint8), "weight.absmax": torch.ones(2)}, "bitsandbytes 4 bits"),
        ({"encoded_exponent": torch.zeros(8, dtype=torch.uint8)}, "DFloat11"),
    ],
)
def test_what_has_no_value_is_refused_by_name(tmp_path, tensors, words):
    named = {key if key == "scaled_fp8" else f"{NAME}.{key}": tensor for key, tensor in tensors.items()}
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path, named)
    assert "\n" not in str(error.value)


# GGUF


def written(path, tensors, architecture="wan", **fields):
    """A file by gguf-py's writer: name → (array, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_array(key, value)
    for name, (array, kind) in tensors.items():
        data = gguf.quantize(array, kind) if kind in QUANTISABLE else array
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KIND = gguf.GGMLQuantizationType
QUANTISABLE = [KIND.Q8_0, KIND.Q4_0, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1]


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_gguf_blocks_have_the_values_of_gguf_py(tmp_path, kind):
    array = random(OUT, IN).numpy()
    path = written(tmp_path / "x.gguf", {f"{NAME}.weight": (array, kind)})
    expected = gguf.dequantize(gguf.quantize(array, kind), kind)
    found = read_weights(path).tensors[f"{NAME}.weight"]
    assert (found.shape, found.dtype) == ((OUT, IN), np.float32)
    np.testing.assert_array_equal(found.read(), expected)
    np.testing.assert_array_equal(np.concatenate([*found.pieces()]), expected.ravel())


def k_blocks(kind, rows, inputs):
    """Random blocks with sane scales; gguf-py writes none of this kind."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (rows * inputs // values, size), np.uint8)
    places = {KIND.Q4_K: (0, 2), KIND.Q5_K: (0, 2), KIND.Q6_K: (size - 2,)}[kind]
    for place in places:
        blocks[:, place : place + 2] = np.full((len(blocks), 1), 0.01, np.float16).view(np.uint8)
    return blocks


def dequantised_q4_k(blocks):
    """The formula written out: eight groups of 32, six-bit scales and minima."""
    d, dmin = (blocks[:, a : a + 2].copy().view(np.float16).astype(np.float32) for a in (0, 2))
    b, nibbles = blocks[:, 4:16].astype(int), blocks[:, 16:]
    groups = []
    for g in range(8):
        scale = b[:, g] & 63 if g < 4 else b[:, 4 + g] & 15 | b[:, g - 4] >> 6 << 4
        least = b[:, 4 + g] & 63 if g < 4 else b[:, 4 + g] >> 4 | b[:, g] >> 6 << 4
        part = nibbles[:, 32 * (g // 2) : 32 * (g // 2) + 32]
        q = part & 15 if g % 2 == 0 else part >> 4
        groups.append(d * scale[:, None].astype(np.float32) * q - dmin * least[:, None].astype(np.float32))
    return np.concatenate(groups, axis=1).astype(np.float32)


@pytest.mark.parametrize("kind", [KIND.Q4_K, KIND.Q5_K, KIND.Q6_K])
def test_gguf_k_quants(tmp_path, kind):
    blocks = k_blocks(kind, OUT, IN)
    path = written(tmp_path / "x.gguf", {f"{NAME}.weight": (blocks.reshape(OUT, -1), kind)})
    found = read_weights(path).tensors[f"{NAME}.weight"].read()
    np.testing.assert_array_equal(found, gguf.dequantize(blocks, kind).reshape(OUT, IN))
    if kind == KIND.Q4_K:
        np.testing.assert_array_equal(found, dequantised_q4_k(blocks).reshape(OUT, IN))


def test_gguf_tensors_that_are_no_blocks(tmp_path):
    half, bf16 = random(3, 4).half().numpy(), random(4).bfloat16().view(torch.uint16).numpy()
    tensors = {"a": (half, KIND.F16), "b": (random(1, 6, 8).numpy(), KIND.F32), "c": (bf16, KIND.BF16)}
    found, metadata = read_gguf(written(tmp_path / "x.gguf", tensors))
    assert metadata["general.architecture"] == "wan"
    assert [found[name].dtype for name in "abc"] == [np.float16, np.float32, ml_dtypes.bfloat16]
    assert found["b"].shape == (1, 6, 8)
    np.testing.assert_array_equal(found["a"].read(), half)


def test_a_gguf_shape_can_be_overridden(tmp_path):
    array = random(4, 32).numpy()
    fields = {"comfy.gguf.orig_shape.w": [4, 2, 1, 4, 4]}
    found, _ = read_gguf(written(tmp_path / "x.gguf", {"w": (array, KIND.F32)}, **fields))
    assert found["w"].shape == (4, 2, 1, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[:-1], "end within"),
        (lambda c: c[:40], r"x\.gguf: "),
        (lambda c: b"GGUF" + (9).to_bytes(4, "little") + c[8:], "version 9"),
        (lambda c: c[:8] + (2**60).to_bytes(8, "little") + c[16:], "version 3 with"),
        (lambda c: c[:16] + (2**60).to_bytes(8, "little") + c[24:], "version 3 with"),
        (lambda c: c[:24] + (2**60).to_bytes(8, "little") + c[32:], "longer than the header"),
    ],
)
def test_a_damaged_gguf_is_refused(tmp_path, change, words):
    path = written(tmp_path / "x.gguf", {"w": (random(OUT, IN).numpy(), KIND.Q8_0)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=words) as error:
        read_gguf(path)
    assert "\n" not in str(error.value)


def test_a_gguf_type_without_a_formula_is_named(tmp_path):
    path = written(tmp_path / "x.gguf", {"w": (np.zeros((2, 292), np.uint8), KIND.Q8_K)})
    with pytest.raises(UserError, match="has GGUF type Q8_K"):
        read_gguf(path)
