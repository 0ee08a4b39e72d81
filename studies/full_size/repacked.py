"""The experts of an official checkpoint as one quantised file each, as fp8_scaled and GGUF are published."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoint.checkpoint import Weights, open_checkpoint
from export.checkpoint.official import expert_folder
from export.checkpoint.schema import dit_tensors
from export.files.safetensors_file import header_bytes, write_safetensors
from export.files.tensor_file import FLOAT8, Planned
from export.graphs.linear import FLOAT8_MAX
from wan22.specs import ModelSpec

ALIGNMENT = 32  # of tensors in GGUF
Shapes = Mapping[str, tuple[int, ...]]


def repack(checkpoint: Path, spec: ModelSpec, form: str, *, sparse: bool) -> None:
    """Replace the shards of every expert by one file of ``form``: "fp8_scaled", or "Q4_K" if ``sparse``.

    A sparse file has holes for codes; otherwise the codes are those of the weights.
    """
    weights = {} if sparse else open_checkpoint(checkpoint).weights
    for expert in spec.experts:
        folder, shapes = checkpoint / expert_folder(expert), dit_tensors(spec.dit)
        if form == "Q4_K":
            _q4_k(folder / "Q4_K_M.gguf", shapes)
        elif sparse:
            _sparse_fp8_scaled(folder / "fp8_scaled.safetensors", shapes)
        else:
            _fp8_scaled(folder / "fp8_scaled.safetensors", weights[expert])
        for path in folder.glob("diffusion_pytorch_model*"):
            path.unlink()


def _fp8_plan(shapes: Shapes) -> dict[str, Planned]:
    """Every matrix in FP8 with a scale, after all other tensors in 16 bits."""
    matrices = [name for name, shape in shapes.items() if _is_matrix(name, shape)]
    half, one = np.dtype(np.float16), np.dtype(np.float32)
    tensors = {name: Planned(FLOAT8[0] if name in matrices else half, shape) for name, shape in shapes.items()}
    return tensors | {_scale_of(name): Planned(one, ()) for name in matrices}


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight")


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}scale_weight"


def _sparse_fp8_scaled(path: Path, shapes: Shapes) -> None:
    """Scales of 1 after the holes."""
    tensors = _fp8_plan(shapes)
    scales = [name for name in tensors if name.endswith("scale_weight")]
    with path.open("wb") as stream:
        stream.write(header_bytes(tensors))
        stream.seek(sum(planned.size_bytes for planned in tensors.values()) - 4 * len(scales), 1)
        stream.write(np.ones(len(scales), np.float32).tobytes())


def _fp8_scaled(path: Path, weights: Weights) -> None:
    scales: dict[str, float] = {}

    def pieces(name: str) -> Iterable[np.ndarray[Any, Any]]:
        if name.endswith("scale_weight"):
            return [np.array(scales[name], np.float32)]
        values = np.asarray(weights.read(name), np.float32)
        if not _is_matrix(name, values.shape):
            return [values.astype(np.float16)]
        scales[_scale_of(name)] = float(np.abs(values).max()) / FLOAT8_MAX
        return [(values / np.float32(scales[_scale_of(name)])).astype(FLOAT8[0])]

    write_safetensors(path, _fp8_plan({name: weights.shape(name) for name in weights.names()}), pieces)


def _q4_k(path: Path, shapes: Shapes) -> None:
    """Matrices of the blocks in Q4_K, the rest in float32."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_K
    values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer, size = gguf.GGUFWriter(path, "wan"), 0
    for name, shape in shapes.items():
        if name.startswith("blocks.") and len(shape) == 2:
            stored = (shape[0], shape[1] // values * block_bytes)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], raw_dtype=kind)
            size += -(-stored[0] * stored[1] // ALIGNMENT) * ALIGNMENT
        else:
            planned = Planned(np.dtype(np.float32), shape)
            writer.add_tensor_info(name, shape, planned.dtype, planned.size_bytes)
            size += -(-planned.size_bytes // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.truncate(-(-path.stat().st_size // ALIGNMENT) * ALIGNMENT + size)
