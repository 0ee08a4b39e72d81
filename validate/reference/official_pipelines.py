"""Whole runs of the official code: its own pipelines, from prompt and image to frames.

They are built around :class:`Modules` without their constructors, which load bfloat16 weights onto CUDA, and run
unchanged on the CPU in float32. torchvision serves them for one function; where no build of it matches PyTorch's, ours
takes its place.
"""

import importlib
import os
import sys
import types
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from validate.reference.official_modules import PIPELINES, Modules
from validate.reference.parts import F32
from wan22.specs import PATCH, TEXT_TOKENS, TRAIN_TIMESTEPS


@dataclass(frozen=True)
class WholeRun:
    """What a pipeline is called with; ``guidance`` by expert, ``boundary`` as a share of the timesteps."""

    prompt: str
    negative_prompt: str
    image: Image.Image | None
    size: tuple[int, int]
    frames: int
    steps: int
    shift: float
    solver: str
    seed: int
    guidance: dict[str, float]
    boundary: float | None


class Pipelines(Modules):
    """The official modules and the pipeline of their checkpoint."""

    def generate(self, run: WholeRun) -> F32:
        """Frames ``[1, 3, F, H, W]`` in [-1, 1]."""
        pipeline, (width, height) = self._pipeline(run), run.size
        area = width * height + 1  # the size is computed from the area and the picture's shape, and rounded down
        guidance = tuple(run.guidance[expert] for expert in reversed(self._spec.experts))  # low noise first
        takes: dict[str, dict[str, Any]] = {
            "t2v": {"size": run.size, "guide_scale": guidance},
            "i2v": {"img": run.image, "max_area": area, "guide_scale": guidance},
            "ti2v": {"img": run.image, "size": run.size, "max_area": area, "guide_scale": guidance[0]},
        }
        frames = pipeline.generate(
            run.prompt,
            frame_num=run.frames,
            shift=run.shift,
            sample_solver=run.solver,
            sampling_steps=run.steps,
            seed=run.seed,
            offload_model=False,
            **takes[str(self._spec.task)],
        )
        return np.asarray(frames.numpy()[None])

    def _pipeline(self, run: WholeRun) -> Any:
        file, name = PIPELINES[str(self._spec.task)]
        official = getattr(_imported(f"wan.{file.removesuffix('.py')}"), name)
        experts = {_attribute(expert): property(partial(_expert, self, expert)) for expert in self._spec.experts}
        pipeline = _without_constructor(type(name, (official,), experts))
        vars(pipeline).update(
            device="cpu",
            rank=0,
            sp_size=1,
            t5_cpu=False,
            init_on_cpu=False,
            lightning=False,
            num_train_timesteps=TRAIN_TIMESTEPS,
            boundary=run.boundary,
            param_dtype=torch.float32,
            vae_stride=(self._spec.vae.temporal_stride, *(self._spec.vae.spatial_stride,) * 2),
            patch_size=PATCH,
            sample_neg_prompt=run.negative_prompt,
            text_encoder=self._whole_text_encoder(),
            vae=self._whole_vae(),
        )
        return pipeline

    def _whole_text_encoder(self) -> Any:
        """Tokenizer and encoder as the pipelines call them."""
        both = _without_constructor(self._code["t5"].T5EncoderModel)
        both.text_len, both.tokenizer, both.model = TEXT_TOKENS, self.tokenizer(), self.text_encoder()
        return both

    def _whole_vae(self) -> Any:
        residual = self._spec.vae.residual
        kind = getattr(self._code["vae2_2" if residual else "vae2_1"], "Wan2_2_VAE" if residual else "Wan2_1_VAE")
        vae = _without_constructor(kind)
        vae.model, vae.scale, vae.dtype = self.vae(), self._scale(), torch.float32
        return vae


def _attribute(expert: str) -> str:
    """What the pipelines call a transformer."""
    return "model" if expert == "dit" else f"{expert}_model"


def _expert(modules: Modules, expert: str, _: Any) -> Any:
    return modules.expert(expert)


def _without_constructor(kind: Any) -> Any:
    return kind.__new__(kind)


def _imported(name: str) -> types.ModuleType:
    os.environ["TQDM_DISABLE"] = "1"  # read at import
    try:
        importlib.import_module("torchvision.transforms.functional")
    except (ImportError, RuntimeError):  # absent, or a build for another PyTorch
        for stub in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            sys.modules[stub] = types.ModuleType(stub)
        vars(sys.modules["torchvision.transforms"])["functional"] = sys.modules["torchvision.transforms.functional"]
        vars(sys.modules["torchvision.transforms.functional"])["to_tensor"] = _to_tensor
    return importlib.import_module(name)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """``[3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().div(255)
