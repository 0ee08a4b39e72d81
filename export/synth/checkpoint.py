"""Synthetic checkpoints: folders like those of the Wan2.2 releases, with well-scaled random or trained weights.

File names, key names, dtypes and shards are the real ones, in the official and the -Diffusers layout (wan22.md §1.1,
§1.3). Tensors are made and written one by one, so even a full-size checkpoint needs little memory; ``sparse`` writes
files of the true size that consist of holes, to test the handling of 130 GB on a laptop.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from export.checkpoint import diffusers, official
from export.checkpoint.keys import diffusers_names, dit_config, text_encoder_config, vae_config
from export.checkpoint.part_files import TEXT_ENCODER_STEM, TRANSFORMER_STEM, index_file
from export.checkpoint.sampling import converter_shift
from export.checkpoint.schema import part_tensors
from export.files.safetensors_file import write_safetensors
from export.files.tensor_file import BFLOAT16, Pieces, Planned
from export.files.torch_file import write_torch
from export.synth.tokenizer import write_tokenizer
from export.synth.trained import trained_folder, trained_pieces, trained_tokenizer
from export.synth.weights import pieces
from wan22.bundle import staged
from wan22.errors import UserError
from wan22.outputs import check_disk
from wan22.progress import Progress, silent
from wan22.specs import TEXT_TOKENS, ModelSpec

SHARD_MAX_BYTES = 10**10
HOLE_ELEMENTS = 2**19  # of zeros at a time in sparse files: they stay in the processor's cache
FLOAT32 = np.dtype(np.float32)


def synthesise(
    spec: ModelSpec,
    folder: Path,
    layout: Literal["official", "diffusers"],
    seed: int,
    *,
    sparse: bool = False,
    half: bool = False,
    progress: Progress = silent,
) -> None:
    """Write a checkpoint of ``spec`` into the new ``folder``; the same seed gives the same bytes.

    A model whose trained weights ship with the package gets those for every seed. ``half`` stores the transformers in
    bfloat16 like converted checkpoints.

    Raises:
        UserError: the folder is not empty or not writable, or its disk is too small.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists", "a new or empty folder", "choose another")
    check_disk(folder, 0 if sparse else weights_bytes(spec, half=half))
    tensors = _Tensors(spec, seed, sparse, half, progress)
    with staged(folder) as temporary:
        if layout == "official":
            _write_official(temporary, tensors)
        else:
            _write_diffusers(temporary, tensors)


def weights_bytes(spec: ModelSpec, *, half: bool = False) -> int:
    """The size of all tensors of a checkpoint in bytes; headers and other files add a few MB."""
    return sum(
        _dtype(part, half=half).itemsize * prod(shape)
        for part in _parts(spec)
        for shape in part_tensors(part, spec).values()
    )


def _parts(spec: ModelSpec) -> tuple[str, ...]:
    return (*spec.experts, "text_encoder", "vae")


def _dtype(part: str, *, half: bool) -> np.dtype[Any]:
    """The dtype in which a release stores the part; ``half`` affects transformers only."""
    return BFLOAT16 if part == "text_encoder" or (half and part != "vae") else FLOAT32


@dataclass
class _Tensors:
    """Make the tensors and count them."""

    spec: ModelSpec
    seed: int
    sparse: bool
    half: bool
    progress: Progress
    done: int = 0
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = sum(len(part_tensors(part, self.spec)) for part in _parts(self.spec))

    def part(self, part: str, names: dict[str, str] | None = None) -> tuple[dict[str, Planned], Pieces]:
        """The tensors of a part, renamed by ``names`` (official → written), and a reader of their elements."""
        dtype = _dtype(part, half=self.half)
        shapes, trained = part_tensors(part, self.spec), trained_folder(self.spec)
        official = {(names or {}).get(name, name): name for name in shapes}

        def elements(written: str) -> Iterator[npt.NDArray[Any]]:
            name = official[written]
            if self.sparse:
                count = prod(shapes[name])
                zeros = np.zeros(min(count, HOLE_ELEMENTS), dtype)
                yield from (zeros[: count - start] for start in range(0, count, HOLE_ELEMENTS))
            elif trained is not None:
                yield from trained_pieces(trained, part, name)
            else:
                yield from pieces(self.spec, self.seed, part, name, shapes[name])
            self.done += 1
            self.progress("synthesise", self.done, self.total, "tensors")

        return {written: Planned(dtype, shapes[name]) for written, name in official.items()}, elements


def _write_official(folder: Path, tensors: _Tensors) -> None:
    spec = tensors.spec
    for expert in spec.experts:
        part = folder / official.expert_folder(expert)
        part.mkdir(exist_ok=True)
        _write_json(part / "config.json", _official_config(spec))
        _write_shards(part, TRANSFORMER_STEM, *tensors.part(expert))
    write_torch(folder / official.TEXT_ENCODER_FILE, *tensors.part("text_encoder"))
    write_torch(folder / official.vae_file(spec.vae.generation), *tensors.part("vae"))
    write_tokenizer(folder / official.TOKENIZER, trained_tokenizer(spec))


def _official_config(spec: ModelSpec) -> dict[str, Any]:
    dit = spec.dit
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": dit.width,
        "eps": dit.eps,
        "ffn_dim": dit.ffn_width,
        "freq_dim": dit.freq_width,
        "in_dim": dit.in_channels,
        "model_type": str(spec.task),
        "num_heads": dit.heads,
        "num_layers": dit.layers,
        "out_dim": dit.out_channels,
        "text_len": TEXT_TOKENS,
    }


def _write_diffusers(folder: Path, tensors: _Tensors) -> None:
    spec = tensors.spec
    _write_json(folder / diffusers.MODEL_INDEX, _model_index(spec))
    _write_json(_make_folder(folder / "scheduler") / "scheduler_config.json", _scheduler_config(spec))
    for expert in spec.experts:
        part = _make_folder(folder / diffusers.expert_folder(expert))
        _write_json(part / "config.json", dit_config(spec))
        _write_shards(part, TRANSFORMER_STEM, *tensors.part(expert, diffusers_names(expert, spec)))
    part = _make_folder(folder / "vae")
    _write_json(part / "config.json", vae_config(spec))
    write_safetensors(part / f"{TRANSFORMER_STEM}.safetensors", *tensors.part("vae", diffusers_names("vae", spec)))
    part = _make_folder(folder / "text_encoder")
    _write_json(part / "config.json", text_encoder_config(spec))
    _write_shards(part, TEXT_ENCODER_STEM, *tensors.part("text_encoder", diffusers_names("text_encoder", spec)))
    write_tokenizer(folder / diffusers.TOKENIZER, trained_tokenizer(spec))


def _model_index(spec: ModelSpec) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if spec.takes.image == "required" else "WanPipeline",
        "_diffusers_version": "0.35.0",
        "boundary_ratio": spec.sampling.boundary,
        "expand_timesteps": spec.takes.clean_first_frame,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if len(spec.experts) > 1 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if spec.takes.image == "required":
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index


def _scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    """The converter's scheduler config; its shift differs from the official code's (wan22.md §0.2)."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.35.0",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "final_sigmas_type": "zero",
        "flow_shift": converter_shift(spec),
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "predict_x0": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "timestep_spacing": "linspace",
        "use_flow_sigmas": True,
    }


def _write_shards(folder: Path, stem: str, plan: dict[str, Planned], elements: Pieces) -> None:
    """Write at least two safetensors shards and the index that maps tensors to shards."""
    total = sum(planned.size_bytes for planned in plan.values())
    limit = min(SHARD_MAX_BYTES, total * 3 // 5)
    shards: list[dict[str, Planned]] = [{}]
    filled = 0
    for name, planned in plan.items():
        if filled and filled + planned.size_bytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = planned
        filled += planned.size_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_safetensors(folder / file, shard, elements)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / index_file(stem), index)


def _make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
