"""The experts of a sparse official checkpoint as one quantised file each, as fp8_scaled and GGUF are published."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from export.checkpoint.official import expert_folder
from export.checkpoint.schema import dit_tensors
from export.files.safetensors_file import header_bytes
from export.files.tensor_file import FLOAT8, Planned
from wan22.specs import ModelSpec

ALIGNMENT = 32  # of tensors in GGUF


def repack(checkpoint: Path, spec: ModelSpec, form: str) -> None:
    """Puts one file of ``form``, a key of :data:`FORMS`, in the place of every expert's shards."""
    for expert in spec.experts:
        folder = checkpoint / expert_folder(expert)
        for path in folder.glob("diffusion_pytorch_model*"):
            path.unlink()
        FORMS[form](folder, dit_tensors(spec.dit))


def _fp8_scaled(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every matrix in FP8 with a scale of 1, which stands behind the holes; the rest in 16 bits."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")]
    half, one = np.dtype(np.float16), np.dtype(np.float32)
    tensors = {name: Planned(FLOAT8[0] if name in matrices else half, shape) for name, shape in shapes.items()}
    size = sum(planned.size_bytes for planned in tensors.values())
    tensors |= {f"{name.removesuffix('weight')}scale_weight": Planned(one, ()) for name in matrices}
    with (folder / "fp8_scaled.safetensors").open("wb") as stream:
        stream.write(header_bytes(tensors))
        stream.seek(size, 1)
        stream.write(np.ones(len(matrices), np.float32).tobytes())


def _q4_k(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Matrices of the blocks in Q4_K, the rest in float32."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_K
    values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    path, size = folder / "Q4_K_M.gguf", 0
    writer = gguf.GGUFWriter(path, "wan")
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


FORMS: Mapping[str, Callable[[Path, Mapping[str, tuple[int, ...]]], None]] = {"fp8_scaled": _fp8_scaled, "Q4_K": _q4_k}
