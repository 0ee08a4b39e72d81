"""Sampling settings: the defaults of a model's release, stored in bundles, and named presets that override them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wan22.errors import UserError

SolverName = Literal["unipc", "dpm++", "euler", "renoise"]
Convention = Literal["official", "diffusers"]  # the reference that derives noise levels from steps and shift

# The negative prompt of the official release: garish, overexposed, static, blurred details, subtitles, ...
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class SamplingSpec:
    """A model's default sampling settings. Fields with defaults are missing in old bundles."""

    steps: int
    shift: float
    guidance: dict[str, float]  # by expert name; 1 skips the unconditional pass
    frames: int
    fps: int
    sizes: tuple[tuple[int, int], ...]  # width, height in pixels; the first is the default
    boundary: float | None = None  # fraction of the timestep range above which the high-noise expert is used
    solver: SolverName = "unipc"
    schedule: Convention = "official"
    sigmas: tuple[float, ...] = ()  # falling noise levels; replace those derived from steps and shift
    switch_step: int | None = None  # first step of the low-noise expert; replaces the boundary
    negative_prompt: str | None = None  # None means the official one
    preset: str = "official"  # the origin of these settings


@dataclass(frozen=True)
class Preset:
    """Settings that override those of a model's release."""

    source: str
    tasks: tuple[str, ...]  # tasks of the supported models
    changes: Mapping[str, Any]  # fields of SamplingSpec
    distilled: bool = False  # for weights trained for these few steps without guidance


A14B = ("t2v", "i2v")
UNGUIDED = {"high_noise": 1.0, "low_noise": 1.0}
FOUR_STEPS = {"solver": "euler", "steps": 4, "guidance": UNGUIDED, "switch_step": 2}
ANGLES = (math.atan(200), 1.5, 1.4, 1.0)  # TurboWan's noise levels: arctangents of noise over signal
PRESETS: Mapping[str, Preset] = {
    "official": Preset("Wan-Video/Wan2.2, wan/configs", (*A14B, "ti2v"), {}),
    "lightx2v-4step": Preset(
        "lightx2v/Wan2.2-Lightning, lightx2v/Wan2.2-Distill-Models and -Loras",
        A14B,
        {**FOUR_STEPS, "shift": 5.0},
        distilled=True,
    ),
    "nvfp4-sparse-4step": Preset("lightx2v/Wan2.2-NVFP4-Sparse", A14B, {**FOUR_STEPS, "shift": 7.0}, distilled=True),
    "fastwan-3step": Preset(
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        ("ti2v",),
        {"solver": "renoise", "steps": 3, "sigmas": (1.0, 0.757, 0.522), "guidance": {"dit": 1.0}},
        distilled=True,
    ),
    "turbowan-4step": Preset(
        "TurboDiffusion/TurboWan2.2-I2V-A14B-720P",
        ("i2v",),
        {
            "solver": "renoise",
            "steps": 4,
            "sigmas": tuple(math.sin(a) / (math.sin(a) + math.cos(a)) for a in ANGLES),
            "guidance": UNGUIDED,
        },
        distilled=True,
    ),
    "mlperf": Preset(
        "MLPerf Inference v6.0, wan-2.2-t2v-a14b; with --seed 42",
        ("t2v",),
        {"steps": 20, "shift": 3.0, "schedule": "diffusers", "guidance": {"high_noise": 4.0, "low_noise": 3.0}},
    ),
}
ALIASES = {"lightning": "lightx2v-4step"}


def presets_for(task: str) -> dict[str, Preset]:
    """The presets for models of ``task``, by name."""
    return {name: preset for name, preset in PRESETS.items() if task in preset.tasks}


def preset_named(name: str, task: str) -> tuple[str, Preset]:
    """The proper name and the preset for ``name``, which may be an alias, for a model of ``task``.

    Raises:
        UserError: the preset does not exist or is for other models.
    """
    proper = ALIASES.get(name, name)
    if proper not in PRESETS:
        raise UserError(f"preset {name!r}", f"one of {', '.join((*PRESETS, *ALIASES))}", "see wan-trt presets")
    if proper not in (usable := presets_for(task)):
        raise UserError(f"preset {name!r} for a {task} model", f"one of {', '.join(usable)}", "see wan-trt presets")
    return proper, PRESETS[proper]
